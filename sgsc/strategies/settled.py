"""Outputs of layers whose choice stands: while later layers try theirs, the first ones need not compute again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from .calibration import count_calls
from .problem import Problem

MOST_BYTES = 2**30  # of outputs that are kept


class Settled:
    """A context in which layers that were `add`ed, first to last in the order of their calls, answer from memory.

    Half of a greedy pass is saved. Nothing is where any layer is not called once a batch, or a batch calls layers in
    another order: one in between is then given what a layer makes whose turn is later. Nor is where memory ends. The
    answers are the same either way.
    """

    def __init__(self, problem: Problem, most_bytes: int = MOST_BYTES) -> None:
        counts = count_calls(problem.model, problem.layers, problem.select).counts
        once = all(list(count.items()) == [(name, 1) for name in problem.layers] for count in counts)
        self.problem, self.left = problem, most_bytes if once else 0
        self.added: list[nn.Module] = []

    def __enter__(self) -> Settled:
        return self

    def __exit__(self, *_: object) -> None:
        for layer in self.added:
            layer.__dict__.pop("forward", None)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """All layers compute, for other samples."""
        kept = [(layer, layer.__dict__.pop("forward")) for layer in self.added]
        try:
            yield
        finally:
            for layer, forward in kept:
                layer.__dict__["forward"] = forward

    def add(self, name: str) -> None:
        """Keep what the layer of that name now answers to the samples that choices are judged by."""
        problem, layer = self.problem, self.problem.layers[name]
        if self.left <= 0:
            return
        outputs: list[list[Tensor]] = [[] for _ in problem.select]

        def keep(_module: nn.Module, _args: tuple, output: Tensor) -> None:
            if self.left > 0:
                outputs[problem.place].append(output.clone())  # the network may go on in place, here …
                self.left -= output.numel() * output.element_size()

        hook = layer.register_forward_hook(keep)
        try:
            for _ in problem.looks():
                pass
        finally:
            hook.remove()
        if self.left <= 0:
            return
        layer.__dict__["forward"] = lambda *_args, **_kwargs: outputs[problem.place][0].clone()  # … and there
        self.added.append(layer)
