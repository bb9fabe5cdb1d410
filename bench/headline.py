"""The table that README.md shows unfolded: of each part the claims that say most, those that do not hold among them."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from .cells import plain, table
from .record import read

NAME = "headline"  # between the markers of README.md, where others name a result file
# result file, pattern of the claim, what it is called here
SHOWN = (
    ("main_job", "digits at 5 %: test accuracy lost*", "CNN on digits at 5 % of its float32 bytes: accuracy lost"),
    ("sgsc", "mnist at 2 %: test accuracy*", "CNN on MNIST at 2 %: accuracy"),
    ("sgsc", "mnist at 1 %: test accuracy*", "the same at 1 %"),
    ("sgsc", "names at 10 %: test loss*", "language model of names at 10 %: loss"),
    ("sgsc", "resnet20*at 10 %: test accuracy lost*", "ResNet-20 on CIFAR-10 at 10 %: accuracy lost"),
    ("sgsc", "resnet20: ahead of uniform 2-bit*", "the same, ahead of 2-bit LSQ at no more bytes: accuracy"),
    (
        "sgsc",
        "shakespeare: ahead of uniform 2-bit*",
        "transformer on tinyshakespeare, ahead of 2-bit LSQ: loss",
    ),
    ("sgsc", "shakespeare: ahead of hqq, 2 bits, scale of 64*", "the same, ahead of HQQ at 2 bits: loss"),
    ("sgsc", "mnist at 1 %: guard regressions without*", "held-out samples that a preservation set keeps right"),
    ("sgsc", "mnist at 1 %: guard regressions with a set*", "more of them, because the set is chosen by evidence"),
    ("search", "24 layers:*against random*", "search on a surrogate of 24 layers: trials saved, against random search"),
    ("search", "24 layers:*TPE, multivariate*", "the same, against Optuna's TPE"),
    ("search", "digits*best uniform width, share*", "search, digits: bytes saved on the best uniform width"),
    ("search", "digits*best loss of the trials*", "the same, best loss of the trials of Optuna's TPE over ours"),
    ("strategies", "resnet20*W8A8*against float", "ResNet-20 at W8A8 without retraining: accuracy lost"),
    ("strategies", "resnet20*W3*hqq*", "the same at W3, ahead of HQQ, or not far behind: accuracy"),
    ("strategies", "vdsr*W8A8*psnr lost*", "super-resolution (VDSR, Set5 times 2) at W8A8: PSNR lost"),
    (
        "strategies",
        "stories260k*W4A8*brevitas MSE*",
        "Llama-like network of 260 thousand weights at W4A8, ahead of Brevitas, or not far behind: loss",
    ),
    ("cpu_kernels", "fake_quantize*torch.compile", "learned quantizer at 4096x4096 on a CPU, against torch.compile"),
    (
        "cpu_peers",
        "M = 1, int8, 2 to 8 bits*best peer*",
        "packed products, one row, the worst case, against the best library",
    ),
    ("cpu_peers", "M = 128 and 512, int8, every width*", "the same with 128 and 512 rows"),
    ("deployment", "ResNet-20, 1 image, int8*everyone*", "ResNet-20 in int8, the worst case, against the best runtime"),
)


def headline(results: Path) -> str:
    """Markdown of the claims above, as the result files state them.

    Raises:
        ValueError: If a file has no such claim.
    """
    claims = {file: read(file, results)["claims"] for file in dict.fromkeys(file for file, *_ in SHOWN)}
    lines = []
    for file, pattern, text in SHOWN:
        found = next((claim for claim in claims[file] if fnmatchcase(claim["claim"], pattern)), None)
        if found is None:
            raise ValueError(f"bench/results/{file}.json has no claim like {pattern!r}, which bench/headline.py shows")
        reached = "yes" if found["holds"] else "**no**"
        if "reduced" in found["claim"]:
            text += " (reduced schedule)"
        lines.append([text, _value(found, "measured"), _value(found, "target"), reached])
    return f"\n{table(['', 'measured', 'to reach', 'holds'], lines)}\n\n"


def _value(claim: dict[str, Any], key: str) -> str:
    value, unit = claim[key], claim["unit"]
    if value is None:
        return ""
    if unit == "share":
        value, unit = 100 * value, "%"
    return f"{plain(round(value, 6))} {unit}"
