"""What a search of strategies, with and without training, is asked for: said once for both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from sgsc.distillation import divergences

from .registry import INPUTS, WEIGHTS, check_bits, strategies

Loss = Callable[[Tensor, Tensor], Tensor]


def differences(outputs: Tensor, wanted: Tensor) -> Tensor:
    """How far answers that are images or other real numbers are apart, absolutely; in float32."""
    return (outputs.float() - wanted.float()).abs()


def squares(outputs: Tensor, wanted: Tensor) -> Tensor:
    """The same, squared: small squares of halves would vanish."""
    return differences(outputs, wanted).square()


UNTRAINED = ("loss", "select_share", "correct_bias")  # settings that a training has no use for
LOSSES: dict[str, Loss] = {"kl": divergences, "l1": differences, "l2": squares}  # (samples, ...) -> of all places


def mean_of(loss: str | Loss) -> Loss:
    """The loss as one number a batch."""
    return (lambda outputs, wanted: LOSSES[loss](outputs, wanted).mean()) if isinstance(loss, str) else loss


def by_sample(loss: str | Loss, wanted: Sequence[Tensor], samples: Sequence[int]) -> Loss | None:
    """The loss as (samples,), of each by itself; None where that says nothing.

    It says nothing where answers are not one a sample, where a function raises, or finds no finite number between equal
    answers of a sample (-PSNR has none of any, relative distances none of an answer of zeros), and where it finds no
    difference between those of two samples, as one that contrasts samples of a batch.

    Args:
        loss: A key of LOSSES, or a function (outputs, wanted) -> scalar.
        wanted: What the float model answers to the batches that judge.
        samples: Of each of these.
    """
    if any(answers.shape[:1] != (count,) for answers, count in zip(wanted, samples, strict=True)):
        return None
    if isinstance(loss, str):
        return lambda outputs, answers: LOSSES[loss](outputs, answers).reshape(len(outputs), -1).mean(1)

    def alone(outputs: Tensor, answers: Tensor) -> Tensor:
        pairs = zip(outputs.split(1), answers.split(1), strict=True)
        return torch.stack([loss(*pair).reshape(()) for pair in pairs])

    try:
        none = torch.cat([alone(answers, answers) for answers in wanted])
        some = torch.cat([alone(answers.roll(1, 0), answers) for answers in wanted])
    except Exception:
        return None
    apart = len(none) == len(wanted) or not torch.equal(none, some)  # of batches of one there is nothing to tell
    return alone if none.isfinite().all() and apart else None


def check_loss(loss: Loss, outputs: Tensor) -> None:
    """Refuse a function that is no loss.

    Raises:
        ValueError: If it does not give one number for equal answers; -inf is one, as -PSNR has it.
    """
    value = loss(outputs, outputs)
    if not isinstance(value, Tensor) or value.numel() != 1 or value.isnan().any():
        said = tuple(value.shape) if isinstance(value, Tensor) and value.numel() != 1 else value
        raise ValueError(f"loss of the model's answers with themselves is {said}; want a tensor of one number")


def check_answers(outputs: object, loss: str | Loss) -> None:
    """Refuse answers of the float model that nothing can be close to, by that loss.

    Raises:
        ValueError: If they are no tensor, not finite, or no logits where loss is "kl".
    """
    if not isinstance(outputs, Tensor) or not torch.isfinite(outputs).all():
        said = "NaN or infinity" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}, not a tensor"
        raise ValueError(f"the float model answers {said} on the calibration data; there is nothing to be close to")
    if loss == "kl":
        # of images it is not known which axis holds classes
        if outputs.dim() not in (2, 3) or outputs.shape[-1] < 2:
            raise ValueError(
                "loss='kl' compares answers among classes, (samples, classes) or (samples, places, classes), and the "
                f"model's outputs are {tuple(outputs.shape)}; take loss='l1' or 'l2', or pass a function"
            )
        if (outputs >= 0).all() and torch.allclose(outputs.float().sum(-1), torch.ones(()).to(outputs.device)):
            raise ValueError(
                "loss='kl' takes logits, and the model's outputs are probabilities: each row sums to 1; leave the "
                "softmax out of the model, or take loss='l1' or 'l2', or pass a function"
            )


def check_steps(steps: int, least: int, name: str = "steps") -> None:
    """Refuse a number of steps, or of what is named, that makes no search or training.

    Raises:
        ValueError: If it is no whole number, or there are fewer than that.
    """
    if not isinstance(steps, Integral) or steps < least:
        raise ValueError(f"{name}={steps!r}: want a whole number, {least} or more")


@dataclass(frozen=True, kw_only=True)
class StrategySettings:
    """What layers are to get, and by which data that is decided.

    Attributes:
        bits_weights: 2 to 8.
        bits_activations: 2 to 8, or None to leave inputs float.
        edge_bits: Least bits of the first and the last layer, as is usual; None for no exception.
        per_channel: Whether each output channel has a step of its own.
        weights: Names of WEIGHTS to choose from; all that serve the purpose if None.
        inputs: Names of INPUTS, likewise.
        skip: Names of layers to leave float, as `prepare` takes them.
        loss: "kl" (divergence of the answers from the float model's, classes last), "l1" or "l2" (mean absolute or
            squared difference, for images and other real numbers; PSNR is of the latter), or a function
            (outputs, wanted) -> scalar. A function is asked of batches, and of samples by themselves to see which leads
            are beyond chance; one that says nothing of those, as -PSNR, of batches alone, and then every lead counts.
        select_share: Of the samples, by which discrete choices are judged; the others find grids and train mixtures.
            ResNet-20 at W4A8 from 256 images, divergence on 1,500 others, three draws: 0.035, 0.023 and
            0.031 nats where a quarter judges, 0.026, 0.021 and 0.026 where half does.
        batch_size: Samples of a step.
        correct_bias: Without training: whether biases may make up for what rounding does to mean answers of layers; it
            doubles the time of a search. A layer without a bias is given one where that helps, which files
            bring with them, 4 bytes a channel.
        seed: Of every random choice.

    Raises:
        ValueError: If bits, a share, a batch or the name of a strategy is out of its range.
    """

    bits_weights: int = 4
    bits_activations: int | None = 8
    edge_bits: int | None = 8
    per_channel: bool = True
    weights: Iterable[str] | None = None
    inputs: Iterable[str] | None = None
    skip: Iterable[str] = ()
    loss: str | Loss = "kl"
    select_share: float = 0.5
    batch_size: int = 64
    correct_bias: bool = True
    seed: int = 0
    trained: bool = False  # whether strategies are those that learn with the weights

    def __post_init__(self) -> None:
        for name in ("weights", "inputs", "skip"):  # an iterator would be read up by the first who looks
            if isinstance(given := getattr(self, name), str):
                raise ValueError(f"{name}={given!r}: want several names, such as [{given!r}]")
            object.__setattr__(self, name, None if given is None else tuple(given))
        for bits in (self.bits_weights, self.bits_activations, self.edge_bits):
            if bits is not None:
                check_bits(bits)
        if not 0 < self.select_share < 1:
            raise ValueError(f"select_share={self.select_share}: want a share of 1, such as 0.5")
        check_steps(self.batch_size, 1, "batch_size")
        if not isinstance(self.seed, Integral):
            raise ValueError(f"seed={self.seed!r}: want a whole number")
        if not callable(self.loss) and self.loss not in LOSSES:
            raise ValueError(f"loss={self.loss!r} is not known; choose one of {', '.join(LOSSES)}, or pass a function")
        strategies(WEIGHTS, self.weights, self.trained)
        strategies(INPUTS, self.inputs, self.trained)

    def bits(self, edge: bool) -> tuple[int, int | None]:
        """Bits of the weight and of the input of a layer, at an edge of the network or within."""
        least = (self.edge_bits or 0) if edge else 0
        return max(least, self.bits_weights), self.bits_activations and max(least, self.bits_activations)


def settings_of(trained: bool, named: dict[str, Any]) -> StrategySettings:
    """Settings by name.

    Raises:
        ValueError: If there is none of a name, one is of the other purpose, or out of its range.
    """
    other = UNTRAINED if trained else ()
    known = [f.name for f in fields(StrategySettings) if f.name not in ("trained", *other)]
    for name in named:
        if name in other:
            raise ValueError(f"{name}={named[name]!r} is of the search without training; leave it out")
        if name not in known:
            raise ValueError(f"{name}={named[name]!r}: there is no such setting; there are {', '.join(known)}")
    return StrategySettings(trained=trained, **named)
