"""What every quantization strategy promises, and the registries that make one a candidate by its name.

A strategy is one class: of weights a `WeightStrategy`, which is the quantizer that a layer then holds, of inputs an
`InputStrategy` beside an `InputQuantizer`. `trained` says that it learns, and so is for training only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from sgsc.kernels import fake_quantize
from sgsc.quantizers import InputQuantizer, Quantizer, StaticInput

from .statistics import InputStatistics

WEIGHTS: dict[str, type[WeightStrategy]] = {}
INPUTS: dict[str, type[InputStrategy]] = {}
BITS = range(2, 9)
SMALLEST_STEP = 2.0**-120  # of a row of zeros; below it float32 runs out of normal numbers


def check_bits(bits: int) -> int:
    """`bits`.

    Raises:
        ValueError: If no strategy serves so many.
    """
    if bits not in BITS:
        raise ValueError(f"bits={bits}: strategies serve {BITS.start} to {BITS[-1]}")
    return bits


def _register(registry: dict[str, Any], name: str, cls: type) -> None:
    if not name:
        return
    if name in registry:
        raise ValueError(f"two strategies are called {name!r}; rename one of them")
    registry[name] = cls
    setattr(cls, "strategy", name)  # noqa: B010  pyright knows no such attribute of a type


class WeightStrategy(Quantizer):
    """Rows of one fixed width, codes -2^(b-1) .. 2^(b-1) - 1, on a step that the strategy finds; abstract.

    scale      (C,)  step, in bfloat16 so that two bytes store it
    bit_depth  (C,)  width, whole

    Args:
        channels: Rows.
        bits: 2 to 8.
        per_channel: Whether each row has a step of its own, or all rows one.
    """

    trained: ClassVar[bool] = False
    power: ClassVar[float | None] = None  # p of the sum of |error|^p that the step minimises, if it minimises one
    scale: Tensor
    bit_depth: Tensor

    def __init_subclass__(cls, name: str = "", **rest) -> None:
        super().__init_subclass__(**rest)  # without the name: QUANTIZERS holds those of `prepare`
        _register(WEIGHTS, name, cls)

    def __init__(self, channels: int, bits: int, per_channel: bool = True) -> None:
        super().__init__()
        self.per_channel = per_channel
        self.register_buffer("scale", torch.ones(channels))
        self.register_buffer("bit_depth", torch.full((channels,), float(check_bits(bits))))

    def bit_cost(self) -> Tensor:
        """(C,) the width."""
        return self.bit_depth

    def grid(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See the class."""
        half = torch.exp2(self.bit_depth - 1)
        alive = self.bit_depth > 0
        return self.scale, torch.where(alive, -half, 0.0), torch.where(alive, half - 1, 0.0), torch.zeros_like(half)

    @torch.no_grad()
    def fit(self, rows: Tensor, where: Tensor | None = None) -> None:
        """Find the steps from the weights, (C, K); of those channels that `where` marks.

        Raises:
            ValueError: If a weight is NaN or infinite.
        """
        scale = self.found(rows)
        # not in place: the backward of a forward before may still want the old ones
        self.scale = scale if where is None else torch.where(where, scale, self.scale)

    def found(self, rows: Tensor) -> Tensor:
        """(C, K) -> (C,) steps.

        Raises:
            ValueError: If a weight is NaN or infinite, or `steps` does not keep its promise.
        """
        if not torch.isfinite(rows).all():
            raise ValueError("weights hold NaN or infinity and have no grid; the model's training has diverged")
        if not rows.numel():
            return torch.full_like(self.scale, SMALLEST_STEP)
        rows = rows.detach().to(self.scale.dtype)
        seen = rows if self.per_channel else rows.reshape(1, -1)
        largest = seen.abs().amax(1, keepdim=True).clamp_min(SMALLEST_STEP)
        unit = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 1)
        # magnitudes up to 2: squares of the largest weights of float32 would overflow, of the least vanish; the unit is
        # a power of two, so that a step rounds here as it does there
        steps = self.steps(seen / unit, self.most())
        if steps.shape != seen.shape[:1] or not (steps >= 0).all():
            raise ValueError(
                f"{type(self).__name__}.steps gives {tuple(steps.shape)} numbers, the least {steps.min().item():.3g}; "
                f"want {tuple(seen.shape[:1])}, none negative"
            )
        steps = steps.clamp_min(1e-6) * unit[:, 0]
        return steps.bfloat16().to(rows.dtype).clamp_min(SMALLEST_STEP).expand(len(rows)).contiguous()

    def most(self) -> int:
        """The largest code, 1 at least."""
        return max(2 ** (int(self.bit_depth.max()) - 1) - 1, 1) if len(self.bit_depth) else 1

    @abstractmethod
    def steps(self, rows: Tensor, most: int) -> Tensor:
        """(C, K) with magnitudes up to 2 -> (C,) steps of codes -most - 1 .. most."""

    def extra_repr(self) -> str:
        """Width, and how many steps there are."""
        bits = self.bit_depth.max().item() if len(self.bit_depth) else 0
        return f"bits={bits:.0f}, per {'channel' if self.per_channel else 'tensor'}"


class InputStrategy(ABC):
    """Beside an `InputQuantizer`: finds its start from what was seen of a layer's input; abstract."""

    trained: ClassVar[bool] = False

    def __init_subclass__(cls, name: str = "", **rest) -> None:
        super().__init_subclass__(**rest)
        _register(INPUTS, name, cls)

    @classmethod
    @abstractmethod
    def fitted(cls, seen: InputStatistics, bits: int) -> InputQuantizer:
        """The quantizer of that many bits, 2 to 8, for inputs like those seen."""


class RangeStrategy(InputStrategy, StaticInput):
    """Finds the two ends of a range, and spreads the codes evenly over it; abstract."""

    @classmethod
    def fitted(cls, seen: InputStatistics, bits: int) -> InputQuantizer:
        """See `InputStrategy`.

        Raises:
            ValueError: If the ends are not in order.
        """
        low, high = cls.ends(seen, check_bits(bits))
        if not low <= high:
            raise ValueError(f"{cls.__name__}.ends gives {low} and {high}; want the lower first")
        return cls(*grid_between(low, high, bits))

    @classmethod
    @abstractmethod
    def ends(cls, seen: InputStatistics, bits: int) -> tuple[float, float]:
        """Where codes begin and end, in the unit of the input."""


def grid_between(low: float, high: float, bits: int) -> tuple[float, int, int]:
    """(scale, code_min, code_max) of 2^bits codes from about `low` to about `high`, 0 among them.

    An input that is nowhere negative gets codes from 0 on, any other an asymmetric grid. A range of no extent gets the
    step 1, on which its 0 is exact.
    """
    levels = 2**bits - 1
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / levels
    if scale < SMALLEST_STEP:
        return 1.0, 0, levels
    scale = float(torch.tensor(scale, dtype=torch.float64).float())
    code_min = -min(round(-low / scale), levels)
    return scale, code_min, code_min + levels


def errors(rows: Tensor, scale: Tensor, most: int, power: float = 2.0) -> Tensor:
    """(C, K), (C,) -> (C,) sums of |error|^power on codes -most - 1 .. most."""
    rounded = fake_quantize(rows, scale, torch.full_like(scale, -most - 1.0), torch.full_like(scale, float(most)))
    return (rounded - rows).abs().pow(power).sum(1)


def strategies(registry: dict[str, Any], names: Any = None, trained: bool = False) -> dict[str, Any]:
    """The strategies of those names, or of all names: for training if `trained`, or else for trained weights.

    Raises:
        ValueError: If a name is not known, serves the other purpose, or there is none.
    """
    fit = {name: cls for name, cls in registry.items() if cls.trained is trained}
    if names is None:
        return fit
    names = list(names)
    for name in names:
        if name not in fit:
            raise ValueError(
                f"strategy {name!r} is not known {'to training' if trained else 'without training'}; choose of "
                f"{', '.join(fit)}"
            )
    if not names:
        raise ValueError(f"no strategy is named; choose of {', '.join(fit)}")
    return {name: fit[name] for name in dict.fromkeys(names)}
