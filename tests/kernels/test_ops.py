"""Every operation, every case, every instruction set: a new operation is tested by being in OPS."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from sgsc.kernels import OPS, extension, tile_kernel, tile_rows
from sgsc.kernels.input_grid import with_sums
from sgsc.kernels.op import set_isa
from sgsc.kernels.packed_linear import FORMS, grid, static_grid
from sgsc.kernels.packing import case
from tests.checks import as_list, assert_agrees, assert_same

RUNS = [
    pytest.param(op, arguments, id=f"{op.name}-{case}") for op in OPS.values() for case, arguments in op.cases().items()
]
FIRST = [pytest.param(op, next(iter(op.cases().values())), id=op.name) for op in OPS.values() if op.cases()]
# and a first with a grid of x
FIRST += [
    next(run for run in RUNS if run.id.startswith(f"{name}-static")) for name in ("packed_linear", "packed_conv2d")
]
needs_extension = pytest.mark.skipif(not extension.LOADED, reason=f"no C++ extension: {extension.WHY}")


@pytest.mark.parametrize(("op", "arguments"), RUNS)
def test_agrees_with_the_reference(op, arguments, level):
    assert_agrees(op, arguments)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_every_operation_has_cases(op):
    assert op.cases()


@pytest.mark.parametrize(("op", "arguments"), FIRST)
def test_opcheck(op, arguments):
    torch.library.opcheck(getattr(torch.ops.sgsc, op.name).default, arguments)


@pytest.mark.parametrize(("op", "arguments"), RUNS)
def test_the_fake_promises_what_comes(op, arguments):
    fake = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        promised = as_list(op(*(torch.utils._pytree.tree_map_only(Tensor, fake.from_tensor, a) for a in arguments)))
    for p, r in zip(promised, as_list(op(*arguments)), strict=True):
        assert (p.shape, p.dtype, p.stride()) == (r.shape, r.dtype, r.stride())


@functools.cache
def large_arguments() -> dict[str, tuple]:
    """Enough work for several tasks, which the cases are too small for."""
    make = torch.Generator().manual_seed(5)
    bits = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 0], dtype=torch.uint8).repeat(10)
    packed = case(bits, 601)[1]
    scale, offset, bias = grid(bits)
    x = torch.randn(3, 50_003, generator=make)
    rows = (x, 0.1 * torch.ones(3), -8 * torch.ones(3), 7 * torch.ones(3), torch.zeros(3))
    mixed = (torch.randn(300_007, generator=make), torch.tensor([0.2, 0.7, 0.1]), *rows[1:])
    found = {
        "fake_quantize": rows,
        "fake_quantize_backward": (torch.randn(x.shape, generator=make), *rows),
        "fake_quantize_mixed": mixed,
        "fake_quantize_mixed_backward": (torch.randn(300_007, generator=make), *mixed),
        "unpack": packed.args,
        "pack": (OPS["unpack"](*packed.args), bits, packed.starts, packed.data.numel()),
        "packed_embedding": (torch.arange(100).repeat(3).flip(0), *packed.args[:3], scale, offset, 601),
    }
    tiles = tile_rows(packed, scale, offset)
    found["tile"] = (*packed.args[:3], tiles.plan, 601, 1, tiles.lines.numel())
    convolutions = {  # one image shared by the threads, images apiece, groups of several tiles, and rows that slide
        "one image": ((1, 24, 19, 21), 1, [3, 3], [1, 1]),
        "few pixels": ((1, 300, 3, 3), 1, [3, 3], [0, 0]),
        "a batch": ((3, 24, 12, 11), 1, [3, 3], [1, 1]),
        "groups": ((2, 24, 9, 10), 2, [3, 3], [1, 1]),
        "sliding": ((2, 100, 20, 17), 100, [3, 3], [1, 1]),
    }
    for form, (int8, codes) in FORMS.items():
        for m in (1, 8, 9, 16, 17, 201):
            static = None if codes is None else with_sums(static_grid(codes), packed)
            operands = (torch.randn(m, 601, generator=make), *tiles[:3], bias, 100, 601, int8, static)
            found[f"packed_linear, {m} rows, {form}"] = operands
        for name, (shape, groups, kernel, padding) in convolutions.items():
            width = shape[1] // groups * kernel[0] * kernel[1]
            its = case(bits, width)[1]
            kernels = tile_kernel(its, scale, offset, inputs=shape[1], kernel=kernel, groups=groups)
            geometry = (kernel, [1, 1], padding, [1, 1], groups)
            static = None if codes is None else with_sums(static_grid(codes), its)
            operands = (torch.randn(shape, generator=make), *kernels[:3], bias, 100, *geometry, int8, static)
            found[f"packed_conv2d, {name}, {form}"] = operands
    return found


@needs_extension  # torch promises no such thing
@pytest.mark.parametrize(("op", "arguments"), RUNS)
def test_the_number_of_threads_changes_nothing(op, arguments, level):
    check_one_and_two_threads(op, arguments)


@needs_extension
def test_the_number_of_threads_changes_nothing_at_size(level):
    for name, arguments in large_arguments().items():
        check_one_and_two_threads(OPS[name.split(",")[0]], arguments)


def check_one_and_two_threads(op, arguments):
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(as_list(op(*arguments)))
    finally:
        torch.set_num_threads(2)
    for one, two in zip(*results, strict=True):
        assert_same(two, one, op.name)


def test_large_results_agree_with_the_reference(level):
    for name, arguments in large_arguments().items():
        assert_agrees(OPS[name.split(",")[0]], arguments, name)


def test_calls_from_several_threads_do_not_disturb_each_other(level):
    calls = [(OPS[name.split(",")[0]], arguments) for name, arguments in large_arguments().items()]
    expected = [as_list(op(*arguments)) for op, arguments in calls]

    def run(shift: int) -> None:
        for i in range(3 * len(calls)):
            op, arguments = calls[(i + shift) % len(calls)]
            for f, e in zip(as_list(op(*arguments)), expected[(i + shift) % len(calls)], strict=True):
                assert_same(f, e, op.name)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4)))


@pytest.mark.parametrize(("op", "arguments"), FIRST)
def test_compiled_is_eager(op, arguments):
    torch._dynamo.reset()
    compiled = torch.compile(op.__call__, fullgraph=True, backend="aot_eager")
    for f, e in zip(as_list(compiled(*arguments)), as_list(op(*arguments)), strict=True):
        assert_same(f, e, op.name)


@needs_extension
def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match=r"instruction set 'avx9': this machine runs scalar"):
        set_isa("avx9")


@needs_extension
@pytest.mark.parametrize(
    ("wanted", "said"),
    [("scalar", "cpu: C++ (scalar)"), ("avx9", "RuntimeError: SGSC_ISA=avx9: this machine runs scalar")],
)
def test_the_environment_lowers_the_instruction_set(wanted, said):
    """An unusable value is no reason to fail at import, only at the first call."""
    program = (
        "import torch; from sgsc.kernels import OPS, backend, fake_quantize\n"
        "print('imported')\n"
        "v = torch.ones(1); y = fake_quantize(torch.ones(1, 1), v, -v, v)\n"
        "print(backend(OPS['fake_quantize']))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "SGSC_ISA": wanted},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.startswith("imported")
    assert said in run.stdout + run.stderr


def test_tracing_refuses_what_running_does():
    """Else a program is compiled, and fails when it is called."""
    linear = OPS["packed_linear"].cases()["exact-no-bias"]
    conv = OPS["packed_conv2d"].cases()["exact-three-by-three"]
    bad = [(OPS["packed_linear"], linear, 0, linear[0][:, :-1]), (OPS["packed_linear"], linear, 0, torch.tensor(1.0))]
    for place, pairs in ((6, ([0, 3], [3], [3, 3, 3], [99, 3])), (7, ([0, 1], [1])), (8, ([-1, 1],)), (9, ([1, 0],))):
        bad += [(OPS["packed_conv2d"], conv, place, pair) for pair in pairs]
    bad += [(OPS["packed_conv2d"], conv, 10, 3), (OPS["packed_conv2d"], conv, 0, conv[0][0])]
    for op, arguments, place, wrong in bad:
        changed = (*arguments[:place], wrong, *arguments[place + 1 :])
        for form in (op, op.fake, op.reference):
            with pytest.raises(ValueError, match=f"^{op.name}: "):
                form(*changed)
