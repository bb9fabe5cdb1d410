"""Several ranks give what one process gives, stop together, and say what they cannot do."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sgsc import SelfCompression, pack, prepare, save_checkpoint
from sgsc.distributed import Ranks, leave_out, quantizer_parameters
from tests.ranks import what_ranks_wrote
from tests.small import SETTINGS, STEPS, assert_same_model, batch, blobs, start, trained

RANKS = 2
# Sums of a batch in two parts round in another way, and Adam magnifies that where a gradient is next to nothing.
# A step of Adam moves a weight by 3e-3.
TOLERANCE = 1e-7


def train(run: SelfCompression, call: nn.Module, steps: int, rank: int = 0, ranks: int = 1, parts: int = 1) -> None:
    """A user's loop; each rank takes its part of the same batch, in `parts` parts."""
    for _ in range(steps):
        x, y = (t.chunk(ranks)[rank] for t in batch(run.steps))
        call.train()
        run.optimizers[0].zero_grad()
        for i, (a, b) in enumerate(zip(x.chunk(parts), y.chunk(parts), strict=True)):
            last = i == parts - 1 or not isinstance(call, DistributedDataParallel)
            with torch.enable_grad() if last else call.no_sync():
                (run.loss(F.cross_entropy(call(a), b)) / parts).backward()
        nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        run.optimizers[0].step()
        run.step()


def result(run: SelfCompression) -> dict:
    return {"model": copy.deepcopy(run.model.state_dict()), "history": run.history, "events": run.events}


def message(call) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def wrapped(run: SelfCompression) -> nn.Module:
    return DistributedDataParallel(run.model)


def work(rank: int, folder: Path) -> None:
    """All that two ranks do, in one start of the processes, since that takes longest."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), RANKS)
    late = start()
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    found: dict = {"late": message(lambda: train(late, late.model, 1, rank, RANKS))}

    run = start()
    train(run, wrapped(run), STEPS, rank, RANKS)
    found["whole"] = result(run) | {"size": run.finish().stored_ratio}

    run = start()
    call = wrapped(run)
    x, y = (t.chunk(RANKS)[rank] for t in batch(0))
    run.loss(F.cross_entropy(call(x), y)).backward()
    if rank == 0:
        run.control.bits.gradient[run.control.bits.depths["2"]][1] = float("nan")
    found["gradient"] = message(run.control.bits.check_finite)

    run = start()
    train(run, wrapped(run), 12, rank, RANKS, parts=2)
    found["parts"] = result(run)

    run = start()
    call = wrapped(run)
    for _ in range(12):  # as a trainer has it that runs its own backward
        x, y = (t.chunk(RANKS)[rank] for t in batch(run.steps))
        run.optimizers[0].zero_grad()
        run.extra_loss().backward()
        F.cross_entropy(call(x), y).backward()
        nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        run.optimizers[0].step()
        run.step()
    found["apart"] = result(run)

    run = start(norm=True, elsewhere=float(rank))  # whoever loads weights on the first rank only relies on this
    call = wrapped(run)
    train(run, call, 20, rank, RANKS)
    found["norm"] = result(run)

    run = start()
    call = wrapped(run)
    train(run, call, 2, rank, RANKS)
    x, y = batch(0)
    scale = float("nan") if rank == 1 else 1.0
    found["not finite"] = message(lambda: run.loss(scale * F.cross_entropy(call(x), y)))

    net, keep = trained()
    model = prepare(net).model.double()
    first = DistributedDataParallel(model)
    run = SelfCompression(model, keep, optimizer=torch.optim.SGD(model.parameters(), 1e-3), **SETTINGS)
    found["wrapped before"] = message(lambda: train(run, first, 1, rank, RANKS))
    found["wrapped given"] = message(lambda: SelfCompression(first, keep, **SETTINGS))
    found["other settings"] = message(lambda: start(seed=rank))
    found["cut"] = message(lambda: start(cut=True))

    alone = [dist.new_group([i]) for i in range(RANKS)][rank]
    run = start(seed=rank, process_group=alone)
    train(run, run.model, 12)
    found["alone"] = result(run)

    outer = nn.Sequential(prepare(net).model.double())
    leave_out(outer)
    reducer = DistributedDataParallel(outer)
    found["left out"] = sorted(reducer.parameters_to_ignore)
    save_checkpoint(folder / f"{rank}", found)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    return what_ranks_wrote(work, RANKS, tmp_path_factory.mktemp("ranks"))


def assert_same_history(a: dict, b: dict) -> None:
    assert len(a["history"]) == len(b["history"])
    for one, other in zip(a["history"], b["history"], strict=True):
        assert one == pytest.approx(other, rel=1e-6), one["step"]
    assert a["events"] == b["events"]


def test_two_ranks_equal_one_process_with_the_joined_batch(ranks):
    run = start()
    train(run, run.model, STEPS)
    one = result(run) | {"size": run.finish().stored_ratio}
    assert one["size"] <= 0.25 < one["history"][0]["size"]
    for found in ranks:
        assert_same_model(found["whole"]["model"], one["model"], TOLERANCE)
        assert_same_history(found["whole"], one)
        assert found["whole"]["size"] == one["size"]


@pytest.mark.parametrize("how", ["parts", "apart"])
def test_a_backward_in_parts_equals_one(ranks, how):
    run = start()
    train(run, run.model, 12)
    for found in ranks:
        assert_same_model(found[how]["model"], run.model.state_dict(), TOLERANCE)


def test_batch_norm_and_another_start_leave_the_ranks_equal(ranks):
    a, b = (found["norm"] for found in ranks)
    assert_same_model(a["model"], b["model"], 0.0)
    assert a["history"] == b["history"]
    assert a["history"][-1]["size"] < a["history"][0]["size"]


def test_a_gradient_that_is_not_finite_on_one_rank_stops_all_before_weights_move(ranks):
    for found in ranks:
        assert found["gradient"].startswith("layer '2': the gradient of its quantizer is not finite")


def test_a_loss_that_is_not_finite_on_one_rank_stops_all(ranks):
    for found in ranks:
        assert found["not finite"].startswith("task loss [nan] at step 2: want one finite number")


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("wrapped before", "it was made before SelfCompression; make SelfCompression first, or call sgsc.distributed"),
        ("wrapped given", "got DistributedDataParallel; pass the model itself, and wrap it after SelfCompression"),
        ("other settings", "ranks differ in settings or preservation set; use the same seed and data on all"),
        ("cut", "cut=True on several ranks: DistributedDataParallel knows parameters by the shapes they had"),
        ("late", "torch.distributed was initialised, with 2 ranks, after SelfCompression was made"),
    ],
)
def test_what_cannot_be_is_refused_on_all_ranks(ranks, case, text):
    for found in ranks:
        assert text in found[case]


def test_a_group_of_one_rank_is_a_run_of_its_own(ranks):
    for rank, found in enumerate(ranks):
        run = start(seed=rank)
        train(run, run.model, 12)
        assert_same_model(found["alone"]["model"], run.model.state_dict(), TOLERANCE)


def test_a_module_around_the_model_leaves_its_quantizers_out_too(ranks):
    kinds = ("weight_quantizer.bit_depth", "weight_quantizer.by_width", "weight_quantizer.range")
    assert ranks[0]["left out"] == [f"0.{layer}.{kind}" for layer in "024" for kind in kinds]


def test_packing_and_copies_do_not_mind(tmp_path):
    run = start()
    assert quantizer_parameters(run.model) == {p for n, p in run.model.named_parameters() if "weight_quantizer" in n}
    copied = copy.deepcopy(run.model)
    x = blobs()[0]
    assert torch.equal(copied(x), run.model(x))
    pack(run.model)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_shares_of_a_batch_average_to_its_mean(count, size):
    values = torch.rand(size, dtype=torch.double)
    total = 0.0
    for rank in range(count):
        ranks = Ranks()
        ranks.count, ranks.rank = count, rank
        part, weight = ranks.share(torch.arange(size))
        assert len(part) > 0
        total += weight * float(values[part].mean()) / count
    assert total == pytest.approx(float(values.mean()))
