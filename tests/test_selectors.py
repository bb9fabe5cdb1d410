"""What the selectors choose by: uncertainty, saliency, clusters of features, and that nothing is left behind."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from sgsc.preservation import PreservationSet
from sgsc.selectors import SELECTORS, Evidence, clusters
from tests.planted import Recurrent, confident, evidence_of, logits_are_inputs, network, only, pictures, text


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
