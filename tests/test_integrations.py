"""Callbacks of other people's trainers: the same run as in a loop of one's own, resumed too."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sgsc import PreservationSet, SelfCompression, pack, prepare, stored_size
from sgsc.certificate import compare, outputs
from tests.small import SETTINGS, assert_same_model, blobs, trained
from tests.trainers import Tokens, lit

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(("module", "library"), [("huggingface", "transformers"), ("lightning", "lightning")])
def test_without_the_library_the_import_says_what_is_missing(module, library):
    code = f"import sys; sys.modules[{library!r}] = None; import sgsc.integrations.{module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert f"sgsc.integrations.{module} needs {library}" in done.stderr


# ---- transformers ----

STEPS = 24


@pytest.fixture(scope="module")
def bert_keep(bert):
    from sgsc.integrations.huggingface import Logits

    shares = {"uncertain": 0.5, "hard": 0.5}
    return PreservationSet.select(Logits(bert, pad=0), Tokens(named=False), 24, shares=shares)


HF = {"target_size": 0.4, "tolerance": 0.05, "bit_rate": 0.7, "guard_every": 6, "preservation_batch": 8}


def hf_trainer(hf, folder, bert, keep, steps: int = STEPS, callback: dict | None = None, **arguments):
    from sgsc.integrations.huggingface import SGSCCallback

    arguments = {
        **{"max_steps": steps, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "seed": 0, "use_cpu": True},
        **{"report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no"},
        **{"dataloader_pin_memory": False, "lr_scheduler_type": "constant"},
    } | arguments
    made = SGSCCallback(keep, pad=0, **HF | (callback or {}))
    return made, hf.Trainer(
        model=prepare(bert).model,
        args=hf.TrainingArguments(output_dir=str(folder), **arguments),
        train_dataset=Tokens(named=True),
        callbacks=[made],
    )


def test_transformers_trainer_compresses_and_keeps_the_answers(hf, bert, bert_keep, tmp_path):
    callback, trainer = hf_trainer(hf, tmp_path, bert, bert_keep)
    trainer.train()
    assert callback.run.steps == STEPS
    assert callback.outcome.target_held, callback.outcome
    assert callback.outcome.tolerance_held, callback.outcome
    from sgsc.integrations.huggingface import Logits

    packed = pack(trainer.model)
    assert stored_size(packed) <= 0.4 * callback.run.float_bytes
    found = compare(bert_keep.outputs, outputs(Logits(packed, pad=0), bert_keep.inputs), bert_keep.targets)
    assert found.regressions == callback.outcome.regressions


def without_dropout(module: nn.Module) -> None:
    if isinstance(module, nn.Dropout):
        module.p = 0.0


@pytest.mark.parametrize("parts", [1, 2])
def test_transformers_trainer_gives_what_an_own_loop_gives(hf, bert, bert_keep, tmp_path, parts):
    from sgsc.integrations.huggingface import Logits

    seen: list = []

    class Remember(hf.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **rest):
            seen.append({n: p.detach().clone() for n, p in model.named_parameters()})

    callback, trainer = hf_trainer(
        *(hf, tmp_path, bert, bert_keep, 4),
        **{"per_device_train_batch_size": 8 // parts, "gradient_accumulation_steps": parts, "max_grad_norm": 0.1},
        **{"optim": "sgd", "learning_rate": 0.05},
        callback={"preservation_weight": 3.0},
    )
    # float64, and nothing random: what the parts of a batch add up to rounds in another way
    trainer.model.double().apply(without_dropout)
    trainer.model_accepts_loss_kwargs = False  # else it adds up the means of the parts of a batch
    batches: list = []
    trainer.data_collator = lambda rows, inner=trainer.data_collator: batches.append(inner(rows)) or batches[-1]
    trainer.add_callback(Remember())
    trainer.train()

    model = prepare(bert).model.double().apply(without_dropout).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    run = SelfCompression(
        Logits(model, pad=0), bert_keep, optimizer=optimizer, steps=4, **HF | {"preservation_weight": 3.0}
    )
    for step in range(4):
        rows = batches[parts * step : parts * (step + 1)]
        ids, labels = (torch.cat([r[k] for r in rows]) for k in ("input_ids", "labels"))
        optimizer.zero_grad()
        run.loss(model(ids, labels=labels).loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        run.step()
        now = {n: p.detach() for n, p in model.named_parameters()}
        assert_same_model(seen[step], now, 1e-6)
    assert callback.run.history[0]["size"] == run.history[0]["size"]


def test_transformers_trainer_resumes_as_if_it_had_not_stopped(hf, bert, bert_keep, tmp_path):
    whole, trainer = hf_trainer(hf, tmp_path / "a", bert, bert_keep, save_strategy="steps", save_steps=10)
    trainer.train()
    assert (tmp_path / "a" / "checkpoint-10" / "sgsc.safetensors").is_file()
    second, again = hf_trainer(
        *(hf, tmp_path / "b", bert, bert_keep), callback={"checkpoint": tmp_path / "a" / "checkpoint-10"}
    )
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-10"))
    assert second.outcome == whole.outcome
    assert second.run.history == whole.run.history
    assert_same_model(again.model.state_dict(), trainer.model.state_dict(), 0.0)
    _, third = hf_trainer(hf, tmp_path / "c", bert, bert_keep)
    with pytest.raises(
        ValueError, match=r"resumes from step 10, but there is no .*; name the folder with SGSCCallback"
    ):
        third.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-10"))


def test_transformers_trainer_in_bfloat16(hf, bert, bert_keep, tmp_path):
    callback, trainer = hf_trainer(hf, tmp_path, bert, bert_keep, bf16=True)
    trainer.train()
    assert callback.outcome.target_held, callback.outcome
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"cut": True}, "cut=True in a Trainer: its checkpoints hold the whole model"),
        ({"steps": 5}, "steps=5 in a Trainer: its own arguments say how many steps there are"),
    ],
)
def test_settings_that_a_trainer_has_itself_are_refused(hf, settings, text):
    from sgsc.integrations.huggingface import SGSCCallback

    with pytest.raises(ValueError, match=text):
        SGSCCallback(None, **settings)


def test_transformers_trainer_stops_before_weights_that_are_not_finite(hf, bert, bert_keep, tmp_path):
    callback, trainer = hf_trainer(hf, tmp_path, bert, bert_keep)
    with torch.no_grad():
        trainer.model.bert.pooler.dense.bias.fill_(float("nan"))
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    with pytest.raises(ValueError, match=r"not finite.*lower the learning rate, or load the last checkpoint"):
        trainer.train()
    assert callback.run.steps == 0
    after = dict(trainer.model.named_parameters())
    assert all(torch.equal(v, after[n]) or v.isnan().any() for n, v in before.items())


def test_the_best_model_of_another_kind_is_refused(hf, bert, tmp_path):
    _, trainer = hf_trainer(*(hf, tmp_path, bert, None), load_best_model_at_end=True, metric_for_best_model="loss")
    with pytest.raises(ValueError, match="load_best_model_at_end puts back weights of an earlier size; leave it off"):
        trainer.train()


# ---- Lightning ----


def fitted(
    lightning,
    folder,
    steps: int = 60,
    manual=False,
    named=False,
    size: int = 32,
    ckpt=None,
    callbacks=(),
    skips=-1,
    **more,
):
    from sgsc.integrations.lightning import SGSCCallback

    net, keep = trained()
    module = lit(lightning, prepare(net).model.double().train(), manual, named, skips)
    settings = {k: v for k, v in SETTINGS.items() if k != "steps"}
    callback = SGSCCallback(keep, model="net", **settings)
    trainer = lightning.Trainer(
        **{"max_steps": steps, "accelerator": "cpu", "logger": False, "enable_progress_bar": False},
        **{"enable_model_summary": False, "default_root_dir": str(folder), "callbacks": [callback, *callbacks]},
        **{"enable_checkpointing": bool(callbacks), "max_epochs": -1, "gradient_clip_val": 0.5} | more,
    )
    data = DataLoader(TensorDataset(*blobs()), batch_size=size)
    trainer.fit(module, data, ckpt_path=ckpt)
    return callback, module


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.parametrize(("parts", "named"), [(1, False), (2, True)])
def test_lightning_gives_what_an_own_loop_gives(lightning, tmp_path, parts, named):
    # one batch an epoch, so that its parts do not straddle two; 240 samples
    callback, module = fitted(lightning, tmp_path, 20, named=named, size=240 // parts, accumulate_grad_batches=parts)
    net, keep = trained()
    model = prepare(net).model.double()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    run = SelfCompression(model, keep, optimizer=optimizer, **SETTINGS | {"steps": 20})
    x, y = blobs()
    for _ in range(20):
        optimizer.zero_grad()
        run.loss(F.cross_entropy(model.train()(x), y)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        run.step()
    assert callback.outcome.stored_ratio == run.finish().stored_ratio
    assert callback.run.steps == 20
    assert_same_model(module.net.state_dict(), model.state_dict(), 1e-7)
    assert "training_step" not in vars(module)


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")  # the second run saves nothing
def test_lightning_reaches_the_target_and_resumes_as_if_it_had_not_stopped(lightning, tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    keep = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=24, save_top_k=-1)  # an epoch's end
    whole, module = fitted(lightning, tmp_path, callbacks=[keep])
    assert whole.outcome.target_held, whole.outcome
    assert stored_size(pack(module.net)) <= 0.25 * whole.run.float_bytes
    second, again = fitted(lightning, tmp_path / "b", ckpt=str(tmp_path / "step=24.ckpt"))
    assert second.outcome == whole.outcome
    assert second.run.history == whole.run.history
    assert_same_model(again.net.state_dict(), module.net.state_dict(), 0.0)


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*training_step.* returned `None`:UserWarning")
def test_lightning_may_skip_a_batch(lightning, tmp_path):
    callback, _ = fitted(lightning, tmp_path, 16, skips=3)  # of 8 batches an epoch
    assert callback.run.steps == 14
    assert callback.outcome.stored_ratio < 1


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
def test_lightning_refuses_what_it_cannot_serve(lightning, tmp_path):
    with pytest.raises(ValueError, match="serves automatic optimisation with one optimizer, got 1; with manual"):
        fitted(lightning, tmp_path, 2, manual=True, gradient_clip_val=None)
    with pytest.raises(ValueError, match="needs to know how many steps there are; give the Trainer max_steps"):
        fitted(lightning, tmp_path, -1)
