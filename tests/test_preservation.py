import json
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from sgsc.preservation import PreservationSet
from sgsc.selectors import SELECTORS, Evidence, clusters, gather, probing, projection


def logits_are_inputs(classes: int) -> nn.Linear:
    """A model that returns its inputs, so that a test plants logits by planting inputs; features are the inputs too."""
    model = nn.Linear(classes, classes, bias=False)
    nn.init.eye_(model.weight)
    return model


def confident(samples: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits clearly in favour of their labels, and the labels, in turn."""
    make = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % classes
    return 6 * F.one_hot(labels, classes).float() + torch.rand(samples, classes, generator=make), labels


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(96, 5),
    )


def pictures(samples: int = 90, seed: int = 3) -> TensorDataset:
    make = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 5, (samples,), generator=make)
    return TensorDataset(torch.randn(samples, 1, 6, 6, generator=make), labels)


class Recurrent(nn.Module):
    """A sequence model: token ids (N, T) -> logits (N, T, 7)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(7, 8)
        self.middle = nn.Linear(8, 8)
        self.last = nn.Linear(8, 7)

    def forward(self, tokens):
        return self.last(self.middle(self.embedding(tokens)).cumsum(1).tanh())


def text(samples: int = 40) -> TensorDataset:
    tokens = torch.randint(0, 7, (samples, 6), generator=torch.Generator().manual_seed(5))
    return TensorDataset(tokens[:, :-1], tokens[:, 1:])


def evidence_of(model: nn.Module, data: TensorDataset, batch_size: int = 16) -> Evidence:
    x, y = data.tensors
    with probing(model) as probe:
        return gather(
            probe, zip(x.split(batch_size), y.split(batch_size), strict=True), projection(probe, x.split(batch_size))
        )


def only(name: str) -> dict[str, float]:
    return {name: 1.0}


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


class TestSelectors:
    @pytest.mark.parametrize("name", SELECTORS)
    @pytest.mark.parametrize(("model", "data"), [(network(), pictures()), (Recurrent(), text())], ids=["cnn", "text"])
    def test_ranks_every_sample_once_and_by_its_seed(self, name, model, data):
        evidence = evidence_of(model, data)
        first, again = (SELECTORS[name](evidence, 10, torch.Generator().manual_seed(2)) for _ in range(2))
        assert torch.equal(first, again)
        assert first.sort().values.tolist() == list(range(len(data)))

    def test_uncertain_finds_the_ambiguous_sample(self):
        logits, labels = confident(30, 3)
        logits[17] = torch.tensor([2.0, 2.0, 1.9])
        chosen = PreservationSet.select(
            logits_are_inputs(3), TensorDataset(logits, labels), 1, shares=only("uncertain")
        )
        assert chosen.indices.tolist() == [17]

    def test_uncertain_breaks_ties_by_margin_then_by_position(self):
        same = torch.ones(5)
        margin = torch.tensor([0.5, 0.1, 0.3, 0.1, 0.9])
        evidence = Evidence(same, margin, same, same, same[:, None], None)
        assert SELECTORS["uncertain"](evidence, 5, torch.Generator()).tolist() == [1, 3, 2, 0, 4]

    def test_hard_finds_the_mislabelled_sample(self):
        logits, labels = confident(30, 3)
        labels[11] = (labels[11] + 1) % 3
        chosen = PreservationSet.select(logits_are_inputs(3), TensorDataset(logits, labels), 1, shares=only("hard"))
        assert chosen.indices.tolist() == [11]

    def test_hard_of_a_sequence_is_the_mean_over_tokens(self):
        model, data = Recurrent(), text()
        with torch.no_grad():
            logits = model(data.tensors[0])
        loss = F.cross_entropy(logits.transpose(1, 2), data.tensors[1], reduction="none").mean(1)
        chosen = PreservationSet.select(model, data, 4, shares=only("hard"))
        assert chosen.indices.tolist() == sorted(loss.topk(4).indices.tolist())

    def test_entropy_margin_and_loss_by_hand(self):
        chance = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
        evidence = evidence_of(logits_are_inputs(3), TensorDataset(chance.log(), torch.tensor([1, 2])))
        assert torch.allclose(evidence.entropy, -(chance * chance.log()).sum(1))
        assert torch.allclose(evidence.margin, torch.tensor([0.2, 0.7]))
        assert torch.allclose(evidence.loss, -torch.tensor([0.3, 0.8]).log())

    def test_shuffled_labels_change_what_is_hard_and_what_is_salient(self):
        x, y = pictures().tensors
        shuffled = TensorDataset(x, y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))])
        for name in ("hard", "salient"):
            before, after = (
                PreservationSet.select(network(), data, 25, shares=only(name)) for data in (pictures(), shuffled)
            )
            assert not torch.equal(before.indices, after.indices), name


class TestRepresentative:
    def blobs(self, features: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Four tight clusters of directions, lengths at random: (60, features), cluster (60,)."""
        make = torch.Generator().manual_seed(seed)
        cluster = torch.arange(60) % 4
        rows = F.one_hot(cluster, features) + 0.05 * torch.randn(60, features, generator=make)
        return rows * (0.5 + 9 * torch.rand(60, 1, generator=make)), cluster

    @pytest.mark.parametrize("features", [6, 200])  # 200: projected to 64
    def test_medoids_are_nearest_to_the_planted_centres(self, features):
        rows, cluster = self.blobs(features)
        torch.manual_seed(0)
        data = TensorDataset(rows, torch.zeros(60, dtype=torch.long))  # one class: nothing to balance
        chosen = PreservationSet.select(nn.Linear(features, 2), data, 4, shares=only("representative")).indices
        unit = F.normalize(rows, dim=1)
        expected = []
        for number in range(4):
            (members,) = (cluster == number).nonzero(as_tuple=True)
            distance = (unit[members] - unit[members].mean(0)).norm(dim=1)
            expected.append(int(members[distance.argmin()]))
        if features == 6:
            assert chosen.tolist() == sorted(expected)
        assert sorted(cluster[chosen].tolist()) == [0, 1, 2, 3]

    def test_every_class_is_covered_by_medoids_of_its_own(self):
        """Class 1 is two near clusters of unequal size, which four clusters over all samples would not tell apart."""
        make = torch.Generator().manual_seed(0)
        near = torch.eye(6)[3] + 0.3 * torch.tensor([1.0] * 20 + [-1.0] * 10)[:, None] * torch.eye(6)[4]
        rows = torch.cat([torch.eye(6)[:3].repeat(10, 1), near]) + 0.01 * torch.randn(60, 6, generator=make)
        data = TensorDataset(rows, torch.arange(60) // 30)
        chosen = PreservationSet.select(nn.Linear(6, 2), data, 4, shares=only("representative")).indices
        assert torch.bucketize(chosen, torch.tensor([30, 50]), right=True).bincount().tolist() == [2, 1, 1]

    def test_features_keep_64_directions_and_their_distances(self):
        make = torch.Generator().manual_seed(0)
        rows = torch.randn(50, 10, generator=make) @ torch.randn(10, 300, generator=make)  # of rank 10
        evidence = evidence_of(nn.Linear(300, 2), TensorDataset(rows, torch.zeros(50, dtype=torch.long)))
        assert evidence.features.shape[1] <= 64
        assert torch.allclose(torch.pdist(evidence.features), torch.pdist(F.normalize(rows, dim=1)), atol=1e-4)

    def test_features_of_a_sequence_are_the_mean_input_of_the_last_linear(self):
        model, data = Recurrent(), text()
        with torch.no_grad():
            state = model.middle(model.embedding(data.tensors[0])).cumsum(1).tanh().mean(1)
        assert torch.allclose(evidence_of(model, data).features, F.normalize(state, dim=1), atol=1e-6)

    def test_features_are_the_outputs_where_there_is_no_linear(self):
        model = nn.Sequential(nn.Conv1d(1, 3, 2), nn.AdaptiveAvgPool1d(1), nn.Flatten())
        data = TensorDataset(torch.randn(9, 1, 5, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 3)
        with torch.no_grad():
            expected = F.normalize(model(data.tensors[0]), dim=1)
        assert torch.allclose(evidence_of(model, data).features, expected)

    def test_distances_are_to_the_mean_of_the_members(self):
        rows = self.blobs(6)[0]
        cluster, distance = clusters(rows, 5, torch.Generator().manual_seed(0))
        for number in cluster.unique():
            inside = rows[cluster == number].double()
            assert torch.allclose(distance[cluster == number], (inside - inside.mean(0)).norm(dim=1))

    def test_fewer_distinct_samples_than_clusters(self):
        logits, labels = torch.eye(3).repeat(5, 1), torch.arange(15) % 3
        chosen = PreservationSet.select(
            logits_are_inputs(3), TensorDataset(logits, labels), 12, shares=only("representative")
        )
        assert chosen.targets.bincount().tolist() == [4, 4, 4]


class TestSaliency:
    def test_grad_cam_by_hand(self):
        model = nn.Sequential(nn.Conv2d(1, 2, 2, bias=False), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8, 2))
        make = torch.Generator().manual_seed(1)
        x = torch.randn(5, 1, 3, 3, generator=make)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=make))
        kernel, matrix, bias = (p.detach().numpy() for p in model.parameters())
        expected = []
        for picture in x[:, 0].numpy():
            activation = np.zeros((2, 2, 2))
            for c in range(2):
                for i in range(2):
                    for j in range(2):
                        activation[c, i, j] = (kernel[c, 0] * picture[i : i + 2, j : j + 2]).sum()
            logits = matrix @ np.maximum(activation, 0).reshape(-1) + bias
            slope = matrix[logits.argmax()].reshape(2, 2, 2) * (activation > 0)
            weight = slope.mean(axis=(1, 2))
            expected.append(np.maximum((weight[:, None, None] * activation).sum(0), 0).sum())
        energy = evidence_of(model, TensorDataset(x, torch.zeros(5, dtype=torch.long))).energy
        assert energy is not None
        assert max(expected) > 0
        np.testing.assert_allclose(energy.numpy(), expected, rtol=1e-5, atol=1e-6)

    def test_the_last_convolution_that_ran_is_looked_at_and_the_pass_ends_there(self):
        model, data = network(), pictures(8)
        model.eval()
        x, y = data.tensors
        activation = model[:4](x).detach().requires_grad_()
        logits = model[4:](activation.clone())
        (slope,) = torch.autograd.grad(logits.amax(1).sum(), activation)
        expected = (slope.mean((2, 3), keepdim=True) * activation).sum(1).relu().sum((1, 2)).detach()
        assert torch.allclose(evidence_of(model, TensorDataset(x, y)).energy, expected, rtol=1e-4, atol=1e-6)
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_energy_is_not_normalised_a_sample(self):
        model = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2, bias=False))
        torch.manual_seed(0)
        x, y = torch.randn(6, 1, 4, 4), torch.zeros(6, dtype=torch.long)
        small, large = (evidence_of(model, TensorDataset(factor * x, y)).energy for factor in (1, 10))
        assert small is not None
        assert small.max() > 0
        assert torch.allclose(large, 10 * small, rtol=1e-4)

    def test_without_convolutions_gradient_times_input_of_the_last_linear(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))
        x = torch.randn(9, 4)
        with torch.no_grad():
            hidden = model[:2](x)
            predicted = model[2](hidden).argmax(1)
            expected = (hidden * model[2].weight[predicted]).sum(1).relu()
        energy = evidence_of(model, TensorDataset(x, torch.zeros(9, dtype=torch.long))).energy
        assert torch.allclose(energy, expected, atol=1e-6)

    def test_the_energy_of_a_sequence_is_the_sum_over_positions(self):
        model, data = Recurrent(), text()
        with torch.no_grad():
            state = model.middle(model.embedding(data.tensors[0])).cumsum(1).tanh()
            predicted = model.last(state).argmax(-1)
            expected = (state * model.last.weight[predicted]).sum(-1).relu().sum(1)
        assert torch.allclose(evidence_of(model, data).energy, expected, atol=1e-5)

    def test_rows_of_samples_and_positions_flattened_into_one(self):
        class Flat(Recurrent):
            def forward(self, tokens):
                state = self.middle(self.embedding(tokens)).cumsum(1).tanh()
                return self.last(state.flatten(0, 1)).unflatten(0, tokens.shape)

        flat, plain = evidence_of(Flat(), text()), evidence_of(Recurrent(), text())
        assert torch.allclose(flat.energy, plain.energy, atol=1e-5)
        assert torch.allclose(flat.features, plain.features, atol=1e-6)

    def test_the_extreme_members_of_each_class_are_chosen(self):
        model, data = network(), pictures()
        energy, labels = evidence_of(model, data).energy, data.tensors[1]
        chosen = PreservationSet.select(model, data, 10, shares=only("salient")).indices
        assert energy is not None
        for label in range(5):
            (members,) = (labels == label).nonzero(as_tuple=True)
            best = members[energy[members].topk(2).indices]
            assert set(best.tolist()) == set(chosen[labels[chosen] == label].tolist())

    def test_what_the_model_does_in_place_after_a_layer_does_not_matter(self):
        class Spoiling(nn.Module):
            def __init__(self, spoil):
                super().__init__()
                torch.manual_seed(0)
                self.first, self.last, self.spoil = nn.Linear(5, 6), nn.Linear(6, 3), spoil

            def forward(self, x):
                hidden = self.first(x)
                out = self.last(hidden)
                return out + hidden.mul_(0).sum() if self.spoil else out

        data = TensorDataset(torch.randn(9, 5, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 3)
        plain, spoilt = (evidence_of(Spoiling(spoil), data) for spoil in (False, True))
        assert torch.allclose(plain.energy, spoilt.energy)
        assert torch.allclose(plain.features, spoilt.features)
        assert plain.features.abs().max() > 0.1

    @pytest.mark.parametrize("frozen", [True, False])
    def test_frozen_parameters_and_no_grad_around_do_not_matter(self, frozen):
        model = network()
        expected = evidence_of(model, pictures()).energy
        model.requires_grad_(not frozen)
        with torch.no_grad():
            assert torch.equal(evidence_of(model, pictures()).energy, expected)


class TestNothingIsLeftBehind:
    def state(self, model):
        return {name: value.clone() for name, value in model.state_dict().items()}

    @pytest.mark.parametrize("fails", [False, True])
    def test_modes_random_state_and_hooks_are_as_before(self, fails):
        model, data = network(), pictures()
        if fails:
            data.tensors[0][50] = float("nan")
        model.train()
        model[1].eval()
        modes = [module.training for module in model.modules()]
        weights, state = self.state(model), torch.random.get_rng_state()
        if fails:
            with pytest.raises(ValueError, match="training sample 50"):
                PreservationSet.select(model, data, 20)
        else:
            PreservationSet.select(model, data, 20)
        assert [module.training for module in model.modules()] == modes
        assert torch.equal(torch.random.get_rng_state(), state)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_random_layers_in_evaluation_mode_are_seeded_and_do_not_move_the_random_state(self):
        class Noisy(nn.Linear):
            def forward(self, x):
                return super().forward(x) + torch.randn(len(x), 3)

        torch.manual_seed(0)
        model, data = Noisy(3, 3), TensorDataset(*confident(60, 3))
        first = PreservationSet.select(model, data, 10, seed=1)
        torch.manual_seed(7)
        state = torch.random.get_rng_state()
        again = PreservationSet.select(model, data, 10, seed=1)
        assert torch.equal(first.indices, again.indices)
        assert torch.equal(torch.random.get_rng_state(), state)


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
