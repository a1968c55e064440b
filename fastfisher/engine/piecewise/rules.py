"""What a rule for a function with kinks is, and the rules that work element by element."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastfisher.engine.calls import Function, argument, split_inplace, writes_first
from fastfisher.engine.fused import relu_pool
from fastfisher.engine.fused.batch_norm import relu_after
from fastfisher.engine.fused.relu_pool import Passage


class Run:
    """The forward that a call belongs to; this one records nothing.

    Attributes:
        last: the last ReLU, for a max-pool right after it.
    """

    last: Passage | None = None

    def within(self) -> AbstractContextManager[Any]:
        """A context in which the calls that a rule makes are recorded or replayed like the model's own."""
        return nullcontext()


class Rule:
    """How one family of functions is recorded and replayed; arguments come in the positions of the signature."""

    def record(self, run: Run, function: Function, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The function's own output, and what the replay needs."""
        raise NotImplementedError

    def replay(self, run: Run, saved: Any, function: Function, args: Any, kwargs: Any) -> Any:
        """The output of the call with the recorded gates."""
        raise NotImplementedError


class Sided(Rule):
    """A function that is linear on each side of the kinks of each element.

    ``keep(x, *parameters)`` finds the side of each element, ``apply(x, sides, *parameters)`` is the function there: a
    multiple of x on each side, or of one that is ``bounded`` x itself on side 0 and a constant on the others.
    """

    def __init__(self, keep: Callable[..., Tensor], apply: Callable[..., Tensor], *, bounded: bool = False) -> None:
        self.keep, self.apply, self.bounded = keep, apply, bounded

    def record(self, run: Run, function: Function, args: Any, kwargs: Any) -> tuple[Any, Any]:
        positional, named, _ = split_inplace(function, args, kwargs)
        with torch.no_grad():
            saved = self.keep(*positional, **named)  # before the call, which may overwrite its input
        return function(*args, **kwargs), saved

    def replay(self, run: Run, saved: Any, function: Function, args: Any, kwargs: Any) -> Any:
        (x, *parameters), named, inplace = split_inplace(function, args, kwargs)
        out = self.apply(x, saved, *parameters, **named)
        return x.copy_(out) if inplace else out

    def linear_in(self, args: Any) -> tuple[int, ...]:
        """The places of the arguments that may move where the other ones stand still."""
        return (0,)

    def slope(self, x: Tensor, *parameters: Any, **named: Any) -> Tensor:
        """The derivative at each element."""
        with torch.no_grad():
            sides = self.keep(x, *parameters, **named)
            return sides == 0 if self.bounded else self.apply(torch.ones_like(x), sides, *parameters, **named)


class Written(Rule):
    """A function that is written by others which are recorded and replayed themselves."""

    def __init__(self, write: Callable[..., Tensor]) -> None:
        self.write = write

    def record(self, run: Run, function: Function, args: Any, kwargs: Any) -> tuple[Any, Any]:
        (x, *rest), kwargs, inplace = split_inplace(function, args, kwargs)
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
        return out, out.detach().clone() if writes_first(function) else out.detach()

    def replay(self, run: Run, saved: Any, function: Function, args: Any, kwargs: Any) -> Any:
        # Its value is not used, but its node in the graph is: autograd must follow here what it followed at θ.
        out = function(*args, **kwargs)
        if saved is None or out.shape != saved.shape:
            return out
        if writes_first(function):
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

    The replay is that line, through the recorded value. The call is made again for what it may write: an observer.
    """

    def record(self, run: Run, function: Function, args: Any, kwargs: Any) -> tuple[Any, Any]:
        x, *rest = args
        if not x.requires_grad:
            return function(*args, **kwargs), None
        alone = x.detach().requires_grad_()
        out = function(alone, *rest, **kwargs)
        (slope,) = torch.autograd.grad(out, alone, torch.ones_like(out))
        saved = slope, out.detach() - slope * alone.detach()
        return self._line(x, *saved), saved

    def replay(self, run: Run, saved: Any, function: Function, args: Any, kwargs: Any) -> Any:
        x, *rest = args
        out = function(x.detach(), *rest, **kwargs)
        return out if saved is None else self._line(x, *saved)

    @staticmethod
    def _line(x: Tensor, slope: Tensor, rest: Tensor) -> Tensor:
        return x * slope + rest


class Remainder(Rule):
    """x − n y for the whole number n of the call: fmod and remainder."""

    def record(self, run: Run, function: Function, args: Any, kwargs: Any) -> tuple[Any, Any]:
        x, y = args
        with torch.no_grad():
            before = x.clone() if writes_first(function) else x
        out = function(*args, **kwargs)
        with torch.no_grad():
            return out, ((before - out) / y).round()

    def replay(self, run: Run, saved: Any, function: Function, args: Any, kwargs: Any) -> Any:
        x, y = args
        out = x - saved * y
        return x.copy_(out) if writes_first(function) else out


class Relu(Rule):
    """ReLU, which keeps bits instead of its output, and is remembered for a max-pool after it."""

    def record(self, run: Run, function: Function, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return self._call(run, None, function, args, kwargs)

    def replay(self, run: Run, saved: Any, function: Function, args: Any, kwargs: Any) -> Any:
        return self._call(run, saved, function, args, kwargs)[0]

    def _call(
        self, run: Run, gates: Passage | None, function: Function, args: Any, kwargs: Any
    ) -> tuple[Tensor, Passage]:
        """The output, by the given gates or its own, and its passage."""
        (x, *_), _, inplace = split_inplace(function, args, kwargs)
        by = relu_after(x) or relu_pool.gate
        out, run.last = relu_pool.relu(x, inplace=inplace, gates=gates, by=by)
        return out, run.last


class LeakyRelu(Sided):
    """leaky_relu, which keeps bits as ReLU does. To a max-pool it is no ReLU: a gradient passes its closed gates."""

    def record(self, run: Run, function: Function, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return self._call(None, function, args, kwargs)

    def replay(self, run: Run, saved: Any, function: Function, args: Any, kwargs: Any) -> Any:
        return self._call(saved, function, args, kwargs)[0]

    @staticmethod
    def _call(gates: Passage | None, function: Function, args: Any, kwargs: Any) -> tuple[Tensor, Passage]:
        _, _, inplace = split_inplace(function, args, kwargs)
        slope = float(argument(function, args, kwargs, "negative_slope", 0.01))
        return relu_pool.relu(args[0], inplace=inplace, gates=gates, slope=slope)


class Dropout(Rule):
    """A dropout, of elements or of whole channels, that keeps its mask.

    ``channels`` is the number of dimensions of the inputs of one that drops channels, None of one that drops elements.
    """

    def __init__(self, channels: int | None = None) -> None:
        self.channels = channels

    def record(self, run: Run, function: Function, args: Any, kwargs: Any) -> tuple[Any, Any]:
        x, p, on, inplace = self._arguments(function, args, kwargs)
        if not on or p == 0.0:
            return function(*args, **kwargs), None
        if self.channels not in (None, x.dim()):  # an input without a batch dimension has its channels elsewhere
            raise unrepeatable(function)
        shape = x.shape if self.channels is None else torch.Size([*x.shape[:2], *[1] * (x.dim() - 2)])
        mask = torch.empty(shape, dtype=torch.bool, device=x.device).bernoulli_(1.0 - p)
        return self._apply(x, mask, p, inplace), mask

    def replay(self, run: Run, saved: Any, function: Function, args: Any, kwargs: Any) -> Any:
        x, p, _, inplace = self._arguments(function, args, kwargs)
        return function(*args, **kwargs) if saved is None else self._apply(x, saved, p, inplace)

    @staticmethod
    def _apply(x: Tensor, mask: Tensor, p: float, inplace: bool) -> Tensor:
        scale = 0.0 if p == 1.0 else 1.0 / (1.0 - p)
        return x.mul_(mask).mul_(scale) if inplace else (x * mask).mul_(scale)

    @staticmethod
    def _arguments(function: Function, args: Any, kwargs: Any) -> tuple[Tensor, float, bool, bool]:
        """Input, p, whether it drops anything, and inplace."""
        _, _, inplace = split_inplace(function, args, kwargs)
        return args[0], argument(function, args, kwargs, "p"), drops(function, args, kwargs), inplace


def unrepeatable(function: Function) -> ValueError:
    """The error where a function draws random numbers that nothing keeps."""
    return ValueError(
        f"graphs: {function.__name__} draws random numbers in the forward, which a captured step cannot repeat in its "
        'second forward; dropout with gates="frozen" can be repeated, anything else needs graphs=False'
    )


def drops(function: Function, args: Any, kwargs: Any) -> bool:
    """Whether a dropout or its like is on: by ``training``, of functionals, or ``train``, of operators."""
    train = argument(function, args, kwargs, "train", True)
    return argument(function, args, kwargs, "training", train) is not False


class Embedding(Rule):
    """An embedding with a padding index: autograd gives its row no gradient there, so there it is as it was at θ."""

    def record(self, run: Run, function: Function, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if argument(function, args, kwargs, "scale_grad_by_freq"):
            raise NotImplementedError(
                "model: an embedding with scale_grad_by_freq=True divides its gradient by how often an index occurs, "
                "which is the gradient of no function: R has no derivative. Use scale_grad_by_freq=False"
            )
        weight, _, padding = self._arguments(function, args, kwargs)
        row = weight[padding].detach().clone()
        return function(*args, **kwargs), row

    def replay(self, run: Run, saved: Any, function: Function, args: Any, kwargs: Any) -> Any:
        out = function(*args, **kwargs)
        weight, indices, padding = self._arguments(function, args, kwargs)
        assert padding is not None
        return torch.where((indices == padding % len(weight)).unsqueeze(-1), saved.to(out.dtype), out)

    @classmethod
    def is_smooth(cls, function: Function, *args: Any, **kwargs: Any) -> bool:
        """Whether a call has neither a padding index nor gradients divided by frequency."""
        _, _, padding = cls._arguments(function, args, kwargs)
        return padding is None and not argument(function, args, kwargs, "scale_grad_by_freq")

    @staticmethod
    def _arguments(function: Function, args: Any, kwargs: Any) -> tuple[Tensor, Tensor, int | None]:
        """Weight, indices and padding index, of F.embedding(input, weight) or torch.embedding(weight, indices)."""
        weight, indices, padding = (argument(function, args, kwargs, n) for n in ("weight", "indices", "padding_idx"))
        if indices is None:
            return weight, argument(function, args, kwargs, "input"), padding
        return weight, indices, None if padding < 0 else padding  # -1 stands for none


class RandomizedLeaky(Rule):
    """rrelu, which draws a slope for each negative element in training."""

    def record(self, run: Run, function: Function, args: Any, kwargs: Any) -> tuple[Any, Any]:
        x = args[0].detach().clone()
        out = function(*args, **kwargs)
        with torch.no_grad():
            return out, torch.where(x >= 0, 1.0, out / x)

    def replay(self, run: Run, saved: Any, function: Function, args: Any, kwargs: Any) -> Any:
        _, _, inplace = split_inplace(function, args, kwargs)
        return args[0].mul_(saved) if inplace else args[0] * saved
