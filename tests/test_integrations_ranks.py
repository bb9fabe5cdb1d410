"""The callbacks under DistributedDataParallel: two ranks end where one process does that sees both their batches."""

import copy
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from sgsc import PreservationSet, save_checkpoint
from tests.ranks import what_ranks_wrote
from tests.small import assert_same_model, blobs
from tests.test_integrations import fitted, hf_trainer
from tests.trainers import Tokens, bert_of, lightning_found, transformers_found

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
RANKS, STEPS = 2, 12
TOLERANCE = 1e-6  # a batch in two parts is summed in another order


def of_transformers(folder: Path, size: int, **how) -> dict:
    """What a Trainer ends with: float64 and nothing random, batches of `size` a rank."""
    hf = transformers_found()
    from sgsc.integrations.huggingface import Logits

    net = bert_of(hf, steps=0)  # training it would round otherwise with other threads
    keep = PreservationSet.select(Logits(net, pad=0), Tokens(named=False), 24, shares={"uncertain": 0.5, "hard": 0.5})
    how |= {"optim": "sgd", "learning_rate": 0.05, "train_sampling_strategy": "sequential"}
    callback, trainer = hf_trainer(hf, folder, net, keep, STEPS, per_device_train_batch_size=size, **how)
    trainer.model_accepts_loss_kwargs = False  # else it counts the samples of one rank, and multiplies by all
    for module in trainer.model.double().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    trainer.train()
    return ended(callback, trainer.model) | {"wrapped": type(trainer.model_wrapped).__name__}


def of_lightning(folder: Path, ranks: int) -> dict:
    """What its Trainer ends with: all samples a step, so that their order is none."""
    how = {"size": len(blobs()[0]) // ranks, "devices": ranks, "strategy": "ddp" if ranks > 1 else "auto"}
    callback, module = fitted(lightning_found(), folder, STEPS, **how)
    return ended(callback, module.net)


def ended(callback, model: nn.Module) -> dict:
    run = callback.run
    return {"model": copy.deepcopy(model.state_dict()), "history": run.history, "size": callback.outcome.stored_ratio}


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torchrun = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS, "GROUP_RANK": 0}
    torchrun |= {"TORCHELASTIC_RUN_ID": "tests", "OMP_NUM_THREADS": 1}
    torchrun |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}  # looked at, not used: the group is there
    os.environ.update({name: str(value) for name, value in torchrun.items()})
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), RANKS), rank=rank, world_size=RANKS)
    ddp = {"ddp_backend": "gloo", "ddp_find_unused_parameters": False}
    found = {"transformers": of_transformers(folder / "t", 4, **ddp), "lightning": of_lightning(folder / "l", RANKS)}
    save_checkpoint(folder / f"{rank}", found)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    transformers_found(), lightning_found()
    return what_ranks_wrote(work, RANKS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("library", ["transformers", "lightning"])
def test_two_ranks_equal_one_process_with_the_joined_batch(ranks, library, tmp_path):
    one = of_transformers(tmp_path, 8) if library == "transformers" else of_lightning(tmp_path, 1)
    first, second = (rank[library] for rank in ranks)
    assert_same_model(first["model"], second["model"], 0.0)
    assert_same_model(first["model"], one["model"], TOLERANCE)
    assert first["history"][-1]["step"] == STEPS
    for ours, theirs in zip(first["history"], one["history"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6), ours["step"]
    assert first["size"] == second["size"] == one["size"] < 1


def test_the_trainers_did_wrap_the_model(ranks):
    assert [rank["transformers"]["wrapped"] for rank in ranks] == ["DistributedDataParallel"] * RANKS
