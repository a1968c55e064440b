"""Tr(H), the trace of the Hessian of the mean loss: where it equals Tr(F) by that, else by random probes."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastfisher.checks import check_choice, check_count, check_number
from fastfisher.distributed.messages import digest
from fastfisher.distributed.single import Single
from fastfisher.engine.rollback import undoing
from fastfisher.labels import LabelName
from fastfisher.likelihoods.base import Likelihood
from fastfisher.likelihoods.subject import LikelihoodName, subject_of
from fastfisher.measure.cotangents import Keys
from fastfisher.measure.estimate import TraceEstimate
from fastfisher.measure.fisher import trace_fisher, whole_model
from fastfisher.measure.hutchinson import Distribution, Hutchinson
from fastfisher.measure.logits_form import LogitsForm, agreed_form, logits_form
from fastfisher.measure.mean_loss import Labelled, measuring
from fastfisher.model import chosen_names, trainable_parameters
from fastfisher.outputs import Output, OwnLossFunction

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Method = Literal["auto", "fisher", "split", "reduced", "hutchinson", "ggn"]
Product = Literal["taylor", "autograd", "finite_difference"]

EXACT_COLUMNS = 15
"""Up to so many backwards for each example the Fisher trace is taken over all labels: those of 16 classes."""


@undoing
def trace_hessian(
    model: nn.Module,
    data: Any,
    targets: Tensor | None = None,
    *,
    method: Method = "auto",
    probes: int = 30,
    distribution: Distribution = "gaussian",
    hvp: Product = "taylor",
    tolerance: float | None = None,
    generator: torch.Generator | None = None,
    params: Iterable[Tensor] | None = None,
    batch_size: int | None = None,
    mode: Literal["eval", "keep"] = "eval",
    likelihood: LikelihoodName | Likelihood = "categorical",
    loss: OwnLossFunction | None = None,
    class_dim: int | None = None,
    logits_of: Callable[[Any], Tensor] | None = None,
    process_group: ProcessGroup | None = None,
) -> TraceEstimate:
    """Tr(H) of L(θ), the mean of −log p(y | model(x)) over all rows of data, or of another loss, with its error.

    docs/trace_hessian.md has the methods, what each costs, and what the error bar is over.

    Args:
        data, targets: inputs and labels, or data with labels in them alone.
        method: "fisher" computes Tr(F), which is Tr(H) of networks piecewise linear in every single parameter;
            "hutchinson" averages zᵀHz over probes z; "reduced" leaves out its terms of mean 0; "split" takes Tr(F), and
            reduced probes for the rest; "auto" takes the best for this network. "ggn" is the trace of another matrix,
            the generalised Gauss-Newton E[Jᵀ(∇²ℓ)J], ∇²ℓ the Hessian of the loss in what the model returns: Tr(F) where
            the output are natural parameters, and probes elsewhere.
        probes: how many probes; with ``tolerance``, how many at a time.
        distribution: of the probes: "gaussian", as in the paper, or "rademacher", whose variance is smaller.
        hvp: how zᵀHz is taken: "taylor", "autograd" or "finite_difference".
        tolerance: go on until the standard error is at most this fraction of the value.
        mode: "eval", or "keep" to leave every module in the mode it is in; buffers are put back.
        loss: in the place of a likelihood, a function of (output, targets) to a scalar, the mean over the examples it
            gets, or to one value per example (N,); see docs/likelihoods.md.
        model, params, likelihood, logits_of, generator, batch_size, class_dim, process_group: see docs/traces.md,
            "Arguments in common".

    Raises:
        ValueError, TypeError, NotImplementedError, RankFailure: as there.
    """
    _check_choices(method, distribution, hvp, mode)
    subject = subject_of(likelihood, class_dim, logits_of, loss)
    if subject.is_loss and method in ("fisher", "split"):
        raise ValueError(
            f'method: expected "auto", "reduced", "hutchinson" or "ggn" with loss=, got "{method}": Tr(F) is an '
            "expectation over labels drawn from a distribution, and a loss says none; give likelihood= where there is "
            'one, or take method="ggn", the Hessian of the loss in the output'
        )
    check_count("probes", probes)
    if tolerance is not None:
        check_number("tolerance", tolerance)
    told: dict[str, Any] = {"method": method, "probes": probes, "distribution": distribution, "hvp": hvp}
    world, model = whole_model(model, process_group)
    trainable = trainable_parameters(model)
    chosen = sorted(chosen_names(trainable, params))  # read once: params may be an iterator
    with ExitStack() as stack:
        told |= {"tolerance": tolerance, "mode": mode, "params": digest(chosen)}
        told["likelihood"] = type(subject.likelihood).__name__
        stack.enter_context(world.measuring_together("trace_hessian", model, trainable, **told))
        key, _ = Keys(generator, world).of(0, 0, torch.device("cpu"))
        labelled = Labelled.of(model, data, targets, batch_size, subject)
        parameters = stack.enter_context(measuring(model, [trainable[name] for name in chosen], mode))
        way: str = method if method in ("reduced", "ggn") else hvp
        fisher = None
        if subject.is_loss and method == "auto" and hvp == "taylor":
            way = "reduced"
        elif not subject.is_loss and method in ("auto", "fisher", "split", "ggn"):
            first = labelled.first()[0]
            form = logits_form(model, parameters, first, subject.likelihood)
            form = agreed_form(form, world, labelled.batches.device)
            way = _way(method, hvp, form)
            fisher = _fisher(labelled, form, way, tolerance, generator, world)
            if way == "fisher" and fisher is not None:
                return fisher
        return Hutchinson(labelled, parameters, world, key, probes, distribution, way).estimate(tolerance, fisher)


def _check_choices(method: str, distribution: str, hvp: str, mode: str) -> None:
    check_choice("method", method, get_args(Method))
    check_choice("distribution", distribution, get_args(Distribution))
    check_choice("hvp", hvp, get_args(Product))
    check_choice("mode", mode, ("eval", "keep"))
    if method in ("split", "reduced", "ggn") and hvp != "taylor":
        raise ValueError(f'hvp: expected "taylor" with method="{method}", got {hvp!r}')


def _way(method: str, hvp: str, form: LogitsForm) -> str:
    """What a method means for a network: "fisher", "split", "reduced", or the ``hvp`` by which all of zᵀHz is taken.

    Raises:
        ValueError: "split" does not serve there.
    """
    reason = form.coupled or form.curved
    if method == "fisher":
        if reason:
            warnings.warn(f'method="fisher": Tr(F) may differ from Tr(H) here, because {reason}', stacklevel=4)
        return "fisher"
    if method == "ggn":
        return "ggn" if form.coupled else "fisher"
    if method == "split":
        if form.coupled or form.unknown:
            raise ValueError(f'method: "split" does not serve here, because {reason}; use "auto"')
        return "split"
    if reason is None:
        return "fisher"
    if hvp != "taylor" or form.unknown:
        return hvp
    return "reduced" if form.coupled else "split"


def _fisher(
    labelled: Labelled,
    form: LogitsForm,
    way: str,
    tolerance: float | None,
    generator: torch.Generator | None,
    world: Single,
) -> TraceEstimate | None:
    """Tr(F) where it is wanted, of the mean over rows; over all labels where these are few, else by two Rademacher
    cotangents, whose spread is the error bar."""
    if way not in ("fisher", "split"):
        return None
    labels: LabelName = "exact" if form.columns <= EXACT_COLUMNS else "rademacher"
    reading = labelled.batches.reading
    assert isinstance(reading, Output)
    found = trace_fisher(
        labelled.batches.model,
        Labelled(labelled.batches, labelled.subject, counted=True),
        labels=labels,
        draws=1 if labels == "exact" else 2,
        likelihood=labelled.subject.likelihood,
        class_dim=reading.class_dim,
        logits_of=reading.find,
        tolerance=tolerance / math.sqrt(2) if tolerance is not None and way == "split" else tolerance,
        generator=generator,
        process_group=world.group,
    )
    return found if form.rows == 1 else _of_mean(found, labelled, world)


def _of_mean(fisher: TraceEstimate, labelled: Labelled, world: Single) -> TraceEstimate:
    """Tr(F) of the mean loss over rows, of that of examples whose losses are sums over theirs: the rows are independent
    given the output, so the two differ by how many rows that count an example has."""
    counted = labelled.subject.likelihood.counted_targets
    mine = sum(counted(targets, inputs.class_dim) for inputs, targets in labelled)
    rows = world.gather(torch.tensor([mine], dtype=torch.float64, device=labelled.batches.device)).sum()
    factor = fisher.samples / float(rows)
    return dataclasses.replace(
        fisher,
        value=factor * fisher.value,
        standard_error=factor * fisher.standard_error,
        per_parameter={name: factor * value for name, value in fisher.per_parameter.items()},
    )
