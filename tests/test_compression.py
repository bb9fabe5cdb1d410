"""Self-compression: the sum that it states, what users do around it, and runs that resume."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from sgsc import (
    SelfCompression,
    load_checkpoint,
    pack,
    prepare,
    save_checkpoint,
    stored_size,
)
from sgsc.certificate import compare, outputs
from sgsc.coupling import couple
from sgsc.guard import check
from sgsc.layers import quant_layers
from sgsc.size import file_bits
from tests.blobs import blobs, started, train


def test_the_loss_is_the_stated_sum_and_nothing_else(trained, keep):
    run = started(trained, keep, sparsity_weight=0.3, preservation_weight=0.7, preservation_batch=60)
    run.control.price = 2.5
    run.generator.manual_seed(5)
    task = torch.tensor(1.25)
    batch = keep.batch(torch.Generator().manual_seed(5), 60)
    run.model.eval()
    magnitude = torch.cat([layer.weight.flatten() for layer in quant_layers(run.model).values()]).abs().mean()
    want = (
        task
        + 2.5 * file_bits(run.model, couple(run.model)) / (8 * run.float_bytes)
        + 0.3 * magnitude
        + 0.7 * keep.loss(run.model, batch, kind="answers")
    )
    assert run.loss(task).item() == pytest.approx(want.item(), rel=1e-6)


def test_reaches_the_target_on_disk_and_holds_the_tolerance(trained, keep):
    run = started(trained, keep)
    train(run.model, blobs(), 240, run)
    outcome = run.finish()
    assert outcome.target_held, outcome
    assert outcome.tolerance_held, outcome
    assert outcome.reason == ""
    packed = pack(run.model)
    assert stored_size(packed) / run.float_bytes == pytest.approx(outcome.stored_ratio, abs=1e-9)
    assert 0.8 * 0.15 < outcome.stored_ratio <= 0.15
    found = compare(keep.outputs, outputs(packed, keep.inputs), keep.targets)
    assert found.regressions == outcome.regressions <= math.floor(0.05 * 60)


def test_what_is_cut_out_is_not_what_the_guard_wants_back(trained, keep):
    ends = {}
    for cut in (False, True):
        run = started(trained, keep, cut=cut, target_size=0.025, tolerance=0.0)
        train(run.model, blobs(), 240, run)
        outcome = run.finish()
        assert outcome.tolerance_held, outcome
        assert any(event["what"] == "guard" for event in run.events)  # it had to act
        ends[cut] = outcome.stored_ratio
    assert 0.025 < ends[True] < 1.1 * ends[False] < 0.1, ends


def test_channels_leave_while_it_trains_and_the_best_model_comes_back_whole(trained, keep):
    run = started(trained, keep, cut=True, target_size=0.1)
    widest = run.model[3].weight.shape
    train(run.model, blobs(), 240, run)
    small = run.model[3].weight.shape
    assert small[0] < widest[0]
    assert small[1] < widest[1]
    assert run.optimizers[0].state[run.model[3].weight]["exp_avg"].shape == small
    run.best = dict(prepare(trained).model.state_dict())  # as if nothing smaller had held
    outcome = run.finish()
    assert run.model[3].weight.shape == widest
    assert not outcome.target_held
    assert "raise the target size" in outcome.reason


def test_the_users_optimiser_never_sees_the_widths(trained, keep):
    run = started(trained, keep)
    train(run.model, blobs(), 3, run)
    depth = run.model[0].weight_quantizer.bit_depth
    assert depth.grad is None
    assert depth not in run.optimizers[0].state


def test_same_seed_same_bits(trained, keep):
    runs = [started(trained, keep) for _ in range(2)]
    for run in runs:
        train(run.model, blobs(), 60, run)
    assert all(torch.equal(a, b) for a, b in zip(*(r.model.state_dict().values() for r in runs), strict=True))
    other = started(trained, keep, seed=1)
    train(other.model, blobs(), 60, other)
    assert not torch.equal(other.model[0].weight, runs[0].model[0].weight)


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("at", [1, 37, 100, 150, 239])
def test_a_resumed_run_equals_an_uninterrupted_one(trained, keep, tmp_path, at, cut):
    def started(*of):
        return globals()["started"](*of, cut=cut, target_size=0.1)

    whole = started(trained, keep)
    train(whole.model, blobs(), 240, whole)
    first = started(trained, keep)
    train(first.model, blobs(), at, first)
    save_checkpoint(tmp_path / "c", {"run": first.state_dict(), "optimizer": first.optimizers[0].state_dict()})
    second = started(trained, keep)
    state = load_checkpoint(tmp_path / "c")
    second.load_state_dict(state["run"])
    second.optimizers[0].load_state_dict(state["optimizer"])
    train(second.model, blobs(), 240 - at, second, start=at)
    assert second.finish() == whole.finish()
    assert second.history == whole.history
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


def regressions_of(trained, run_keep, keep) -> tuple[int, list]:
    """On `keep`, after a compression whose task no longer shows the last class."""
    run = started(trained, run_keep)
    run.optimizers[0].param_groups[0]["lr"] = 1e-2
    x, y = blobs().tensors
    train(run.model, TensorDataset(x[y != 3], y[y != 3]), 240, run)
    run.finish()
    return compare(keep.outputs, outputs(run.model, keep.inputs), keep.targets).regressions, run.history


def test_the_preservation_set_matters(trained, keep):
    with_set, history = regressions_of(trained, keep, keep)
    without, _ = regressions_of(trained, None, keep)
    assert with_set <= 3
    assert without >= 10  # of the 15 samples of the class that the task forgot
    # labels and outputs of other samples: what is preserved then is nonsense, and the guard sees it
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    shuffled = replace(keep, targets=keep.targets[order], outputs=keep.outputs[order])
    _, other = regressions_of(trained, shuffled, keep)
    assert max(h["regressions"] for h in other) > max(h["regressions"] for h in history) + 10


def test_an_impossible_target_says_what_would_have_to_give(trained, keep):
    run = started(trained, keep, target_size=0.024, steps=40, tolerance=0.0)
    train(run.model, blobs(), 40, run)
    outcome = run.finish()
    assert not outcome.target_held
    assert "not 2.40%: raise the target size, the tolerance or the steps" in outcome.reason
    with pytest.raises(ValueError, match=r"target_size=0.004: with no bit left .* still has 2.24% .*raise the target"):
        started(trained, keep, target_size=0.004)


def test_a_run_without_a_set_says_nothing_of_tolerances_and_one_that_ends_early_says_so(trained):
    run = started(trained, None, target_size=0.05, steps=100)
    train(run.model, blobs(), 20, run)
    outcome = run.finish()
    assert (outcome.tolerance_held, outcome.target_held) == (None, False)
    assert outcome.reason.startswith("the run ended after 20 of 100 steps; the model has ")
    assert outcome.reason.endswith("not 5.00%: raise the target size")
    with pytest.raises(ValueError, match=r"step\(\) after finish\(\): the run has ended"):
        train(run.model, blobs(), 1, run)


def test_layers_that_no_gradient_reaches_keep_their_bits_and_are_named(trained, keep):
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = copy.deepcopy(trained[:5]), copy.deepcopy(trained[5])

        def forward(self, x):
            with torch.no_grad():
                x = self.body(x)
            return self.head(x)

    run = started(Frozen(), None, target_size=0.1, steps=60)
    train(run.model, blobs(), 60, run)
    assert (run.model.body[3].weight_quantizer.bits() == 8).all()
    assert run.model.head.weight_quantizer.bits().float().mean() < 3
    outcome = run.finish()
    assert not outcome.target_held
    assert outcome.reason.endswith(
        "no gradient reached 2 layers (body.0, body.3), which keep their bits: leave no_grad off"
    )


def test_a_batch_that_is_given_up_counts_for_nothing(trained, keep):
    first, second = started(trained, keep), started(trained, keep)
    x, y = blobs().tensors
    for run in (first, second):
        train(run.model, blobs(), 3, run)
    second.loss(1e3 * F.cross_entropy(second.model(x), (y + 1) % 4)).backward()
    second.discard()
    with pytest.raises(ValueError, match="without a loss"):
        second.step()
    second.loss(1e3 * F.cross_entropy(second.model(x), (y + 1) % 4)).backward()
    with pytest.raises(ValueError, match=r"task loss \[nan\] at step 3"):
        second.loss(torch.tensor(float("nan")))
    second.generator.set_state(first.generator.get_state())
    second.model.load_state_dict(first.model.state_dict())  # batch norms have seen what was given up
    for run in (first, second):
        train(run.model, blobs(), 1, run, start=3)
    assert torch.equal(first.control.bits.worth, second.control.bits.worth)


@pytest.mark.parametrize("cut", [False, True])
def test_a_model_may_have_several_optimisers(trained, keep, cut):
    model = prepare(trained).model
    parts = [model[:3].parameters(), model[3:].parameters()]
    both = [torch.optim.Adam(part, 3e-3) for part in parts]
    run = SelfCompression(model, keep, optimizer=both, target_size=0.08, steps=120, cut=cut)
    x, y = blobs().tensors
    for _ in range(120):
        loss = run.loss(F.cross_entropy(model.train()(x), y))
        for optimizer in both:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in both:
            optimizer.step()
        run.step()
    for optimizer in both:
        for parameter, held in optimizer.state.items():
            assert held["exp_avg"].shape == parameter.shape
    assert cut == (len(model[0].weight) < 96)
    assert run.finish().target_held


def test_an_optimiser_whose_state_cannot_be_cut_is_refused_at_the_first_check(trained, keep):
    model = prepare(trained).model
    optimizer = torch.optim.Adafactor(model.parameters(), 1e-3)
    run = SelfCompression(model, keep, optimizer=optimizer, target_size=0.1, steps=100, cut=True, guard_every=10)
    with pytest.raises(ValueError, match=r"Adafactor keeps 'row_var' .* leave `cut` off"):
        train(model, blobs(), 100, run)
    assert run.steps == 10
    assert len(model[0].weight) == 96


def test_a_set_takes_the_precision_of_the_model_s_inputs(trained, keep):
    model = prepare(trained).model.to(torch.bfloat16)
    assert keep.inputs.dtype == torch.float32
    keep = keep.to(torch.bfloat16)
    assert check(model, keep, 0.0).regressions <= 2
    keep.loss(model).backward()
    assert model[0].weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_and_loses_nothing(trained, keep, bad):
    run = started(trained, keep)
    before = copy.deepcopy(run.model.state_dict())
    with pytest.raises(
        ValueError, match=r"task loss \[.*\] at step 0: want one finite number; lower the learning rate"
    ):
        run.loss(torch.tensor(bad))
    assert all(torch.equal(v, before[k]) for k, v in run.model.state_dict().items())


def test_a_gradient_that_is_not_finite_names_the_layer_and_moves_nothing(trained, keep):
    run = started(trained, keep)
    train(run.model, blobs(), 5, run)
    before = {n: d.detach().clone() for n, d in run.control.bits.depths.items()}
    run.loss(F.cross_entropy(run.model(blobs().tensors[0]), blobs().tensors[1])).backward()
    run.control.bits.gradient[run.control.bits.depths["3"]][2] = float("nan")
    with pytest.raises(ValueError, match=r"layer '3': the gradient of its quantizer is not finite"):
        run.step()
    assert all(torch.equal(d, before[n]) for n, d in run.control.bits.depths.items())


def test_a_checkpoint_of_other_settings_is_refused(trained, keep):
    with pytest.raises(ValueError, match="the checkpoint is of a run with settings"):
        started(trained, keep, steps=50).load_state_dict(started(trained, keep).state_dict())


def test_a_frozen_quantizer_is_refused_by_name(trained, keep):
    model = prepare(trained).model
    model[3].requires_grad_(False)
    with pytest.raises(ValueError, match="layer '3': its quantizer is frozen"):
        SelfCompression(model, keep)


def test_a_step_without_a_loss_is_an_error(trained, keep):
    with pytest.raises(ValueError, match=r"call run.loss\(task_loss\).backward\(\) before run.step"):
        started(trained, keep).step()


def test_a_float_model_is_refused(trained, keep):
    with pytest.raises(ValueError, match=r"pass what prepare\(model\).model returned"):
        SelfCompression(copy.deepcopy(trained), keep)


def test_gradient_accumulation_counts_as_one_step(trained, keep):
    once, twice = started(trained, None), started(trained, None)
    x, y = blobs().tensors
    for run, parts in ((once, 1), (twice, 2)):
        run.model.eval()
        for _ in range(2):
            for part in zip(x[:64].chunk(parts), y[:64].chunk(parts), strict=True):
                (run.loss(F.cross_entropy(run.model(part[0]), part[1])) / parts).backward()
            run.step()
    assert torch.allclose(
        once.model[0].weight_quantizer.bit_depth, twice.model[0].weight_quantizer.bit_depth, atol=1e-4
    )


def test_a_run_that_was_broken_off_leaves_the_model_to_the_next(trained, keep):
    first = started(trained, keep)
    first.loss(F.cross_entropy(first.model(blobs().tensors[0]), blobs().tensors[1])).backward()
    second = SelfCompression(first.model, keep, optimizer=first.optimizers[0], **first.config.as_dict())
    taken = dict(first.control.bits.gradient)
    second.loss(F.cross_entropy(first.model(blobs().tensors[0]), blobs().tensors[1])).backward()
    assert len(second.control.bits.gradient) == len(taken) > 0
    assert first.control.bits.gradient.keys() == taken.keys()
    second.step()


def test_cutting_needs_the_optimizer(trained, keep):
    with pytest.raises(ValueError, match="cut=True without optimizer: give"):
        SelfCompression(prepare(trained).model, keep, target_size=0.1, steps=60, cut=True)


def test_a_checkpoint_whose_worths_have_another_meaning_is_refused(trained, keep):
    run = started(trained, keep)
    state = run.state_dict()
    del state["values"]["form"]
    with pytest.raises(ValueError, match="of an earlier sgsc; end its run there, or start anew"):
        started(trained, keep).load_state_dict(state)
