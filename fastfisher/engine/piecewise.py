"""What is known of the functions that a forward calls: which have kinks, and how those are recorded and replayed.

One table, :data:`KNOWN`, says of each function of torch one of three things:

- it has a :class:`Rule`: its kinks (the sign of each element, the place of a maximum, …) are recorded at θ and
  repeated at θ + ρd, so that what is left is smooth in ρ;
- it is smooth: it has a continuous first derivative, or is linear, or moves elements about. A jump of the second
  derivative does no harm, because the gradient changes little where a short step crosses it. Whatever has a rule in
  :mod:`fastfisher.engine.taylor` and none here is smooth;
- nothing: it is not in the table, and a recording that meets it says so by name.

What is discrete by itself (comparisons, indices, values under ``detach()``) needs no rule: see gates.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from fastfisher.engine.fused import relu_pool as gated
from fastfisher.engine.fused.batch_norm import relu_after
from fastfisher.engine.fused.relu_pool import Passage
from fastfisher.engine.taylor.tape import RULES as TAYLOR_RULES

Function = Callable[..., Any]


class Run(Protocol):
    """The forward that a call belongs to."""

    last: Passage | None
    """The last ReLU, for a max-pool right after it."""

    def within(self) -> AbstractContextManager[Any]:
        """A context in which the calls that a rule makes are recorded or replayed like the model's own."""


class Rule:
    """How one family of functions is recorded and replayed; arguments come in the positions of the signature."""

    def record(self, run: Run, function: Function, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The function's own output, and what the replay needs."""
        raise NotImplementedError

    def replay(self, run: Run, saved: Any, function: Function, args: Any, kwargs: Any) -> Any:
        """The output of the call with the recorded gates."""
        raise NotImplementedError


def split_inplace(function: Function, args: Any, kwargs: Any) -> tuple[Any, dict[str, Any], bool]:
    """The arguments without ``inplace``, and whether the call works in place."""
    kwargs = dict(kwargs)
    inplace = bool(kwargs.pop("inplace", False))
    if args and isinstance(args[-1], bool):  # the only boolean that these functions take
        args, inplace = args[:-1], args[-1]
    return args, kwargs, inplace or names_inplace(function)


@functools.cache
def names_inplace(function: Function) -> bool:
    """Whether the function's name says that it writes into its first argument."""
    name = getattr(function, "__name__", "")
    if name.endswith("__"):
        return name in _INPLACE_OPERATORS
    return name.endswith("_")


_OPERATORS = [
    "add", "sub", "mul", "truediv", "div", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift", "matmul",
]  # fmt: skip
_INPLACE_OPERATORS = frozenset(f"__i{name}__" for name in _OPERATORS)


class Elementwise(Rule):
    """An elementwise function that is smooth on each side of its kinks.

    ``keep(x, *parameters)`` finds the side of each element, ``apply(x, saved, *parameters)`` is the function there.
    """

    def __init__(self, keep: Callable[..., Any], apply: Callable[..., Tensor]) -> None:
        self.keep, self.apply = keep, apply

    def record(self, run: Run, function: Function, args: Any, kwargs: Any) -> tuple[Any, Any]:
        positional, named, _ = split_inplace(function, args, kwargs)
        with torch.no_grad():
            saved = self.keep(*positional, **named)  # before the call, which may overwrite its input
        return function(*args, **kwargs), saved

    def replay(self, run: Run, saved: Any, function: Function, args: Any, kwargs: Any) -> Any:
        (x, *parameters), named, inplace = split_inplace(function, args, kwargs)
        out = self.apply(x, saved, *parameters, **named)
        return x.copy_(out) if inplace else out


class Written(Rule):
    """A function that is written by others which are recorded and replayed themselves.

    ``flag`` says whether it takes ``inplace`` as its last argument.
    """

    def __init__(self, write: Callable[..., Tensor], *, flag: bool = False) -> None:
        self.write, self.flag = write, flag

    def record(self, run: Run, function: Function, args: Any, kwargs: Any) -> tuple[Any, Any]:
        inplace = names_inplace(function)
        if self.flag:
            args, kwargs, inplace = split_inplace(function, args, kwargs)
        x, *rest = args
        with run.within():
            out = self.write(x.clone() if inplace else x, *rest, **kwargs)
        return x.copy_(out) if inplace else out, None

    def replay(self, run: Run, saved: Any, function: Function, args: Any, kwargs: Any) -> Any:
        return self.record(run, function, args, kwargs)[0]


class Constant(Rule):
    """A function whose derivative is 0 wherever it has one: sign, floor, round, … Of complex numbers it is smooth."""

    def record(self, run: Run, function: Function, args: Any, kwargs: Any) -> tuple[Any, Any]:
        out = function(*args, **kwargs)
        if out.is_complex():
            return out, None
        return out, out.detach().clone() if names_inplace(function) else out.detach()

    def replay(self, run: Run, saved: Any, function: Function, args: Any, kwargs: Any) -> Any:
        out = function(*args, **kwargs)  # for its place in the graph: what autograd follows here, it followed at θ
        if saved is None or out.shape != saved.shape:
            return out
        if names_inplace(function):
            with torch.no_grad():
                return out.copy_(saved)
        return _Valued.apply(out, saved)  # type: ignore[no-untyped-call]


class _Valued(torch.autograd.Function):
    """A tensor with another value in its place. It stays as it is: its backward may look at it, as that of sgn does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


class StraightThrough(Rule):
    """A function of steps that autograd takes for a line on each element: the fake quantisations.

    Repeated is that line, through the recorded value. The call is made again for what it may write: an observer.
    """

    def record(self, run: Run, function: Function, args: Any, kwargs: Any) -> tuple[Any, Any]:
        x, *rest = args
        if not x.requires_grad:
            return function(*args, **kwargs), None
        alone = x.detach().requires_grad_()
        out = function(alone, *rest, **kwargs)
        (slope,) = torch.autograd.grad(out, alone, torch.ones_like(out))
        saved = slope, out.detach() - slope * alone.detach()
        return self.line(x, *saved), saved

    def replay(self, run: Run, saved: Any, function: Function, args: Any, kwargs: Any) -> Any:
        x, *rest = args
        out = function(x.detach(), *rest, **kwargs)
        return out if saved is None else self.line(x, *saved)

    @staticmethod
    def line(x: Tensor, slope: Tensor, rest: Tensor) -> Tensor:
        return x * slope + rest


class Remainder(Rule):
    """x − n y for the whole number n of the call: fmod and remainder."""

    def record(self, run: Run, function: Function, args: Any, kwargs: Any) -> tuple[Any, Any]:
        x, y = args
        with torch.no_grad():
            before = x.clone() if names_inplace(function) else x
        out = function(*args, **kwargs)
        with torch.no_grad():
            return out, ((before - out) / y).round()

    def replay(self, run: Run, saved: Any, function: Function, args: Any, kwargs: Any) -> Any:
        x, y = args
        out = x - saved * y
        return x.copy_(out) if names_inplace(function) else out


class Relu(Rule):
    """ReLU, which keeps bits instead of its output, and is remembered for a max-pool after it."""

    def record(self, run: Run, function: Function, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return self.call(run, None, function, args, kwargs)

    def replay(self, run: Run, saved: Any, function: Function, args: Any, kwargs: Any) -> Any:
        return self.call(run, saved, function, args, kwargs)[0]

    def call(
        self, run: Run, gates: Passage | None, function: Function, args: Any, kwargs: Any
    ) -> tuple[Tensor, Passage]:
        """The output, by the given gates or its own, and its passage."""
        (x, *_), _, inplace = split_inplace(function, args, kwargs)
        by = relu_after(x) or gated.gate
        out, run.last = gated.relu(x, inplace=inplace, gates=gates, by=by)
        return out, run.last


_DIMENSIONS: dict[Function, int] = {F.dropout1d: 3, F.dropout2d: 4, F.dropout3d: 5}
"""Of the inputs of functions that drop channels; one without a batch has no rule."""


class Dropout(Rule):
    """A dropout, of elements or of whole channels, that keeps its mask."""

    def record(self, run: Run, function: Function, args: Any, kwargs: Any) -> tuple[Any, Any]:
        x, p, training, inplace = self.arguments(function, *args, **kwargs)
        if not training or p == 0.0:
            return function(*args, **kwargs), None
        shape = x.shape
        if function in _DIMENSIONS:
            if x.dim() != _DIMENSIONS[function]:
                refuse_random(function, args, kwargs)
            shape = torch.Size([*x.shape[:2], *[1] * (x.dim() - 2)])
        mask = torch.empty(shape, dtype=torch.bool, device=x.device).bernoulli_(1.0 - p)
        return self.apply(x, mask, p, inplace), mask

    def replay(self, run: Run, saved: Any, function: Function, args: Any, kwargs: Any) -> Any:
        x, p, _, inplace = self.arguments(function, *args, **kwargs)
        return function(*args, **kwargs) if saved is None else self.apply(x, saved, p, inplace)

    @staticmethod
    def apply(x: Tensor, mask: Tensor, p: float, inplace: bool) -> Tensor:
        scale = 0.0 if p == 1.0 else 1.0 / (1.0 - p)
        return x.mul_(mask).mul_(scale) if inplace else (x * mask).mul_(scale)

    @staticmethod
    def arguments(
        function: Function, input: Tensor, p: float | None = None, *flags: bool, **named: bool
    ) -> tuple[Tensor, float, bool, bool]:
        """Input, p, training and inplace, of a functional or of torch.dropout(input, p, train)."""
        training = named.get("training", named.get("train", flags[0] if flags else True))
        inplace = named.get("inplace", flags[1] if len(flags) > 1 else function is torch.dropout_)
        return input, 0.5 if p is None else p, training, inplace


def _keep_sides(x: Tensor, low: Any = None, high: Any = None) -> Tensor:
    """-1, 0 and 1 for elements below, between and above the bounds (derivative 1 on a bound, as in clamp)."""
    sides = torch.zeros_like(x, dtype=torch.int8)
    if low is not None:
        sides = sides - (x < low).to(torch.int8)
    if high is not None:  # which wins where the lower bound is above it
        sides = torch.where((x if low is None else x.clamp(min=low)) > high, 1, sides)
    return sides.to(torch.int8)


def _apply_sides(x: Tensor, sides: Tensor, low: Any = None, high: Any = None) -> Tensor:
    for bound, beyond in ((low, sides < 0), (high, sides > 0)):
        if isinstance(bound, Tensor):
            x = torch.where(beyond, bound.to(x.dtype), x)
        elif bound is not None:  # a number is an argument of the kernel; a tensor of it would be copied from the host
            x = x.masked_fill(beyond, bound)
    return x


def _keep_strict(x: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Tensor:
    """The sides for hardtanh, whose derivative on a bound is 0."""
    return (x >= max_val).to(torch.int8) - (x <= min_val).to(torch.int8)


def _leaky(x: Tensor, positive: Tensor, negative_slope: float = 0.01) -> Tensor:
    return torch.where(positive, x, x * negative_slope)


def _prelu(x: Tensor, positive: Tensor, weight: Tensor) -> Tensor:
    if weight.numel() > 1:  # one slope per channel
        weight = weight.view(-1, *[1] * (x.dim() - 2))
    return torch.where(positive, x, x * weight)


class Chosen(Rule):
    """Functions that take elements along a dimension and say which: max(dim), sort, topk, median(dim), cummax, …

    ``position`` is where the dimension stands among the arguments, ``default`` what it is where it is not given.
    Without a second output, as of median() and max(), the elements equal to the value share the gradient.
    """

    def __init__(self, position: int, default: int | None = -1) -> None:
        self.position, self.default = position, default

    def record(self, run: Run, function: Function, args: Any, kwargs: Any) -> tuple[Any, Any]:
        out = function(*args, **kwargs)
        x = args[0]
        if not isinstance(out, tuple):
            with torch.no_grad():
                chosen = x == out
                return out, (None, chosen, chosen.sum(), None)
        dim = kwargs.get("dim", args[self.position] if len(args) > self.position else self.default)
        indices = out[1] if out[1].dim() == x.dim() else out[1].unsqueeze(dim)
        return out, (dim, indices.clone(), None, type(out))

    def replay(self, run: Run, saved: Any, function: Function, args: Any, kwargs: Any) -> Any:
        dim, chosen, count, kind = saved
        x = args[0]
        if kind is None:
            return torch.where(chosen, x, 0).sum() / count
        values = x.gather(dim, chosen) if x.dim() else x.clone()
        flat = values.dim() and not self._keeps(function, args, kwargs, chosen)
        indices = chosen.squeeze(dim) if flat else chosen.clone()
        return kind((values.squeeze(dim) if flat else values, indices))

    def _keeps(self, function: Function, args: Any, kwargs: Any, chosen: Tensor) -> bool:
        """Whether the dimension stays in the output: always for sort and its like, where ``keepdim`` for the others."""
        if getattr(function, "__name__", "") in ("sort", "topk", "cummax", "cummin"):
            return True
        keepdim = kwargs.get("keepdim", args[self.position + 1] if len(args) > self.position + 1 else False)
        return bool(keepdim)


class Extremum(Rule):
    """maximum and minimum of two tensors, amax and amin; max and min in all their forms."""

    along = Chosen(1, None)

    def record(self, run: Run, function: Function, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if len(args) > 1 and isinstance(args[1], Tensor):
            x, other = args[:2]
            out = function(*args, **kwargs)
            with torch.no_grad():  # 1 where it is x, -1 where it is the other, 0 where they are equal and share
                return out, (out == x).to(torch.int8) - (out == other).to(torch.int8)
        if "amax" not in function.__name__ and "amin" not in function.__name__:
            return self.along.record(run, function, args, kwargs)
        out = function(*args, **kwargs)
        x, dims, keepdim = self._over(args)
        with torch.no_grad():  # equal elements share the gradient
            full = out
            if not keepdim:
                for dim in sorted(d % x.dim() for d in dims):
                    full = full.unsqueeze(dim)
            chosen = x == full
            return out, (chosen, chosen.sum(dims, keepdim=True))

    def replay(self, run: Run, saved: Any, function: Function, args: Any, kwargs: Any) -> Any:
        if isinstance(saved, Tensor):
            x, other = args[:2]
            return torch.where(saved > 0, x, torch.where(saved < 0, other, 0.5 * (x + other)))
        if len(saved) == 4:
            return self.along.replay(run, saved, function, args, kwargs)
        chosen, count = saved
        x, dims, keepdim = self._over(args)
        return (torch.where(chosen, x, 0) / count).sum(dims, keepdim=keepdim)

    @staticmethod
    def _over(args: Any) -> tuple[Tensor, tuple[int, ...], bool]:
        """The input, the dimensions that amax and amin go over, and whether those stay."""
        x: Tensor = args[0]
        dims: Any = args[1] if len(args) > 1 else ()
        keepdim = bool(args[2]) if len(args) > 2 else False
        if isinstance(dims, int):
            return x, (dims,), keepdim
        return x, tuple(dims or range(x.dim())), keepdim


class ScatterExtremum(Rule):
    """scatter_reduce by amax or amin, whose equal elements share the gradient."""

    def record(self, run: Run, function: Function, args: Any, kwargs: Any) -> tuple[Any, Any]:
        x, dim, index, source, _ = args
        inplace = names_inplace(function)
        before = x.detach().clone() if inplace else x
        out = function(*args, **kwargs)
        with torch.no_grad():
            from_source = source[tuple(slice(n) for n in index.shape)] == out.gather(dim, index)
            own = before == out
            if not kwargs.get("include_self", True):  # what nothing was scattered to stays
                own = torch.zeros_like(own, dtype=torch.int64).scatter_add(dim, index, torch.ones_like(index)) == 0
            count = own.to(x.dtype).scatter_add(dim, index, from_source.to(x.dtype))
        return out, (own, from_source, count)

    def replay(self, run: Run, saved: Any, function: Function, args: Any, kwargs: Any) -> Any:
        x, dim, index, source, _ = args
        own, from_source, count = saved
        source = source[tuple(slice(n) for n in index.shape)]
        out = torch.where(own, x, 0).scatter_add(dim, index, torch.where(from_source, source, 0)) / count
        return x.copy_(out) if names_inplace(function) else out


class MaxPool(Rule):
    """max_pool and adaptive_max_pool in 1, 2 and 3 dimensions."""

    def __init__(self, dims: int, with_indices: Function, adaptive: bool = False) -> None:
        self.dims, self.with_indices, self.adaptive = dims, with_indices, adaptive

    def geometry(
        self,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> tuple[tuple[Any, ...], bool]:
        """The arguments of a pool after its input, as the operators want them."""
        pairs = [
            [value] * self.dims if isinstance(value, int) else list(value)
            for value in (
                kernel_size,
                stride if stride is not None and stride != [] else kernel_size,
                padding,
                dilation,
            )
        ]
        return (*pairs, ceil_mode), return_indices

    def arguments(self, args: Any, kwargs: Any) -> tuple[Tensor, Any, bool]:
        """The input, the geometry, and whether the caller wants the indices."""
        kwargs = dict(kwargs)
        x, *rest = (kwargs.pop("input"), *args) if "input" in kwargs else args
        if self.adaptive:
            size = rest[0] if rest else kwargs["output_size"]
            return x, (size,), bool(kwargs.get("return_indices", rest[1] if len(rest) > 1 else False))
        geometry, return_indices = self.geometry(*rest, **kwargs)
        return x, geometry, return_indices

    def record(self, run: Run, function: Function, args: Any, kwargs: Any) -> tuple[Any, Any]:
        x, geometry, return_indices = self.arguments(args, kwargs)
        return_indices = return_indices or function.__name__.endswith("with_indices")
        if not return_indices and self.plain(x, geometry):
            window, stride = geometry[:2]
            after = self.passage(run, x)
            out, indices = gated.max_pool2d(x, tuple(window), tuple(stride), after)
            return out, (indices, after is not None)
        out, indices = self.with_indices(x, *geometry)
        return (out, indices) if return_indices else out, (indices.int(), False)

    def replay(self, run: Run, saved: Any, function: Function, args: Any, kwargs: Any) -> Any:
        x, _, return_indices = self.arguments(args, kwargs)
        return_indices = return_indices or function.__name__.endswith("with_indices")
        indices, closed = saved  # closed: the indices hold the gates of the ReLU before, too
        out = gated.take(x, indices, self.dims, self.passage(run, x) if closed else None)
        return (out, indices.long()) if return_indices else out

    def plain(self, x: Tensor, geometry: tuple[Any, ...]) -> bool:
        """Whether this is a pool in two dimensions without padding, dilation or rounding up, in row-major memory."""
        if self.dims != 2 or self.adaptive or not x.is_contiguous():
            return False
        _, _, padding, dilation, ceil_mode = geometry
        return not ceil_mode and padding == [0, 0] and dilation == [1, 1]

    def passage(self, run: Run, x: Tensor) -> Passage | None:
        """The ReLU that ``x`` comes from, if its output went straight here."""
        return run.last if run.last is not None and run.last.leads_to(x) else None


class Embedding(Rule):
    """An embedding with a padding index: autograd gives its row no gradient there, so there it is as it was at θ."""

    def record(self, run: Run, function: Function, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if _by_frequency(*args):
            raise NotImplementedError(
                "model: an embedding with scale_grad_by_freq=True divides its gradient by how often an index occurs, "
                "which is the gradient of no function: R has no derivative. Use scale_grad_by_freq=False"
            )
        weight, _, padding = self.arguments(args)
        row = weight[padding].detach().clone()
        return function(*args, **kwargs), row

    def replay(self, run: Run, saved: Any, function: Function, args: Any, kwargs: Any) -> Any:
        out = function(*args, **kwargs)
        weight, indices, padding = self.arguments(args)
        return torch.where((indices == padding % len(weight)).unsqueeze(-1), saved.to(out.dtype), out)

    @staticmethod
    def arguments(args: Any) -> tuple[Tensor, Tensor, int]:
        """Weight, indices and padding index, of F.embedding(indices, weight) or torch.embedding(weight, indices)."""
        first, second, padding = args[:3]
        weight, indices = (first, second) if first.is_floating_point() else (second, first)
        return weight, indices, padding

    @staticmethod
    def padding_of(first: Tensor, second: Tensor, padding: int | None = None, *_: Any) -> int | None:
        """The padding index; None where there is none."""
        none = padding is None or (padding < 0 and first.is_floating_point())  # torch.embedding has -1 for none
        return None if none else padding


def _by_frequency(first: Tensor, *rest: Any) -> bool:
    """Whether the arguments of F.embedding, or of torch.embedding, have ``scale_grad_by_freq``."""
    place = 2 if first.is_floating_point() else 4
    return len(rest) > place and bool(rest[place])


class RandomizedLeaky(Rule):
    """rrelu, which draws a slope for each negative element in training."""

    def record(self, run: Run, function: Function, args: Any, kwargs: Any) -> tuple[Any, Any]:
        x = args[0].detach().clone()
        out = function(*args, **kwargs)
        with torch.no_grad():
            return out, torch.where(x >= 0, 1.0, out / x)

    def replay(self, run: Run, saved: Any, function: Function, args: Any, kwargs: Any) -> Any:
        x, inplace = args[0], names_inplace(function) or bool(args[4] if len(args) > 4 else kwargs.get("inplace"))
        return x.mul_(saved) if inplace else x * saved


# ---- functions written by others -------------------------------------------------------------------------------------


def _exponential_unit(x: Tensor, alpha: float, scale: float = 1.0) -> Tensor:
    positive = x > 0
    negative = torch.where(positive, 0.0, x)  # or the branch not taken overflows, and 0·∞ is its gradient
    return torch.where(positive, scale * x, (scale * alpha) * torch.expm1(negative))


def _norm(x: Tensor, p: Any, dim: Any = None, keepdim: bool = False, *_: Any, **__: Any) -> Tensor:
    """The norm for p = 1, ∞ or −∞."""
    dims = tuple(range(x.dim())) if dim is None else dim
    if p == 1:
        return x.abs().sum(dims, keepdim=keepdim)
    return x.abs().amax(dims, keepdim) if p > 0 else x.abs().amin(dims, keepdim)


def _norm_is_smooth(x: Tensor, p: Any = 2, *_: Any, **__: Any) -> bool:
    return p not in (1, math.inf, -math.inf)


def _general_norm_is_smooth(x: Tensor, p: Any = None, dim: Any = None, *_: Any, **__: Any) -> bool:
    """torch.linalg.norm, of vectors or of matrices."""
    vector = isinstance(dim, int) or (x.dim() == 1 and dim is None) or (dim is not None and len(dim) == 1)
    return p is None or p == "fro" or (vector and _norm_is_smooth(x, p))


def _l1_loss(x: Tensor, y: Tensor, reduction: int = 1) -> Tensor:
    distance = (x - y).abs()
    return distance if reduction == 0 else distance.mean() if reduction == 1 else distance.sum()


def _copysign(x: Tensor, y: Any) -> Tensor:
    negative = torch.signbit(y) if isinstance(y, Tensor) else math.copysign(1.0, y) < 0
    return x.abs() * torch.where(negative, -1.0, 1.0) if isinstance(negative, Tensor) else x.abs() * (-1) ** negative


def _aminmax(x: Tensor, *, dim: int | None = None, keepdim: bool = False) -> Any:
    dims = () if dim is None else dim
    found = torch.amin(x, dims, keepdim), torch.amax(x, dims, keepdim)
    return torch.return_types.aminmax(found)


def _div(x: Tensor, y: Any, *, rounding_mode: str) -> Tensor:
    return torch.floor(x / y) if rounding_mode == "floor" else torch.trunc(x / y)


# ---- the table -------------------------------------------------------------------------------------------------------


def always(*_: Any, **__: Any) -> bool:
    """A function that is smooth whatever its arguments."""
    return True


def never(*_: Any, **__: Any) -> bool:
    """A function that has kinks whatever its arguments."""
    return False


@dataclass(frozen=True)
class Known:
    """What is known of a function.

    Attributes:
        name: of the family.
        rule: for its kinks; None where there is none.
        draws: whether it may draw random numbers.
        smooth: whether a call with these arguments is smooth.
    """

    name: str
    rule: Rule | None = None
    draws: bool = False
    smooth: Callable[..., bool] = never


_SMOOTH_CALL = Known("smooth", smooth=always)
_DRAWING_CALL = Known("smooth", draws=True, smooth=always)


_PLACES: tuple[Any, ...] = (torch, Tensor, F, torch._C._nn, torch.special, torch.linalg, torch.fft)

_SMOOTH = """
exp exp2 expm1 log log2 log10 log1p sin cos tan asin acos atan arcsin arccos arctan sinh cosh asinh acosh atanh
arcsinh arccosh arctanh sinc erf erfc erfinv erfcx lgamma gammaln digamma psi polygamma mvlgamma multigammaln logit
sigmoid expit tanh mish silu gelu logsigmoid log_sigmoid softplus celu tanhshrink logaddexp logaddexp2 hypot atan2
arctan2 xlogy xlog1py entr i0 i0e i1 i1e ndtr ndtri log_ndtr square sqrt rsqrt reciprocal pow float_power neg negative
positive deg2rad rad2deg conj conj_physical resolve_conj resolve_neg real imag view_as_real view_as_complex complex
polar nan_to_num cumprod prod cumsum logcumsumexp logsumexp softmax log_softmax var std var_mean std_mean mean nanmean
nansum sum cov corrcoef trapz trapezoid cumulative_trapezoid gradient mm mv bmm matmul dot vdot inner outer ger addmm
addmv addbmm baddbmm addr sspaddmm chain_matmul multi_dot tensordot kron cross einsum bilinear linear vecdot trilinear
inv inverse pinv pinverse det slogdet logdet solve solve_ex solve_triangular triangular_solve cholesky cholesky_ex
cholesky_inverse cholesky_solve qr svd svdvals eigh eigvalsh eig eigvals lstsq lu lu_factor lu_factor_ex lu_solve
matrix_exp matrix_power householder_product orgqr tensorinv tensorsolve vander fft ifft rfft irfft hfft ihfft fft2
ifft2 rfft2 irfft2 hfft2 ihfft2 fftn ifftn rfftn irfftn hfftn ihfftn fftshift ifftshift stft istft conv1d conv2d
conv3d conv_transpose1d conv_transpose2d conv_transpose3d conv_tbc convolution embedding batch_norm native_batch_norm
instance_norm group_norm native_group_norm layer_norm native_layer_norm rms_norm local_response_norm avg_pool1d
avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d interpolate upsample
upsample_nearest upsample_bilinear affine_grid max_unpool1d max_unpool2d max_unpool3d glu cross_entropy nll_loss
nll_loss_nd nll_loss2d mse_loss kl_div binary_cross_entropy binary_cross_entropy_with_logits smooth_l1_loss huber_loss
soft_margin_loss ctc_loss cosine_similarity weight_norm _weight_norm add sub subtract mul multiply div divide
true_divide rsub addcmul addcdiv lerp __add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ __mul__ __rmul__ __imul__
__truediv__ __rtruediv__ __itruediv__ __rdiv__ __pow__ __rpow__ __ipow__ __neg__ __pos__ __matmul__ __rmatmul__ ldexp
view reshape reshape_as view_as flatten ravel unflatten permute transpose t swapaxes swapdims movedim moveaxis squeeze
unsqueeze expand expand_as broadcast_to broadcast_tensors contiguous clone narrow narrow_copy select slice
index_select gather take take_along_dim __getitem__ __setitem__ __iter__ chunk split split_with_sizes tensor_split
hsplit vsplit dsplit unsafe_chunk unsafe_split unbind roll flip fliplr flipud rot90 tril triu diag diagonal diag_embed
diagflat diagonal_copy trace repeat repeat_interleave tile meshgrid cartesian_prod combinations block_diag masked_fill
masked_select masked_scatter scatter scatter_add index_add index_copy index_put index_fill put fill_ zero_ copy_
select_scatter slice_scatter diagonal_scatter as_strided as_strided_scatter where pad constant_pad_nd cat concat
concatenate stack hstack vstack dstack row_stack column_stack atleast_1d atleast_2d atleast_3d adjoint diff unfold
fold pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle unfold_copy to type float double half
bfloat16 cfloat cdouble cpu cuda to_dense to_sparse coalesce sparse_mask squeeze_copy requires_grad_ retain_grad
register_hook __deepcopy__ alias _pack_padded_sequence _pad_packed_sequence values softmin sum_to_size view_copy
expand_copy alias_copy detach_copy __reversed__ unsafe_split_with_sizes lstm_cell gru_cell rnn_tanh_cell _sparse_mm
_make_dual _unpack_dual grouped_mm _grouped_mm
"""

_WITHOUT_DERIVATIVE = """
eq ne lt le gt ge equal not_equal less less_equal greater greater_equal __eq__ __ne__ __lt__ __le__ __gt__ __ge__
__and__ __or__ __xor__ __rand__ __ror__ __rxor__ __invert__ logical_and logical_or logical_not logical_xor bitwise_and
bitwise_or bitwise_not bitwise_xor isnan isinf isfinite isclose isposinf isneginf isreal signbit isin any all
count_nonzero argmax argmin argsort argwhere nonzero bucketize searchsorted one_hot unique unique_consecutive bincount
tril_indices triu_indices detach detach_ zeros ones full empty arange eye tensor as_tensor from_numpy range
empty_strided zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty new_tensor int long
short bool byte char allclose is_nonzero item tolist numpy cumulative_trapezoid result_type
"""
"""Functions that give what autograd holds fixed, or that depend on nothing; they draw no random numbers."""

_SMOOTH_THAT_DRAW = """
lstm gru rnn_tanh scaled_dot_product_attention dropout dropout1d dropout2d dropout3d
alpha_dropout feature_dropout feature_alpha_dropout
"""

_DRAWN = """
rand rand_like randn randn_like randint randint_like randperm bernoulli bernoulli_ normal normal_ uniform_ exponential_
geometric_ cauchy_ log_normal_ random_ multinomial poisson binomial rrelu rrelu_
"""

_CONDITIONAL: dict[str, Callable[..., bool]] = {
    "abs": lambda x: x.is_complex(),
    "absolute": lambda x: x.is_complex(),
    "__abs__": lambda x: x.is_complex(),
    "angle": lambda x: x.is_complex(),
    "embedding_bag": lambda *args, **kwargs: "max" not in (*args, *kwargs.values()) and (len(args) < 5 or args[4] != 2),
    "cdist": lambda x, y, p=2.0, *_: p == 2,
    "pdist": lambda x, p=2.0: p == 2,
    "pairwise_distance": lambda x, y, p=2.0, *_: p == 2,
    "grid_sample": lambda x, grid, *_, **__: not grid.requires_grad,
    "grid_sampler": lambda x, grid, *_, **__: not grid.requires_grad,
    "index_reduce": lambda *args, **kwargs: args[-1] in ("prod", "mean"),
    "embedding": lambda *args, **__: Embedding.padding_of(*args) is None and not _by_frequency(*args),
    "scatter_reduce": lambda *args, **__: args[-1] not in ("amax", "amin"),
    "elu": lambda x, alpha=1.0, *_, **__: alpha == 1.0,
    "norm": _norm_is_smooth,
    "vector_norm": _norm_is_smooth,
    "dist": lambda x, y, p=2: _norm_is_smooth(x, p),
    "matrix_norm": lambda x, p="fro", *_, **__: p == "fro",
    "div": lambda *_, **options: options.get("rounding_mode") is None,
    "divide": lambda *_, **options: options.get("rounding_mode") is None,
}
"""Functions that are smooth with some arguments."""


def _names_of(name: str) -> list[Any]:
    return [getattr(place, name) for place in (*_PLACES, torch._VF) if hasattr(place, name)]


def _rules() -> list[tuple[str, Rule, str]]:
    """Name, rule, and the functions that it serves, each in its in-place form too."""
    bounded = lambda x, sides, low=-1.0, high=1.0: _apply_sides(x, sides, low, high)  # noqa: E731
    extremum, constant, written = Extremum(), Constant(), Written
    named: list[tuple[str, Rule, str]] = [
        ("relu", Relu(), "relu relu_"),
        (
            "relu6",
            Elementwise(lambda x: _keep_strict(x, 0.0, 6.0), lambda x, sides: _apply_sides(x, sides, 0.0, 6.0)),
            "relu6 relu6_",
        ),
        ("leaky_relu", Elementwise(lambda x, negative_slope=0.01: x > 0, _leaky), "leaky_relu leaky_relu_"),
        ("prelu", Elementwise(lambda x, weight: x > 0, _prelu), "prelu"),
        ("rrelu", RandomizedLeaky(), "rrelu rrelu_"),
        ("hardtanh", Elementwise(_keep_strict, bounded), "hardtanh hardtanh_"),
        (
            "threshold",
            Elementwise(
                lambda x, threshold, value: x > threshold,
                lambda x, above, threshold, value: torch.where(above, x, torch.full_like(x, value)),
            ),
            "threshold threshold_",
        ),
        (
            "clamp",
            Elementwise(
                lambda x, min=None, max=None: _keep_sides(x, min, max),
                lambda x, sides, min=None, max=None: _apply_sides(x, sides, min, max),
            ),
            "clamp clamp_ clip clip_ clamp_min clamp_min_",
        ),
        (
            "clamp_max",
            Elementwise(
                lambda x, max: _keep_sides(x, None, max), lambda x, sides, max: _apply_sides(x, sides, None, max)
            ),
            "clamp_max clamp_max_",
        ),
        (
            "abs",
            Elementwise(lambda x: torch.sign(x).to(torch.int8), lambda x, sign: x * sign),
            "abs abs_ absolute absolute_ __abs__",
        ),
        ("max", extremum, "max min amax amin maximum minimum fmax fmin"),
        ("aminmax", written(_aminmax), "aminmax"),
        ("sort", Chosen(1), "sort"),
        ("chosen", Chosen(2), "topk kthvalue"),
        ("median", Chosen(1), "median nanmedian mode"),
        ("cummax", Chosen(1), "cummax cummin"),
        ("msort", written(lambda x: torch.sort(x, 0)[0]), "msort"),
        ("scatter_reduce", ScatterExtremum(), "scatter_reduce scatter_reduce_"),
        ("constant", constant, "sign sgn floor ceil round trunc fix heaviside floor_divide __floordiv__ __rfloordiv__"),
        ("constant", constant, "sign_ sgn_ floor_ ceil_ round_ trunc_ fix_ heaviside_ floor_divide_ __ifloordiv__"),
        (
            "fake_quantize",
            StraightThrough(),
            "fake_quantize_per_tensor_affine fake_quantize_per_channel_affine fused_moving_avg_obs_fake_quant",
        ),
        ("remainder", Remainder(), "fmod remainder __mod__ fmod_ remainder_ __imod__"),
        ("frac", written(lambda x: x - torch.trunc(x)), "frac frac_"),
        ("elu", written(_exponential_unit, flag=True), "elu elu_"),
        (
            "selu",
            written(lambda x: _exponential_unit(x, 1.6732632423543772, 1.0507009873554805), flag=True),
            "selu selu_",
        ),
        ("hardswish", written(lambda x: x * (x + 3).clamp(0, 6) / 6, flag=True), "hardswish hardswish_"),
        ("hardsigmoid", written(lambda x: (x + 3).clamp(0, 6) / 6, flag=True), "hardsigmoid hardsigmoid_"),
        (
            "hardshrink",
            written(lambda x, lambd=0.5: torch.where((x > lambd) | (x < -lambd), x, 0.0)),
            "hardshrink",
        ),
        ("softshrink", written(lambda x, lambd=0.5: x - x.clamp(-lambd, lambd)), "softshrink"),
        ("copysign", written(_copysign), "copysign copysign_"),
        ("norm", written(_norm), "norm vector_norm"),
        ("dist", written(lambda x, y, p=2: _norm(x - y, p)), "dist"),
        ("div", written(_div), "div divide div_ divide_"),
        ("embedding", Embedding(), "embedding"),
    ]
    for n, with_indices, adaptive in (
        (1, F.max_pool1d_with_indices, F.adaptive_max_pool1d_with_indices),
        (2, F.max_pool2d_with_indices, F.adaptive_max_pool2d_with_indices),
        (3, F.max_pool3d_with_indices, F.adaptive_max_pool3d_with_indices),
    ):
        named.append((f"max_pool{n}d", MaxPool(n, with_indices), f"max_pool{n}d max_pool{n}d_with_indices"))
        name = f"adaptive_max_pool{n}d"
        named.append((name, MaxPool(n, adaptive, adaptive=True), f"{name} {name}_with_indices"))
    return named


def _table() -> dict[Function, Known]:
    table = dict.fromkeys(TAYLOR_RULES, _SMOOTH_CALL)
    undrawn = _SMOOTH + _WITHOUT_DERIVATIVE
    for names, known in ((undrawn, _SMOOTH_CALL), (_SMOOTH_THAT_DRAW, _DRAWING_CALL), (_DRAWN, _DRAWING_CALL)):
        for name in names.split():
            table |= dict.fromkeys(_names_of(name) + _names_of(f"{name}_"), known)
    for attribute in ("T", "mT", "H", "mH", "real", "imag", "data", "grad"):
        table[getattr(Tensor, attribute).__get__] = _SMOOTH_CALL
    rules = _rules()
    served = {name for _, _, functions in rules for name in functions.split()}
    for name, rule, functions in rules:
        for function_name in functions.split():
            smooth = _CONDITIONAL.get(function_name, _CONDITIONAL.get(function_name.rstrip("_"), never))
            table |= dict.fromkeys(_names_of(function_name), Known(name, rule, name == "rrelu", smooth))
    for name, smooth in _CONDITIONAL.items():
        if name not in served:
            table |= dict.fromkeys(_names_of(name), Known(name, smooth=smooth))
    table[torch.autograd.grad] = _SMOOTH_CALL  # its backward passes the gates of what it differentiates
    table |= dict.fromkeys((torch.sparse.mm, torch.sparse.addmm), _SMOOTH_CALL)
    table[torch._C._nn.l1_loss] = Known("l1_loss", Written(_l1_loss))
    table[torch.linalg.norm] = Known("linalg.norm", smooth=_general_norm_is_smooth)
    for function in (torch._C._nn.elu, torch._C._nn.elu_):  # arguments other than F.elu's, which alone calls it
        table.pop(function, None)
    table.pop(F.multi_head_attention_forward, None)  # opened, so that what it calls is seen
    return table


KNOWN = _table()
"""By function, what is known of it."""

DROPOUTS: dict[Function, Known] = dict.fromkeys(
    (F.dropout, torch.dropout, torch.dropout_, F.dropout1d, F.dropout2d, F.dropout3d), Known("dropout", Dropout())
)
"""With the masks kept instead of the random state, as CUDA graphs need it."""

_DROPOUT_NAMES = """
alpha_dropout alpha_dropout_ feature_dropout feature_alpha_dropout feature_dropout_ feature_alpha_dropout_ dropout
dropout_ dropout1d dropout2d dropout3d
"""
_RANDOM = {
    function: name for name in (_DRAWN + _DROPOUT_NAMES + " gumbel_softmax").split() for function in _names_of(name)
}


def refuse_random(function: Function, args: Any, kwargs: Any) -> None:
    """Raises ValueError where the call draws random numbers that nothing keeps."""
    name = _RANDOM.get(function)
    if function is F.scaled_dot_product_attention and (kwargs.get("dropout_p") or (len(args) > 4 and args[4])):
        name = "scaled_dot_product_attention"
    off = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 and isinstance(args[2], bool) else True))
    if name is not None and off is not False:
        raise ValueError(
            f"graphs: {name} draws random numbers in the forward, which a captured step cannot repeat in its second "
            'forward; dropout with gates="frozen" can be repeated, anything else needs graphs=False'
        )
