"""Likelihoods of numbers: each element of the output is a row, with a label of its own.

Bernoulli (one or several yes-or-no labels), Gaussian (regression), Poisson (counts). Their outputs are natural
parameters of exponential families: the Hessian of the loss in the output is the Fisher information, whatever the label.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastfisher import ops
from fastfisher.checks import check_number
from fastfisher.host import looking_waits
from fastfisher.likelihoods.base import Constant, Likelihood, Signs, check_shape
from fastfisher.ops import reference
from fastfisher.ops.sampled import sample_binary_cross_entropy

LARGEST_RATE = 1e9
"""Up to this rate the labels of a Poisson distribution are drawn: beyond, float64 sums of its tail lose too much."""


class Elementwise(Likelihood):
    """What the likelihoods of this file have in common: how signs are drawn, and which targets fit."""

    def deviation(self, output: Tensor) -> Tensor:
        """√F of each element: the standard deviation of the derivative of the loss at a drawn label."""
        raise NotImplementedError

    def root(self, output: Tensor) -> Iterator[Tensor]:
        """See :meth:`.Likelihood.root`: one column, since a row is one number."""
        yield self.deviation(output)

    def draw_signs(self, output: Tensor, key: Tensor, first: int = 0) -> Signs:
        """See :meth:`.Likelihood.draw_signs`: those of the Rademacher probe of the key."""
        return Signs(noise(output, key, first, "rademacher").to(torch.int8))

    def signs_gradient(self, output: Tensor, key: Tensor, first: int = 0) -> Tensor:
        """√F ε."""
        return self.deviation(output) * noise(output, key, first, "rademacher").to(output.dtype)

    def fit(self, output: Tensor, targets: Any, *, name: str = "targets", **how: Any) -> Tensor:
        """See :meth:`.Likelihood.fit`: numbers in the dtype of the output.

        Raises:
            ValueError: their shape is not that of the output, or a value can be no label (looked at on a CPU, where
                that costs no waiting).
        """
        found = check_shape(self, output, targets, name)
        if found.is_complex():
            raise ValueError(f"{name}: expected real numbers, got {found.dtype}")
        found = found.to(self._dtype(output))
        if not looking_waits(found):
            wrong = ~self._possible(found)
            if bool(wrong.any()):
                raise ValueError(f"{name}: expected {self._labels}, got {float(found[wrong][0]):g}")
        return found

    _labels = "finite numbers"

    def _dtype(self, output: Tensor) -> torch.dtype:
        """Of labels: at least float32, in which a loss of numbers in 8 or 11 bits is taken, too."""
        return torch.promote_types(output.dtype, torch.float32)

    def _possible(self, labels: Tensor) -> Tensor:
        return labels.isfinite()


def noise(output: Tensor, key: Tensor, first: int, distribution: str) -> Tensor:
    """A number of the key for each element of the output, float32 or float64: standard normal, or 1 and −1."""
    z = torch.empty(output.shape, dtype=torch.promote_types(output.dtype, torch.float32), device=output.device)
    if z.numel():
        ops.perturb([z], [], key, 1.0, distribution, first)
    return z


@dataclass(frozen=True, eq=False)
class Bernoulli(Elementwise):
    """y ∈ {0, 1}, p = σ(logit), for each element of the logits: (N,) and (N, 1) of a binary classifier, (N, K) of
    several labels at once, maps (N, …). The loss is ``F.binary_cross_entropy_with_logits``; targets may be
    probabilities. F = p(1 − p).

    Args:
        pos_weight: as there, a constant that broadcasts over the logits of one example. It belongs to the loss at
            targets, and has no part in labels that are drawn: the distribution that the logits stand for, and its
            Fisher matrix, are without it.

    Raises:
        ValueError: it is no tensor of numbers ≥ 0.
    """

    pos_weight: Tensor | None = None
    _weights: Constant | None = field(init=False, repr=False)

    what = "logits"
    bends = True
    _labels = "labels 0 and 1, or probabilities between"

    def __post_init__(self) -> None:
        w = self.pos_weight
        object.__setattr__(self, "_weights", Constant(w, "pos_weight") if isinstance(w, Tensor) else None)
        if w is None:
            return
        if not (isinstance(w, Tensor) and w.is_floating_point() and bool((w.isfinite() & (w >= 0)).all())):
            got = f"{w.dtype} of shape {tuple(w.shape)}" if isinstance(w, Tensor) else repr(w)
            raise ValueError(f"pos_weight: expected a floating-point tensor of finite weights >= 0 or None, got {got}")

    @property
    def natural(self) -> bool:  # type: ignore[override]
        """See :class:`Likelihood`: the Hessian is p(1 − p) times a weight that the target decides."""
        return self.pos_weight is None

    @property
    def distribution(self) -> Likelihood:
        """See :meth:`.Likelihood.distribution`."""
        return self if self.pos_weight is None else BERNOULLI

    def fit(self, output: Tensor, targets: Any, *, name: str = "targets", **how: Any) -> Tensor:
        """See :meth:`Elementwise.fit`."""
        if self.pos_weight is not None:
            check_broadcasts("pos_weight", self.pos_weight, output.shape[1:])
        return super().fit(output, targets, name=name, **how)

    def nll(self, output: Tensor, labels: Tensor) -> Tensor:
        """−y log p − (1 − y) log(1 − p), with ``pos_weight`` before y."""
        output = output.to(self._dtype(output))
        weight = None if self._weights is None else self._weights.like(output)
        labels = labels.to(output.dtype)  # drawn ones are of the logits' own
        return F.binary_cross_entropy_with_logits(output, labels, pos_weight=weight, reduction="none")

    def signs(self, output: Tensor, signs: Tensor) -> Tensor:
        """2 atan(exp(z/2)) ε up to a constant, whose derivative is √(p(1 − p)) ε.

        On either side of 0 by the exponential that is at most 1, so that neither overflows and the derivative keeps
        its precision where p is almost 0 or 1.
        """
        below, above = output.clamp(max=0), output.clamp(min=0)
        half = torch.where(output < 0, 2 * (below / 2).exp().atan(), torch.pi - 2 * (-above / 2).exp().atan())
        return half * signs

    def draw(self, output: Tensor, key: Tensor, first: int = 0) -> Tensor:
        """See :meth:`.Likelihood.draw`."""
        return self.drawn_loss(output, key, first)[1]

    def draw_uniform(self, output: Tensor, key: Tensor, first: int = 0) -> Tensor:
        """See :meth:`.Likelihood.draw_uniform`: each of the two with probability 1/2."""
        return self.draw(torch.zeros_like(output), key, first)

    def drawn_loss(self, output: Tensor, key: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
        """See :meth:`.Likelihood.drawn_loss`."""
        return sample_binary_cross_entropy(output, key=key, first=first, reduction="none")

    def drawn_gradient(self, output: Tensor, key: Tensor, first: int = 0) -> Tensor:
        """σ(logits) − y."""
        return ops.sample_binary_cross_entropy(output.contiguous(), key, 1.0, first)[2]

    def deviation(self, output: Tensor) -> Tensor:
        """√(p(1 − p))."""
        return (output.sigmoid() * (-output).sigmoid()).sqrt()

    def _possible(self, labels: Tensor) -> Tensor:
        return (labels >= 0) & (labels <= 1)

    def check_drawable(self, output: Tensor) -> None:
        """See :meth:`.Likelihood.check_drawable`; at ±inf the label is certain."""
        if bool(output.isnan().any()):
            raise ValueError("model: expected logits of which labels can be drawn, got NaN among them")


BERNOULLI = Bernoulli()


@dataclass(frozen=True, eq=False)
class Gaussian(Elementwise):
    """y ~ N(output, variance) for each element of the output; the loss is ½(y − output)²/variance. F = 1/variance.

    With ``variance=1``, the default, that is half of ``F.mse_loss``; with ``variance=0.5`` it is ``F.mse_loss`` itself.

    Args:
        variance: σ², a number, or a tensor that broadcasts over the output of one example: (K,) for outputs (N, K). It
            is a constant; one that is learned, or another for each example, is a part of a ``loss=``.

    Raises:
        ValueError: it is not positive and finite.
    """

    variance: float | Tensor = 1.0
    _variances: Constant | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        v = self.variance
        object.__setattr__(self, "_variances", Constant(v, "variance") if isinstance(v, Tensor) else None)
        if not isinstance(v, Tensor):
            check_number("variance", v, "a positive number or a tensor of such")
        elif not (v.is_floating_point() and bool((v.isfinite() & (v > 0)).all())):
            raise ValueError(f"variance: expected a floating-point tensor of positive numbers, got {v}")

    natural = True

    def fit(self, output: Tensor, targets: Any, *, name: str = "targets", **how: Any) -> Tensor:
        """See :meth:`Elementwise.fit`."""
        self.check(output)
        return super().fit(output, targets, name=name, **how)

    def check(self, output: Tensor) -> None:
        """See :meth:`.Likelihood.check`."""
        super().check(output)
        if isinstance(self.variance, Tensor):
            check_broadcasts("variance", self.variance, output.shape[1:])

    def nll(self, output: Tensor, labels: Tensor) -> Tensor:
        """½(y − output)²/σ²."""
        output = output.to(self._dtype(output))
        losses: Tensor = (labels - output).square() / (2 * self._variance(output))
        return losses

    def signs(self, output: Tensor, signs: Tensor) -> Tensor:
        """output·ε/σ."""
        return output * signs * self.deviation(output)

    def draw(self, output: Tensor, key: Tensor, first: int = 0) -> Tensor:
        """output + σz, z the normal numbers of the probe of the key."""
        z = noise(output, key, first, "gaussian")
        found: Tensor = output + self._variance(z) ** 0.5 * z
        return found

    def drawn_gradient(self, output: Tensor, key: Tensor, first: int = 0) -> Tensor:
        """−z/σ: not by the label, which rounds where it is far from 0."""
        return -noise(output, key, first, "gaussian").to(output.dtype) * self.deviation(output)

    def deviation(self, output: Tensor) -> Tensor:
        """1/σ."""
        found: Tensor = torch.ones_like(output, requires_grad=False) / self._variance(output) ** 0.5
        return found

    def _variance(self, output: Tensor) -> Any:
        return self.variance if self._variances is None else self._variances.like(output)


@dataclass(frozen=True, eq=False)
class Poisson(Elementwise):
    """y ~ Poisson(λ), λ = exp(output), for each element of the output; the loss is λ − y·output, as in
    ``F.poisson_nll_loss``. F = λ. Targets are numbers ≥ 0."""

    natural = True
    bends = True
    what = "log rates"
    _labels = "finite numbers >= 0"

    def nll(self, output: Tensor, labels: Tensor) -> Tensor:
        """λ − y·output."""
        output = output.to(self._dtype(output))
        return output.exp() - labels * output

    def signs(self, output: Tensor, signs: Tensor) -> Tensor:
        """2√λ ε, whose derivative is √λ ε."""
        return 2 * (output / 2).exp() * signs

    def draw(self, output: Tensor, key: Tensor, first: int = 0) -> Tensor:
        """The smallest y with P(Y ≤ y) ≥ u, u in (0, 1) of 52 bits of the key; NaN beyond :data:`LARGEST_RATE`.

        Found by halving an interval that holds y: P(Y ≤ y) is the regularised incomplete gamma function Q(y + 1, λ).
        """
        rate = output.detach().double().exp()
        words = reference.philox(key, first + torch.arange(output.numel(), device=key.device)).to(output.device)
        u = ((words[:, 0] * 2**20 + (words[:, 1] >> 12)).double() + 0.5).view(output.shape) * 2.0**-52
        low, high = torch.full_like(rate, -1.0), (rate + 12 * rate.sqrt() + 60).ceil()
        for _ in range(int(LARGEST_RATE).bit_length() + 1):
            middle = ((low + high) / 2).floor()
            enough = torch.special.gammaincc(middle + 1, rate) >= u
            low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
        return torch.where(rate <= LARGEST_RATE, high, torch.nan).to(self._dtype(output))

    def deviation(self, output: Tensor) -> Tensor:
        """√λ."""
        return (output / 2).exp()

    def _possible(self, labels: Tensor) -> Tensor:
        return labels.isfinite() & (labels >= 0)

    def check_drawable(self, output: Tensor) -> None:
        """See :meth:`.Likelihood.check_drawable`; at −inf the rate is 0."""
        rate = output.detach().double().exp()
        if not bool((rate <= LARGEST_RATE).all()):  # nor is NaN
            raise ValueError(
                f"model: expected log rates of which labels can be drawn, got a rate of {float(rate.max())}"
            )


def check_broadcasts(name: str, value: Tensor, shape: torch.Size) -> None:
    """Raises ValueError where a tensor does not broadcast over ``shape``, that of the output of one example."""
    try:
        fits = value.expand(shape).shape == shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"{name}: expected a tensor that broadcasts over the output of one example, {tuple(shape)}, got shape "
            f"{tuple(value.shape)}"
        )
