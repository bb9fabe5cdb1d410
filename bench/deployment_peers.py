"""What a user would run instead: float and int8 forms of a layer or network in torch and onnxruntime.

Every function returns something to call without arguments; what is not installed, or refuses, raises, and is then named
as missing. onnxruntime spins while it runs and stops when a run ends, so that its threads disturb nobody after.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

COMPILER = "inductor"
AHEAD = {"freezing": True}  # fold constants, batch norms above all: torch in float32 gains but at a single token
CALIBRATION = 4  # random batches for static quantization

Run = Callable[[], Any]


def compiled(network: nn.Module, x: Tensor) -> Run:
    """`torch.compile` of the whole network, one graph."""
    torch._dynamo.reset()  # threads are fixed in what is compiled
    run = torch.compile(network, fullgraph=True, dynamic=False, backend=COMPILER)
    return lambda: run(x)


def exported(network: nn.Module, x: Tensor) -> Run:
    """The whole network as an AOTInductor package, loaded back: no Python runs between its operations.

    Where another process loads a package of ours, `import sgsc.kernels` comes first: it registers the operations that
    the package calls.
    """
    with quiet(), tempfile.TemporaryDirectory() as folder:  # loading unpacks: the package is not needed afterwards
        run = packaged(torch.export.export(network, (x,)), Path(folder) / "network.pt2")
    return lambda: run(x)


def packaged(program: torch.export.ExportedProgram, path: Path) -> Callable[[Tensor], Any]:
    """Compile into a package at `path`, for as many threads as torch has now, and load it."""
    import torch._inductor as inductor

    return inductor.aoti_load_package(
        inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=AHEAD)
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the notices of what is deprecated, and the progress of exporters."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def torch_dynamic(network: nn.Module, x: Tensor) -> Run:
    """Every Linear in dynamic int8."""
    from torch.ao.quantization import quantize_dynamic

    with quiet():
        run = quantize_dynamic(copy.deepcopy(network), {nn.Linear}, dtype=torch.qint8)
    return lambda: run(x)


def torch_static(network: nn.Module, x: Tensor) -> Run:
    """Static int8 of the whole graph, batch norm and ReLU folded into the convolutions."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    with quiet():
        watched = prepare_fx(copy.deepcopy(network), get_default_qconfig_mapping("x86"), (x,))
        for batch in calibration(x):
            watched(batch)
        run = convert_fx(watched)
    return lambda: run(x)


def calibration(x: Tensor) -> Iterator[Tensor]:
    """Random batches like x, and x itself."""
    make = torch.Generator().manual_seed(1)
    yield x
    for _ in range(CALIBRATION):
        if x.is_floating_point():
            yield torch.randn(x.shape, generator=make)
        else:
            yield torch.randint(256, x.shape, generator=make)


# ---- onnxruntime ----


def session(model: bytes | str, x: Tensor, threads: int) -> Run:
    """A call of the graph on x, input and output bound beforehand."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    made = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding, values = made.io_binding(), x.contiguous().numpy()
    entry, leaving = made.get_inputs()[0].name, made.get_outputs()[0].name
    binding.bind_input(entry, "cpu", 0, values.dtype, values.shape, values.ctypes.data)
    binding.bind_output(leaving, "cpu")
    made.run_with_iobinding(binding)
    y = torch.from_numpy(binding.copy_outputs_to_cpu()[0])
    binding.bind_output(leaving, "cpu", 0, y.numpy().dtype, list(y.shape), y.data_ptr())

    def run(values=values) -> Tensor:  # the input lives as long as the call
        made.run_with_iobinding(binding)
        return y

    return run


def _graph(nodes: list[Any], constants: dict[str, Any], x: Tensor, y: torch.Size) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    entry, leaving = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))
        for name, shape in (("x", x.shape), ("y", y))
    )
    values = [numpy_helper.from_array(value.numpy(), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", [entry], [leaving], values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return model.SerializeToString()


def _geometry(layer: nn.Conv2d) -> dict[str, Any]:
    return {"pads": [*layer.padding, *layer.padding], "group": layer.groups, "kernel_shape": list(layer.kernel_size)}


def _signed(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and step of weights as 8 bits a channel, symmetric."""
    step = weight.abs().amax((1, 2, 3)) / 127
    return (weight / step[:, None, None, None]).round().to(torch.int8), step


def _unsigned(t: Tensor) -> tuple[Tensor, Tensor]:
    """Step and zero point of uint8 that hold every value of t."""
    low, high = t.min().clamp(max=0), t.max().clamp(min=0)
    step = (high - low) / 255
    return step, (-low / step).round().to(torch.uint8)


def onnx_conv(layer: nn.Conv2d, x: Tensor, threads: int) -> Run:
    """Conv in float32."""
    from onnx import helper

    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], **_geometry(layer))
    return session(_graph([node], {"w": layer.weight, "b": layer.bias}, x, layer(x).shape), x, threads)


def onnx_conv_integer(layer: nn.Conv2d, x: Tensor, threads: int) -> Run:
    """Activations quantized on the fly: DynamicQuantizeLinear and ConvInteger, then steps and bias."""
    from onnx import TensorProto, helper

    codes, step = _signed(layer.weight)
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("ConvInteger", ["q", "w", "z"], ["i"], **_geometry(layer)),
        helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["s", "ws"], ["sw"]),
        helper.make_node("Mul", ["f", "sw"], ["p"]),
        helper.make_node("Add", ["p", "b"], ["y"]),
    ]
    constants = {"w": codes, "ws": step[:, None, None], "b": layer.bias[:, None, None]}
    return session(_graph(nodes, constants, x, layer(x).shape), x, threads)


def onnx_qlinear_conv(layer: nn.Conv2d, x: Tensor, threads: int) -> Run:
    """Activations quantized with steps that are known beforehand: QuantizeLinear, QLinearConv, DequantizeLinear."""
    from onnx import helper

    codes, step = _signed(layer.weight)
    (xs, xz), (ys, yz) = _unsigned(x), _unsigned(layer(x))
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["q"]),
        helper.make_node("QLinearConv", ["q", "xs", "xz", "w", "ws", "wz", "ys", "yz", "b"], ["r"], **_geometry(layer)),
        helper.make_node("DequantizeLinear", ["r", "ys", "yz"], ["y"]),
    ]
    bias = (layer.bias / (xs * step)).round().to(torch.int32)
    zeros = torch.zeros(len(step), dtype=torch.int8)
    constants = {"xs": xs, "xz": xz, "w": codes, "ws": step, "wz": zeros, "ys": ys, "yz": yz, "b": bias}
    return session(_graph(nodes, constants, x, layer(x).shape), x, threads)


class Exported:
    """The graphs of a network, each made when it is first asked for."""

    def __init__(self, network: nn.Module, x: Tensor) -> None:
        self.network, self.x = network, x
        self.graphs: dict[str, bytes] = {}

    def graph(self, form: str) -> bytes:
        """As exported ("float32"), or as onnxruntime quantizes that ("dynamic", "static"), weights a channel."""
        if form not in self.graphs:
            self.graphs[form] = self._float32() if form == "float32" else self._quantized(form)
        return self.graphs[form]

    def _float32(self) -> bytes:
        arguments: dict[str, Any] = {"input_names": ["x"], "dynamo": True, "external_data": False, "verbose": False}
        with tempfile.TemporaryDirectory() as folder, quiet():
            path = Path(folder) / "float32.onnx"
            torch.onnx.export(self.network, (self.x,), str(path), **arguments)
            return path.read_bytes()

    def _quantized(self, form: str) -> bytes:
        import onnxruntime.quantization as quantization
        from onnxruntime.quantization.shape_inference import quant_pre_process

        batches = calibration(self.x)

        class Reader(quantization.CalibrationDataReader):
            def get_next(self) -> dict[str, Any] | None:
                batch = next(batches, None)
                return None if batch is None else {"x": batch.numpy()}

        with tempfile.TemporaryDirectory() as folder, quiet():
            plain, prepared, found = (Path(folder) / f"{name}.onnx" for name in ("float32", "prepared", "int8"))
            plain.write_bytes(self.graph("float32"))
            quant_pre_process(str(plain), str(prepared), skip_symbolic_shape=True)
            if form == "dynamic":
                quantization.quantize_dynamic(str(prepared), str(found), per_channel=True)
            else:
                quantization.quantize_static(str(prepared), str(found), Reader(), per_channel=True)
            return found.read_bytes()
