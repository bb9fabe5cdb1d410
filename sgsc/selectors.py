"""What one look at the training data tells of each sample, and the selectors that rank samples by it.

    uncertain       entropy of the predicted distribution, highest first; ties by the lowest top-2 margin
    salient         Grad-CAM energy, highest first, never normalised (Selvaraju et al., 2017, equations 1 and 2):
                    sum over places of relu(sum_c weight_c A_c), A the output of the last convolution that ran,
                    weight_c the mean over places of d logit / d A_c, for the logit of the predicted class; without
                    convolutions sum over places of relu(sum_c A_c d logit / d A_c), A the input of the last Linear
    representative  members nearest to the centres of a k-means on L2-normalised features (PCA to 64)
    hard            cross entropy on the label, highest first

Entropy, margin, loss and features of a sequence are means over its positions, its logit is the sum over them. Features
are the input of the last `nn.Linear` that ran, or the outputs where none did. A new selector is one function and one
row of `SELECTORS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from warnings import catch_warnings, simplefilter

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .samples import check_outputs, check_targets, device_of, evaluating

FEATURES = 64  # most features a sample that are kept
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the float model makes of each of n training samples; on the CPU.

    Attributes:
        entropy: (n,) nats.
        margin: (n,) top-2 margin of probabilities, 0 to 1.
        loss: (n,) cross entropy on the label, nats.
        energy: (n,) saliency, in units of the logit; None where no convolution or Linear leads to the outputs.
        features: (n, at most 64) L2-normalised, then projected.
        labels: (n,) int64 classes, or None for sequences.
    """

    entropy: Tensor
    margin: Tensor
    loss: Tensor
    energy: Tensor | None
    features: Tensor
    labels: Tensor | None


class _Probe:
    """Hooks that hold, of one forward, the input of the last Linear and the activation that saliency looks at."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.features: Tensor | None = None
        self.activation: Tensor | None = None
        self.convolutional = any(isinstance(module, CONVOLUTIONS) for module in model.modules())
        self.handles = []
        for module in model.modules():
            if isinstance(module, CONVOLUTIONS):
                self.handles.append(module.register_forward_hook(self._after_convolution))
            elif isinstance(module, nn.Linear):
                self.handles.append(module.register_forward_pre_hook(self._before_linear, with_kwargs=True))

    def _cut(self, value: Tensor) -> Tensor:
        """Make `value` a leaf, so that the backward pass ends here; what follows may change the copy in place."""
        self.activation = value.detach().clone().requires_grad_()
        return self.activation.clone()

    def _after_convolution(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return self._cut(output)

    def _before_linear(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        value = args[0] if args else kwargs["input"]
        self.features = value.detach().clone()
        return None if self.convolutional else ((self._cut(value),), {})

    def run(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Outputs of one batch, its features (N, D) with norm 1, and its saliency energy (N,) or None."""
        self.features = self.activation = None
        with torch.enable_grad():
            logits = self.model(inputs)
            check_outputs(logits)
            energy = self._energy(logits)
        features = logits.detach() if self.features is None else self.features
        features = _by_sample(features, len(inputs)).float().mean(1)
        return logits.detach().float(), F.normalize(features, dim=1), energy

    def _energy(self, logits: Tensor) -> Tensor | None:
        if self.activation is None or not logits.requires_grad:
            return None
        predicted = logits.max(-1).values.sum()  # samples do not meet in evaluation mode, so one backward serves all
        (slope,) = torch.autograd.grad(predicted, self.activation, allow_unused=True)
        if slope is None:
            return None
        value = self.activation.detach()
        if self.convolutional:  # (rows, channels, *places) -> (rows, places)
            value, slope = value.flatten(2), slope.flatten(2).mean(2, keepdim=True)
            heat = (slope * value).sum(1).relu()
        else:  # (rows, *places, channels) -> (rows, places)
            heat = (slope * value).sum(-1).relu().reshape(len(value), -1)
        return _by_sample(heat, len(logits)).float().sum((1, 2))

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


def _by_sample(value: Tensor, samples: int) -> Tensor:
    """(rows, ..., D) -> (samples, places, D): rows may be samples, or samples and positions flattened into one.

    Raises:
        ValueError: If the rows do not divide by the samples.
    """
    if len(value) % samples:
        raise ValueError(
            f"a layer saw {len(value)} rows for {samples} samples; selection needs layers whose first axis is the batch"
        )
    return value.reshape(samples, -1, value.shape[-1])


@contextmanager
def probing(model: nn.Module) -> Iterator[_Probe]:
    """Watch `model` in evaluation mode; hooks and modes are undone afterwards."""
    probe = _Probe(model)
    try:
        with evaluating(model):
            yield probe
    finally:
        probe.close()


def projection(probe: _Probe, batches: Iterable[Tensor]) -> tuple[Tensor, Tensor] | None:
    """Mean (D,) and principal axes (D, 64) of the features of `batches`; None where D is at most 64."""
    device = device_of(probe.model)
    parts = []
    for batch in batches:
        _, features, _ = probe.run(batch.to(device))
        if features.shape[1] <= FEATURES:
            return None
        parts.append(features)
    found = torch.cat(parts)
    found = found[found.isfinite().all(1)]  # `gather` names the samples that are not
    mean = found.mean(0)
    return mean, torch.linalg.svd(found - mean, full_matrices=False).Vh[:FEATURES].T


def gather(probe: _Probe, batches: Iterable[tuple[Tensor, Tensor]], axes: tuple[Tensor, Tensor] | None) -> Evidence:
    """Run the model once over all samples.

    Args:
        probe: Of the float model.
        batches: Inputs and targets, in the order of the training data.
        axes: Mean and axes of `projection`.

    Raises:
        ValueError: If outputs or targets have wrong shapes, or outputs or saliency are not finite.
    """
    device = device_of(probe.model)
    rows: dict[str, list[Tensor]] = {name: [] for name in ("entropy", "margin", "loss", "energy", "features", "labels")}
    seen = 0
    for inputs, targets in batches:
        logits, features, energy = probe.run(inputs.to(device))
        targets = targets.to(device)
        check_targets(targets, logits)
        finite = logits.flatten(1).isfinite().all(1) & (True if energy is None else energy.isfinite())
        if not finite.all():
            first = seen + int((~finite).nonzero()[0])
            raise ValueError(
                f"training sample {first}: the float model's outputs or their gradient are NaN or infinite, so it has "
                "no answer to preserve; train the model further or mend or drop the sample"
            )
        chance = logits.log_softmax(-1)
        top = chance.topk(2).values.exp()
        own = chance.gather(-1, targets.long()[..., None])
        found = {
            "entropy": -(chance.exp() * chance).sum(-1),
            "margin": top[..., 0] - top[..., 1],
            "loss": -own[..., 0],
        }
        for name, value in found.items():
            rows[name].append((value.mean(1) if value.dim() == 2 else value).cpu())
        rows["features"].append((features if axes is None else (features - axes[0]) @ axes[1]).cpu())
        if energy is not None:
            rows["energy"].append(energy.cpu())
        if targets.dim() == 1:
            rows["labels"].append(targets.long().cpu())
        seen += len(targets)
    joined = {name: torch.cat(parts) if parts else None for name, parts in rows.items()}
    return Evidence(**joined)  # pyright: ignore[reportArgumentType]


def _descending(*keys: Tensor) -> Tensor:
    """Positions by the first key, highest first; ties by the next key, at last by the lowest position."""
    return torch.from_numpy(np.lexsort([-key.double().numpy() for key in reversed(keys)]))


def uncertain(evidence: Evidence, count: int, generator: torch.Generator) -> Tensor:
    """All n samples, highest entropy first."""
    return _descending(evidence.entropy, -evidence.margin)


def salient(evidence: Evidence, count: int, generator: torch.Generator) -> Tensor:
    """All n samples, highest saliency energy first.

    Raises:
        ValueError: If the model offers no saliency.
    """
    if evidence.energy is None:
        raise ValueError(
            "selector 'salient': no convolution or Linear layer of this model leads to its outputs by differentiable "
            "steps; give it no share, for example shares={'uncertain': 0.4, 'representative': 0.3, 'hard': 0.3}"
        )
    return _descending(evidence.energy)


def representative(evidence: Evidence, count: int, generator: torch.Generator) -> Tensor:
    """All n samples: the medoids of about `count` clusters, then the second nearest to each centre, and so on.

    With labels each class is clustered on its own, so that equal numbers from each class are medoids too.
    """
    labels = torch.zeros(len(evidence.features), dtype=torch.long) if evidence.labels is None else evidence.labels
    classes = labels.unique().tolist()
    place, size = torch.zeros(len(labels)), torch.zeros(len(labels))
    for label in classes:
        (members,) = (labels == label).nonzero(as_tuple=True)
        cluster, distance = clusters(evidence.features[members], -(-count // len(classes)), generator)
        for number in cluster.unique().tolist():
            (inside,) = (cluster == number).nonzero(as_tuple=True)
            # rounded, because both members of a cluster of two are equally near but for the last bits
            nearest = distance[inside].mul(1e5).round().argsort(stable=True)
            place[members[inside[nearest]]] = torch.arange(len(inside), dtype=place.dtype)
            size[members[inside]] = len(inside)
    return _descending(-place, size)


def clusters(features: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """k-means of features (n, D) in at most `count` clusters: cluster (n,) int64, distance to its centre (n,)."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    rows = features.double()
    seed = int(torch.randint(2**31 - 1, (1,), generator=generator))
    with catch_warnings():
        simplefilter("ignore", ConvergenceWarning)  # fewer distinct samples than clusters: then fewer clusters it is
        found = KMeans(min(max(count, 1), len(rows)), init="k-means++", n_init="auto", random_state=seed).fit(
            rows.numpy()
        )
    cluster = torch.from_numpy(found.labels_).long()
    # centres anew from the members: sums in a fixed order, whatever the number of threads
    centres = torch.zeros(int(cluster.max()) + 1, rows.shape[1], dtype=rows.dtype).index_add_(0, cluster, rows)
    centres /= cluster.bincount().clamp_min(1)[:, None]
    return cluster, (rows - centres[cluster]).norm(dim=1)


def hard(evidence: Evidence, count: int, generator: torch.Generator) -> Tensor:
    """All n samples, highest cross entropy on the label first."""
    return _descending(evidence.loss)


def drawn(evidence: Evidence, count: int, generator: torch.Generator) -> Tensor:
    """All n samples at random: what a choice by evidence is to be better than."""
    return torch.randperm(len(evidence.loss), generator=generator)


# (evidence, how many will be taken, generator) -> every position (n,) int64, best first
Selector = Callable[[Evidence, int, torch.Generator], Tensor]
SELECTORS: dict[str, Selector] = {
    "uncertain": uncertain,
    "salient": salient,
    "representative": representative,
    "hard": hard,
    "random": drawn,
}
