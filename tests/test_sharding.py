"""Weights sharded by FSDP2: the same run as in one process, packed whole, resumed, and what is refused."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard

from sgsc import SelfCompression, pack, prepare, save_checkpoint
from sgsc.distributed import quantizer_parameters, whole
from sgsc.sharding import whole_tensor
from tests.ranks import what_ranks_wrote
from tests.small import SETTINGS, STEPS, assert_same_model, batch, blobs, trained

RANKS = 2
TOLERANCE = 1e-7  # as in test_distributed.py
PLAIN = SETTINGS | {"sparsity_weight": 0.0}


def start(shard: bool, norm: bool = False, **settings) -> SelfCompression:
    net, keep = trained(norm)
    model = prepare(net).model.double()
    if shard:
        left = quantizer_parameters(model)
        for layer in (model[0], model[4]):  # the one between falls to the root, which stays whole after a forward
            fully_shard(layer, ignored_params=left)
        fully_shard(model, ignored_params=left)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    return SelfCompression(model, keep, optimizer=optimizer, **PLAIN | settings)


def train(run: SelfCompression, steps: int, rank: int = 0, ranks: int = 1) -> None:
    for _ in range(steps):
        x, y = (t.chunk(ranks)[rank] for t in batch(run.steps))
        run.model.train()
        run.optimizers[0].zero_grad()
        run.loss(F.cross_entropy(run.model(x), y)).backward()
        nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        run.optimizers[0].step()
        run.step()


def harm(run: SelfCompression) -> None:
    """Take all bits of most of a hidden layer, so that the guard fires, and let it look."""
    with torch.no_grad():
        run.model[2].weight_quantizer.bit_depth[2:] = 0.0
    control = run.control
    before, control.settled, control.gives_way, run.best_size = (control.settled, control.gives_way), 0, 0, 1.0
    run._check()
    control.settled, control.gives_way = before


def result(run: SelfCompression) -> dict:
    model = {name: whole_tensor(v).clone() for name, v in run.model.state_dict().items()}
    return {"model": model, "history": copy.deepcopy(run.history), "events": copy.deepcopy(run.events)}


def message(call) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), RANKS), rank=rank, world_size=RANKS)
    found: dict = {}

    run = start(shard=True)
    train(run, STEPS, rank, RANKS)
    found["whole"] = result(run) | {"size": run.finish().stored_ratio}
    found["shards"] = [list(v.to_local().shape) for n, v in run.model.state_dict().items() if n.endswith("weight")]
    with whole(run.model) as plain:
        packed = pack(plain)
        found["kind"] = [type(m).__name__ for m in plain.modules()]
    found["answers"] = pack_answers(packed)
    found["after"] = message(lambda: run.model(blobs()[0]))  # it is sharded again, and runs

    run = start(shard=True, tolerance=0.0)
    train(run, 5, rank, RANKS)
    harm(run)
    found["harmed"] = result(run)
    held = run.optimizers[0].state[run.model[2].weight]["exp_avg"]
    found["moments"] = whole_tensor(held).clone()
    train(run, 5, rank, RANKS)
    found["recovered"] = result(run)

    run = start(shard=True)
    train(run, 15, rank, RANKS)
    found["state"] = run.state_dict()
    other = start(shard=True)
    other.load_state_dict(found["state"])
    found["loaded"] = result(other)
    other.optimizers[0].load_state_dict(run.optimizers[0].state_dict())
    train(other, 10, rank, RANKS)
    found["resumed"] = result(other) | {"size": other.finish().stored_ratio}

    other = start(shard=True)
    other.load_state_dict(found["state"])
    found["ended"] = {"size": other.finish().stored_ratio} | result(other)

    net, keep = trained()
    model = prepare(net).model.double()
    fully_shard(model)
    with torch.no_grad():
        model(blobs()[0])  # its weights lie whole afterwards
    found["all sharded"] = message(lambda: SelfCompression(model, keep, **PLAIN))
    found["sparsity"] = message(lambda: start(shard=True, sparsity_weight=0.1))
    save_checkpoint(folder / f"{rank}", found)
    dist.destroy_process_group()


def pack_answers(packed: nn.Module) -> torch.Tensor:
    return packed.float()(blobs()[0].float())


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    return what_ranks_wrote(work, RANKS, tmp_path_factory.mktemp("shards"))


def test_sharded_weights_give_what_one_process_gives(ranks):
    run = start(shard=False)
    train(run, STEPS)
    one = result(run) | {"size": run.finish().stored_ratio}
    assert one["size"] <= 0.25 < one["history"][0]["size"]
    for found in ranks:
        assert_same_model(found["whole"]["model"], one["model"], TOLERANCE)
        assert found["whole"]["size"] == one["size"]
        assert found["whole"]["events"] == one["events"]
        for a, b in zip(found["whole"]["history"], one["history"], strict=True):
            assert a == pytest.approx(b, rel=1e-6)
        assert torch.equal(found["answers"], ranks[0]["answers"])
        assert torch.allclose(found["answers"], pack_answers(pack(run.model)), atol=1e-5)
        layer = ["QuantLinear", "SelfCompressing"]
        assert found["kind"] == ["Sequential", *layer, "ReLU", *layer, "ReLU", *layer]
        assert found["after"] == "nothing was raised"
        assert found["shards"] == [[16, 12], [12, 32], [2, 24]]  # that it was sharded at all


def test_the_guard_gives_bits_back_to_sharded_rows(ranks):
    run = start(shard=False, tolerance=0.0)
    train(run, 5)
    harm(run)
    assert run.events[-1]["what"] == "guard"
    for found in ranks:
        assert_same_model(found["harmed"]["model"], run.model.state_dict(), TOLERANCE)
        assert found["harmed"]["events"] == run.events
        moments = run.optimizers[0].state[run.model[2].weight]["exp_avg"]
        assert (moments == 0).all(1).any()
        assert torch.allclose(found["moments"], moments, atol=TOLERANCE)
    train(run, 5)
    for found in ranks:
        assert_same_model(found["recovered"]["model"], run.model.state_dict(), TOLERANCE)


def test_a_sharded_run_resumes(ranks):
    run = start(shard=False)
    train(run, 15)
    for found in ranks:
        assert_same_model(found["state"]["model"], run.model.state_dict(), TOLERANCE)
        assert_same_model(found["loaded"]["model"], found["state"]["model"], 0.0)
    one = start(shard=False)
    one.load_state_dict(ranks[0]["state"])
    assert_same_model(one.model.state_dict(), ranks[0]["state"]["model"], 0.0)
    size = one.finish().stored_ratio
    train(run, 10)
    for found in ranks:
        assert found["ended"]["size"] == size
        assert_same_model(found["ended"]["model"], one.model.state_dict(), 0.0)
        assert_same_model(found["resumed"]["model"], run.model.state_dict(), TOLERANCE)


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("all sharded", "with ignored_params=sgsc.distributed.quantizer_parameters(model)"),
        ("sparsity", "sparsity_weight=0.1 with sharded weights"),
    ],
)
def test_what_sharding_cannot_have_is_refused(ranks, case, text):
    for found in ranks:
        assert text in found[case]


def test_a_model_that_is_not_sharded_is_whole():
    run = start(shard=False)
    before = dict(run.model.named_parameters())
    with whole(run.model) as model:
        assert model is run.model
        assert dict(model.named_parameters()) == before
