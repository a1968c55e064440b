"""Rules for functions that select elements: which ones is recorded, and the replay takes the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastfisher.engine.calls import Function, argument, writes_first
from fastfisher.engine.fused import relu_pool
from fastfisher.engine.fused.relu_pool import Passage
from fastfisher.engine.piecewise.rules import Rule, Run


class Selection(Rule):
    """A function each of whose outputs is one of the elements, or a mean of several that are equal.

    Attributes:
        takes_single: whether it is always one, or 0.
    """

    takes_single = False

    def linear_in(self, args: Any) -> tuple[int, ...]:
        """The places of the arguments that are selected from. The replay is linear in them jointly: given their
        derivatives in these places, it gives that of the output."""
        return (0,)


class Chosen(Selection):
    """Functions that take elements along a dimension and say which: max(dim), sort, topk, median(dim), cummax, …

    Without a second output, as of median() and max(), the elements equal to the value share the gradient. ``keeps``
    says whether the dimension stays in the output whatever ``keepdim`` is.
    """

    def __init__(self, keeps: bool = False) -> None:
        self.keeps = keeps

    def record(self, run: Run, function: Function, args: Any, kwargs: Any) -> tuple[Any, Any]:
        out = function(*args, **kwargs)
        x = args[0]
        if not isinstance(out, tuple):
            with torch.no_grad():
                chosen = x == out
                return out, (None, chosen, chosen.sum(), None)
        dim = argument(function, args, kwargs, "dim", -1)
        indices = out[1] if out[1].dim() == x.dim() else out[1].unsqueeze(dim)
        return out, (dim, indices.clone(), None, type(out))

    def replay(self, run: Run, saved: Any, function: Function, args: Any, kwargs: Any) -> Any:
        dim, chosen, count, kind = saved
        x = args[0]
        if kind is None:
            return torch.where(chosen, x, 0).sum() / count
        values = x.gather(dim, chosen) if x.dim() else x.clone()
        flat = values.dim() and not (self.keeps or argument(function, args, kwargs, "keepdim"))
        indices = chosen.squeeze(dim) if flat else chosen.clone()
        return kind((values.squeeze(dim) if flat else values, indices))


class Extremum(Selection):
    """maximum and minimum of two tensors, amax and amin; max and min in all their forms."""

    _along = Chosen()

    def record(self, run: Run, function: Function, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if not (self._of_two(args) or self._shares(function)):
            return self._along.record(run, function, args, kwargs)
        out = function(*args, **kwargs)
        with torch.no_grad():
            if self._of_two(args):  # 1 where it is x, -1 where it is the other, 0 where they are equal and share
                x, other = args[:2]
                return out, (out == x).to(torch.int8) - (out == other).to(torch.int8)
            x, dims, keepdim = self._over(function, args, kwargs)
            full = out
            if not keepdim:
                for dim in sorted(d % x.dim() for d in dims):
                    full = full.unsqueeze(dim)
            chosen = x == full  # equal elements share the gradient
            return out, (chosen, chosen.sum(dims, keepdim=True))

    def replay(self, run: Run, saved: Any, function: Function, args: Any, kwargs: Any) -> Any:
        if isinstance(saved, Tensor):
            x, other = args[:2]
            return torch.where(saved > 0, x, torch.where(saved < 0, other, 0.5 * (x + other)))
        if not self._shares(function):
            return self._along.replay(run, saved, function, args, kwargs)
        chosen, count = saved
        x, dims, keepdim = self._over(function, args, kwargs)
        return (torch.where(chosen, x, 0) / count).sum(dims, keepdim=keepdim)

    def linear_in(self, args: Any) -> tuple[int, ...]:
        return (0, 1) if self._of_two(args) else (0,)

    @staticmethod
    def _of_two(args: Any) -> bool:
        return len(args) > 1 and isinstance(args[1], Tensor)

    @staticmethod
    def _shares(function: Function) -> bool:
        """Whether equal elements along the dimensions share the gradient, as those of amax do and those of max not."""
        return function.__name__ in ("amax", "amin")

    @staticmethod
    def _over(function: Function, args: Any, kwargs: Any) -> tuple[Tensor, tuple[int, ...], bool]:
        """The input, the dimensions that amax and amin go over, and whether those stay."""
        x: Tensor = args[0]
        dims: Any = argument(function, args, kwargs, "dim")
        keepdim = bool(argument(function, args, kwargs, "keepdim"))
        return x, (dims,) if isinstance(dims, int) else tuple(dims or range(x.dim())), keepdim


class ScatterExtremum(Selection):
    """scatter_reduce by amax or amin, whose equal elements share the gradient."""

    def record(self, run: Run, function: Function, args: Any, kwargs: Any) -> tuple[Any, Any]:
        x, dim, index, source, _ = args
        before = x.detach().clone() if writes_first(function) else x
        out = function(*args, **kwargs)
        with torch.no_grad():
            from_source = source[tuple(slice(n) for n in index.shape)] == out.gather(dim, index)
            own = before == out
            if not kwargs.get("include_self", True):  # an element that nothing was scattered to keeps its own value
                own = torch.zeros_like(own, dtype=torch.int64).scatter_add(dim, index, torch.ones_like(index)) == 0
            count = own.to(x.dtype).scatter_add(dim, index, from_source.to(x.dtype))
        return out, (own, from_source, count)

    def replay(self, run: Run, saved: Any, function: Function, args: Any, kwargs: Any) -> Any:
        x, dim, index, source, _ = args
        own, from_source, count = saved
        source = source[tuple(slice(n) for n in index.shape)]
        out = torch.where(own, x, 0).scatter_add(dim, index, torch.where(from_source, source, 0)) / count
        return x.copy_(out) if writes_first(function) else out

    def linear_in(self, args: Any) -> tuple[int, ...]:
        return 0, 3


class MaxPool(Selection):
    """max_pool and adaptive_max_pool in 1, 2 and 3 dimensions; ``with_indices`` is the form that gives the places."""

    takes_single = True

    def __init__(self, dims: int, with_indices: Function, adaptive: bool = False) -> None:
        self.dims, self.with_indices, self.adaptive = dims, with_indices, adaptive

    def record(self, run: Run, function: Function, args: Any, kwargs: Any) -> tuple[Any, Any]:
        x, geometry, return_indices = self._arguments(function, *args, **kwargs)
        if not return_indices and self._is_plain(x, geometry):
            window, stride = geometry[:2]
            after = self._passage(run, x)
            out, indices = relu_pool.max_pool2d(x, tuple(window), tuple(stride), after)
            return out, (indices, after is not None)
        out, indices = self.with_indices(x, *geometry)
        return (out, indices) if return_indices else out, (indices.int(), False)

    def replay(self, run: Run, saved: Any, function: Function, args: Any, kwargs: Any) -> Any:
        x, _, return_indices = self._arguments(function, *args, **kwargs)
        indices, closed = saved  # closed: index −1 where the ReLU before was closed
        out = relu_pool.take(x, indices, self.dims, self._passage(run, x) if closed else None)
        return (out, indices.long()) if return_indices else out

    def _arguments(self, function: Function, x: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Any, bool]:
        """The input, the geometry as the operators want it, and whether the caller wants the indices."""
        geometry, wants = (self._adaptive if self.adaptive else self._window)(*rest, **named)
        return x, geometry, wants or function.__name__.endswith("with_indices")

    def _adaptive(self, output_size: Any, return_indices: bool = False) -> tuple[tuple[Any, ...], bool]:
        return (output_size,), return_indices

    def _window(
        self,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> tuple[tuple[Any, ...], bool]:
        stride = stride if stride is not None and stride != [] else kernel_size
        sizes = (kernel_size, stride, padding, dilation)
        each = [[value] * self.dims if isinstance(value, int) else list(value) for value in sizes]
        return (*each, ceil_mode), return_indices

    def _is_plain(self, x: Tensor, geometry: tuple[Any, ...]) -> bool:
        """Whether this is a pool in two dimensions without padding, dilation or rounding up, in row-major memory."""
        if self.dims != 2 or self.adaptive or not x.is_contiguous():
            return False
        _, _, padding, dilation, ceil_mode = geometry
        return not ceil_mode and padding == [0, 0] and dilation == [1, 1]

    @staticmethod
    def _passage(run: Run, x: Tensor) -> Passage | None:
        """The ReLU that ``x`` comes from, if its output went straight here."""
        return run.last if run.last is not None and run.last.leads_to(x) else None
