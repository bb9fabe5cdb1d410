"""Packed layers on a GPU: what only a device can show. Their numerics are checked in triton_interpreted_packed.py."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sgsc.packed import set_numerics
from tests.checks import assert_close_to, assert_same
from tests.test_packed import LAYERS, conv2d, linear

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
pytest.importorskip("triton", reason="triton is not installed")

from sgsc.kernels import triton_packed  # noqa: E402

TOKENS = (1, 8, 16, 65, 300)  # each regime of the dispatch
# how far sums in another order, and weights or results rounded to the dtype, may be from float64
ALLOWED = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@pytest.fixture(autouse=True)
def nothing_between_two_launches(monkeypatch):
    """Poisoned memory is a kernel more before each of ours, which would then never start beside one of its kind."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)


@pytest.fixture(autouse=True)
def float32_as_it_is():
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def deep() -> nn.Module:
    """Large enough that several programs share the K of a tile."""
    return linear(bits=torch.arange(9, dtype=torch.uint8).repeat(60), width=4_096)


@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("numerics", ["exact", "int8"])
def test_a_layer_answers_as_on_the_cpu(kind, dtype, numerics):
    make, inputs = LAYERS[kind]
    layer, x = make(), inputs().to(dtype)
    want = layer(x.float()).double()
    moved = set_numerics(nn.Sequential(layer.cuda().to(dtype)), numerics)
    found = moved(x.cuda()).cpu()
    assert_close_to(found, want, ALLOWED[dtype] + (0.05 if numerics == "int8" else 0.0), kind, dtype)


@pytest.mark.parametrize("tokens", TOKENS)
def test_every_regime_answers_as_on_the_cpu(tokens):
    layer, x = deep(), torch.randn(tokens, 4_096)
    want = layer(x).double()
    assert_close_to(layer.cuda()(x.cuda()).cpu(), want, 1e-5)


@pytest.mark.parametrize("tokens", TOKENS)
def test_x_that_is_not_aligned(tokens):
    """What is compiled, and kept, for addresses that are multiples of 16 bytes is not run for others."""
    layer, x = deep(), torch.randn(tokens, 4_096).to(torch.bfloat16)
    want = layer(x.float()).double()
    layer, there = layer.cuda().to(torch.bfloat16), x.cuda()
    for offset in (0, 1, 0, 8, 3):  # elements
        odd = torch.zeros(x.numel() + offset, dtype=x.dtype, device="cuda")[offset:].view_as(x).copy_(there)
        assert odd.data_ptr() % 16 == 2 * offset % 16
        assert_close_to(layer(odd).cpu(), want, ALLOWED[x.dtype], f"from {offset}", x.dtype)


def test_there_and_back():
    layer, x = linear(), torch.randn(3, 40)
    want = layer(x)
    assert_same(layer.cuda().cpu()(x), want)


@pytest.mark.parametrize("tokens", TOKENS)
def test_the_same_bits_in_every_run(tokens):
    layer, x = deep().cuda(), torch.randn(tokens, 4_096, device="cuda")
    first = layer(x).cpu()
    for _ in range(20):
        assert_same(layer(x).cpu(), first)


@pytest.mark.parametrize("tokens", TOKENS)
def test_a_captured_graph_replays(tokens):
    layer, x = deep().cuda(), torch.randn(tokens, 4_096, device="cuda")
    want = layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    for _ in range(3):
        y.zero_()
        graph.replay()
        assert_same(y.cpu(), want.cpu())


def test_streams_do_not_disturb_each_other():
    layers = [deep().cuda() for _ in range(2)]
    x = torch.randn(4, 4_096, device="cuda")
    want = [layer(x).cpu() for layer in layers]
    streams = [torch.cuda.Stream() for _ in layers]
    torch.cuda.synchronize()
    found = [[] for _ in layers]
    for _ in range(50):
        for i, (layer, stream) in enumerate(zip(layers, streams, strict=True)):
            with torch.cuda.stream(stream):
                found[i].append(layer(x))
    torch.cuda.synchronize()
    for mine, right in zip(found, want, strict=True):
        for y in mine:
            assert_same(y.cpu(), right)


def test_graphs_do_not_disturb_each_other():
    """Captured on one stream, replayed side by side, and eager calls between."""
    layers = [deep().cuda() for _ in range(3)]
    x = torch.randn(1, 4_096, device="cuda")
    want = [layer(x).cpu() for layer in layers]
    graphs, found = [], []
    for layer in layers[:2]:
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            found.append([layer(x) for _ in range(4)])
    streams = [torch.cuda.Stream() for _ in graphs]
    torch.cuda.synchronize()
    for _ in range(50):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        y = layers[2](x)
    torch.cuda.synchronize()
    assert_same(y.cpu(), want[2])
    for mine, right in zip(found, want[:2], strict=True):
        for y in mine:
            assert_same(y.cpu(), right)


def test_forks_of_a_graph_do_not_disturb_each_other(monkeypatch):
    """Streams that fork within a capture run side by side in its replays; and nothing is launched to make zeros."""
    layers = [deep().cuda() for _ in range(3)]
    x = torch.randn(1, 4_096, device="cuda")
    want = [layer(x).cpu() for layer in layers]
    streams, found = [torch.cuda.Stream() for _ in layers], [[] for _ in layers]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", lambda *_, **__: pytest.fail("a launch more"))
        for stream, layer, mine in zip(streams, layers, found, strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                mine += [layer(x) for _ in range(8)]
        for stream in streams:
            torch.cuda.current_stream().wait_stream(stream)
    for _ in range(20):
        for y in (y for mine in found for y in mine):
            y.zero_()
        graph.replay()
        graph.replay()  # twice: each leaves zeros
        for mine, right in zip(found, want, strict=True):
            for y in mine:
                assert_same(y.cpu(), right)


@pytest.mark.parametrize("captured", [True, False])
def test_a_chain_has_the_same_bits_with_and_without_starting_early(captured, monkeypatch):
    """Each layer reads what the one before has just written, into memory that others have just read."""
    bits = torch.arange(9, dtype=torch.uint8).repeat(114)[:1_024]
    layers = [linear(bits=bits, width=1_024, with_bias=False).cuda() for _ in range(6)]
    x = torch.randn(1, 1_024, device="cuda", dtype=torch.bfloat16)

    def through():
        y = x
        for layer in layers:
            y = layer(y)
            y = y / y.abs().amax()
        for layer in layers:  # nothing between them
            y = layer(y)
        return y

    def found():
        if not captured:
            return [through().cpu() for _ in range(20)]
        through()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = through()
        every = []
        for _ in range(20):
            y.zero_()
            graph.replay()
            every.append(y.cpu())
        return every

    early = found()
    monkeypatch.setattr(triton_packed, "EARLY", 0)
    for some in (*early, *found()):
        assert_same(some, early[0])


def test_a_layer_laid_out_just_now():
    """The words and the plan are still being written as the product is launched."""
    layer, x = deep(), torch.randn(1, 4_096)
    want, there = layer(x).double(), x.cuda()
    for _ in range(10):
        assert_close_to(copy.deepcopy(layer).cuda()(there).cpu(), want, 1e-5)


def test_compiled_in_one_graph_and_exported():
    model = nn.Sequential(conv2d(), nn.ReLU(), nn.Flatten(), linear(width=27 * 20)).eval().cuda()
    x = torch.randn(2, 6, 4, 5, device="cuda")
    want = model(x)
    torch._dynamo.reset()
    assert_close_to(torch.compile(model, fullgraph=True)(x).cpu(), want.cpu().double(), 1e-6)
    reduced = torch.compile(model, mode="reduce-overhead")
    for _ in range(3):  # eager, recorded, replayed
        assert_close_to(reduced(x).cpu(), want.cpu().double(), 1e-6)
    assert_close_to(torch.export.export(model, (x,)).module()(x).cpu(), want.cpu().double(), 1e-6)
