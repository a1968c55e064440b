"""What the tests of the operators share: the grids, and the errors that are allowed."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastfisher import ops
from fastfisher.ops import reference

needs_kernels = pytest.mark.skipif(ops.UNAVAILABLE is not None, reason=f"no compiled kernels: {ops.UNAVAILABLE}")
OPERATORS = list(ops.served.FAMILIES)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
KEY = torch.tensor([1234, 2**40 + 7])
DISTRIBUTIONS = ["gaussian", "rademacher"]
SIGNIFICANCE = 1e-4


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    """Equal, the sign of 0 included; any NaN is as good as any other."""
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(a.signbit() | a.isnan(), b.signbit() | b.isnan())


def cases(device: str = "cpu") -> dict[str, list[tuple[Any, ...]]]:
    """Arguments of each operator, made anew since some are written to; so large that every one has several tasks."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator).to(device)  # noqa: E731
    whole = lambda low, high, *shape: torch.randint(low, high, shape, generator=generator).to(device)  # noqa: E731
    x, labels, key = normal(300, 1000), whole(0, 1000, 300), KEY.to(device)
    words, indices = whole(-(2**31), 2**31, 9375).int(), whole(-1, 1000, 300, 500).int()
    lists = [normal(n) for n in (3, 200_000, 1025)]
    out = lambda: [t.clone() for t in lists]  # noqa: E731
    images, gradients = normal(30, 6, 20, 20), normal(30, 10, 20, 20)
    flat, other = images.flatten(2), gradients.flatten(2)[:, :6].contiguous()
    mean, variance = flat.double().mean((0, 2)), flat.double().var((0, 2))
    same = ([3, 3], [1, 1], [1, 1], [1, 1], 1)
    return {
        "sample_cross_entropy": [(x, key, 0.5)],
        "sample_binary_cross_entropy": [(x, key, 0.5), (images, key, 0.5, 2**33 + 5)],
        "softmax_hessian_product": [(x, labels, x + 1, 0.5)],
        "rademacher_cotangent": [(x, key, 0.5)],
        "gate_relu": [(x,), (x, 0.2)],
        "gate_relu_": [(x.clone(),), (x.clone(), 0.2)],
        "gate_apply": [(x, words), (x, words, 0.2)],
        "gate_max_pool": [(images.flatten(0, 1), 3, 2, 1, 2, True), (images.flatten(0, 1), 2, 2, 2, 2, False)],
        "gate_take": [(x, indices)],
        "gate_put": [(x[:, :500].contiguous(), indices, 1000)],
        "axpy_diff": [(out(), lists, [2 * t for t in lists], scalar(0.5).to(device))],
        "sum_squares": [(lists,)],
        "probe_dot": [(lists, key, distribution, 3) for distribution in DISTRIBUTIONS],
        "perturb": [(out(), lists, key, 0.1, distribution, 5) for distribution in DISTRIBUTIONS],
        "grad_sqnorm_linear": [(flat, other, gram) for gram in (False, True)],
        "grad_sqnorm_conv": [(images, gradients, *same, gram) for gram in (False, True)],
        "channel_products": [(flat, other, flat[0, :, 0].contiguous())],
        "batch_norm": [(flat, None, None, 1e-5), (flat, normal(6), normal(6), 1e-5)],
        "batch_norm_backward": [
            (other, bits, flat, normal(6), mean, variance, 1e-5) for bits in (None, words[: flat.numel() // 32])
        ],
    }


# ---- rows -----------------------------------------------------------------------------------------------------------

# One lane, less than a vector, whole and broken vectors, one tile less and more by one, several tiles, the widest.
CLASSES = [1, 2, 7, 10, 16, 100, 127, 1000, 1023, 1024, 1025, 2048, 5000, 50257, 262144]


def logits_for(classes: int, dtype: torch.dtype, rows: int | None = None) -> Tensor:
    rows = rows or max(2, min(64, 2**18 // classes))
    return (3 * torch.randn(rows, classes, generator=torch.Generator().manual_seed(classes))).to(dtype)


def precise(x: Tensor) -> Any:
    """In more digits than float64 has."""
    return x.detach().double().numpy().astype(numpy.longdouble)


def assert_errs_at_most_twice_what_pytorch_errs(
    logits: Tensor, nll: Tensor, labels: Tensor, dlogits: Tensor, scale: float
) -> None:
    classes, dtype = logits.shape[1], logits.dtype
    onehot = F.one_hot(labels, classes)
    exact = numpy.asarray(logits.double().cpu()).astype(numpy.longdouble)  # 64 bits of mantissa judge float64 too
    exact -= exact.max(1, keepdims=True)
    exact_nll = numpy.log(numpy.exp(exact).sum(1)) - exact[numpy.arange(len(labels)), labels.cpu().numpy()]
    exact_dlogits = (numpy.exp(exact) / numpy.exp(exact).sum(1, keepdims=True) - onehot.cpu().numpy()) * scale

    def error(found: Tensor, truth: numpy.ndarray) -> float:
        return float(numpy.abs(found.double().cpu().numpy() - truth).max())

    # PyTorch's own computation in the same dtype. Half a unit in the last place of the largest result is granted to
    # both: where it happens to be representable, PyTorch has no error at all.
    torch_dlogits = (logits.softmax(1) - onehot) * scale
    half_ulp = torch.finfo(dtype).eps / 2 * float(numpy.abs(exact_dlogits).max())
    assert error(dlogits, exact_dlogits) <= 2 * error(torch_dlogits, exact_dlogits) + half_ulp
    torch_nll = F.cross_entropy(logits.to(nll.dtype), labels, reduction="none")
    half_ulp = torch.finfo(nll.dtype).eps / 2 * float(exact_nll.max())
    assert error(nll, exact_nll) <= 2 * error(torch_nll, exact_nll) + half_ulp
    assert nll.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert dlogits.dtype == dtype


def assert_labels_are_the_exact_inverse_cdf(logits: Tensor, labels: Tensor, key: Tensor) -> None:
    expected = reference.sample_labels(logits, key)
    # A draw may fall to the other side of an edge only where its target lies within rounding of that edge: then the
    # two labels are neighbours among the classes of positive weight in their tile, or in neighbouring tiles.
    for row in (labels != expected).nonzero().flatten().tolist():
        u = reference.philox(key, torch.tensor([row]))[0].double() * 2.0**-32
        weights = F.pad(
            (logits[row].double() - logits[row].double().max()).exp(), (0, -logits.shape[1] % reference.TILE)
        )
        tiles = weights.view(-1, reference.TILE)
        by_tile = tiles.sum(1).cumsum(0) / tiles.sum()
        within = tiles[expected[row] // reference.TILE].cumsum(0)
        distance = min((by_tile - u[0]).abs().min(), (within / within[-1] - u[1]).abs().min())
        assert distance < 2e-6, f"row {row}: {labels[row]} instead of {expected[row]}"
    assert (labels != expected).float().mean() < 0.05


# The group of 64 less and more by one, several groups, several tasks; maps. Enough elements to find the worst error.
SHAPES = [(63,), (64,), (65,), (1, 130), (100, 33), (3, 4, 5, 7), (50_001,)]


def binary_logits_for(shape: tuple[int, ...], dtype: torch.dtype, size: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (size * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def exact_binary(logits: Tensor, labels: Tensor) -> tuple[Any, Any]:
    """The loss at the labels and sigmoid − label, in more digits than float64 has and without a subtraction."""
    z, y = precise(logits.cpu()), labels.cpu().double().numpy()
    against = numpy.where(y > 0, -z, z)
    t = numpy.exp(-numpy.abs(z))
    missed = numpy.where(against >= 0, 1, t) / (1 + t)  # the probability of the other label
    return numpy.maximum(against, 0) + numpy.log1p(t), numpy.where(y > 0, -missed, missed)


def assert_binary_errs_at_most_twice_what_pytorch_errs(
    logits: Tensor, nll: Tensor, labels: Tensor, dlogits: Tensor, scale: float
) -> None:
    assert nll.shape == labels.shape == dlogits.shape == logits.shape
    assert nll.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    assert labels.dtype == dlogits.dtype == logits.dtype
    assert bool(((labels == 0) | (labels == 1)).all())
    exact_nll, exact_dlogits = exact_binary(logits, labels)
    exact_dlogits = exact_dlogits * numpy.longdouble(scale)
    low = logits.to(nll.dtype)
    pytorch = F.binary_cross_entropy_with_logits(low, labels.to(nll.dtype), reduction="none")
    for found, theirs, exact in (
        (nll, pytorch, exact_nll),
        (dlogits, (logits.sigmoid() - labels) * scale, exact_dlogits),
    ):
        mine, other = (float(numpy.abs(precise(x.cpu()) - exact).max()) for x in (found, theirs))
        # Half a unit in the last place of the largest, as above.
        assert mine <= 2 * other + torch.finfo(found.dtype).eps / 2 * float(numpy.abs(exact).max())


def assert_binary_labels_are_those_of_the_definition(
    logits: Tensor, labels: Tensor, key: Tensor, first: int = 0
) -> None:
    """Equal, but where the uniform number lies within rounding of the probability: for either of them, a few units of
    the smaller of p and 1 − p in what the kernel computes in."""
    expected = reference.sample_bernoulli(logits.cpu(), key, first)
    differ = (labels.cpu() > 0) != expected
    p, u = logits.cpu().double().sigmoid(), reference.uniforms(logits.numel(), key, first).view(logits.shape)
    unit = torch.finfo(torch.promote_types(logits.dtype, torch.float32)).eps
    assert bool(((u - p).abs() <= 8 * unit * torch.minimum(p, 1 - p))[differ].all())
    assert int(differ.sum()) <= 3 + differ.numel() // 100_000  # at random, within 16 units of 2⁻²⁴ at most


# ---- lists ----------------------------------------------------------------------------------------------------------

# The kernel makes its normal numbers in float32: a radius, a sine and their product, each within 2 units in the last
# place; no normal number from 32 bits exceeds 6.8.
NORMAL_ERROR = 6 * 2.0**-24


# ---- norms ----------------------------------------------------------------------------------------------------------

# channels, outputs, input size, kernel, stride, padding, dilation, groups
CONVOLUTIONS = [
    (3, 5, (9, 7), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (3, 33, (8, 8), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (17, 16, (5, 6), (1, 1), (2, 1), (0, 0), (1, 1), 1),
    (4, 6, (9, 10), (2, 3), (2, 3), (1, 2), (2, 1), 2),
    (8, 8, (6, 5), (3, 3), (1, 1), (1, 1), (1, 1), 8),
    (5, 40, (2, 2), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (2, 3, (3, 3), (3, 3), (1, 1), (0, 0), (1, 1), 1),
    (3, 4, (20,), (5,), (3,), (2,), (2,), 1),
    (2, 3, (4, 5, 6), (3, 2, 1), (1, 2, 1), (1, 0, 0), (1, 1, 2), 1),
    (1, 1, (40, 41), (7, 7), (1, 1), (3, 3), (1, 1), 1),
]
GRAM_LOSS = 64.0
"""How many rounding errors the Gram form may show: a few, times the 16 of cancellation that the kernel lets pass."""


def rounding(a: Tensor, d: Tensor, args: tuple) -> list[Tensor]:
    """By how much an error in each product of a gradient's sums is amplified in its squared norm, twice over.

    Σ |g| Σ_t |a_t d_t| / ‖g‖²: rounding errors of sums over T positions grow like √T at random.
    """
    kernel, stride, padding, dilation, groups, _ = args
    weight = torch.empty(d.shape[1], a.shape[1] // groups, *kernel, dtype=torch.float64)
    bounds = []
    for slot in (1, 2):
        each = []
        for x, y in zip(a.double(), d.double(), strict=True):
            g, magnitude = (
                torch.ops.aten.convolution_backward(
                    y[None], x[None], weight, [d.shape[1]], stride, padding, dilation, False, [0] * len(kernel), groups,
                    [False, True, True],
                )[slot]
                for x, y in ((x, y), (x.abs(), y.abs()))
            )  # fmt: skip
            each.append((g.abs() * magnitude).sum() / g.square().sum())
        bounds.append(2 * d[0, 0].numel() ** 0.5 * torch.stack(each) + 2)
    return bounds
