"""The same networks through other libraries, at the widths that ours have.

Weights alone are rounded by the libraries of bench/sgsc_peers.py. With inputs, at 8 bits, a network is exported and
quantized by torchao's PT2E with its X86InductorQuantizer as it is by itself; and, at any bits, by Brevitas layer by
layer, as the example of its PTQ does: statistics, then biases that are corrected. All have weights a channel, inputs a
tensor, norms folded, and are calibrated on the samples that calibrate ours; tables of embeddings are rows too, but PT2E
leaves them float. CONTRIBUTING.md says how they install.
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
BREVITAS = {"brevitas static": "", "brevitas MSE": "MSE"}  # peer -> what the names of its quantizers end in
BATCH = 128  # of calibration


def by_others(make: Callable[[], nn.Module], judge: Callable[[nn.Module], Row]) -> Row:
    """What `judge` says of a network that another library makes; where it does not, why."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = make()
    except Exception as error:  # of another's code, on shapes or widths that it may not serve, or not there at all
        return {"missing": f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"}
    return judge(model)


@torch.no_grad()
def rounded(model: nn.Module, library: str, widths: Mapping[str, tuple[int, int | None]]) -> nn.Module:
    """The model with weights, tables of embeddings too, as a library rounds rows to the widths of its layers."""
    for name, (bits, _) in widths.items():
        rows = model.get_submodule(name).get_parameter("weight")
        rows.copy_(LIBRARIES[library][0](rows.flatten(1).clone(), bits, ROW)[0].view_as(rows))
    return model


def calibrated(
    model: nn.Module, inputs: Tensor, widths: Mapping[str, tuple[int, int | None]], ending: str
) -> nn.Module:
    """The model with weights and inputs by Brevitas at the widths of its layers.

    Weights are symmetric, inputs have a zero point. Ranges are Brevitas's own, the largest weight and all but a share
    of 1e-5 of the inputs, or, where `ending` is "MSE", those of least squared error.
    """
    from brevitas import nn as layers
    from brevitas.core.scaling.standalone import ParameterFromStatsFromParameterScaling
    from brevitas.graph.calibrate import bias_correction_mode, calibration_mode
    from brevitas.graph.quantize import layerwise_quantize
    from brevitas.quant import scaled_int, shifted_scaled_int

    bits = {id(model.get_submodule(name)): pair for name, pair in widths.items()}
    of_weights = getattr(scaled_int, f"Int8WeightPerChannelFloat{ending}")
    how = {
        "weight_quant": of_weights.let(scaling_impl=ParameterFromStatsFromParameterScaling),  # found once
        "input_quant": getattr(shifted_scaled_int, f"ShiftedUint8ActPerTensorFloat{ending}"),
        "weight_bit_width": lambda layer: bits[id(layer)][0],
        "input_bit_width": lambda layer: bits[id(layer)][1],
        "bias_quant": None,
        "return_quant_tensor": False,
    }
    for name, (width, _) in widths.items():
        if isinstance(table := model.get_submodule(name), nn.Embedding):  # its own has one step for all rows
            rows = layers.QuantLinear(
                *reversed(table.weight.shape), bias=False, weight_quant=how["weight_quant"], weight_bit_width=width
            )
            rows.weight = table.weight
            table.weight = nn.Parameter(rows.eval().quant_weight().value.detach())
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    others = [name for name, m in model.named_modules() if isinstance(m, kinds) and id(m) not in bits]
    made = layerwise_quantize(model, {k: (getattr(layers, f"Quant{k.__name__}"), how) for k in kinds}, others)
    with torch.no_grad():
        for mode in (calibration_mode, bias_correction_mode):
            with mode(made):
                for part in inputs.split(BATCH):
                    made(part)
    return made.eval()


def exported(of: Network, inputs: Tensor) -> nn.Module:
    """8 bits of weights and inputs by PT2E, calibrated on `inputs`; simulated, as ours are judged."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    free = {0: torch.export.Dim.AUTO}
    if of.metric == "psnr":  # its images are of other sizes than its patches
        free |= {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    if not inputs.is_floating_point():  # a text that is judged is a character shorter
        free |= {1: torch.export.Dim.AUTO}
    with torch.no_grad():
        graph = torch.export.export(of.model, (inputs[:2],), dynamic_shapes=(free,)).module()
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(graph, quantizer)
        for part in inputs.split(BATCH):
            prepared(part)
        return convert_pt2e(prepared)
