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


def philox(key: Tensor, elements: Tensor) -> Tensor:
    """Philox4x32-10 at counter (element, offset), key (seed, offset): int64[..., 4] holding 32-bit words."""
    seed, offset = int(key[0]) & (1 << 64) - 1, int(key[1]) & (1 << 64) - 1
    c0, c1 = elements & _MASK, (elements >> 32) & _MASK
    c2, c3 = torch.full_like(c0, offset & _MASK), torch.full_like(c0, offset >> 32)
    k0, k1 = seed & _MASK, seed >> 32
    for _ in range(10):
        # int64 products wrap, but the 64 bits they keep are those of the unsigned product.
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((product1 >> 32) & _MASK) ^ c1 ^ k0, product1 & _MASK
        c2, c3 = ((product0 >> 32) & _MASK) ^ c3 ^ k1, product0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return torch.stack([c0, c1, c2, c3], dim=-1)


def _first_above(weights: Tensor, u: Tensor) -> Tensor:
    """Per row, the first index whose running sum exceeds u times the total; never one of zero weight."""
    running = weights.cumsum(-1)
    index = torch.searchsorted(running, u[:, None] * running[:, -1:], right=True)
    last_positive = weights.shape[1] - 1 - (weights > 0).flip(-1).int().argmax(-1, keepdim=True)
    return torch.minimum(index, last_positive).squeeze(-1)


def sample_labels(logits: Tensor, key: Tensor) -> Tensor:
    """Draws ŷ ~ softmax(logits) for each row of ``logits[N, C]`` by inverse CDF in float64.

    Word 0 of ``philox(key, row)`` picks a tile of 1,024 columns by the tiles' sums, word 1 an element inside it.
    """
    rows, columns = logits.shape
    weights = (logits.double() - logits.double().amax(1, keepdim=True)).exp()
    tiles = torch.nn.functional.pad(weights, (0, -columns % TILE)).view(rows, -1, TILE)
    u = philox(key.cpu(), torch.arange(rows)).to(logits.device).double() * 2.0**-32
    tile = _first_above(tiles.sum(-1), u[:, 0])
    return tile * TILE + _first_above(tiles[torch.arange(rows, device=tile.device), tile], u[:, 1])


def sample_cross_entropy(logits: Tensor, key: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Per row of ``logits[N, C]``: ŷ ~ softmax, −log p(ŷ), and (softmax − onehot(ŷ))·scale.

    Returns:
        nll[N] (float64 for float64 logits, else float32), labels[N] (int64), dlogits[N, C] (the logits' dtype).

    Raises:
        ValueError: a row holds NaN or +inf, or nothing above −inf. On a GPU, where a check would stall the stream,
            such a row has NaN loss and label −1 instead.
    """
    x = logits if logits.dtype == torch.float64 else logits.float()
    largest = x.detach().amax(1) if len(x) else x.detach().sum(1)
    good = largest.isfinite() & ~x.detach().isnan().any(1)
    if logits.device.type == "cpu" and not bool(good.all()):
        row = int((~good).int().argmax())
        raise ValueError(f"logits: row {row} has no softmax (it holds NaN or +inf, or nothing above -inf)")
    labels = (
        sample_labels(torch.where(good[:, None], x.detach(), 0), key) if len(x) else x.new_empty(0, dtype=torch.long)
    )
    log_p = x.log_softmax(1)
    nll = -log_p.gather(1, labels[:, None]).squeeze(1)
    onehot = torch.nn.functional.one_hot(labels, logits.shape[1])
    dlogits = ((log_p.exp() - onehot) * scale).to(logits.dtype)
    return nll, torch.where(good, labels, -1), dlogits


def softmax_hessian_product(dlogits: Tensor, labels: Tensor, vector: Tensor, scale: float) -> Tensor:
    """(p⊙v − p (p·v))·scale per row, with p = dlogits/scale + onehot(labels): the Hessian of −log p applied to v."""
    compute = dlogits.dtype if dlogits.dtype == torch.float64 else torch.float32
    p = dlogits.to(compute) / scale + torch.nn.functional.one_hot(labels, dlogits.shape[1])
    v = vector.to(compute)
    return ((p * v - p * (p * v).sum(1, keepdim=True)) * scale).to(dlogits.dtype)


def gate_pack(x: Tensor) -> Tensor:
    """The bits (x > 0), 32 to an int32 word, element 32k + b in bit b of word k: int32[ceil(numel / 32)]."""
    gates = torch.nn.functional.pad((x > 0).flatten(), (0, -x.numel() % 32)).view(-1, 32).long()
    words = (gates << torch.arange(32, device=x.device)).sum(1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def gate_apply(x: Tensor, bits: Tensor) -> Tensor:
    """``x`` where its bit in ``bits`` (see :func:`gate_pack`) is set, else 0."""
    gates = (bits[:, None] >> torch.arange(32, device=x.device, dtype=torch.int32)) & 1
    return torch.where(gates.flatten()[: x.numel()].view(x.shape).bool(), x, 0)


def gate_take(x: Tensor, indices: Tensor) -> Tensor:
    """Of each plane of ``x[planes, elements]``, the elements at ``indices[planes, outputs]`` (int32)."""
    return x.gather(1, indices.long())


def gate_put(y: Tensor, indices: Tensor, elements: int) -> Tensor:
    """The transpose of :func:`gate_take`: ``y[planes, outputs]`` summed into planes of ``elements`` zeros."""
    return y.new_zeros(len(y), elements).scatter_add_(1, indices.long(), y)


def axpy_diff(out: list[Tensor], a: list[Tensor], b: list[Tensor], scale: float) -> Tensor:
    """``out += scale (a − b)``, tensor by tensor in place; returns Σ (a − b)² over all of them, a float64 scalar."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    for target, difference in zip(out, differences, strict=True):
        target.add_(difference, alpha=scale)
    return sum_squares(differences)


def sum_squares(tensors: list[Tensor]) -> Tensor:
    """Σ x² over all elements of all tensors, accumulated in float64: a float64 scalar."""
    return torch.stack([x.double().square().sum() for x in tensors]).sum()


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
    e = torch.arange(first, first + numel)
    words = philox(key.cpu(), e // (16 * per_call) * 16 + e % 16)
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
