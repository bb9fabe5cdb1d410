"""GPT-2 of transformers, whose layers are Linear with the weight the other way round."""

import copy

import pytest
import torch
import torch.nn.functional as F

import sgsc
from sgsc.layers import quant_layers
from sgsc.search.candidates import as_float


@pytest.fixture(scope="module")
def gpt2(hf):
    torch.manual_seed(0)
    config = hf.GPT2Config(vocab_size=20, n_positions=8, n_embd=16, n_layer=2, n_head=2, num_labels=3, pad_token_id=0)
    return hf.GPT2ForSequenceClassification(config).eval()


@pytest.fixture
def ids():
    return torch.randint(1, 20, (5, 6), generator=torch.Generator().manual_seed(0))


def far(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_all_of_it_is_quantized_and_the_float_model_stays_as_it_was(gpt2, ids):
    before = copy.deepcopy(gpt2.state_dict())
    prepared = sgsc.prepare(gpt2)
    assert not [name for name, why in prepared.left.items() if "Conv1D" in why]
    assert {"transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"} <= set(prepared.swapped)
    assert quant_layers(prepared.model)["transformer.h.0.attn.c_attn"].weight.shape == (48, 16)
    assert far(prepared.model(ids).logits, gpt2(ids).logits) < 0.02
    assert all(torch.equal(value, before[key]) for key, value in gpt2.state_dict().items())
    assert type(gpt2.transformer.h[0].attn.c_attn).__name__ == "Conv1D"


def test_checkpoints_of_both_kinds_load(gpt2, ids):
    other = copy.deepcopy(gpt2)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    model = sgsc.prepare(gpt2).model
    model.load_state_dict(other.state_dict())
    wanted = sgsc.prepare(other).model
    assert torch.equal(model(ids).logits, wanted(ids).logits)
    model.load_state_dict(sgsc.prepare(gpt2).model.state_dict())  # one that is prepared is not turned
    assert torch.equal(model(ids).logits, sgsc.prepare(gpt2).model(ids).logits)


def test_it_trains_packs_and_loads_into_the_float_model(gpt2, ids, tmp_path):
    model = sgsc.prepare(gpt2).model
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    run = sgsc.SelfCompression(model, None, optimizer=optimizer, target_size=0.5, steps=20)
    for _ in range(20):
        loss = run.loss(F.cross_entropy(model.train()(ids).logits, torch.arange(5) % 3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.step()
    run.finish()
    packed = sgsc.pack(model.eval())
    sgsc.save(packed, tmp_path / "gpt2.sgsc")
    again = sgsc.load_into(gpt2, tmp_path / "gpt2.sgsc")
    assert torch.equal(again(ids).logits, packed(ids).logits)
    assert far(packed(ids).logits, model(ids).logits) < 1e-5


def test_one_that_is_skipped_or_carries_hooks_stays(gpt2, ids, tmp_path):
    name = "transformer.h.0.attn.c_proj"  # a square one: the wrong way round it would load as well
    prepared = sgsc.prepare(gpt2, skip=[name])
    assert "named in skip" in prepared.left[name]
    assert type(prepared.model.get_submodule(name)).__name__ == "Conv1D"
    hooked = copy.deepcopy(gpt2)
    calls = []
    hooked.get_submodule(name).register_forward_hook(lambda *_: calls.append(1))
    prepared = sgsc.prepare(hooked)
    assert "forward hooks" in prepared.left[name]
    assert type(prepared.model.get_submodule(name)).__name__ == "Conv1D"
    prepared.model(ids)
    assert calls == [1]
    prepared.model.load_state_dict(hooked.state_dict())
    assert torch.equal(prepared.model(ids).logits, sgsc.prepare(hooked).model(ids).logits)
    sgsc.save(sgsc.pack(prepared.model.eval()), tmp_path / "m.sgsc")
    again = sgsc.load_into(hooked, tmp_path / "m.sgsc")
    assert far(again(ids).logits, prepared.model(ids).logits) < 1e-5


def test_a_float_copy_of_it_is_made_of_linear_layers(gpt2, ids):
    floats = as_float(sgsc.prepare(gpt2).model)
    again = sgsc.prepare(floats).model
    again.load_state_dict(floats.state_dict())
    assert far(again(ids).logits, gpt2(ids).logits) < 0.02


def test_weights_that_two_share_are_refused(gpt2):
    shared = copy.deepcopy(gpt2)
    shared.transformer.h[1].mlp.c_fc.weight = shared.transformer.h[0].mlp.c_fc.weight
    with pytest.raises(ValueError, match=r"'transformer\.h\.0\.mlp\.c_fc' and 'transformer\.h\.1\.mlp\.c_fc' share"):
        sgsc.prepare(shared)
