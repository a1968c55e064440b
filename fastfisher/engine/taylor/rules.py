"""How each function of PyTorch goes onto the tape; a rule takes the tape, the function as called, and its arguments."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastfisher.engine import twice
from fastfisher.engine.calls import name_of, outplace, split_inplace, tensors_in, writes_first
from fastfisher.engine.piecewise.rules import Run, Sided, Written
from fastfisher.engine.piecewise.selection import Selection
from fastfisher.engine.piecewise.table import KNOWN, Known
from fastfisher.engine.taylor.nodes import Elementwise, LogSumExp, Normalise, Softmax, Sum
from fastfisher.engine.taylor.registry import RULES, NoRule, rule_for, written
from fastfisher.engine.taylor.tape import Tape


def _linear_in_first(picks: bool, tape: Tape, func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """``picks``: whether each element of the output is one of the input, or 0."""
    if tape.slot(x) is None or any(tape.slot(y) is not None for y in tensors_in((args, kwargs))):
        raise NoRule(f"{name_of(func)} has no rule for these arguments")
    function = outplace(func)
    value = function(x, *args, **kwargs)
    if not any(part.requires_grad for part in tensors_in(value)):
        return value  # an integer tensor, or no tensor, such as the name that x.type() gives

    def add(value: Tensor, *part: int) -> Tensor:
        def derivative(t: Tensor) -> Tensor:
            y = function(t, *args, **kwargs)
            return y[part[0]] if part else y  # type: ignore[no-any-return]

        return tape.linear(name_of(func), derivative, [x], value, derivative if picks else None)

    return add(value) if isinstance(value, Tensor) else type(value)(add(y, i) for i, y in enumerate(value))


_picking = functools.partial(_linear_in_first, True)
rule_for(
    "view reshape flatten unflatten permute transpose t swapaxes swapdims movedim moveaxis squeeze unsqueeze expand",
    "contiguous clone narrow select index_select gather take_along_dim __getitem__ chunk split",
    "tensor_split unbind roll flip tril triu diagonal repeat repeat_interleave tile pixel_shuffle pixel_unshuffle",
    "channel_shuffle unfold broadcast_to adjoint rot90",
)(_picking)
rule_for(
    "sum mean cumsum avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d",
    "interpolate upsample neg negative __neg__ fold to float double half bfloat16 type nll_loss diff trace",
)(functools.partial(_linear_in_first, False))
for _attribute in ("T", "mT", "H", "mH"):
    RULES[getattr(Tensor, _attribute).__get__] = (_picking, False)


@rule_for("view_as reshape_as expand_as type_as")
def _as(tape: Tape, func: Any, x: Tensor, other: Tensor) -> Tensor:
    """``other`` gives its shape or dtype only, so that it may move."""
    if tape.slot(x) is None:
        return func(x, other.detach())  # type: ignore[no-any-return]
    if func is Tensor.type_as:
        return tape.linear("type_as", lambda t: t, [x], x.type_as(other.detach()))
    shape = other.shape
    form = Tensor.expand if func is Tensor.expand_as else Tensor.view if func is Tensor.view_as else Tensor.reshape
    return tape.linear(func.__name__, lambda t: form(t, shape), [x], form(x, shape))


_VALUES = {
    "masked_fill": (0, 2),
    "index_fill": (0, 3),
    "index_put": (0, 2),
    "index_copy": (0, 3),
    "index_add": (0, 3),
    "scatter": (0, 3),
    "scatter_add": (0, 3),
    "masked_scatter": (0, 2),
    "select_scatter": (0, 1),
    "slice_scatter": (0, 1),
    "where": (1, 2),
    "__setitem__": (0, 2),
}
"""Functions that put together what they are given, by the places of the arguments in which they are linear jointly."""


def _put_together(name: str, tape: Tape, func: Any, *args: Any, **kwargs: Any) -> Tensor:
    places = (0, 2) if func is Tensor.where else _VALUES[name]
    values = [args[place] for place in places]
    moves = [tape.slot(x) is not None for x in values]
    others = [x for place, x in enumerate(args) if place not in places]
    if kwargs.get("reduce") is not None or any(tape.slot(x) is not None for x in tensors_in((others, kwargs))):
        raise NoRule(f"{name_of(func)} has no rule for these arguments")
    function = _set if name == "__setitem__" else outplace(func)
    zeros = [_zero(x) for x in values]

    def with_values(*given: Any) -> Tensor:
        filled = list(args)
        for place, x in zip(places, given, strict=True):
            filled[place] = x
        return function(*filled, **kwargs)

    value = with_values(*values)
    for place in places:
        args = (*args[:place], None, *args[place + 1 :])

    def derivative(*moving: Tensor) -> Tensor:
        queue = iter(moving)
        return with_values(*(next(queue) if move else zero for move, zero in zip(moves, zeros, strict=True)))

    return tape.linear(name, derivative, [x for x, move in zip(values, moves, strict=True) if move], value)


def _zero(x: Any) -> Any:
    """Zeros in the form of a value that does not move, in the memory of one."""
    return torch.zeros((), dtype=x.dtype, device=x.device).expand(x.shape) if isinstance(x, Tensor) else 0


def _set(x: Tensor, index: Any, value: Any) -> Tensor:
    """What ``x[index] = value`` makes of x."""
    x = x.clone(memory_format=torch.contiguous_format)
    x[index] = value
    return x


for _function in _VALUES:
    rule_for(_function)(functools.partial(_put_together, _function))
RULES[Tensor.__setitem__] = (functools.partial(_put_together, "__setitem__"), True)


def _overwrite(tape: Tape, func: Any, x: Tensor, value: Any = 0, *_: Any) -> Tensor:
    """``copy_``, ``fill_`` and ``zero_``: what a tensor was before plays no part any more."""
    if tape.slot(value) is None:
        return torch.empty_like(x).copy_(value) if isinstance(value, Tensor) else torch.full_like(x, value)
    with tape:
        return value.to(x.dtype).expand(x.shape).clone()  # type: ignore[no-any-return]


RULES[Tensor.copy_] = RULES[Tensor.fill_] = RULES[Tensor.zero_] = RULES[torch.zero_] = (_overwrite, True)


@rule_for("pad")
def _pad(tape: Tape, func: Any, input: Tensor, pad: Any, mode: str = "constant", value: Any = None) -> Tensor:
    derivative = lambda t: F.pad(t, pad, mode) if mode == "constant" else F.pad(t, pad, mode, value)  # noqa: E731
    return tape.linear("pad", derivative, [input], F.pad(input, pad, mode, value))


@rule_for("cat concat concatenate stack hstack vstack dstack")
def _join(tape: Tape, func: Any, tensors: Any, *args: Any, **kwargs: Any) -> Tensor:
    moves = [tape.slot(x) is not None for x in tensors]
    zeros = [None if move else torch.zeros_like(x) for x, move in zip(tensors, moves, strict=True)]

    def derivative(*moving: Tensor) -> Tensor:
        queue = iter(moving)
        return func([next(queue) if zero is None else zero for zero in zeros], *args, **kwargs)  # type: ignore[no-any-return]

    moving = [x for x, move in zip(tensors, moves, strict=True) if move]
    return tape.linear(name_of(func), derivative, moving, func(tensors, *args, **kwargs))


@rule_for("add __add__ __radd__ sub subtract __sub__ rsub __rsub__")
def _add(tape: Tape, func: Any, a: Any, b: Any, *, alpha: Any = 1) -> Tensor:
    name = func.__name__
    factors = (-alpha, 1) if "rsub" in name else (1, -alpha if "sub" in name else alpha)  # rsub: b − alpha a
    value = a + b if factors == (1, 1) else factors[0] * a + factors[1] * b
    moving = [(tape.slots[id(x)], s) for x, s in zip((a, b), factors, strict=True) if tape.slot(x) is not None]
    return tape.add(Sum(name, [slot for slot, _ in moving], [s for _, s in moving], value.shape), value)


@rule_for("mul multiply __mul__ __rmul__")
def _mul(tape: Tape, func: Any, a: Any, b: Any) -> Tensor:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        x, factor = (a, b) if isinstance(a, Tensor) else (b, a)
        return tape.linear("mul", lambda t: t * factor, [x], x * factor, lambda v: v * factor**2)
    if a is b:
        return _elementwise("square", tape, torch.square, a)
    return tape.product("mul", torch.mul, a, b, sums="single")


@rule_for("div divide true_divide __truediv__")
def _div(tape: Tape, func: Any, a: Any, b: Any, *, rounding_mode: str | None = None) -> Tensor:
    if rounding_mode is not None:
        raise NoRule("div with a rounding mode has no rule")
    if tape.slot(b) is None:
        return tape.linear("div", lambda t: t / b, [a], a / b, lambda v: v / b**2)
    with tape:
        return a * torch.reciprocal(b)  # type: ignore[no-any-return]


# ---- products ------------------------------------------------------------------------------------------------------


@rule_for("linear")
def _linear_layer(tape: Tape, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return tape.product("linear", F.linear, input, weight, bias)


@rule_for("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d")
def _conv(tape: Tape, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None, *how: Any) -> Tensor:
    return tape.product(func.__name__, lambda a, b, c=None: func(a, b, c, *how), input, weight, bias)


@rule_for("matmul __matmul__ mm bmm mv dot inner outer")
def _matmul(tape: Tape, func: Any, a: Tensor, b: Tensor) -> Tensor:
    function = torch.matmul if func.__name__ == "__matmul__" else func
    return tape.product(func.__name__, function, a, b)


@rule_for("einsum")
def _einsum(tape: Tape, func: Any, equation: str, *operands: Any) -> Tensor:
    tensors = list(operands[0]) if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else list(operands)
    places = [i for i, x in enumerate(tensors) if tape.slot(x) is not None]
    fixed = [x.detach() for x in tensors]

    def at(*given: Tensor) -> Tensor:
        filled = list(fixed)
        for place, x in zip(places, given, strict=True):
            filled[place] = x
        return torch.einsum(equation, *filled)

    if len(places) == 1:
        return tape.linear("einsum", at, [tensors[places[0]]], at(tensors[places[0]]))
    if len(places) > 2:
        raise NoRule("einsum has no rule for more than two operands that move")
    return tape.product("einsum", at, tensors[places[0]], tensors[places[1]], sums=False)


@rule_for("embedding")
def _embedding(
    tape: Tape, func: Any, input: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None,
    norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
) -> Tensor:  # fmt: skip
    if max_norm is not None or scale_grad_by_freq or func is torch.embedding:
        raise NoRule("embedding has no rule for max_norm or scale_grad_by_freq")
    kept = None if padding_idx is None else (input != padding_idx % len(weight)).unsqueeze(-1)

    def derivative(t: Tensor) -> Tensor:  # the padding row gets no gradient, so it does not move
        y = F.embedding(input, t)
        return y if kept is None else y * kept

    return tape.linear("embedding", derivative, [weight], F.embedding(input, weight, padding_idx), derivative)


# ---- piecewise linear functions --------------------------------------------------------------------------------------


def _stands_for(tape: Tape, x: Tensor, out: Tensor, inplace: bool) -> Tensor:
    """``out``, for which ``x`` stands from here on where the call was made in place."""
    if inplace:
        tape.held.replace(x, out)
    return out


@rule_for("relu")
def _relu(tape: Tape, func: Any, input: Tensor, inplace: bool = False) -> Tensor:
    value = torch.relu(input)
    kept = value.detach()
    derivative = lambda t: torch.ops.aten.threshold_backward(t, kept, 0)  # noqa: E731
    return _stands_for(tape, input, tape.linear("relu", derivative, [input], value), inplace)


_ALONE = Run()
"""What the rules of kinks ask for beside the call: here there is no ReLU before a max-pool."""


def _with_kinks(known: Known, tape: Tape, func: Any, *args: Any, **kwargs: Any) -> Any:
    """A function of the table of kinks, with the derivative that its replay has on the recorded side."""
    rule, function = known.rule, outplace(func)
    args, kwargs, inplace = split_inplace(func, args, kwargs)
    inplace = inplace and function is func  # else the tape itself puts the output in the place of the input
    if known.smooth(func, *args, **kwargs):
        raise NoRule(f"{name_of(func)} has no rule for these arguments")
    if isinstance(rule, Written):
        with tape:
            return _stands_for(tape, args[0], rule.write(*args, **kwargs), inplace)
    assert isinstance(rule, Sided | Selection)
    others = [x for place, x in enumerate(args) if place not in rule.linear_in(args)]
    if any(tape.slot(x) is not None for x in tensors_in((others, kwargs))):
        raise NoRule(f"{known.name} has no rule for bounds that move")
    if isinstance(rule, Sided):
        slope = rule.slope(*args, **kwargs).to(args[0].dtype)
        out = tape.linear(known.name, lambda t: t * slope, [args[0]], function(*args, **kwargs))
        return _stands_for(tape, args[0], out, inplace)
    return _selection(rule, known.name, tape, function, args, kwargs)


def _selection(rule: Selection, name: str, tape: Tape, function: Any, args: Any, kwargs: Any) -> Any:
    """A function that selects elements: of the derivatives of its inputs, those of the recorded elements."""
    places = rule.linear_in(args)
    moving = [place for place in places if tape.slot(args[place]) is not None]
    found, saved = rule.record(_ALONE, function, args, kwargs)
    still = [_zero(x) if place in places else x for place, x in enumerate(args)]

    def derivative(*given: Tensor) -> Tensor:
        filled = list(still)
        for place, x in zip(moving, given, strict=True):
            filled[place] = x
        out = rule.replay(_ALONE, saved, function, filled, kwargs)
        return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]

    value = found[0] if isinstance(found, tuple) else found
    squares = derivative if rule.takes_single else None
    out = tape.linear(name, derivative, [args[place] for place in moving], value, squares)
    return type(found)((out, *found[1:])) if isinstance(found, tuple) else out


@rule_for("dropout dropout1d dropout2d dropout3d feature_dropout")
def _dropout(tape: Tape, func: Any, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if not training or p == 0:
        return input
    mask = func(torch.ones_like(input), p, True)  # the same for every direction
    return _stands_for(tape, input, tape.linear("dropout", lambda t: t * mask, [input], input * mask), inplace)


@rule_for("round floor ceil trunc fix sign sgn")
def _flat(tape: Tape, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return outplace(func)(x.detach(), *args, **kwargs)  # type: ignore[no-any-return]


# ---- smooth functions of each element ------------------------------------------------------------------------------


def _gelu(x: Tensor, y: Tensor, approximate: str = "none") -> tuple[Tensor, Tensor]:
    if approximate == "none":
        density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * density, density * (2 - x * x)
    k, c = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(k * (x + c * x**3))
    u1, u2 = k * (1 + 3 * c * x * x), 6 * c * k * x
    t1 = (1 - t * t) * u1
    t2 = (1 - t * t) * u2 - 2 * t * t1 * u1
    return 0.5 * (1 + t) + 0.5 * x * t1, t1 + 0.5 * x * t2


def _softplus(x: Tensor, y: Tensor, beta: float = 1, threshold: float = 20) -> tuple[Tensor, Tensor]:
    slope, straight = torch.sigmoid(beta * x), beta * x > threshold
    return torch.where(straight, 1, slope), torch.where(straight, 0, beta * slope * (1 - slope))


def _silu(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(x)
    return s + x * s * (1 - s), s * (1 - s) * (2 + x * (1 - 2 * s))


def _pow(x: Tensor, y: Tensor, p: Any) -> tuple[Tensor, Tensor]:
    zero = torch.zeros_like(x)
    return p * x ** (p - 1) if p != 0 else zero, p * (p - 1) * x ** (p - 2) if p not in (0, 1) else zero


def _elu(x: Tensor, y: Tensor, alpha: float = 1.0) -> tuple[Tensor, Tensor]:
    return torch.where(x > 0, 1, y + alpha), torch.where(x > 0, 0, y + alpha)


_DERIVATIVES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "tanh": lambda x, y: (1 - y * y, -2 * y * (1 - y * y)),
    "sigmoid": lambda x, y: (y * (1 - y), y * (1 - y) * (1 - 2 * y)),
    "logsigmoid": lambda x, y: (torch.sigmoid(-x), -torch.sigmoid(x) * torch.sigmoid(-x)),
    "exp": lambda x, y: (y, y.clone()),
    "expm1": lambda x, y: (y + 1, y + 1),
    "log": lambda x, y: (1 / x, -1 / (x * x)),
    "log1p": lambda x, y: (1 / (1 + x), -1 / (1 + x) ** 2),
    "sqrt": lambda x, y: (0.5 / y, -0.25 / (y * x)),
    "rsqrt": lambda x, y: (-0.5 * y**3, 0.75 * y**5),
    "reciprocal": lambda x, y: (-y * y, 2 * y**3),
    "square": lambda x, y: (2 * x, torch.full_like(x, 2)),
    "pow": _pow,
    "__pow__": _pow,
    "sin": lambda x, y: (torch.cos(x), -y),
    "cos": lambda x, y: (-torch.sin(x), -y),
    "erf": lambda x, y: (2 / math.sqrt(math.pi) * torch.exp(-x * x), -4 / math.sqrt(math.pi) * x * torch.exp(-x * x)),
    "softplus": _softplus,
    "gelu": _gelu,
    "silu": _silu,
    "elu": _elu,
    "hardswish": lambda x, y: (
        torch.where(x <= -3, 0, torch.where(x < 3, x / 3 + 0.5, 1)),
        ((x > -3) & (x < 3)).to(x.dtype) / 3,
    ),
}
"""First and second derivative of a function of each element, from its input, output and parameters."""


def _smooth(name: str, tape: Tape, func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    function = outplace(func)
    (_, *rest), named, inplace = split_inplace(func, (input, *args), kwargs)
    if tape.slot(input) is None or any(True for _ in tensors_in((rest, named))):
        raise NoRule(f"{name_of(func)} has no rule for these arguments")
    out = _elementwise(name, tape, function, input, *rest, **named)
    return _stands_for(tape, input, out, inplace and function is func)


def _elementwise(name: str, tape: Tape, function: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    value = function(x, *args, **kwargs)
    slope, curvature = _DERIVATIVES[name](x.detach(), value.detach(), *args, **kwargs)
    return tape.add(Elementwise(name.strip("_"), [tape.slots[id(x)]], slope, curvature), value)


for _function in _DERIVATIVES:
    rule_for(_function)(functools.partial(_smooth, _function))


# ---- softmax, normalisation, attention -----------------------------------------------------------------------------


@rule_for("softmax log_softmax")
def _softmax(tape: Tape, func: Any, input: Tensor, dim: Any = None, *rest: Any, dtype: Any = None) -> Tensor:
    # Its position in torch.softmax is not that in F.softmax.
    dtype = next((given for given in rest if isinstance(given, torch.dtype)), dtype)
    if not isinstance(dim, int):
        raise NoRule("softmax has no rule for an implicit dimension")
    if dtype is not None:
        with tape:
            input = input.to(dtype)
    slots = [tape.slots[id(input)]]
    if func.__name__ == "softmax":
        value = torch.softmax(input, dim)
        return tape.add(Softmax("softmax", slots, value.detach(), dim), value)
    value = torch.log_softmax(input, dim)
    p = value.detach().exp()
    return tape.add(LogSumExp("log_softmax", slots, p, dim, log_softmax=True, keepdim=True), value)


@rule_for("logsumexp")
def _logsumexp(tape: Tape, func: Any, input: Tensor, dim: Any, keepdim: bool = False) -> Tensor:
    if not isinstance(dim, int):
        raise NoRule("logsumexp has no rule for several dimensions")
    p = torch.softmax(input.detach(), dim)
    node = LogSumExp("logsumexp", [tape.slots[id(input)]], p, dim, log_softmax=False, keepdim=keepdim)
    return tape.add(node, torch.logsumexp(input, dim, keepdim))


def _normalise(tape: Tape, name: str, x: Tensor, dims: list[int], eps: float, centred: bool = True) -> Tensor:
    if tape.slot(x) is None:  # the input of the network: nothing moves yet
        v = x - x.mean(dims, keepdim=True) if centred else x
        return v * (v.square().mean(dims, keepdim=True) + eps).rsqrt()
    v = x - x.mean(dims, keepdim=True) if centred else x
    rstd = (v.square().mean(dims, keepdim=True) + eps).rsqrt()
    n = v * rstd
    return tape.add(Normalise(name, [tape.slots[id(x)]], n.detach(), rstd.detach(), dims, centred), n)


def _affine(tape: Tape, name: str, n: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Any) -> Tensor:
    """n·weight + bias, both viewed as ``shape``."""
    if weight is None and bias is None:
        return n
    if weight is None or (tape.slot(weight) is None and tape.slot(n) is None):
        with tape:
            n = n if weight is None else n * weight.view(shape)
            return n if bias is None else n + bias.view(shape)

    def scale(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        return a * b.view(shape) if c is None else torch.addcmul(c.view(shape), a, b.view(shape))

    return tape.product(name, scale, n, weight, bias, sums="single")


@rule_for("batch_norm")
def _batch_norm(
    tape: Tape, func: Any, input: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    weight: Tensor | None = None, bias: Tensor | None = None, training: bool = False, momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    if func is torch.batch_norm:
        raise NoRule("torch.batch_norm has no rule (torch.nn.functional.batch_norm has)")
    shape = (-1, *[1] * (input.dim() - 2))
    if training:
        dims = [d for d in range(input.dim()) if d != 1]
        with torch.no_grad():  # updates the running statistics, as PyTorch's does
            F.batch_norm(input.detach(), running_mean, running_var, None, None, True, momentum, eps)
        n = _normalise(tape, "batch_norm in train mode", input, dims, eps)
    else:
        assert running_mean is not None and running_var is not None
        scale = (running_var + eps).rsqrt().view(shape)
        if tape.slot(input) is None:
            n = (input - running_mean.view(shape)) * scale
        else:
            n = (input - running_mean.view(shape)) * scale
            n = tape.linear("batch_norm", lambda t: t * scale, [input], n, lambda v: v * scale**2)
    return _affine(tape, "batch_norm", n, weight, bias, shape)


@rule_for("layer_norm")
def _layer_norm(
    tape: Tape, func: Any, input: Tensor, normalized_shape: Any, weight: Tensor | None = None,
    bias: Tensor | None = None, eps: float = 1e-5, cudnn_enable: bool = True,
) -> Tensor:  # fmt: skip
    dims = list(range(-len(normalized_shape), 0))
    n = _normalise(tape, "layer_norm", input, dims, eps)
    return _affine(tape, "layer_norm", n, weight, bias, tuple(normalized_shape))


@rule_for("rms_norm")
def _rms_norm(
    tape: Tape, func: Any, input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    eps = torch.finfo(torch.promote_types(input.dtype, torch.float32)).eps if eps is None else eps
    n = _normalise(tape, "rms_norm", input, list(range(-len(normalized_shape), 0)), eps, centred=False)
    return _affine(tape, "rms_norm", n, weight, None, tuple(normalized_shape))


@rule_for("group_norm")
def _group_norm(
    tape: Tape, func: Any, input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5, cudnn_enable: bool = True,
) -> Tensor:  # fmt: skip
    with tape:
        grouped = input.reshape(len(input), num_groups, -1)
    n = _normalise(tape, "group_norm", grouped, [-1], eps)
    with tape:
        n = n.view(input.shape)
    return _affine(tape, "group_norm", n, weight, bias, (-1, *[1] * (input.dim() - 2)))


@rule_for("instance_norm")
def _instance_norm(
    tape: Tape, func: Any, input: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None,
    weight: Tensor | None = None, bias: Tensor | None = None, use_input_stats: bool = True, momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    if not use_input_stats or running_mean is not None or func is torch.instance_norm:
        raise NoRule("instance_norm with running statistics has no rule")
    n = _normalise(tape, "instance_norm", input, list(range(2, input.dim())), eps)
    return _affine(tape, "instance_norm", n, weight, bias, (-1, *[1] * (input.dim() - 2)))


@rule_for("norm vector_norm")
def _norm(tape: Tape, func: Any, x: Tensor, p: Any = 2, dim: Any = None, keepdim: bool = False, *rest: Any) -> Tensor:
    if p not in (2, "fro", None) or any(option is not None for option in rest):  # out, dtype
        raise NoRule(f"{name_of(func)} has a rule for the Euclidean norm only")
    dim = list(range(x.dim())) if dim is None else dim
    with tape:
        return x.square().sum(dim, keepdim=keepdim).sqrt()


@rule_for("embedding_bag")
def _embedding_bag(tape: Tape, func: Any, *args: Any, **kwargs: Any) -> Tensor:
    if func is torch.embedding_bag:
        raise NoRule("torch.embedding_bag has no rule (torch.nn.functional.embedding_bag has)")
    try:
        with tape:
            return twice.embedding_bag(*args, **kwargs)
    except NotImplementedError as error:
        raise NoRule(str(error)) from None


# ---- functions written by others that have a rule --------------------------------------------------------------------


def _prelu(input: Tensor, weight: Tensor) -> Tensor:
    slope = weight.view(-1, *[1] * (input.dim() - 2)) if weight.numel() > 1 else weight
    positive = input.relu()
    return positive + slope * (input - positive)


def _glu(input: Tensor, dim: int = -1) -> Tensor:
    a, b = input.chunk(2, dim)
    return a * b.sigmoid()


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scores = (query * (scale if scale is not None else query.shape[-1] ** -0.5)) @ key.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    blind = None  # rows with every score masked, whose output is 0
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        blind = ~attn_mask.any(-1, keepdim=True)
        scores = scores.masked_fill(~attn_mask & ~blind, -math.inf)
    elif attn_mask is not None:
        blind = (attn_mask == -math.inf).all(-1, keepdim=True)
        scores = scores + attn_mask.masked_fill(blind, 0.0)
    p = torch.softmax(scores, -1)
    if blind is not None and bool(blind.any()):
        p = p.masked_fill(blind, 0.0)
    return F.dropout(p, dropout_p) @ value


_WRITTEN: dict[str, Callable[..., Tensor]] = {
    "lerp": lambda start, end, weight: start + weight * (end - start),
    "addcmul": lambda x, a, b, *, value=1: x + value * (a * b),
    "addmm baddbmm": lambda x, a, b, *, beta=1, alpha=1: beta * x + alpha * (a @ b),
    "__rtruediv__ __rdiv__": lambda a, b: torch.reciprocal(a) * b,
    "prelu": _prelu,
    "glu": _glu,
    "scaled_dot_product_attention": _attention,
    "_weight_norm": twice.weight_norm,
    "linear_cross_entropy": twice.linear_cross_entropy,
}


for _names, _write in _WRITTEN.items():
    rule_for(_names)(written(_write))


# ---- functions with kinks that have no rule above, which would be cheaper --------------------------------------------

_rule_with_kinks = functools.cache(lambda known: functools.partial(_with_kinks, known))

for _kinked, _known in KNOWN.items():
    if isinstance(_known.rule, Sided | Selection | Written):
        RULES.setdefault(_kinked, (_rule_with_kinks(_known), writes_first(_kinked)))
