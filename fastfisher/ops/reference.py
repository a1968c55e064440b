"""Each operator in a few lines of plain PyTorch: the executable specification, and the fallback without kernels.

The compiled kernels are tested against this file; where they are missing, this file serves, differentiable by
PyTorch's own autograd.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TILE = 1024
"""Columns per tile of the inverse-CDF search (``kTile`` in csrc/cpu/kernels.h): part of the definition of a draw."""

_MASK = 0xFFFFFFFF

_CHUNK = 1 << 22
"""So many logits are taken in float64 at a time."""


def philox(key: Tensor, elements: Tensor) -> Tensor:
    """Philox4x32-10 at counter (element, offset), key (seed, offset): int64[..., 4] holding 32-bit words.

    ``elements`` are on the key's device; no word is read by the host.
    """
    c0, c1 = elements & _MASK, (elements >> 32) & _MASK
    c2, c3 = ((key[1] >> shift & _MASK).expand_as(c0) for shift in (0, 32))
    k0, k1 = key[0] & _MASK, key[0] >> 32 & _MASK
    for _ in range(10):
        # int64 products wrap, but the 64 bits they keep are those of the unsigned product.
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((product1 >> 32) & _MASK) ^ c1 ^ k0, product1 & _MASK
        c2, c3 = ((product0 >> 32) & _MASK) ^ c3 ^ k1, product0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return torch.stack([c0, c1, c2, c3], dim=-1)


def first_above(weights: Tensor, u: Tensor) -> Tensor:
    """Per row, the first index whose running sum exceeds u times the total; never one of zero weight."""
    running = weights.cumsum(-1)
    index = torch.searchsorted(running, u[:, None] * running[:, -1:], right=True)
    last_positive = weights.shape[1] - 1 - (weights > 0).flip(-1).int().argmax(-1, keepdim=True)
    return torch.minimum(index, last_positive).squeeze(-1)


def sample_labels(logits: Tensor, key: Tensor, first: int = 0) -> Tensor:
    """Draws ŷ ~ softmax(logits) for each row of ``logits[N, C]`` by inverse CDF in float64.

    Word 0 of ``philox(key, first + row)`` picks a tile of 1,024 columns by the tiles' sums, word 1 an element in it.
    """
    rows, columns = logits.shape
    if rows * columns > _CHUNK and rows > 1:
        parts = torch.split(logits, max(1, _CHUNK // columns))
        return torch.cat([sample_labels(part, key, first + i * len(parts[0])) for i, part in enumerate(parts)])
    weights = (logits.double() - logits.double().amax(1, keepdim=True)).exp()
    tiles = torch.nn.functional.pad(weights, (0, -columns % TILE)).view(rows, -1, TILE)
    u = philox(key, first + torch.arange(rows, device=key.device)).to(logits.device).double() * 2.0**-32
    tile = first_above(tiles.sum(-1), u[:, 0])
    return tile * TILE + first_above(tiles[torch.arange(rows, device=tile.device), tile], u[:, 1])


def check_softmax(logits: Tensor) -> Tensor:
    """Which rows have a softmax; on the CPU, a row without one is a ValueError that names it."""
    x = logits.detach()
    largest = x.amax(1) if len(x) else x.sum(1)
    good = largest.isfinite() & ~x.isnan().any(1)
    if x.device.type == "cpu" and not bool(good.all()):
        row = int((~good).int().argmax())
        raise ValueError(f"logits: row {row} has no softmax (it holds NaN or +inf, or nothing above -inf)")
    return good


def sample_cross_entropy(logits: Tensor, key: Tensor, scale: float, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Per row of ``logits[N, C]``: ŷ ~ softmax, −log p(ŷ), and (softmax − onehot(ŷ))·scale.

    Row i is drawn as row ``first + i`` of more logits, of which these are a part.

    Returns:
        nll[N] (float64 for float64 logits, else float32), labels[N] (int64), dlogits[N, C] (the logits' dtype).

    Raises:
        ValueError: a row holds NaN or +inf, or nothing above −inf. On a GPU, where a check would stall the stream,
            such a row has NaN loss and label −1 instead.
    """
    x = logits if logits.dtype == torch.float64 else logits.float()
    good = check_softmax(x)
    known = torch.where(good[:, None], x.detach(), 0)
    labels = sample_labels(known, key, first) if len(x) else x.new_empty(0, dtype=torch.long)
    log_p = x.log_softmax(1)
    nll = -log_p.gather(1, labels[:, None]).squeeze(1)
    onehot = torch.nn.functional.one_hot(labels, logits.shape[1])
    dlogits = ((log_p.exp() - onehot) * scale).to(logits.dtype)
    return nll, torch.where(good, labels, -1), dlogits


def uniforms(numel: int, key: Tensor, first: int = 0) -> Tensor:
    """Numbers between 0 and 1, (word + ½)·2⁻³² in float64, for the elements ``first`` … ``first + numel``.

    Sixteen Philox calls serve a group of 64 elements; element e of the group has word e // 16 of call e % 16.
    """
    e = torch.arange(first, first + numel, device=key.device)
    words = philox(key, e // 64 * 16 + e % 16).gather(-1, (e // 16 % 4)[:, None]).squeeze(-1)
    return (words.double() + 0.5) * 2.0**-32


def sample_bernoulli(logits: Tensor, key: Tensor, first: int = 0) -> Tensor:
    """Draws y ~ Bernoulli(sigmoid(z)) for each element z: whether its number of :func:`uniforms` is below sigmoid."""
    drawn = torch.empty_like(logits, dtype=torch.bool, memory_format=torch.contiguous_format)
    for z, y in zip(torch.split(logits.flatten(), _CHUNK), torch.split(drawn.view(-1), _CHUNK), strict=True):
        y.copy_(uniforms(len(z), key, first).to(z.device) < z.double().sigmoid())
        first += len(z)
    return drawn


def sample_binary_cross_entropy(
    logits: Tensor, key: Tensor, scale: float, first: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Per element z: y ~ Bernoulli(sigmoid(z)), −log p(y) = softplus(z) − y z, and (sigmoid(z) − y)·scale.

    Element i, in row-major order, is drawn as element ``first + i`` of more logits, of which these are a part.

    Returns:
        nll (float64 for float64 logits, else float32), labels (0 or 1, in the logits' dtype) and dlogits (the logits'
        dtype), each of the logits' shape.

    Raises:
        ValueError: a logit is NaN. On a GPU, where a check would stall the stream, it has NaN loss and label −1
            instead.
    """
    bad = logits.detach().isnan()
    if bad.device.type == "cpu" and bool(bad.any()):
        raise ValueError(f"logits: expected no NaN, got one at {bad.nonzero()[0].tolist()}")
    z = logits if logits.dtype == torch.float64 else logits.float()
    y = sample_bernoulli(z.detach(), key, first)
    nll = -torch.nn.functional.logsigmoid(torch.where(y, z, -z))
    dlogits = ((z.sigmoid() - y.to(z.dtype)) * scale).to(logits.dtype)
    return nll, torch.where(bad, -1, y.to(logits.dtype)), dlogits


def linear_sample_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor | None,
    key: Tensor | None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """Per row of ``hidden[N, p]``: the cross-entropy of hidden·weightᵀ + bias at a label, and the label.

    The label is drawn where there is a key (as in :func:`sample_labels`), else it is the target. A row whose target is
    ``ignore_index`` has loss 0 and that label. With smoothing s the loss is (1 − s)·(−log p_ŷ) + s·mean_c(−log p_c).

    Returns:
        nll[N] (float64 for float64, else float32), labels[N] (int64).
    """
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if key is None:
        assert targets is not None
        labels = targets
    else:
        labels = sample_labels(logits.detach(), key, first)
        if targets is not None:
            labels = torch.where(targets == ignore_index, ignore_index, labels)
    nll = torch.nn.functional.cross_entropy(
        logits, labels, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
    )
    return nll, labels


def softmax_hessian_product(dlogits: Tensor, labels: Tensor, vector: Tensor, scale: float) -> Tensor:
    """(p⊙v − p (p·v))·scale per row, with p = dlogits/scale + onehot(labels): the Hessian of −log p applied to v."""
    compute = dlogits.dtype if dlogits.dtype == torch.float64 else torch.float32
    p = dlogits.to(compute) / scale + torch.nn.functional.one_hot(labels, dlogits.shape[1])
    v = vector.to(compute)
    return ((p * v - p * (p * v).sum(1, keepdim=True)) * scale).to(dlogits.dtype)


def gate_relu(x: Tensor, negative_slope: float | None = None) -> tuple[Tensor, Tensor]:
    """relu(x), and the gates that let its elements pass: bits, 32 to an int32 word, int32[ceil(numel / 32)].

    The gate of element 32k + b (in row-major order) is bit b of word k: 1 where x > 0 or NaN. With ``negative_slope``,
    leaky_relu(x, negative_slope), whose gates are open where x > 0.
    """
    leaky = negative_slope is not None
    passes = torch.nn.functional.pad((x > 0 if leaky else ~(x <= 0)).flatten(), (0, -x.numel() % 32))
    words = (passes.view(-1, 32).long() << torch.arange(32, device=x.device)).sum(1)
    out = x.relu() if negative_slope is None else torch.nn.functional.leaky_relu(x, negative_slope)
    return out, torch.where(words >= 2**31, words - 2**32, words).int()


def gate_relu_(x: Tensor, negative_slope: float | None = None) -> Tensor:
    """:func:`gate_relu` in place; returns the bits."""
    out, bits = gate_relu(x, negative_slope)
    x.copy_(out)
    return bits


def gate_apply(x: Tensor, bits: Tensor, negative_slope: float | None = None) -> Tensor:
    """``x`` where its bit in ``bits`` (see :func:`gate_relu`) is set, else 0, or x·``negative_slope`` if given."""
    gates = (bits[:, None] >> torch.arange(32, device=x.device, dtype=torch.int32)) & 1
    below = 0 if negative_slope is None else x * negative_slope
    return torch.where(gates.flatten()[: x.numel()].view(x.shape).bool(), x, below)


def gate_max_pool(
    x: Tensor, height: int, width: int, stride_height: int, stride_width: int, gated: bool
) -> tuple[Tensor, Tensor]:
    """Max-pool of ``x[planes, H, W]`` by windows height x width: values and indices, both [planes, outputs].

    An index (int32) is the place of the first maximum in its plane, row by row. With ``gated``, x is the output of a
    ReLU, and the index of a maximum of 0 is -1: no gradient passes there.
    """
    window, stride = (height, width), (stride_height, stride_width)
    values, indices = torch.nn.functional.max_pool2d_with_indices(x[None], window, stride)
    indices = torch.where(values <= 0, -1, indices) if gated else indices
    return values.view(len(x), -1), indices.view(len(x), -1).int()


def gate_take(x: Tensor, indices: Tensor) -> Tensor:
    """Of each plane of ``x[planes, elements]``, the elements at ``indices[planes, outputs]`` (int32), 0 at index -1."""
    return torch.where(indices < 0, 0, x.gather(1, indices.clamp(min=0).long()))


def gate_put(y: Tensor, indices: Tensor, elements: int) -> Tensor:
    """The transpose of :func:`gate_take`: ``y[planes, outputs]`` summed into planes of ``elements`` zeros."""
    y = torch.where(indices < 0, 0, y)
    return y.new_zeros(len(y), elements).scatter_add_(1, indices.clamp(min=0).long(), y)


def axpy_diff(out: list[Tensor], a: list[Tensor], b: list[Tensor], scale: Tensor) -> Tensor:
    """``out += scale (a − b)``, tensor by tensor in place; returns Σ (a − b)² over all of them.

    ``scale`` and the result are float64 scalars on the tensors' device: on a GPU the host waits for neither. With a
    scale of 0 neither ``a`` nor ``b`` is looked at, whatever they hold: ``out`` stays as it is, and the result is 0.
    """
    differences = [torch.where(scale == 0, 0, x - y) for x, y in zip(a, b, strict=True)]
    for target, difference in zip(out, differences, strict=True):
        target.add_(difference * scale.to(difference.dtype))
    return sum_squares(differences)


def sum_squares(tensors: list[Tensor]) -> Tensor:
    """Σ x² over all elements of all tensors, accumulated in float64: a float64 scalar."""
    return torch.stack([x.double().square().sum() for x in tensors]).sum()


def batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """weight (x − mean) / sqrt(variance + eps) + bias for ``x[examples, channels, size]``, by its own statistics.

    Returns:
        The result, and per channel the mean and the biased variance, float64.
    """
    mean, variance = x.double().mean((0, 2)), x.double().var((0, 2), unbiased=False)
    y = (x.double() - mean[:, None]) * (variance + eps).rsqrt()[:, None]
    y = y if weight is None else y * weight[:, None]
    return (y if bias is None else y + bias[:, None]).to(x.dtype), mean, variance


def batch_norm_backward(
    grad: Tensor, bits: Tensor | None, x: Tensor, weight: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of :func:`batch_norm` with respect to x, weight and bias.

    Where ``bits`` are given, the gates of a ReLU after it (see :func:`gate_relu`), ``grad`` is that of the ReLU.
    With x̂ the normalised input and E the mean over examples and positions of a channel:
    dx = weight (g − E[g] − x̂ E[g x̂]) / sqrt(variance + eps), dweight = Σ g x̂, dbias = Σ g.
    """
    g, inverse = (grad if bits is None else gate_apply(grad, bits)).double(), (variance + eps).rsqrt()[:, None]
    normalised = (x.double() - mean[:, None]) * inverse
    grad_weight, grad_bias = (g * normalised).sum((0, 2)), g.sum((0, 2))
    count = x.shape[0] * x.shape[2]
    grad_x = (g - (grad_bias[:, None] + normalised * grad_weight[:, None]) / count) * inverse
    grad_x = grad_x if weight is None else grad_x * weight[:, None]
    return grad_x.to(x.dtype), grad_weight.to(x.dtype), grad_bias.to(x.dtype)


def rademacher_signs(rows: int, columns: int, key: Tensor, first: int = 0) -> Tensor:
    """Random signs ε, int8[rows, columns].

    That of column c in row i is −1 where bit c mod 32 is set in word (c mod 128) // 32 of
    ``philox(key, (first + i)·⌈columns/128⌉ + c // 128)``.
    """
    blocks = (columns + 127) // 128
    words = philox(key, first * blocks + torch.arange(rows * blocks, device=key.device)).view(rows, blocks, 4, 1)
    bits = (words >> torch.arange(32, device=key.device)) & 1
    return (1 - 2 * bits).reshape(rows, -1)[:, :columns].to(torch.int8)


def rademacher_cotangent(logits: Tensor, key: Tensor, scale: float, first: int = 0) -> Tensor:
    """Per row of ``logits[N, C]``: (√p⊙ε − p⟨√p, ε⟩)·scale with p = softmax and the random signs ε of the key.

    Its covariance over ε is (diag(p) − ppᵀ)·scale², that of the gradient of −log p(ŷ) over ŷ ~ p.

    Returns:
        [N, C] in the logits' dtype.

    Raises:
        ValueError: as in :func:`sample_cross_entropy`.
    """
    check_softmax(logits)
    signs = rademacher_signs(logits.shape[0], logits.shape[1], key, first).to(logits.device)
    p = (logits if logits.dtype == torch.float64 else logits.float()).softmax(1)
    root = p.sqrt() * signs
    return ((root - p * root.sum(1, keepdim=True)) * scale).to(logits.dtype)


def grad_sqnorm_linear(a: Tensor, d: Tensor, gram: bool) -> Tensor:
    """‖Σ_t d_t a_tᵀ‖² for each example of inputs ``a[N, T, p]`` and output gradients ``d[N, T, q]``: float64[N].

    ``gram`` chooses between two ways to the same number: the gradient itself, or Σ_{t,s} (a_t·a_s)(d_t·d_s).
    """
    return torch.bmm(d.double().mT, a.double()).square().sum((1, 2))


def grad_sqnorm_conv(
    a: Tensor, d: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int,
    gram: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Squared norms of each example's gradients of a convolution's weight and bias: float64[N] each.

    ``a[N, C, …]`` is the input, ``d[N, O, …]`` the gradient of the output, in 1, 2 or 3 dimensions. ``gram`` as in
    :func:`grad_sqnorm_linear`, with the patches that the kernel sees as the inputs.
    """
    weight = a.new_empty(d.shape[1], a.shape[1] // groups, *kernel)
    norms = []
    for x, y in zip(torch.split(a, 1), torch.split(d, 1), strict=True):
        gradient = torch.ops.aten.convolution_backward(
            y, x, weight, None, stride, padding, dilation, False, [0] * len(kernel), groups, [False, True, False]
        )[1]
        norms.append(gradient.double().square().sum())
    squares = torch.stack(norms) if norms else a.new_zeros(0, dtype=torch.float64)
    return squares, d.double().flatten(2).sum(2).square().sum(1)


def channel_products(a: Tensor, d: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_s (a − center) d and Σ_s d for ``a, d[N, C, S]`` and ``center[C]``, float64[N, C] each.

    The gradients of each example in weight (times σ) and bias of a batch norm with mean ``center``.
    """
    return ((a.double() - center.double()[:, None]) * d.double()).sum(2), d.double().sum(2)


def probe(numel: int, key: Tensor, distribution: str, first: int = 0) -> Tensor:
    """The probe's elements ``first`` … ``first + numel``: Rademacher signs or standard normal numbers, in float64.

    Sixteen Philox calls serve a group of 2,048 signs (128 bits each) or of 64 normal numbers (two Box–Muller pairs
    each); element e of the group belongs to call e % 16 and is there the (e // 16)-th.

    Raises:
        ValueError: an unknown distribution.
    """
    if distribution not in ("gaussian", "rademacher"):
        raise ValueError(f'distribution: expected "gaussian" or "rademacher", got "{distribution}"')
    per_call = 4 if distribution == "gaussian" else 128
    e = torch.arange(first, first + numel, device=key.device)
    words = philox(key, e // (16 * per_call) * 16 + e % 16)
    k = e // 16 % per_call
    if distribution == "rademacher":
        word = words.gather(-1, (k // 32)[:, None]).squeeze(-1)
        return 1.0 - 2.0 * ((word >> k % 32) & 1).double()
    pair = words.view(-1, 2, 2).gather(1, (k // 2)[:, None, None].expand(-1, 1, 2)).squeeze(1).double()
    radius = (-2 * ((pair[:, 0] + 0.5) * 2.0**-32).log()).sqrt()
    angle = pair[:, 1] * (2 * math.pi * 2.0**-32)
    return radius * torch.where(k % 2 == 0, angle.cos(), angle.sin())


def probe_dot(tensors: list[Tensor], key: Tensor, distribution: str, first: int = 0) -> Tensor:
    """Σ z x over all elements of all tensors with the probe z (see :func:`probe`), in float64: a float64 scalar.

    The index of an element counts over the whole list, the first element having ``first``.
    """
    total = torch.zeros((), dtype=torch.float64, device=tensors[0].device)
    for x in tensors:
        total = total + (x.double().flatten() * probe(x.numel(), key, distribution, first).to(x.device)).sum()
        first += x.numel()
    return total


def perturb(
    out: list[Tensor], tensors: list[Tensor], key: Tensor, eps: float, distribution: str, first: int = 0
) -> None:
    """Writes ``x + eps z`` into ``out`` for each x of ``tensors``, or ``eps z`` where ``tensors`` is empty.

    z is the probe that :func:`probe_dot` uses with the same key and ``first``; ``tensors`` is only read.
    """
    for i, target in enumerate(out):
        z = (eps * probe(target.numel(), key, distribution, first)).view(target.shape).to(target.device)
        target.copy_(z + tensors[i].double() if tensors else z)
        first += target.numel()
