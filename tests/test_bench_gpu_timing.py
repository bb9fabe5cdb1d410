"""What the GPU bench times and how: only right answers, in turns, from replays of a graph."""

from __future__ import annotations

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="triton is not installed: there is nothing to bench on a GPU")

from bench import gpu_chain, gpu_conv2d, gpu_device, gpu_linear, gpu_peers, gpu_training
from bench.peer_problem import MIXED, TRAINED
from sgsc.kernels import OPS, triton_packed
from sgsc.kernels.run_form import tiled_weight
from tests.gpu_runs import a_run


def by_reference(factor):
    def packed_linear(x, tiles, bias, width):
        return factor * OPS["packed_linear"].reference(x, *tiles[:3], bias, tiles.rows, width, False)

    return packed_linear


def measured(monkeypatch, factor, shape="16x128"):
    monkeypatch.setattr(gpu_linear, "packed_linear", by_reference(factor))
    gpu_linear.peers_of.cache_clear()
    run = a_run()
    rows = gpu_linear.measure_case(run, gpu_linear.LITTLE, (shape, 2, (4, MIXED)))
    gpu_linear.peers_of.cache_clear()
    return rows, run.wrong


def test_a_wrong_product_is_not_timed(monkeypatch):
    rows, wrong = measured(monkeypatch, 1.0)
    assert [row["bits"] for row in rows] == [4, MIXED]
    assert wrong == []
    rows, wrong = measured(monkeypatch, 1.1)
    assert rows == []
    assert [w.split(": error")[0] for w in wrong] == [f"linear 16x128, {b} bits, 2 tokens" for b in (4, MIXED)]
    rows, wrong = measured(monkeypatch, float("nan"))
    assert rows == []
    assert "NaN, expected 0" in wrong[0]


def a_chain(monkeypatch, product):
    monkeypatch.setattr(gpu_chain, "packed_linear", product)
    run = a_run()
    ((name, shapes),) = gpu_chain.LITTLE.items()
    return gpu_chain.measure_chain(run, name, shapes, 4), run.wrong


def test_a_wrong_chain_is_not_timed(monkeypatch):
    def wrong_when_off(*arguments):
        return by_reference(1.0 if triton_packed.EARLY else 1.1)(*arguments)

    rows, wrong = a_chain(monkeypatch, by_reference(1.0))
    assert len(rows) == 2
    assert wrong == []
    for product, variant in ((by_reference(1.1), "ours"), (wrong_when_off, "ours, PDL off")):
        rows, (what,) = a_chain(monkeypatch, product)
        assert rows == []
        assert what.startswith(f"a chain of layers, 4 bits, {variant}: error")
    assert triton_packed.EARLY > 0
    monkeypatch.setattr(gpu_device.Interpreted, "replayed", lambda self, call: 1.1 * call())
    rows, (what,) = a_chain(monkeypatch, by_reference(1.0))
    assert rows == []
    assert what.startswith("a chain of layers, 4 bits, ours, replayed: error")


def test_a_layer_of_a_chain_takes_the_one_before(monkeypatch):
    ((_, shapes),) = gpu_chain.LAYERS.items()
    widths = [k for _, k in shapes]
    seen = []

    def product(x, rows, bias, width):
        seen.append((x, width))
        return torch.full((1, rows), float(rows))

    last = gpu_chain.through(torch.zeros(1, widths[0]), [n for n, _ in shapes], widths, product)
    assert last.shape == (1, shapes[-1][0])
    assert [x.shape[1] for x, _ in seen] == [width for _, width in seen] == widths
    assert [float(x[0, -1]) for x, _ in seen] == [0, *(n for n, _ in shapes[:-1])]
    assert all(x.is_contiguous() for x, _ in seen)  # else each layer would copy it first


def test_a_wrong_convolution_is_not_timed(monkeypatch):
    def packed_conv2d(x, tiles, bias, *geometry):
        return factor * OPS["packed_conv2d"].reference(x, *tiles[:3], bias, tiles.rows, *geometry, False)

    monkeypatch.setattr(gpu_conv2d, "packed_conv2d", packed_conv2d)
    for factor, count in ((1.0, 1), (1.1, 0)):  # noqa: B007  packed_conv2d reads it
        run = a_run()
        assert len(gpu_conv2d.measure_layer(run, 16, 5, 1, 4)) == count
        assert len(run.wrong) == 1 - count


def test_a_wrong_quantizer_is_not_timed(monkeypatch):
    inputs = OPS["fake_quantize"].bench_cases()["64x576"]
    kept = OPS["fake_quantize"]

    class Scaled:
        reference, traffic = staticmethod(kept.reference), staticmethod(kept.traffic)

        def __init__(self, factor):
            self.factor = factor

        def __call__(self, *arguments):
            return self.factor * kept.reference(*arguments)

    for factor, count in ((1.0, 1), (1.1, 0)):
        monkeypatch.setitem(OPS, "fake_quantize", Scaled(factor))
        run = a_run()
        assert len(gpu_training.measure_pass(run, "64x576", "forward", inputs, {})) == count
        assert len(run.wrong) == 1 - count


def test_gradients_that_differ_are_noticed(monkeypatch):
    network, x, y = gpu_training.networks(quick=True)["ResNet-20"]
    model = gpu_training.prepare(network).model
    assert gpu_training.difference(model, x, y) < 1e-4

    @contextlib.contextmanager
    def other():
        with monkeypatch.context() as patch:
            patch.setattr(gpu_training, "loss_of", lambda *a, kept=gpu_training.loss_of: 1.1 * kept(*a))
            yield

    monkeypatch.setattr(gpu_training, "eager_formula", other)
    assert gpu_training.difference(model, x, y) > 0.05


def test_peers_that_fail_or_are_wrong_are_missing(monkeypatch):
    def broken(weight):
        raise RuntimeError("no\nkernel")

    def fails_when_called(weight):
        return lambda x: F.linear(x, weight[:, 1:])

    made = {
        **{gpu_peers.CUBLAS: (16, gpu_peers.cublas), "broken": (4, broken), "late": (4, fails_when_called)},
        **{
            "half": (16, lambda weight: gpu_peers.cublas(weight / 2)),
            "nan": (4, lambda w: gpu_peers.cublas(w * torch.nan)),
        },
    }
    monkeypatch.setattr(gpu_linear, "PEERS", made)
    rows, wrong = measured(monkeypatch, 1.0)
    assert wrong == []
    for row in rows:
        assert row["ratio"].keys() == made.keys()
        assert row["missing"].keys() == {"broken", "late", "half", "nan"}
        assert row["missing"]["broken"] == "RuntimeError: no kernel"
        assert row["missing"]["half"] == "the result is off by 0.5 of its size"


@pytest.mark.parametrize(("bits", "most"), [(4, 0.15), (8, 0.01)])
def test_levels_stand_for_the_weight(bits, most):
    weight = torch.randn(8, 256)
    levels, scale, low = gpu_peers.levels(weight, bits, 128)
    assert int(levels.max()) == 2**bits - 1
    back = (levels.unflatten(1, (2, 128)) * scale[..., None] + low[..., None]).flatten(1)
    assert float((back - weight).norm() / weight.norm()) < most


def test_copies_have_weights_of_their_own():
    weight = torch.randn(8, 128).to(torch.bfloat16)
    for make, held in ((gpu_peers.cublas, "weight"), (gpu_peers.torch_int8, "codes")):
        peer = make(weight)
        other = copy.deepcopy(peer)
        assert other.keywords[held].data_ptr() != peer.keywords[held].data_ptr()
        assert torch.equal(other(weight), peer(weight))
    device = gpu_device.Interpreted()
    layers = gpu_linear.copies_of(
        gpu_linear.random_tiles(torch.full((16,), 4, dtype=torch.uint8), 128, 1, device), device
    )
    assert len({layer.lines.data_ptr() for layer in layers}) == len(layers) == 2
    device.cache = 1 << 20
    assert gpu_device.Device.copies(device, 300_000) * 300_000 > 2 * device.cache
    assert gpu_device.Device.copies(device, 1) == gpu_device.MOST_COPIES


def test_random_words_are_layers_of_the_widths():
    widths = gpu_linear.widths_of(1000, MIXED)
    shares = torch.bincount(widths.long(), minlength=9)
    total = sum(TRAINED.values())
    assert all(abs(int(shares[b]) - 1000 * TRAINED.get(b, 0) / total) < 1.01 for b in range(9))
    device = gpu_device.Interpreted()
    for rows, width, area in ((1000, 128, 1), (48, 9 * 48, 9)):
        widths = gpu_linear.widths_of(rows, MIXED)
        weight, live = tiled_weight(*gpu_linear.random_tiles(widths, width, area, device), width, area, torch.float32)
        assert live.all()
        assert weight.shape == (rows, width)
        for b in (2, 3):
            distinct = [len(row.unique()) for row, own in zip(weight, widths, strict=True) if own == b]
            assert all(count > 1 for count in distinct)


def test_contenders_take_turns():
    order = []
    contenders = {name: [lambda name=name, i=i: order.append((name, i)) for i in (0, 1)] for name in ("ours", "a")}
    contenders["fails"] = [lambda: 1 / 0]
    run = a_run()
    run.device.least = 3
    times, missing = gpu_device.race(run, contenders)
    assert missing == {"fails": "ZeroDivisionError: division by zero"}
    assert {name: t.rounds for name, t in times.items()} == {"ours": 3, "a": 3}
    turns = [one for one in order if one[0] in ("ours", "a")][2:14]  # after a call of each for nothing
    assert turns == [("ours", 0), ("ours", 1), ("a", 0), ("a", 1)] * 3
    with pytest.raises(ZeroDivisionError):
        gpu_device.race(run, {"ours": contenders["fails"]})


class Clock:
    """CUDA's events and graphs, in which a call takes what it says, and a launch from Python ten times as long."""

    def __init__(self, monkeypatch):
        self.now, self.recorded, self.launched, self.mode = 0.0, None, 0, "default"
        clock = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = clock.now

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        class Graph:
            def replay(self):
                clock.now += sum(self.calls)

        @contextlib.contextmanager
        def capture(graph):
            clock.recorded = graph.calls = []
            yield
            clock.recorded = None

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", capture)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: setattr(clock, "mode", mode))

    def call(self, seconds, waits=False):
        def launch():
            if waits and self.mode == "error":
                raise RuntimeError("called a synchronizing CUDA operation")
            assert not (waits and self.recorded is not None), "waiting while a graph is captured"
            self.launched += 1
            if self.recorded is None:
                self.now += 10 * seconds
            else:
                self.recorded.append(seconds)

        return launch


def test_a_graph_is_timed_by_its_replays(monkeypatch):
    clock = Clock(monkeypatch)
    device = object.__new__(gpu_device.Gpu)
    for seconds, most in ((3e-6, 500), (1e-2, 8)):
        clock.launched = 0
        calls = [clock.call(seconds), clock.call(3 * seconds)]
        one, graph = device.rounds(calls)
        assert graph
        assert one() == pytest.approx(2 * seconds)
        launched = clock.launched
        assert launched <= most
        one()
        assert clock.launched == launched  # only replays
    one, graph = device.rounds([clock.call(1e-5, waits=True)])
    assert not graph
    assert one() == pytest.approx(1e-4)
    assert clock.mode == "default"


def test_a_graph_of_short_calls_is_long(monkeypatch):
    clock = Clock(monkeypatch)
    device = object.__new__(gpu_device.Gpu)
    one, _ = device.rounds([clock.call(1e-5)] * 3)
    before = clock.now
    one()
    assert clock.now - before >= gpu_device.REPLAY / 2


def test_kernels_are_counted(monkeypatch):
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [
        *(SimpleNamespace(name=n, device_type=cuda) for n in ("forward_kernel", "many_forward_kernel", "copy")),
        SimpleNamespace(name="forward_kernel", device_type=cpu),
        SimpleNamespace(name="span", device_type=cuda, is_user_annotation=True),
    ]

    @contextlib.contextmanager
    def profile(activities):
        yield SimpleNamespace(events=lambda: events)

    monkeypatch.setattr(torch.profiler, "profile", profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    device = object.__new__(gpu_device.Gpu)
    row = gpu_training.launches_of(SimpleNamespace(device=device), "t", "v", lambda: None)
    assert row["launches"] == 3
    assert row["of the quantizer's forward"] == 2
    assert row["of the quantizer's backward"] == 0
    events.clear()
    assert gpu_training.launches_of(SimpleNamespace(device=device), "t", "v", lambda: None)["launches"] is None
