"""What the strategy search claims, from its rows, and the README's tables of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .cells import cell, spread, table
from .record import claim
from .sgsc_peers import LIBRARIES
from .strategy_peers import BREVITAS, PT2E

Row = dict[str, Any]
Rows = Sequence[Mapping[str, Any]]
METRICS = {"psnr": (1, 1.0, "dB"), "ssim": (1, 1.0, ""), "accuracy": (1, 100.0, "points"), "loss": (-1, 1.0, "nats")}
CLOSE = {"psnr": 0.05, "ssim": 0.001, "accuracy": 0.1, "loss": 0.01}  # to float, at 8 bits of both
DRAWS = 3  # of calibration data, or seeds of training, that a claim needs of each method to hold
DATA = {"resnet20": "CIFAR-10 (JPEG q75)", "resnet56": "CIFAR-10 (JPEG q75)", "vdsr": "Set5 times 2"}
BEHIND = "or behind by no more than two standard errors"
SINGLE = "uniform "  # of one pair in all layers; the test data itself says which of them to be ahead of
BESIDE = ("best uniform", "greedy", *LIBRARIES, PT2E, *BREVITAS)  # what ours is to be ahead of, or equal to


def grouped(rows: Rows) -> list[list[Mapping[str, Any]]]:
    """Rows that may stand beside one another: one device, float network, and number of samples; float in each."""

    def judged(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return row.get("device"), row.get("weights"), row["test_samples"]

    found: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        if "setting" in row:
            found.setdefault((*judged(row), row.get("samples")), []).append(row)
    for of, group in found.items():
        group[:0] = [row for row in rows if "setting" not in row and judged(row) == of[:-1]]
    return list(found.values())


def network_claims(rows: list[Row]) -> list[Row]:
    """At least the best uniform strategy, greed and the libraries, beyond noise; close to float at 8 bits.

    The best uniform strategy both as calibration data has it, and as test data does, which nobody could choose by.

    Noise is that of the same test samples answered by both, two standard errors; draws of calibration data share them.
    With fewer than DRAWS of them nothing holds yet.
    """
    made = []
    for group in grouped(rows):
        metric, task = group[0]["metric"], group[0]["task"]
        sign, factor, unit = METRICS[metric]
        reference = next((r for r in group if r["method"] == "float"), None)
        for setting in dict.fromkeys(r["setting"] for r in group if "setting" in r):
            mine = [r for r in group if r.get("setting") == setting]
            ours = [r for r in mine if r["method"] == "DQSS"]
            name = f"{task}{f', {DATA[task]}' if task in DATA else ''}, {setting}"
            of = f"of {group[-1]['samples']:,}, {group[0]['test_samples']:,} test samples"
            judged = [r for r in mine if "ours_ahead" in r]
            beside = {m: [r for r in judged if r["method"] == m] for m in _methods(judged)}
            single = [m for m in beside if m.startswith(SINGLE)]
            behind = min(single, key=lambda m: statistics.fmean(r["ours_ahead"] for r in beside[m]), default="")
            for method in (*BESIDE, behind):
                if leads := beside.get(method, []):
                    mean = factor * statistics.fmean(r["ours_ahead"] for r in leads)
                    noise = factor * statistics.fmean(r["ours_ahead_error"] for r in leads)
                    draws, enough = counted(min(len(leads), len(ours)), "draws")
                    shown = f"{method}, the best by test of {len(single)} such" if method == behind else method
                    text = f"{name}, {draws} {of}: test {metric} ahead of {shown}, {BEHIND}"
                    least = 0.0 - 2 * noise
                    made.append(claim(text, least, mean, unit, enough and mean >= least))
            for key in METRICS if setting == "W8A8" and ours and reference is not None else ():
                if key == metric or (key == "ssim" and key in reference):
                    lost = statistics.fmean(METRICS[key][1] * sign * (reference[key] - r[key]) for r in ours)
                    draws, enough = counted(len(ours), "draws")
                    text = f"{name}, {draws} {of}: test {key} lost against float"
                    made.append(claim(text, CLOSE[key], lost, METRICS[key][2], enough and lost <= CLOSE[key]))
    return made


def counted(count: int, what: str) -> tuple[str, bool]:
    """How many there are, in words, and whether they are enough."""
    enough = count >= DRAWS
    return f"{count} {what}" if enough else f"{count} of {DRAWS} {what}", enough


def mixture_claims(rows: list[Row]) -> list[Row]:
    """Memory and products do not grow with candidates."""
    of = {m: {r["candidates"]: r for r in rows if r["method"] == m} for m in _methods(rows)}
    made = []
    for method, words in (("ours", ""), ("ours, weights learn too", ", weights learn too")):
        ours = of.get(method, {})
        if {2, 16} <= ours.keys():
            kept = ours[16]["kept_bytes"] / ours[2]["kept_bytes"]
            taken = ours[16]["cpu_seconds"] / ours[2]["cpu_seconds"]
            what = f"one convolution, 16 candidates of weight and of input against 2{words}"
            text = f"{what}: bytes kept for the backward, all weights among them"
            made.append(claim(text, 1.25, kept, "times", at_most=1.25))
            made.append(claim(f"{what}: CPU time forward and backward", 2, taken, "times", at_most=2))
    if 16 in of.get("ours", {}) and 16 in of.get("a product a pair", {}):
        ratio = of["a product a pair"][16]["cpu_seconds"] / of["ours"][16]["cpu_seconds"]
        made.append(claim("16 candidates: CPU time of a product a pair over ours", 8, ratio, "times", at_least=8))
    return made


def qat_claims(rows: list[Row]) -> list[Row]:
    """Within half a point of float, and no worse than any pair in all layers beyond two standard errors, over seeds.

    With fewer than DRAWS seeds of a method nothing holds yet.
    """
    made = []
    for group in grouped(rows):
        for of in alike(group, ("steps", "rate", "train_samples")):
            by = {m: {r["seed"]: r["accuracy"] for r in of if r["method"] == m} for m in _methods(of)}
            ours = by.pop("DQSS", {})
            reference = next((r["accuracy"] for r in group if r["method"] == "float"), None)
            losses = [] if reference is None else [100 * (reference - accuracy) for accuracy in ours.values()]
            leads = {m: [100 * (ours[s] - theirs[s]) for s in ours.keys() & theirs.keys()] for m, theirs in by.items()}
            for method, values in (("float", losses), *leads.items()):
                if not values:
                    continue
                mean, (seeds, enough) = statistics.fmean(values), counted(len(values), "seeds")
                error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
                what = "lost against float" if values is losses else f"ahead of {method} in all layers, {BEHIND}"
                how = f"{of[0]['steps']:,} steps at {of[0]['rate']:g} on {of[0].get('train_samples', 0):,} images"
                text = f"resnet20, {DATA['resnet20']}, W4A4, {how}, {seeds}: test accuracy {what}"
                target = 0.5 if values is losses else 0.0 - 2 * error
                holds = mean <= target if values is losses else mean >= target
                made.append(claim(text, target, mean, "points", enough and holds))
    return made


def alike(rows: Rows, keys: Sequence[str]) -> list[list[Mapping[str, Any]]]:
    """Rows of a setting, by what these entries are."""
    found: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        if "setting" in row:
            found.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return list(found.values())


def _methods(rows: Rows) -> list[str]:
    return list(dict.fromkeys(r["method"] for r in rows))


# ---- tables ----


def network_table(rows: Rows) -> str:
    """A method a line, a setting two columns or three: the metric, SSIM where there is one, the loss that chose."""
    return "\n\n".join(_one_table(group) for group in grouped(rows))


def _one_table(rows: Rows) -> str:
    metric = rows[0]["metric"]
    _, factor, unit = METRICS[metric]
    settings = list(dict.fromkeys(r["setting"] for r in rows if "setting" in r))
    form = ".2f" if metric != "loss" else ".4f"
    shown = [(metric, factor, form), *([("ssim", 1.0, ".4f")] if "ssim" in rows[0] else [])]
    lines = []
    for method in _methods(rows):
        cells = []
        for setting in settings:
            group = [r for r in rows if r["method"] == method and r.get("setting", setting) == setting]
            known = [r for r in group if metric in r]
            missing = "no" if any("missing" in r for r in group) else ""
            cells += [spread([f * r[key] for r in known], how) if known else missing for key, f, how in shown]
            losses = [r["select_loss"] for r in known if "select_loss" in r]
            cells.append(spread(losses, ".3g") if losses else "")
        lines.append([method, *cells])
    named = "accuracy, %" if metric == "accuracy" else f"{metric}, {unit}"
    columns = [named, *(key for key, _, _ in shown[1:]), "loss"]
    head = ["method", *(f"{s}: {columns[0]}" if c == columns[0] else c for s in settings for c in columns)]
    draws = {s: len({r["seed"] for r in rows if r.get("setting") == s}) for s in settings}
    data = f" {DATA[rows[0]['task']]}." if rows[0]["task"] in DATA else ""
    left = rows[0].get("left_float")
    data += f" In all methods {', '.join(left)} stays float." if left else ""
    why = {f"{r['method']}: {cell(r['missing'])}" for r in rows if "missing" in r}
    note = (
        f"Mean over draws of {rows[-1].get('samples'):,} calibration samples (least to most), "
        f"{', '.join(f'{n} in {s}' for s, n in draws.items())}; {metric} of "
        f"{rows[0]['test_samples']:,} test samples, the loss that of the calibration samples which judge choices.{data}"
        f"{''.join(f' No {text}.' for text in sorted(why))}"
    )
    return f"{table(head, lines)}\n\n{note}"


def mixture_table(rows: Rows) -> str:
    """A method a line, a number of candidates a column."""
    counts = sorted({r["candidates"] for r in rows})
    lines = []
    for method in _methods(rows):
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
    """A method a line, by how long and on how much it trained."""
    lines = []
    for group in ([r for r in rows if "setting" not in r], *alike(rows, ("steps", "rate", "train_samples"))):
        for method in _methods(group):
            of = [r for r in group if r["method"] == method]
            trained = [f"{of[0][key]:,}" if of[0].get(key) else "" for key in ("steps", "rate", "train_samples")]
            lines.append([method, *trained, str(len(of)), spread([100 * r["accuracy"] for r in of], ".2f")])
    return table(["method", "steps", "rate", "training samples", "seeds", "test accuracy, %"], lines)


LAYOUTS: dict[str, Callable[[Rows], str]] = {
    **{
        f"strategies-{name}": network_table
        for name in ("digits", "char-lm", "resnet20", "resnet56", "stories260k", "vdsr")
    },
    "strategies-mixture": mixture_table,
    "strategies-qat": qat_table,
}
