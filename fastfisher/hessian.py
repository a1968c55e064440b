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
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from fastfisher import ops
from fastfisher.estimate import TraceEstimate
from fastfisher.gates import RandomState, record_gates
from fastfisher.labels import cross_entropy, new_key
from fastfisher.penalty import Inputs, call_copy, call_model, chosen_names, map_inputs, trainable_parameters
from fastfisher.slow_path import warn_slow_path
from fastfisher.taylor import NoRule, Tape

Method = Literal["auto", "fisher", "reduced", "hutchinson"]
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
    batch_norm: Literal["eval", "keep"] = "eval",
) -> TraceEstimate:
    """Tr(H) of L(θ) = mean over examples of −log softmax(model(x))[y], with its standard error.

    In units of a plain step (one forward and backward over the same examples): ``"fisher"`` costs 5 to 9 exactly over
    10 classes and about 1 with Rademacher cotangents; ``"hutchinson"`` about 0.8 per probe with ``hvp="taylor"``,
    2.9 with ``"autograd"`` and 2.2 with ``"finite_difference"``; ``"reduced"`` about 0.6 per probe.

    Args:
        model: called as ``model(inputs)`` (a tuple's items by position, a dict's by name); gives logits (..., C).
        data: inputs, where ``targets`` are given; else a pair (inputs, targets), a DataLoader, or any iterable of such
            pairs. Targets are class indices (−100 is left out) or class probabilities.
        targets: the labels of ``data``.
        method: "fisher" computes Tr(F), which is Tr(H) where the network is piecewise linear in every single
            parameter; a warning says where that is not certain. "hutchinson" averages zᵀHz over probes, as the paper
            does. "reduced" leaves out the terms of zᵀHz that are known to have mean 0, products of the probes of
            different layers: the mean is Tr(H) all the same, the cost lower and the spread too, often by a lot.
            "auto" takes "fisher" where the operations of a forward of the first batch prove it exact, else "reduced"
            ("hutchinson" with another ``hvp`` than "taylor").
        probes: how many probes z; with ``tolerance``, how many at a time. Each batch gets fresh ones, whose mean over
            the batches varies less than that of shared ones.
        distribution: "gaussian", as in the paper, or "rademacher", whose variance is smaller (that of the diagonal
            is absent).
        hvp: how zᵀHz is taken. "taylor": the second derivative along z, see :mod:`fastfisher.taylor`; where an
            operation has no rule, a :class:`SlowPathWarning` names it and "autograd" serves. "autograd": z times the
            derivative of gᵀz, with the graph of the gradient g kept for all probes. "finite_difference": a central
            difference of gradients with the gates of the forward at θ replayed.
        tolerance: go on until the standard error is at most this. (With "fisher": take all labels, whose error is 0.)
        generator: where the probes come from; torch's default generator otherwise.
        params: the parameters of the diagonal blocks whose trace is wanted; all trainable ones by default.
        batch_size: how many examples go through the model at once where tensors are given; all by default.
            An iterable's batches are taken as they come.
        batch_norm: "eval" puts BatchNorm into eval mode while measuring; "keep" leaves it as it is.

    Returns:
        The estimate. Of Hutchinson's method the standard error is that over the probes (from their spread; infinite
        for a single one), for the data given.

    Raises:
        ValueError: an unknown option, no examples, or a parameter that is not the model's.

    The model is as before afterwards, also after an exception: modes, buffers, gradients, ``requires_grad``, and the
    state of the random number generators but for the draw of one key.
    """
    _check_options(method, probes, distribution, hvp, tolerance, batch_size, batch_norm)
    key = new_key(generator, torch.device("cpu"))
    batches = _Batches(data, targets, batch_size)
    with _measuring(model, params, batch_norm) as parameters:
        if method == "hutchinson":
            return _hutchinson(model, parameters, batches, key, probes, distribution, hvp, tolerance)
        if method == "reduced":
            return _hutchinson(model, parameters, batches, key, probes, distribution, "reduced", tolerance)
        inputs, _ = batches.first()
        reason, classes = why_not_fisher(model, parameters, inputs)
        if reason is not None and method == "auto":
            product = "reduced" if hvp == "taylor" else hvp
            return _hutchinson(model, parameters, batches, key, probes, distribution, product, tolerance)
        if reason is not None:
            warnings.warn(f'method="fisher": Tr(F) may differ from Tr(H) here, because {reason}', stacklevel=2)
        labels = "exact" if classes <= EXACT_CLASSES or tolerance is not None else "rademacher"
        return _fisher(model, batches, labels, generator)


def why_not_fisher(model: nn.Module, parameters: dict[str, Tensor], inputs: Inputs) -> tuple[str | None, int]:
    """Why Tr(H) = Tr(F) is not proven for this network (None where it is), and the number of classes.

    Looks at the operations that a forward really runs; see :meth:`fastfisher.taylor.Tape.why_not_multilinear`.
    """
    tape = Tape(parameters)
    try:
        with torch.enable_grad(), tape:
            logits = call_model(model, inputs)
    except NoRule as error:
        with torch.no_grad():
            return str(error), call_model(model, inputs).shape[-1]
    if logits.dim() != 2:
        return f"the model gives logits of shape {tuple(logits.shape)}, not one row for each example", logits.shape[-1]
    return tape.why_not_multilinear(logits), logits.shape[-1]


def _fisher(model: nn.Module, batches: _Batches, labels: str, generator: torch.Generator | None) -> TraceEstimate:
    from fastfisher.traces import trace_fisher  # type: ignore[import-not-found, unused-ignore]

    estimate: TraceEstimate = trace_fisher(model, batches, labels=labels, generator=generator)
    return estimate


# ---- Hutchinson ------------------------------------------------------------------------------------------------------


def _hutchinson(
    model: nn.Module,
    parameters: dict[str, Tensor],
    batches: _Batches,
    key: Tensor,
    probes: int,
    distribution: str,
    hvp: str,
    tolerance: float | None,
) -> TraceEstimate:
    values: list[float] = []
    used = 0
    fallbacks: dict[str, str] = {}
    while True:
        sums, rows, samples = [0.0] * probes, 0, 0
        for inputs, targets in batches:
            count = len(targets) if targets.is_floating_point() else int((targets != -100).sum())
            if count == 0:
                continue
            quadratic_form = None
            if hvp in ("taylor", "reduced"):
                try:
                    quadratic_form = _by_taylor(model, parameters, inputs, targets, distribution, hvp == "reduced")
                except NoRule as reason:
                    warn_slow_path(f'hvp="taylor": {reason}; hvp="autograd" serves, at three times the cost or more')
                    fallbacks, hvp = {"hvp": str(reason)}, "autograd"
            if quadratic_form is None:
                make = _by_autograd if hvp == "autograd" else _by_difference
                quadratic_form = make(model, parameters, inputs, targets, distribution)
            for i in range(probes):
                sums[i] += count * float(quadratic_form(key + torch.tensor([0, used])))
                used += 1
            rows, samples = rows + count, samples + len(targets)
        if rows == 0:
            raise ValueError("data: expected at least one example, got none")
        values += [value / rows for value in sums]
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
        if tolerance is None or error <= tolerance:
            break
    how = "reduced hutchinson" if hvp == "reduced" else "hutchinson"
    name = f"{how}, {distribution} probes" + ("" if hvp == "reduced" else f", hvp={hvp}")
    return TraceEstimate(statistics.fmean(values), error, samples, len(values), name, fallbacks=fallbacks)


QuadraticForm = Callable[[Tensor], Tensor]
"""zᵀHz of one batch's mean loss for the probe z of a key."""


def _by_taylor(
    model: nn.Module,
    parameters: dict[str, Tensor],
    inputs: Inputs,
    targets: Tensor,
    distribution: str,
    reduced: bool = False,
) -> QuadraticForm:
    tape = Tape(parameters)
    with torch.enable_grad():
        with tape:
            loss = cross_entropy(call_model(model, inputs), targets)
        tape.finish(loss, reduced=reduced)
    z = [torch.empty_like(p, memory_format=torch.contiguous_format) for p in parameters.values()]

    def quadratic_form(key: Tensor) -> Tensor:
        ops.perturb(z, [], key, 1.0, distribution)
        return tape.curvature(z)

    return quadratic_form


def _by_autograd(
    model: nn.Module, parameters: dict[str, Tensor], inputs: Inputs, targets: Tensor, distribution: str
) -> QuadraticForm:
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        loss = cross_entropy(call_model(model, inputs), targets)
        found = torch.autograd.grad(loss, list(parameters.values()), create_graph=True, allow_unused=True)
    reached = [(p, g, i) for i, (p, g) in enumerate(zip(parameters.values(), found, strict=True)) if g is not None]
    pairs = [(p, g, i) for p, g, i in reached if g.requires_grad]
    z = [torch.empty_like(p, memory_format=torch.contiguous_format) for p in parameters.values()]

    def quadratic_form(key: Tensor) -> Tensor:
        ops.perturb(z, [], key, 1.0, distribution)
        if not pairs:
            return torch.zeros((), dtype=torch.float64)
        inputs, outputs, directions = [p for p, _, _ in reached], [g for _, g, _ in pairs], [z[i] for _, _, i in pairs]
        products = torch.autograd.grad(outputs, inputs, directions, retain_graph=True, allow_unused=True)
        terms = [(h.double() * z[i]).sum() for h, (_, _, i) in zip(products, reached, strict=True) if h is not None]
        return torch.stack(terms).sum()

    return quadratic_form


def _by_difference(
    model: nn.Module, parameters: dict[str, Tensor], inputs: Inputs, targets: Tensor, distribution: str
) -> QuadraticForm:
    with torch.no_grad(), record_gates(model) as gates:
        call_model(model, inputs)
    shifted = {name: torch.empty_like(p, memory_format=torch.contiguous_format) for name, p in parameters.items()}
    coarsest = max((p.dtype for p in parameters.values()), key=lambda dtype: torch.finfo(dtype).eps)
    step = DIFFERENCE_STEP[coarsest]

    def slope(key: Tensor, step: float) -> Tensor:
        leaves = [x.detach() for x in shifted.values()]
        ops.perturb(leaves, [p.detach() for p in parameters.values()], key, step, distribution)
        for leaf in leaves:
            leaf.requires_grad_()
        with torch.enable_grad(), gates.replay():
            loss = cross_entropy(call_copy(model, dict(zip(shifted, leaves, strict=True)), inputs), targets)
        found = torch.autograd.grad(loss, leaves, materialize_grads=True)
        return ops.probe_dot(list(found), key, distribution)

    return lambda key: (slope(key, step) - slope(key, -step)) / (2 * step)


# ---- data, options, and what has to be put back ----------------------------------------------------------------------


class _Batches:
    """Pairs (inputs, targets), as often as they are wanted."""

    def __init__(self, data: Any, targets: Tensor | None, batch_size: int | None) -> None:
        if targets is None and isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(data[1], Tensor):
            data, targets = data
        self.data, self.targets, self.batch_size = data, targets, batch_size
        if targets is None:
            if isinstance(data, (Tensor, dict)):
                raise ValueError("targets: expected labels beside a tensor of inputs, got None")
            if isinstance(data, Iterator):  # it can be read only once
                self.data = list(data)

    def __iter__(self) -> Iterator[tuple[Inputs, Tensor]]:
        if self.targets is None:
            yield from self.data
            return
        size = self.batch_size or max(1, len(self.targets))
        for start in range(0, len(self.targets), size):
            part = slice(start, start + size)
            yield map_inputs(self.data, lambda x, part=part: x[part]), self.targets[part]  # type: ignore[misc]

    def first(self) -> tuple[Inputs, Tensor]:
        """The first batch.

        Raises:
            ValueError: there is none.
        """
        for batch in self:
            if len(batch[1]):
                return batch
        raise ValueError("data: expected at least one example, got none")


@contextmanager
def _measuring(model: nn.Module, params: Iterable[Tensor] | None, batch_norm: str) -> Iterator[dict[str, Tensor]]:
    """The wanted parameters, alone in requiring a gradient; BatchNorm in eval mode; all put back afterwards."""
    trainable = trainable_parameters(model)
    chosen = chosen_names(trainable, params)
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and batch_norm == "eval"]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = frozenset(p.device.index for p in trainable.values() if p.device.type == "cuda")
    random = RandomState.current(devices)
    try:
        for norm in norms:
            norm.training = False
        for name, parameter in trainable.items():
            parameter.requires_grad_(name in chosen)
        yield {name: parameter for name, parameter in trainable.items() if name in chosen}
    finally:
        for norm in norms:
            norm.training = True
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
    batch_norm: str,
) -> None:
    allowed: Sequence[tuple[str, str, tuple[str, ...]]] = (
        ("method", method, ("auto", "fisher", "reduced", "hutchinson")),
        ("distribution", distribution, ("gaussian", "rademacher")),
        ("hvp", hvp, ("taylor", "autograd", "finite_difference")),
        ("batch_norm", batch_norm, ("eval", "keep")),
    )
    for name, value, values in allowed:
        if value not in values:
            expected = " or ".join(f'"{v}"' for v in values)
            raise ValueError(f"{name}: expected {expected}, got {value!r}")
    if method == "reduced" and hvp != "taylor":
        raise ValueError(f'hvp: expected "taylor" with method="reduced", got {hvp!r}')
    for name, number in (("probes", probes), ("batch_size", batch_size)):
        if number is not None and (not isinstance(number, int) or number < 1):
            raise ValueError(f"{name}: expected a positive integer, got {number!r}")
    if tolerance is not None and not (math.isfinite(tolerance) and tolerance > 0):
        raise ValueError(f"tolerance: expected a positive number, got {tolerance!r}")
