"""How large a prepared model is: nominal, and as its file will hold it. What `save` writes is artefact.stored_size.

    nominal = sum over layers, rows c of  bits_c * live weights a row           (arXiv 2301.13142, equations 3 to 5)
    file    = nominal + 16 a live row, its scale
                      + 4 a row (its width) + 32 a bias + 32 a value of its batch norm, of channels that are not cut out

A removed output of one layer removes inputs of the layers that read it (equation 5) where `coupling` proves who does,
and then is cut out. What a file holds beside that (header, other values) does not depend on widths.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .coupling import Coupling
from .layers import quant_layers, some_quant_layers

SCALE, WIDTH, VALUE = 16, 4, 32  # bits of a scale, of a row's width, of anything else


class SizeModel:
    """Bits of a model and their gradient by each channel's width, as functions of the widths of all channels.

    Both cost one pass over the channels: a constant number of operations (32), whatever the number of layers.

    It is a pass of its own, not a part of the quantizer's launch. What a row costs depends on which channels of other
    layers live, and the gradient of those on the rows of all layers that read them: two sums over the whole network
    come first, between which the programs of a launch, each with a row, would have to wait for one another. And it
    would save little: some 450 bytes a channel, of a ResNet-20 0.4 MB beside 7.7 MB of weights that the quantizer moves
    forward and backward, of a transformer of 12 layers 12 MB beside 266 MB.

    Args:
        model: A prepared model; its shapes are read once, here.
        coupling: Of the model; None, or one that proves nothing, charges all inputs.
        file: Whether to charge scales, widths, biases and batch norms too.
    """

    def __init__(self, model: nn.Module, coupling: Coupling | None = None, *, file: bool = False) -> None:
        layers = quant_layers(model)
        self.names = list(layers)
        proved = coupling if coupling is not None and not coupling.why else Coupling()
        count = len(proved.pinned)
        ids, made, layer_of, fixed = [], torch.zeros(count), [], []
        read_id, read_by, weights = [], [], []
        channel_bits = torch.zeros(count)  # that a channel costs as long as it is not cut out
        for number, (name, layer) in enumerate(layers.items()):
            rows = layer.weight.shape[0]
            width = layer.weight[0].numel() if rows else 0
            layer_of += [number] * rows
            if name in proved.produced:
                own = proved.produced[name].cpu()
                made[own] = 1
                channel_bits.index_add_(0, own, torch.full((rows,), float(WIDTH + VALUE * (layer.bias is not None))))
            else:  # a place of its own, which nobody reads
                own = count + torch.arange(rows)
                count += rows
            ids.append(own)
            if name in proved.read:
                inputs = proved.read[name].cpu()
                read_id.append(inputs)
                read_by += [number] * len(inputs)
                weights += [width // len(inputs)] * len(inputs)
            fixed.append(0 if name in proved.read else width)
        for name, channels in proved.norms.items():
            norm = model.get_submodule(name)
            held = [getattr(norm, part) for part in ("weight", "bias", "running_mean", "running_var")]
            bits = float(VALUE * sum(isinstance(v, Tensor) for v in held))
            channel_bits.index_add_(0, channels.cpu(), torch.full((len(channels),), bits))
        channel_bits[proved.pinned] = 0.0
        device = next(iter(layers.values())).weight.device if layers else torch.device("cpu")

        def flat(values: list | Tensor, dtype: torch.dtype) -> Tensor:
            return torch.as_tensor(values, dtype=dtype).to(device)

        whole, real = torch.long, torch.float64
        self.ids = flat(torch.cat(ids) if ids else [], whole)
        self.layer_of, self.read_by = flat(layer_of, whole), flat(read_by, whole)
        self.read_id = flat(torch.cat(read_id) if read_id else [], whole)
        self.weights, self.fixed = flat(weights, real), flat(fixed, real)
        beyond = torch.zeros(count - len(made))
        # 1 where no layer makes the channel, or it cannot be cut out of the file: readers then hold weights for it
        present = torch.where(proved.pinned, 1.0, 1 - made) if file else 1 - made
        self.unmade = flat(torch.cat([present, beyond]), real)
        self.channel_bits = flat(torch.cat([channel_bits * made, beyond]) * file, real)
        self.row_bits = float(SCALE * file)

    @torch.no_grad()
    def __call__(self, widths: Tensor) -> tuple[Tensor, Tensor]:
        """Widths of all channels, layer after layer, (C,) real, 0 or more -> (bits, a scalar; (C,) their gradient).

        Both float64. A channel of at most one bit also stands for what its readers store for it.
        """
        widths = widths.double()
        present = widths.clamp(0, 1)
        alive = self.unmade.scatter_reduce(0, self.ids, present, "amax")
        inputs = self.fixed.index_add(0, self.read_by, self.weights * alive[self.read_id])  # live weights a row
        rows = torch.zeros_like(self.fixed).index_add_(0, self.layer_of, widths)
        bits = inputs @ rows + self.row_bits * present.sum() + self.channel_bits @ alive
        by_alive = self.channel_bits.index_add(0, self.read_id, self.weights * rows[self.read_by])
        last = present == alive[self.ids]  # rows that keep their channel alive share its gradient
        sharing = torch.zeros_like(alive).index_add_(0, self.ids, last.double()).clamp_min(1)
        removing = (by_alive / sharing)[self.ids] * last + self.row_bits
        return bits, inputs[self.layer_of] + torch.where(widths <= 1, removing, 0.0)


class _Bits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, widths: Tensor, size: SizeModel) -> Tensor:
        bits, gradient = size(widths)
        ctx.save_for_backward(gradient.to(widths.dtype))
        return bits.to(widths.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad * ctx.saved_tensors[0], None


def _bits(model: nn.Module, coupling: Coupling | None, file: bool) -> Tensor:
    costs = [layer.weight_quantizer.bit_cost() for layer in some_quant_layers(model).values()]
    return _Bits.apply(torch.cat(costs), SizeModel(model, coupling, file=file))


def nominal_bits(model: nn.Module, coupling: Coupling | None = None) -> Tensor:
    """Bits that the quantized weights need; a differentiable scalar.

    With a `coupling` only live inputs are charged (arXiv 2301.13142, equation 5), else all of them (3 and 4).

    Raises:
        ValueError: If the model has no quantized layer.
    """
    return _bits(model, coupling, file=False)


def file_bits(model: nn.Module, coupling: Coupling | None = None) -> Tensor:
    """Bits of a file that depend on the widths, a differentiable scalar: those of weights, of scales (16 a live row),
    of widths (4 a row), and of biases and batch norms (32 a value) of channels that are not cut out.

    With a `coupling` only live inputs are charged.

    Raises:
        ValueError: If the model has no quantized layer.
    """
    return _bits(model, coupling, file=True)


def weight_count(model: nn.Module) -> int:
    """Quantized weights of the model as it stands."""
    return sum(layer.weight.numel() for layer in quant_layers(model).values())


def float_bytes(model: nn.Module) -> int:
    """Bytes of the model's parameters and buffers in float32: what every stored size is compared with.

    Quantizer parameters do not count, nor do counters and masks that are not floating point. Of a float or a prepared
    model; the codes of a packed one are no floats, and would not count.
    """
    own = {id(p) for layer in quant_layers(model).values() for p in layer.weight_quantizer.parameters()}
    values = {k: v for k, v in model.state_dict(keep_vars=True).items() if v.is_floating_point() and id(v) not in own}
    return sum(4 * v.numel() for v in {id(v): v for v in values.values()}.values())
