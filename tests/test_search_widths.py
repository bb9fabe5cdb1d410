"""Networks with other widths: the same function where channels are added, the most important ones where not."""

import pytest
import torch
from torch import nn

from sgsc import prepare
from sgsc.demos import models
from sgsc.layers import quant_layers
from sgsc.search.structure import structure_of
from sgsc.search.widths import resized


def norms_with_history(net):
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.weight is not None:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return net.eval()


NETWORKS = {
    "residual, depthwise": (models.DigitsCNN, (2, 1, 8, 8)),
    "concatenated streams": (models.ResNet20, (2, 3, 32, 32)),
    "no affine, flattened": (models.MnistCNN, (2, 1, 28, 28)),
    "feed-forward of a transformer": (lambda: models.CharLM(30, 8, 32, 2, 4), None),
}


def floats(model):
    """The model as it is before quantization."""
    for layer in quant_layers(model).values():
        layer.quantized_weight = lambda layer=layer: layer.weight
    return model


@pytest.fixture(params=NETWORKS, scope="module")
def problem(request):
    torch.manual_seed(0)
    make, shape = NETWORKS[request.param]
    model = prepare(norms_with_history(make()), quantizer="lsq8").model.double()
    x = torch.randn(shape).double() if shape else torch.randint(30, (2, 8))
    return model, structure_of(model), x


def test_there_is_something_to_change(problem):
    assert problem[1].groups


def test_wider_networks_compute_the_same(problem):
    model, structure, x = problem
    for group, size in structure.sizes.items():
        wide = resized(model, structure, {group: size + max(size // 4, 1)})
        assert sum(p.numel() for p in wide.parameters()) > sum(p.numel() for p in model.parameters())
        torch.testing.assert_close(floats(wide)(x), floats(resized(model, structure, {}))(x), rtol=1e-9, atol=1e-9)
    every = resized(model, structure, {g: 2 * n for g, n in structure.sizes.items()})
    torch.testing.assert_close(floats(every)(x), floats(resized(model, structure, {}))(x), rtol=1e-9, atol=1e-9)


def test_shapes_are_those_that_the_structure_says(problem):
    model, structure, x = problem
    make = torch.Generator().manual_seed(0)
    for _ in range(3):
        sizes = {g: int(torch.randint(1, 2 * n + 1, (1,), generator=make)) for g, n in structure.sizes.items()}
        changed = resized(model, structure, sizes)
        floats(changed)(x)
        for name, layer in quant_layers(changed).items():
            assert (layer.weight.shape[0], layer.weight[0].numel()) == structure.layers[name].weights(sizes)
        for name, count in structure.norms.items():
            assert changed.get_submodule(name).num_features == count.at(sizes)
    assert structure.sizes == structure_of(model).sizes  # the model itself is left


def test_the_residual_stream_of_resnet20_is_three_groups():
    structure = structure_of(prepare(models.ResNet20(), quantizer="lsq8").model)
    streams = {g: n for g, n in structure.sizes.items() if g == "stem.conv" or "others" in g}
    assert streams == {"stem.conv": 16, "blocks.3.others.conv": 16, "blocks.6.others.conv": 32}
    assert structure.layers["head"].inputs.of == dict.fromkeys(streams, 1)


def test_the_halves_differ():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    model = prepare(net, quantizer="lsq8").model
    wide = resized(model, structure_of(model), {"0": 8})
    halves = wide[2].weight[:, ::2], wide[2].weight[:, 1::2]
    torch.testing.assert_close(sum(halves), net[2].weight)
    assert (halves[0] - halves[1]).abs().max() > 0.001
    assert ((halves[0] / net[2].weight) - 0.5).abs().max() <= 0.0501


def test_the_largest_channels_stay():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([1.0, 4.0, 2.0, 3.0])[:, None].expand(4, 3))
    model = prepare(net, quantizer="lsq8").model
    small = resized(model, structure_of(model), {"0": 2})
    assert small[0].weight[:, 0].tolist() == [4.0, 3.0]
    assert torch.equal(small[2].weight, net[2].weight[:, [1, 3]])


def test_wrong_groups_and_sizes_are_named():
    model = prepare(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), quantizer="lsq8").model
    structure = structure_of(model)
    with pytest.raises(ValueError, match="no group is called 'x'; there are 0"):
        resized(model, structure, {"x": 2})
    with pytest.raises(ValueError, match="group '0' of 4 channels cannot have 9; want 1 to 8"):
        resized(model, structure, {"0": 9})
