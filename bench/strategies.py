"""The strategy search: what each layer's own strategies gain over one for all, and what a mixture costs.

    python -m bench.strategies [digits] [char-lm] [resnet20] [resnet56] [stories260k] [vdsr] [mixture] [qat]
                               [--settings W8A8,W4A8,W4A4,W3] [--draws N] [--test N] [--data PATH] [--seconds N]
                               [--methods NAME,NAME] [--device cuda]

A row is one network, setting and draw of calibration data by one method. Test data judges what was chosen; it chooses
nothing. What is in the results at this commit is not measured again, so that a call cut off goes on when repeated.
--test judges by the first so many test samples, --random draws so many random assignments; rows say how many. --methods
measures these alone, as rows call them.
"""

from __future__ import annotations

import argparse
import functools
import random
import statistics
import sys
import time
from collections.abc import Callable, Collection, Sequence
from itertools import zip_longest

import torch
from torch import Tensor, nn

from sgsc.demos.strategies import learn
from sgsc.demos.training import batches, mirror_and_shift, shift
from sgsc.samples import device_of
from sgsc.strategies import (
    INPUTS,
    WEIGHTS,
    Strategies,
    StrategySettings,
    StrategyTraining,
    make_problem,
    search_strategies,
)
from sgsc.strategies.folding import fold_batch_norms
from sgsc.strategies.problem import Choice, Problem
from sgsc.strategies.registry import strategies

from . import record
from .runs import Row, Section, add_options, shared, timed
from .sgsc_peers import LIBRARIES
from .strategy_claims import mixture_claims, network_claims, qat_claims
from .strategy_networks import Network, means, network
from .strategy_peers import BREVITAS, PT2E, by_others, calibrated, exported, rounded

NETWORKS = ("digits", "char-lm", "resnet20", "resnet56", "stories260k", "vdsr")
SETTINGS: dict[str, tuple[int, int | None]] = {"W8A8": (8, 8), "W4A8": (4, 8), "W4A4": (4, 4), "W3": (3, None)}
CANDIDATES = (1, 2, 4, 8, 16)
RANDOM = "random"
START = "mse"  # of the other side, where strategies of one side are compared


def measure_network(
    section: Section, of: Network, settings: Sequence[str], draws: int, randoms: int, methods: Sequence[str] = ()
) -> None:
    """Every method, or these, in every setting on every draw."""
    common = {"task": section.name.removeprefix("strategies-"), "test_samples": of.test_samples, "metric": of.metric}
    common |= {"left_float": list(of.skip)} if of.skip else {}
    common |= {"weights": of.weights} if of.weights else {}
    section.row({**common, "method": "float"}, lambda: timed(lambda: of.judge(of.model)))
    refuse_unknown(methods, {m for setting in settings for m in _methods(of, setting, 0, randoms)})
    for setting in settings:
        for seed in range(draws):
            one = {**common, "setting": setting, "samples": of.samples, "seed": seed}
            for method, measure in _methods(of, setting, seed, randoms).items():
                if not methods or method in methods:
                    more = {"assignments": randoms} if method == RANDOM else {}
                    section.row({**one, "method": method, **more}, lambda measure=measure: timed(measure))


def refuse_unknown(methods: Sequence[str], known: Collection[str]) -> None:
    """Refuse a method that there is none of.

    Raises:
        SystemExit: If there is one.
    """
    if unknown := [m for m in methods if m not in known]:
        raise SystemExit(f"bench.strategies: no method is called {unknown[0]!r}; there are {', '.join(sorted(known))}")


def _methods(of: Network, setting: str, seed: int, randoms: int) -> dict[str, Callable[[], Row]]:
    """Method -> how it is measured, on one draw."""
    bits_weights, bits_activations = SETTINGS[setting]
    how = {"bits_weights": bits_weights, "bits_activations": bits_activations, "skip": of.skip, "loss": of.loss}
    how |= {"batch_size": of.batch_size}

    @functools.cache
    def found() -> tuple[Strategies, dict[str, Tensor]]:
        made = search_strategies(of.model, of.calibration(seed), **how, seed=seed)
        return made, of.each(made.model)

    @functools.cache
    def problem() -> Problem:
        return make_problem(of.model, of.calibration(seed), StrategySettings(**how, seed=seed))

    def beside(model: nn.Module) -> Row:
        """How it is judged, and how far ours is ahead on the same samples."""
        theirs, ours = of.each(model), found()[1]
        leads = of.sign * (ours[of.metric] - theirs[of.metric]).double()
        error = leads.std().item() / len(leads) ** 0.5 if len(leads) > 1 else 0.0
        return {**means(theirs), "ours_ahead": leads.mean().item(), "ours_ahead_error": error}

    def judged(choice: Choice) -> Row:
        """Recalibrated and corrected where that is better on the samples that choices are judged by: as ours."""
        made = problem()
        loss = made.derive(choice).loss
        return {"select_loss": loss, **beside(made.model)}

    def alone() -> Row:
        problem().take(found()[0].greedy)
        return {"select_loss": found()[0].greedy.loss, **beside(problem().model)}

    def dqss() -> Row:
        f, each = found()
        kept = ("origin", "best_uniform", "best_uniform_loss", "greedy_loss", "mixture_argmax_loss")
        kept += ("recalibrated", "biases_corrected")
        kinds = {f"different_{side}s": len({row[side] for row in f.report["layers"]}) for side in ("weight", "input")}
        said = {**{key: f.report[key] for key in kept}, **kinds, "search_seconds": f.report["seconds"]}
        return {"select_loss": f.loss, **means(each), **said, "layers": len(f.choice)}

    def drawn(count: int) -> Row:
        rng, made = random.Random(seed), problem()
        said = []
        for _ in range(count):
            choice: Choice = {
                name: (
                    rng.choice(list(made.weights[name])),
                    rng.choice(list(made.inputs[name])) if made.inputs.get(name) else None,
                )
                for name in made.layers
            }
            said.append(judged(choice))
        kept = {key: statistics.fmean(s[key] for s in said) for key in said[0]}
        return kept | {f"{of.metric}_worst": min((s[of.metric] for s in said), key=lambda v: of.sign * v)}

    def theirs(library: str) -> Row:
        # what is ours is made first: only what fails in the library is its
        inputs = of.calibration(seed).to(device_of(of.model))
        if library == PT2E:
            return by_others(lambda: exported(of, inputs), beside)
        model, widths = fold_batch_norms(of.model).model, problem().bits
        if library in BREVITAS:
            return by_others(lambda: calibrated(model, inputs, widths, BREVITAS[library]), beside)
        return by_others(lambda: rounded(model, library, widths), beside)

    made: dict[str, Callable[[], Row]] = {
        "DQSS": dqss,
        "greedy": alone,
        "best uniform": lambda: judged(problem().uniform(*found()[0].uniform)),
    }
    pairs = [(w, START) for w in strategies(WEIGHTS)]
    pairs += [(START, a) for a in strategies(INPUTS) if a != START] if bits_activations else []
    for w, a in pairs:
        name = f"uniform {w}" + (f" + {a}" if bits_activations else "")
        made[name] = lambda w=w, a=a: judged(problem().uniform(w, a))
    if randoms:
        made[RANDOM] = lambda: drawn(randoms)
    peers = [*([PT2E] if setting == "W8A8" else []), *(BREVITAS if bits_activations else LIBRARIES)]
    return made | {library: functools.partial(theirs, library) for library in peers}


# ---- the cost of a mixture ----


def measure_mixture(section: Section) -> None:
    """One layer, forward and backward: time and what is kept, against the number of candidates."""
    kinds = {"ours": (True, False), "ours, weights learn too": (True, True), "a product a pair": (False, False)}
    for count in CANDIDATES:
        for method, (together, learned) in kinds.items():
            row = {"task": "mixture", "method": method, "candidates": count}
            section.row(row, lambda c=count, t=together, of=learned: _mixture(c, t, of))


def _mixture(count: int, together: bool, learned: bool) -> Row:
    """A convolution of 64 to 64 channels on 16 images of 32 x 32, `count` candidates of weight and of input each.

    `learned`: as in a training, where candidates of a weight are rounded anew each time.
    """
    from sgsc.preparation import prepare
    from sgsc.quantizers import StaticInput
    from sgsc.strategies.mixture import MixedInput, MixedWeights

    torch.manual_seed(0)
    layer = prepare(nn.Conv2d(64, 64, 3, padding=1), quantizer="lsq4").model
    of_weights = {}
    for i in range(count):
        of_weights[str(i)] = WEIGHTS["max-abs"](64, 2 + i % 7)
        of_weights[str(i)].fit(layer.rows().detach() * (1 - 0.01 * i))
    weights = MixedWeights(of_weights, None if learned else layer.rows().detach())
    inputs = MixedInput({str(i): StaticInput(0.02 * (1 + i), -128, 127) for i in range(count)})
    layer.requires_grad_(learned)
    layer.weight_quantizer, layer.input_quantizer = weights, inputs
    x = torch.randn(16, 64, 32, 32).requires_grad_()

    def once() -> None:
        if together:
            y = layer(x)
        else:
            kernels = [w.view_as(layer.weight) for w in weights.fixed]
            y = torch.zeros(())
            for a, rounded_x in zip(inputs.shares(), [q(x) for q in inputs.candidates], strict=True):
                for b, kernel in zip(weights.shares(), kernels, strict=True):
                    y = y + a * b * torch.conv2d(rounded_x, kernel, None, padding=1)
        y.square().mean().backward()

    kept: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t, lambda t: t
    ):
        once()
    times, began = [], time.process_time()
    while len(times) < 3 or (time.process_time() - began < 1 and len(times) < 20):
        started = time.process_time()  # of all threads: others use this machine too
        once()
        times.append(time.process_time() - started)
    return {"cpu_seconds": statistics.median(times), "kept_bytes": sum(kept.values())}


# ---- training ----


def pairs_trained() -> dict[str, tuple[str, str] | None]:
    """Method -> strategies of weights and of inputs in all layers; None: searched.

    What is of one side only is paired in order, DoReFa with PACT as in the paper of the latter.
    """
    of_weights, of_inputs = (list(strategies(registry, None, True)) for registry in (WEIGHTS, INPUTS))
    rest = [w for w in of_weights if w not in of_inputs], [i for i in of_inputs if i not in of_weights]
    found: dict[str, tuple[str, str] | None] = {"DQSS": None, **{n: (n, n) for n in of_weights if n in of_inputs}}
    return found | {f"{w} + {i}": (w, i) for w, i in zip_longest(*rest, fillvalue="lsq")}


def measure_qat(
    section: Section, of: Network, steps: int, draws: int, rate: float, methods: Sequence[str] = ()
) -> None:
    """ResNet-20 at 4 bits, equally long: strategies that are searched, each pair in all layers; or these methods."""
    assert of.train is not None
    float_row = {"task": "resnet20", "test_samples": of.test_samples}
    common = {**float_row, "setting": "W4A4", "steps": steps, "rate": rate, "samples": of.samples}
    common["train_samples"] = len(of.train)
    section.row({**float_row, "method": "float"}, lambda: timed(lambda: of.judge(of.model)))
    known = pairs_trained()
    refuse_unknown(methods, known)
    for seed in range(draws):
        for method, names in known.items():
            if methods and method not in methods:
                continue
            section.row(
                {**common, "seed": seed, "method": method},
                lambda s=seed, n=names: timed(lambda: _train(of, steps, s, n, rate)),
            )


def _train(of: Network, steps: int, seed: int, names: tuple[str, str] | None, rate: float) -> Row:
    assert of.train is not None
    of_weights, of_inputs = (None, None) if names is None else ([names[0]], [names[1]])
    how = {"weights": of_weights, "inputs": of_inputs, "bits_weights": 4, "bits_activations": 4}
    run = StrategyTraining(of.model, of.calibration(seed), steps=steps, seed=seed, rate=rate, **how)
    colour = of.train.tensors[0].shape[1] == 3
    data = batches(of.train, 64, torch.Generator().manual_seed(seed), mirror_and_shift if colour else shift)
    moved = (tuple(t.to(device_of(of.model)) for t in batch) for batch in data)
    course = learn(run, of.model, moved, seed=seed)
    kinds = {
        f"different_{side}s": len({pair[i] for pair in run.choice.values()})
        for i, side in enumerate(("weight", "input"))
    }
    return {**of.judge(run.model.eval()), "last_loss": statistics.fmean(said["loss"] for said in course[-20:]), **kinds}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is not there yet; 0 also where time ran out before all of it was."""
    chosen = record.options(arguments, str(__doc__).splitlines()[0], _more)
    known = (*NETWORKS, "mixture", "qat")
    chosen.sections = [name.removeprefix("strategies-") for name in chosen.sections]  # as results call them
    settings_wanted = chosen.settings.split(",")
    unknown = [n for n in chosen.sections if n not in known] + [n for n in settings_wanted if n not in SETTINGS]
    if unknown:
        print(
            f"bench.strategies: {unknown[0]!r} is unknown; there are {', '.join((*known, *SETTINGS))}", file=sys.stderr
        )
        raise SystemExit(2)
    draws = 1 if chosen.quick else chosen.draws
    with shared(chosen) as settings:

        def drawn_from(name: str, trained: bool = False) -> Network:
            of = network(name, chosen.data, settings.work, settings.commit, chosen.test, trained)
            of.samples = min(of.samples, chosen.samples)
            of.model.to(settings.device)
            return of

        for name in chosen.sections or known:
            claims = {"mixture": mixture_claims, "qat": qat_claims}.get(name, network_claims)
            section = Section(f"strategies-{name}", settings, claims, file="strategies")
            if name == "mixture":  # of the CPU, whatever the device
                measure = functools.partial(measure_mixture, section)
            elif name == "qat":
                one = drawn_from("resnet20", trained=True)
                measure = functools.partial(measure_qat, section, one, chosen.steps, draws, chosen.rate, chosen.methods)
            else:
                one = drawn_from(name)
                measure = functools.partial(
                    measure_network, section, one, settings_wanted, draws, chosen.random, chosen.methods
                )
            if not section.finished(measure):
                break
    return 0


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sections", nargs="*", metavar="SECTION", help="networks, mixture, qat (default: all)")
    parser.add_argument("--settings", default=",".join(SETTINGS), help=f"of {', '.join(SETTINGS)} (default: all)")
    parser.add_argument("--draws", type=int, default=3, help="of calibration data (default: 3)")
    parser.add_argument("--samples", type=int, default=1024, help="of a draw (default: 1024)")
    parser.add_argument("--random", type=int, default=10, help="random assignments a draw (default: 10)")
    parser.add_argument(
        "--methods", type=lambda text: text.split(","), default=(), help="of networks, or of qat (default: all)"
    )
    parser.add_argument("--test", type=int, default=None, help="at most so many test samples, and rows say so")
    parser.add_argument("--steps", type=int, default=2000, help="of the section qat (default: 2000)")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of the section qat (default: 1e-3)")
    add_options(parser, "load.py, for pretrained networks")


if __name__ == "__main__":
    sys.exit(main())
