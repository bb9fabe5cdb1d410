"""Convolutions on a GPU without one: which calls compile anew, and the machine code of the depthwise kernel."""

from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed: its kernels are not checked")
tl = triton.language

from sgsc.kernels import fragments, run_form, triton_packed, triton_packed_kernels  # noqa: E402
from sgsc.kernels import triton_depthwise_kernels as depthwise  # noqa: E402
from sgsc.kernels.packed_conv2d import _case, slides  # noqa: E402
from sgsc.kernels.triton_aot import TARGETS, compile_for, variant_of  # noqa: E402
from sgsc.kernels.triton_configuration import Config, Gpu, sliding  # noqa: E402
from tests.kernels.test_triton_packed import BUDGETS  # noqa: E402

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="TRITON_INTERPRET=1: the interpreter replaces the compiler"
)
LAST = torch.channels_last
H100 = Gpu("", 132, 232_448, 90)


# ---- what compiles anew ----


@pytest.fixture
def launched(monkeypatch):
    """Run a convolution up to its one launch: the kernel, its arguments and options."""
    found = []

    class Noted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *arguments, **options: found.append((self.kernel, arguments, options))

    kernels = SimpleNamespace(conv2d_kernel=Noted(triton_packed_kernels.conv2d_kernel), linear_kernel=None)
    slides = SimpleNamespace(depthwise_kernel=Noted(depthwise.depthwise_kernel))
    monkeypatch.setattr(triton_packed, "_products", kernels)
    monkeypatch.setattr(triton_packed, "_slides", slides)
    monkeypatch.setattr(triton_packed, "INTERPRETED", tl.constexpr(True))  # so that CPU tensors are taken
    monkeypatch.setattr(triton_packed, "configure", lambda *shape: Config(16, 1, 2, "wide", 4, 3))
    monkeypatch.setattr(triton_packed, "sliding", lambda *shape: sliding(4_096, 1_024, shape[2], H100))
    monkeypatch.setitem(run_form.FORMS, "cpu", run_form.FRAGMENTS)

    def run(layout=torch.contiguous_format, **shape):
        x, *rest = _case(**shape)
        triton_packed.convolution(x.contiguous(memory_format=layout), *rest)
        return found.pop()

    return run


def variants(launched, target, shapes):
    return {variant_of(kernel, target, *how) for kernel, *how in (launched(**shape) for shape in shapes)}


COMMON = [
    {"size": (32, 32)},
    {"size": (33, 32), "stride": (2, 2)},
    {"size": (16, 17), "stride": (16, 1), "padding": (0, 0)},
    {"size": (1, 1)},
    {"size": (32, 64), "stride": (1, 16), "padding": (16, 16), "batch": 1},
]
# layers of one kernel each, whatever else they are
LAYERS = {
    "pixels": [
        *({"inputs": 5, **one} for one in COMMON),
        {"inputs": 9, "size": (33, 33), "dilation": (16, 1)},
        {"inputs": 20, "channels": 32, "groups": 2, "kernel": (1, 1)},
        {"inputs": 4, "channels": 150, "kernel": (5, 16), "padding": (8, 8)},
    ],
    "runs": [
        *({"layout": LAST, "inputs": 16, **one} for one in COMMON),
        {"layout": LAST, "inputs": 16, "kernel": (1, 1)},
        {"layout": LAST, "inputs": 64, "channels": 36, "groups": 4},
    ],
    "depthwise": [
        *({"inputs": 9, "groups": 9, **one} for one in COMMON),
        {"inputs": 16, "channels": 32, "groups": 16, "batch": 16},
        {"inputs": 6, "channels": 6, "groups": 2, "dilation": (2, 1), "kernel": (1, 3)},
    ],
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", LAYERS)
def test_geometries_share_what_is_compiled(kind, target, launched):
    kernel, _, options = launched(**LAYERS[kind][0])
    assert kernel.fn.__name__ == ("depthwise_kernel" if kind == "depthwise" else "conv2d_kernel")
    assert options.get("X", "depthwise") == kind
    assert len(variants(launched, target, LAYERS[kind])) == 1


def test_what_the_code_depends_on_compiles_anew(launched):
    shapes = [{"inputs": 5}, {"layout": LAST, "inputs": 16}, {"inputs": 5, "dtype": torch.float16}]
    shapes += [{"inputs": 5, "with_bias": False}, {"inputs": 9, "groups": 9}]
    shapes += [{"inputs": 9, "groups": 9, "kernel": (3, 5)}, {"inputs": 9, "groups": 9, "dilation": (1, 2)}]
    assert len(variants(launched, "sm_90", shapes)) == len(shapes)


@triton.jit(do_not_specialize=["pair"])
def _tuple_kernel(out, pair):
    tl.store(out, pair[0] + pair[1])


@triton.jit(do_not_specialize=["a", "b"])
def _flat_kernel(out, a, b):
    tl.store(out, a + b)


def test_a_variant_for_each_pattern_of_numbers_is_noticed():
    out = torch.zeros(1)
    pairs = [(3, 5), (1, 5), (3, 16)]
    assert len({variant_of(_tuple_kernel, "sm_90", (out, pair), {}) for pair in pairs}) == 3
    assert len({variant_of(_flat_kernel, "sm_90", (out, *pair), {}) for pair in pairs}) == 1


# ---- machine code of the depthwise kernel ----

# Target, dtype, width of the kernel, programs enough, an offset; registers, instructions a product of the inner loop,
# on AMD, whose loops lie within one another, of the whole kernel, as measured with some per cent on top.
CODE = [
    ("sm_90", "bf16", 3, True, False, 168, 9.8),
    ("sm_90", "bf16", 3, True, True, 168, 11.5),
    ("sm_90", "fp32", 3, True, False, 168, 9.0),
    ("sm_90", "fp16", 7, True, False, 128, 11.3),
    ("sm_90", "fp16", 3, False, False, 128, 15.5),
    ("sm_80", "bf16", 5, True, False, 128, 11.9),
    ("sm_80", "fp32", 7, True, False, 128, 9.8),
    ("gfx942", "bf16", 3, True, False, 72, 1_280),
    ("gfx942", "fp32", 7, True, False, 72, 1_150),
]


def compiled(target, dtype, across, full, shifted):
    """The machine code, and what `sliding` chose."""
    c = sliding(4_096 if full else 32, 1_024, across, H100)
    constants = {
        "ROWS": 16, "COLUMNS": c.columns, "EACH": c.each, "ACROSS": c.across, "DILATION": 1, "SHIFTED": shifted,
        "BIASED": True,
    }  # fmt: skip
    pointers = dict.fromkeys(("x", "y", "bias"), f"*{dtype}") | dict.fromkeys(("words", "plan"), "*i32")
    pointers["grid"] = "*fp32"
    types = {n: pointers.get(n, "i32") for n in depthwise.depthwise_kernel.arg_names if n not in constants}
    return compile_for(depthwise.depthwise_kernel, target, types, constants, pointers, c.warps), c


def complaints(code, c, dtype, registers, most):
    """What is wrong, in words: beside spills and shared memory, loads and instructions of the inner loop."""
    found = code.complaints(registers, forbids=["(LDL|STL|STS|LDS).*", "scratch_.*", "ds_.*"])
    if code.shared:
        found.append(f"{code.target}: {code.shared} bytes of shared memory")
    if code.target == "gfx942":
        if len(code.code) > most:
            found.append(f"{code.target}: {len(code.code)} instructions, allowed {most}")
        return found
    loop = min((one for one in code.loops if any(line.startswith("FFMA") for line in one)), key=len)
    each = c.each * c.across
    products = each * c.columns // (32 * c.warps)
    loads = sum(line.startswith("LDG") for line in loop)
    if loads != products + each:  # a value of x each, and a word each level
        found.append(f"{code.target}: {loads} loads of {products} products and {each} levels")
    if len(loop) > most * products:
        found.append(f"{code.target}: {len(loop) / products:.2f} instructions a product, allowed {most}")
    return found


@BUDGETS
@pytest.mark.parametrize(("target", "dtype", "across", "full", "shifted", "registers", "most"), CODE)
def test_depthwise_machine_code(target, dtype, across, full, shifted, registers, most):
    code, c = compiled(target, dtype, across, full, shifted)
    assert c.columns == (256 if full else 32)
    assert complaints(code, c, dtype, registers, most) == []


@BUDGETS
def test_instructions_and_loads_are_noticed():
    code, c = compiled("sm_90", "bf16", 3, True, False)
    fewer = c._replace(across=2)
    assert complaints(code, c, "bf16", 255, 1.0)[-1].endswith("instructions a product, allowed 1.0")
    assert complaints(code, fewer, "bf16", 255, 99) == ["sm_90: 72 loads of 32 products and 16 levels"]
    code, c = compiled("gfx942", "bf16", 3, True, False)
    assert complaints(code, c, "bf16", 255, 1_000) == [f"gfx942: {len(code.code)} instructions, allowed 1000"]


def test_the_levels_read_one_by_one_lie_whole():
    assert depthwise.MOST == 96
    for bits in range(1, 9):
        whole = 16 // bits
        for k in range(depthwise.MOST):
            ((plane, at, count, low),) = fragments.pieces(bits)[k // 8]
            assert (count, low) == (bits, 0)
            found = (k // 8) * ((255 + whole) // whole) >> 8
            assert (plane, at) == (found, (k // 8 - found * whole) * bits)


@pytest.mark.parametrize(
    ("columns", "places", "kernel_width", "expected"),
    [
        (1_000_000, 512, 3, (256, 8, 3, 4)),
        (49, 1_024, 3, (32, 8, 3, 1)),
        (196, 960, 5, (64, 4, 5, 1)),
        (3_136, 64, 1, (32, 8, 1, 1)),
        (100_000, 96, 7, (256, 4, 7, 4)),
        (100_000, 96, 31, (256, 8, 1, 4)),
        (100_000, 96, 15, (256, 4, 5, 4)),
    ],
)
def test_depthwise_programs(columns, places, kernel_width, expected):
    assert sliding(columns, places, kernel_width, H100) == expected
    assert slides(9, 9)
    assert not slides(8, 2)
