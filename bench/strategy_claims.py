"""What the strategy search claims, from its rows, and the README's tables of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .cells import spread, table
from .record import claim

Row = dict[str, Any]
Rows = Sequence[Mapping[str, Any]]
METRICS = {"psnr": (1, 1.0, "dB"), "accuracy": (1, 100.0, "points"), "loss": (-1, 1.0, "nats")}
CLOSE = {"psnr": 0.05, "accuracy": 0.1, "loss": 0.01}  # to float, at 8 bits of both
LIKE = {"digits": "accuracy", "resnet20": "accuracy", "resnet56": "accuracy", "vdsr": "psnr"}  # others: loss


def metric_of(rows: Rows) -> str:
    """The entry that a network is judged by."""
    return LIKE.get(rows[0]["task"], "loss")


def network_claims(rows: list[Row]) -> list[Row]:
    """At least the best uniform strategy, never below greed alone, close to float at 8 bits."""
    if not rows:
        return []
    metric, made = metric_of(rows), []
    sign, factor, unit = METRICS[metric]
    reference = next((r[metric] for r in rows if r["method"] == "float"), None)
    for setting in dict.fromkeys(r["setting"] for r in rows if "setting" in r):
        mine = [r for r in rows if r.get("setting") == setting and metric in r]
        ours = {r["seed"]: r for r in mine if r["method"] == "DQSS"}
        if not ours:
            continue
        name = f"{rows[0]['task']}, {setting}, {len(ours)} draws"
        uniform: dict[str, dict[int, float]] = {}
        for r in mine:
            if r["method"].startswith("uniform"):
                uniform.setdefault(r["method"], {})[r["seed"]] = r[metric]
        means = {m: statistics.fmean(v.values()) for m, v in uniform.items() if v.keys() >= ours.keys()}
        if means:
            best = max(means, key=lambda m: sign * means[m])
            leads = [factor * sign * (r[metric] - uniform[best][seed]) for seed, r in ours.items()]
            noise = statistics.stdev(leads) / len(leads) ** 0.5 if len(leads) > 1 else 0.0
            if metric == "accuracy":  # draws share their test samples, which may be few
                share = statistics.fmean(r[metric] for r in ours.values())
                noise = (noise**2 + factor**2 * share * (1 - share) / rows[0]["test_samples"]) ** 0.5
            text = f"{name}: test {metric} ahead of the best by test of {len(means)} uniform ones "
            text += f"({best}; standard error {noise:.3g})"
            mean = statistics.fmean(leads)
            made.append(claim(text, 0, mean, unit, mean >= -2 * noise))
        worst = max(r["select_loss"] - r["greedy_loss"] for r in ours.values())
        text = f"{name}: loss on the judging samples above that of greed alone, largest"
        made.append(claim(text, 0, worst, "loss", at_most=0))
        if setting == "W8A8" and reference is not None:
            lost = statistics.fmean(factor * sign * (reference - r[metric]) for r in ours.values())
            made.append(
                claim(f"{name}: test {metric} lost against float", CLOSE[metric], lost, unit, at_most=CLOSE[metric])
            )
    return made


def mixture_claims(rows: list[Row]) -> list[Row]:
    """Memory and products do not grow with candidates."""
    ours = {r["candidates"]: r for r in rows if r["method"] == "ours"}
    if not {2, 16} <= ours.keys():
        return []
    kept = ours[16]["kept_bytes"] / ours[2]["kept_bytes"]
    taken = ours[16]["cpu_seconds"] / ours[2]["cpu_seconds"]
    what = "one convolution, 16 candidates of weight and of input against 2"
    made = [
        claim(f"{what}: bytes kept for the backward, all weights among them", 1.25, kept, "times", at_most=1.25),
        claim(f"{what}: CPU time forward and backward", 2, taken, "times", at_most=2),
    ]
    plain = {r["candidates"]: r for r in rows if r["method"] != "ours"}
    if 16 in plain:
        ratio = plain[16]["cpu_seconds"] / ours[16]["cpu_seconds"]
        made.append(claim("16 candidates: CPU time of a product a pair over ours", 8, ratio, "times", at_least=8))
    return made


def qat_claims(rows: list[Row]) -> list[Row]:
    """Within half a point of float, and no worse than LSQ everywhere."""
    reference = next((r["accuracy"] for r in rows if r["method"] == "float"), None)
    ours = [r for r in rows if r["method"] == "DQSS"]
    if reference is None or not ours:
        return []
    name = f"resnet20, W4A4, {ours[0]['steps']} steps, {len(ours)} seeds"
    lost = statistics.fmean(100 * (reference - r["accuracy"]) for r in ours)
    made = [claim(f"{name}: test accuracy lost against float", 0.5, lost, "points", at_most=0.5)]
    theirs = [r["accuracy"] for r in rows if r["method"] == "lsq"]
    if theirs:
        lead = 100 * (statistics.fmean(r["accuracy"] for r in ours) - statistics.fmean(theirs))
        made.append(claim(f"{name}: test accuracy ahead of LSQ in all layers", 0, lead, "points", at_least=0))
    return made


# ---- tables ----


def network_table(rows: Rows) -> str:
    """A method a line, a setting two columns: the metric, and the loss on the judging samples."""
    metric = metric_of(rows)
    _, factor, unit = METRICS[metric]
    settings = list(dict.fromkeys(r["setting"] for r in rows if "setting" in r))
    form = ".2f" if metric != "loss" else ".4f"
    lines = []
    for method in dict.fromkeys(r["method"] for r in rows):
        cells = []
        for setting in settings:
            group = [r for r in rows if r["method"] == method and r.get("setting", setting) == setting]
            known = [r for r in group if metric in r]
            missing = "not installed" if any("missing" in r for r in group) else ""
            cells.append(spread([factor * r[metric] for r in known], form) if known else missing)
            losses = [r["select_loss"] for r in known if "select_loss" in r]
            cells.append(spread(losses, ".5f") if losses else "")
        lines.append([method, *cells])
    shown = "accuracy, %" if metric == "accuracy" else f"{metric}, {unit}"
    head = ["method", *(text for s in settings for text in (f"{s}: {shown}", "loss"))]
    draws = len({r["seed"] for r in rows if "seed" in r})
    note = (
        f"Mean over {draws} draws of calibration data (least to most); {shown.split(',')[0]} of "
        f"{rows[0].get('test_samples')} test samples, the loss that of the calibration samples which judge choices."
    )
    return f"{table(head, lines)}\n\n{note}"


def mixture_table(rows: Rows) -> str:
    """A method a line, a number of candidates a column."""
    counts = sorted({r["candidates"] for r in rows})
    lines = []
    for method in dict.fromkeys(r["method"] for r in rows):
        of = {r["candidates"]: r for r in rows if r["method"] == method}
        cells = [
            f"{1e3 * of[c]['cpu_seconds']:.0f} ms, {of[c]['kept_bytes'] / 1e6:.1f} MB" if c in of else ""
            for c in counts
        ]
        lines.append([method, *cells])
    head = ["mixture", *(f"{c} candidate{'s' * (c > 1)}" for c in counts)]
    note = (
        "CPU time forward and backward, and bytes kept in between, of a convolution of 64 to 64 channels, 16 x 32 x 32."
    )
    return f"{table(head, lines)}\n\n{note}"


def qat_table(rows: Rows) -> str:
    """A method a line."""
    lines = []
    for method in dict.fromkeys(r["method"] for r in rows):
        group = [r for r in rows if r["method"] == method]
        cells = [str(group[0].get("steps", "")), str(len(group)), spread([100 * r["accuracy"] for r in group], ".2f")]
        lines.append([method, *cells])
    return table(["method", "steps", "seeds", "test accuracy, %"], lines)


LAYOUTS: dict[str, Callable[[Rows], str]] = {
    **{
        f"strategies-{name}": network_table
        for name in ("digits", "char-lm", "resnet20", "resnet56", "stories260k", "vdsr")
    },
    "strategies-mixture": mixture_table,
    "strategies-qat": qat_table,
}
