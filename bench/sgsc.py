"""Compression of real tasks: targets, uniform training at equal bytes, what the preservation set does, other libraries.

    python -m bench.sgsc [mnist] [names] [cifar10] [resnet20] [shakespeare] [steps] [quantizers] [ablation]
                         --data PATH [--reduced] [--seconds N] [--seeds N] [--targets T,T] [--device cuda]

Each run is `sgsc compress` in a process of its own, and reads its test split once. `--reduced` is a schedule for a CPU;
each row says which it was trained by, and the two never share a mean. What is in the results at this commit is not
measured again, so that a call cut off, or ended by --seconds, goes on when it is repeated.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence

from . import record
from .runs import Row, Section, add_options, shared
from .sgsc_claims import ablated, ahead, default_form, loss_claims, mnist_claims, near_float, of_steps, on_target
from .sgsc_peers import TASKS as WITH_PEERS
from .sgsc_peers import measure_peers, peer_claims

SEEDS = {"mnist": 5, "names": 5, "cifar10": 3, "resnet20": 3, "shakespeare": 3, "quantizers": 3, "ablation": 5}
SEEDS |= {"steps": 3}
# the first ones are what is claimed
TARGETS = {"mnist": (0.02, 0.01, 0.05, 0.005), "names": (0.10, 0.20, 0.05), "cifar10": (0.025, 0.01, 0.05)}
UNIFORM = {"resnet20": (4, 3, 2), "shakespeare": (4, 3, 2, 8)}  # widths
RESNET20 = 0.10
FORMS = ("integer", "half-steps", "ternary", "interpolated", "published")  # of learned widths; the first is the default
FORMS_AT = (0.05, 0.02, 0.01, 0.007)  # on digits
STEPS, STEPS_AT = (250, 500, 1000, 2000), (0.02, 0.01)  # on digits
ABLATED = {"mnist": 0.01, "names": 0.10, "resnet20": 0.05}  # task -> target size
# neither a loss on the set nor a guard that acts
WITHOUT = ("--preservation-weight", "0", "--tolerance", "0.999", "--margin-tolerance", "1")
# task -> steps of the float training and of the compression, for two CPU cores, and what they are computed in
REDUCED = {
    **{"mnist": (500, 1000, "float32"), "names": (800, 1200, "float32"), "shakespeare": (500, 500, "float32")},
    **{"cifar10": (300, 300, "bfloat16"), "resnet20": (300, 500, "float32")},
}
QUICK = ("--limit", "16", "--samples", "4", "--bit-rate", "1")


def curve(section: Section, seeds: Sequence[int], targets: Sequence[float]) -> None:
    """Target sizes over seeds."""
    for target in targets or TARGETS[section.name]:
        for seed in seeds:
            section.sgsc(section.name, target, seed)


def against_uniform(section: Section, seeds: Sequence[int], targets: Sequence[float]) -> None:
    """Each uniform width, other libraries beside it, and our own network with no more bytes than the least of them.

    resnet20 also at its own target.
    """
    for seed in seeds:
        for target in targets or ((RESNET20,) if section.name == "resnet20" else ()):
            section.sgsc(section.name, target, seed)
        for bits in UNIFORM[section.name]:
            point = section.uniform(section.name, bits, seed)
            others = measure_peers(section, section.name, bits, seed) if section.name in WITH_PEERS else []
            least = min(row["stored_ratio"] for row in (point, *others) if "stored_ratio" in row)
            section.sgsc(section.name, least, seed, against=point["method"])


def steps(section: Section, seeds: Sequence[int], targets: Sequence[float]) -> None:
    """Fewer and more steps at one target, on digits: only noise is to tell them apart."""
    for target in targets or STEPS_AT:
        for seed in seeds:
            for count in STEPS:
                section.sgsc("digits", target, seed, rest=("--steps", str(count)), steps=count)


def quantizers(section: Section, seeds: Sequence[int], targets: Sequence[float]) -> None:
    """Each form of the grids over target sizes: a curve a form, on digits."""
    for target in targets or FORMS_AT:
        for seed in seeds:
            for form in FORMS:
                section.sgsc("digits", target, seed, method=form, rest=("--quantizer", form))


def ablation(section: Section, seeds: Sequence[int], targets: Sequence[float]) -> None:
    """With the preservation set, with one drawn at random, without any: equal size, steps, seeds and samples judged."""
    for task, target in ABLATED.items():
        for size in targets or (target,):
            for seed in seeds:
                section.sgsc(task, size, seed, method="with")
                section.sgsc(task, size, seed, method="random", rest=("--shares", "random=1"))
                section.sgsc(task, size, seed, method="without", rest=WITHOUT)


SECTIONS: dict[str, tuple[Callable[[Section, Sequence[int], Sequence[float]], None], Callable[[list[Row]], list[Row]]]]
SECTIONS = {
    "mnist": (curve, mnist_claims),
    "names": (curve, loss_claims),
    "cifar10": (curve, lambda rows: near_float(rows, "cifar10", 0.025, SEEDS["cifar10"])),
    "resnet20": (
        against_uniform,
        lambda rows: near_float(rows, "resnet20", RESNET20, SEEDS["resnet20"]) + ahead(rows, SEEDS["resnet20"]),
    ),
    "shakespeare": (
        against_uniform,
        lambda rows: ahead(rows, SEEDS["shakespeare"]) + peer_claims(rows, SEEDS["shakespeare"]),
    ),
    "steps": (steps, lambda rows: of_steps(rows, STEPS, SEEDS["steps"])),
    "quantizers": (quantizers, lambda rows: default_form(rows, FORMS, SEEDS["quantizers"])),
    "ablation": (ablation, ablated),
}


def of_devices(name: str, claims: Callable[[list[Row]], list[Row]], rows: list[Row]) -> list[Row]:
    """All claims of a section, those of each device apart."""
    found = []
    for device in dict.fromkeys(row.get("device") for row in rows):
        own = [row for row in rows if row.get("device") == device]
        where = "" if device is None else f", on {device}"
        found += [{**one, "claim": one["claim"] + where} for one in claims(own) + on_target(own, name)]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is not there yet; 0 also where time ran out before all of it was."""
    chosen = record.options(arguments, str(__doc__).splitlines()[0], _more)
    unknown = [name for name in chosen.sections if name not in SECTIONS]
    if unknown:
        print(f"bench.sgsc: no section is called {unknown[0]!r}; there are {', '.join(SECTIONS)}", file=sys.stderr)
        raise SystemExit(2)
    schedule = "quick" if chosen.quick else "reduced" if chosen.reduced else "full"
    quick = dict.fromkeys((*REDUCED, "digits"), (1, 2, "float32"))
    shorter = {"reduced": REDUCED, "quick": quick, "full": {}}[schedule]
    with shared(chosen, schedule, shorter, QUICK if chosen.quick else ()) as settings:
        for name in chosen.sections or SECTIONS:
            run, claims = SECTIONS[name]
            section = Section(name, settings, functools.partial(of_devices, name, claims))
            seeds = range(chosen.seeds or (1 if chosen.quick else SEEDS[name]))
            if not section.finished(functools.partial(run, section, seeds, chosen.targets)):
                break
    return 0


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)} (default: all)")
    add_options(parser, "the data, which no task here brings along")
    parser.add_argument("--reduced", action="store_true", help="a schedule for a CPU, and said so in every row")
    parser.add_argument("--seeds", type=int, default=None, help="seeds of each section (default: 5 or 3)")
    parser.add_argument(
        "--targets", type=_sizes, default=(), help="target sizes, instead of the sections' own: 0.02,0.01"
    )


def _sizes(text: str) -> tuple[float, ...]:
    return tuple(float(size) for size in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
