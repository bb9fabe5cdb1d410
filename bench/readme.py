"""Write the tables of README.md, between `<!-- tables: NAME -->` and `<!-- end -->`, from bench/results/NAME.json.

Every row of a file is shown, or counted in an average, whether it flatters or not; so is every claim. `--check` changes
nothing and answers 1 where README.md is not what the results say.

python -m bench.readme [--check] [--readme FILE] [--results FOLDER]
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sgsc.files import write_atomically

from .cells import cell, plain, spread, table, times
from .deployment_tables import LAYOUTS as DEPLOYMENT
from .gpu_tables import checks, choices, crossovers, linear
from .headline import NAME, headline
from .peer_claims import best_peer, groups, ours
from .peer_problem import EXACT, INT8, WIDTHS
from .record import RESULTS, read
from .search_claims import LAYOUTS as SEARCH
from .sgsc_tables import LAYOUTS as SGSC
from .strategy_claims import LAYOUTS as STRATEGIES

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCK = re.compile(r"(<!-- tables: (\w+) -->\n)(.*?)(<!-- end -->)", re.S)
STAMP = {"section", "machine", "device", "commit", "date", "command"}
SHOWN = "4096x4096, 2 threads"  # the section of cpu_peers that is shown width by width
TITLES = {
    "main_job": "The main job, the published form, the training step",
    "sgsc": "Compression of real tasks, against uniform training and other libraries, and what the set buys",
    "cpu_kernels": "Kernels on the CPU against PyTorch",
    "cpu_peers": "Packed products on the CPU against other libraries",
    "deployment": "Whole networks on the CPU against other runtimes",
    "search": "Search of bits and channels",
    "gpu_kernels": "Kernels on the GPU",
    "strategies": "A strategy for each layer",
}
RATIOS = "A ratio is that peer's time over ours: below 1 (bold) the peer is faster."

Row = Mapping[str, Any]
Rows = Sequence[Row]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write the tables of README.md from bench/results.")
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if README.md is stale")
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--results", type=Path, default=RESULTS)
    chosen = parser.parse_args(arguments)
    try:
        before = chosen.readme.read_text()
        after = filled(before, chosen.results)
    except (ValueError, OSError) as error:
        print(f"bench.readme: {error}", file=sys.stderr)
        return 2
    if before == after:
        return 0
    if chosen.check:
        print(f"{chosen.readme.name} is not what the results say; run python -m bench.readme", file=sys.stderr)
        return 1
    write_atomically(chosen.readme, after.encode())
    return 0


def filled(text: str, results: Path) -> str:
    """`text` with the tables of the results between its markers.

    Raises:
        ValueError: If the markers do not pair up, or a result file is unknown or damaged.
    """
    starts, ends, pairs = text.count("<!-- tables:"), text.count("<!-- end -->"), len(BLOCK.findall(text))
    if not starts == ends == pairs:
        raise ValueError(
            f"{starts} markers `<!-- tables: NAME -->` and {ends} `<!-- end -->` make {pairs} pairs; "
            "each needs a line of its own, and its end"
        )

    def block(name: str) -> str:
        return headline(results) if name == NAME else folded(name, read(name, results))

    return BLOCK.sub(lambda found: f"{found[1]}{block(found[2])}{found[4]}", text)


def folded(name: str, found: Mapping[str, list[dict[str, Any]]]) -> str:
    """The tables of one result file under a line that opens them: what it is of, and how many claims hold."""
    shown, held = tables(found), [bool(claim["holds"]) for claim in found["claims"]]
    count = f": {sum(held)} of {len(held)} claims hold" if held else ""
    return f"\n<details>\n<summary>{TITLES.get(name, name)}{count}</summary>\n{shown}</details>\n\n" if shown else ""


def tables(found: Mapping[str, list[dict[str, Any]]]) -> str:
    """Markdown for one result file: each section's table and where it was measured, then the claims."""
    others = [row for row in found["rows"] if "candidate" in row]
    sections = {row["section"] for row in found["rows"] if "candidate" not in row}
    parts = [("other libraries", libraries(others), origin(others))] if others else []
    for section in [*(s for s in LAYOUTS if s in sections), *sorted(sections - LAYOUTS.keys())]:
        rows = [row for row in found["rows"] if row["section"] == section]
        parts.append((section, LAYOUTS.get(section, as_they_are)(rows), origin(rows)))
    if found["claims"]:
        parts.append(("claims", claims(found["claims"]), origin(found["claims"])))
    lines = []
    for i, (title, shown, where) in enumerate(parts):
        lines += [f"**{title}**", shown]
        if i + 1 == len(parts) or parts[i + 1][2] != where:  # said once for tables that share it
            lines.append(where)
    return "".join(f"\n{line}\n" for line in lines) + ("\n" if lines else "")


def origin(rows: Rows) -> str:
    """Machine (or GPU), commit and date of the rows, each combination once."""
    seen = dict.fromkeys((row.get("device", row["machine"]), row["commit"], row["date"]) for row in rows)
    return "Measured " + "; ".join(f"on {machine}, commit {commit}, {date}" for machine, commit, date in seen) + "."


# ---- layouts, by section ----


def tasks(rows: Rows) -> str:
    """Compression of a demo task: the seeds of a target in one line."""
    lines = []
    for task, target in dict.fromkeys((row["task"], row["target_size"]) for row in rows):
        group = [row for row in rows if (row["task"], row["target_size"]) == (task, target)]

        def column(key: str, group: Rows = group) -> list[float]:
            return [row[key] for row in group]

        change = [100 * (row["packed_accuracy"] - row["float_accuracy"]) for row in group]
        error = 100 * statistics.fmean(column("accuracy_standard_error"))
        samples = "/".join(f"{n}" for n in sorted(set(column("guard_samples"))))
        lines.append(
            [
                task,
                f"{100 * target:g} %",
                str(len({row["seed"] for row in group})),
                spread([100 * v for v in column("stored_ratio")], ".2f"),
                spread([100 * v for v in column("float_accuracy")], ".2f"),
                spread([100 * v for v in column("packed_accuracy")], ".2f"),
                f"{statistics.fmean(change):+.2f} ± {error:.2f}",
                spread(column("preservation_regressions"), ".3g"),
                f"{spread(column('guard_regressions'), '.3g')} of {samples}",
                spread([100 * v for v in column("guard_upper_bound_95")], ".1f"),
                spread(column("seconds"), ".0f"),
            ]
        )
    head = ["task", "target", "seeds", "stored, % of float32 bytes", "float accuracy, %", "packed accuracy, %"]
    head += ["change, points", "preservation regressions", "guard regressions", "their 95 % bound, %", "seconds"]
    note = "Mean over the seeds (least to most). The change is ± one standard error of a single run."
    return f"{table(head, lines, text=2)}\n\n{note}"


def published(rows: Rows) -> str:
    """The published form against its closed form."""
    head = ["task", "steps", "bits a weight, measured", "expected"]
    lines = [[r["task"], f"{r['steps']:,}", f"{r['measured_bits']:.4f}", f"{r['expected_bits']:.4f}"] for r in rows]
    return table(head, lines)


def training(rows: Rows) -> str:
    """Time of a step: a task a line, a variant a column."""
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        of = {row["variant"]: row for row in rows if row["task"] == task}
        lines.append([task, *(step_time(of[v]) if v in of else "" for v in variants)])
    return f"{table(['task', *variants], lines)}\n\nMilliseconds of a training step, median (mean), and × float."


def step_time(row: Row) -> str:
    """Median, mean and the ratio to float."""
    return f"{row['milliseconds']:.1f} ({row['mean_milliseconds']:.1f}), {row['over_float']:.2f}×"


def peers(rows: Rows) -> str:
    """Operations against their peers: a case a line, a peer a column."""
    names = list(dict.fromkeys(name for row in rows for name in row["ratio"]))
    lines = [
        [
            " ".join(row[key] for key in ("op", "case", "pass") if key in row),
            f"{row['bytes'] / 1e6:,.3f}",
            f"{row['microseconds']:,.1f}",
            f"{row['share_of_copy']:.0%}",
            *(ratio(row, name) for name in names),
        ]
        for row in rows
    ]
    missing = dict.fromkeys((name, why) for row in rows for name, why in row["missing"].items())
    notes = "".join(f" {name} is missing where it failed: {cell(why)}." for name, why in missing)
    head = ["case", "MB moved", "µs", "share of copy bandwidth", *names]
    return f"{table(head, lines)}\n\n{RATIOS}{notes}"


def libraries(rows: Rows) -> str:
    """Ours against the best peer: each width in the section that matters most, the worst width in every section."""
    timed = [row for row in rows if "missing" not in row]
    cases = [*groups(timed, None, False), *groups(timed, None, True)]
    batches = sorted({row["rows"] for row in timed})
    full = [[str(width), kind] for kind in (INT8, EXACT) for width in WIDTHS]
    worst = [[place, kind] for place in dict.fromkeys(where for where, *_ in cases) for kind in (INT8, EXACT)]
    for m in batches:
        of = {where: group for where, rows_of_x, group in cases if rows_of_x == m}
        for line in full:
            line.append(versus(of.get(SHOWN, []), next(w for w in WIDTHS if str(w) == line[0]), line[1])[1])
        for line in worst:
            found = [versus(of.get(line[0], []), width, line[1]) for width in WIDTHS]
            line.append(min((v for v in found if v[1]), key=lambda v: v[0], default=(0.0, ""))[1])
    columns = [f"M = {m}" for m in batches]
    parts = []
    if any(where == SHOWN for where, *_ in cases):
        parts += [f"{SHOWN}, by width, µs:", table(["bits", "numerics", *columns], full, text=2)]
    parts += ["The worst width of each shape, µs:", table(["shape", "numerics", *columns], worst, text=2)]
    missing = dict.fromkeys((r["library"], r["missing"]) for r in rows if "missing" in r and not r["candidate"])
    notes = "".join(f" {library} is missing: {cell(why)}." for library, why in missing)
    exact = " An int8 layer is compared with every peer of its width, an exact one with exact peers."
    return "\n\n".join([*parts, f"{RATIOS}{exact}{notes}"])


def versus(rows: Rows, width: int | str, numerics: str) -> tuple[float, str]:
    """(ratio, our time with the ratio to the best peer and its name); the text is empty where there is no pair."""
    mine, peer = ours(rows, width, numerics), best_peer(rows, width, numerics)
    if not mine or not peer:
        return 0.0, ""
    value = peer["microseconds"] / mine["microseconds"]
    return value, f"{mine['microseconds']:,.0f}, {times(value)} {peer['library']}"


def ratio(row: Row, name: str) -> str:
    """A peer's ratio, bold where we lose; empty where the peer does not exist."""
    if name not in row["ratio"]:
        return ""
    value = row["ratio"][name]
    return "missing" if value is None else times(value)


def as_they_are(rows: Rows) -> str:
    """Rows of a section without a layout: all their fields."""
    names = list(dict.fromkeys(key for row in rows for key in row if key not in STAMP))
    return table(names, [[plain(row.get(name)) for name in names] for row in rows])


def claims(rows: Rows) -> str:
    """Every claim, with the target and what was measured."""
    head = ["claim", "target", "measured", "unit", "holds"]
    lines = [
        [r["claim"], plain(r["target"]), plain(r["measured"]), r["unit"], "yes" if r["holds"] else "**no**"]
        for r in rows
    ]
    return table(head, lines)


LAYOUTS: dict[str, Callable[[Rows], str]] = {
    "digits": tasks,
    "char-lm": tasks,
    "published": published,
    "training": training,
    "fake_quantize": peers,
    "packed": peers,
    **DEPLOYMENT,
    "checks": checks,
    "linear": linear,
    "tokens": linear,
    "conv2d": peers,
    "variants": peers,
    "choices": choices,
    "crossovers": crossovers,
    **SGSC,
    **SEARCH,
    **STRATEGIES,
}


if __name__ == "__main__":
    sys.exit(main())
