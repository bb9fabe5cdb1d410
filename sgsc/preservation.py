"""The preservation set: training samples whose answers the compressed model must keep.

Chosen from the training data by index, by the selectors of `selectors.py`, each with a share of the set; a sample that
one selector took is skipped by the next. For classifiers every selector takes as equally many samples of each class as
the data allows; what does not divide goes, one a class, to the classes with the fewest samples so far, then by rank.
The set holds the samples, the float model's outputs for them, and a digest of all training data.

    loss kl       mean over samples (and positions) of sum_c p_c (log p_c - log q_c), p float, q the model at hand
    loss answers  the same, but where the float model is right a quarter of p is the label: near ties are to stay right
    loss task     mean over samples (and positions) of -log q_label
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from .samples import check_outputs, device_of, fed, fetch, outputs
from .selectors import SELECTORS, gather, probing, projection

DEFAULT_SHARES = {"uncertain": 0.25, "salient": 0.25, "representative": 0.25, "hard": 0.25}
LEAN = 0.25  # share of the label in what is kept of a right answer: a near tie then has a margin, and stays right
BASE_RISK = 0.05  # margin: a sample that lost as much is drawn twice as often as one that lost none
PROJECTION_SAMPLES = 1024  # that the principal axes are found from: many more than 64, few enough to hold


@dataclass(frozen=True, eq=False)
class PreservationSet:
    """Samples, and what the float model says of them.

    Attributes:
        indices: (n,) int64 positions in the training data, ascending, no duplicates.
        reasons: n names of selectors: which one chose each sample.
        inputs: (n, ...) the samples.
        targets: (n,) class ids, or (n, T) token ids.
        outputs: (n, classes) or (n, T, vocabulary) float32 logits of the float model.
        data_hash: sha256, in hex, of all training inputs and targets in order, with their shapes and dtypes.
    """

    indices: Tensor
    reasons: tuple[str, ...]
    inputs: Tensor
    targets: Tensor
    outputs: Tensor
    data_hash: str

    def __post_init__(self) -> None:
        lengths = [len(getattr(self, name)) for name in ("indices", "reasons", "inputs", "targets", "outputs")]
        if len(set(lengths)) != 1 or lengths[0] == 0:
            raise ValueError(
                f"preservation set: indices, reasons, inputs, targets and outputs have lengths {lengths}; want one "
                "length of at least 1 (make sets with PreservationSet.select, or from_state with an untouched state)"
            )
        if self.indices.dim() != 1 or self.indices.dtype != torch.int64 or not (self.indices.diff() > 0).all():
            raise ValueError("preservation set: indices must be int64 (n,), ascending and without duplicates")

    @classmethod
    def select(
        cls,
        model: nn.Module,
        data: Dataset,
        size: int,
        *,
        shares: Mapping[str, float] | None = None,
        seed: int = 0,
        batch_size: int = 256,
    ) -> PreservationSet:
        """Choose `size` samples of the training data; the same seed chooses the same ones.

        The model runs in evaluation mode on its own device, once over all data; afterwards its modes and torch's
        random state are as before. The set lies on the model's device.

        Args:
            model: The float model; returns logits (N, classes) or (N, T, vocabulary).
            data: Map-style training data of (x, y) pairs, without random augmentation; never test data.
            size: Samples to choose, 1 to len(data).
            shares: Selector to its fraction of the set, summing to 1; by default a quarter each of all but "random".
            seed: Of the selectors' random choices.
            batch_size: Samples a forward pass.

        Raises:
            ValueError: If a setting is out of range, the data changes between two reads, outputs or targets are not
                finite or have wrong shapes, or a selector cannot work with this model.
        """
        total = len(data)  # pyright: ignore[reportArgumentType]
        if not 1 <= size <= total:
            raise ValueError(f"size={size}: want 1 to {total}, the number of training samples")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: want at least 1")
        counts = quotas(size, shares)
        device = device_of(model)
        with _own_randomness(device, seed):
            digest = _DataHash()
            _check_repeatable(data, min(total, 32))
            spread = torch.linspace(0, total - 1, min(total, PROJECTION_SAMPLES)).long().tolist()
            with probing(model) as probe:
                axes = projection(probe, (fetch(data, spread[i : i + 256])[0] for i in range(0, len(spread), 256)))
                evidence = gather(probe, _batches(data, total, batch_size, digest), axes)
            labels = None if evidence.labels is None else np.unique(evidence.labels.numpy(), return_inverse=True)[1]
            reasons: dict[int, str] = {}
            for name, count in counts.items():
                ranking = SELECTORS[name](evidence, count, torch.Generator().manual_seed(seed)).numpy()
                reasons |= dict.fromkeys(_take(ranking, count, labels, list(reasons)), name)
            chosen = sorted(reasons)
            inputs, targets = fetch(data, chosen)
            inputs, targets = inputs.to(device), targets.to(device).long()
            return cls(
                indices=torch.tensor(chosen, device=device),
                reasons=tuple(reasons[index] for index in chosen),
                inputs=inputs,
                targets=targets,
                outputs=outputs(model, inputs, batch_size).float(),
                data_hash=digest.hexdigest(),
            )

    def __len__(self) -> int:
        return len(self.indices)

    def loss(self, model: nn.Module, batch: Tensor | None = None, *, kind: str = "kl") -> Tensor:
        """How far `model` is from what it must keep: a scalar in nats, differentiable.

        The model runs in the mode it is in: in training mode dropout acts and batch norm learns from these samples too.

        Args:
            model: Any model with the float model's inputs and outputs.
            batch: (m,) positions in the set (not in the training data); all by default.
            kind: "kl", to the float model's outputs, "answers", to these leant towards right answers, or "task", cross
                entropy on the labels.

        Raises:
            ValueError: If `kind` is unknown or the model's outputs have another shape than the float model's.
        """
        if kind not in ("kl", "answers", "task"):
            raise ValueError(
                f"preservation loss {kind!r}: allowed are 'kl' (float outputs) and 'task' (labels), or both: 'answers'"
            )
        rows = slice(None) if batch is None else batch.to(self.indices.device)
        logits = model(fed(model, self.inputs[rows]))
        check_outputs(logits)
        kept = self.outputs[rows].to(logits.device)
        if logits.shape != kept.shape:
            raise ValueError(
                f"preservation loss: the model returns {tuple(logits.shape)}, the float model {tuple(kept.shape)}; "
                "compression must keep the classes and positions"
            )
        log_q = logits.float().log_softmax(-1).flatten(0, -2)
        if kind == "task":
            return F.nll_loss(log_q, self.targets[rows].to(logits.device).flatten())
        log_p = kept.log_softmax(-1).flatten(0, -2)
        if kind == "kl":
            return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
        p, labels = log_p.exp(), self.targets[rows].to(logits.device).flatten()
        # right answers only: a wrong one is not to be kept, and not to be mended at the cost of others
        lean = LEAN * (p.argmax(-1) == labels).to(p.dtype)[:, None]
        return F.kl_div(log_q, p.lerp(F.one_hot(labels, p.shape[-1]).to(p.dtype), lean), reduction="batchmean")

    def batch(self, generator: torch.Generator, size: int, risk: Tensor | None = None) -> Tensor:
        """Random positions in the set without repetition, (min(size, n),) int64, for `loss`.

        Args:
            generator: Of the choice.
            size: Positions.
            risk: (n,) at least 0: samples are drawn in proportion to BASE_RISK + risk; equally if None.

        Raises:
            ValueError: If `size` is below 1.
        """
        if size < 1:
            raise ValueError(f"batch of {size} preservation samples: want at least 1")
        if risk is None or size >= len(self):
            order = torch.randperm(len(self), generator=generator, device=generator.device)
        else:
            chances = BASE_RISK + risk.to(generator.device, torch.float64)
            order = torch.multinomial(chances, size, generator=generator)
        return order[:size].to(self.indices.device)

    def to(self, where: torch.device | str | torch.dtype) -> PreservationSet:
        """The same set with its tensors on a device, or with its inputs of a dtype, as those of the model's batches."""
        if isinstance(where, torch.dtype):
            return replace(self, inputs=self.inputs.to(where))
        moved: dict[str, Any] = {name: tensor.to(where) for name, tensor in self._tensors().items()}
        return replace(self, **moved)

    def _tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("indices", "inputs", "targets", "outputs")}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors by name, and values ready for JSON; `from_state` takes both."""
        tensors = {name: tensor.contiguous() for name, tensor in self._tensors().items()}
        return tensors, {"reasons": list(self.reasons), "data_hash": self.data_hash}

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> PreservationSet:
        """The set that `state` described.

        Raises:
            ValueError: If an entry is missing or the entries do not fit together.
        """
        wanted = {"indices", "inputs", "targets", "outputs", "reasons", "data_hash"}
        missing = sorted(wanted - tensors.keys() - values.keys())
        if missing:
            raise ValueError(f"preservation set: its state lacks {', '.join(missing)}; the checkpoint is not whole")
        parts = {name: tensors[name] for name in ("indices", "inputs", "targets", "outputs")}
        return cls(**parts, reasons=tuple(values["reasons"]), data_hash=str(values["data_hash"]))


def quotas(size: int, shares: Mapping[str, float] | None) -> dict[str, int]:
    """Samples a selector, in the order of the registry; largest remainders get what rounding down left. See `select`.

    Raises:
        ValueError: If a selector is unknown or the shares are not fractions that sum to 1.
    """
    shares = DEFAULT_SHARES if shares is None else shares
    unknown = sorted(set(shares) - set(SELECTORS))
    if unknown:
        raise ValueError(f"shares: no selector {', '.join(unknown)}; there are {', '.join(SELECTORS)}")
    if not all(0 <= share <= 1 for share in shares.values()) or abs(sum(shares.values()) - 1) > 1e-6:
        raise ValueError(f"shares {dict(shares)}: want fractions of 0 or more that sum to 1")
    exact = {name: size * shares[name] for name in SELECTORS if shares.get(name)}
    counts = {name: int(value + 1e-6) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: size - sum(counts.values())]:
        counts[name] += 1
    return counts


def _take(ranking: np.ndarray, count: int, labels: np.ndarray | None, taken: list[int]) -> list[int]:
    """The first `count` of `ranking` that are not taken, as equal over classes as the data allows.

    Args:
        ranking: (n,) every sample, best first.
        count: At most n - len(taken).
        labels: (n,) classes 0 .. C - 1, or None for no balance.
        taken: Samples that earlier selectors chose.
    """
    free = ranking[~np.isin(ranking, taken)]
    if labels is None:
        return free[:count].tolist()
    own = labels[free]
    available, so_far = (
        np.bincount(labels[which], minlength=labels.max() + 1) for which in (free, np.array(taken, int))
    )
    quota = np.zeros_like(available)
    while (is_open := available > quota).any() and (step := (count - quota.sum()) // is_open.sum()):
        quota[is_open] += min(step, (available - quota)[is_open].min())
    order = np.argsort(own, kind="stable")
    place = np.empty_like(own)  # how many of its class rank before a sample
    place[order] = np.arange(len(own)) - (np.cumsum(available) - available)[own[order]]
    (following,) = np.nonzero(place == quota[own])  # the next of each open class, best first
    fewest = following[np.argsort((so_far + quota)[own[following]], kind="stable")]
    quota[own[fewest[: count - quota.sum()]]] += 1
    return free[place < quota[own]].tolist()


class _DataHash:
    """sha256 over a stream of batches that does not depend on how they are cut."""

    def __init__(self) -> None:
        self.parts = (hashlib.sha256(), hashlib.sha256())
        self.samples = 0
        self.kinds: tuple[str, ...] = ()

    def update(self, inputs: Tensor, targets: Tensor) -> None:
        """Add a batch.

        Raises:
            ValueError: If its samples have other shapes or dtypes than those before.
        """
        kinds = tuple(f"{value.dtype} {tuple(value.shape[1:])}" for value in (inputs, targets))
        if self.kinds and kinds != self.kinds:
            raise ValueError(
                f"training samples from {self.samples} on are {kinds}, those before {self.kinds}; "
                "crop or pad them to one shape"
            )
        self.kinds = kinds
        self.samples += len(inputs)
        for part, value in zip(self.parts, (inputs, targets), strict=True):
            part.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)

    def hexdigest(self) -> str:
        whole = (self.samples, self.kinds, *(part.hexdigest() for part in self.parts))
        return hashlib.sha256(repr(whole).encode()).hexdigest()


def _batches(data: Dataset, total: int, batch_size: int, digest: _DataHash) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, total, batch_size):
        inputs, targets = fetch(data, range(start, min(start + batch_size, total)))
        digest.update(inputs, targets)
        yield inputs, targets


def _check_repeatable(data: Dataset, count: int) -> None:
    first, second = _DataHash(), _DataHash()
    for digest in (first, second):
        digest.update(*fetch(data, range(count)))
    if first.hexdigest() != second.hexdigest():
        raise ValueError(
            "the training data changes between two reads of the same samples; switch random augmentation off for the "
            "selection, so that the samples that are kept are those that were judged"
        )


@contextmanager
def _own_randomness(device: torch.device, seed: int) -> Iterator[None]:
    """Seed torch for the duration, and give it its random state back; the device of the model included."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.random.default_generator.manual_seed(seed)
        yield
