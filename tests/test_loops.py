"""What people's loops do beside a forward and a backward: parts of a batch, clipping, autocast, loss scaling, averages
of weights, torch.compile."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sgsc import SelfCompression, adopt_widths, pack, prepare, stored_size
from sgsc.certificate import compare, outputs
from sgsc.layers import quant_layers
from tests.small import STEPS, assert_same_model, batch, start, trained


def train(run: SelfCompression, steps: int, call=None, each=None, scaler=None, autocast: bool = False) -> None:
    call = run.model if call is None else call
    for _ in range(steps):
        x, y = batch(run.steps)
        run.model.train()
        x = x.to(run.model[0].weight.dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = run.loss(F.cross_entropy(call(x), y))
        run.optimizers[0].zero_grad()
        if scaler is None:
            loss.backward()
            run.optimizers[0].step()
        else:
            scaler.scale(loss).backward()
            scaler.step(run.optimizers[0])
            scaler.update()
        run.step()
        if each is not None:
            each(run)


# ---- parts of a batch, clipping ----


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_of_a_batch_are_the_batch(parts):
    whole, run = start(), start()
    train(whole, 12)
    for _ in range(12):
        x, y = batch(run.steps)
        run.model.train()
        run.optimizers[0].zero_grad()
        for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (run.loss(F.cross_entropy(run.model(a), b)) / parts).backward()
        run.optimizers[0].step()
        run.step()
    assert_same_model(run.model.state_dict(), whole.model.state_dict(), 1e-9)


def test_clipping_sees_the_weights_only():
    run = start()
    x, y = batch(0)
    run.loss(F.cross_entropy(run.model(x), y)).backward()
    quantizers = {p for n, p in run.model.named_parameters() if "weight_quantizer" in n}
    weights = [p.grad for p in run.model.parameters() if p not in quantizers]
    assert all(p.grad is None for p in quantizers)
    collected = copy.deepcopy(list(run.control.bits.gradient.values()))
    norm = torch.cat([g.flatten() for g in weights]).norm()
    assert nn.utils.clip_grad_norm_(run.model.parameters(), 1e-3).item() == pytest.approx(norm.item())
    assert norm > 1e-3
    assert torch.cat([g.flatten() for g in weights]).norm() == pytest.approx(1e-3, rel=1e-3)
    assert len(collected) == len(quantizers)
    for before, after in zip(collected, run.control.bits.gradient.values(), strict=True):
        assert torch.equal(before, after)


# ---- mixed precision ----


def test_autocast_in_bfloat16_reaches_the_target_in_float32_weights():
    run = start(dtype=torch.float32)
    seen: set[torch.dtype] = set()
    run.model[0].register_forward_hook(lambda m, i, out: seen.add(out.dtype))
    train(run, STEPS, autocast=True)
    outcome = run.finish()
    assert torch.bfloat16 in seen
    assert outcome.target_held, outcome
    assert outcome.tolerance_held, outcome
    assert {v.dtype for v in run.model.state_dict().values()} == {torch.float32}


def scaled(scale: float, interval: int = 2000, **more) -> tuple[SelfCompression, torch.amp.GradScaler]:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=interval)
    return start(scaler=scaler, **more), scaler


@pytest.mark.parametrize("interval", [2000, 3])
def test_a_scaled_loss_gives_the_same_bits(interval):
    plain = start()
    run, scaler = scaled(2.0**16, interval)  # powers of two: nothing rounds in another way
    train(plain, STEPS)
    train(run, STEPS, scaler=scaler)
    assert scaler.get_scale() >= 2.0**16
    assert_same_model(run.model.state_dict(), plain.model.state_dict(), 0.0)
    assert run.history == plain.history
    assert run.finish() == plain.finish()


def test_a_step_that_overflows_moves_nothing_and_the_next_does():
    run, scaler = scaled(2.0**127, dtype=torch.float32)
    before = copy.deepcopy(run.model.state_dict())
    x, y = batch(0)
    scaler.scale(1e3 * run.loss(F.cross_entropy(run.model(x.float()), y))).backward()
    assert not any(g.isfinite().all() for g in run.control.bits.gradient.values())
    scaler.step(run.optimizers[0])
    scaler.update()
    run.step()
    assert scaler.get_scale() == 2.0**126
    assert_same_model(run.model.state_dict(), before, 0.0)
    assert run.steps == 1
    scaler.update(2.0**10)
    train(run, 5, scaler=scaler)
    assert not torch.equal(run.model[0].weight_quantizer.bit_depth, before["0.weight_quantizer.bit_depth"])


def test_a_scaler_that_is_switched_off_excuses_nothing():
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    run = start(scaler=scaler)
    x, y = batch(0)
    scaler.scale(run.loss(F.cross_entropy(run.model(x), y))).backward()
    next(iter(run.control.bits.gradient.values()))[0] = float("inf")
    with pytest.raises(ValueError, match="the gradient of its quantizer is not finite"):
        run.step()


# ---- averages of weights ----


def averaging(run: SelfCompression, decay: float = 0.9) -> AveragedModel:
    average = AveragedModel(run.model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    train(run, STEPS, each=lambda r: average.update_parameters(r.model))
    run.finish()
    return average


def test_an_average_adopts_the_widths_that_were_trained():
    run = start(norm=True, dtype=torch.float32, bit_rate=0.8, target_size=0.2)
    average = averaging(run)
    weight = average.module[0].weight.clone()
    assert not torch.equal(weight, run.model[0].weight)
    model = adopt_widths(average, run.model)
    assert torch.equal(model[0].weight, weight)
    for name, layer in quant_layers(run.model).items():
        assert_same_model(
            model.get_submodule(name).weight_quantizer.state_dict(), layer.weight_quantizer.state_dict(), 0
        )
    packed = pack(model)
    # the same channels are cut out, so that the file is as large: codes differ, their number does not
    assert abs(stored_size(packed) - stored_size(pack(run.model))) <= 64
    assert [len(m.bits) for m in packed.modules() if hasattr(m, "bits")] == [
        len(m.bits) for m in pack(run.model).modules() if hasattr(m, "bits")
    ]
    keep = trained(True)[1]
    assert compare(keep.outputs, outputs(packed, keep.inputs.float()), keep.targets).regressions <= 4


def test_an_average_without_it_has_widths_that_nobody_trained():
    run = start(norm=True, dtype=torch.float32, bit_rate=0.8, target_size=0.2)
    average = averaging(run, decay=0.99)  # goes back beyond the run's start, where all had more bits
    theirs = [average.module[i].weight_quantizer.bits() for i in (0, 3, 5)]
    ours = [run.model[i].weight_quantizer.bits() for i in (0, 3, 5)]
    assert any(not torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))


def test_an_average_of_another_model_is_refused():
    run = start()
    with pytest.raises(
        ValueError, match=r"adopt_widths: the average has quantized layers \{.*\(24, 32\).*\}, the model"
    ):
        adopt_widths(AveragedModel(run.model), prepare(nn.Linear(3, 2)).model)


# ---- torch.compile ----


def test_a_compiled_model_trains_alike_and_widths_recompile_nothing():
    torch._dynamo.reset()
    plain, run = start(), start()
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(run.model, backend=counter, fullgraph=True)
    train(plain, STEPS)
    train(run, 5, call=call)
    before = copy.deepcopy(run.model.state_dict())
    train(run, STEPS - 5, call=call)
    after = run.model.state_dict()
    assert not torch.equal(
        before["0.weight_quantizer.bit_depth"].round(), after["0.weight_quantizer.bit_depth"].round()
    )
    assert counter.frame_count == 1
    assert run.finish().target_held
    plain.finish()
    assert_same_model(run.model.state_dict(), plain.model.state_dict(), 1e-9)
