"""The Fisher penalty R(θ) = ‖g‖², g = ∇_θ mean_i ℓ(x_i, ŷ_i), as a scalar that backpropagates (eq. 3, 5 and 6).

Its gradient is ∇R = 2 H_ŷ g. Two ways to it:

- ``double_backprop`` differentiates through the gradient. Exact, and the oracle of the tests; it costs three to five
  plain steps and keeps the graph of the backward in memory.
- ``finite_difference`` takes the gradient once more, at θ + ρd with d = g/‖g‖:
  ∇R ≈ (2‖g‖/ρ)·(∇ℓ_ŷ(θ + ρd) − g), or centrally (‖g‖/ρ)·(∇ℓ_ŷ(θ + ρd) − ∇ℓ_ŷ(θ − ρd)).
  Two forwards and two backwards of the penalised loss, and no graph of a backward.

The shifted forward runs on copies (``torch.func.functional_call``): the model's parameters and buffers are never
written, whatever is raised on the way.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastfisher import ops
from fastfisher.arguments import is_number
from fastfisher.batches import paired
from fastfisher.gates import Gates, fused_forward, record_gates
from fastfisher.labels import (
    Signs,
    are_drawn,
    check_counted,
    check_labels,
    check_targets,
    cross_entropy,
    fit,
    label_loss,
    new_key,
)
from fastfisher.model import (
    Inputs,
    call_copy,
    check_class_dim,
    check_examples,
    chosen_names,
    class_last,
    couples_examples,
    input_tensors,
    map_inputs,
    requiring_grad,
    take_rows,
    trainable_parameters,
    uncompiled,
)
from fastfisher.rollback import undoing
from fastfisher.slow_path import warn_slow_path

Method = Literal["double_backprop", "finite_difference"]
Difference = Literal["forward", "central"]

_LARGE = 1 << 16
"""A parameter of so many elements is worth a call of its own."""

# ---- the step ------------------------------------------------------------------------------------------------------

FROZEN_STEP: dict[torch.dtype, dict[str, float]] = {
    torch.float64: {"forward": 1e-7, "central": 1e-5},
    torch.float32: {"forward": 2e-4, "central": 1e-3},
    torch.float16: {"forward": 1e-2, "central": 3e-2},
    torch.bfloat16: {"forward": 5e-2, "central": 1e-1},
}
"""ρ with frozen gates, by the precision of the forward (TF32 counts as float16, which has as many bits).

Chosen for the smallest worst error over SimpleCNN and VGG-11, at initialisation and after 50 steps, on digits and on
noise (``bench/step_size.py`` prints the table); shifted inputs take √B times as much, which is ρ per example.
"""

FREE_START = 1e-2
"""The first ρ with free gates, as a fraction of ‖θ‖; :class:`AdaptiveStep` takes it from there."""


class AdaptiveStep:
    """A step ρ for free gates that follows the relative change of the gradient, ‖∇ℓ_ŷ(θ + ρd) − g‖/‖g‖.

    With free gates a step must be long enough to cross many kinks, or it measures their noise; neither a fixed ρ nor a
    fixed fraction of ‖θ‖ carries over between networks, but the relative change it causes does. After each penalty ρ
    is multiplied by target/change, at most doubled or halved: no pass is spent on it.

    Args:
        target: the relative change to hold.
        rho: the ρ to start with; ``FREE_START``·‖θ‖ at the first penalty otherwise.

    Raises:
        ValueError: an argument is no positive number; it is named.
    """

    def __init__(self, target: float = 0.5, rho: float | None = None) -> None:
        if not (is_number(target) and target > 0):
            raise ValueError(f"target: expected a positive number, got {target!r}")
        self.target = target
        self._rho: Tensor | None = None  # on the device, so that no step waits for it
        self.rho = rho

    @property
    def rho(self) -> float | None:
        """The current ρ; None before the first penalty."""
        return None if self._rho is None else float(self._rho)

    @rho.setter
    def rho(self, value: float | None) -> None:
        if value is not None and not (is_number(value) and value > 0):
            raise ValueError(f"rho: expected a positive number or None, got {value!r}")
        self._rho = None if value is None else torch.tensor(value, dtype=torch.float64)

    def current(self, norm: Callable[[], Tensor], device: torch.device) -> Tensor:
        """The ρ to use, a float64 scalar on the device, where the shifted quantity has norm ``norm()``."""
        if self._rho is None:
            start = norm()
            self._rho = FREE_START * torch.where(start > 0, start, 1.0)
        elif self._rho.device != device:
            self._rho = self._rho.to(device)
        return self._rho

    def update(self, change: Tensor) -> None:
        """Takes note of the relative change that the current ρ caused; one that is not finite says nothing."""
        if self._rho is not None:
            factor = (self.target / change.clamp(min=1e-12)).clamp(0.5, 2.0)
            self._rho.mul_(torch.where(change.isfinite(), factor, 1.0))


Step = Literal["auto"] | float | AdaptiveStep


def _precision(tensors: list[Tensor], device: torch.device, autocast: torch.dtype | None) -> torch.dtype:
    """The coarsest dtype that the forward computes in; ``autocast`` is that of a context within the model."""
    dtypes = [t.dtype for t in tensors if t.is_floating_point()]
    if torch.is_autocast_enabled(device.type):
        dtypes.append(torch.get_autocast_dtype(device.type))
    if autocast is not None:
        dtypes.append(autocast)
    tf32 = device.type == "cuda" and (torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32)
    coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    return torch.float16 if tf32 and coarsest == torch.float32 else coarsest


# ---- arguments -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What a penalty is, apart from model and data. Checked on construction; errors name the argument."""

    labels: str | Tensor = "sampled"
    method: Method = "double_backprop"
    gates: Literal["frozen", "free"] | Gates = "frozen"
    wrt: Literal["parameters", "inputs"] = "parameters"
    reduction: Literal["batch", "first"] = "batch"
    step: Step = "auto"
    difference: Difference = "forward"

    def __post_init__(self) -> None:
        check_labels(self.labels)
        allowed: dict[str, tuple[str, ...]] = {
            "method": ("double_backprop", "finite_difference"),
            "gates": ("frozen", "free"),
            "wrt": ("parameters", "inputs"),
            "reduction": ("batch", "first"),
            "difference": ("forward", "central"),
        }
        for name, values in allowed.items():
            value = getattr(self, name)
            if not (name == "gates" and isinstance(value, Gates)) and not (isinstance(value, str) and value in values):
                expected = " or ".join(f'"{v}"' for v in values)
                raise ValueError(f"{name}: expected {expected}, got {value!r}")
        step: Any = self.step
        if isinstance(step, AdaptiveStep) or (isinstance(step, str) and step == "auto"):
            return
        if not (is_number(step) and step > 0):
            raise ValueError(f'step: expected a positive number, "auto" or an AdaptiveStep, got {self.step!r}')

    @property
    def frozen(self) -> bool:
        """Whether the shifted forward replays the gates."""
        return self.gates.frozen if isinstance(self.gates, Gates) else self.gates == "frozen"


def _autocast_of(device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """A context as the caller's autocast is now, for a backward, where autograd does not restore it."""
    enabled, dtype = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    return lambda: torch.autocast(device.type, dtype=dtype, enabled=enabled, cache_enabled=False)


def _norm(tensors: dict[str, Tensor], device: torch.device, total: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """A float64 scalar on the device; ``total`` adds the squares that other processes have."""
    squared = (
        ops.sum_squares(list(tensors.values())) if tensors else torch.zeros((), dtype=torch.float64, device=device)
    )
    return (squared if total is None else total(squared)).sqrt()


# ---- finite differences ----------------------------------------------------------------------------------------------


@dataclass
class FiniteDifference:
    """The gradient at θ of the penalised loss, and what it takes to have it again at θ + ρd.

    Attributes:
        inputs, first_only: what the shifted forward runs on, and whether only its first row counts.
        labels: the labels of the gradient, kept for the shifted one.
        gradient: ∇_θ of the mean loss at those labels, by name; a parameter that is not used is absent.
        direction: what the norm is taken of, by name: the gradients of the chosen parameters, or those of the inputs
            (named by position).
        factor: R = factor·‖direction‖² (1; the number of examples for inputs, where R = mean_i ‖∂ℓ_i/∂x_i‖²).
        scale: what the loss was multiplied by before ``gradient`` and ``direction`` were taken of it, against underflow
            in float16. The shifted loss is too, and so is what is added; R is without it.
        share: what the penalised loss is multiplied by: 1, or this process's weight where several share a batch.
        total: sums a square over processes that hold parts of ``direction``; None where it is whole.
        norm: ‖direction‖. This, ρ, R and the relative change are float64 scalars on the device: nothing here waits.
    """

    model: nn.Module
    inputs: Inputs
    first_only: bool
    settings: Settings
    gates: Gates
    labels: Tensor | Signs
    gradient: dict[str, Tensor]
    direction: dict[str, Tensor]
    factor: float
    scale: float | Tensor = 1.0
    share: float = 1.0
    total: Callable[[Tensor], Tensor] | None = None
    norm: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.parameters: dict[str, Tensor] = dict(self.model.named_parameters())
        self.device = next(iter(self.parameters.values())).device
        self.norm = self._norm(self.direction)
        whole = self.settings.wrt == "parameters" and len(self.direction) == len(self.gradient)
        self.size = self._size(whole)
        self.autocast = _autocast_of(self.device)

    @property
    def value(self) -> Tensor:
        """R."""
        return self.factor * (self.norm / self.scale).square()

    def add_to(self, out: dict[str, Tensor], weight: float | Tensor) -> Tensor:
        """out += weight·scale·∇R, in place, for the parameters in ``gradient``.

        ``out`` may be ``gradient`` itself with a forward difference, which reads each of its tensors once.
        Returns the relative change of the gradient that the step caused; NaN where there was nothing to change.
        """
        rho = self.rho()
        scale = weight * self.coefficient(rho)
        squared = self._accumulate(out, rho, scale)
        if self.settings.difference == "central":
            self._accumulate(out, -rho, -scale)
        return torch.where(self.norm > 0, squared.sqrt() / self.size, math.nan)

    def relative_change(self, reached: dict[str, Tensor], gradient: dict[str, Tensor]) -> Tensor:
        """The relative change of ``gradient``, scaled, that led to ∇R = ``reached``, not scaled, each summed over all
        processes."""
        changed = _norm(reached, self.device) * self.scale**2 * self.rho() / (2 * self.factor * self.norm)
        return torch.where(self.norm > 0, changed / _norm(gradient, self.device), math.nan)

    def adapt(self, change: Tensor) -> None:
        """Has an adaptive step follow the relative change that it caused."""
        if isinstance(self.settings.step, AdaptiveStep):
            self.settings.step.update(change)

    def mixed_gradient(self, weight: float, loss: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """scale·(∇L(θ + ρd) + weight·∇R), one backward for both; ``loss`` is L as a function of the logits."""
        rho = self.rho()
        coefficient = weight * self.coefficient(rho)
        combined, leaves = self.shifted_loss(rho, coefficient, loss)
        total = dict(zip(leaves, torch.autograd.grad(combined, list(leaves.values())), strict=True))
        for name, gradient in self.gradient.items():
            total[name].addcmul_(gradient, -coefficient.to(gradient.dtype))
        return total

    def coefficient(self, rho: Tensor) -> Tensor:
        """scale·∇R = coefficient·(the difference of the gradients of scaled losses)."""
        return self.factor * (self.norm / self.scale) * (2.0 if self.settings.difference == "forward" else 1.0) / rho

    def rho(self) -> Tensor:
        """The length of the step: as given, or the default for the gates and the precision."""
        step = self.settings.step
        if isinstance(step, AdaptiveStep):
            return step.current(self._shifted_norm, self.device)
        if step == "auto":
            step = FROZEN_STEP[self._precision()][self.settings.difference]
            step *= math.sqrt(self.factor) if self.settings.wrt == "inputs" else 1.0
        return torch.full((), float(step), dtype=torch.float64, device=self.device)

    def shifted_loss(
        self, rho: Tensor, weight: Tensor | None = None, loss: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """scale·(weight·(mean loss at the labels) + loss(logits)) at θ + ρd (or shifted inputs); its leaves by name."""
        length = self.length(rho)
        inputs = self.shifted_inputs(length)
        parameters = {name: p.detach() for name, p in self.parameters.items()}
        if self.settings.wrt == "parameters":
            for name, direction in self.direction.items():
                parameters[name] = _shifted(parameters[name], direction, length)
        leaves = {name: parameters[name].detach().requires_grad_() for name in self.gradient}
        return self.loss_of(lambda: call_copy(self.model, parameters | leaves, inputs), weight, loss), leaves

    def length(self, rho: Tensor) -> Tensor:
        """What the direction is multiplied by to have length ρ."""
        return torch.where(self.norm > 0, rho / self.norm, 0.0)

    def shifted_inputs(self, length: Tensor) -> Any:
        """The inputs of the shifted forward."""
        if self.settings.wrt == "parameters":
            return self.inputs
        position = iter(range(len(input_tensors(self.inputs))))

        def shift(x: Tensor) -> Tensor:
            direction = self.direction.get(str(next(position)))
            return x.detach() if direction is None else _shifted(x, direction, length)

        return map_inputs(self.inputs, shift)

    def loss_of(
        self, forward: Callable[[], Tensor], weight: Tensor | None, loss: Callable[[Tensor], Tensor] | None
    ) -> Tensor:
        """The value of :meth:`shifted_loss`, from the forward at the shifted point."""
        with torch.enable_grad(), self.autocast():
            free = nullcontext() if self.gates.frozen else fused_forward(self.model)
            with self.gates.replay(), free:
                logits = forward()
            total = cross_entropy(logits[:1] if self.first_only else logits, self.labels)
            if self.share != 1.0:
                total = self.share * total
            if weight is not None:
                total = weight.to(total.dtype) * total
            if loss is not None:
                total = total + loss(logits)
            return total * self.scale

    def _accumulate(self, out: dict[str, Tensor], rho: Tensor, scale: Tensor) -> Tensor:
        """out += scale·(∇ℓ(θ + ρd) − ∇ℓ(θ)); returns ‖∇ℓ(θ + ρd) − ∇ℓ(θ)‖².

        A large parameter's difference is added as soon as the backward has made it, so that the shifted gradient never
        exists as a whole: one copy of the parameters less at the peak. The small ones are added in one call.
        """
        loss, leaves = self.shifted_loss(rho)
        squares: list[Tensor] = []

        # Neither function may hold `leaves`: the leaves hold the hooks, and would live on until the next collection.
        def add(named: dict[str, Tensor]) -> None:
            gradients = []
            for leaf in named.values():  # with free gates the shifted forward may not need a parameter
                gradients.append(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
                leaf.grad = None
            if named:
                out_list, here = [out[n] for n in named], [self.gradient[n] for n in named]
                squares.append(ops.axpy_diff(out_list, gradients, here, scale))

        made: set[str] = set()

        def add_at_once(name: str, leaf: Tensor) -> None:
            made.add(name)
            add({name: leaf})

        for name, leaf in leaves.items():
            if leaf.numel() >= _LARGE:
                leaf.register_post_accumulate_grad_hook(functools.partial(add_at_once, name))  # type: ignore[no-untyped-call]
        if leaves:  # and nothing else: the caller's inputs may require a gradient, too
            loss.backward(inputs=list(leaves.values()))  # type: ignore[no-untyped-call]
        add({name: leaf for name, leaf in leaves.items() if name not in made})
        return torch.stack(squares).sum() if squares else torch.zeros_like(self.norm)

    def judge(self, relative_change: Tensor) -> None:
        """Warns where the step was too short to measure anything; the host waits for the change."""
        change = float(relative_change)
        if not isinstance(self.settings.step, AdaptiveStep) and not self.settings.frozen and change < 0.05:
            rho = float(self.rho())
            warnings.warn(
                f"step: with free gates a step of {rho:.1e} changed the gradient by only {change:.1e} of its norm; so "
                'short a step measures the noise of single kinks and can destroy training. Use step="auto", or '
                'gates="frozen", which is right for short steps.',
                UserWarning,
                stacklevel=2,
            )
        floor = 50 * torch.finfo(self._precision()).eps
        if 0.0 < change < floor and self._precision() in (torch.float32, torch.float64):
            warnings.warn(
                f"step: {float(self.rho()):.1e} changed the gradient by {change:.1e} of its norm, less than "
                f"{floor:.0e}, where rounding shows; use a longer step or a higher precision",
                UserWarning,
                stacklevel=2,
            )

    def _precision(self) -> torch.dtype:
        with self.autocast():
            return _precision(list(self.parameters.values()), self.device, self.gates.autocast)

    def _shifted_norm(self) -> Tensor:
        named = self.parameters
        if self.settings.wrt == "inputs":
            named = {str(i): x for i, x in enumerate(input_tensors(self.inputs))}
        return self._norm({name: named[name].detach() for name in self.direction})

    def _norm(self, named: dict[str, Tensor]) -> Tensor:
        """‖named‖, of tensors as in ``direction``."""
        return _norm(named, self.device, self.total)

    def _size(self, whole: bool) -> Tensor:
        """‖gradient‖, of which ``direction`` is the ``whole`` where no other process has a share."""
        return self.norm if whole and self.share == 1.0 else _norm(self.gradient, self.device)


def _shifted(x: Tensor, direction: Tensor, length: Tensor) -> Tensor:
    return torch.addcmul(x.detach(), direction, length.to(x.dtype))


# ---- the gradient at θ -----------------------------------------------------------------------------------------------


Differentiate = Callable[[Tensor, Sequence[Tensor], bool], Sequence[Tensor | None]]
"""(loss, sources, retain_graph) ↦ ∂loss/∂source, None where a source is not used."""


def autograd_gradients(loss: Tensor, sources: Sequence[Tensor], retain_graph: bool) -> Sequence[Tensor | None]:
    """∂loss/∂source for each source, None where it is not used."""
    return torch.autograd.grad(loss, sources, retain_graph=retain_graph, allow_unused=True)


def gradient_at(
    loss: Tensor,
    trainable: dict[str, Tensor],
    inputs: Inputs,
    settings: Settings,
    chosen: frozenset[str],
    *,
    retain_graph: bool,
    differentiate: Differentiate = autograd_gradients,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """∇_θ loss by name and the direction of the shift (see :class:`FiniteDifference`), unused parameters left out."""
    wanted: dict[str, Tensor] = {}
    if settings.wrt == "inputs":
        wanted = {str(i): x for i, x in enumerate(input_tensors(inputs)) if x.requires_grad}
        if not wanted:
            raise ValueError('inputs: expected a floating-point tensor that requires a gradient with wrt="inputs"')
    sources = list(trainable.values()) + list(wanted.values())
    found = differentiate(loss, sources, retain_graph)
    gradient = {n: g for n, g in zip(trainable, found[: len(trainable)], strict=True) if g is not None}
    if settings.wrt == "inputs":
        by_input = zip(wanted, found[len(trainable) :], strict=True)
        return gradient, {name: g for name, g in by_input if g is not None}
    return gradient, {name: g for name, g in gradient.items() if name in chosen}


class _Penalty(torch.autograd.Function):
    """R as a value whose gradient is taken by finite differences, when and if the backward comes."""

    @staticmethod
    def forward(ctx: Any, difference: FiniteDifference, names: list[str], *parameters: Tensor) -> Tensor:
        ctx.difference, ctx.names = difference, names
        ctx.save_for_backward(*parameters)  # autograd then raises if one was changed in between
        return difference.value.to(parameters[0].dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        parameters = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        out = {name: torch.zeros_like(parameters[name]) for name in ctx.difference.gradient}
        difference: FiniteDifference = ctx.difference
        if difference.settings.step != "auto" or difference.settings.frozen:
            change = difference.add_to(out, grad.double())
            difference.adapt(change)
            difference.judge(change)
        else:  # nothing is known of the step yet: retake it until the gradient's change is near its target
            step = AdaptiveStep()
            difference.settings = dataclasses.replace(difference.settings, step=step)
            for _ in range(8):
                relative = difference.add_to(out, grad.double())
                difference.adapt(relative)
                if math.isnan(relative) or 0.5 * step.target <= float(relative) <= 2 * step.target:
                    break
                for tensor in out.values():
                    tensor.zero_()
        return (None, None, *(out.get(name) for name in ctx.names))


@undoing
def penalty(
    model: nn.Module,
    inputs: Inputs,
    targets: Tensor | None = None,
    *,
    labels: Literal["sampled", "true", "uniform", "rademacher"] | Tensor = "sampled",
    method: Method = "double_backprop",
    gates: Literal["frozen", "free"] | Gates = "frozen",
    wrt: Literal["parameters", "inputs"] = "parameters",
    logits: Tensor | None = None,
    reduction: Literal["batch", "first"] = "batch",
    step: Step = "auto",
    difference: Difference = "forward",
    generator: torch.Generator | None = None,
    params: Iterable[Tensor] | None = None,
    class_dim: int | None = None,
) -> Tensor:
    """The gradient-norm penalty R as a scalar that backpropagates into the model's parameters.

    ``reduction="batch"``: R = ‖(1/B) Σ_i ∇_θ ℓ(x_i, ŷ_i)‖² (eq. 3); ``"first"``: R = ‖∇_θ ℓ(x_1, ŷ_1)‖² (eq. 6);
    ``wrt="inputs"``: R = (1/B) Σ_i ‖∂ℓ(x_i, y_i)/∂x_i‖². Names of the paper: FP is ``labels="sampled"``, GP ``"true"``,
    GP_r ``"uniform"``, GP_x ``wrt="inputs", labels="true"``.

    Example:
        >>> loss = F.cross_entropy(model(x), y) + 0.1 * fastfisher.penalty(model, x)
        >>> loss.backward()

    In a training loop :class:`fastfisher.FisherPenalty` costs less: it shares the forward with the training loss.

    Args:
        model: any module from ``inputs`` to logits (..., C), or to an object with ``.logits``. Its parameters and
            buffers are not touched: running statistics of BatchNorm do not move, whichever forward this function runs
            itself.
        inputs: a tensor, a tuple or list (positional arguments) or a mapping (keyword arguments), batch first; see
            docs/data.md.
        targets: class indices, or class probabilities, where ``labels="true"``; by default the ``labels`` in a mapping
            of inputs. Positions with the index −100 (padding) have no part in R, whichever the labels.
        labels: whose gradient is penalised: ŷ drawn from the model, the targets, uniform labels, or a given tensor of
            labels. Labels are held fixed when R is differentiated, as in the paper. "rademacher" is not the paper's:
            the gradient of 2⟨√p, ε⟩ with random signs ε in place of a drawn label, whose penalty has the same
            expectation and, once the data are fitted, a far smaller variance.
        method: "double_backprop" (exact) or "finite_difference" (cheaper: the gradient once more at θ + ρd, when the
            backward reaches R).
        gates: with finite differences, "frozen" replays the ReLU masks, max-pool indices and their like of the forward
            at θ, and short steps converge to double backprop; "free" takes a long step across the kinks, a
            regulariser of its own. A :class:`fastfisher.gates.Gates` recorded by ``record_gates`` around the caller's
            forward goes with ``logits``.
        wrt: what the gradient is taken with respect to.
        logits: the logits of a forward of the caller's on these inputs, to be shared. With finite differences pass the
            ``gates`` recorded in it too; without them the forward is run again, and a SlowPathWarning says so.
        step: ρ, the length of the shift; "auto" takes ``FROZEN_STEP`` for frozen gates, and for free gates searches
            the step that changes the gradient by about half of its norm, which may cost further passes (an
            :class:`AdaptiveStep` kept between calls costs none).
        difference: "forward", or "central" (one more forward and backward, an error of ρ² instead of ρ).
        generator: where the labels are drawn; torch's default generator otherwise.
        params: the parameters whose gradient's norm is penalised; all trainable ones otherwise.
        class_dim: which dimension of the logits holds the classes; by default the last, but where logits have four
            dimensions or more, or targets fit another one, it has to be said.

    Returns:
        R, a scalar. Differentiable once ("finite_difference") or as often as the model is ("double_backprop").

    Raises:
        ValueError: an argument is none of the above, or targets are missing or do not fit; the argument is named.
        TypeError: the model, the inputs or the data are of a type that cannot be one.
    """
    settings = Settings(labels, method, gates, wrt, reduction, step, difference)
    check_class_dim(class_dim)
    trainable = trainable_parameters(model)
    chosen = chosen_names(trainable, params)
    inputs, targets = paired(model, inputs, targets, class_dim)
    check_targets(labels, targets)
    check_examples(inputs)
    if logits is not None and not (isinstance(logits, Tensor) and logits.dim() > 0):
        raise ValueError("logits: expected those of a forward, (..., C)")
    finite = method == "finite_difference"

    if logits is not None and finite and not isinstance(gates, Gates):
        warn_slow_path(
            "penalty runs the forward again: finite differences repeat the random draws and gates of the forward that "
            "gave the logits. Run it within fastfisher.record_gates and pass gates= beside logits=."
        )
        logits = None
    if logits is not None and not logits.requires_grad:
        raise ValueError("logits: expected those of a forward with their graph, got some that require no gradient")
    recorded = gates if isinstance(gates, Gates) else None
    if recorded is not None and logits is None:
        raise ValueError("logits: expected the logits of the forward in which gates= was recorded, got None")
    shared = logits is not None
    if logits is not None:
        logits = class_last(logits, class_dim)

    first_only = reduction == "first"
    if first_only and not shared and not couples_examples(model):
        inputs = take_rows(inputs, slice(1))
        targets = targets[:1] if isinstance(targets, Tensor) else targets
        labels = labels[:1] if isinstance(labels, Tensor) else labels
    if logits is None:
        if wrt == "inputs":
            inputs = requiring_grad(inputs)
        plain = nullcontext() if finite else uncompiled(model, 'method="double_backprop"')
        with plain, record_gates(model, frozen=settings.frozen and finite) as recorded, torch.enable_grad():
            logits = call_copy(model, trainable, inputs)
    if targets is not None:
        targets = fit(logits, targets, class_dim=class_dim, model=model)
        check_counted(targets[:1] if first_only else targets)
    if isinstance(labels, Tensor):
        labels = fit(logits, labels, class_dim=class_dim, name="labels", model=model)
    rows = logits[:1] if first_only else logits
    if first_only and targets is not None:
        targets = targets[:1]
    if isinstance(labels, Tensor) and first_only:
        labels = labels[:1]
    key = new_key(generator, rows.device) if are_drawn(labels) else None
    loss, chosen_labels = label_loss(rows, labels, targets, key)
    factor = float(len(rows)) if wrt == "inputs" else 1.0

    if not finite:
        if wrt == "inputs":
            sources = [x for x in input_tensors(inputs) if x.requires_grad]
            if not sources:
                raise ValueError('inputs: expected a tensor that requires a gradient with wrt="inputs" and logits=')
        else:
            sources = [trainable[name] for name in trainable if name in chosen]
        found = torch.autograd.grad(loss, sources, create_graph=True, allow_unused=True)
        squares = [g.square().sum() for g in found if g is not None]
        return factor * torch.stack(squares).sum() if squares else loss.detach() * 0

    assert recorded is not None
    gradient, direction = gradient_at(loss, trainable, inputs, settings, chosen, retain_graph=shared)
    shift = FiniteDifference(model, inputs, first_only, settings, recorded, chosen_labels, gradient, direction, factor)
    names = list(gradient)
    if not names:
        return loss.detach() * 0
    return _Penalty.apply(shift, names, *(trainable[name] for name in names))  # type: ignore[no-any-return, no-untyped-call]
