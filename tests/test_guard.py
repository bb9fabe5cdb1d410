"""The guard fires on evidence, and gives bits back where they cost most."""

import copy
import math

import pytest
import torch

from sgsc.certificate import compare, outputs
from sgsc.guard import GIVE_BACK, Check, check, generosity, mends, restore, revive, set_widths, widths
from sgsc.layers import quant_layers
from tests.blobs import blobs, started


def test_the_guard_fires_on_evidence_and_not_on_noise():
    assert not Check(2, 0, 100).fires
    assert Check(3, 0, 100).fires
    assert not Check(10, 5, 100).held
    assert not Check(9, 5, 100).fires
    assert Check(10, 5, 100).fires


def test_the_guard_reads_margins_too():
    assert Check(0, 0, 100, margin_lost=0.2, margin_allowed=0.2).held
    assert not Check(0, 0, 100, margin_lost=0.21, margin_allowed=0.2).held
    assert not Check(0, 0, 100, margin_lost=0.21, margin_allowed=0.2, margin_error=0.01).fires
    assert Check(0, 0, 100, margin_lost=0.23, margin_allowed=0.2, margin_error=0.01).fires
    said = Check(3, 1, 100, margin_lost=0.3, margin_allowed=0.2).violation()
    assert said == ("3 of 100 preservation samples regressed, 1 allowed; 30% of the mean margin is lost, 20% allowed")


def test_a_look_tells_what_each_sample_lost(trained, keep):
    model = copy.deepcopy(trained)
    assert check(model, keep, 0.0).margin_lost == 0.0
    with torch.no_grad():
        model[5].weight.mul_(0.1)  # less sure, and as right
        model[5].bias.mul_(0.1)
    found = check(model, keep, 0.0, margin_tolerance=0.05)
    assert found.regressions == 0
    assert 0.05 < found.margin_lost < 1
    assert found.margin_error > 0
    assert not found.held
    assert found.fires
    before, now = (compare(keep.outputs, outputs(m, keep.inputs), keep.targets) for m in (trained, model))
    assert found.margin_lost == pytest.approx(1 - now.margin_packed / before.margin_packed)
    assert found.risk.shape == (60,)
    assert (found.risk >= 0).all()


def test_a_useful_channel_forced_to_no_bits_comes_back(trained, keep):
    run = started(trained, keep, tolerance=0.0)
    x, y = blobs().tensors
    # all but the two channels of the last hidden layer whose loss hurts least
    hurt = []
    for i in range(64):
        model = copy.deepcopy(run.model)
        with torch.no_grad():
            model[3].weight_quantizer.bit_depth[i] = 0
        run.control.coupling.silence(model)
        hurt.append(compare(outputs(trained, x), outputs(model, x), y).regressions)
    worst = torch.tensor(hurt).topk(62).indices
    with torch.no_grad():
        run.model[3].weight_quantizer.bit_depth[worst] = 0
    run.control.coupling.silence(run.model)
    before = check(run.model, keep, 0.0)
    assert before.fires, before
    assert (run.model[3].bias[worst] == 0).all()
    run._check()
    assert not run.events  # while the size shrinks the guard looks, and no more
    assert run.preservation_weight == run.config.preservation_weight
    run.control.settled, run.control.gives_way = 0, 0
    for _ in range(8):  # each check gives back a limited share of the bits
        run._check()
    back = run.model[3].weight_quantizer.bits()[worst]
    assert (back > 0).any()
    assert (back % 2 == 0).all()  # two at a time
    assert run.events[-1]["what"] == "guard"
    assert run.preservation_weight > run.config.preservation_weight
    revived = worst[back > 0]
    assert torch.equal(run.model[3].bias[revived], run.good["3.bias"][revived])
    assert check(run.model, keep, 0.0).regressions < before.regressions


def test_the_guard_waits_while_training_mends(trained, keep, monkeypatch):
    def before(regressions, margin_lost=0.0):
        return [{"regressions": 0, "margin_lost": 0.0}, *[{"regressions": regressions, "margin_lost": margin_lost}] * 3]

    assert mends(Check(3, 1, 100), before(5), 3)  # 5, 3, then 1
    assert not mends(Check(3, 1, 100), before(5), 2)
    assert not mends(Check(3, 1, 100), before(3), 100)
    assert not mends(Check(3, 1, 100), before(2), 100)
    assert not mends(Check(3, 1, 100), [], 100)
    assert mends(Check(0, 0, 100, 0.3, 0.2), before(0, 0.4), 4)
    assert not mends(Check(0, 0, 100, 0.3, 0.2), before(0, 0.4), 2)
    run = started(trained, keep, tolerance=0.0)
    run.control.settled, run.control.gives_way = 0, 1
    with torch.no_grad():
        run.model[3].weight_quantizer.bit_depth[4:] = 0
    run.history[-1] |= {"regressions": 60, "margin_lost": 2.0}
    run.best_size = 0.3
    monkeypatch.setattr(Check, "hopeless", False)
    for _ in range(4):
        run._check()
        assert not run.events  # widths have not been settled for long
    run.control.gives_way = 0
    run.history[-3:] = [run.history[0] | {"regressions": 60, "margin_lost": 2.0}] * 3
    for _ in range(3):
        run._check()
        assert not run.events
    run._check()  # no better than three checks before
    assert run.events[-1]["what"] == "guard"
    assert run.control.target >= run.size  # nothing of it is sold again
    run.best_size = 0.1  # what held at the target is not given up
    assert not run._insists(Check(60, 0, 60))


def test_a_hopeless_model_gets_bits_back_as_soon_as_widths_are_settled(trained, keep):
    assert Check(0, 0, 100, margin_lost=0.51, margin_allowed=0.2).hopeless
    assert not Check(60, 0, 100, margin_lost=0.49, margin_allowed=0.2).hopeless
    assert not Check(0, 0, 100, margin_lost=0.9, margin_allowed=1.0).hopeless  # it is allowed
    run = started(trained, keep, tolerance=0.0)
    with torch.no_grad():
        run.model[3].weight_quantizer.bit_depth[4:] = 0
    run.control.coupling.silence(run.model)
    run.steps, run.best_size, run.control.settled = 100, 0.3, 101
    run._check()
    assert not run.events
    run.control.settled = 100
    assert run.steps < run.control.gives_way
    run._check()
    assert run.events[-1]["what"] == "guard"
    run.steps = run.config.steps - 1  # no check is left to see what it does
    assert not run._insists(check(run.model, keep, 0.0, 0.0))


def test_what_is_given_back_leads_up_to_the_size_that_held():
    assert generosity(0.01, 0.08, 3) == pytest.approx(1.0)  # doubled three times
    assert generosity(0.01, 0.08, 0.5) == pytest.approx(7.0)
    assert generosity(0.01, 0.0101, 10) == generosity(0.01, math.inf, 3) == generosity(0.02, 0.01, 3) == GIVE_BACK


def test_late_in_the_run_the_target_gives_way_to_the_tolerance(trained, keep):
    # without a step of training nothing but bits given back can mend what was lost
    run = started(trained, keep, tolerance=0.0, target_size=0.08)
    with torch.no_grad():
        for depth in run.control.bits.depths.values():
            depth.fill_(1.0)
        run.model[0].weight_quantizer.bit_depth[8:] = 0
        run.model[3].weight_quantizer.bit_depth[1:] = 0
    run.control.coupling.silence(run.model)
    run.control.settled, run.best_size = 0, 0.3
    run.steps = 216  # nine tenths
    for _ in range(30):
        run._check()
        if run.history[-1]["regressions"] == 0:
            break
    assert run.history[-1]["regressions"] == 0
    assert 0.08 < run.best_size < 0.3  # the smallest that held, and what `finish` returns to
    assert run.control.target == pytest.approx(run.best_size)
    assert 1 <= len(run.events) < 20


def test_restoration_gives_back_what_cost_most_first(trained, keep):
    run = started(trained, keep)
    good = run.good
    before = widths(run.model)
    layer = run.model[0]
    sensitive = layer.weight.detach().abs().sum(1).argmax()
    new = {k: v.clone() for k, v in before.items()}
    new["0"][:] = 7  # everything lost a bit that hardly matters, one channel lost nearly all
    new["0"][sensitive] = 1
    set_widths(quant_layers(run.model), new)
    given = restore(run.model, run.control.coupling, keep, good, before, 0.01)
    assert given["0"][sensitive]
    assert given["0"].sum() < 96


@pytest.mark.parametrize("least", [0, 1])
@pytest.mark.parametrize("share", [0.05, 0.3])
def test_restoration_gives_the_share_that_was_asked_for(trained, keep, share, least):
    """In size, what readers hold of channels that come back included, and however few of them seem to have mattered."""
    run = started(trained, keep)
    good, before = run.good, widths(run.model)
    new = {name: torch.full_like(bits, 2) for name, bits in before.items()}
    new["0"][:48] = least
    set_widths(quant_layers(run.model), new)
    size = float(run.control.estimate()[0])
    given = restore(run.model, run.control.coupling, keep, good, before, share)
    assert any(mask.any() for mask in given.values())
    assert 0.9 * share < float(run.control.estimate()[0]) / size - 1 < share + 0.05


def test_restoration_without_a_loss_of_bits_gives_nothing(trained, keep):
    run = started(trained, keep)
    state = copy.deepcopy(run.model.state_dict())
    assert restore(run.model, run.control.coupling, keep, run.good, widths(run.model)) == {}
    assert all(torch.equal(v, state[k]) for k, v in run.model.state_dict().items())


def test_moments_of_what_came_back_are_forgotten_biases_and_norms_too(trained, keep):
    run = started(trained, keep, tolerance=0.0)
    names = ("0.weight", "0.bias", "1.weight", "1.bias")  # the rows of one layer, and the batch norm behind
    for name in names:
        value = run.model.get_parameter(name)
        run.optimizers[0].state[value] = {"step": torch.tensor(1.0), "exp_avg": torch.ones_like(value)}
    with torch.no_grad():
        run.model[0].weight_quantizer.bit_depth[4:] = 0
    run.control.coupling.silence(run.model)
    run._restore(check(run.model, keep, 0.0))
    back = run.model[0].weight_quantizer.bits() > 0
    back[:4] = False
    assert back.any()
    for name in names:
        state = run.optimizers[0].state[run.model.get_parameter(name)]
        assert (state["exp_avg"][back] == 0).all(), name
        assert (state["exp_avg"][~back] == 1).all(), name
        assert state["step"] == 1


def test_revival_brings_back_weights_biases_and_batch_norm(trained, keep):
    run = started(trained, keep)
    with torch.no_grad():
        run.model[0].weight_quantizer.bit_depth[4] = 0
        run.model[0].weight[4] = 9.0
    run.control.coupling.silence(run.model)
    for _ in range(3):
        run.model.train()(blobs().tensors[0])  # a dead channel's variance decays
    which = {"0": torch.arange(96) == 4}
    assert run.model[1].running_var[4] < 0.9 * run.good["1.running_var"][4]
    revive(run.model, run.control.coupling, run.good, which)
    assert run.model[1].running_var[4] == run.good["1.running_var"][4]
    for name in ("0.weight", "0.bias", "1.bias"):
        assert torch.equal(run.model.state_dict()[name], run.good[name]), name
    assert run.model[1].running_mean[4] == run.good["1.running_mean"][4]
