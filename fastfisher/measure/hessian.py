"""Tr(H), the trace of the Hessian of the mean cross-entropy: where it equals Tr(F) by that, else by random probes.

Of a network that is piecewise linear in every single parameter, Tr(H) = Tr(F), whatever the labels: the Hessian is
E[JᵀSJ] + E[Σ_c (p − y)_c ∇²logit_c] with S = diag(p) − ppᵀ; every ∇²logit_c has a zero diagonal, and the trace of the
first part is that of the Fisher matrix. Elsewhere Tr(H) = E[zᵀHz] for probes z of independent elements of mean 0 and
variance 1 (Hutchinson, 1990; appendix B of Jastrzebski et al., 2021, takes 30 Gaussian ones).
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastfisher import ops
from fastfisher.checks import is_count, is_number
from fastfisher.data import Batches
from fastfisher.distributed.ranks import Ranks, digest, measuring_together
from fastfisher.engine.checkpointing import graph_nodes, refuse_recomputed
from fastfisher.engine.gates import RandomState, record_gates
from fastfisher.engine.rollback import undoing
from fastfisher.engine.taylor import NoRule, Tape
from fastfisher.engine.twice import differentiable_gradients, second_derivatives, twice_differentiable
from fastfisher.likelihoods import CATEGORICAL
from fastfisher.measure.estimate import TraceEstimate
from fastfisher.measure.traces import Keys, trace_fisher, whole_model
from fastfisher.model import (
    Call,
    call_copy,
    chosen_names,
    count_examples,
    eval_mode,
    map_inputs,
    take_rows,
    trainable_parameters,
    uncompiled,
    unhooked,
)
from fastfisher.slow_path import warn_slow_path

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Method = Literal["auto", "fisher", "split", "reduced", "hutchinson"]
Distribution = Literal["gaussian", "rademacher"]
Product = Literal["taylor", "autograd", "finite_difference"]

EXACT_CLASSES = 16
"""Up to so many classes the Fisher trace is taken over all labels, which costs a backward for each class."""

DIFFERENCE_STEP = {torch.float64: 1e-7, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 4e-3}
"""ε of the central difference (g(θ + εz) − g(θ − εz))/2ε, by the precision of the parameters.

In float32, on SimpleCNN, VGG-11, a ResNet and a GELU network, at initialisation and after 30 steps, the largest error
of four probes, over their mean size, was 2e-4 to 9e-4 at 1e-5, 3e-5 to 3e-4 at 1e-4, and 7e-4 to 1e-2 at 1e-3. The
error grows with ε² and with the rounding over ε; the other steps are scaled by the cube root of their precision.
"""


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
    class_dim: int | None = None,
    process_group: ProcessGroup | None = None,
) -> TraceEstimate:
    """Tr(H) of L(θ) = mean over examples of −log softmax(model(x))[y], with its standard error.

    In units of a plain step (one forward and backward over the same examples): ``"fisher"`` costs 3 to 7 over all
    labels where there are 10 classes, and about 2 by Rademacher cotangents, which serve above 16 classes;
    ``"hutchinson"`` about 0.8 per probe with ``hvp="taylor"``, 2 to 3 with ``"autograd"`` and 2 with
    ``"finite_difference"``; ``"reduced"`` and the rest in ``"split"`` 0.5 to 0.6 per probe.

    Args:
        model: called as ``model(inputs)`` (a tuple's items by position, a dict's by name); gives logits (..., C).
        data: inputs, where ``targets`` are given; else a batch (a pair (inputs, targets), a mapping with ``labels``), a
            DataLoader, or any iterable of batches; see docs/data.md. Targets are class indices (−100 is left out) or
            class probabilities.
        targets: the labels of ``data``.
        method: "fisher" computes Tr(F), which is Tr(H) where the network is piecewise linear in every single
            parameter; a warning says where that is not certain. "hutchinson" averages zᵀHz over probes, as the paper
            does. "reduced" leaves out the terms of zᵀHz that are known to have mean 0, products of the probes of
            different layers: the mean is Tr(H) all the same, the cost lower and the spread too, often by a lot.
            "split" takes the Gauss-Newton part of H, whose trace is Tr(F), by that, and the rest by reduced probes.
            "auto" takes "fisher" where the operations of a forward of the first batch prove it exact, "split" else;
            "reduced" where one example has several rows of logits or the model is in train mode; and "hutchinson" with
            another ``hvp`` than "taylor".
        probes: how many probes z; with ``tolerance``, how many at a time. Each batch gets fresh ones, whose mean over
            the batches varies less than that of shared ones.
        distribution: "gaussian", as in the paper, or "rademacher", whose variance is smaller (that of the diagonal
            is absent).
        hvp: how zᵀHz is taken. "taylor": the second derivative along z, see :mod:`fastfisher.engine.taylor`; where an
            operation has no rule, a :class:`SlowPathWarning` names it and "autograd" serves. "autograd": z times the
            derivative of gᵀz, with the graph of the gradient g kept for all probes. "finite_difference": a central
            difference of gradients with the gates of the forward at θ replayed.
        tolerance: go on until the standard error is at most this fraction of the value.
        generator: where the probes come from; torch's default generator otherwise.
        params: the parameters of the diagonal blocks whose trace is wanted; all trainable ones by default.
        batch_size: how many examples go through the model at once where tensors are given; all by default.
            An iterable's batches are taken as they come.
        mode: "eval" puts the model into eval mode while measuring (BatchNorm by its running statistics, no dropout);
            "keep" leaves every module in the mode it is in, and its buffers are put back.
        class_dim: which dimension of the logits holds the classes; by default the last, but where logits have four
            dimensions or more, or targets fit another one, it has to be said.
        process_group: the processes that each have a part of the data, as in :func:`fastfisher.trace_fisher`. The b-th
            batches of all meet the same probes, drawn with the key of rank 0, so that any number of processes gives
            the same value; 8 bytes for each probe go from each process to each.

    Returns:
        The estimate. Of Hutchinson's method the standard error is that over the probes (from their spread; infinite
        for a single one), for the data given.

    Raises:
        ValueError: an unknown option, no examples, targets that do not fit, a parameter that is not the model's, or
            logits that are NaN or +inf, or second derivatives that are not finite.
        TypeError: the model, the inputs or the data are of a type that cannot be one.
        NotImplementedError: a parameter is complex, the forward changes parameters, or, where autograd serves, there is
            no second derivative: of a custom ``autograd.Function`` whose backward is ``once_differentiable``, of a
            checkpoint with ``use_reentrant=True``. ``hvp="finite_difference"`` needs none.
        RankFailure: another process raised.

    The same key gives the same bits; another number of threads may change the last ones in float32, where PyTorch's
    convolution splits its sums by thread.

    The model is as before afterwards, also after an exception: modes, buffers, gradients, ``requires_grad``, and the
    state of the random number generators but for the draw of one key.
    """
    _check_options(method, probes, distribution, hvp, tolerance, batch_size, mode)
    ranks, model = whole_model(model, process_group)
    with ExitStack() as stack:
        told = {"method": method, "probes": probes, "distribution": distribution, "hvp": hvp, "tolerance": tolerance}
        trainable = trainable_parameters(model)
        chosen = sorted(chosen_names(trainable, params))  # read once: params may be an iterator
        stack.enter_context(
            measuring_together(ranks, "trace_hessian", model, trainable, mode=mode, params=digest(chosen), **told)
        )
        key, _ = Keys(generator, ranks).of(0, 0, torch.device("cpu"))
        device = next(iter(trainable.values())).device
        batches = labelled(model, data, targets, batch_size, device, class_dim)
        parameters = stack.enter_context(measuring(model, [trainable[name] for name in chosen], mode))
        product: str = "reduced" if method == "reduced" else hvp
        fisher = None
        if method in ("auto", "fisher", "split"):
            form = logits_form(model, parameters, batches.first()[0])
            if ranks is not None:
                form = _agreed(form, ranks, device)
            exact = form.curved is None and form.coupled is None
            if method == "fisher" and not exact:
                reason = form.coupled or form.curved
                warnings.warn(f'method="fisher": Tr(F) may differ from Tr(H) here, because {reason}', stacklevel=3)
            if method == "split" and (form.coupled or form.unknown):
                reason = form.coupled or form.curved
                raise ValueError(f'method: "split" does not serve here, because {reason}; use "auto"')
            if method == "fisher" or (method == "auto" and exact):
                return _fisher(model, batches, form.classes, tolerance, generator, ranks)
            if method == "split" or (hvp == "taylor" and not form.coupled and not form.unknown):
                share = None if tolerance is None else tolerance / math.sqrt(2)
                fisher, product = _fisher(model, batches, form.classes, share, generator, ranks), "split"
            elif hvp == "taylor" and not form.unknown:
                product = "reduced"
        return _hutchinson(model, parameters, batches, key, probes, distribution, product, tolerance, fisher, ranks)


@dataclass(frozen=True)
class LogitsForm:
    """What a forward shows of how the logits depend on the parameters.

    Attributes:
        classes: how many classes there are.
        curved: why they may not be piecewise linear in every single parameter; None where they are.
        coupled: why the trace of the Gauss-Newton part may not be Tr(F), as it is for one row of logits an example that
            depends on this example alone, in eval mode; None where it is.
        unknown: whether an operation has no rule in :mod:`fastfisher.engine.taylor`.
    """

    classes: int
    curved: str | None
    coupled: str | None
    unknown: bool


def logits_form(model: nn.Module, parameters: dict[str, Tensor], inputs: Call) -> LogitsForm:
    """Looks at the operations that a forward really runs; see :meth:`.taylor.Tape.why_not_multilinear`."""
    tape, unknown = Tape(parameters), False
    try:
        logits = _forward(model, inputs, tape)
        curved = tape.why_not_multilinear(logits)
    except NoRule as error:
        curved, unknown = str(error), True
        logits = _forward(model, inputs)
    coupled = None
    if logits.dim() != 2:
        coupled = f"the model gives logits of shape {tuple(logits.shape)}, not one row for each example"
    elif any(module.training for module in model.modules()):
        coupled = "the model is in train mode, and Tr(F) is taken in eval mode"
    elif not _same_alone(model, inputs, logits.detach()):
        coupled = "the logits of an example are not the same in another batch"
    return LogitsForm(logits.shape[-1], curved, coupled, unknown)


def _agreed(form: LogitsForm, ranks: Ranks, device: torch.device) -> LogitsForm:
    """The form on which all processes go on: each looked at a batch of its own, and they must take the same way."""
    flags = [form.curved is not None, form.coupled is not None, form.unknown]
    everyone = ranks.gather(torch.tensor(flags, dtype=torch.float64, device=device)).view(ranks.size, -1)
    curved, coupled, unknown = (bool(flag) for flag in everyone.any(0))
    elsewhere = "another process found so"
    return LogitsForm(
        form.classes,
        form.curved or (elsewhere if curved else None),
        form.coupled or (elsewhere if coupled else None),
        unknown,
    )


def _forward(model: nn.Module, inputs: Call, watch: TorchFunctionMode | None = None) -> Tensor:
    """The logits with their graph, of a forward that ``watch`` sees.

    Buffers start from what they are in the model, which keeps them, however many forwards there are.

    Raises:
        ValueError, NotImplementedError: as :func:`_checked` says.
    """
    before = _writes(model)
    with torch.enable_grad(), watch or nullcontext():
        logits = call_copy(model, {}, inputs)
    return _checked(model, watch.current(logits) if isinstance(watch, Tape) else logits, before)


def _writes(model: nn.Module) -> list[int]:
    """How often each parameter has been written to."""
    return [p._version for p in model.parameters()]


def _checked(model: nn.Module, logits: Tensor, before: list[int]) -> Tensor:
    """The logits of a forward before which the parameters had been written to so often.

    Raises:
        ValueError: logits are NaN or +inf (−inf is a class that is ruled out).
        NotImplementedError: the forward changes a parameter.
    """
    for (name, parameter), writes in zip(model.named_parameters(), before, strict=True):
        if parameter._version != writes:
            raise NotImplementedError(
                f"model: expected a forward that leaves the parameters as they are, got one that changes {name} in "
                "place (as max_norm of an embedding does); constrain it after the optimiser's step instead"
            )
    unusable = ~(logits.detach() < math.inf)
    if bool(unusable.any()):
        rows = int(unusable.any(-1).sum())
        raise ValueError(
            f"model: expected logits that are numbers, got NaN or inf in {rows} of {unusable[..., 0].numel()} rows; "
            "look at the parameters and inputs (isfinite().all()), or at overflow in a low precision"
        )
    return logits


SAME = 3e-4
"""Up to what difference, over the largest logit, logits count as the same: rounding of float32 and no more."""


def _same_alone(model: nn.Module, inputs: Call, logits: Tensor) -> bool:
    """Whether the logits of the first and the last example are the same without the others, and in the other order."""
    if len(logits) == 1:
        return True
    if count_examples(inputs) != len(logits):
        return False
    two = torch.tensor([len(logits) - 1, 0])
    expected = logits[two.to(logits.device)]

    def call() -> Tensor:
        with torch.enable_grad():  # models may go another way without
            return call_copy(model, {}, take_rows(inputs, two)).detach()

    try:
        alone = call()
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a model for batches of one size fails again, whatever passed by does not
        try:
            alone = call()
        except torch.OutOfMemoryError:
            raise
        except Exception:
            return False
    if alone.shape != expected.shape:
        return False
    finite = logits[logits.isfinite()]
    tolerance = max(SAME, torch.finfo(logits.dtype).eps ** 0.5) * (finite.abs().max() if len(finite) else 0)
    return bool(((alone == expected) | ((alone - expected).abs() <= tolerance)).all())


def _fisher(
    model: nn.Module,
    batches: Pairs,
    classes: int,
    tolerance: float | None,
    generator: torch.Generator | None,
    ranks: Ranks | None,
) -> TraceEstimate:
    """Tr(F), over all labels where there are few; by two Rademacher cotangents, whose spread is the error bar, else."""
    labels: Literal["exact", "rademacher"] = "exact" if classes <= EXACT_CLASSES else "rademacher"
    draws = 1 if labels == "exact" else 2
    return trace_fisher(
        model,
        Pairs(batches.batches, counted=True),
        labels=labels,
        draws=draws,
        class_dim=batches.batches.class_dim,
        tolerance=tolerance,
        generator=generator,
        process_group=None if ranks is None else ranks.group,
    )


# ---- Hutchinson ------------------------------------------------------------------------------------------------------


def _hutchinson(
    model: nn.Module,
    parameters: dict[str, Tensor],
    batches: Pairs,
    key: Tensor,
    probes: int,
    distribution: str,
    hvp: str,
    tolerance: float | None,
    fisher: TraceEstimate | None,
    ranks: Ranks | None,
) -> TraceEstimate:
    """The mean of zᵀHz over probes, or of what ``hvp`` leaves of it, beside Tr(F) where that is given."""
    values: list[float] = []
    used = 0
    fallbacks: dict[str, str] = {}
    while True:
        sums, rows, samples = [0.0] * probes, 0, 0
        for inputs, targets in batches:
            count = CATEGORICAL.counted_targets(targets, inputs.class_dim)
            if count == 0:
                continue
            quadratic_form = None
            if hvp in ("taylor", "reduced", "split"):
                try:
                    quadratic_form = _by_taylor(model, parameters, inputs, targets, distribution, hvp)
                except NoRule as reason:
                    if hvp == "split":
                        raise
                    warn_slow_path(f'hvp="taylor": {reason}; hvp="autograd" serves, at three times the cost or more')
                    fallbacks, hvp = {"hvp": str(reason)}, "autograd"
            if quadratic_form is None:
                make = _by_autograd if hvp == "autograd" else _by_difference
                quadratic_form = make(model, parameters, inputs, targets, distribution)
            for i in range(probes):
                probe_key = (key + torch.tensor([0, used])).to(targets.device)  # kernels read it on their own device
                sums[i] += count * float(quadratic_form(probe_key))
                used += 1
            rows, samples = rows + count, samples + len(targets)
        if ranks is not None:
            device = next(iter(parameters.values())).device
            mine = torch.tensor([*sums, rows, samples, used], dtype=torch.float64, device=device)
            everyone = ranks.gather(mine).view(ranks.size, -1)
            *sums, of_rows, of_samples, _ = everyone.sum(0).tolist()
            rows, samples, used = int(of_rows), int(of_samples), int(everyone[:, -1].max())
        if rows == 0:
            raise ValueError("data: expected at least one example, got none")
        values += [value / rows for value in sums]
        if not all(map(math.isfinite, values)):
            raise ValueError(
                f"model: expected finite second derivatives, got {sum(values)} by hvp={hvp!r} (as of a square root at "
                'zero, or where PyTorch\'s own second derivative errs); hvp="finite_difference" needs first ones only'
            )
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
        mean = statistics.fmean(values)
        if fisher is not None:
            mean, error = mean + fisher.value, math.hypot(error, fisher.standard_error)
        if tolerance is None or error <= tolerance * abs(mean):
            break
    degrees = len(values) - 1.0
    if fisher is not None and fisher.standard_error > 0:  # of two independent errors, by Satterthwaite's rule
        rest = math.sqrt(max(0.0, error**2 - fisher.standard_error**2))
        degrees = (
            min(degrees, fisher.degrees)
            if not rest
            else error**4 / (rest**4 / max(degrees, 1e-9) + fisher.standard_error**4 / fisher.degrees)
        )
    if fisher is not None:
        name = f"{fisher.method} + reduced hutchinson, {distribution} probes"
        fallbacks = dict(fisher.fallbacks)
    elif hvp == "reduced":
        name = f"reduced hutchinson, {distribution} probes"
    else:
        name = f"hutchinson, {distribution} probes, hvp={hvp}"
    return TraceEstimate(mean, error, samples, len(values), name, fallbacks=fallbacks, degrees=degrees)


QuadraticForm = Callable[[Tensor], Tensor]
"""zᵀHz of one batch's mean loss for the probe z of a key."""


def _by_taylor(
    model: nn.Module,
    parameters: dict[str, Tensor],
    inputs: Call,
    targets: Tensor,
    distribution: str,
    terms: str = "taylor",
) -> QuadraticForm:
    """All of zᵀHz ("taylor"), without what has mean 0 ("reduced"), and without the Gauss-Newton term too ("split")."""
    tape = Tape(parameters)
    logits = _forward(model, inputs, tape)
    targets = _fit(model, logits.detach(), inputs, targets)
    with torch.enable_grad():
        with tape:
            loss = CATEGORICAL.loss(logits, targets)
        tape.finish(loss, reduced=terms != "taylor", until=logits if terms == "split" else None)
    z = [torch.empty_like(p, memory_format=torch.contiguous_format) for p in parameters.values()]

    def quadratic_form(key: Tensor) -> Tensor:
        if tape.nodes:  # else every direction gives the same
            ops.perturb(z, [], key, 1.0, distribution)
        return tape.curvature(z)

    return quadratic_form


def _by_autograd(
    model: nn.Module, parameters: dict[str, Tensor], inputs: Call, targets: Tensor, distribution: str
) -> QuadraticForm:
    product = hessian_product(model, parameters, inputs, targets, way_out='hvp="finite_difference"')
    z = [torch.empty_like(p, memory_format=torch.contiguous_format) for p in parameters.values()]

    def quadratic_form(key: Tensor) -> Tensor:
        ops.perturb(z, [], key, 1.0, distribution)
        terms = [(h.double() * x).sum() for h, x in zip(product(z), z, strict=True) if h is not None]
        return torch.stack(terms).sum() if terms else torch.zeros((), dtype=torch.float64)

    return quadratic_form


def hessian_product(
    model: nn.Module, parameters: dict[str, Tensor], inputs: Call, targets: Tensor, *, way_out: str
) -> Callable[[Sequence[Tensor]], Sequence[Tensor | None]]:
    """The function z ↦ Hz of one batch's mean loss, both by parameter, None where it is 0 whatever z is.

    The graph of the gradient is made once and kept for all z.

    Raises:
        NotImplementedError: something has no second derivative; ``way_out`` is what the message recommends.
    """
    with torch.enable_grad(), second_derivatives(way_out):
        logits = _forward(model, inputs, twice_differentiable())
        loss = CATEGORICAL.loss(logits, _fit(model, logits, inputs, targets))
        found = differentiable_gradients(loss, list(parameters.values()), way_out=way_out)
    curved = [(g, i) for i, g in enumerate(found) if g is not None and g.requires_grad]

    def product(z: Sequence[Tensor]) -> Sequence[Tensor | None]:
        if not curved:
            return [None] * len(z)
        outputs, directions = [g for g, _ in curved], [z[i] for _, i in curved]
        leaves = list(parameters.values())
        with second_derivatives(way_out):
            return torch.autograd.grad(outputs, leaves, directions, retain_graph=True, allow_unused=True)

    return product


def _by_difference(
    model: nn.Module, parameters: dict[str, Tensor], inputs: Call, targets: Tensor, distribution: str
) -> QuadraticForm:
    before = _writes(model)
    with torch.enable_grad(), record_gates(model) as gates:  # as in the replays: without, some modules take other paths
        logits = call_copy(model, {}, inputs)
    list(map(refuse_recomputed, graph_nodes(logits)))
    targets = _fit(model, _checked(model, logits, before), inputs, targets)
    del logits  # with its graph
    shifted = {name: torch.empty_like(p, memory_format=torch.contiguous_format) for name, p in parameters.items()}
    coarsest = max((p.dtype for p in parameters.values()), key=lambda dtype: torch.finfo(dtype).eps)
    step = DIFFERENCE_STEP[coarsest]

    def slope(key: Tensor, step: float) -> Tensor:
        leaves = [x.detach() for x in shifted.values()]
        ops.perturb(leaves, [p.detach() for p in parameters.values()], key, step, distribution)
        for leaf in leaves:
            leaf.requires_grad_()
        with torch.enable_grad(), gates.replay():
            loss = CATEGORICAL.loss(call_copy(model, dict(zip(shifted, leaves, strict=True)), inputs), targets)
        found = torch.autograd.grad(loss, leaves, materialize_grads=True)
        return ops.probe_dot(list(found), key, distribution)

    return lambda key: (slope(key, step) - slope(key, -step)) / (2 * step)


# ---- data, options, and what has to be put back ----------------------------------------------------------------------


class Pairs:
    """Inputs with their targets, as often as they are iterated; where ``counted``, without the targets −100."""

    def __init__(self, batches: Batches, *, counted: bool = False) -> None:
        self.batches, self.counted = batches, counted

    def __iter__(self) -> Iterator[tuple[Call, Tensor]]:
        for inputs, targets in self.batches:
            if targets is None:
                raise ValueError("targets: expected labels beside the inputs, got None")
            inputs, targets = map_inputs(inputs, _savable), _savable(targets)
            kept = targets != -100 if self.counted and targets.dim() == 1 else None
            if kept is None or kept.all():
                yield inputs, targets
            elif kept.any():
                yield take_rows(inputs, kept), targets[kept]

    def first(self) -> tuple[Call, Tensor]:
        """The first batch.

        Raises:
            ValueError: there is none.
        """
        for batch in self:
            if len(batch[1]):
                return batch
        raise ValueError("data: expected at least one example, got none")


def _savable(x: Tensor) -> Tensor:
    """The tensor, or a copy that autograd may save, where it was made in inference mode."""
    return x.clone() if x.is_inference() else x


def _fit(model: nn.Module, logits: Tensor, inputs: Call, targets: Tensor) -> Tensor:
    """The targets as a cross-entropy with the logits takes them."""
    return CATEGORICAL.fit(logits, targets, class_dim=inputs.class_dim, model=model)


def labelled(
    model: nn.Module,
    data: Any,
    targets: Tensor | None,
    batch_size: int | None,
    device: torch.device,
    class_dim: int | None,
) -> Pairs:
    """``data`` with its targets, which may come beside it, as often as they are iterated."""
    if targets is not None:
        if not isinstance(targets, Tensor):
            raise ValueError(f"targets: expected a tensor or None, got {type(targets).__name__}")
        data = (data, targets)
    return Pairs(Batches(model, data, device, class_dim=class_dim, batch_size=batch_size, keep=True))


@contextmanager
def measuring(model: nn.Module, params: Iterable[Tensor] | None, mode: str) -> Iterator[dict[str, Tensor]]:
    """The wanted parameters, alone in requiring a gradient; the model in the wanted mode; all put back afterwards.

    Hooks of the parameters rest: they are meant for the gradients of training.

    Raises:
        NotImplementedError: a wanted parameter is complex.
    """
    trainable = trainable_parameters(model)
    chosen = chosen_names(trainable, params)
    for name in chosen:
        if trainable[name].is_complex():
            raise NotImplementedError(
                f"params: expected real parameters, got {name} of {trainable[name].dtype}, for which there is no "
                "Hessian here; hold its real view (torch.view_as_real) as the parameter, or leave it out by params="
            )
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = frozenset(p.device.index for p in trainable.values() if p.device.type == "cuda")
    random = RandomState.current(devices)
    with torch.inference_mode(False), unhooked(trainable.values()):
        try:
            for name, parameter in trainable.items():
                parameter.requires_grad_(name in chosen)
            with uncompiled(model, "the measurement"), eval_mode(model) if mode == "eval" else nullcontext():
                yield {name: parameter for name, parameter in trainable.items() if name in chosen}
        finally:
            for parameter in trainable.values():
                parameter.requires_grad_(True)
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
            random.restore()


def _check_options(
    method: str,
    probes: int,
    distribution: str,
    hvp: str,
    tolerance: float | None,
    batch_size: int | None,
    mode: str,
) -> None:
    allowed: Sequence[tuple[str, str, tuple[str, ...]]] = (
        ("method", method, ("auto", "fisher", "split", "reduced", "hutchinson")),
        ("distribution", distribution, ("gaussian", "rademacher")),
        ("hvp", hvp, ("taylor", "autograd", "finite_difference")),
        ("mode", mode, ("eval", "keep")),
    )
    for name, value, values in allowed:
        if not (isinstance(value, str) and value in values):
            expected = " or ".join(f'"{v}"' for v in values)
            raise ValueError(f"{name}: expected {expected}, got {value!r}")
    if method in ("split", "reduced") and hvp != "taylor":
        raise ValueError(f'hvp: expected "taylor" with method="{method}", got {hvp!r}')
    for name, number in (("probes", probes), ("batch_size", batch_size)):
        if not (is_count(number) or (name == "batch_size" and number is None)):
            raise ValueError(f"{name}: expected a positive integer, got {number!r}")
    if tolerance is not None and not (is_number(tolerance) and tolerance > 0):
        raise ValueError(f"tolerance: expected a positive number, got {tolerance!r}")
