"""The same networks through other libraries, at the widths that ours have.

Weights alone are rounded by the libraries of bench/sgsc_peers.py. With inputs, a network is exported and quantized by
torchao's PT2E with its X86InductorQuantizer as it is by itself: weights a channel, inputs a tensor, calibrated on the
samples that calibrate ours, norms folded. CONTRIBUTING.md says how they install.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from .runs import Row
from .sgsc_peers import LIBRARIES, ROW
from .strategy_networks import Network

PT2E = "torchao PT2E"
BATCH = 128  # of calibration


def by_others(make: Callable[[], nn.Module], judge: Callable[[nn.Module], Row]) -> Row:
    """What `judge` says of a network that another library makes; where it does not, why."""
    try:
        model = make()
    except Exception as error:  # of another's code, on shapes or widths that it may not serve, or not there at all
        return {"missing": f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"}
    return judge(model)


@torch.no_grad()
def rounded(model: nn.Module, library: str, widths: Mapping[str, tuple[int, int | None]]) -> nn.Module:
    """The model with weights as a library rounds them to the widths of its layers; embeddings and inputs stay float."""
    for name, (bits, _) in widths.items():
        if not isinstance(layer := model.get_submodule(name), nn.Embedding):
            rows = layer.get_parameter("weight")
            rows.copy_(LIBRARIES[library][0](rows.flatten(1).clone(), bits, ROW)[0].view_as(rows))
    return model


def exported(of: Network, inputs: Tensor) -> nn.Module:
    """8 bits of weights and inputs by PT2E, calibrated on `inputs`; simulated, as ours are judged."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    free = {0: torch.export.Dim.AUTO}
    if of.metric == "psnr":  # its images are of other sizes than its patches
        free |= {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    if not inputs.is_floating_point():  # a text that is judged is a character shorter
        free |= {1: torch.export.Dim.AUTO}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of another's code
        graph = torch.export.export(of.model, (inputs[:2],), dynamic_shapes=(free,)).module()
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(graph, quantizer)
        for part in inputs.split(BATCH):
            prepared(part)
        return convert_pt2e(prepared)
