"""All layers quantize in one call: what they would give alone, bit for bit, whatever is done with the model."""

import contextlib
import copy
import gc
import io
import pickle
import threading
import weakref
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from sgsc import (
    PreservationSet,
    QuantEmbedding,
    QuantLinear,
    SelfCompression,
    fake_quantize,
    pack,
    prepare,
    quantize_together,
)
from sgsc.kernels import Op
from sgsc.layers import quant_layers
from sgsc.quantizers import QUANTIZERS, Quantizer, make_quantizer
from tests.blobs import blobs, network, train
from tests.checks import assert_same
from tests.test_layers import set_random_widths

ONE, MANY = "fake_quantize", "fake_quantize_many"


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """The operations of the quantizer, as they are called."""
    names: list[str] = []
    kept = Op.__call__
    monkeypatch.setattr(Op, "__call__", lambda self, *a: names.append(self.name) or kept(self, *a))
    return names


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


class Network(nn.Module):
    """A layer of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 12)
        self.mix = nn.TransformerEncoderLayer(12, 3, 20, 0.0, batch_first=True)
        self.slide = nn.Conv1d(12, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, (1, 3), padding=(0, 1), groups=4)
        self.out = nn.Linear(8, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.slide(self.mix(self.table(tokens)).transpose(1, 2)).relu()
        return self.out(self.grouped(x[:, :, None]).amax((2, 3)))


TOKENS = torch.arange(3 * 7).view(3, 7) * 5 % 11


def small(seed: int = 0, layers: int = 3) -> nn.Module:
    """Linear layers with widths of 0 to 8."""
    torch.manual_seed(seed)
    model = prepare(nn.Sequential(*(nn.Linear(6, 6) for _ in range(layers)))).model
    set_random_widths(model, seed)
    return model


def gradients(model: nn.Module, x: Tensor, call=None) -> dict[str, Tensor | None]:
    """Of every parameter, and the output."""
    model.zero_grad()
    y = (call or model)(x)
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype))
    return {"output": y.detach(), **{name: p.grad for name, p in model.named_parameters()}}


def assert_alike(found: dict[str, Tensor | None], wanted: dict[str, Tensor | None]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        got = found[name]
        assert (got is None) == (value is None), f"{name}: {got}, expected {value}"
        if value is not None and got is not None:
            assert_same(got, value, name)


# ---- quantizers ----


def layers_of(name: str, dtype: torch.dtype, seed: int) -> tuple[list[Quantizer], list[Tensor]]:
    """Weights of many shapes and layouts, with depths beyond both ends and next to a tie, and removed rows."""
    make = torch.Generator().manual_seed(seed)
    shapes = [(7, 9), (1, 1), (65, 4, 3), (16, 8, 3, 3), (0, 5), (5, 0), (130, 17), (8, 1, 3, 3), (33, 40)]
    weights = [torch.randn(shape, generator=make).to(dtype) for shape in shapes]
    weights[3] = weights[3].to(memory_format=torch.channels_last)
    weights[6] = weights[6].t().contiguous().t()
    quantizers = []
    for weight in weights:
        quantizer = make_quantizer(name, len(weight)).to(torch.float64 if dtype == torch.float64 else torch.float32)
        depth = quantizer.get_parameter("bit_depth")
        if weight.numel():
            quantizer.fit(weight.flatten(1))
        with torch.no_grad():
            depth.copy_(torch.rand(depth.shape, generator=make) * 10.5 - 1)
            depth[::5] = 0.0
            depth[1::7] = 2.5
            if name == "integer":
                quantizer.get_parameter("range").add_(torch.randn(depth.shape, generator=make))
        quantizers.append(quantizer)
    return quantizers, weights


def of_quantizers(quantizers: list[Quantizer], weights: list[Tensor], together: bool) -> list[Tensor | None]:
    """Values, then the gradients of weights and parameters."""
    leaves = [w.detach().clone().requires_grad_(w.requires_grad) for w in weights]
    if together:
        made = type(quantizers[0]).forward_many(quantizers, leaves)
    else:
        made = [q(w.flatten(1)).view(w.shape) for q, w in zip(quantizers, leaves, strict=True)]
    make = torch.Generator().manual_seed(9)
    up = [torch.randn(m.shape, generator=make).to(m.dtype) for m in made]
    learned = [p for q in quantizers for p in q.parameters()]
    for value in learned:
        value.grad = None
    pairs = [(m, u) for m, u in zip(made, up, strict=True) if m.requires_grad]
    torch.autograd.backward(*zip(*pairs, strict=True))
    return [m.detach() for m in made] + [t.grad for t in (*leaves, *learned)]


def assert_quantizers_alike(quantizers: list[Quantizer], weights: list[Tensor]) -> None:
    found, wanted = (of_quantizers(quantizers, weights, together) for together in (True, False))
    assert_alike(dict(enumerate(found)), dict(enumerate(wanted)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", sorted(QUANTIZERS))
def test_values_and_gradients_are_those_of_each_alone(name, dtype, level):
    for seed in range(3):
        quantizers, weights = layers_of(name, dtype, seed)
        assert_quantizers_alike(quantizers, [w.requires_grad_() for w in weights])


@pytest.mark.parametrize("name", sorted(QUANTIZERS))
def test_layers_of_several_dtypes_and_some_that_do_not_learn(name):
    quantizers, weights = [], []
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        more, of = layers_of(name, dtype, 4)
        quantizers, weights = quantizers + more, weights + of
    for i, (quantizer, weight) in enumerate(zip(quantizers, weights, strict=True)):
        weight.requires_grad_(i % 2 == 0)
        for j, p in enumerate(quantizer.parameters()):
            p.requires_grad_((i // 2 + j) % 3 == 0)
    assert_quantizers_alike(quantizers, weights)
    made = type(quantizers[0]).forward_many(quantizers, weights)
    learns = [
        w.requires_grad or any(p.requires_grad for p in q.parameters())
        for q, w in zip(quantizers, weights, strict=True)
    ]
    assert [m.requires_grad for m in made] == learns
    assert 0 < sum(learns) < len(learns)


def test_no_layers():
    assert [kind.forward_many([], []) for kind in QUANTIZERS.values()] == [[]] * len(QUANTIZERS)


def test_a_quantizer_with_a_forward_of_its_own_is_not_passed_over():
    class Doubling(Quantizer):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, rows):
            return 2 * fake_quantize(rows, *self.grid())

        def grid(self):
            return self.scale, -4 * self.scale, 3 * self.scale, 0 * self.scale

        def bit_cost(self):
            return self.scale

        def fit(self, rows, where=None):
            pass

    assert_quantizers_alike([Doubling(), Doubling()], [torch.randn(3, 5), torch.randn(3, 2, 2)])


# ---- models ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("quantizer", sorted(set(QUANTIZERS) - {"interpolated"}))  # which asks for two a layer
def test_a_model_answers_and_learns_as_before_in_one_call(quantizer, dtype, ran):
    torch.manual_seed(1)
    model = prepare(Network(), quantizer=quantizer).model.to(dtype)
    if quantizer == "integer":
        set_random_widths(model)
    ran.clear()
    wanted = gradients(model, TOKENS)
    names = set(quant_layers(model))
    assert len(names) == 10
    assert ran.count(ONE) == ran.count(f"{ONE}_backward") == 10
    ran.clear()
    handle = quantize_together(model)
    assert_alike(gradients(model, TOKENS), wanted)
    assert ran == [MANY, f"{MANY}_backward"] if quantizer == "integer" else set(ran) == {MANY, f"{MANY}_backward"}
    for mode in (torch.no_grad, torch.inference_mode):
        ran.clear()
        with mode():
            assert_same(model.eval()(TOKENS), wanted["output"])
        assert set(ran) == {MANY}
    ran.clear()
    handle.remove()
    assert_alike(gradients(model.train(), TOKENS), wanted)
    assert set(ran) == {ONE, f"{ONE}_backward"}


def test_operations_of_the_quantizer_are_fewer_than_a_third_at_twenty_layers():
    def operations(model: nn.Module) -> int:
        with Counting() as counting:
            model(torch.ones(2, 6)).sum().backward()
        return counting.calls.total()

    float_model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(20)))
    base = operations(float_model)
    model = prepare(float_model).model
    alone = operations(model) - base
    model.zero_grad()
    quantize_together(model)
    assert 0 < 3 * (operations(model) - base) < alone


def test_the_weights_are_taken_back_after_the_forward(ran):
    model = small()
    quantize_together(model)
    held = []
    hook = model[1].register_forward_hook(lambda layer, *_: held.append(weakref.ref(layer.handed.weights[layer][0])))
    with torch.no_grad():
        model(torch.ones(1, 6))
    hook.remove()
    gc.collect()
    assert held[0]() is None
    ran.clear()
    model[1](torch.ones(1, 6))
    assert ran == [ONE]


def test_a_forward_that_fails_leaves_nothing_behind(ran):
    model = small()
    quantize_together(model)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        model(torch.ones(1, 7))
    ran.clear()
    model[1](torch.ones(1, 6))
    assert ran == [ONE]


def test_after_an_interrupted_forward_old_weights_are_not_used(ran):
    """No hook is called for what is no Exception."""
    model = small()
    quantize_together(model)

    def stop(*_):
        raise KeyboardInterrupt

    hook = model[2].register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(torch.ones(1, 6))
    hook.remove()
    model.load_state_dict(small(seed=5).state_dict())
    x = torch.randn(2, 6)
    assert_same(model[1](x), small(seed=5)[1](x))
    assert_alike(gradients(model, x), gradients(small(seed=5), x))
    ran.clear()
    model[1](x)
    assert ran == [ONE]


def test_a_layer_used_twice_and_one_not_used(ran):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.b(self.a(self.b(x)))

    torch.manual_seed(0)
    model = prepare(Twice()).model
    set_random_widths(model)
    x = torch.randn(4, 6)
    wanted = gradients(model, x)
    quantize_together(model)
    ran.clear()
    found = gradients(model, x)
    assert ran == [MANY, f"{MANY}_backward"]
    assert_same(found["output"], wanted["output"])
    for name, value in wanted.items():
        if name.startswith("c."):
            assert value is None
            assert found[name] is None  # as before: an optimiser with weight decay would move it otherwise
        elif name.startswith("a."):
            assert_same(found[name], value, name)
        else:
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_a_layer_under_two_names(ran):
    torch.manual_seed(0)
    layer = nn.Linear(6, 6)
    model = prepare(nn.Sequential(layer, nn.ReLU(), layer)).model
    quantize_together(model)
    assert model[0] is model[2]
    model(torch.ones(1, 6))
    assert ran[-1] == MANY
    assert len(model[0].handed.weights) == 0


def test_a_frozen_layer_stays_out_of_the_graph():
    model = small()
    model[0].requires_grad_(False)
    model[1].weight.requires_grad_(False)
    seen = []
    for layer in model:
        layer.register_forward_hook(lambda _, __, y: seen.append(y.requires_grad))
    x = torch.randn(2, 6)
    wanted = gradients(model, x)
    quantize_together(model)
    assert_alike(gradients(model, x), wanted)
    assert seen == [False, True, True] * 2


def test_layers_added_swapped_and_refitted_later(ran):
    model = small()
    quantize_together(model)
    model.append(QuantLinear(6, 4))
    model[0] = QuantLinear(6, 6, quantizer="published")
    ran.clear()
    x = torch.randn(2, 6)
    found = gradients(model, x)
    assert ran.count(MANY) == 2  # one a kind of quantizer
    assert ONE not in ran
    plain = copy.deepcopy(model)
    quantize_together(plain).remove()
    assert_alike(found, gradients(plain, x))


def test_copies_and_pickles_quantize_together_and_can_be_undone(ran):
    model = small()
    handle = quantize_together(model)
    assert quantize_together(model) is handle
    x = torch.randn(2, 6)
    wanted = model(x).detach()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    inside = []
    hook = model[1].register_forward_hook(lambda *_: inside.append((copy.deepcopy(model[0]), copy.deepcopy(model))))
    model(x)
    hook.remove()
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    for other in (*copies, inside[0][1]):
        other[1]._forward_hooks.clear()
        ran.clear()
        assert_same(other(x).detach(), wanted)
        assert ran == [MANY]
        quantize_together(other).remove()
        ran.clear()
        assert_same(other(x).detach(), wanted)
        assert ran == [ONE] * 3
    ran.clear()
    model(x)
    assert ran == [MANY]  # undone in the copies alone
    assert_same(inside[0][0](x), model[0](x))


def test_a_replica_hands_out_its_own_weights(ran):
    """As nn.DataParallel makes them: copies that share the hooks."""
    model, other = small(), small(5)
    quantize_together(model)
    replica = model._replicate_for_data_parallel()
    replica._modules = dict(other._modules)
    x = torch.randn(2, 6)
    assert_same(model(x), small()(x))
    ran.clear()
    found = replica(x)
    assert ran == [MANY]
    assert_same(found, other(x))


def test_probes_see_the_weight_that_the_forward_used():
    model = small()
    quantize_together(model)
    for layer in model:
        layer.probing = True
    x = torch.randn(3, 6)
    loss = model(x).square().sum()
    found = torch.autograd.grad(loss, [layer.probe for layer in model])
    plain = copy.deepcopy(small())
    for layer in plain:
        layer.probing = True
    for f, w in zip(found, torch.autograd.grad(plain(x).square().sum(), [layer.probe for layer in plain]), strict=True):
        assert_same(f, w)


# ---- a layer on its own, where it must be ----


class Recursive(nn.Module):
    """Calls itself, once, with other weights in between."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.deep = nn.Linear(6, 6), nn.Linear(6, 6), True

    def forward(self, x):
        x = self.a(x)
        if self.deep:
            self.deep = False
            x = self(x)
            self.deep = True
        return self.b(x)


def test_a_forward_within_a_forward():
    torch.manual_seed(0)
    model = prepare(Recursive()).model
    x = torch.randn(3, 6)
    wanted = gradients(model, x)
    quantize_together(model)
    found = gradients(model, x)
    assert_same(found["output"], wanted["output"])
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_a_part_that_quantizes_together_within_one_that_does(ran):
    model = nn.Sequential(small(0), small(1))
    x = torch.randn(2, 6)
    wanted = gradients(model, x)
    quantize_together(model)
    quantize_together(model[1])
    ran.clear()
    assert_alike(gradients(model, x), wanted)
    assert set(ran) == {MANY, f"{MANY}_backward"}


class Inside(nn.Module):
    """Runs the first layer under a mode of its own, or after an action."""

    def __init__(self, around=contextlib.nullcontext, before=None) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.around, self.before = around, before

    def forward(self, x):
        if self.before is not None:
            self.before(self)
        with self.around():
            x = self.a(x)
        return self.b(x)


def inside(**how) -> nn.Module:
    torch.manual_seed(0)
    return prepare(Inside(**how)).model


@pytest.mark.parametrize(
    ("outer", "inner"),
    [(torch.no_grad, torch.enable_grad), (torch.inference_mode, lambda: torch.inference_mode(False))],
)
def test_gradients_asked_for_within_no_grad_are_not_lost(outer, inner):
    model = inside(around=inner)
    seen = []
    model.a.register_forward_hook(lambda _, __, y: seen.append(y))
    quantize_together(model)
    x = torch.randn(2, 6)
    with outer():
        model(x)
    found = torch.autograd.grad(seen[0].sum(), list(model.a.parameters()))
    plain = inside().a
    for f, w in zip(found, torch.autograd.grad(plain(x).sum(), list(plain.parameters())), strict=True):
        assert_same(f, w)


def test_no_grad_within_a_forward():
    model = inside(around=torch.no_grad)
    x = torch.randn(2, 6)
    wanted = gradients(model, x)
    quantize_together(model)
    found = gradients(model, x)
    assert_alike(found, wanted)
    assert found["a.weight"] is None


@pytest.mark.parametrize("kind", ["weight in place", "depth in place", "weight replaced", "quantizer replaced"])
def test_parameters_that_change_within_the_forward(kind):
    @torch.no_grad()
    def change(model):
        if kind == "weight in place":
            model.a.weight.mul_(2.0)
        elif kind == "depth in place":
            model.a.weight_quantizer.bit_depth.fill_(2.0)
        elif kind == "weight replaced":
            model.a.weight = nn.Parameter(2 * model.a.weight)
        else:
            model.a.weight_quantizer = make_quantizer("published", 6)

    x = torch.randn(2, 6)
    model, plain = inside(before=change), inside(before=change)
    quantize_together(model)
    assert_same(model(x), plain(x))
    loss = model(x).sum()
    if kind == "weight in place":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    else:
        loss.backward()


def test_another_thread_in_the_same_model():
    """Each backward must find a graph of its own."""
    model = small()
    quantize_together(model)
    both = threading.Barrier(2, timeout=60)
    model[0].register_forward_pre_hook(lambda *_: (both.wait(), None)[1])  # both have been handed their weights
    model[1].register_forward_pre_hook(lambda *_: (both.wait(), None)[1])
    inputs, found = [torch.randn(2, 6), torch.randn(2, 6)], {}

    def run(i: int) -> None:
        found[i] = torch.autograd.grad(model(inputs[i]).square().sum(), list(model.parameters()))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    plain = small()
    for i in range(2):
        wanted = torch.autograd.grad(plain(inputs[i]).square().sum(), list(plain.parameters()))
        for f, w in zip(found[i], wanted, strict=True):
            assert_same(f, w)


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.use_reentrant = use_reentrant

    def forward(self, x):
        def part(x):
            return self.c(self.b(x).relu())

        return checkpoint(part, self.a(x), use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpoints(use_reentrant):
    torch.manual_seed(0)
    model = prepare(Checkpointed(use_reentrant)).model
    set_random_widths(model)
    x = torch.randn(4, 6)
    wanted = gradients(model, x)
    quantize_together(model)
    assert_alike(gradients(model, x), wanted)
    assert_alike(gradients(model, x, lambda x: checkpoint(model, x, use_reentrant=False)), wanted)


def test_tensors_moved_away_between_forward_and_backward():
    model = small()
    x = torch.randn(2, 6)
    wanted = gradients(model, x)
    quantize_together(model)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
        assert_alike(gradients(model, x), wanted)


def test_hooks_and_strange_types_are_not_passed_over(ran):
    class Scaled(QuantLinear):
        def rows(self):
            return 2 * super().rows()

    class Own(nn.Parameter):
        pass

    model = small(layers=5)
    seen = []
    model[0].weight_quantizer.register_forward_hook(lambda *_: seen.append("hook"))
    model[1] = Scaled(6, 6)
    model[2].weight = Own(model[2].weight.detach())
    model[3].weight_quantizer = nn.Identity()
    x = torch.randn(2, 6)
    plain = copy.deepcopy(model)
    quantize_together(model)
    ran.clear()
    assert_same(model(x), plain(x))
    assert ran.count(MANY) == 1
    assert ran.count(ONE) == 3 + 4
    assert len(seen) == 2


def test_functional_calls_use_the_tensors_they_are_given():
    model, other = small(0), small(5)
    given = {name: 1.0 * p for name, p in other.named_parameters()}
    quantize_together(model)
    x = torch.randn(2, 6)
    y = functional_call(model, given, x)
    assert_same(y, other(x))
    up = torch.randn(y.shape)
    found = torch.autograd.grad(y, list(other.parameters()), up)
    for f, w in zip(found, torch.autograd.grad(other(x), list(other.parameters()), up), strict=True):
        assert_same(f, w)
    assert_same(model(x), small(0)(x))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile asks for it
@pytest.mark.parametrize("part", [False, True])
def test_compiled_whole_and_in_part(part):
    """Without a break of the graph; each layer is then compiled with its own quantizer."""
    model = small()
    quantize_together(model)
    x = torch.randn(2, 6)
    wanted = gradients(small(), x)
    assert_alike(gradients(model, x), wanted)
    torch._dynamo.reset()
    if part:
        model[1].compile(fullgraph=True, backend="aot_eager")
        assert_alike(gradients(model, x), wanted)
        with torch.no_grad():
            model[0].weight.mul_(0.5)
            model[1].weight.mul_(0.5)
            plain = small()
            plain[0].weight.mul_(0.5)
            plain[1].weight.mul_(0.5)
        assert_alike(gradients(model, x), gradients(plain, x))
    else:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_alike(gradients(model, x, compiled), wanted)
        assert_alike(gradients(model, x), wanted)
    torch._dynamo.reset()


# ---- the main job ----


def test_a_run_of_self_compression_is_the_same_bit_for_bit():
    float_model = network()
    train(float_model, blobs(), 60)
    keep = PreservationSet.select(float_model.eval(), blobs(), 40, seed=0)
    runs = []
    for together in (False, True):
        model = prepare(float_model).model
        if together:
            quantize_together(model)
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        run = SelfCompression(model, keep, optimizer=optimizer, steps=24, guard_every=6, bit_rate=0.5, target_size=0.15)
        train(model, blobs(), 24, run)
        outcome = run.finish()
        runs.append((model.eval(), outcome))
    (alone, first), (together, second) = runs
    assert first == second
    assert second.stored_ratio < 0.2
    for (name, value), other in zip(alone.state_dict().items(), together.state_dict().values(), strict=True):
        assert_same(other, value, name)
    x = blobs().tensors[0][:9]
    with torch.no_grad():
        assert torch.equal(pack(together)(x), pack(alone)(x))


def test_a_single_layer_is_a_model(ran):
    layer = QuantEmbedding(5, 3)
    quantize_together(layer)
    ran.clear()
    layer(torch.arange(5)).sum().backward()
    assert ran == [MANY, f"{MANY}_backward"]


def test_a_model_without_quantized_layers_is_refused():
    with pytest.raises(ValueError, match=r"has no quantized layer; pass what prepare\(model\)\.model returned"):
        quantize_together(nn.Linear(3, 3))


def test_the_graph_holds_one_node_for_all_layers():
    model = small()
    quantize_together(model)
    seen, left = Counter(), [model(torch.ones(1, 6)).grad_fn]
    known = set()
    while left:
        node = left.pop()
        if node is not None and node not in known:
            known.add(node)
            seen[node.name()] += 1
            left.extend(n for n, _ in node.next_functions)
    assert seen["_OnIntegerGridsBackward"] == 1
    assert seen["_OnIntegerGridBackward"] == 0
