"""Networks that strategies are searched for: what calibrates them, what judges them, on data that choices never see.

The pretrained ones come with the data folder (`load.py`, `nets.py` there); digits and char-lm are trained here, once.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from sgsc.demos.tasks import load
from sgsc.samples import device_of

from .uniform import float_network

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PATCH, SCALE = 41, 2  # of VDSR's calibration, and of its test images
PATCHES = 48  # of each of T91's images, from which calibration is drawn
STORY, STORIES = 256, 200  # tokens of a story that count, and stories that judge
SAMPLES = 1024
LARGE = 16  # samples of a batch where each is a whole text or picture

Each = Callable[[nn.Module], dict[str, Tensor]]


@dataclass
class Network:
    """A float network, inputs to draw calibration from, and how it is judged.

    `each` returns what it is judged by for each test sample, (N,) by metric. `metric` is the one that claims are made
    of; `sign` is 1 where more of it is better. `weights` names those that were trained here: no two machines train
    alike. `batch_size` is of the search: a sample of many places is many samples to a layer.
    """

    model: nn.Module
    pool: Tensor
    each: Each
    metric: str = "accuracy"
    sign: int = 1
    skip: tuple[str, ...] = ()
    loss: str = "kl"
    samples: int = SAMPLES
    batch_size: int = 64
    train: TensorDataset | None = None
    test_samples: int = 0
    weights: str | None = None

    def calibration(self, seed: int) -> Tensor:
        """One draw of the pool."""
        order = torch.randperm(len(self.pool), generator=torch.Generator().manual_seed(seed))
        return self.pool[order[: self.samples]]

    def judge(self, model: nn.Module) -> dict[str, float]:
        """Means over the test samples."""
        return means(self.each(model))


def means(of: dict[str, Tensor]) -> dict[str, float]:
    """Metric -> its mean over samples."""
    return {name: values.double().mean().item() for name, values in of.items()}


@torch.no_grad()
def answered(model: nn.Module, test: TensorDataset, batch_size: int) -> dict[str, Tensor]:
    """Loss, in nats, and accuracy of each sample: of text the means over its positions."""
    found: dict[str, list[Tensor]] = {"loss": [], "accuracy": []}
    for start in range(0, len(test), batch_size):
        x, y = test[start : start + batch_size]
        logits = model(x.to(device_of(model))).flatten(0, -2).cpu()
        loss = F.cross_entropy(logits, y.flatten(), reduction="none")
        for name, values in (("loss", loss), ("accuracy", (logits.argmax(1) == y.flatten()).double())):
            found[name].append(values.view(len(x), -1).mean(1))
    return {name: torch.cat(parts) for name, parts in found.items()}


def demo(name: str, work: Path, commit: str, most: int | None) -> Network:
    """A demo task; its float network is trained once, with seed 0."""
    task = load(name, None, 0, None)
    path = work / f"strategies-{name}-{commit}.safetensors"
    model = float_network(task, path, 0, "cpu").eval()
    test = _first(task.test(), most)
    samples = min(SAMPLES, len(task.train) // 2)  # or draws would hardly differ
    of: dict[str, Any] = {} if name == "digits" else {"metric": "loss", "sign": -1}
    each: Each = lambda m: answered(m, test, 512)  # noqa: E731
    of["weights"] = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    return Network(model, task.train.tensors[0], each, **of, samples=samples, test_samples=len(test))


def cifar(name: str, data: Path, most: int | None, trained: bool) -> Network:
    """A pretrained ResNet, on CIFAR-10 (JPEG q75)."""
    loader = shared(data)
    arrays = loader.cifar10_jpeg()

    def images(part: np.ndarray) -> Tensor:
        x = torch.from_numpy(np.ascontiguousarray(part)).permute(0, 3, 1, 2).float() / 255
        return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None]

    test = _first(TensorDataset(images(arrays["x_test"]), torch.from_numpy(arrays["y_test"].astype(np.int64))), most)
    # where it is not trained no more than is drawn from: 50,000 images are 600 MB
    kept = np.random.default_rng(0).permutation(len(arrays["x_train"]))[: None if trained else 8 * SAMPLES]
    pool, labels = images(arrays["x_train"][kept]), torch.from_numpy(arrays["y_train"][kept].astype(np.int64))
    each: Each = lambda m: answered(m, test, 100)  # noqa: E731
    model = loader.network(name)
    return Network(model, pool, each, train=TensorDataset(pool, labels), test_samples=len(test))


def stories(data: Path, most: int | None) -> Network:
    """A pretrained language model; its table, which is also its output layer, stays float."""
    loader = shared(data)
    tokens = loader.stories()
    long = [t for t in tokens if len(t) >= STORY]
    test = torch.from_numpy(np.stack([t[:STORY] for t in long[: min(most or STORIES, STORIES)]]))
    pool = torch.from_numpy(np.stack([t[:STORY] for t in long[STORIES:]]))
    pairs = TensorDataset(test[:, :-1], test[:, 1:])
    each: Each = lambda m: answered(m, pairs, 16)  # noqa: E731
    samples = min(256, len(pool))  # of 256 tokens each
    model = loader.network("stories260k")
    of: dict[str, Any] = {"metric": "loss", "sign": -1, "skip": ("emb",), "samples": samples, "batch_size": LARGE}
    return Network(model, pool, each, **of, test_samples=len(test))


def vdsr(data: Path, most: int | None) -> Network:
    """A pretrained super-resolution network: patches of T91 calibrate it, Set5 times 2 judges it."""
    from PIL import Image

    loader, folder = shared(data), data / "sr"

    def luma(path: Path) -> np.ndarray:
        rgb = np.asarray(Image.open(path).convert("RGB"), np.float64) / 255
        return (16 + rgb @ (65.481, 128.553, 24.966)) / 255

    def resized(y: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        return np.asarray(Image.fromarray(y.astype(np.float32)).resize(size, Image.Resampling.BICUBIC))

    pairs = []
    for path in sorted((folder / "Set5").glob("*.png"))[:most]:
        real, low = luma(path), luma(folder / f"Set5_LR/x{SCALE}" / path.name)
        height, width = (SCALE * n for n in low.shape)
        pairs.append((torch.from_numpy(resized(low, (width, height)))[None, None], real[:height, :width]))
    rng, patches = np.random.default_rng(0), []
    for path in sorted((folder / "T91").glob("*.png")):
        y = luma(path)
        height, width = (n // SCALE * SCALE for n in y.shape)
        up = resized(resized(y[:height, :width], (width // SCALE, height // SCALE)), (width, height))
        for _ in range(PATCHES):
            row, column = rng.integers(height - PATCH + 1), rng.integers(width - PATCH + 1)
            patches.append(torch.from_numpy(up[row : row + PATCH, column : column + PATCH].copy()))

    @torch.no_grad()
    def each(model: nn.Module) -> dict[str, Tensor]:
        inside = slice(SCALE, -SCALE)
        found = []
        for x, real in pairs:
            y = model(x.to(device_of(model)))[0, 0].double().cpu().numpy()
            found.append((psnr(y[inside, inside], real[inside, inside]), ssim(y[inside, inside], real[inside, inside])))
        return dict(zip(("psnr", "ssim"), torch.tensor(found).T, strict=True))

    model, pool = loader.network("vdsr"), torch.stack(patches)[:, None]
    return Network(model, pool, each, metric="psnr", loss="l2", batch_size=LARGE, test_samples=len(pairs))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal to noise, in dB, of images in 0..1."""
    return float(-10 * np.log10(np.mean((a - b) ** 2)))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004) of images in 0..1, with their Gaussian window of 11 x 11."""

    def mean(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, 1.5, truncate=3.4)[5:-5, 5:-5]

    of_a, of_b = mean(a), mean(b)
    var_a, var_b, both = mean(a * a) - of_a**2, mean(b * b) - of_b**2, mean(a * b) - of_a * of_b
    first, second = 0.01**2, 0.03**2
    top = (2 * of_a * of_b + first) * (2 * both + second)
    return float((top / ((of_a**2 + of_b**2 + first) * (var_a + var_b + second))).mean())


def shared(data: Path) -> Any:
    """The module `load` of the data folder."""
    if str(data) not in sys.path:
        sys.path.insert(0, str(data))
    return importlib.import_module("load")


def network(name: str, data: Path | None, work: Path, commit: str, most: int | None, trained: bool = False) -> Network:
    """The network of that name; with all data that it may be `trained` on, or only what calibrates it.

    Raises:
        SystemExit: If it needs the data folder and none is named.
    """
    if name in ("digits", "char-lm"):
        return demo(name, work, commit, most)
    if data is None:
        raise SystemExit(f"bench.strategies: {name} needs --data PATH, the folder of load.py")
    if name == "stories260k":
        return stories(data, most)
    if name == "vdsr":
        return vdsr(data, most)
    return cifar({"resnet20": "cifar10_resnet20_jpeg", "resnet56": "cifar10_resnet56"}[name], data, most, trained)


def _first(test: TensorDataset, most: int | None) -> TensorDataset:
    return test if most is None else TensorDataset(*test[:most])
