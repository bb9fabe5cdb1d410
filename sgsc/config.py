"""Settings, said once: a frozen dataclass is the Python arguments, the flags of the command line and the JSON."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, field, fields
from typing import Any, get_type_hints


def setting(default: Any, help: str) -> Any:
    """A field of a settings class, with its default and its one line of help."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class CompressionConfig:
    """How a network is compressed."""

    target_size: float = setting(0.05, "stored bytes to reach, as a share of the float32 bytes, or typed in percent")
    tolerance: float = setting(0.0, "share of the preservation samples that may regress")
    margin_tolerance: float = setting(0.2, "share of the mean margin of the preservation samples that may be lost")
    steps: int = setting(1000, "optimiser steps of the compression")
    shrink_share: float = setting(0.4, "share of the steps after which the target size shall be reached")
    settle_share: float = setting(0.6, "share of the steps after which widths stay; no less than shrink-share")
    preservation_weight: float = setting(0.25, "weight of the preservation loss; grows while the tolerance is violated")
    preservation_batch: int = setting(32, "preservation samples a step")
    sparsity_weight: float = setting(0.0, "weight of the mean magnitude of the weights")
    bit_rate: float = setting(0.05, "most bits that a width moves in a step; more where steps are few")
    grid_rate: float = setting(0.005, "learning rate of the ranges, in powers of two")
    guard_every: int = setting(25, "steps between two checks of the preservation set and of the stored size")
    cut: bool = setting(
        False, "take removed channels out in training, while the tolerance holds; optimiser state follows"
    )
    seed: int = setting(0, "seed of every random choice")

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if (kind is bool) != isinstance(value, bool) or not isinstance(value, (int, kind)):
                wants = {int: "a whole number", bool: "True or False"}.get(kind, "a number")
                raise ValueError(f"{name}={value!r}: want {wants}")
        _between("target_size", self.target_size, 0, 1, "a share of the float32 bytes, such as 0.05")
        _between("shrink_share", self.shrink_share, 0, 1, "a share of the steps, such as 0.4")
        _between("settle_share", self.settle_share, 0, 1, "a share of the steps, such as 0.6")
        if not 0 <= self.margin_tolerance <= 1:
            raise ValueError(f"margin_tolerance={self.margin_tolerance}: want a share of the margin from 0 to 1")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance={self.tolerance}: want a share of samples from 0 up to, not including, 1")
        for name in ("steps", "guard_every", "preservation_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: want at least 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed}: want a whole number from 0 up to, not including, 2**63")
        for name in ("preservation_weight", "sparsity_weight", "bit_rate", "grid_rate"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)}: want a finite number, 0 or more")

    def as_dict(self) -> dict[str, Any]:
        """JSON-able settings."""
        return asdict(self)


def _between(name: str, value: float, low: float, high: float, want: str) -> None:
    if not low < value < high:
        raise ValueError(f"{name}={value}: want {want}, between {low} and {high}")


def add_settings(parser: argparse.ArgumentParser, config: type, defaults: dict[str, Any] | None = None) -> None:
    """Add one flag a field of a settings class; `defaults` replaces some of its own."""
    types = get_type_hints(config)
    for f in fields(config):
        default = (defaults or {}).get(f.name, f.default)
        shown = "" if default is None else f" (default: {default})"
        how: dict[str, Any] = {"action": argparse.BooleanOptionalAction} if types[f.name] is bool else {}
        how = how or {"type": number if types[f.name] is float else types[f.name]}
        parser.add_argument(f"--{f.name.replace('_', '-')}", default=default, help=f.metadata["help"] + shown, **how)


def number(text: str) -> float:
    """A number as it is typed: 0.05, or 5%.

    Raises:
        ArgumentTypeError: If it is none.
    """
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: want a number, such as 0.05 or 5%") from None


def from_arguments(config: type, arguments: argparse.Namespace, **replace: Any) -> Any:
    """The settings that a parser filled by `add_settings` holds."""
    return config(**{f.name: replace.get(f.name, getattr(arguments, f.name)) for f in fields(config)})
