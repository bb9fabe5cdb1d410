"""What a Triton kernel becomes on GPUs that this machine need not have: registers, spills, instructions.

Triton brings the assemblers and disassemblers of its targets, so a claim such as "two 128-bit loads a thread, nothing
spilled" is checked on any machine. Speed is not: that needs the GPU.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class MachineCode:
    """A compiled kernel.

    Attributes:
        target: Key of `TARGETS`.
        registers: 32-bit registers a thread.
        spilled: Bytes of local memory and stack a thread; on AMD also vector registers spilled (scalar ones spill to
            vector registers, not to memory). 0 is the aim.
        shared: Bytes of shared memory a program.
        instructions: How often each occurs, with its modifiers: "LDG.E.128" and, of the PTX that it was assembled from,
            "div.rn.f32" (NVIDIA); "v_rndne_f32_e32" (AMD).
        loops: Of every backward branch the instructions from its target on, as written but for a predicate, the longest
            loop first: "LDG.E.128 R4, [R2.64]".
    """

    target: str
    registers: int
    spilled: int
    shared: int
    instructions: Counter[str]
    loops: tuple[tuple[str, ...], ...] = field(default=(), repr=False)
    code: tuple[str, ...] = field(default=(), repr=False)

    def count(self, pattern: str) -> int:
        """Instructions whose whole name matches the regular expression."""
        return sum(n for name, n in self.instructions.items() if re.fullmatch(pattern, name))

    def complaints(self, registers: int, needs: Iterable[str] = (), forbids: Iterable[str] = ()) -> list[str]:
        """What is wrong with the code, in words; empty where nothing is.

        Args:
            registers: Largest number allowed a thread.
            needs: Patterns of which at least one instruction must be there.
            forbids: Patterns of which none may be.

        Returns:
            One sentence a fault.
        """
        found = []
        if self.spilled:
            found.append(f"{self.target}: spills {self.spilled} to local memory")
        if self.registers > registers:
            found.append(f"{self.target}: {self.registers} registers, allowed {registers}")
        found += [f"{self.target}: no instruction {p}" for p in needs if not self.count(p)]
        found += [f"{self.target}: {self.count(p)} instructions {p}, allowed none" for p in forbids if self.count(p)]
        return found


def compile_for(
    kernel: Any,
    target: str,
    types: Mapping[str, Any],
    constants: Mapping[str, Any],
    divisible: Iterable[str] = (),
    warps: int = 4,
    stages: int = 3,
) -> MachineCode:
    """Compile a `@triton.jit` function without a GPU or a driver.

    Args:
        kernel: The function; not in a process that runs the interpreter.
        target: Key of `TARGETS`.
        types: Triton's type of each argument that is no constant: "*fp32", "i32"; of a tuple a tuple of them.
        constants: Values of the others.
        divisible: Arguments that are multiples of 16 (pointers: of 16 bytes), as the launcher finds out by itself.
        warps, stages: Of a program.

    Returns:
        The machine code's figures.

    Raises:
        ValueError: If the process runs Triton's interpreter, which compiles nothing.
    """
    if knobs.runtime.interpret:
        raise ValueError("compile_for: TRITON_INTERPRET=1 replaces the compiler by an interpreter; unset it")
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        signature={n: types.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in divisible},
    )
    with _driver_of(target):
        compiled = triton.compile(source, target=TARGETS[target], options={"num_warps": warps, "num_stages": stages})
    read = _read_nvidia if TARGETS[target].backend == "cuda" else _read_amd
    return read(compiled, target)


def variant_of(kernel: Any, target: str, arguments: Iterable[Any], options: Mapping[str, Any]) -> str:
    """What Triton keeps compiled code under, for a launch with these arguments: where it is new, the call compiles.

    Args:
        kernel: The `@triton.jit` function.
        target: Key of `TARGETS`.
        arguments: By position, as in the launch.
        options: The others: constants, warps and stages.
    """
    with _driver_of(target):
        bind = kernel.create_binder()[-1]
        _, specialization, rest = bind(*arguments, **options)
    return f"{specialization} {rest}"


@contextmanager
def _driver_of(target: str) -> Iterator[None]:
    """Kernels that ask for their target (`is_cuda()`) ask the driver: without one, all of them would get "no"."""
    before = driver._active
    driver.set_active(SimpleNamespace(get_current_target=lambda: TARGETS[target]))  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        driver._active = before


def _read_nvidia(compiled: Any, target: str) -> MachineCode:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _cuobjdump("-res-usage", cubin)
        sass = _cuobjdump("-sass", cubin)
    registers, stack, local = (int(re.findall(rf"{what}:(\d+)", usage)[0]) for what in ("REG", "STACK", "LOCAL"))
    # /*0090*/  @!P0 LDG.E.128 R4, [R2.64] ;
    whole = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+((?:@!?U?P\w+\s+)?[A-Z][^;]*?)\s*;", sass, re.MULTILINE)
    code = [(address, re.sub(r"^@\S+\s+", "", text)) for address, text in whole]
    names = [text.split()[0] for _, text in code]
    # @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    names += re.findall(r"^\s+(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s", compiled.asm["ptx"], re.MULTILINE)
    at = {f"0x{int(address, 16):x}": i for i, (address, _) in enumerate(code)}
    loops = _loops([text for _, text in code], r"BRA\b.*?(0x[0-9a-f]+)", at)  # BRA 0x1100
    every = tuple(text for _, text in whole)
    return MachineCode(target, registers, stack + local, compiled.metadata.shared, Counter(names), loops, every)


def _cuobjdump(option: str, cubin: Path) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout


def _read_amd(compiled: Any, target: str) -> MachineCode:
    text = compiled.asm["amdgcn"]

    def figure(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s*(\d+)", text)[0])

    code: list[str] = []
    at: dict[str, int] = {}
    for label, instruction in re.findall(r"^(?:(\.LBB\w+):|\s+([a-z]+_[a-z0-9_]+\b[^;\n]*))", text, re.MULTILINE):
        if label:
            at[label] = len(code)
        else:
            code.append(instruction.strip())
    loops = _loops(code, r"s_c?branch\w*\s+(\.LBB\w+)", at)  # s_cbranch_scc1 .LBB0_3
    spilled = figure("vgpr_spill_count") + figure("private_segment_fixed_size")
    names = Counter(line.split()[0] for line in code)
    return MachineCode(target, figure("vgpr_count"), spilled, compiled.metadata.shared, names, loops, tuple(code))


def _loops(code: list[str], branch: str, at: Mapping[str, int]) -> tuple[tuple[str, ...], ...]:
    """What lies between each branch back and its target; `at` has the place of each address."""
    jumps = [(i, re.match(branch, text)) for i, text in enumerate(code)]
    backward = [(at.get(jump[1], i), i) for i, jump in jumps if jump]
    return tuple(sorted((tuple(code[to : i + 1]) for to, i in backward if to < i), key=len, reverse=True))
