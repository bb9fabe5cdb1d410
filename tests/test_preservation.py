"""The preservation set: what is in it, its balance, its loss, its state, and what is refused."""

import json
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from sgsc.preservation import PreservationSet
from sgsc.selectors import SELECTORS
from tests.planted import Recurrent, confident, logits_are_inputs, network, only, pictures, text


class TestTheSet:
    @pytest.mark.parametrize("size", [1, 2, 7, 40, 41, 90])
    def test_has_exactly_size_samples_ascending_and_without_duplicates(self, size):
        data = pictures()
        chosen = PreservationSet.select(network(), data, size)
        assert len(chosen) == size == len(chosen.reasons)
        assert (chosen.indices.diff() > 0).all()
        assert chosen.indices.dtype == torch.int64
        assert torch.equal(chosen.inputs, data.tensors[0][chosen.indices])
        assert torch.equal(chosen.targets, data.tensors[1][chosen.indices])

    def test_holds_the_float_models_outputs(self):
        model = network()
        chosen = PreservationSet.select(model, pictures(), 20, batch_size=7)
        with torch.no_grad():
            assert torch.allclose(chosen.outputs, model.eval()(chosen.inputs), atol=1e-6)
        assert chosen.outputs.dtype == torch.float32
        assert not chosen.outputs.requires_grad

    def test_the_same_seed_chooses_the_same_whatever_the_batch_size(self):
        first = PreservationSet.select(network(), pictures(), 30, seed=4)
        again = PreservationSet.select(network(), pictures(), 30, seed=4, batch_size=11)
        assert torch.equal(first.indices, again.indices)
        assert first.reasons == again.reasons
        assert first.data_hash == again.data_hash

    def test_another_seed_chooses_other_representatives(self):
        sets = [
            PreservationSet.select(network(), pictures(), 30, seed=s, shares=only("representative")) for s in range(4)
        ]
        assert len({tuple(s.indices.tolist()) for s in sets}) > 1

    def test_shares_are_followed_and_what_does_not_divide_goes_to_the_largest_remainder(self):
        def counts(size, shares=None):
            reasons = PreservationSet.select(network(), pictures(), size, shares=shares).reasons
            return [reasons.count(name) for name in SELECTORS]

        assert counts(40) == [10, 10, 10, 10, 0]
        assert counts(10) == [3, 3, 2, 2, 0]
        assert counts(10, {"hard": 0.68, "salient": 0.32}) == [0, 3, 0, 7, 0]
        assert counts(10, {"hard": 0.5, "random": 0.5}) == [0, 0, 0, 5, 5]

    def test_a_sample_that_one_selector_took_is_skipped_by_the_next(self):
        logits, labels = confident(12, 3)
        logits[4] = 0.0  # most uncertain of all, and by far the largest loss of the right ones
        chosen = PreservationSet.select(
            logits_are_inputs(3), TensorDataset(logits, labels), 2, shares={"uncertain": 0.5, "hard": 0.5}
        )
        assert chosen.reasons[chosen.indices.tolist().index(4)] == "uncertain"
        assert sorted(chosen.reasons) == ["hard", "uncertain"]

    def test_sequences_are_chosen_without_balance(self):
        chosen = PreservationSet.select(Recurrent(), text(), 12)
        assert chosen.targets.shape == (12, 5)
        assert chosen.outputs.shape == (12, 5, 7)
        assert {name: chosen.reasons.count(name) for name in SELECTORS} == dict.fromkeys(SELECTORS, 3) | {"random": 0}

    def test_numbers_and_arrays_are_samples_too(self):
        class Arrays(Dataset):
            def __len__(self):
                return 9

            def __getitem__(self, index):
                return np.eye(3, dtype=np.float32)[index % 3] * (index + 1), index % 3

        chosen = PreservationSet.select(logits_are_inputs(3), Arrays(), 3, shares=only("uncertain"))
        assert chosen.indices.tolist() == [0, 1, 2]


class TestBalance:
    @pytest.mark.parametrize("name", SELECTORS)
    def test_every_selector_takes_the_same_number_of_each_class(self, name):
        chosen = PreservationSet.select(network(), pictures(), 25, shares=only(name))
        assert chosen.targets.bincount(minlength=5).tolist() == [5] * 5

    @pytest.mark.parametrize("size", [5, 13, 27, 40])
    def test_the_whole_set_differs_by_at_most_one(self, size):
        counts = PreservationSet.select(network(), pictures(), size).targets.bincount(minlength=5)
        assert counts.max() - counts.min() <= 1

    def test_a_rare_class_gives_all_it_has_and_the_others_share_the_rest(self):
        logits, labels = confident(60, 3)
        labels[labels == 2] = 0
        labels[[7, 30]] = 2
        chosen = PreservationSet.select(logits_are_inputs(3), TensorDataset(logits, labels), 20, shares=only("hard"))
        assert chosen.targets.bincount().tolist() == [9, 9, 2]
        assert {7, 30} <= set(chosen.indices.tolist())

    def test_a_leftover_goes_by_rank(self):
        logits, labels = confident(12, 3)
        logits[[4, 7]] = torch.tensor([3.0, 0.0, 0.0])  # of class 1: the largest losses
        chosen = PreservationSet.select(logits_are_inputs(3), TensorDataset(logits, labels), 4, shares=only("hard"))
        assert chosen.targets.bincount().tolist() == [1, 2, 1]
        assert {4, 7} <= set(chosen.indices.tolist())

    def test_a_class_without_samples_is_no_class(self):
        logits, labels = confident(12, 3)
        data = TensorDataset(logits[labels != 1], labels[labels != 1])
        chosen = PreservationSet.select(logits_are_inputs(3), data, 6)
        assert chosen.targets.bincount(minlength=3).tolist() == [3, 0, 3]


class TestLoss:
    def test_is_zero_for_the_same_model_and_positive_for_another(self):
        model = network()
        chosen = PreservationSet.select(model, pictures(), 20)
        model.eval()
        assert 0 <= chosen.loss(model).item() + 1e-7 < 1e-6
        with torch.no_grad():
            model[-1].weight.add_(0.1 * torch.randn(model[-1].weight.shape))
        assert chosen.loss(model).item() > 1e-4

    @pytest.mark.parametrize("batch", [None, torch.tensor([3, 0, 3])], ids=["all", "some"])
    @pytest.mark.parametrize(("make", "data"), [(network, pictures()), (Recurrent, text())], ids=["cnn", "text"])
    def test_values_by_the_formula(self, make, data, batch):
        model = make()
        chosen = PreservationSet.select(model, data, 12)
        torch.manual_seed(9)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape))
        model.eval()
        rows = torch.arange(12) if batch is None else batch
        p = chosen.outputs[rows].double().softmax(-1)
        q = model(chosen.inputs[rows]).detach().double().softmax(-1)
        kl = (p * (p / q).log()).sum(-1).mean()
        own = -q.gather(-1, chosen.targets[rows][..., None]).log().mean()
        assert chosen.loss(model, batch).item() == pytest.approx(kl.item(), rel=1e-4)
        assert chosen.loss(model, batch, kind="task").item() == pytest.approx(own.item(), rel=1e-4)
        assert kl > 1e-3

    @pytest.mark.parametrize("kind", ["kl", "task"])
    def test_a_gradient_step_lowers_it(self, kind):
        model = network()
        chosen = PreservationSet.select(model, pictures(), 20)
        model.eval()
        with torch.no_grad():
            model[-1].weight.mul_(-1)
        before = chosen.loss(model, kind=kind)
        before.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter -= 0.01 * parameter.grad
        assert chosen.loss(model, kind=kind) < before

    def test_answers_lean_the_right_ones_towards_their_label(self):
        model = network().eval()
        chosen = PreservationSet.select(model, pictures(), 20)
        p = chosen.outputs.softmax(-1)
        q = model(chosen.inputs).detach().softmax(-1)
        label = torch.nn.functional.one_hot(chosen.targets, p.shape[-1])
        right = (p.argmax(-1) == chosen.targets)[:, None]
        assert 0 < right.sum() < 20
        target = torch.where(right, 0.75 * p + 0.25 * label, p)
        want = (target * (target / q).log()).nan_to_num().sum(-1).mean()
        assert chosen.loss(model, kind="answers").item() == pytest.approx(want.item(), rel=1e-4)

    def test_what_lost_its_margin_is_drawn_more_often(self):
        chosen = PreservationSet.select(network(), pictures(), 20)
        risk = torch.zeros(20)
        risk[3] = 1.0
        make = torch.Generator().manual_seed(0)
        drawn = torch.stack([chosen.batch(make, 5, risk) for _ in range(400)])
        assert all(len(set(row.tolist())) == 5 for row in drawn)
        counts = torch.bincount(drawn.flatten(), minlength=20)
        assert counts[3] > 350
        assert counts.min() > 40  # none is forgotten

    def test_the_labels_matter_to_task_and_not_to_kl(self):
        model = network()
        chosen = PreservationSet.select(model, pictures(), 20)
        model.eval()
        tensors, values = chosen.state()
        other = PreservationSet.from_state({**tensors, "targets": (chosen.targets + 1) % 5}, values)
        assert other.loss(model).item() == chosen.loss(model).item()
        assert other.loss(model, kind="task").item() != chosen.loss(model, kind="task").item()

    def test_what_it_refuses(self):
        chosen = PreservationSet.select(network(), pictures(), 5)
        with pytest.raises(ValueError, match=r"loss 'mse': allowed are 'kl' .* and 'task'"):
            chosen.loss(network(), kind="mse")
        with pytest.raises(ValueError, match=r"returns \(5, 4\), the float model \(5, 5\)"):
            chosen.loss(nn.Sequential(nn.Flatten(), nn.Linear(36, 4)))

    def test_batches_are_distinct_positions_drawn_by_the_generator(self):
        chosen = PreservationSet.select(network(), pictures(), 20)
        first, again = (chosen.batch(torch.Generator().manual_seed(3), 8) for _ in range(2))
        generator = torch.Generator().manual_seed(3)
        assert torch.equal(first, again)
        assert len(first.unique()) == 8
        assert torch.equal(chosen.batch(generator, 8), first)
        assert not torch.equal(chosen.batch(generator, 8), first)
        assert chosen.batch(generator, 99).sort().values.tolist() == list(range(20))
        with pytest.raises(ValueError, match="batch of 0 preservation samples: want at least 1"):
            chosen.batch(generator, 0)


class TestState:
    def test_round_trip_through_safetensors_and_json(self, tmp_path):
        from safetensors.torch import load_file, save_file

        chosen = PreservationSet.select(Recurrent(), text(), 10)
        tensors, values = chosen.state()
        save_file(tensors, tmp_path / "set.safetensors")
        back = PreservationSet.from_state(load_file(tmp_path / "set.safetensors"), json.loads(json.dumps(values)))
        for name in ("indices", "inputs", "targets", "outputs"):
            assert torch.equal(getattr(back, name), getattr(chosen, name)), name
        assert back.reasons == chosen.reasons
        assert back.data_hash == chosen.data_hash

    def test_moves_as_a_whole(self):
        chosen = PreservationSet.select(network(), pictures(), 5)
        moved = chosen.to("cpu")
        assert torch.equal(moved.indices, chosen.indices)
        assert moved.reasons == chosen.reasons

    def test_what_it_refuses(self):
        tensors, values = PreservationSet.select(network(), pictures(), 5).state()
        with pytest.raises(ValueError, match="its state lacks data_hash, outputs"):
            PreservationSet.from_state({k: v for k, v in tensors.items() if k != "outputs"}, {"reasons": []})
        with pytest.raises(ValueError, match=r"lengths \[5, 4, 5, 5, 5\]"):
            PreservationSet.from_state(tensors, {**values, "reasons": values["reasons"][:4]})
        with pytest.raises(ValueError, match="ascending and without duplicates"):
            PreservationSet.from_state({**tensors, "indices": tensors["indices"].flip(0)}, values)

    def test_the_hash_sees_shapes_of_equal_bytes(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 5))
        x, y = pictures(40).tensors
        hashes = {PreservationSet.select(model, TensorDataset(z, y), 1).data_hash for z in (x, x.flatten(1), x[:, 0])}
        assert len(hashes) == 3

    def test_the_hash_sees_every_value_their_order_and_their_type(self):
        def hash_of(x, y, batch_size=256):
            return PreservationSet.select(model, TensorDataset(x, y), 1, batch_size=batch_size).data_hash

        model = network()
        x, y = pictures(40).tensors
        changed, relabelled = x.clone(), y.clone()
        changed[-1, 0, 5, 5] += 1e-6
        relabelled[0] = (relabelled[0] + 1) % 5
        hashes = [hash_of(x, y), hash_of(changed, y), hash_of(x, relabelled), hash_of(x.flip(0), y.flip(0))]
        hashes += [hash_of(x, y.int()), hash_of(x[:-1], y[:-1])]
        assert len(set(hashes)) == 6
        assert hash_of(x, y, 7) == hashes[0]
        assert len(hashes[0]) == 64


class Augmented(Dataset):
    def __init__(self):
        self.random = random.Random(0)

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return torch.eye(3)[index % 3] * self.random.random(), index % 3


class Ragged(Dataset):
    def __init__(self, until):
        self.until = until

    def __len__(self):
        return 310

    def __getitem__(self, index):
        return torch.zeros(3 if index < self.until else 4), index % 3


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"size": 0}, "size=0: want 1 to 90"),
            ({"size": 91}, "size=91: want 1 to 90"),
            ({"size": 5, "batch_size": 0}, "batch_size=0: want at least 1"),
            ({"size": 5, "shares": {"salience": 1.0}}, "no selector salience; there are uncertain, salient"),
            ({"size": 5, "shares": {"hard": 1.5, "uncertain": -0.5}}, "fractions of 0 or more that sum to 1"),
            ({"size": 5, "shares": {"hard": 0.5}}, "fractions of 0 or more that sum to 1"),
            ({"size": 5, "shares": {"hard": float("nan")}}, "fractions of 0 or more that sum to 1"),
            ({"size": 5, "shares": {}}, "fractions of 0 or more that sum to 1"),
        ],
    )
    def test_settings(self, settings, message):
        with pytest.raises(ValueError, match=message):
            PreservationSet.select(network(), pictures(), **settings)

    @pytest.mark.parametrize(
        ("model", "x", "y", "message"),
        [
            (nn.Identity(), torch.zeros(4, 2, 2, 2), torch.zeros(4).long(), r"got \(4, 2, 2, 2\), want a tensor"),
            (nn.Identity(), torch.zeros(4), torch.zeros(4).long(), r"got \(4,\), want a tensor"),
            (nn.Identity(), torch.zeros(4, 1), torch.zeros(4).long(), "at least two classes"),
            (nn.LSTM(2, 2), torch.zeros(4, 2), torch.zeros(4).long(), "got tuple, want a tensor"),
            (logits_are_inputs(3), torch.zeros(4, 3), torch.zeros(4), r"targets: got torch.float32, want integers"),
            (
                logits_are_inputs(3),
                torch.zeros(4, 3),
                torch.full((4,), float("nan")),
                "float32 with NaN, want integers",
            ),
            (logits_are_inputs(3), torch.zeros(4, 3), torch.zeros(4, 1).long(), r"got \(4, 1\), but outputs"),
            (logits_are_inputs(3), torch.zeros(4, 3), torch.full((4,), 3), "from 3 to 3, .* allowed are 0 to 2"),
            (logits_are_inputs(3), torch.zeros(4, 3), torch.full((4,), -1), "from -1 to -1"),
            (logits_are_inputs(3), torch.full((4, 3), float("nan")), torch.zeros(4).long(), "sample 0: .* NaN or inf"),
        ],
    )
    def test_outputs_and_targets(self, model, x, y, message):
        with pytest.raises(ValueError, match=message):
            PreservationSet.select(model, TensorDataset(x, y), 2, batch_size=4)

    def test_non_finite_outputs_are_named_by_their_sample(self):
        logits, labels = confident(30, 3)
        logits[23, 1] = float("inf")
        with pytest.raises(ValueError, match="training sample 23: the float model's outputs"):
            PreservationSet.select(logits_are_inputs(3), TensorDataset(logits, labels), 2, batch_size=8)

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (Augmented(), "changes between two reads of the same samples"),
            (Ragged(10), r"data\[10\] has shapes \(4,\)"),
            (Ragged(32), r"data\[32\] has shapes \(4,\)"),
            ([{"x": 1}] * 4, "data.0. is a dict that does not split into two tensors"),
            ([(torch.zeros(3), 0, 1)] * 4, "is a tuple that does not split"),
            ([(None, 0)] * 4, "is a tuple that does not split"),
        ],
    )
    def test_data(self, data, message):
        with pytest.raises(ValueError, match=message):
            PreservationSet.select(logits_are_inputs(3), data, 2)

    def test_shapes_that_change_between_batches(self):
        with pytest.raises(ValueError, match=r"samples from 300 on are .* crop or pad them to one shape"):
            PreservationSet.select(logits_are_inputs(3), Ragged(300), 2, batch_size=300)

    def test_a_model_without_saliency_can_be_served_by_the_other_selectors(self):
        data = TensorDataset(*confident(12, 3))
        with pytest.raises(ValueError, match=r"selector 'salient': no convolution or Linear .* give it no share"):
            PreservationSet.select(nn.Identity(), data, 4)
        assert len(PreservationSet.select(nn.Identity(), data, 4, shares={"uncertain": 0.5, "hard": 0.5})) == 4

    def test_a_model_that_detaches_its_outputs_has_no_saliency(self):
        class Detached(nn.Linear):
            def forward(self, x):
                return super().forward(x).detach()

        with pytest.raises(ValueError, match="selector 'salient'"):
            PreservationSet.select(Detached(3, 3), TensorDataset(*confident(12, 3)), 4)

    def test_a_convolution_that_does_not_lead_to_the_outputs_has_no_saliency(self):
        class Aside(nn.Linear):
            def __init__(self):
                super().__init__(3, 3)
                self.aside = nn.Conv1d(1, 1, 2)

            def forward(self, x):
                self.aside(x[:, None])
                return super().forward(x)

        with pytest.raises(ValueError, match="selector 'salient'"):
            PreservationSet.select(Aside(), TensorDataset(*confident(12, 3)), 4)

    def test_a_layer_whose_rows_are_not_samples(self):
        class Mixed(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(3, 3)

            def forward(self, x):
                return x + self.linear(x[:1].expand(5, 3)).sum()

        with pytest.raises(ValueError, match="a layer saw 5 rows for 12 samples"):
            PreservationSet.select(Mixed(), TensorDataset(*confident(12, 3)), 4)
