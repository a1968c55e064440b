"""Call 2: the operators, against a copy, eager PyTorch and torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fastfisher
from bench.gpu.bars import LISTS, PUBLIC, SAMPLE
from bench.gpu.report import Figure
from bench.gpu.timing import Setting, case, cost, faster, of_copy, race
from fastfisher import ops
from fastfisher.ops import reference

SMALL = ((128, 10), (128, 100), (128, 1000), (4096, 1000))
"""Rows and classes where launches count."""
LARGE = (1000, 32_768, 50_257, 131_072)
"""Classes of matrices of 2²⁸ logits, where bandwidth counts."""
DTYPES = ("bfloat16", "float32")
EAGER, COMPILED, FOREACH = "eager PyTorch", "torch.compile", "torch._foreach"
TENSORS = 256
"""Among which the elements of a list are shared out."""


def key_on(at: Setting) -> Tensor:
    """A key of the draws."""
    return torch.tensor([1, 2], device=at.device)


def logits_on(at: Setting, rows: int, classes: int, dtype: str) -> Tensor:
    """Random logits. A dry run takes few, and float16 for bfloat16, which Triton's interpreter does not have."""
    if at.dry:
        rows, classes, dtype = 1, max(10, classes // 16), dtype.replace("bfloat16", "float16")
    return torch.randn(rows, classes, device=at.device).to(getattr(torch, dtype))


@case(2, "copy")
def copy(at: Setting) -> Iterator[Figure]:
    """What all bandwidths are compared with: bytes read and written by a copy."""
    rival = of_copy(at, 0)
    time, *_ = race(at, "copy", rival.call)
    assert time.value is not None and time.low is not None and time.high is not None
    rates = [8 * at.elements / (ms / 1e3) / 1e12 for ms in (time.value, time.high, time.low)]
    yield Figure("read and written by a copy", "TB/s", *rates, gpu=time.gpu)


# ---- sampled cross-entropy ------------------------------------------------------------------------------------------


def eager_sample(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sampled labels, losses and gradient by PyTorch's own functions.

    The draw is that of ``torch.multinomial`` without its check of the probabilities: that may wait for the GPU and
    then cannot be captured.
    """
    p = logits.float().softmax(1)
    labels = p.div_(torch.empty_like(p).exponential_()).argmax(1)
    logits = logits.detach().requires_grad_()
    loss = F.cross_entropy(logits.float(), labels, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    return loss.detach(), labels, gradient


def gumbel_sample(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same by Gumbel argmax and the softmax's gradient written out: what torch.compile fuses best."""
    x = logits.float()
    labels = (x - torch.empty_like(x).exponential_().log()).argmax(1)
    log_p = x.log_softmax(1)
    loss = -log_p.gather(1, labels[:, None]).squeeze(1)
    return loss, labels, (log_p.exp() - F.one_hot(labels, x.shape[1])).to(logits.dtype)


@case(2, SAMPLE, classes=LARGE, dtype=DTYPES)
def sample_large(at: Setting, classes: int, dtype: str) -> Iterator[Figure]:
    """The operator where bandwidth counts."""
    logits, key = logits_on(at, at.rows(classes), classes, dtype), key_on(at)
    compiled = at.compiled(gumbel_sample)
    yield from race(
        at,
        f"{classes} classes, {dtype}",
        lambda: ops.sample_cross_entropy(logits, key, 1.0),
        of_copy(at, 2 * logits.nbytes),
        faster(EAGER, lambda: eager_sample(logits)),
        faster(COMPILED, lambda: compiled(logits)),
    )


@case(2, SAMPLE, size=SMALL, dtype=DTYPES)
def sample_small(at: Setting, size: tuple[int, int], dtype: str) -> Iterator[Figure]:
    """The operator in graphs."""
    logits, key = logits_on(at, *size, dtype), key_on(at)
    compiled = at.compiled(gumbel_sample)
    yield from race(
        at,
        f"{size[0]}x{size[1]}, {dtype}",
        lambda: ops.sample_cross_entropy(logits, key, 1.0),
        faster(EAGER, lambda: eager_sample(logits)),
        faster(COMPILED, lambda: compiled(logits)),
        graph=True,
    )


def eager_loss(logits: Tensor) -> Tensor:
    """The mean loss of sampled labels, as one writes it without this package."""
    labels = torch.multinomial(logits.detach().float().softmax(1), 1).squeeze(1)
    return F.cross_entropy(logits.float(), labels)


def gumbel_loss(logits: Tensor) -> Tensor:
    """The same by Gumbel argmax."""
    x = logits.float()
    labels = (x.detach() - torch.empty_like(x).exponential_().log()).argmax(1)
    return F.cross_entropy(x, labels)


def public(at: Setting, name: str, logits: Tensor, repeat: int) -> Iterator[Figure]:
    """The function that people call, with its backward, launches and wrappers included."""
    given = torch.randint(logits.shape[1], logits.shape[:1], device=at.device)
    compiled = at.compiled(gumbel_loss)
    logits.requires_grad_()

    def with_backward(loss: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(logits), logits)

    yield from race(
        at,
        name,
        with_backward(lambda x: fastfisher.sample_cross_entropy(x)[0]),
        faster(EAGER, with_backward(eager_loss)),
        faster(COMPILED, with_backward(compiled)),
        cost("F.cross_entropy with given labels", with_backward(lambda x: F.cross_entropy(x, given))),
        repeat=repeat,
    )


@case(2, PUBLIC, size=SMALL, dtype=DTYPES)
def public_small(at: Setting, size: tuple[int, int], dtype: str) -> Iterator[Figure]:
    """The public call where launches count."""
    yield from public(at, f"{size[0]}x{size[1]}, {dtype}", logits_on(at, *size, dtype), repeat=2 if at.dry else 50)


@case(2, PUBLIC, classes=LARGE, dtype=DTYPES)
def public_large(at: Setting, classes: int, dtype: str) -> Iterator[Figure]:
    """The public call where bandwidth counts."""
    yield from public(at, f"{classes} classes, {dtype}", logits_on(at, at.rows(classes), classes, dtype), repeat=1)


# ---- rows and gates -------------------------------------------------------------------------------------------------


@case(2, "rows", classes=LARGE, dtype=DTYPES)
def softmax_hessian_product(at: Setting, classes: int, dtype: str) -> Iterator[Figure]:
    """The derivative of the draw."""
    x = logits_on(at, at.rows(classes), classes, dtype)
    _, labels, d = ops.sample_cross_entropy(x, key_on(at), 1.0)
    yield from race(
        at,
        f"softmax_hessian_product, {classes} classes, {dtype}",
        lambda: ops.softmax_hessian_product(d, labels, x, 1.0),
        of_copy(at, 3 * x.nbytes),
        faster(EAGER, lambda: reference.softmax_hessian_product(d, labels, x, 1.0)),
    )


@case(2, "rows", classes=LARGE, dtype=DTYPES)
def rademacher_cotangent(at: Setting, classes: int, dtype: str) -> Iterator[Figure]:
    """Random signs with the covariance of the score."""
    x, key = logits_on(at, at.rows(classes), classes, dtype), key_on(at)
    name = f"rademacher_cotangent, {classes} classes, {dtype}"
    yield from race(at, name, lambda: ops.rademacher_cotangent(x, key, 1.0), of_copy(at, 2 * x.nbytes))


def images(at: Setting) -> Tensor:
    """Activations of 64 channels."""
    size = at.size(32)
    return torch.randn(max(1, at.elements // 2**16), 64, size, size, device=at.device)


@case(2, "gates")
def gate_relu(at: Setting) -> Iterator[Figure]:
    """ReLU with the signs of its inputs, a bit each."""
    x = images(at)
    moved = 2 * x.nbytes + x.numel() // 8
    yield from race(at, "gate_relu", lambda: ops.gate_relu(x), of_copy(at, moved), faster("F.relu", lambda: F.relu(x)))


@case(2, "gates")
def gate_apply(at: Setting) -> Iterator[Figure]:
    """The replay of a ReLU, and its backward."""
    x = images(at)
    _, bits = ops.gate_relu(x)
    yield from race(
        at,
        "gate_apply",
        lambda: ops.gate_apply(x, bits),
        of_copy(at, 2 * x.nbytes + bits.nbytes),
        faster("the backward of F.relu", lambda: torch.ops.aten.threshold_backward(x, x, 0)),
    )


@case(2, "gates")
def gate_apply_leaky(at: Setting) -> Iterator[Figure]:
    """The replay of a leaky ReLU, and its backward."""
    x = images(at)
    _, bits = ops.gate_relu(x, 0.2)
    yield from race(
        at,
        "gate_apply, leaky",
        lambda: ops.gate_apply(x, bits, 0.2),
        of_copy(at, 2 * x.nbytes + bits.nbytes),
        faster("the backward of F.leaky_relu", lambda: torch.ops.aten.leaky_relu_backward(x, x, 0.2, False)),
    )


@case(2, "gates")
def gate_max_pool(at: Setting) -> Iterator[Figure]:
    """Max-pooling of ReLU with what its backward needs."""
    x = images(at)
    planes = x.flatten(0, 1)
    yield from race(
        at,
        "gate_max_pool",
        lambda: ops.gate_max_pool(planes, 2, 2, 2, 2, True),
        of_copy(at, x.nbytes + x.nbytes // 2),  # values and indices of a quarter of the elements
        faster("F.max_pool2d with indices", lambda: F.max_pool2d(x, 2, return_indices=True)),
    )


@case(2, "gates")
def gate_take_and_put(at: Setting) -> Iterator[Figure]:
    """The replay of a max-pool, and its backward."""
    x = images(at)
    planes = x.flatten(0, 1)
    values, indices = ops.gate_max_pool(planes, 2, 2, 2, 2, True)
    flat, moved = x.view(len(planes), -1), of_copy(at, 2 * values.nbytes + x.nbytes)
    yield from race(at, "gate_take", lambda: ops.gate_take(flat, indices), moved)
    pooled, chosen = F.max_pool2d(x, 2, return_indices=True)
    backward = torch.ops.aten.max_pool2d_with_indices_backward
    theirs = faster(
        "the backward of F.max_pool2d",
        lambda: backward(pooled, x, [2, 2], [2, 2], [0, 0], [1, 1], False, chosen),
    )
    yield from race(at, "gate_put", lambda: ops.gate_put(values, indices, flat.shape[1]), moved, theirs)


# ---- lists of tensors -----------------------------------------------------------------------------------------------


def parameters(at: Setting) -> list[Tensor]:
    """Those of a network of 2²⁸ parameters."""
    return [torch.randn(max(1, at.elements // TENSORS), device=at.device) for _ in range(2 if at.dry else TENSORS)]


def bytes_of(tensors: list[Tensor]) -> int:
    """Of all of them."""
    return sum(x.nbytes for x in tensors)


def stored_probe(x: list[Tensor], distribution: str) -> list[Tensor]:
    """A probe drawn into memory."""
    if distribution == "gaussian":
        return [torch.randn_like(t) for t in x]
    return [torch.empty_like(t).bernoulli_().mul_(2).sub_(1) for t in x]


@case(2, LISTS, distribution=("gaussian", "rademacher"))
def perturb(at: Setting, distribution: str) -> Iterator[Figure]:
    """θ + εz, z drawn on the way."""
    x, key = parameters(at), key_on(at)
    out = [torch.empty_like(t) for t in x]
    yield from race(
        at,
        f"perturb, {distribution}",
        lambda: ops.perturb(out, x, key, 1e-3, distribution),
        of_copy(at, 2 * bytes_of(x)),
        faster(FOREACH, lambda: torch._foreach_add(x, stored_probe(x, distribution), alpha=1e-3)),
    )


@case(2, LISTS, distribution=("gaussian", "rademacher"))
def probe_dot(at: Setting, distribution: str) -> Iterator[Figure]:
    """⟨z, v⟩, z drawn on the way."""
    x, key = parameters(at), key_on(at)

    def theirs() -> Tensor:
        return torch.stack([t.sum() for t in torch._foreach_mul(x, stored_probe(x, distribution))]).sum()

    ours = of_copy(at, bytes_of(x))
    yield from race(
        at, f"probe_dot, {distribution}", lambda: ops.probe_dot(x, key, distribution), ours, faster(FOREACH, theirs)
    )


@case(2, LISTS)
def axpy_diff(at: Setting) -> Iterator[Figure]:
    """out += s(a − b) and ‖a − b‖²."""
    x, other = parameters(at), parameters(at)
    out, scale = [torch.zeros_like(t) for t in x], torch.tensor(0.5, dtype=torch.float64, device=at.device)

    def theirs() -> Tensor:
        difference = torch._foreach_sub(x, other)
        torch._foreach_add_(out, difference, alpha=0.5)
        return torch.stack(torch._foreach_norm(difference)).square().sum()

    moved = of_copy(at, 4 * bytes_of(x))
    yield from race(at, "axpy_diff", lambda: ops.axpy_diff(out, x, other, scale), moved, faster(FOREACH, theirs))


@case(2, LISTS)
def sum_squares(at: Setting) -> Iterator[Figure]:
    """‖v‖²."""
    x = parameters(at)
    theirs = faster(FOREACH, lambda: torch.stack(torch._foreach_norm(x)).square().sum())
    yield from race(at, "sum_squares", lambda: ops.sum_squares(x), of_copy(at, bytes_of(x)), theirs)


# ---- norms of per-example gradients ---------------------------------------------------------------------------------

CONVOLUTIONS = ((3, 64, 32), (64, 64, 32), (128, 128, 16), (256, 256, 8), (512, 512, 4))
"""Channels, outputs and size of 3x3 convolutions, as the networks have them from front to end."""
POSITIONS = (16, 256)
"""Of a linear layer of 512 inputs and outputs."""
PRECISIONS = ("float32", "TF32")
FORMS = ("direct", "Gram")
OF_WEIGHT_GRADIENT = "the batch's weight gradient"
"""As many multiply-adds as the direct form."""


def allow_tf32(precision: str) -> None:
    """Lets matrix products and convolutions round to TF32, or not."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "TF32"


@case(2, "norms of gradients", precision=PRECISIONS, shape=CONVOLUTIONS, form=FORMS)
def grad_sqnorm_conv(at: Setting, precision: str, shape: tuple[int, int, int], form: str) -> Iterator[Figure]:
    """Of a convolution."""
    allow_tf32(precision)
    channels, outputs, size = map(at.size, shape)
    a, d = (torch.randn(at.examples, n, size, size, device=at.device) for n in (channels, outputs))
    weight, same = a.new_empty(outputs, channels, 3, 3), ([1, 1], [1, 1], [1, 1])
    rest: tuple[Any, ...] = (None, *same, False, [0, 0], 1, [False, True, False])
    yield from race(
        at,
        f"{shape[0]} to {shape[1]} at {shape[2]}x{shape[2]}, {precision}, {form}",
        lambda: ops.grad_sqnorm_conv(a, d, [3, 3], *same, 1, form == "Gram"),
        cost(OF_WEIGHT_GRADIENT, lambda: torch.ops.aten.convolution_backward(d, a, weight, *rest)),
    )


@case(2, "norms of gradients", precision=PRECISIONS, positions=POSITIONS, form=FORMS)
def grad_sqnorm_linear(at: Setting, precision: str, positions: int, form: str) -> Iterator[Figure]:
    """Of a linear layer."""
    allow_tf32(precision)
    a, d = torch.randn(2, at.examples, at.size(positions), at.size(512), device=at.device)
    yield from race(
        at,
        f"linear, {positions} positions, {precision}, {form}",
        lambda: ops.grad_sqnorm_linear(a, d, form == "Gram"),
        cost(OF_WEIGHT_GRADIENT, lambda: d.flatten(0, 1).mT @ a.flatten(0, 1)),
    )


@case(2, "norms of gradients")
def channel_products(at: Setting) -> Iterator[Figure]:
    """Of a normalisation."""
    a, d = torch.randn(2, max(1, at.elements // 2**17), 64, 1024, device=at.device)
    center = a[0, :, 0].contiguous()
    moved = of_copy(at, 2 * a.nbytes)
    yield from race(at, "channel_products", lambda: ops.channel_products(a, d, center), moved)
