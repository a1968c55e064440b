"""Records the gates of a forward (ReLU masks, max-pool indices, …) and replays them in another.

Finite differences of the gradient converge to the Hessian that autograd sees only where no kink lies between the two
points, and in a ReLU network kinks are everywhere. Replaying at θ + ρd the gates of the forward at θ leaves a network
that is smooth in ρ, with the same value, gradient and (autograd's) Hessian at θ.

Recorded, replayed or neither (:func:`fused_forward`), a forward of the penalty runs ReLU, max-pool, large convolutions
and batch normalisation through our own Functions, which take less time and memory.

A replayed forward also repeats every random draw of the recorded one (dropout masks, stochastic depth): the state of
the random number generators at the start of the recording is restored for the replay, and the caller's put back.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fastfisher import gated, ops
from fastfisher.arguments import check_flags, check_model
from fastfisher.convolution import in_pieces
from fastfisher.gated import Passage
from fastfisher.model import is_compiled, uncompiled
from fastfisher.normalization import by_batch, relu_after


@dataclass
class RandomState:
    """The states of the CPU's and of some devices' default generators."""

    cpu: Tensor
    cuda: dict[int, Tensor]

    @classmethod
    def current(cls, devices: frozenset[int]) -> RandomState:
        """The states now, for the CPU and the CUDA devices given by index."""
        return cls(torch.get_rng_state(), {i: torch.cuda.get_rng_state(i) for i in devices})

    def restore(self) -> None:
        """Puts the generators into these states."""
        torch.set_rng_state(self.cpu)
        for index, state in self.cuda.items():
            torch.cuda.set_rng_state(state, index)


@dataclass
class _Entry:
    """One gated call: the rule's name, the shape it produced, and what its replay needs."""

    rule: str
    shape: torch.Size
    saved: Any


@dataclass
class Gates:
    """The gates of one forward. Made by :func:`record_gates`; pass it as ``gates=`` beside ``logits=``.

    Attributes:
        random: the state of the random number generators when the recording began.
        frozen: whether there are gates to replay.
        model: the model that ran.
        autocast: the dtype of an autocast met within the forward, which its caller need not know of.
        entries: the gated calls in order.
    """

    random: RandomState | None
    frozen: bool = True
    model: torch.nn.Module | None = None
    autocast: torch.dtype | None = None
    entries: list[_Entry] = field(default_factory=list)

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Within, gated calls repeat the recorded gates in order, and random draws repeat the recorded ones.

        Raises:
            RuntimeError: the forward took another path than the recorded one.
        """
        if self.random is None:
            with self._replay_gates():
                yield
            return
        outer = RandomState.current(frozenset(self.random.cuda))
        self.random.restore()
        try:
            with self._replay_gates():
                yield
        finally:
            outer.restore()

    @contextmanager
    def _replay_gates(self) -> Iterator[None]:
        if not self.frozen:
            yield
            return
        with (
            uncompiled(self.model, _FROZEN),
            _Replay(self.entries, keep_random=self.random is None) as replay,
        ):
            yield
        replay.check_complete()


_FROZEN = 'gates="frozen", unlike gates="free",'


@contextmanager
def record_gates(model: torch.nn.Module | None = None, *, frozen: bool = True, rewind: bool = True) -> Iterator[Gates]:
    """Records the gates and the random state of the forward run within.

    Example:
        >>> with fastfisher.record_gates(model) as gates:
        ...     logits = model(inputs)
        >>> penalty = fastfisher.penalty(model, inputs, logits=logits, method="finite_difference", gates=gates)

    Args:
        model: the model about to run; tells which CUDA devices' random states matter.
        frozen: False records the random state alone (for ``gates="free"``).
        rewind: False keeps the masks of dropout instead of the random state, which a CUDA graph cannot go back to.

    Raises:
        ValueError: a module is a TorchScript module, which hides its gates; or, without ``rewind``, a function draws
            numbers that are not those of a dropout, or free gates meet a dropout; or a flag is no boolean.
        TypeError: ``model`` is no module.
    """
    check_flags(frozen=frozen, rewind=rewind)
    if model is not None:
        check_model(model)
    parameters = model.parameters() if model is not None else ()
    devices = frozenset(p.device.index for p in parameters if p.device.type == "cuda")
    gates = Gates(RandomState.current(devices) if rewind else None, frozen, model)
    if frozen:
        if model is not None:
            check_recordable(model)
        with uncompiled(model, _FROZEN), _Record(gates, keep_random=not rewind):
            yield gates
    elif not rewind:
        with fused_forward(model) if model is not None else nullcontext(), _NoRandom():
            yield gates
    elif model is not None:
        with fused_forward(model):
            yield gates
    else:
        yield gates


@contextmanager
def fused_forward(model: torch.nn.Module) -> Iterator[_Fused | None]:
    """Within, ReLU and max-pool run through :mod:`fastfisher.gated`, large convolutions through
    :mod:`fastfisher.convolution`, batch normalisation through :mod:`fastfisher.normalization`: less time and memory,
    and the same values and gradients up to rounding.

    Where a module is compiled or scripted, or no compiled kernel serves a tensor, PyTorch's own run as ever.
    """
    hidden = any(is_compiled(module) or isinstance(module, torch.jit.ScriptModule) for module in model.modules())
    if ops.UNAVAILABLE is not None or hidden:
        yield None
    else:
        with _Fused() as fused:
            yield fused


def check_recordable(model: torch.nn.Module) -> None:
    """Raises ValueError where a TorchScript module would hide its gates from the recording."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f'gates="frozen": module {name or "(the model itself)"!r} is a TorchScript module, so its gates cannot '
                'be recorded; pass the module it was made from, or gates="free"'
            )


# ---- rules: what a recording keeps of a call, and how a replay uses it -------------------------------------------


class _Rule:
    """How one family of functions is recorded and replayed; arguments come as the caller gave them."""

    def record(self, function: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The function's own output, and what the replay needs."""
        raise NotImplementedError

    def replay(self, saved: Any, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The output of the call with the recorded gates."""
        raise NotImplementedError


class _Elementwise(_Rule):
    """An elementwise function that is linear on each side of its kinks.

    ``keep(x, *parameters)`` finds the side of each element, ``apply(x, saved, *parameters)`` is the function there.
    """

    def __init__(self, keep: Callable[..., Any], apply: Callable[..., Tensor]) -> None:
        self.keep, self.apply = keep, apply

    @staticmethod
    def split(args: Any, kwargs: Any) -> tuple[Any, dict[str, Any], bool]:
        """Input and parameters by position, parameters by name, and whether the call works in place."""
        kwargs = dict(kwargs)
        inplace = kwargs.pop("inplace", False)
        if args and args[-1] is True:  # inplace given by position is the only boolean these functions take
            args, inplace = args[:-1], True
        elif args and args[-1] is False:
            args = args[:-1]
        if "input" in kwargs:
            args = (kwargs.pop("input"), *args)
        return args, kwargs, inplace

    def record(self, function: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, Any]:
        positional, named, _ = self.split(args, kwargs)
        with torch.no_grad():
            saved = self.keep(*positional, **named)  # before the call, which may overwrite its input
        return function(*args, **kwargs), saved

    def replay(self, saved: Any, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        (x, *parameters), named, inplace = self.split(args, kwargs)
        out = self.apply(x, saved, *parameters, **named)
        return x.copy_(out) if inplace or _names_inplace(function) else out


def _names_inplace(function: Callable[..., Any]) -> bool:
    name = getattr(function, "__name__", "")
    return name.endswith("_") and not name.endswith("__")


class _Relu(_Rule):
    """ReLU, which keeps bits instead of its output, and remembers its last call for a max-pool after it."""

    def __init__(self) -> None:
        self.last: Passage | None = None

    def record(self, function: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, Any]:
        return self.call(None, function, args, kwargs)

    def replay(self, saved: Any, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return self.call(saved, function, args, kwargs)[0]

    def call(
        self, gates: Passage | None, function: Callable[..., Any], args: Any, kwargs: Any
    ) -> tuple[Tensor, Passage]:
        """The output, by the given gates or its own, and its passage."""
        (x, *_), _, inplace = _Elementwise.split(args, kwargs)
        by = relu_after(x) or gated.gate
        out, self.last = gated.relu(x, inplace=inplace or _names_inplace(function), gates=gates, by=by)
        return out, self.last


_DIMENSIONS: dict[Callable[..., Any], int] = {F.dropout1d: 3, F.dropout2d: 4, F.dropout3d: 5}
"""Of the inputs of functions that drop channels; one without a batch has no rule."""


class _Dropout(_Rule):
    """A dropout, of elements or of whole channels, that keeps its mask."""

    def record(self, function: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, Any]:
        x, p, training, inplace = self.arguments(function, *args, **kwargs)
        if not training or p == 0.0:
            return function(*args, **kwargs), None
        shape = x.shape
        if function in _DIMENSIONS:
            if x.dim() != _DIMENSIONS[function]:
                _refuse_random(function, args, kwargs)
            shape = torch.Size([*x.shape[:2], *[1] * (x.dim() - 2)])
        mask = torch.empty(shape, dtype=torch.bool, device=x.device).bernoulli_(1.0 - p)
        return self.apply(x, mask, p, inplace), mask

    def replay(self, saved: Any, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        x, p, _, inplace = self.arguments(function, *args, **kwargs)
        return function(*args, **kwargs) if saved is None else self.apply(x, saved, p, inplace)

    @staticmethod
    def apply(x: Tensor, mask: Tensor, p: float, inplace: bool) -> Tensor:
        scale = 0.0 if p == 1.0 else 1.0 / (1.0 - p)
        return x.mul_(mask).mul_(scale) if inplace else (x * mask).mul_(scale)

    @staticmethod
    def arguments(
        function: Callable[..., Any], input: Tensor, p: float | None = None, *flags: bool, **named: bool
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
    if high is not None:
        sides = torch.where(x > high, 1, sides)
    return sides.to(torch.int8)


def _apply_sides(x: Tensor, sides: Tensor, low: Any = None, high: Any = None) -> Tensor:
    if low is not None:
        x = torch.where(sides < 0, torch.as_tensor(low, dtype=x.dtype, device=x.device), x)
    if high is not None:
        x = torch.where(sides > 0, torch.as_tensor(high, dtype=x.dtype, device=x.device), x)
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


class _Larger(_Rule):
    """maximum and minimum of two tensors, and max and min in all their forms."""

    def record(self, function: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, Any]:
        out = function(*args, **kwargs)
        x = args[0]
        with torch.no_grad():
            if self._other(args, kwargs) is not None:
                # autograd gives each of two equal elements half of the gradient
                other = self._other(args, kwargs)
                saved: Any = (0.5 * ((out == x).to(x.dtype) - (out == other).to(x.dtype)) + 0.5).to(torch.float16)
            elif isinstance(out, tuple):
                saved = out[1]
            else:  # amax, amin, max(), min(): equal elements share the gradient
                dims = kwargs.get("dim", args[1] if len(args) > 1 else ())
                keepdim = kwargs.get("keepdim", args[2] if len(args) > 2 else False)
                dims = tuple(range(x.dim())) if dims == () else (dims,) if isinstance(dims, int) else tuple(dims)
                full = out
                if not keepdim:
                    for dim in sorted(d % x.dim() for d in dims):
                        full = full.unsqueeze(dim)
                chosen = x == full
                saved = (chosen, chosen.sum(dims, keepdim=True), dims, keepdim)
        return out, saved

    def replay(self, saved: Any, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        x, other = args[0], self._other(args, kwargs)
        if other is not None:
            share = saved.to(x.dtype)
            return x * share + other * (1 - share)
        if isinstance(saved, Tensor):
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            keepdim = kwargs.get("keepdim", args[2] if len(args) > 2 else False)
            values = x.gather(dim, saved if keepdim else saved.unsqueeze(dim))
            pair = (values if keepdim else values.squeeze(dim), saved)
            return getattr(torch.return_types, function.__name__)(pair)
        chosen, count, dims, keepdim = saved
        return (torch.where(chosen, x, 0) / count).sum(dims, keepdim=keepdim)

    @staticmethod
    def _other(args: Any, kwargs: Any) -> Tensor | None:
        other = kwargs.get("other", args[1] if len(args) > 1 else None)
        return other if isinstance(other, Tensor) else None


class _MaxPool(_Rule):
    """max_pool and adaptive_max_pool in 1, 2 and 3 dimensions."""

    def __init__(self, dims: int, with_indices: Callable[..., Any], relu: _Relu, adaptive: bool = False) -> None:
        self.dims, self.with_indices, self.relu, self.adaptive = dims, with_indices, relu, adaptive

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

    def record(self, function: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, Any]:
        x, geometry, return_indices = self.arguments(args, kwargs)
        if not return_indices and self.plain(x, geometry):
            window, stride = geometry[:2]
            after = self.passage(x)
            out, indices = gated.max_pool2d(x, tuple(window), tuple(stride), after)
            return out, (indices, after is not None)
        out, indices = self.with_indices(x, *geometry)
        return (out, indices) if return_indices else out, (indices.int(), False)

    def replay(self, saved: Any, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        x, _, return_indices = self.arguments(args, kwargs)
        indices, closed = saved  # closed: the indices hold the gates of the ReLU before, too
        out = gated.take(x, indices, self.dims, self.passage(x) if closed else None)
        return (out, indices.long()) if return_indices else out

    def plain(self, x: Tensor, geometry: tuple[Any, ...]) -> bool:
        """Whether this is a pool in two dimensions without padding, dilation or rounding up, in row-major memory."""
        if self.dims != 2 or self.adaptive or not x.is_contiguous():
            return False
        _, _, padding, dilation, ceil_mode = geometry
        return not ceil_mode and padding == [0, 0] and dilation == [1, 1]

    def passage(self, x: Tensor) -> Passage | None:
        """The ReLU that ``x`` comes from, if its output went straight here."""
        last = self.relu.last
        return last if last is not None and last.leads_to(x) else None


def _rules() -> dict[Callable[..., Any], tuple[str, _Rule]]:
    relu = _Relu()
    relu6 = _Elementwise(lambda x: _keep_strict(x, 0.0, 6.0), lambda x, sides: _apply_sides(x, sides, 0.0, 6.0))
    hardtanh = _Elementwise(
        _keep_strict, lambda x, sides, min_val=-1.0, max_val=1.0: _apply_sides(x, sides, min_val, max_val)
    )
    clamp = _Elementwise(
        lambda x, min=None, max=None: _keep_sides(x, min, max),
        lambda x, sides, min=None, max=None: _apply_sides(x, sides, min, max),
    )
    clamp_max = _Elementwise(
        lambda x, max: _keep_sides(x, None, max), lambda x, sides, max: _apply_sides(x, sides, None, max)
    )
    threshold = _Elementwise(
        lambda x, threshold, value: x > threshold,
        lambda x, above, threshold, value: torch.where(above, x, torch.full_like(x, value)),
    )
    leaky = _Elementwise(lambda x, negative_slope=0.01: x > 0, _leaky)
    prelu = _Elementwise(lambda x, weight: x > 0, _prelu)
    absolute = _Elementwise(lambda x: torch.sign(x).to(torch.int8), lambda x, sign: x * sign)
    larger = _Larger()

    named: list[tuple[str, _Rule, str]] = [
        ("relu", relu, "relu relu_"),
        ("relu6", relu6, "relu6"),
        ("leaky_relu", leaky, "leaky_relu leaky_relu_"),
        ("prelu", prelu, "prelu"),
        ("hardtanh", hardtanh, "hardtanh hardtanh_"),
        ("threshold", threshold, "threshold threshold_"),
        ("clamp", clamp, "clamp clamp_ clip clip_ clamp_min clamp_min_"),
        ("clamp_max", clamp_max, "clamp_max clamp_max_"),
        ("abs", absolute, "abs abs_ absolute absolute_ __abs__"),
        ("max", larger, "max min amax amin maximum minimum fmax fmin"),
    ]
    for n, with_indices, adaptive in (
        (1, F.max_pool1d_with_indices, F.adaptive_max_pool1d_with_indices),
        (2, F.max_pool2d_with_indices, F.adaptive_max_pool2d_with_indices),
        (3, F.max_pool3d_with_indices, F.adaptive_max_pool3d_with_indices),
    ):
        named.append((f"max_pool{n}d", _MaxPool(n, with_indices, relu), f"max_pool{n}d max_pool{n}d_with_indices"))
        pool = _MaxPool(n, adaptive, relu, adaptive=True)
        name = f"adaptive_max_pool{n}d"
        named.append((name, pool, f"{name} {name}_with_indices"))
    table: dict[Callable[..., Any], tuple[str, _Rule]] = {}
    for name, rule, functions in named:
        for function in functions.split():
            for place in (torch, Tensor, F, torch._C._nn):
                if hasattr(place, function):
                    table[getattr(place, function)] = (name, rule)
    return table


_RULES = _rules()

_KINKED = "hardswish hardsigmoid hardshrink softshrink selu rrelu median kthvalue sort topk cummax cummin"
_UNREACHED = {
    getattr(place, name): name
    for name in [*_KINKED.split(), "fractional_max_pool2d", "fractional_max_pool3d"]
    for place in (torch, Tensor, F)
    if hasattr(place, name)
}
"""Functions with kinks that no rule replays: met in a recording, they are named in a warning."""


_DROPOUTS: dict[Callable[..., Any], tuple[str, _Rule]] = dict.fromkeys(
    (F.dropout, torch.dropout, torch.dropout_, F.dropout1d, F.dropout2d, F.dropout3d), ("dropout", _Dropout())
)

_DRAWN = (
    "rand rand_like randn randn_like randint randint_like randperm bernoulli bernoulli_ normal normal_ uniform_ "
    "exponential_ geometric_ cauchy_ log_normal_ random_ multinomial poisson binomial rrelu rrelu_ gumbel_softmax "
    "alpha_dropout alpha_dropout_ feature_dropout feature_alpha_dropout feature_dropout_ feature_alpha_dropout_ "
    "dropout dropout_ dropout1d dropout2d dropout3d"
)
_RANDOM = {
    getattr(place, name): name for name in _DRAWN.split() for place in (torch, Tensor, F) if hasattr(place, name)
}


def _refuse_random(function: Callable[..., Any], args: Any, kwargs: Any) -> None:
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


class _NoRandom(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        _refuse_random(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _gated(function: Callable[..., Any], args: Any, kwargs: Any, keep_random: bool = False) -> tuple[str, _Rule] | None:
    """The rule for this call, or None where the function has no gates or its input is not real-valued."""
    found = _RULES.get(function) or (_DROPOUTS.get(function) if keep_random else None)
    if found is None:
        return None
    x = args[0] if args else kwargs.get("input")
    return found if isinstance(x, Tensor) and x.is_floating_point() and x.numel() > 0 else None


def _ungated(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The call as it is, but a large convolution in pieces and a large batch normalisation by our own kernel."""
    x = args[0] if args else kwargs.get("input")
    if ops.UNAVAILABLE is None and not (isinstance(x, Tensor) and x.numel() < FUSED_ELEMENTS):
        for ours in (in_pieces, by_batch):
            out = ours(function, args, kwargs)
            if out is not None:
                return out
    return function(*args, **kwargs)


# Below, what Python adds to a call is more than the kernels save.
FUSED_ELEMENTS = 1 << 18


class _Fused(TorchFunctionMode):
    """``met_large`` is whether any tensor was large enough for the kernels."""

    met_large = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        x = args[0] if args else kwargs.get("input")
        if isinstance(x, Tensor):
            if x.numel() < FUSED_ELEMENTS:
                return func(*args, **kwargs)
            self.met_large = True
        found = _gated(func, args, kwargs)
        if found is None or not isinstance(found[1], (_Relu, _MaxPool)):
            return _ungated(func, args, kwargs)
        return found[1].record(func, args, kwargs)[0] if x.device.type == "cpu" else func(*args, **kwargs)


class _Record(TorchFunctionMode):
    def __init__(self, gates: Gates, *, keep_random: bool) -> None:
        super().__init__()
        self.gates, self.entries, self.keep_random = gates, gates.entries, keep_random
        parameter = None if gates.model is None else next(gates.model.parameters(), None)
        self.device = "cpu" if parameter is None else parameter.device.type

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.gates.autocast is None and torch.is_autocast_enabled(self.device):
            self.gates.autocast = torch.get_autocast_dtype(self.device)
        found = _gated(func, args, kwargs, self.keep_random)
        if found is None:
            if self.keep_random:
                _refuse_random(func, args, kwargs)
            if func in _UNREACHED:
                warnings.warn(
                    f'gates="frozen" does not reach {_UNREACHED[func]}: its kinks stay free, and finite differences '
                    "may not converge to double backprop",
                    UserWarning,
                    stacklevel=2,
                )
            return _ungated(func, args, kwargs)
        name, rule = found
        out, saved = rule.record(func, args, kwargs)
        self.entries.append(_Entry(name, _shape(out), saved))
        return out


class _Replay(TorchFunctionMode):
    def __init__(self, entries: list[_Entry], *, keep_random: bool) -> None:
        super().__init__()
        self.entries, self.keep_random = entries, keep_random
        self.position = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = _gated(func, args, kwargs, self.keep_random)
        if found is None:
            return _ungated(func, args, kwargs)
        name, rule = found
        if self.position == len(self.entries) or self.entries[self.position].rule != name:
            raise RuntimeError(f"gates: the second forward calls {name} where the recorded one did not")
        entry = self.entries[self.position]
        self.position += 1
        out = rule.replay(entry.saved, func, args, kwargs)
        if _shape(out) != entry.shape:
            raise RuntimeError(f"gates: {name} gave shape {tuple(_shape(out))}, recorded was {tuple(entry.shape)}")
        return out

    def check_complete(self) -> None:
        """Raises RuntimeError where recorded gates were left over."""
        if self.position != len(self.entries):
            left = self.entries[self.position].rule
            raise RuntimeError(f"gates: the second forward did not call {left} where the recorded one did")


def _shape(out: Any) -> torch.Size:
    return (out[0] if isinstance(out, tuple) else out).shape  # type: ignore[no-any-return]
