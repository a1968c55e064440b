"""Which function of torch has which kinks, and which are smooth.

One table, :data:`KNOWN`, says of each function of torch one of three things:

- it has a :class:`Rule`: its kinks (the sign of each element, the place of a maximum, …) are recorded at θ and
  repeated at θ + ρd, so that what is left is smooth in ρ;
- it is smooth: it has a continuous first derivative, or is linear, or moves elements about. A jump of the second
  derivative does no harm, because the gradient changes little where a short step crosses it;
- nothing: it is not in the table, and a recording that meets it says so by name.

What is discrete by itself (comparisons, indices, values under ``detach()``) needs no rule: see gates.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastfisher.engine.calls import Function, argument
from fastfisher.engine.piecewise.rules import (
    Constant,
    Dropout,
    Embedding,
    LeakyRelu,
    RandomizedLeaky,
    Relu,
    Remainder,
    Rule,
    Sided,
    StraightThrough,
    Written,
    drops,
    unrepeatable,
)
from fastfisher.engine.piecewise.selection import Chosen, Extremum, MaxPool, ScatterExtremum

# ---- sides of elements -----------------------------------------------------------------------------------------------


def _keep_sides(x: Tensor, min: Any = None, max: Any = None) -> Tensor:
    """-1, 0 and 1 for elements below, between and above the bounds (derivative 1 on a bound, as in clamp)."""
    sides = torch.zeros_like(x, dtype=torch.int8)
    if min is not None:
        sides = sides - (x < min).to(torch.int8)
    if max is not None:  # as in clamp, it wins where the lower bound is above it
        sides = torch.where((x if min is None else x.clamp(min=min)) > max, 1, sides)
    return sides.to(torch.int8)


def _apply_sides(x: Tensor, sides: Tensor, min: Any = None, max: Any = None) -> Tensor:
    for bound, beyond in ((min, sides < 0), (max, sides > 0)):
        if isinstance(bound, Tensor):
            x = torch.where(beyond, bound.to(x.dtype), x)
        elif bound is not None:  # no torch.where, which would copy the number from the host
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


# ---- functions written by others -------------------------------------------------------------------------------------


def _exponential_unit(x: Tensor, alpha: float, scale: float = 1.0) -> Tensor:
    positive = x > 0
    # 0 where the other side is taken: expm1 of a large x overflows, and its gradient there would be 0·∞.
    negative = torch.where(positive, 0.0, x)
    return torch.where(positive, scale * x, (scale * alpha) * torch.expm1(negative))


def _norm(x: Tensor, p: Any, dim: Any = None, keepdim: bool = False, *_: Any, **__: Any) -> Tensor:
    """The norm for p = 1, ∞ or −∞."""
    dims = tuple(range(x.dim())) if dim is None else dim
    if p == 1:
        return x.abs().sum(dims, keepdim=keepdim)
    return x.abs().amax(dims, keepdim) if p > 0 else x.abs().amin(dims, keepdim)


def _norm_is_smooth(p: Any) -> bool:
    return p not in (1, math.inf, -math.inf)


def _general_norm_is_smooth(_: Function, x: Tensor, p: Any = None, dim: Any = None, *rest: Any, **named: Any) -> bool:
    """torch.linalg.norm, of vectors or of matrices."""
    vector = isinstance(dim, int) or (x.dim() == 1 and dim is None) or (dim is not None and len(dim) == 1)
    return p is None or p == "fro" or (vector and _norm_is_smooth(p))


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


# ---- functions with kinks --------------------------------------------------------------------------------------------

_SIDED: dict[str, Sided] = {
    "leaky_relu": LeakyRelu(lambda x, negative_slope=0.01: x > 0, _leaky),
    "prelu": Sided(lambda x, weight: x > 0, _prelu),
    "abs absolute __abs__": Sided(lambda x: torch.sign(x).to(torch.int8), lambda x, sign: x * sign),
    "relu6": Sided(
        lambda x: _keep_strict(x, 0.0, 6.0), lambda x, sides: _apply_sides(x, sides, 0.0, 6.0), bounded=True
    ),
    "hardtanh": Sided(
        _keep_strict, lambda x, sides, low=-1.0, high=1.0: _apply_sides(x, sides, low, high), bounded=True
    ),
    "threshold": Sided(
        lambda x, threshold, value: x <= threshold,
        lambda x, below, threshold, value: x.masked_fill(below, value),
        bounded=True,
    ),
    "clamp clip": Sided(_keep_sides, _apply_sides, bounded=True),
    "clamp_min": Sided(
        lambda x, min: _keep_sides(x, min), lambda x, sides, min: _apply_sides(x, sides, min), bounded=True
    ),
    "clamp_max": Sided(
        lambda x, max: _keep_sides(x, None, max), lambda x, sides, max: _apply_sides(x, sides, None, max), bounded=True
    ),
}

_WRITTEN: dict[str, Callable[..., Any]] = {
    "aminmax": _aminmax,
    "msort": lambda x: torch.sort(x, 0)[0],
    "frac": lambda x: x - torch.trunc(x),
    "elu": _exponential_unit,
    "selu": lambda x: _exponential_unit(x, 1.6732632423543772, 1.0507009873554805),
    "hardswish": lambda x: x * (x + 3).clamp(0, 6) / 6,
    "hardsigmoid": lambda x: (x + 3).clamp(0, 6) / 6,
    "hardshrink": lambda x, lambd=0.5: torch.where((x > lambd) | (x < -lambd), x, 0.0),
    "softshrink": lambda x, lambd=0.5: x - x.clamp(-lambd, lambd),
    "copysign": _copysign,
    "norm vector_norm": _norm,
    "dist": lambda x, y, p=2: _norm(x - y, p),
    "div divide": _div,
}

_OTHERS: dict[str, Rule] = {
    "relu": Relu(),
    "rrelu": RandomizedLeaky(),
    "max min amax amin maximum minimum fmax fmin": Extremum(),
    "sort topk cummax cummin": Chosen(keeps=True),
    "kthvalue median nanmedian mode": Chosen(),
    "scatter_reduce": ScatterExtremum(),
    "sign sgn floor ceil round trunc fix heaviside floor_divide __floordiv__ __rfloordiv__ __ifloordiv__": Constant(),
    "fake_quantize_per_tensor_affine fake_quantize_per_channel_affine fused_moving_avg_obs_fake_quant": (
        StraightThrough()
    ),
    "fmod remainder __mod__ __imod__": Remainder(),
    "embedding": Embedding(),
    **{
        f"{name} {name}_with_indices": MaxPool(dims, getattr(F, f"{name}_with_indices"), name.startswith("adaptive"))
        for dims in (1, 2, 3)
        for name in (f"max_pool{dims}d", f"adaptive_max_pool{dims}d")
    },
}

RULES: dict[str, Rule] = {**_SIDED, **{names: Written(write) for names, write in _WRITTEN.items()}, **_OTHERS}
"""By the names of the functions that it serves, each in its in-place form too, a rule."""

# ---- smooth functions ------------------------------------------------------------------------------------------------

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
poisson_nll_loss gaussian_nll_loss
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
register_hook __deepcopy__ type_as linear_cross_entropy alias _pack_padded_sequence _pad_packed_sequence values
softmin sum_to_size view_copy expand_copy alias_copy detach_copy __reversed__ unsafe_split_with_sizes lstm_cell
gru_cell rnn_tanh_cell _sparse_mm _make_dual _unpack_dual grouped_mm _grouped_mm
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
    "abs absolute __abs__ angle": lambda _, x: x.is_complex(),
    "embedding_bag": lambda function, *args, **kwargs: argument(function, args, kwargs, "mode") not in ("max", 2),
    "cdist": lambda _, x, y, p=2.0, *rest: p == 2,
    "pdist": lambda _, x, p=2.0: p == 2,
    "pairwise_distance": lambda _, x, y, p=2.0, *rest: p == 2,
    "grid_sample grid_sampler": lambda _, x, grid, *rest, **named: not grid.requires_grad,
    "index_reduce": lambda *args, **named: args[-1] in ("prod", "mean"),
    "embedding": Embedding.is_smooth,
    "scatter_reduce": lambda *args, **named: args[-1] not in ("amax", "amin"),
    "elu": lambda _, x, alpha=1.0, *rest, **named: alpha == 1.0,
    "norm vector_norm": lambda _, x, p=2, *rest, **named: _norm_is_smooth(p),
    "dist": lambda _, x, y, p=2: _norm_is_smooth(p),
    "matrix_norm": lambda _, x, p="fro", *rest, **named: p == "fro",
    "div divide": lambda *_, **named: named.get("rounding_mode") is None,
}
"""Functions that are smooth with some arguments: whether they are, given the function and those."""

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
        name: of the function, without underscores.
        rule: for its kinks; None where there is none.
        draws: whether it may draw random numbers.
        smooth: whether a call is smooth, given the function and its arguments in the positions of the signature.
    """

    name: str
    rule: Rule | None = None
    draws: bool = False
    smooth: Callable[..., bool] = never


_PLACES: tuple[Any, ...] = (
    torch, Tensor, F, torch._C._nn, torch.special, torch.linalg, torch.fft, torch._VF,
)  # fmt: skip


def _functions(names: str) -> list[Function]:
    """The functions of these names, and their forms that write into the first argument."""
    forms = [form for name in names.split() for form in (name, f"{name}_")]
    return [getattr(place, form) for form in forms for place in _PLACES if hasattr(place, form)]


def _table() -> dict[Function, Known]:
    smooth, drawing = Known("smooth", smooth=always), Known("smooth", draws=True, smooth=always)
    table = dict.fromkeys(_functions(_SMOOTH + _WITHOUT_DERIVATIVE), smooth)
    table |= dict.fromkeys(_functions(_SMOOTH_THAT_DRAW + _DRAWN), drawing)
    for attribute in ("T", "mT", "H", "mH", "real", "imag", "data", "grad"):
        table[getattr(Tensor, attribute).__get__] = smooth
    conditions = {name: condition for names, condition in _CONDITIONAL.items() for name in names.split()}
    rules = {name: rule for names, rule in RULES.items() for name in names.split()}
    for name in conditions | rules:
        known = Known(name.strip("_"), rules.get(name), name == "rrelu", conditions.get(name, never))
        table |= dict.fromkeys(_functions(name), known)
    table[torch.autograd.grad] = smooth  # the gates are in the graph that it differentiates
    table |= dict.fromkeys((torch.sparse.mm, torch.sparse.addmm), smooth)
    table[torch._C._nn.l1_loss] = Known("l1_loss", Written(_l1_loss))
    table[torch.linalg.norm] = Known("linalg.norm", smooth=_general_norm_is_smooth)
    for function in (torch._C._nn.elu, torch._C._nn.elu_):  # F.elu alone calls them, with other arguments than its own
        table.pop(function, None)
    table.pop(F.multi_head_attention_forward, None)  # unknown functions are opened, and so its calls are seen
    return table


KNOWN = _table()
"""By function, what is known of it."""

DROPOUTS: dict[Function, Known] = {
    **dict.fromkeys((F.dropout, torch.dropout, torch.dropout_), Known("dropout", Dropout())),
    F.dropout1d: Known("dropout", Dropout(3)),
    F.dropout2d: Known("dropout", Dropout(4)),
    F.dropout3d: Known("dropout", Dropout(5)),
}
"""With the masks kept instead of the random state, as CUDA graphs need it."""

_DRAWING = (
    f"{_DRAWN} alpha_dropout feature_dropout feature_alpha_dropout dropout dropout1d dropout2d dropout3d gumbel_softmax"
)
_RANDOM = frozenset(_functions(_DRAWING))


def refuse_random(function: Function, args: Any, kwargs: Any) -> None:
    """Raises ValueError where the call draws random numbers that nothing keeps."""
    attention = function == F.scaled_dot_product_attention and argument(function, args, kwargs, "dropout_p")
    if attention or (function in _RANDOM and drops(function, args, kwargs)):
        raise unrepeatable(function)
