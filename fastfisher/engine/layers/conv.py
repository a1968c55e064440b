"""Convolutions and transposed convolutions in 1, 2 and 3 dimensions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastfisher import ops
from fastfisher.engine.layers.base import Layer, Layout, Tracked, computing, formula_for, functions, used
from fastfisher.engine.layers.linear import gram_is_cheaper


class Conv(Layer):
    """torch.conv1d … conv_transpose3d. The gradient of an example is the convolution's weight gradient on it alone."""

    def __init__(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tensors: dict[str, Tensor],
        stride: Any,
        padding: Any,
        dilation: Any,
        groups: int,
        transposed: bool = False,
        output_padding: Any = 0,
    ) -> None:
        self.dims = weight.dim() - 2
        self.stride, self.dilation = self._each(stride), self._each(dilation)
        self.output_padding, self.groups, self.transposed = self._each(output_padding), groups, transposed
        self.unbatched = input.dim() == self.dims + 1
        if isinstance(padding, str):
            reach = [d * (k - 1) for d, k in zip(self.dilation, weight.shape[2:], strict=True)]
            total = reach if padding == "same" else [0] * self.dims
            if any(t % 2 for t in total):  # the odd element goes to the right, as in PyTorch
                pairs = [side for t in reversed(total) for side in (t // 2, t - t // 2)]
                input, total = F.pad(input, pairs), [0] * self.dims
            padding = [t // 2 for t in total]
        self.padding = self._each(padding)
        super().__init__(input, 1, tensors)
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()

    def _each(self, value: Any) -> list[int]:
        values = [value] if isinstance(value, int) else list(value)
        return values * self.dims if len(values) == 1 else values

    def accepts(self, layout: Layout) -> bool:
        return layout.dim == 0 and not self.unbatched

    def output(self) -> Tensor:
        out = torch.convolution(
            self.operand, self.weight, self.bias, self.stride, self.padding, self.dilation, self.transposed,
            self.output_padding, self.groups,
        )  # fmt: skip
        return out.clone() if out._is_view() else out

    def seen(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, d = computing(self.operand.detach()), computing(grad)
        common = torch.promote_types(a.dtype, d.dtype)
        return self._rows(a.to(common)), self._rows(d.to(common))

    def _rows(self, x: Tensor) -> Tensor:
        """[examples, images of an example, channels, …]."""
        x = self.layout.split(x)
        return x.unsqueeze(1) if self.layout.repeat == 1 else x

    def gradients(self, slot: str, a: Tensor, d: Tensor) -> Tensor:
        if slot == "bias":
            return d.transpose(1, 2).flatten(2).sum(2)
        images = a.shape[0] * a.shape[1]
        each = self._weight_gradient(
            a.reshape(1, images * a.shape[2], *a.shape[3:]), d.reshape(1, images * d.shape[2], *d.shape[3:]), images
        )
        return each.view(*a.shape[:2], *self.weight.shape).sum(1)

    def _weight_gradient(self, a: Tensor, d: Tensor, repeat: int) -> Tensor:
        """The library's weight gradient, ``repeat`` images side by side as groups of one."""
        shape = (self.weight.shape[0] * repeat, *self.weight.shape[1:])
        found: Tensor = torch.ops.aten.convolution_backward(
            d, a, a.new_empty(shape), None, self.stride, self.padding, self.dilation, self.transposed,
            self.output_padding, self.groups * repeat, [False, True, False],
        )[1]  # fmt: skip
        return found

    def squared_norms(self, slots: list[str], a: Tensor, d: Tensor) -> dict[str, Tensor]:
        way = self.way(a, d)
        if way == "library":
            return {slot: self.materialised_norms(slot, a, d) for slot in slots}
        # The weight gradient of a transposed convolution is that of the convolution it transposes.
        x, y = (d, a) if self.transposed else (a, d)
        weight, bias = ops.grad_sqnorm_conv(
            x[:, 0], y[:, 0], list(self.weight.shape[2:]), self.stride, self.padding, self.dilation, self.groups,
            way == "gram",
        )  # fmt: skip
        if self.transposed and "bias" in slots:
            bias = self.materialised_norms("bias", a, d)
        return {slot: weight if slot == "weight" else bias for slot in slots}

    def way(self, a: Tensor, d: Tensor) -> str:
        """The cheapest way to the norms: "direct" or "gram" (see the op), or "library", its gradients materialised.

        Multiply-adds by measured rates per nanosecond and core: 45 for tiles of the gradient (with the outputs in whole
        vectors of 16), 30 for inner products, 1 where the two kinds of inner products are put together. On a GPU the
        inner products are those of patches, and the rule is a linear layer's.
        """
        x, y = (d, a) if self.transposed else (a, d)
        channels, outputs = x.shape[2] // self.groups, y.shape[2] // self.groups
        pixels, positions = x.shape[3:].numel(), y.shape[3:].numel()
        kernel = self.weight.shape[2:].numel()
        if self.layout.repeat > 1 or (channels == outputs == 1 and kernel <= 9):
            return "library"
        if a.device.type == "cuda":
            return "gram" if gram_is_cheaper(positions, channels * kernel, outputs, a.device) else "direct"
        direct = positions * channels * kernel * (-(-outputs // 16) * 16) / 45
        gram = (pixels**2 * channels + positions**2 * outputs) / 2 / 30 + positions**2 * kernel / 2
        return "gram" if gram < direct else "direct"

    def total(self, slot: str, a: Tensor, d: Tensor) -> Tensor:
        if slot == "bias":
            return super().total(slot, a, d)
        return self._weight_gradient(a.flatten(0, 1), d.flatten(0, 1), 1)


@formula_for(*functions("conv1d conv2d conv3d", torch))
def _conv(
    tracked: Tracked, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Layer | None:  # fmt: skip
    if tracked(input):
        return None
    return Conv(input, weight, bias, used(tracked, weight=weight, bias=bias), stride, padding, dilation, groups)


@formula_for(*functions("conv_transpose1d conv_transpose2d conv_transpose3d", torch))
def _conv_transpose(
    tracked: Tracked, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Layer | None:  # fmt: skip
    if tracked(input):
        return None
    return Conv(
        input,
        weight,
        bias,
        used(tracked, weight=weight, bias=bias),
        stride,
        padding,
        dilation,
        groups,
        True,
        output_padding,
    )
