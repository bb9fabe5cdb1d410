"""Machine code of what starts beside the kernel before, and who is launched so."""

import re

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed: its kernels are not checked")
tl = triton.language

from sgsc.kernels import triton_packed, triton_packed_kernels  # noqa: E402
from sgsc.kernels.triton_aot import MachineCode  # noqa: E402
from sgsc.kernels.triton_configuration import configure  # noqa: E402
from tests.kernels.test_triton_packed import GPUS, compiled  # noqa: E402

compiles = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="TRITON_INTERPRET=1: the interpreter replaces the compiler"
)

WAIT, START = "ACQBULK", "PREEXIT"
FETCHES = {r"CCTL\.E\.PF2": 2, r"UBLKPF\.L2": 1}  # of the plan, of words
# What touches memory, or may go round the wait
NOT_BEFORE = r"(LD|LDG|LDGSTS|LDS|LDSM|LDL|ST|STG|STS|STL|ATOM\w*|RED\w*|UTMA\w*|UBLKCP|MEMBAR|BAR|BRA|BRX|CALL|EXIT)"


def complaints(code, fetches):
    """What is wrong with how a kernel starts, in words; `fetches` has how often what it may do before occurs."""
    lines = [re.fullmatch(r"(@\S+\s+)?(\S+).*", line) for line in code.code]
    names = [(bool(line[1]), line[2]) for line in lines]
    waits = [i for i, (_, name) in enumerate(names) if name == WAIT]
    starts = [i for i, (_, name) in enumerate(names) if name == START]
    if len(waits) != 1 or len(starts) != 1:
        return [f"{len(waits)} waits and {len(starts)} starts, want one of each"]
    found = [f"{names[i][1]} under a condition" for i in (*waits, *starts) if names[i][0]]
    before = [name for _, name in names[: waits[0]]]
    found += [f"{name} before the wait" for name in before if re.match(rf"{NOT_BEFORE}(\.|$)", name)]
    for pattern, count in fetches.items():
        seen = sum(bool(re.fullmatch(pattern, name)) for name in before)
        if seen != count:
            found.append(f"{seen} instructions {pattern} before the wait, want {count}")
    return found


def of_linear(early):
    return compiled(triton_packed_kernels.linear_kernel, "sm_90", 64, 1, "bf16", early=early)[0]


@compiles
def test_the_product_touches_no_memory_before_the_wait():
    code = of_linear(early=True)
    assert complaints(code, FETCHES) == []
    names = [line.split()[0] for line in code.code]
    assert names.index(WAIT) < names.index(START)


@compiles
def test_a_product_that_is_not_launched_so_has_none_of_it():
    code = of_linear(early=False)
    assert code.complaints(88, [], [WAIT, START, *FETCHES]) == []


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["PREEXIT", "LDG.E R4, desc[UR4][R2.64]"], "0 waits and 1 starts, want one of each"),
        (["ACQBULK", "ACQBULK", "PREEXIT"], "2 waits and 1 starts, want one of each"),
        (["ACQBULK", "LDG.E R4, desc[UR4][R2.64]"], "1 waits and 0 starts, want one of each"),
        (["LDG.E R4, desc[UR4][R2.64]", "ACQBULK", "PREEXIT"], "LDG.E before the wait"),
        (["@!P0 LDGSTS.E.BYPASS.128 [R6], desc[UR4][R18.64]", "ACQBULK", "PREEXIT"], "LDGSTS.E.BYPASS.128 before"),
        (["STG.E.128 desc[UR4][R4.64], R8", "ACQBULK", "PREEXIT"], "STG.E.128 before the wait"),
        (["ATOMG.E.ADD.STRONG.GPU PT, R12, desc[UR4][R6.64], R5", "ACQBULK", "PREEXIT"], "ATOMG.E.ADD.STRONG.GPU bef"),
        (["@P0 BRA 0x40", "ACQBULK", "PREEXIT"], "BRA before the wait"),
        (["@P0 ACQBULK", "PREEXIT"], "ACQBULK under a condition"),
        (["ACQBULK", "@P0 PREEXIT"], "PREEXIT under a condition"),
    ],
)
def test_each_fault_is_noticed(lines, said):
    code = MachineCode("sm_90", 0, 0, 0, {}, code=("LDC R1, c[0x0][0x28]", "STACK", *lines, "EXIT"))
    (complaint,) = complaints(code, {})
    assert complaint.startswith(said)
    assert complaints(MachineCode("", 0, 0, 0, {}, code=("ACQBULK", "PREEXIT")), {"LD": 1}) == [
        "0 instructions LD before the wait, want 1"
    ]


@pytest.mark.parametrize(("target", "early"), [("sm_80", False), ("sm_90", True), ("gfx942", False)])
def test_who_starts_early(target, early, monkeypatch):
    monkeypatch.setattr(triton_packed, "INTERPRETED", tl.constexpr(False))
    few, many = (configure(torch.bfloat16, m, 64, 64, 32, GPUS[target]) for m in (1, 200))
    assert triton_packed.starts_early(few, GPUS[target]) is early
    if target == "sm_90":
        assert triton_packed.starts_early(many, GPUS[target]) is False
        monkeypatch.setattr(triton_packed, "EARLY", 0)
        assert triton_packed.starts_early(few, GPUS[target]) is False
        monkeypatch.undo()
    monkeypatch.setattr(triton_packed, "INTERPRETED", tl.constexpr(True))
    assert triton_packed.starts_early(few, GPUS[target]) is False
