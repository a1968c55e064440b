"""Tr(F), the trace of the Fisher Information Matrix: the mean of squared per-example gradient norms, with its error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastfisher.checks import check_count, check_flags, check_number
from fastfisher.data import Batches, Pair
from fastfisher.distributed.messages import digest
from fastfisher.distributed.sharing import shared_by
from fastfisher.distributed.single import Single
from fastfisher.engine.rollback import undoing
from fastfisher.labels import LabelName, Labels, labels_of
from fastfisher.likelihoods.base import Likelihood
from fastfisher.likelihoods.subject import LikelihoodName, Subject, subject_of
from fastfisher.measure.cotangents import Cotangents, Keys
from fastfisher.measure.estimate import TraceEstimate
from fastfisher.measure.norms import draws_of, parameter_names
from fastfisher.measure.per_example import Captured
from fastfisher.memory import BATCH, held, may_double
from fastfisher.model import eval_mode, trainable_parameters

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class FisherTrace(TraceEstimate):
    """An estimate of Tr(F).

    Attributes:
        minibatch: Tr(F_B) = E‖(1/B) Σ_i g_i‖² over the batches that were used, where it was asked for; else None.
    """

    minibatch: float | None = None

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """The interval that holds the trace with probability ``level``, by Student's t.

        Norms are positive, and a few of them are large: those of few examples mostly have a mean that is too low. So
        the upper end is that of the interval of log Tr(F), value·exp(t·standard_error/value), and the lower end, which
        is at least 0, value − t·standard_error.
        """
        reach = self._reach(level)
        if not reach or not self.value > 0:
            return self.value - reach, self.value + reach
        ratio = reach / self.value
        return max(0.0, self.value - reach), self.value * math.exp(ratio) if ratio < 700 else math.inf


@undoing
def trace_fisher(
    model: nn.Module,
    data: Any,
    *,
    samples: int | None = None,
    labels: LabelName = "rademacher",
    draws: int = 1,
    batch_size: int | None = None,
    tolerance: float | None = None,
    minibatch: bool = False,
    params: Iterable[Tensor] | None = None,
    likelihood: LikelihoodName | Likelihood = "categorical",
    generator: torch.Generator | None = None,
    class_dim: int | None = None,
    logits_of: Callable[[Any], Tensor] | None = None,
    process_group: ProcessGroup | None = None,
    verify: bool = True,
) -> FisherTrace:
    """Tr(F) = E_x E_ŷ ‖∇_θ ℓ(x, ŷ)‖², ŷ ~ p(y|x): the trace of the Fisher Information Matrix (eq. 2 of the paper).

    One draw costs about a plain forward and backward of the data, "exact" one backward for each column of the root of
    the output's Fisher information: C − 1 of C classes, K of K numbers. Memory is that of one batch.

    Example:
        >>> print(fastfisher.trace_fisher(model, loader))
        41.3 ± 0.52 (fisher, labels=rademacher; over labels and examples, 5000 examples; 95 %: 40.28 to 42.33)

    Args:
        samples: at most so many examples: a random choice of a pair's, the first of an iterable's.
        labels: "rademacher", "sampled", "exact", "true" or "uniform", see docs/traces.md, which says too what the
            error bar is over.
        draws: how many draws for each example.
        batch_size: how many examples at a time, where ``data`` is no iterable; by default 128, and on a GPU twice as
            many with each batch while memory allows. But for rounding, and for ``minibatch``, the value is the same
            however the data are cut into batches.
        tolerance: go on drawing (at least two draws in all) until standard_error ≤ tolerance·value.
        minibatch: also Tr(F_B), for about a third more, of a single process.
        model, data, params, likelihood, logits_of, generator, class_dim, process_group, verify: see docs/traces.md,
            "Arguments in common".

    Returns:
        The estimate over the data of all processes, split by parameter, with the parameters that took a slower way.

    Raises:
        ValueError, TypeError, NotImplementedError, RankFailure: as there.
    """
    kind = labels_of(labels, given=False)
    check_count("draws", draws)
    check_flags(minibatch=minibatch, verify=verify)
    subject = subject_of(likelihood, class_dim, logits_of)
    if tolerance is not None:
        check_number("tolerance", tolerance)
    world, model = whole_model(model, process_group)
    if minibatch and not world.alone:
        raise ValueError("minibatch: expected False where several processes share the data, got True")
    names, trainable = parameter_names(model, params), trainable_parameters(model)
    told = {"labels": labels, "draws": draws, "tolerance": tolerance, "params": digest(names)}
    told["likelihood"] = type(subject.likelihood).__name__
    with world.measuring_together("trace_fisher", model, trainable, **told), eval_mode(model):
        size, device = BATCH if batch_size is None else batch_size, next(iter(trainable.values())).device
        how: dict[str, Any] = {"samples": samples, "batch_size": size, "generator": generator}
        batches = Batches(model, data, device, reading=subject.reading, **how)
        grows = batch_size is None and not minibatch and world.alone
        passes = _Passes(batches, names, kind, subject, Keys(generator, world), minibatch, grows, verify)
        return passes.estimate(passes.until(tolerance, draws))


def whole_model(model: nn.Module, process_group: ProcessGroup | None) -> tuple[Single, nn.Module]:
    """The processes that share the data, and the module that each of them has.

    Raises:
        ValueError: a process has only a part of the parameters.
    """
    shared = shared_by(model, process_group)
    if shared.world.sharded:
        raise ValueError("model: expected all parameters in each process, got a model sharded by fully_shard")
    return shared.world, shared.module


@dataclass
class _Passes:
    """Passes over the data, each with some draws of every example, until the error is as small as it was wanted.

    Attributes:
        minibatch: whether to take the squared norm of each batch's mean gradient, too.
        grows: whether a batch may be larger than the last one, where memory allows.
    """

    batches: Batches
    names: list[str]
    labels: Labels
    subject: Subject
    keys: Keys
    minibatch: bool
    grows: bool
    verify: bool

    def until(self, tolerance: float | None, draws: int) -> _Sums:
        """The sums over all processes, once the standard error is at most ``tolerance``·value."""
        drawn, sums = self.labels.drawn, _Sums(self.names)
        rounds = 1 if not drawn else draws if tolerance is None else max(2, draws)
        while True:
            self._pass(sums, rounds)
            found = sums.of_all(self.keys.world, self.batches.fraction, self.batches.device)
            if not found.examples:
                raise ValueError("data: expected at least one example, got none")
            if tolerance is None or not drawn or found.standard_error(drawn) <= tolerance * found.value():
                return found
            rounds = sums.draws  # twice as many with each round

    def _pass(self, sums: _Sums, draws: int) -> None:
        self.keys.begin(sums.draws)
        sums.begin(draws)
        for batch in self.keys.world.aligned(self.batches):
            if batch is not None:
                self._measure(batch, sums, draws)
            elif self.labels.drawn:  # the others have more: their labels are drawn with what rank 0 tells them
                for draw in range(draws):
                    self.keys.of(draw, 0, self.batches.device)

    def _measure(self, batch: Pair, sums: _Sums, draws: int) -> None:
        inputs, targets = batch
        batches, device = self.batches, self.batches.device
        before = held(device)
        captured = Captured(batches.model, inputs, self.names, self.verify)
        activations = held(device) - before
        cotangents = Cotangents(captured.logits, self.labels, self.subject, targets, self.keys)
        sums.add(draws_of(captured, cotangents, draws, sums.means if self.minibatch else None), captured.zeros())
        sums.fallbacks.update(captured.capture.fallbacks)
        full = captured.examples == batches.batch_size
        if self.grows and full and not sums.fallbacks and may_double(activations, device):
            batches.batch_size = 2 * captured.examples

    def estimate(self, found: _Sums) -> FisherTrace:
        """What the sums say of Tr(F)."""
        drawn, part = self.labels.drawn, found.fraction < 1
        over = "labels and examples" if drawn and (part or found.draws == 1) else "labels" if drawn else "examples"
        return FisherTrace(
            value=found.value(),
            standard_error=found.standard_error(drawn),
            samples=found.examples,
            draws=found.draws if drawn else 0,
            method=f"fisher, labels={self.labels.name}" + (f"; over {over}" if drawn or part else ""),
            per_parameter=found.per_parameter(),
            fallbacks=found.fallbacks,
            degrees=found.degrees(drawn),
            minibatch=found.minibatch() if self.minibatch else None,
        )


class _Sums:
    """What :func:`trace_fisher` adds up: for each example the sum and the sum of squares over its draws.

    Attributes:
        batches: these, (n, 2) for each batch; examples come in the order of the first pass in each further one.
        parameters: the sum over all draws of all examples, by parameter.
        means: ‖mean gradient‖² of each batch and draw.
        fraction: how much of all data was used; 0 where one does not know how much there is.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.batches: list[Tensor] = []
        self.parameters = dict.fromkeys(names, 0.0)
        self.fallbacks: dict[str, str] = {}
        self.means: list[float] = []
        self.fraction = 1.0
        self.draws = self.done = 0
        self.again = False

    def begin(self, draws: int) -> None:
        """A pass over the data with so many draws is to come."""
        self.draws += draws
        self.again, self.done = bool(self.batches), 0
        if self.again:  # batches may be others than those of the first pass
            self.batches = [torch.cat(self.batches)]

    def add(self, draws: Iterable[dict[str, Tensor]], none: Tensor) -> None:
        """The norms of one batch; ``none`` is a 0 for each of its examples."""
        if not self.again:
            self.batches.append(torch.stack([none, none], 1))
        sums = self.batches[-1][self.done : self.done + len(none)] if self.again else self.batches[-1]
        for norms in draws:
            for name, values in norms.items():
                self.parameters[name] += float(values.sum())
            total = torch.stack(list(norms.values())).sum(0)
            sums += torch.stack([total, total.square()], 1)
        self.done += len(none)

    def of_all(self, world: Single, fraction: float, device: torch.device) -> _Sums:
        """What all processes have added up, where this one used so much of its data."""
        found = _Sums(self.parameters)
        found.draws, found.fallbacks, found.means = self.draws, self.fallbacks, self.means
        none = torch.zeros(0, 2, dtype=torch.float64, device=device)
        found.batches = [world.gather(torch.cat([none, *self.batches]).flatten()).view(-1, 2)]
        values = torch.tensor(list(self.parameters.values()), dtype=torch.float64, device=device)
        total = world.gather(values).view(-1, len(values)).sum(0)
        found.parameters = dict(zip(self.parameters, total.tolist(), strict=True))
        of_this = [float(self.examples), round(self.examples / fraction) if fraction else math.inf]
        used, there = world.gather(torch.tensor(of_this, dtype=torch.float64, device=device)).view(-1, 2).sum(0)
        found.fraction = float(used / there) if there else 1.0
        return found

    @property
    def columns(self) -> tuple[Tensor, Tensor]:
        """Σ and Σ² over the draws, by example."""
        first, second = torch.cat(self.batches).mT.contiguous()
        return first, second

    @property
    def examples(self) -> int:
        return sum(map(len, self.batches))

    def value(self) -> float:
        """Tr(F)."""
        return float(self.columns[0].sum()) / (self.draws * self.examples)

    def per_parameter(self) -> dict[str, float]:
        """Its parts."""
        return {name: value / (self.draws * self.examples) for name, value in self.parameters.items()}

    def minibatch(self) -> float:
        """Tr(F_B); the mean over batches and draws."""
        return sum(self.means) / len(self.means)

    def degrees(self, drawn: bool) -> float:
        """The degrees of freedom of :meth:`standard_error`, by Satterthwaite's rule where the noise of labels differs.

        Of n examples with d draws each, n (d − 1) where all are as noisy, fewer where a few have most of the noise.
        """
        if not drawn and self.fraction == 1.0:
            return math.inf
        between = float(self.examples - 1)
        if not drawn or self.draws == 1:
            return between
        noise = self._noise()
        total = float(noise.sum())
        within = (self.draws - 1) * total**2 / float(noise.square().sum()) if total else math.inf
        return within if self.fraction == 1.0 else min(within, between)

    def _noise(self) -> Tensor:
        """The variance of the draws of each example."""
        first, second = self.columns
        mean = first / self.draws
        return ((second - self.draws * mean.square()) / (self.draws - 1)).clamp(min=0)

    def standard_error(self, drawn: bool) -> float:
        """Of the mean over n examples, the fraction f of all: √(((1 − f) s² + f w)/n).

        s² is the variance between the examples' means, label noise included; w the part of it that is label noise,
        known from two draws on; with one draw all of it may be.
        """
        mean = self.columns[0] / self.draws
        between = float(mean.var()) if len(mean) > 1 else math.nan
        if not drawn:
            within = 0.0
        elif self.draws == 1:
            within = between
        else:
            within = float(self._noise().mean()) / self.draws
        if self.fraction == 1.0:
            return math.sqrt(within / len(mean))
        return math.sqrt(((1 - self.fraction) * between + self.fraction * within) / len(mean))
