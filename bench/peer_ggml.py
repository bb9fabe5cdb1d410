"""ggml's matrix products through its C interface, from the shared libraries in llama-cpp-python."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .peer_problem import EXACT, INT8, PERIOD, Candidate, Make, Problem

GGML = {
    **{"f32": 32, "q8_0": 8, "q6_K": 6, "q5_K": 5, "q5_0": 5, "q4_0": 4, "q4_1": 4, "q4_K": 4, "iq4_nl": 4},
    **{"q3_K": 3, "q2_K": 2, "tq2_0": 2, "tq1_0": 2, "q1_0": 1},
}  # type -> bits of a code; what is stored, scales included, is more


class _Tensor(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4)]
    _fields_ += [("nb", ctypes.c_size_t * 4), ("op", ctypes.c_int), ("op_params", ctypes.c_int32 * 16)]
    _fields_ += [("flags", ctypes.c_int32), ("src", ctypes.c_void_p * 10), ("view_src", ctypes.c_void_p)]
    _fields_ += [("view_offs", ctypes.c_size_t), ("data", ctypes.c_void_p), ("name", ctypes.c_char * 64)]
    _fields_ += [("extra", ctypes.c_void_p), ("padding", ctypes.c_char * 8)]


class _Init(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class _Traits(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("block", ctypes.c_int64), ("interleave", ctypes.c_int64)]
    _fields_ += [("size", ctypes.c_size_t), ("quantized", ctypes.c_bool), ("to_float", ctypes.c_void_p)]


def ggml(p: Problem) -> Iterator[tuple[str, Make]]:
    """ggml_mul_mat of the shared libraries in llama-cpp-python, called directly; also from its repacked buffers."""
    import llama_cpp

    folder = Path(llama_cpp.__file__).parent / "lib"
    base, cpu = (
        ctypes.CDLL(str(next(folder.glob(f"lib{n}.so*"))), mode=ctypes.RTLD_GLOBAL) for n in ("ggml-base", "ggml-cpu")
    )
    pointer, integer, long, size_t = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t

    def function(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
        found = getattr(cpu if name.startswith("ggml_backend_cpu_") and hasattr(cpu, name) else base, name)
        found.restype, found.argtypes = result, list(arguments)
        return found

    init = function("ggml_init", pointer, _Init)
    matrix = function("ggml_new_tensor_2d", pointer, pointer, integer, long, long)
    product = function("ggml_mul_mat", pointer, pointer, pointer, pointer)
    new_graph = function("ggml_new_graph", pointer, pointer)
    expand = function("ggml_build_forward_expand", None, pointer, pointer)
    quantize = function("ggml_quantize_chunk", size_t, integer, pointer, pointer, long, long, long, pointer)
    row_size = function("ggml_row_size", size_t, integer, long)
    type_name = function("ggml_type_name", ctypes.c_char_p, integer)
    traits = function("ggml_get_type_traits", ctypes.POINTER(_Traits), integer)
    allocate = function("ggml_backend_alloc_ctx_tensors_from_buft", pointer, pointer, pointer)
    put = function("ggml_backend_tensor_set", None, pointer, pointer, size_t, size_t)
    get = function("ggml_backend_tensor_get", None, pointer, pointer, size_t, size_t)
    compute = function("ggml_backend_graph_compute", integer, pointer, pointer)
    plain = function("ggml_backend_cpu_buffer_type", pointer)()
    backend = function("ggml_backend_cpu_init", pointer)()
    function("ggml_backend_cpu_set_n_threads", None, pointer, integer)(backend, p.threads)
    registry = function("ggml_backend_cpu_reg", pointer)()
    device = function("ggml_backend_reg_dev_get", pointer, pointer, size_t)(registry, 0)
    address = function("ggml_backend_reg_get_proc_address", pointer, pointer, ctypes.c_char_p)
    buffer_name = function("ggml_backend_buft_name", ctypes.c_char_p, pointer)
    extra = ctypes.CFUNCTYPE(ctypes.POINTER(pointer), pointer)(address(registry, b"ggml_backend_dev_get_extra_bufts"))
    buffers = extra(device)
    repacking, i = None, 0
    while buffers[i]:
        repacking = buffers[i] if b"REPACK" in buffer_name(buffers[i]) else repacking
        i += 1
    kinds = {type_name(i): i for i in range(llama_cpp.GGML_TYPE_COUNT)}

    def one(name: str, where: int | None) -> Candidate:
        kind = kinds[name.encode()]
        stored = row_size(kind, p.k)
        some = min(p.n, PERIOD)
        data = np.empty((some, stored), np.uint8)
        ones = np.ones(p.k, np.float32)
        quantize(kind, p.weight.data_ptr(), data.ctypes.data, 0, some, p.k, ones.ctypes.data)
        weight = torch.empty(len(p.channels), p.k)
        convert = ctypes.CFUNCTYPE(None, pointer, pointer, long)(traits(kind).contents.to_float or 0)
        for i, channel in enumerate(p.channels.tolist()):
            if name == "f32":
                weight[i] = p.weight[channel]
            else:
                convert(data[channel % PERIOD].ctypes.data, weight[i].data_ptr(), p.k)
        whole = np.ascontiguousarray(np.tile(data, (-(-p.n // some), 1))[: p.n])
        context = init(_Init(1 << 16, None, True))
        weights = [matrix(context, kind, p.k, p.n) for _ in range(p.copies(whole.size))]
        if not allocate(context, where):
            raise MemoryError("no buffer")
        if where != plain and not ctypes.cast(weights[0], ctypes.POINTER(_Tensor)).contents.extra:
            raise NotImplementedError("this type is not repacked on this machine")
        for w in weights:
            put(w, whole.ctypes.data, 0, whole.size)

        @functools.cache
        def graph(copy: int, m: int) -> tuple[int, int]:
            own = init(_Init(1 << 20, None, True))
            x = matrix(own, 0, p.k, m)
            y = product(own, weights[copy], x)
            made = new_graph(own)
            expand(made, y)
            allocate(own, plain)
            put(x, p.rows(m).data_ptr(), 0, 4 * m * p.k)
            return made, y

        def call(copy: int, m: int) -> tuple[int, int]:
            made, y = graph(copy % len(weights), m)
            if compute(backend, made):
                raise RuntimeError("ggml_backend_graph_compute failed")
            return y, m

        def fetch(result: tuple[int, int]) -> Tensor:
            y = torch.empty(result[1], p.n)
            get(result[0], y.data_ptr(), 0, 4 * y.numel())
            return y

        return Candidate(GGML[name], EXACT if name == "f32" else INT8, whole.size, call, weight, fetch)

    for name in GGML:
        yield name, functools.partial(one, name, plain)
    for name in ("q8_0", "q6_K", "q5_K", "q4_0", "q4_K", "iq4_nl", "q3_K", "q2_K"):
        if repacking:
            yield f"{name} repacked", functools.partial(one, name, repacking)
