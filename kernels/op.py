"""The record of an operation: one meaning, any number of implementations.

Schemas, fakes and references live here and in the files beside, in Python, once. The C++ extension registers the CPU
kernels and Triton the CUDA ones under the same names, so every operation exists with or without a compiler or a GPU.
Autograd stays outside (a `torch.autograd.Function` entered only when a gradient is needed): inference pays nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import extension

LIBRARY = torch.library.Library("sgsc", "DEF")
OPS: dict[str, Op] = {}


def _no_cases() -> Mapping[str, tuple]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Op:
    """An operation `torch.ops.sgsc.<name>`.

    Tests and benches iterate over `OPS`, so that a new operation cannot forget to be tested or timed.

    Attributes:
        name: Also the name of the file that holds it, unless it is a backward.
        schema: Arguments and results in torch's schema language.
        reference: The meaning, in plain PyTorch; what every other implementation is judged against.
        fake: Shapes and dtypes of the results, for tracing.
        cases: Arguments, by the name of the edge that each presses on.
        bench_cases: Arguments of deployment size, by shape.
        traffic: Bytes that must cross memory for the given arguments.
        operations: Multiply-adds and their like that the given arguments need.
        exact: Results are integers and must agree bit for bit.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    cases: Callable[[], Mapping[str, tuple]]
    traffic: Callable[..., int]
    operations: Callable[..., int]
    bench_cases: Callable[[], Mapping[str, tuple]] = _no_cases
    exact: bool = False
    _overload: Any = field(init=False, repr=False, compare=False)  # torch's own, found once: a look-up costs 0.5 µs

    def __post_init__(self) -> None:
        if self.name in OPS:
            raise ValueError(f"two operations are called {self.name!r}; rename one of them")
        OPS[self.name] = self
        LIBRARY.define(f"{self.name}{self.schema}")
        LIBRARY.impl(self.name, self._fallback, "CompositeExplicitAutograd")
        torch.library.register_fake(f"sgsc::{self.name}", self.fake, lib=LIBRARY)
        object.__setattr__(self, "_overload", getattr(torch.ops.sgsc, self.name).default)

    def _fallback(self, *args: Any) -> Any:
        if _device(args) == "cpu":
            extension.say_once_that_the_reference_runs()
        results = self.reference(*args)
        if isinstance(results, Tensor):
            return results.contiguous()
        return type(results)(t.contiguous() for t in results)

    def __call__(self, *args: Any) -> Any:
        """Run whichever implementation the dispatcher holds for the arguments' device."""
        return self._overload(*args)


def _device(args: Any) -> str:
    for a in args:
        if isinstance(a, Tensor):
            return a.device.type
        if isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor):
            return a[0].device.type
    return "cpu"


def backend(op: Op, device: str = "cpu") -> str:
    """Name what would run on `device`, and why: 'cpu: C++ (avx2)', 'cpu: PyTorch (SGSC_NO_EXT=1)'."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device, device.upper())
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"sgsc::{op.name}", key):
        return f"{device}: C++ ({isa()})" if device == "cpu" else f"{device}: Triton"
    return f"{device}: PyTorch ({extension.WHY or 'no kernel for this device'})"


LIBRARY.define("_isa() -> str")
LIBRARY.define("_isas() -> str")
LIBRARY.define("_set_isa(str name) -> str")


def isa() -> str:
    """The instruction set that the C++ kernels use now: scalar, avx2 …; 'none' without the extension."""
    return torch.ops.sgsc._isa() if extension.LOADED else "none"


def isas() -> list[str]:
    """The instruction sets that this machine and this build run, worst first; none without the extension."""
    return torch.ops.sgsc._isas().split(", ") if extension.LOADED else []


def set_isa(name: str) -> str:
    """Lower the instruction set, for tests; returns the one in force before. `SGSC_ISA` does so at start-up.

    Raises:
        ValueError: If this machine, or this build, has no such set.
    """
    if not extension.LOADED:
        raise ValueError(f"set_isa({name!r}): the C++ extension is not loaded ({extension.WHY})")
    before = isa()
    try:
        torch.ops.sgsc._set_isa(name)
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    return before
