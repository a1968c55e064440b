"""The Triton kernels for per-example gradients against reference.py, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton.language as tl

from fastfisher.engine.layers.linear import gram_is_cheaper
from fastfisher.kernels import norms
from fastfisher.kernels.checks import TYPES
from fastfisher.ops import reference
from tests.support.operators import CONVOLUTIONS, GRAM_LOSS, rounding

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] * (DEVICE == "cuda")
# The interpreter rounds bfloat16 wrongly.
DTYPES = [torch.float32, torch.float64, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
# Those of the other backends; the largest without the Gram form, whose pairs of 1,640 positions would keep the
# interpreter busy for minutes; and one of several tiles and blocks, with stride and dilation.
FORMS = [(shape, gram) for shape in CONVOLUTIONS for gram in (False, True) if not (gram and shape[2] == (40, 41))]
PRECISION = norms._precision
SEVERAL = (9, 70, (21, 12), (3, 3), (2, 1), (1, 1), (1, 2), 1)


@pytest.fixture(autouse=True)
def products_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU convolutions multiply in TF32 unless told otherwise; norms are held to the errors of float32 here."""
    monkeypatch.setattr(norms, "_precision", lambda dtype, convolution: "ieee")


def low(dtype: torch.dtype) -> torch.dtype:
    """What is computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def convolution(shape: tuple, dtype: torch.dtype, examples: int = 2) -> tuple[Tensor, Tensor, tuple]:
    """Input, output gradient and options."""
    channels, outputs, size, *rest, groups = shape
    kernel, stride, padding, dilation = (list(x) for x in rest)
    spans = zip(size, kernel, stride, padding, dilation, strict=True)
    out = [(n + 2 * p - m * (k - 1) - 1) // s + 1 for n, k, s, p, m in spans]
    generator = torch.Generator().manual_seed(4)
    a, d = (
        torch.randn(examples, *each, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
        for each in ((channels, *size), (outputs, *out))
    )
    return a, d, (kernel, stride, padding, dilation, groups)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "gram"), [*FORMS, (SEVERAL, False), (SEVERAL, True)], ids=str)
def test_norms_of_convolution_gradients(shape: tuple, gram: bool, dtype: torch.dtype) -> None:
    a, d, options = convolution(shape, dtype)
    args = (*options, gram)
    found = [x.cpu() for x in norms.grad_sqnorm_conv(a, d, *args)]
    a, d = a.cpu(), d.cpu()
    exact = reference.grad_sqnorm_conv(a.double(), d.double(), *args)
    pytorch = reference.grad_sqnorm_conv(a.to(low(dtype)), d.to(low(dtype)), *args)
    for mine, theirs, truth, bound in zip(found, pytorch, exact, rounding(a, d, args), strict=True):
        assert mine.dtype == torch.float64
        allowed = 2 * (theirs / truth - 1).abs() + torch.finfo(low(dtype)).eps * (bound + (GRAM_LOSS if gram else 0))
        assert bool(((mine / truth - 1).abs() <= allowed).all())


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
# A single position, one feature each, less than a tile, whole tiles, several blocks of positions, several tiles.
@pytest.mark.parametrize(
    "shape", [(1, 5, 3), (2, 1, 1), (7, 33, 17), (40, 16, 32), (130, 3, 50), (3, 200, 12), (5, 70, 130)], ids=str
)
def test_norms_of_linear_gradients(shape: tuple[int, int, int], dtype: torch.dtype, gram: bool) -> None:
    positions, inputs, outputs = shape
    generator = torch.Generator().manual_seed(5)
    a, d = (
        torch.randn(2, positions, n, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
        for n in (inputs, outputs)
    )
    truth = reference.grad_sqnorm_linear(a, d, gram)
    pytorch = torch.bmm(d.to(low(dtype)).mT, a.to(low(dtype))).double().square().sum((1, 2))
    g, magnitude = (torch.bmm(y.double().mT, x.double()) for x, y in ((a, d), (a.abs(), d.abs())))
    amplified = 2 * positions**0.5 * (g.abs() * magnitude).sum((1, 2)) / truth + 2
    allowed = 2 * (pytorch / truth - 1).abs() + torch.finfo(low(dtype)).eps * (amplified + (GRAM_LOSS if gram else 0))
    assert bool(((norms.grad_sqnorm_linear(a, d, gram) / truth - 1).abs() <= allowed).all())


def test_the_gram_form_notices_that_it_cancels() -> None:
    torch.manual_seed(0)
    a, d = torch.randn(3, 2, 30), torch.randn(3, 2, 20)
    a[1, 1], d[1, 1] = a[1, 0], -d[1, 0] * (1 + 1e-3)  # the two positions of one example all but cancel
    truth = reference.grad_sqnorm_linear(a, d, True)
    products = (torch.bmm(a, a.mT) * torch.bmm(d, d.mT)).sum((1, 2))  # what the Gram form alone would give
    assert float((products / truth - 1).abs().max()) > 1e-2
    a, d, truth = a.to(DEVICE), d.to(DEVICE), truth.to(DEVICE)
    assert float((norms.grad_sqnorm_linear(a, d, True) / truth - 1).abs().max()) < 1e-3
    x, y = a.mT.reshape(3, 30, 1, 2), d.mT.reshape(3, 20, 1, 2)
    found, _ = norms.grad_sqnorm_conv(x, y, [1, 1], [1, 1], [0, 0], [1, 1], 1, True)
    assert float((found / truth - 1).abs().max()) < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "size", [1, 15, 32, 33, 300]
)  # rows of either width, whole and broken, and more than one block
def test_channel_products(size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(6)
    a, d = (torch.randn(3, 7, size, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for _ in range(2))
    center = torch.randn(7, generator=generator).to(DEVICE, dtype)
    found, exact = (m.channel_products(a, d, center) for m in (norms, reference))
    wide = low(dtype)
    products = (a.to(wide) - center.to(wide)[:, None]) * d.to(wide)
    magnitude = products.abs().sum(2).double()
    for mine, theirs, truth in zip(found, (products.sum(2), d.to(wide).sum(2)), exact, strict=True):
        assert mine.dtype == torch.float64
        # The difference from the center is rounded once, as PyTorch's; the sums are exact beside that.
        allowed = 2 * (theirs - truth).abs() + torch.finfo(wide).eps * magnitude
        assert bool(((mine - truth).abs() <= allowed).all())


@pytest.mark.skipif(DEVICE == "cuda", reason="compiled kernels keep the constant of their first launch")
def test_patches_are_read_alike_in_either_order(monkeypatch: pytest.MonkeyPatch) -> None:
    a, d, options = convolution(SEVERAL, torch.float32)
    found = []
    for last_first in (True, False):
        monkeypatch.setattr(norms, "LAST_DIMENSION_FIRST", tl.constexpr(last_first))
        found.append(norms.grad_sqnorm_conv(a, d, *options, False)[0])
    assert torch.equal(*found)


def test_the_same_bits_twice() -> None:
    a, d, options = convolution(SEVERAL, torch.float32)
    flat, other = a.flatten(2), d.flatten(2)[:, : a.shape[1], :200]
    runs = []
    for _ in range(2):
        runs.append([
            *norms.grad_sqnorm_conv(a, d, *options, True),
            *norms.grad_sqnorm_conv(a, d, *options, False),
            norms.grad_sqnorm_linear(flat, other, True),
            *norms.channel_products(flat, flat, a[0, :, 0, 0]),
        ])  # fmt: skip
    assert all(map(torch.equal, *runs))


def test_nothing_to_sum() -> None:
    for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        ones = torch.ones(shape, device=DEVICE)
        found = norms.grad_sqnorm_linear(ones, ones, False)
        assert found.shape == shape[:1] and not found.any()
    a, d = torch.ones(0, 2, 5, device=DEVICE), torch.ones(0, 3, 5, device=DEVICE)
    assert all(x.shape == (0,) for x in norms.grad_sqnorm_conv(a, d, [1], [1], [0], [1], 1, True))
    empty = torch.ones(2, 3, 0, device=DEVICE)
    for x in norms.channel_products(empty, empty, torch.ones(3, device=DEVICE)):
        assert x.shape == (2, 3) and not x.any()


def test_bad_arguments_are_named() -> None:
    a, d, two = torch.randn(2, 4, 5, 5, device=DEVICE), torch.randn(2, 6, 5, 5, device=DEVICE), [1, 1]
    with pytest.raises(ValueError, match="does not fit"):
        norms.grad_sqnorm_conv(a, d, [3, 3], two, [0, 0], two, 1, False)
    with pytest.raises(ValueError, match="groups: expected a divisor"):
        norms.grad_sqnorm_conv(a, d, [3, 3], two, two, two, 3, False)
    with pytest.raises(ValueError, match="expected 4 dimensions"):
        norms.grad_sqnorm_conv(a[0], d, [3, 3], two, two, two, 1, False)
    with pytest.raises(ValueError, match="same examples"):
        norms.grad_sqnorm_conv(a[:1], d, [3, 3], two, two, two, 1, False)
    with pytest.raises(ValueError, match="1 to 3 numbers each"):
        norms.grad_sqnorm_conv(a, d, [3, 3], [1], two, two, 1, False)
    with pytest.raises(ValueError, match="expected the same examples, positions"):
        norms.grad_sqnorm_linear(a[0], d[0], False)
    with pytest.raises(ValueError, match="float32, float64, bfloat16 or float16"):
        norms.grad_sqnorm_linear(a[0].long(), a[0].long(), False)
    with pytest.raises(ValueError, match="center: expected 4 numbers"):
        norms.channel_products(a.flatten(2), a.flatten(2), torch.zeros(3, device=DEVICE))


# ---- the tiles -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float32, "tf32"), *((dtype, "ieee") for dtype in (*DTYPES[:3], torch.bfloat16))],
)
def test_every_shape_has_a_tile_that_is_compiled(dtype: torch.dtype, precision: str) -> None:
    compiled = [
        (
            c.kernel,
            c.num_warps,
            *(c.constants[n] for n in ("OUTPUTS", "INPUTS", "POSITIONS", "DEPTH") if n in c.constants),
        )
        for c in norms.CONFIGURATIONS
        if c.signature["a"] == f"*{TYPES[dtype]}" and c.constants.get("PRECISION") == precision
    ]
    for size in (1, 3, 16, 17, 27, 32, 33, 64, 65, 512, 4608):
        for outputs in (1, 10, 16, 17, 33, 64, 100, 512):
            tile = norms.direct_tile(dtype, precision, size, outputs)
            assert (norms._direct, tile.warps, tile.rows, tile.columns, tile.depth) in compiled
        tile = norms.gram_tile(dtype, precision, size)
        assert tile.rows == tile.columns and (norms._gram, tile.warps, tile.rows, tile.depth) in compiled


def test_tiles_without_tensor_cores_are_no_wider_than_the_gradient_needs() -> None:
    for inputs, outputs, rows, columns in [(27, 10, 16, 32), (33, 17, 32, 64), (576, 64, 64, 64), (4608, 512, 64, 64)]:
        tile = norms.direct_tile(torch.float32, "ieee", inputs, outputs)
        assert (tile.rows, tile.columns) == (rows, columns)
    rows = [norms.gram_tile(torch.float32, "ieee", n).rows for n in (2, 16, 17, 49, 196)]
    assert rows == [16, 16, 32, 64, 64]


def test_on_a_gpu_the_form_goes_by_multiply_adds() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    # Two convolutions of 3x3, 64 -> 64 at 32x32 and 512 -> 512 at 7x7; then where only the CPU's rates say Gram.
    for positions, inputs, outputs, expected in [(1024, 576, 64, False), (49, 4608, 512, True), (4, 64, 10, False)]:
        assert gram_is_cheaper(positions, inputs, outputs, gpu) == expected
    assert gram_is_cheaper(4, 64, 10, cpu)


def test_tf32_is_used_where_pytorch_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for linear, convolution in (("tf32", "ieee"), ("ieee", "tf32"), ("none", "none")):
        monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision=linear))
        monkeypatch.setattr(torch.backends.cudnn, "conv", SimpleNamespace(fp32_precision=convolution))
        assert PRECISION(torch.float32, False) == ("tf32" if linear == "tf32" else "ieee")
        assert PRECISION(torch.float32, True) == ("tf32" if convolution == "tf32" else "ieee")
        assert PRECISION(torch.bfloat16, False) == PRECISION(torch.bfloat16, True) == "ieee"
    monkeypatch.undo()
    assert {PRECISION(torch.float32, convolution) for convolution in (False, True)} <= {"tf32", "ieee"}  # PyTorch's own
