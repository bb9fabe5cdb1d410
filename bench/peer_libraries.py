"""What each library offers for y = x W^T with W in few bits: a function a library, which yields (name, how to make it).

Where a library takes a group size, weights have one scale for 32 or 128 of them, or for a row where it allows that.
torchao, optimum-quanto, hqq and bitsandbytes are left out: on a CPU they dequantize the matrix at each call, or call
torch's own operators.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .peer_ggml import ggml
from .peer_problem import BFLOAT16, EXACT, INT8, MIXED, Call, Candidate, Make, Problem, ours


def torch_operators(p: Problem) -> Iterator[tuple[str, Make]]:
    """torch's own: float, packed int4 and int8, and dynamic int8 of fbgemm and oneDNN."""
    ops, float32, bfloat16 = torch.ops, torch.float32, torch.bfloat16
    numerics = {float32: EXACT, bfloat16: BFLOAT16}

    def rotating(bits: int, kind: str, weights: list[Any], run: Callable[[Tensor, Any], Tensor], size: float,
                 weight: Tensor, dtype: torch.dtype = float32) -> Candidate:  # fmt: skip
        call = lambda copy, m: run(p.rows(m, dtype), weights[copy % len(weights)])  # noqa: E731
        return Candidate(bits, kind, int(size), call, weight)

    def dense(dtype: torch.dtype) -> Candidate:
        w = p.weight.to(dtype)
        size = w.numel() * w.element_size()
        return rotating(8 * w.element_size(), numerics[dtype], p.repeat(w), F.linear, size, w[p.channels], dtype)

    def onednn() -> Candidate:
        weights = [ops.mkldnn._reorder_linear_weight(w) for w in p.repeat(p.weight)]
        run = lambda x, w: ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")  # noqa: E731
        return rotating(32, EXACT, weights, run, 4 * p.n * p.k, p.weight[p.channels])

    def int8(dtype: torch.dtype) -> Candidate:
        codes, scale, _ = p.signed(8)
        s = scale[:, 0].to(dtype)
        run = lambda x, w: torch._weight_int8pack_mm(x, w, s)  # noqa: E731
        size = codes.numel() + s.numel() * s.element_size()
        return rotating(8, numerics[dtype], p.repeat(codes), run, size, p.dequantized(8, None, dtype), dtype)

    def int4(dtype: torch.dtype, group: int) -> Candidate:
        levels, scale, _ = p.quantize(4, group)
        grid = torch.stack([scale.t(), torch.zeros_like(scale.t())], -1).to(dtype).contiguous()
        data = ops.aten._convert_weight_to_int4pack_for_cpu(levels.int(), 1)
        run = lambda x, w: ops.aten._weight_int4pack_mm_for_cpu(x, w, group, grid)  # noqa: E731
        size = levels.numel() / 2 + grid.numel() * grid.element_size()
        return rotating(4, numerics[dtype], p.repeat(data), run, size, p.dequantized(4, group, dtype), dtype)

    def int_mm() -> Candidate:
        codes, scale, weight = p.signed(8)

        def run(x: Tensor, w: Tensor) -> Tensor:
            step = x.abs().amax(1, keepdim=True) / 127
            return torch._int_mm((x / step).round().to(torch.int8), w.t()).float() * (step * scale.t())

        return rotating(8, INT8, p.repeat(codes), run, codes.numel() + 4 * p.n, weight)

    def dynamic(engine: str) -> Candidate:
        torch.backends.quantized.engine = engine
        scale = (p.weight.abs().amax(1) / 127).double()
        q = torch.quantize_per_channel(p.weight, scale, torch.zeros(p.n, dtype=torch.int64), 0, torch.qint8)
        weights = [ops.quantized.linear_prepack(q, None) for _ in range(p.copies(p.n * p.k))]

        def run(x: Tensor, w: Any) -> Tensor:
            torch.backends.quantized.engine = engine
            return ops.quantized.linear_dynamic(x, w, engine == "fbgemm")

        return rotating(8, INT8, weights, run, p.n * p.k + 4 * p.n, q.dequantize()[p.channels])

    def half() -> Candidate:
        torch.backends.quantized.engine = "fbgemm"
        weights = [ops.quantized.linear_prepack_fp16(p.weight, None) for _ in range(p.copies(2 * p.n * p.k))]

        def run(x: Tensor, w: Any) -> Tensor:
            torch.backends.quantized.engine = "fbgemm"
            return ops.quantized.linear_dynamic_fp16(x, w)

        return rotating(16, EXACT, weights, run, 2 * p.n * p.k, p.weight[p.channels].half())

    def dynamic4() -> Candidate:
        levels, scale, _ = p.quantize(4)
        data = ops.aten._dyn_quant_pack_4bit_weight(p.bytes_of(levels, 4), scale, None, p.k, p.k, p.n)
        run = lambda x, w: ops.aten._dyn_quant_matmul_4bit(x, w, p.k, p.k, p.n)  # noqa: E731
        return rotating(4, INT8, p.repeat(data), run, levels.numel() / 2 + 4 * p.n, p.dequantized(4))

    for dtype, name in ((float32, "float32"), (bfloat16, "bfloat16")):
        yield f"F.linear {name}", functools.partial(dense, dtype)
        yield f"_weight_int8pack_mm {name}", functools.partial(int8, dtype)
        for group in (32, 128):
            yield f"_weight_int4pack_mm_for_cpu {name} group {group}", functools.partial(int4, dtype, group)
    yield "oneDNN linear float32", onednn
    yield "_int_mm, dynamic", int_mm
    yield "_dyn_quant_matmul_4bit", dynamic4
    for engine in ("fbgemm", "onednn"):
        yield f"linear_dynamic {engine}", functools.partial(dynamic, engine)
    yield "linear_dynamic_fp16 fbgemm", half


def onnxruntime(p: Problem) -> Iterator[tuple[str, Make]]:
    """MatMul, MatMulNBits (accuracy level 4: int8 activations) and DynamicQuantizeMatMul."""
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    ort.set_global_thread_pool_sizes(p.threads, 1)  # one pool for all sessions: those of idle ones would spin

    def sessions(node: Any, constants: dict[str, np.ndarray], size: float, **entries: str) -> Call:
        inputs, outputs = (
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["m", width])]
            for name, width in (("x", p.k), ("y", p.n))
        )
        graph = helper.make_graph(
            [node], "g", inputs, outputs, [numpy_helper.from_array(v, name) for name, v in constants.items()]
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
        options = ort.SessionOptions()
        options.use_per_session_threads, options.log_severity_level = False, 3
        for key, value in entries.items():
            options.add_session_config_entry(key.replace("__", "."), value)
        made = [ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]) for _ in range(p.copies(size))]

        @functools.cache
        def bound(copy: int, m: int) -> tuple[Any, np.ndarray]:
            binding, y = made[copy].io_binding(), np.empty((m, p.n), np.float32)
            binding.bind_input("x", "cpu", 0, np.float32, (m, p.k), p.rows(m).data_ptr())
            binding.bind_output("y", "cpu", 0, np.float32, y.shape, y.ctypes.data)
            return binding, y

        def call(copy: int, m: int) -> np.ndarray:
            binding, y = bound(copy % len(made), m)
            made[copy % len(made)].run_with_iobinding(binding)
            return y

        return call

    def dense() -> Candidate:
        constants = {"w": p.weight.t().contiguous().numpy()}
        call = sessions(helper.make_node("MatMul", ["x", "w"], ["y"]), constants, 4 * p.n * p.k)
        return Candidate(32, EXACT, 4 * p.n * p.k, call, p.weight[p.channels])

    def nbits(bits: int, group: int, level: int, numerics: str, **entries: str) -> Candidate:
        levels, scale, _ = p.quantize(bits, group)
        data = p.bytes_of(levels, bits).view(p.n, p.k // group, -1).numpy()
        kind: dict[str, Any] = {"domain": "com.microsoft", "K": p.k, "N": p.n, "bits": bits, "block_size": group}
        node = helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], accuracy_level=level, **kind)
        size = data.size + 4 * scale.numel()
        call = sessions(node, {"w": data, "s": scale.numpy()}, size, **entries)
        return Candidate(bits, numerics, size, call, p.dequantized(bits, group))

    def dynamic() -> Candidate:
        scale = p.weight.abs().amax(1) / 63  # 7 bits: the sum of two products of 8 saturates without VNNI
        codes = (p.weight / scale[:, None]).round().to(torch.int8)
        node = helper.make_node("DynamicQuantizeMatMul", ["x", "w", "s"], ["y"], domain="com.microsoft")
        call = sessions(node, {"w": codes.t().contiguous().numpy(), "s": scale.numpy()}, p.n * p.k)
        weight = codes[p.channels].double() * scale[p.channels, None].double()
        return Candidate(8, INT8, p.n * p.k + 4 * p.n, call, weight)

    yield "MatMul float32", dense
    yield "DynamicQuantizeMatMul", dynamic
    for bits in (2, 4, 8):
        for group in (32, 128):
            yield f"MatMulNBits {bits} group {group} int8", functools.partial(nbits, bits, group, 4, INT8)
    yield "MatMulNBits 4 group 128 float32", functools.partial(nbits, 4, 128, 0, EXACT)
    lookup = {"mlas__use_lut_gemm": "1"}
    yield "MatMulNBits 2 group 128 look-up", functools.partial(nbits, 2, 128, 0, INT8, **lookup)


def openvino(p: Problem) -> Iterator[tuple[str, Make]]:
    """Compressed constants, decompressed inside its matmul; exact, and with its dynamic quantization of activations."""
    import openvino as ov
    from openvino import opset13 as op

    core = ov.Core()
    core.set_property({"ENABLE_MMAP": False})
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    dynamic = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "128"}

    def requests(weight: Callable[[], Any], size: float, settings: dict[str, str]) -> Call:
        fixed = {"INFERENCE_NUM_THREADS": p.threads, "NUM_STREAMS": 1, "ENABLE_CPU_PINNING": False}
        with (
            tempfile.TemporaryDirectory() as folder
        ):  # constants made from a buffer may outlive it: read them from a file
            x = op.parameter([-1, p.k], ov.Type.f32, name="x")
            model = ov.Model([op.result(op.matmul(x, weight(), False, True))], [x], "m")
            ov.save_model(model, f"{folder}/m.xml", compress_to_fp16=False)
            made = [
                core.compile_model(core.read_model(f"{folder}/m.xml"), "CPU", {**fixed, **settings})
                for _ in range(p.copies(size))
            ]

        @functools.cache
        def request(copy: int, m: int) -> Any:
            found = made[copy].create_infer_request()
            found.set_input_tensor(0, ov.Tensor(p.rows(m).numpy(), shared_memory=True))
            return found

        def call(copy: int, m: int) -> np.ndarray:
            found = request(copy % len(made), m)
            found.infer()
            return found.get_output_tensor(0).data

        return call

    def dense() -> Candidate:
        call = requests(lambda: ov.op.Constant(p.weight.numpy()), 4 * p.n * p.k, exact)
        return Candidate(32, EXACT, 4 * p.n * p.k, call, p.weight[p.channels])

    def compressed(bits: int, group: int | None, numerics: str, settings: dict[str, str]) -> Candidate:
        levels, scale, _ = p.quantize(bits, group)
        groups = scale.shape[1]
        shape, column = ([p.n, p.k], [p.n, 1]) if groups == 1 else ([p.n, groups, p.k // groups], [p.n, groups, 1])
        half, steps = 2 ** (bits - 1), scale.half().numpy().reshape(column)
        unsigned = bits == 2  # it has no signed type of 2 bits
        codes = p.bytes_of(levels if unsigned else (levels ^ half), bits).numpy()  # two's complement
        zero = np.full(p.n * groups // 4, 0b10101010, np.uint8)

        def weight() -> Any:
            kind = ov.Type.u2 if unsigned else getattr(ov.Type, f"i{bits}")
            tensor = ov.Tensor(codes.view(np.int8).reshape(shape)) if bits == 8 else ov.Tensor(codes, shape, kind)
            w = op.convert(ov.op.Constant(tensor), "f16")
            if unsigned:
                w = op.subtract(w, op.convert(ov.op.Constant(ov.Tensor(zero, column, kind)), "f16"))
            w = op.multiply(w, ov.op.Constant(steps))
            w = w if groups == 1 else op.reshape(w, ov.op.Constant(np.array([p.n, p.k])), False)
            return op.convert(w, "f32")

        size = codes.size + 2 * scale.numel()
        call = requests(weight, size, settings)
        return Candidate(bits, numerics, size, call, p.dequantized(bits, group, torch.float16))

    yield "MatMul float32", dense
    for numerics, settings in ((EXACT, exact), (INT8, dynamic)):
        yield f"i8 a row {numerics}", functools.partial(compressed, 8, None, numerics, settings)
        yield f"i4 a row {numerics}", functools.partial(compressed, 4, None, numerics, settings)
        yield f"i4 group 128 {numerics}", functools.partial(compressed, 4, 128, numerics, settings)
    yield "u2 a row exact", functools.partial(compressed, 2, None, EXACT, exact)


TILE = 48  # rows: AutoRound's kernels write beyond a result of 512 rows and 4 columns


def auto_round(p: Problem) -> Iterator[tuple[str, Make]]:
    """AutoRound's kernels: one scale a row at any width of 2 or more; widths that differ take a call each.

    Its compute type "int8" gave the same result as "auto", to the last digit: activations stay float32.
    """
    import auto_round_kernel as ark

    nothing = torch.empty(0)

    def multiply(x: Tensor, data: Tensor, n: int, bits: int, group: int) -> Tensor:
        return ark.woqgemm(x, data, nothing, n, p.k, group, "auto", f"int{bits}", "fp32", False)

    def packed(codes: Tensor, scale: Tensor, bits: int, group: int) -> Tensor:
        zero = torch.empty(0, dtype=torch.int8)
        arguments = (codes.t().contiguous(), scale.t().contiguous(), zero, group, "auto")
        return ark.repack_quantized_weight(*arguments, f"int{bits}", "fp32", False)

    def one(bits: int, group: int) -> Candidate:
        codes, scale, weight = p.signed(bits, group)
        data = p.repeat(packed(codes, scale, bits, group))
        call = lambda copy, m: multiply(p.rows(m), data[copy % len(data)], p.n, bits, group)  # noqa: E731
        return Candidate(bits, EXACT, data[0].numel(), call, weight)

    def mixed() -> Candidate:
        levels, scale, offset = p.quantize(MIXED)
        widths = p.widths(MIXED)
        weight = p.dequantized(MIXED)
        parts, order = [], []
        for bits in range(1, 9):
            rows = (widths == bits).nonzero()[:, 0]
            if not len(rows):
                continue
            filled = F.pad(rows, (0, -len(rows) % TILE), value=int(rows[-1]))
            values = levels[filled].int() + offset[filled]
            step, stored = (scale[filled] / 2, 2) if bits == 1 else (scale[filled], bits)  # a sign: -1 or 1 of 2 bits
            codes = (2 * values if bits == 1 else values).to(torch.int8)
            parts.append((len(filled), stored, p.repeat(packed(codes, step, stored, p.k))))
            order.append(torch.where(torch.arange(len(filled)) < len(rows), filled, p.n))
        back = torch.cat(order).argsort()[: p.n]

        def call(copy: int, m: int) -> Tensor:
            found = [multiply(p.rows(m), data[copy % len(data)], n, bits, p.k) for n, bits, data in parts]
            return torch.cat(found, 1)[:, back]

        return Candidate(MIXED, EXACT, sum(data[0].numel() for *_, data in parts), call, weight)

    for bits in range(2, 9):
        yield f"woqgemm {bits} a row", functools.partial(one, bits, p.k)
    yield "woqgemm 4 group 128", functools.partial(one, 4, 128)
    yield "woqgemm, a call for each width", mixed


# name -> (candidates, the distribution that has its version)
LIBRARIES: dict[str, tuple[Callable[[Problem], Iterator[tuple[str, Make]]], str]] = {
    "ours": (ours, "sgsc"),
    "torch": (torch_operators, "torch"),
    "onnxruntime": (onnxruntime, "onnxruntime"),
    "openvino": (openvino, "openvino"),
    "auto_round": (auto_round, "auto-round-lib"),
    "ggml": (ggml, "llama-cpp-python"),
}
