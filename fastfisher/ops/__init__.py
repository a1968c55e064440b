"""The Python side of the operators: which backend serves a tensor, fakes for tracing, and derivatives.

The schemas are in csrc/ops.cpp, the definitions in reference.py. The functions here take and return what the
operators do; :func:`fastfisher.sample_cross_entropy` is the public face of the one that users call.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastfisher.ops import reference
from fastfisher.slow_path import warn_slow_path

_LIBRARY = Path(__file__).parents[1] / "libfastfisher_ops.so"


def _load() -> str | None:
    """Loads the compiled operators; returns the reason where that is impossible."""
    if not _LIBRARY.exists():
        return "the package was built without a C++ compiler"
    try:
        torch.ops.load_library(str(_LIBRARY))  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"{_LIBRARY.name} does not load beside torch {torch.__version__}: {error}"
    return None


UNAVAILABLE: str | None = _load()
"""Why the compiled CPU kernels do not serve, or None where they do."""

GPU_KERNELS: dict[str, str] = {
    "sample_cross_entropy": "rows",
    "softmax_hessian_product": "rows",
    "rademacher_cotangent": "rows",
    "gate_relu": "gates",
    "gate_relu_": "gates",
    "gate_apply": "gates",
    "gate_max_pool": "gates",
    "gate_take": "gates",
    "gate_put": "gates",
    "perturb": "tables",
    "probe_dot": "tables",
    "axpy_diff": "tables",
    "sum_squares": "tables",
    "grad_sqnorm_linear": "gradient_norms",
    "grad_sqnorm_conv": "gradient_norms",
    "channel_products": "gradient_norms",
}
"""The file of kernels/ that serves each operator on CUDA devices. An operator that is not named takes the reference."""


def _register_gpu() -> str | None:
    """Registers the Triton kernels for CUDA tensors; returns the reason where that is impossible."""
    global _gpu_library
    if UNAVAILABLE is not None:
        return f"the operators are declared by the compiled library, and {UNAVAILABLE}"
    if not torch.cuda.is_available():
        return "no CUDA device was found"
    try:
        files = {file: importlib.import_module(f"fastfisher.kernels.{file}") for file in set(GPU_KERNELS.values())}
    except ImportError as error:
        return f"the Triton kernels cannot be imported: {error}"
    _gpu_library = torch.library.Library("fastfisher", "IMPL")  # type: ignore[no-untyped-call]
    for name, file in GPU_KERNELS.items():
        _gpu_library.impl(name, getattr(files[file], name), "CUDA")  # type: ignore[no-untyped-call]
    return None


_gpu_library: torch.library.Library | None = None  # the registrations last as long as this does
GPU_UNAVAILABLE: str | None = _register_gpu()
"""Why the Triton kernels do not serve CUDA devices, or None where they do."""


def _compiled(name: str, device: torch.device) -> bool:
    """Whether a compiled kernel serves this operator on this device; where not, says so once."""
    if device.type == "cpu":
        reason = UNAVAILABLE
    elif device.type == "cuda":
        reason = GPU_UNAVAILABLE or (None if name in GPU_KERNELS else f"there is no kernel of {name} yet")
    else:
        reason = "there are no compiled kernels for it"
    if reason is not None:
        warn_slow_path(f"fastfisher runs its PyTorch reference on {device.type}: {reason}")
    return reason is None


def _serving(name: str, device: torch.device) -> Callable[..., Any]:
    """The operator ``name`` where a kernel serves the device, else its reference."""
    return getattr(torch.ops.fastfisher if _compiled(name, device) else reference, name)  # type: ignore[no-any-return]


def sample_cross_entropy(logits: Tensor, key: Tensor, scale: float, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`fastfisher.ops.reference.sample_cross_entropy`; differentiable twice in ``logits``."""
    if not _compiled("sample_cross_entropy", logits.device):
        return reference.sample_cross_entropy(logits, key, scale, first)
    op: Callable[..., Any] = torch.ops.fastfisher.sample_cross_entropy.default
    if logits.requires_grad and torch.is_grad_enabled():
        return op(logits, key, scale, first)  # type: ignore[no-any-return]
    with torch._C._AutoDispatchBelowAutograd():
        return op(logits, key, scale, first)  # type: ignore[no-any-return]


def softmax_hessian_product(dlogits: Tensor, labels: Tensor, vector: Tensor, scale: float) -> Tensor:
    """See :func:`fastfisher.ops.reference.softmax_hessian_product`; differentiable in ``dlogits`` and ``vector``."""
    return _serving("softmax_hessian_product", dlogits.device)(dlogits, labels, vector, scale)  # type: ignore[no-any-return]


def gate_relu(x: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`fastfisher.ops.reference.gate_relu`."""
    return _serving("gate_relu", x.device)(x)  # type: ignore[no-any-return]


def gate_relu_(x: Tensor) -> Tensor:
    """See :func:`fastfisher.ops.reference.gate_relu_`."""
    return _serving("gate_relu_", x.device)(x)  # type: ignore[no-any-return]


def gate_apply(x: Tensor, bits: Tensor) -> Tensor:
    """See :func:`fastfisher.ops.reference.gate_apply`."""
    return _serving("gate_apply", x.device)(x, bits)  # type: ignore[no-any-return]


def gate_max_pool(
    x: Tensor, height: int, width: int, stride_height: int, stride_width: int, gated: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`fastfisher.ops.reference.gate_max_pool`."""
    return _serving("gate_max_pool", x.device)(x, height, width, stride_height, stride_width, gated)  # type: ignore[no-any-return]


def gate_take(x: Tensor, indices: Tensor) -> Tensor:
    """See :func:`fastfisher.ops.reference.gate_take`."""
    return _serving("gate_take", x.device)(x, indices)  # type: ignore[no-any-return]


def gate_put(y: Tensor, indices: Tensor, elements: int) -> Tensor:
    """See :func:`fastfisher.ops.reference.gate_put`."""
    return _serving("gate_put", y.device)(y, indices, elements)  # type: ignore[no-any-return]


def _as_stored(x: Tensor, like: Tensor) -> Tensor:
    """A view of ``x`` with its dimensions in the order in which those of ``like`` lie in memory (channels last)."""
    return x.permute(sorted(range(like.dim()), key=like.stride, reverse=True))


def axpy_diff(out: list[Tensor], a: list[Tensor], b: list[Tensor], scale: Tensor) -> Tensor:
    """See :func:`fastfisher.ops.reference.axpy_diff`."""
    if not _compiled("axpy_diff", out[0].device):
        return reference.axpy_diff(out, a, b, scale)
    lists = [list(out), list(a), list(b)]
    if not all(x.is_contiguous() for tensors in lists for x in tensors):
        for i, (target, *read) in enumerate(zip(*lists, strict=False)):
            if not _as_stored(target, target).is_contiguous():
                warn_slow_path("axpy_diff runs its PyTorch reference: a tensor of out has gaps in memory")
                return reference.axpy_diff(out, a, b, scale)
            if all(x.shape == target.shape for x in read):
                for tensors in lists:
                    tensors[i] = _as_stored(tensors[i], target).contiguous()
    return torch.ops.fastfisher.axpy_diff(*lists, scale)  # type: ignore[no-any-return]


def sum_squares(tensors: list[Tensor]) -> Tensor:
    """See :func:`fastfisher.ops.reference.sum_squares`."""
    stored = [x if x.is_contiguous() else _as_stored(x, x) for x in tensors]  # the order of a sum is free: no copy
    return _serving("sum_squares", tensors[0].device)(stored)  # type: ignore[no-any-return]


def batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`fastfisher.ops.reference.batch_norm`."""
    return _serving("batch_norm", x.device)(x, weight, bias, eps)  # type: ignore[no-any-return]


def batch_norm_backward(
    grad: Tensor, bits: Tensor | None, x: Tensor, weight: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`fastfisher.ops.reference.batch_norm_backward`."""
    return _serving("batch_norm_backward", x.device)(grad, bits, x, weight, mean, variance, eps)  # type: ignore[no-any-return]


def rademacher_cotangent(logits: Tensor, key: Tensor, scale: float, first: int = 0) -> Tensor:
    """See :func:`fastfisher.ops.reference.rademacher_cotangent`."""
    return _serving("rademacher_cotangent", logits.device)(logits, key, scale, first)  # type: ignore[no-any-return]


def grad_sqnorm_linear(a: Tensor, d: Tensor, gram: bool) -> Tensor:
    """See :func:`fastfisher.ops.reference.grad_sqnorm_linear`."""
    if _compiled("grad_sqnorm_linear", a.device):
        return torch.ops.fastfisher.grad_sqnorm_linear(a, d, gram)  # type: ignore[no-any-return]
    few = max(1, 2**22 // max(1, a.shape[2] * d.shape[2]))  # the reference makes the gradients themselves
    parts = zip(torch.split(a, few), torch.split(d, few), strict=True)
    return torch.cat([reference.grad_sqnorm_linear(x, y, gram) for x, y in parts])


def grad_sqnorm_conv(
    a: Tensor, d: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int,
    gram: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See :func:`fastfisher.ops.reference.grad_sqnorm_conv`."""
    return _serving("grad_sqnorm_conv", a.device)(a, d, kernel, stride, padding, dilation, groups, gram)  # type: ignore[no-any-return]


def channel_products(a: Tensor, d: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`fastfisher.ops.reference.channel_products`."""
    return _serving("channel_products", a.device)(a, d, center)  # type: ignore[no-any-return]


def probe_dot(tensors: list[Tensor], key: Tensor, distribution: str, first: int = 0) -> Tensor:
    """See :func:`fastfisher.ops.reference.probe_dot`."""
    return _serving("probe_dot", tensors[0].device)(tensors, key, distribution, first)  # type: ignore[no-any-return]


def perturb(
    out: list[Tensor], tensors: list[Tensor], key: Tensor, eps: float, distribution: str, first: int = 0
) -> None:
    """See :func:`fastfisher.ops.reference.perturb`."""
    if not _compiled("perturb", out[0].device):
        return reference.perturb(out, tensors, key, eps, distribution, first)
    if not all(x.is_contiguous() for x in out):
        warn_slow_path("perturb runs its PyTorch reference: a tensor of out is not contiguous")
        return reference.perturb(out, tensors, key, eps, distribution, first)
    dense = [x.contiguous() for x in tensors]
    return torch.ops.fastfisher.perturb(out, dense, key, eps, distribution, first)  # type: ignore[no-any-return]


# ---- fakes and derivatives of the compiled operators ------------------------------------------------------------


def _register() -> None:
    fake: Callable[[str], Callable[[Any], Any]] = torch.library.register_fake

    @fake("fastfisher::sample_cross_entropy")
    def _(logits: Tensor, key: Tensor, scale: float, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        rows = logits.shape[0]
        loss_dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        contiguous = torch.empty_like(logits, memory_format=torch.contiguous_format)
        return logits.new_empty(rows, dtype=loss_dtype), logits.new_empty(rows, dtype=torch.long), contiguous

    @fake("fastfisher::softmax_hessian_product")
    def _(dlogits: Tensor, labels: Tensor, vector: Tensor, scale: float) -> Tensor:
        return torch.empty_like(dlogits, memory_format=torch.contiguous_format)

    @fake("fastfisher::gate_relu")
    def _(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x), x.new_empty((x.numel() + 31) // 32, dtype=torch.int32)

    @fake("fastfisher::gate_relu_")
    def _(x: Tensor) -> Tensor:
        return x.new_empty((x.numel() + 31) // 32, dtype=torch.int32)

    @fake("fastfisher::gate_max_pool")
    def _(x: Tensor, height: int, width: int, stride_height: int, stride_width: int, gated: bool) -> Any:
        rows, columns = (x.shape[1] - height) // stride_height + 1, (x.shape[2] - width) // stride_width + 1
        values = x.new_empty(x.shape[0], rows * columns)
        return values, torch.empty_like(values, dtype=torch.int32)

    @fake("fastfisher::gate_apply")
    def _(x: Tensor, bits: Tensor) -> Tensor:
        return torch.empty_like(x)

    @fake("fastfisher::gate_take")
    def _(x: Tensor, indices: Tensor) -> Tensor:
        return x.new_empty(indices.shape)

    @fake("fastfisher::gate_put")
    def _(y: Tensor, indices: Tensor, elements: int) -> Tensor:
        return y.new_empty(y.shape[0], elements)

    @fake("fastfisher::axpy_diff")
    def _(out: list[Tensor], a: list[Tensor], b: list[Tensor], scale: Tensor) -> Tensor:
        return out[0].new_empty((), dtype=torch.float64)

    @fake("fastfisher::sum_squares")
    def _(tensors: list[Tensor]) -> Tensor:
        return tensors[0].new_empty((), dtype=torch.float64)

    @fake("fastfisher::batch_norm")
    def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        statistic = x.new_empty(x.shape[1], dtype=torch.float64)
        return torch.empty_like(x), statistic, torch.empty_like(statistic)

    @fake("fastfisher::batch_norm_backward")
    def _(
        grad: Tensor, bits: Tensor | None, x: Tensor, weight: Tensor | None, mean: Tensor, variance: Tensor, eps: float
    ) -> Any:
        return torch.empty_like(x), x.new_empty(x.shape[1]), x.new_empty(x.shape[1])

    @fake("fastfisher::rademacher_cotangent")
    def _(logits: Tensor, key: Tensor, scale: float, first: int = 0) -> Tensor:
        return torch.empty_like(logits, memory_format=torch.contiguous_format)

    @fake("fastfisher::grad_sqnorm_linear")
    def _(a: Tensor, d: Tensor, gram: bool) -> Tensor:
        return a.new_empty(a.shape[0], dtype=torch.float64)

    @fake("fastfisher::grad_sqnorm_conv")
    def _(
        a: Tensor, d: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int],
        groups: int, gram: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return a.new_empty(a.shape[0], dtype=torch.float64), a.new_empty(a.shape[0], dtype=torch.float64)

    @fake("fastfisher::channel_products")
    def _(a: Tensor, d: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
        return a.new_empty(a.shape[:2], dtype=torch.float64), a.new_empty(a.shape[:2], dtype=torch.float64)

    @fake("fastfisher::probe_dot")
    def _(tensors: list[Tensor], key: Tensor, distribution: str, first: int = 0) -> Tensor:
        return key.new_empty((), dtype=torch.float64)

    @fake("fastfisher::perturb")
    def _(out: list[Tensor], tensors: list[Tensor], key: Tensor, eps: float, distribution: str, first: int = 0) -> None:
        return None

    def save_sample(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.scale = inputs[2]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1], output[2])

    def sample_backward(ctx: Any, grad_nll: Tensor | None, _: None, grad_dlogits: Tensor | None) -> Any:
        labels, dlogits = ctx.saved_tensors
        grad = None
        if grad_nll is not None:  # d nll / d logits = dlogits / scale
            grad = dlogits * (grad_nll / ctx.scale)[:, None].to(dlogits.dtype)
        if grad_dlogits is not None:  # the Jacobian of softmax is symmetric
            product = softmax_hessian_product(dlogits, labels, grad_dlogits, ctx.scale)
            grad = product if grad is None else grad + product
        return grad, None, None, None

    def save_product(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        dlogits, labels, vector, ctx.scale = inputs
        ctx.save_for_backward(dlogits, labels, vector)

    def product_backward(ctx: Any, grad: Tensor) -> Any:
        dlogits, labels, vector = ctx.saved_tensors
        p = dlogits / ctx.scale + torch.nn.functional.one_hot(labels, dlogits.shape[1])
        mean_vector, mean_grad = (p * vector).sum(1, keepdim=True), (p * grad).sum(1, keepdim=True)
        grad_dlogits = grad * vector - mean_vector * grad - mean_grad * vector
        return grad_dlogits, None, softmax_hessian_product(dlogits, labels, grad, ctx.scale), None

    torch.library.register_autograd("fastfisher::sample_cross_entropy", sample_backward, setup_context=save_sample)
    torch.library.register_autograd("fastfisher::softmax_hessian_product", product_backward, setup_context=save_product)


if UNAVAILABLE is None:
    _register()
