"""The Triton kernels without a GPU: interpreted against the reference, and compiled for GPUs that are not here."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed: its kernels are not checked")
tl = triton.language

from sgsc.kernels import triton_fake_quantize as ours  # noqa: E402
from sgsc.kernels import triton_fake_quantize_kernels as programs  # noqa: E402
from sgsc.kernels.op import OPS  # noqa: E402
from sgsc.kernels.triton_aot import TARGETS, compile_for  # noqa: E402
from tests.kernels.triton_interpreted import CHECKS, assert_as_good, assert_same  # noqa: E402

# all interpreted checks run while the first is set up: six minutes of one core, which a busy machine shares
WAIT = 2_400  # seconds
pytestmark = pytest.mark.timeout(WAIT + 100)
ROOT = Path(__file__).resolve().parents[2]
DEVICE_CHECKS = [name for name, check in CHECKS.items() if "device" in inspect.signature(check).parameters]
compiles = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="TRITON_INTERPRET=1: the interpreter replaces the compiler"
)


def python(*arguments, **environment):
    """Run another Python in the repository's root, on one core."""
    everything = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, *arguments]
    return subprocess.run(command, check=False, cwd=ROOT, env=everything, capture_output=True, text=True, timeout=WAIT)


# ---- against the reference ----


@pytest.fixture(scope="module")
def interpreted():
    return python("-m", "tests.kernels.triton_interpreted", TRITON_INTERPRET="1")


@pytest.mark.parametrize("check", CHECKS)
def test_interpreted(check, interpreted):
    holds = interpreted.stdout.splitlines()
    assert f"{check} holds" in holds, f"exit status {interpreted.returncode}, {holds}\n{interpreted.stderr}"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: its results are checked by the interpreter alone")
@pytest.mark.parametrize("check", DEVICE_CHECKS)
def test_on_the_gpu(check):
    CHECKS[check]("cuda")


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1.1, -1.0], ids=["nan", "inf", "ten-percent", "sign"])
def test_a_wrong_value_is_caught(wrong):
    terms = torch.full((8, 4), 0.25, dtype=torch.float64)
    right = torch.ones(8)
    actual = right.clone()
    actual[3] = wrong
    with pytest.raises(AssertionError, match="of the terms"):
        assert_as_good(actual, right, terms)
    with pytest.raises(AssertionError, match=r"at \(3,\), expected 1\.0"):
        assert_same(actual, right)


def test_tiny_sums_are_not_taken_for_zero():
    terms = torch.full((8, 4), 1e-20, dtype=torch.float64)
    with pytest.raises(AssertionError, match="of the terms"):
        assert_as_good(torch.zeros(8), terms.sum(1).float(), terms)


def test_the_sign_of_zero_and_the_dtype_count():
    with pytest.raises(AssertionError, match=r"-0\.0 at \(0,\), expected 0\.0"):
        assert_same(torch.tensor([-0.0]), torch.tensor([0.0]))
    with pytest.raises(AssertionError, match=r"float16, expected torch\.float32"):
        assert_same(torch.zeros(1, dtype=torch.float16), torch.zeros(1))


# ---- what happens around the kernels ----


def test_every_operation_is_registered():
    for name in ours.IMPLEMENTATIONS:
        assert name in OPS
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sgsc::{name}", "CUDA"), name


def test_the_package_works_without_triton():
    program = """
import sys
sys.modules["triton"] = None
import torch
import sgsc.kernels
assert not torch._C._dispatch_has_kernel_for_dispatch_key("sgsc::fake_quantize", "CUDA")
one = torch.ones(2)
print(sgsc.kernels.OPS["fake_quantize"].reference(torch.ones(2, 3), one, -8 * one, 7 * one, 0 * one).sum().item())
"""
    run = python("-c", program)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "6.0\n"


@pytest.mark.parametrize(
    ("shape", "parts", "programs"),
    [
        ((4_096, 4_096), 1, 4_096),
        ((64, 4_608), 1, 64),
        ((1_000, 9), 1, 16),
        ((1, 16_384), 1, 1),
        ((1, 2**24), 1_024, 1_024),
        ((8, 2**20), 128, 1_024),
        ((8, 2**15), 16, 128),
        ((100, 23 * 2_048), 8, 800),
        ((4_096, 2**15), 1, 4_096),
        ((5, 0), 1, 1),
    ],
)
def test_the_plan_covers_the_shape(shape, parts, programs):
    p = ours.plan(*shape)
    assert p.parts == parts
    assert -(-shape[0] // p.rows) * p.parts == programs
    assert p.span % p.block == 0
    assert (p.parts - 1) * p.span < max(1, shape[1]) <= p.parts * p.span
    assert 1 <= p.warps <= 8


def layer(channels, width, offset=0):
    """(scale, lo, hi, shift, x, out, grad), x `offset` elements beyond an aligned address."""
    x = torch.zeros(channels * width + offset)[offset:].view(channels, width)
    return [*(torch.zeros(channels) for _ in range(4)), x, torch.zeros(channels, width), torch.zeros(channels, width)]


def test_the_table_of_layers():
    """Only the compiled kernel heeds the promise of alignment, so that the table itself has to be right."""
    calls = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda table, layers, **options: calls.append((grid, table, layers, options))

    layers = [layer(3, 64), layer(2, 64, offset=1), layer(4, 24), layer(1, 32), layer(2, 64)]
    layers[3][6] = torch.zeros(33)[1:].view(1, 32)  # the gradient alone is off
    ours._launch(Kernel(), layers)
    ((grid, table, count, options),) = calls
    assert grid == (12,)
    assert count == 5
    assert options == {"DTYPE": tl.float32, "LAYERS": 32, "BLOCK": 1024, "num_warps": 4}
    assert table[:3].tolist() == [[0, 3, 5, 9, 10], [64, 64, 24, 32, 64], [1, 0, 0, 0, 1]]
    assert table[3:].tolist() == [[one[i].data_ptr() for one in layers] for i in range(7)]


def test_a_captured_graph_gets_no_table(monkeypatch):
    class OnGpu:
        is_cuda, device = True, torch.device("cuda", 0)
        dtype, shape = torch.float32, torch.Size([4, 64])

        def dim(self):
            return 2

        def numel(self):
            return 256

    class Vector(OnGpu):
        shape = torch.Size([4])

    grid = (Vector(),) * 4
    for capturing, together in ((False, [[0, 1]]), (True, [])):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda answer=capturing: answer)
        assert ours._together([OnGpu(), OnGpu()], [grid, grid], [None, None]) == together


def test_what_the_kernels_cannot_take_goes_to_the_reference(monkeypatch):
    monkeypatch.setattr(ours, "INTERPRETED", tl.constexpr(True))  # so that CPU tensors alone are no reason
    x, one = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.ones(3)
    grid = (one, -8 * one, 7 * one, 0 * one)
    assert_same(ours.forward(x, *grid), x.round() + 0.0)
    assert_same(ours.backward(x, x, *grid)[0], x)
    with pytest.raises(RuntimeError, match="must match the size"):
        ours.forward(x.float(), torch.ones(2), *grid[1:])


# ---- machine code ----

VECTORS = dict.fromkeys(("scale", "lo", "hi", "shift", "to_scale", "to_lo", "to_hi"), "*fp32")
TYPES = {"fp32": tl.float32, "bf16": tl.bfloat16}
# 128-bit accesses where a thread holds that much; 4 elements of 16 bits a thread on AMD, whose warps are twice as wide
LOAD = {"cuda": r"LDG\.E\.128", "hip fp32": "global_load_dwordx4", "hip bf16": "global_load_dwordx2"}
STORE = {"cuda": r"STG\.E\.128", "hip fp32": "global_store_dwordx4", "hip bf16": "global_store_dwordx2"}
EXACT = {
    "cuda": (r"div\.rn\.f32", "FRND", r"max\.NaN\.f32", r"min\.NaN\.f32"),
    "hip": ("v_div_fixup_f32", "v_rndne_f32_e(32|64)", "v_cmp_o_f32_e(32|64)"),
}
FORBIDDEN = {"cuda": (r"div\.(full|approx).*", "(LDL|STL).*"), "hip": ("scratch_.*",)}


def machine_code(name, dtype, target, shape=(4_096, 4_096), divisible=True):
    kernel = getattr(programs, name)
    if name.startswith("many"):
        constants = {"DTYPE": TYPES[dtype], "LAYERS": 32, "BLOCK": ours.MANY_BLOCK}
        types, warps = {"table": "*i64", "layers": "i32"}, ours.MANY_BLOCK // ours.PER_WARP
        return compile_for(kernel, target, types, constants, ["table"], warps)
    p = ours.plan(*shape)
    matrices = dict.fromkeys(("grad", "x", "out"), f"*{dtype}")
    types = {**matrices, **VECTORS, **dict.fromkeys(("C", "K", "span"), "i32")}
    types = {n: types[n] for n in kernel.arg_names if n in types}
    aligned = [n for n in types if n != "C" and (divisible or n != "K")]
    return compile_for(kernel, target, types, {"ROWS": p.rows, "BLOCK": p.block}, aligned, p.warps)


def complaints(code, name, dtype, registers=None):
    backend = TARGETS[code.target].backend
    key = backend if backend == "cuda" else f"{backend} {dtype}"
    if registers is None:
        registers = {"forward": 64, "backward": 128}[name.removeprefix("many_").removesuffix("_kernel")]
    # in float32 two loads of each operand are in flight on NVIDIA
    loads = (2 if "backward" in name else 1) * (2 if (backend, dtype) == ("cuda", "fp32") else 1)
    found = code.complaints(registers, (LOAD[key], STORE[key], *EXACT[backend]), FORBIDDEN[backend])
    if code.count(LOAD[key]) < loads:
        found.append(f"{code.target}: {code.count(LOAD[key])} loads {LOAD[key]}, want {loads}")
    return found


@compiles
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("forward_kernel", (4_096, 4_096)),
        ("forward_kernel", (4_096, 64)),
        ("backward_kernel", (4_096, 4_096)),
        ("backward_kernel", (4_096, 64)),
        ("many_forward_kernel", None),
        ("many_backward_kernel", None),
    ],
    ids=lambda v: v if isinstance(v, str) else "" if v is None else f"K{v[1]}",
)
def test_machine_code(name, shape, dtype, target):
    assert complaints(machine_code(name, dtype, target, shape), name, dtype) == []


@compiles
@pytest.mark.parametrize("target", TARGETS)
def test_the_sums_of_parts_compile(target):
    types = dict.fromkeys(programs.add_parts_kernel.arg_names[:6], "*fp32") | {"parts": "i32"}
    code = compile_for(programs.add_parts_kernel, target, types, {"PADDED": 1024})
    assert code.complaints(registers=64) == []


@compiles
@pytest.mark.parametrize("target", TARGETS)
def test_single_elements_a_load_are_noticed(target):
    code = machine_code("forward_kernel", "fp32", target, divisible=False)
    assert any(
        "no instruction" in c and ("LDG" in c or "load" in c) for c in complaints(code, "forward_kernel", "fp32")
    )


@compiles
@pytest.mark.parametrize("target", TARGETS)
def test_too_many_registers_are_noticed(target):
    code = machine_code("forward_kernel", "fp32", target)
    (complaint,) = complaints(code, "forward_kernel", "fp32", registers=code.registers - 1)
    assert complaint == f"{target}: {code.registers} registers, allowed {code.registers - 1}"


@triton.jit
def _spilling_kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    v = tl.load(x + i)
    tl.store(out + i, v / tl.max(v))


@compiles
@pytest.mark.parametrize("target", TARGETS)
def test_spills_and_inexact_division_are_noticed(target):
    types = {"x": "*fp32", "out": "*fp32"}
    warps = 1_024 // TARGETS[target].warp_size  # 1,024 threads have 64 registers each, on AMD 128, for 128 values
    code = compile_for(_spilling_kernel, target, types, {"N": 131_072}, list(types), warps)
    found = "\n".join(complaints(code, "forward_kernel", "fp32"))
    assert "spills" in found
    backend = TARGETS[target].backend
    assert f"no instruction {EXACT[backend][1]}" in found
    assert any(f"instructions {p}, allowed none" in found for p in FORBIDDEN[backend])


def test_the_compiler_says_when_it_is_replaced(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1 replaces the compiler"):
        compile_for(programs.forward_kernel, "sm_90", {}, {})
