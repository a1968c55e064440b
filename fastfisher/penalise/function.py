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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastfisher import ops
from fastfisher.autocast import autocast_dtype, autocast_of
from fastfisher.checks import check_flags, is_number
from fastfisher.data import paired
from fastfisher.engine.checkpointing import REENTRANT
from fastfisher.engine.gates import AccuracyWarning, Gates, fused_forward, record_gates
from fastfisher.engine.repeatable import check_repeatable, is_new_kind, look_at
from fastfisher.engine.rollback import undoing
from fastfisher.engine.twice import differentiable_gradients, second_derivatives, twice_differentiable
from fastfisher.labels import (
    Signs,
    are_drawn,
    check_counted,
    check_labels,
    check_targets,
    cross_entropy,
    fit,
    label_loss,
    looking_waits,
    new_key,
)
from fastfisher.lists import add_, plus
from fastfisher.model import (
    Inputs,
    call_copy,
    check_class_dim,
    check_examples,
    chosen_names,
    class_last,
    couples_examples,
    differentiable,
    input_tensors,
    map_inputs,
    requiring_grad,
    take_rows,
    trainable_parameters,
    uncompiled,
    unhooked,
)
from fastfisher.placement import whole
from fastfisher.slow_path import warn_slow_path

Method = Literal["double_backprop", "finite_difference"]
Difference = Literal["forward", "central"]

_LARGE = 1 << 16
"""A parameter of so many elements is worth a call of its own."""

_TRIES = 4
"""How often a step is shortened before the penalty is left out."""

STRAIGHT = 0.05
"""How much ∇R may change where the step is halved, relative to it; the error of the whole step is about twice that."""

DERIVATIVE = 0.1
"""How much faster or slower the loss may change along the gradient than that says, relative to it."""

FITTED = 4
"""Below so many roundings of a probability, the step's change of 1 - p of a fitted example says little: ∇R was off by
0.05 at 11 of them, and by 0.6 at 1.5 (an MLP that fits 8 examples)."""

_PROBES = 8
"""How many random vectors ∇R is compared along."""

_SAMPLE = 1 << 20
"""Of so many logits it is seen how far they moved."""

# ---- the step ------------------------------------------------------------------------------------------------------

FROZEN_STEP: dict[torch.dtype, dict[str, float]] = {
    torch.float64: {"forward": 1e-7, "central": 1e-5},
    torch.float32: {"forward": 2e-4, "central": 1e-3},
    torch.float16: {"forward": 1e-2, "central": 3e-2},
    torch.bfloat16: {"forward": 5e-2, "central": 1e-1},
}
"""ρ with frozen gates, by the precision of the forward (TF32 counts as float16, which has as many bits).

Chosen for the smallest worst error over SimpleCNN and VGG-11, at initialisation and after 50 steps, on digits and on
noise (``bench/step_size.py`` prints the table).
"""

INPUTS_STEP = 0.5
"""Shifted inputs take this times ‖x‖, over the whole batch, times the step of parameters: their size is their own.

Chosen on eight networks of the paper, digits and noise, at initialisation and after 50 steps: the worst error in
float32 is 6e-3 (forward) and 5e-4 (central). A step of the parameters' length erred up to 9e-2, by rounding.
"""

REACH = {"forward": 2e-2, "central": 1e-1}
"""How far logits may move (root mean square) over a default step with frozen gates.

The error of a forward difference was about half of that movement, that of a central one its square, on networks of
ReLUs, sorts and maxima whose logits have a scale from 0.2 to 200.
"""

CEILING = 0.5
"""The relative change of the gradient above which a short step with frozen gates is not believed."""

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
        if value is None or self._rho is None:
            self._rho = None if value is None else torch.tensor(value, dtype=torch.float64)
        else:
            self._rho.fill_(value)  # captured steps go on reading it where it is

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


def lower_precision(device: torch.device) -> torch.dtype | None:
    """What PyTorch's switches let products of float32 be computed in, as a dtype as coarse; None for float32."""
    backends: Any = torch.backends
    cuda, cpu = (backends.cuda.matmul, backends.cudnn.conv), (backends.mkldnn.matmul, backends.mkldnn.conv)
    allowed = [place.fp32_precision for place in {"cuda": cuda, "cpu": cpu}.get(device.type, ())]
    return torch.bfloat16 if "bf16" in allowed else torch.float16 if "tf32" in allowed else None  # as many bits as TF32


def coarsest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The floating dtype with the fewest bits of precision."""
    return max((dtype for dtype in dtypes if dtype.is_floating_point), key=lambda dtype: torch.finfo(dtype).eps)


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


def _norm(tensors: dict[str, Tensor], device: torch.device, total: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """A float64 scalar on the device; ``total`` adds the squares that other processes have."""
    parts = [real(x) for x in tensors.values()]
    squared = ops.sum_squares(parts) if parts else torch.zeros((), dtype=torch.float64, device=device)
    return (squared if total is None else total(squared)).sqrt()


def scaled(loss: Tensor, scale: float | Tensor) -> Tensor:
    """The loss times the scale, which is most often 1: then it costs nothing, here and in the backward."""
    return loss if not isinstance(scale, Tensor) and scale == 1.0 else loss * scale


def real(x: Tensor) -> Tensor:
    """A complex tensor as pairs of its real and imaginary parts, in the same memory; any other as it is."""
    return torch.view_as_real(x) if x.is_complex() else x


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
        expected: the logits at θ of all ``inputs``; where they are given, a default step is not longer than
            :data:`REACH` allows.
        shorter: what has become of the step where it was too long.
        level, spacing: the mean loss in the last shifted forward, and the rounding of the probabilities behind it.
        moved: the root mean square of how far the logits were from ``expected`` in the last shifted forward.
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
    expected: Tensor | None = None
    shorter: float = 1.0
    norm: Tensor = field(init=False)
    moved: Tensor | None = field(init=False, default=None)
    level: Tensor | None = field(init=False, default=None)
    spacing: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        changed = sorted(self.gates.changed & self.gradient.keys())
        if changed:
            raise NotImplementedError(
                f"model: its forward changes the parameter {changed[0]!r}, in which it has a gradient (as an embedding "
                "with max_norm does): a forward with another value of it would change that, too. Use "
                'method="double_backprop", or change parameters outside of the forward'
            )
        if self.gates.hook is not None:
            raise NotImplementedError(
                f"model: the hook {self.gates.hook} changes a gradient within the model. What it gives is not the "
                "derivative of the loss, and differences of it are not the derivative of its norm. Use "
                'method="double_backprop", or hooks on parameters, which act on the whole gradient'
            )
        self.parameters: dict[str, Tensor] = dict(self.model.named_parameters())
        self.device = next(iter(self.parameters.values())).device
        self.norm = self._norm(self.direction)
        whole = self.settings.wrt == "parameters" and len(self.direction) == len(self.gradient)
        self.size = self._size(whole)
        self.autocast = self.gates.without_autocast if self.gates.full_precision else autocast_of(self.device)

    @property
    def value(self) -> Tensor:
        """R."""
        return (self.norm * (math.sqrt(self.factor) / self.scale)).square()

    def add_to(self, out: dict[str, Tensor], weight: float | Tensor) -> Tensor:
        """out += weight·scale·∇R, in place, for the parameters in ``gradient``.

        ``out`` may be ``gradient`` itself with a forward difference, which reads each of its tensors once. Where the
        loss at θ + ρd is not finite, a shorter step is taken; where none gives a finite one, nothing is added.
        Returns the relative change of the gradient that the step caused; NaN where there was nothing to change.
        """
        found = self._at_finite_loss()
        if found is None:
            return torch.full_like(self.norm, math.nan)
        rho, loss, leaves = found
        del found
        scale = weight * self.coefficient(rho)
        squared = self._accumulate(out, loss, leaves, scale)
        del loss, leaves
        if self.settings.difference == "central":
            loss, leaves = self.shifted_loss(-rho)
            if looking_waits(loss) or bool(loss.isfinite()) or not bool(self.norm.isfinite()):
                self._accumulate(out, loss, leaves, -scale)
            else:  # on one side only: twice the forward difference
                del loss, leaves
                self._accumulate(out, *self.shifted_loss(rho), scale)
        return (squared.sqrt() / self.size).masked_fill(self.norm == 0, math.nan)

    def _at_finite_loss(
        self, weight: Callable[[Tensor], Tensor] | None = None, loss: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]] | None:
        """ρ, and :meth:`shifted_loss` there with the weight that goes with it; None where no step is short enough.

        A guard such as ``clamp(min=eps).log()`` stays on its side when its gates are replayed; what it guards may then
        leave its domain. On a GPU the host would wait for a look: see :meth:`_accumulate`.
        """
        start = rho = self.rho()
        for _ in range(_TRIES):
            total, leaves = self.shifted_loss(rho, None if weight is None else weight(rho), loss)
            shorter = self._shortening(total)
            if shorter == 1.0:
                return rho, total, leaves
            self.shorter *= shorter
            rho = self.rho()
            del total, leaves
        warnings.warn(
            f"step: the loss at θ + ρd is not finite for ρ from {float(start):.1e} to {float(rho):.1e}: this step has "
            "no penalty. A guard (clamp, relu(x) + eps) before log, sqrt or a power leaves its domain "
            'there; fastfisher takes it whole with method="double_backprop"',
            AccuracyWarning,
            stacklevel=2,
        )
        return None

    def _shortening(self, loss: Tensor) -> float:
        """What the step has to be multiplied by: 1 where it is short enough, or where nobody can look without waiting.

        The logits of a default step may move by :data:`REACH` in the root mean square, or the difference is no longer
        linear in the step: the curvature of a softmax changes over a distance of 1.
        """
        if looking_waits(loss) or not bool(self.norm.isfinite()):  # then no loss there would be finite
            return 1.0
        if not bool(loss.isfinite()):
            return 0.1
        if self.moved is not None and float(self.moved) > REACH[self.settings.difference]:
            return 0.8 * REACH[self.settings.difference] / float(self.moved)
        return 1.0

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
        found = self._at_finite_loss(lambda rho: weight * self.coefficient(rho), loss)
        if found is None:
            combined, leaves = self.shifted_loss(None, torch.zeros_like(self.norm), loss)
        else:
            rho, combined, leaves = found
        with self.gates.arithmetic():
            total = dict(zip(leaves, self._gradients_of(combined, leaves), strict=True))
        if found is not None:
            coefficient = weight * self.coefficient(rho)
            add_([total[name] for name in self.gradient], -coefficient, list(self.gradient.values()))
        return total

    @staticmethod
    def _gradients_of(loss: Tensor, leaves: dict[str, Tensor]) -> Sequence[Tensor]:
        found = dense(torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True))
        return [g for g in found if g is not None]

    def coefficient(self, rho: Tensor) -> Tensor:
        """scale·∇R = coefficient·(the difference of the gradients of scaled losses)."""
        sides = 2.0 if self.settings.difference == "forward" else 1.0
        return self.norm * (sides * self.factor / self.scale) / rho

    def rho(self) -> Tensor:
        """The length of the step: as given, or the default for the gates and the precision."""
        step = self.settings.step
        if isinstance(step, AdaptiveStep):
            return step.current(self._shifted_norm, self.device) * self.shorter
        if step == "auto":
            step = FROZEN_STEP[self.precision][self.settings.difference]
            if self.settings.wrt == "inputs":
                return self._inputs_step * (self.shorter * step)
        return torch.full((), self.shorter * float(step), dtype=torch.float64, device=self.device)

    def shifted_loss(
        self, rho: Tensor | None, weight: Tensor | None = None, loss: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """scale·(weight·(mean loss at the labels) + loss(logits)) at θ + ρd (or shifted inputs); its leaves by name.

        At θ itself where ``rho`` is None.
        """
        length = None if rho is None else self.length(rho)
        inputs = self.shifted_inputs(length)
        parameters = {name: p.detach() for name, p in self.parameters.items()}
        if self.settings.wrt == "parameters" and length is not None:
            moved = plus([parameters[name] for name in self.direction], length, list(self.direction.values()))
            parameters.update(zip(self.direction, moved, strict=True))
        # What required a gradient at θ does here: that is how the gates tell what moves.
        parameters = {n: p.detach().requires_grad_(self.parameters[n].requires_grad) for n, p in parameters.items()}
        leaves = {name: parameters[name] for name in self.gradient}
        buffers = self.gates.buffers
        return self.loss_of(lambda: call_copy(self.model, parameters, inputs, buffers), weight, loss), leaves

    def length(self, rho: Tensor) -> Tensor:
        """What the direction is multiplied by to have length ρ."""
        return (rho / self.norm).masked_fill(self.norm == 0, 0.0)

    def shifted_inputs(self, length: Tensor | None) -> Any:
        """The inputs of the shifted forward."""
        if self.settings.wrt == "parameters":
            return self.inputs
        position = iter(range(len(input_tensors(self.inputs))))

        def shift(x: Tensor) -> Tensor:
            direction = self.direction.get(str(next(position)))
            x = (
                x.detach()
                if direction is None or length is None
                else torch.addcmul(x.detach(), direction, length.to(x.dtype))
            )
            return x.requires_grad_(x.is_floating_point())

        return map_inputs(self.inputs, shift)

    def loss_of(
        self, forward: Callable[[], Tensor], weight: Tensor | None, loss: Callable[[Tensor], Tensor] | None
    ) -> Tensor:
        """The value of :meth:`shifted_loss`, from the forward at the shifted point."""
        with torch.enable_grad(), self.autocast():
            free = nullcontext() if self.gates.frozen else fused_forward(self.model)
            with self.gates.replay(), free:
                logits = forward()
            self.moved = self._movement(logits.detach())
            total = cross_entropy(logits[:1] if self.first_only else logits, self.labels)
            self.level, self.spacing = total.detach(), torch.finfo(_real_dtype(logits.dtype)).eps
            if self.share != 1.0:
                total = self.share * total
            if weight is not None:
                total = weight.to(total.dtype) * total
            if loss is not None:
                total = total + loss(logits)
            return scaled(total, self.scale)

    def _accumulate(self, out: dict[str, Tensor], loss: Tensor, leaves: dict[str, Tensor], scale: Tensor) -> Tensor:
        """out += scale·(the gradient of the shifted ``loss`` − ∇ℓ(θ)); returns the squared norm of the difference.

        A large parameter's difference is added as soon as the backward has made it, so that the shifted gradient never
        exists as a whole: one copy of the parameters less at the peak. The small ones are added in one call.

        Raises:
            ValueError: the gradient is not finite although the loss is (on a CPU, where that is seen at once).
        """
        squares: list[Tensor] = []
        waits, level = looking_waits(loss), loss.detach()
        if waits:  # nobody looked at the loss: a step that left its domain counts as one that changed nothing
            scale = scale * (level - level == 0)

        # Neither function may hold `leaves`: the leaves hold the hooks, and would live on until the next collection.
        def add(named: dict[str, Tensor]) -> None:
            gradients = []
            for leaf in named.values():  # with free gates the shifted forward may not need a parameter
                grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
                gradients.append(grad.to_dense() if grad.is_sparse else grad)
                leaf.grad = None
            if named:
                there, here = [real(g) for g in gradients], [real(self.gradient[n]) for n in named]
                squares.append(ops.axpy_diff([real(out[n]) for n in named], there, here, scale))

        made: set[str] = set()

        def add_at_once(name: str, leaf: Tensor) -> None:
            made.add(name)
            add({name: leaf})

        for name, leaf in leaves.items():
            if leaf.numel() >= _LARGE:
                leaf.register_post_accumulate_grad_hook(functools.partial(add_at_once, name))  # type: ignore[no-untyped-call]
        if leaves:  # and nothing else: the caller's inputs may require a gradient, too
            with self.gates.arithmetic():
                loss.backward(inputs=list(leaves.values()))  # type: ignore[no-untyped-call]
        add({name: leaf for name, leaf in leaves.items() if name not in made})
        squared = torch.stack(squares).sum() if squares else torch.zeros_like(self.norm)
        if not waits and not squared.isfinite() and self.size.isfinite():
            raise ValueError(
                f"step: the gradient at θ + ρd is not finite with ρ = {float(self.rho()):.1e}, although the loss is; "
                'take a shorter step, or method="double_backprop"'
            )
        return squared

    def judge(self, relative_change: Tensor) -> None:
        """Warns where the step was too short to measure anything, or caused what is no curvature; the host waits."""
        change, step = float(relative_change), self.settings.step
        if not isinstance(step, AdaptiveStep) and not self.settings.frozen and change < 0.05:
            rho = float(self.rho())
            warnings.warn(
                f"step: with free gates a step of {rho:.1e} changed the gradient by only {change:.1e} of its norm; so "
                'short a step measures the noise of single kinks and can destroy training. Use step="auto", or '
                'gates="frozen", which is right for short steps.',
                AccuracyWarning,
                stacklevel=2,
            )
        floor = min(0.1, 50 * torch.finfo(self.precision).eps)
        if change < floor:
            warnings.warn(
                f"step: {float(self.rho()):.1e} changed the gradient by {change:.1e} of its norm, less than "
                f"{floor:.0e}, where the rounding of {self.precision} shows; use a longer step or a higher precision",
                AccuracyWarning,
                stacklevel=2,
            )
        elif (
            self.level is not None
            and isinstance(self.labels, Tensor)
            and change * float(self.level) < FITTED * self.spacing
        ):
            warnings.warn(
                f"step: {float(self.rho()):.1e} changed the gradient by {change:.1e} of its norm, which the rounding "
                f"of the softmax hides: the loss is {float(self.level):.1e}, and the gradient 1 - p of a fitted "
                "example moves in steps of that rounding. The data are fitted; use float64, or fastfisher.penalty with "
                'method="double_backprop"',
                AccuracyWarning,
                stacklevel=2,
            )
        if self.settings.frozen and step == "auto" and change > CEILING:
            warnings.warn(
                f"step: {float(self.rho()):.1e} changed the gradient by {change:.1e} of its norm. So short a step with "
                "frozen gates changes it little, unless the gradient almost vanishes: the model may have kinks that "
                'cannot be replayed. fastfisher.penalty with method="double_backprop" is exact',
                AccuracyWarning,
                stacklevel=2,
            )

    @functools.cached_property
    def precision(self) -> torch.dtype:
        """The coarsest dtype that the forward at θ computed in."""
        met = [self.gates.precision] if self.gates.precision is not None else []
        if not met:  # with free gates nothing was recorded
            met = [p.dtype for p in self.parameters.values()]
            with self.autocast():
                met += [dtype for dtype in (autocast_dtype(self.device.type), self.gates.autocast) if dtype is not None]
        found = coarsest(_real_dtype(dtype) for dtype in met)
        lower = lower_precision(self.device) if found == torch.float32 else None
        return found if lower is None else lower

    def _movement(self, logits: Tensor) -> Tensor | None:
        """See ``moved``; None where it would have to be waited for."""
        automatic = self.expected is not None and self.settings.step == "auto" and self.settings.frozen
        if not automatic or looking_waits(logits):
            return None
        assert self.expected is not None
        rows = max(1, _SAMPLE // max(1, logits[0].numel()))
        away = logits[:rows].double() - self.expected[:rows].double()
        return torch.where(away.isfinite(), away, 0.0).square().mean().sqrt()

    @functools.cached_property
    def _inputs_step(self) -> Tensor:
        """What the default step is multiplied by for inputs; where all are 0 each example has the size 1."""
        size = self._shifted_norm()
        return torch.where(size > 0, INPUTS_STEP * size, math.sqrt(self.factor))

    def _shifted_norm(self) -> Tensor:
        named = self.parameters
        if self.settings.wrt == "inputs":
            named = {str(i): x for i, x in enumerate(input_tensors(self.inputs))}
        return self._norm({name: named[name].detach() for name in self.direction})

    def verify(self) -> None:
        """Checks what each step relies on, once for a kind of batch and of step; see :meth:`check_repeatable` and
        :meth:`check_straight`."""
        settings = self.settings
        step = "adaptive" if isinstance(settings.step, AdaptiveStep) else settings.step
        how = settings.frozen, settings.difference, settings.wrt, step, self.gates.full_precision
        if not is_new_kind(self.model, self.inputs, *how):
            return
        self.check_repeatable()
        if self.settings.frozen and not isinstance(self.settings.step, AdaptiveStep):
            self.check_straight()

    def check_straight(self) -> None:
        """Warns where half of the step gives another ∇R: kinks that were not replayed, a curvature that changes over
        the step, or rounding. The two are compared by their products with a few random vectors, which takes no memory.
        """
        found = self._at_finite_loss()
        if found is None:
            return
        rho, ahead = found[0], found[1].detach().double()
        del found
        self._check_derivative(rho, ahead)
        whole, half = self._sketch(rho), self._sketch(0.5 * rho)
        size = torch.linalg.vector_norm(whole)
        some = (size != 0) & self.norm.isfinite()  # a gradient that is not finite has nothing that is next to it
        away = torch.where(some, torch.linalg.vector_norm(2 * half - whole) / size, 0.0)

        def look(bend: float) -> None:
            if not bend <= STRAIGHT:  # or it is not finite on one side
                warnings.warn(
                    f"step: half of the step {float(rho):.1e} gives a gradient of R that differs by about "
                    f"{100 * bend:.0f} %, so that neither can be trusted. The model may have kinks that cannot be "
                    "replayed, or curve within the step (log, sqrt or a power next to 0), or its rounding shows: try a "
                    'shorter step or a longer one, float64, or fastfisher.penalty with method="double_backprop"',
                    AccuracyWarning,
                    stacklevel=2,
                )

        look_at(self.model, away, look)

    def _check_derivative(self, rho: Tensor, ahead: Tensor) -> None:
        """Warns where the gradient is not the derivative of the loss, so that its differences are no second derivative:
        a custom ``autograd.Function`` whose backward is not that of its forward (a reversed gradient). The loss at both
        ends of the step (``ahead`` at θ + ρd) says how fast it really changes; rounding of the logits is allowed for.
        """
        assert self.expected is not None
        by = self.direction if self.settings.wrt == "inputs" else self.gradient
        products = [(real(d).double() * real(by[n]).double()).sum() for n, d in self.direction.items() if n in by]
        slope = torch.stack(products).sum() / torch.where(self.norm > 0, self.norm, math.nan)
        speed = (ahead - self.shifted_loss(-rho)[0].detach().double()) / (2 * rho)
        rounding = 32 * torch.finfo(self.precision).eps * self.expected.abs().amax().double() * self.scale / rho
        away = (speed / slope - 1).abs() - (rounding / slope).abs()

        def look(away: float) -> None:
            if away > DERIVATIVE:
                warnings.warn(
                    f"model: along its gradient the loss changes by {100 * away:.0f} % more or less than the gradient "
                    "says, so that differences of it are no second derivative: an autograd.Function within the model "
                    "may have a backward that is not the derivative of its forward (a reversed or straight-through "
                    'gradient). Use method="double_backprop"',
                    AccuracyWarning,
                    stacklevel=2,
                )

        look_at(self.model, away, look)

    def _logits_at(self, rho: Tensor | None) -> Tensor:
        """The logits at θ + ρd, detached."""
        found: list[Tensor] = []

        def keep(logits: Tensor) -> Tensor:
            found.append(logits.detach())
            return logits.sum()

        self.shifted_loss(rho, None, keep)
        return found[0]

    def _sketch(self, rho: Tensor) -> Tensor:
        """The products of the difference of gradients over ρ with random vectors, float64."""

        def products(gradients: Sequence[Tensor]) -> Tensor:
            flat = [real(g).contiguous() for g in gradients]
            key = torch.zeros(2, dtype=torch.int64, device=self.device)
            return torch.stack([ops.probe_dot(flat, key + i, "rademacher") for i in range(_PROBES)])

        def there(rho: Tensor) -> Tensor:
            loss, leaves = self.shifted_loss(rho)
            with self.gates.arithmetic():
                return products(self._gradients_of(loss, leaves))

        if self.settings.difference == "central":
            return (there(rho) - there(-rho)) / 2
        return there(rho) - products(list(self.gradient.values()))

    def check_repeatable(self) -> None:
        """Refuses a model whose forward cannot be repeated: a step of length 0 has to give the ``expected`` logits.

        Raises:
            ValueError: it does not; the module that differs first is named.
        """

        assert self.expected is not None
        check_repeatable(self.model, lambda: self._logits_at(None), self.expected, self.precision)

    def _norm(self, named: dict[str, Tensor]) -> Tensor:
        """‖named‖, of tensors as in ``direction``."""
        return _norm(named, self.device, self.total)

    def _size(self, whole: bool) -> Tensor:
        """‖gradient‖, of which ``direction`` is the ``whole`` where no other process has a share."""
        return self.norm if whole and self.share == 1.0 else _norm(self.gradient, self.device)


def _real_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype


# ---- the gradient at θ -----------------------------------------------------------------------------------------------


Differentiate = Callable[[Tensor, Sequence[Tensor], bool], Sequence[Tensor | None]]
"""(loss, sources, retain_graph) ↦ ∂loss/∂source, None where a source is not used."""


def dense(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients, those of sparse embeddings with all their rows."""
    return [g.to_dense() if g is not None and g.is_sparse else g for g in gradients]


def autograd_gradients(loss: Tensor, sources: Sequence[Tensor], retain_graph: bool) -> Sequence[Tensor | None]:
    """∂loss/∂source for each source, None where it is not used; without what hooks on the sources make of it.

    Raises:
        NotImplementedError: the forward has a checkpoint with ``use_reentrant=True``.
    """
    try:
        with unhooked(sources):
            return torch.autograd.grad(loss, sources, retain_graph=retain_graph, allow_unused=True)
    except RuntimeError as error:
        if "use_reentrant" in str(error):
            raise NotImplementedError(REENTRANT) from error
        raise


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
    found = dense(differentiate(loss, sources, retain_graph))
    gradient = {n: g for n, g in zip(trainable, found[: len(trainable)], strict=True) if g is not None}
    if settings.wrt == "inputs":
        by_input = zip(wanted, found[len(trainable) :], strict=True)
        return gradient, {name: g for name, g in by_input if g is not None}
    return gradient, {name: g for name, g in gradient.items() if name in chosen}


IN_FULL_PRECISION = (
    "under autocast in {} the two gradients of the finite difference are taken in the precision of the parameters, in "
    "forwards of their own, because rounding would hide their difference; step=<a number> keeps the autocast"
)


@contextmanager
def twice_forward(model: nn.Module) -> Iterator[None]:
    """Within, a forward of the model that can be differentiated twice, through our own kernels."""
    with uncompiled(model, 'method="double_backprop"'), fused_forward(model), twice_differentiable():
        yield


class _Penalty(torch.autograd.Function):
    """R as a value whose gradient is taken by finite differences, when and if the backward comes."""

    @staticmethod
    def forward(ctx: Any, difference: FiniteDifference, names: list[str], *parameters: Tensor) -> Tensor:
        ctx.difference, ctx.names = difference, names
        ctx.save_for_backward(*parameters)  # autograd then raises if one was changed in between
        return difference.value.to(_real_dtype(parameters[0].dtype))

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
    verify: bool = True,
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
            regulariser of its own. A :class:`fastfisher.Gates` recorded by ``record_gates`` around the caller's
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
        verify: with finite differences, look once for each kind of batch (shapes, dtypes, modes) whether a step of
            length 0 gives the same logits, and refuse a model that gives others; and whether half of the step gives the
            same gradient, and warn where it does not. Costs four forwards and two backwards, once.
        class_dim: which dimension of the logits holds the classes; by default the last, but where logits have four
            dimensions or more, or targets fit another one, it has to be said.

    Under autocast in bfloat16 or float16 a finite difference with ``step="auto"`` takes its forwards in the precision
    of the parameters: rounding in 8 bits would hide the difference. With a number as ``step`` it keeps the autocast.

    Returns:
        R, a scalar. Differentiable once ("finite_difference") or as often as the model is ("double_backprop").

    Raises:
        ValueError: an argument is none of the above, or targets are missing or do not fit; the argument is named.
        TypeError: the model, the inputs or the data are of a type that cannot be one.
    """
    if isinstance(labels, Tensor):
        labels = differentiable(labels)
    settings = Settings(labels, method, gates, wrt, reduction, step, difference)
    model = whole(model, "R (FisherPenalty has that of the batch of all)")
    check_flags(verify=verify)
    check_class_dim(class_dim)
    trainable = trainable_parameters(model)
    chosen = chosen_names(trainable, params)
    inputs, targets = paired(model, inputs, targets, class_dim)
    inputs = map_inputs(inputs, differentiable)
    targets = differentiable(targets) if isinstance(targets, Tensor) else targets
    check_targets(labels, targets)
    check_examples(inputs)
    if logits is not None and not (isinstance(logits, Tensor) and logits.dim() > 0):
        raise ValueError("logits: expected those of a forward, (..., C)")
    finite = method == "finite_difference"

    full = finite and step == "auto" and settings.frozen
    if logits is not None and isinstance(gates, Gates) and full and gates.autocast is not None:
        warn_slow_path(f"penalty runs the forward again: {IN_FULL_PRECISION.format(gates.autocast)}")
        logits, gates = None, "frozen"
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
        with ExitStack() as stack:
            if finite:
                recorded = stack.enter_context(record_gates(model, frozen=settings.frozen, full_precision=full))
            else:
                stack.enter_context(twice_forward(model))
            stack.enter_context(torch.enable_grad())
            logits = call_copy(model, trainable, inputs)
    if targets is not None:
        targets = fit(logits, targets, class_dim=class_dim, model=model)
        check_counted(targets[:1] if first_only else targets)
    if isinstance(labels, Tensor):
        labels = fit(logits, labels, class_dim=class_dim, name="labels", model=model)
        check_counted(labels[:1] if first_only else labels, "labels")
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
        with unhooked(sources), second_derivatives('method="finite_difference"'):
            found = differentiable_gradients(loss, sources)
        squares = [real(g).square().sum() for g in found if g is not None]
        return factor * torch.stack(squares).sum() if squares else loss.detach() * 0

    assert isinstance(recorded, Gates)
    recorded.end_at(logits)
    with recorded.arithmetic():
        gradient, direction = gradient_at(loss, trainable, inputs, settings, chosen, retain_graph=shared)
    shift = FiniteDifference(model, inputs, first_only, settings, recorded, chosen_labels, gradient, direction, factor)
    shift.expected = logits.detach()
    names = list(gradient)
    if not names:
        return loss.detach() * 0
    if verify:
        shift.verify()
    return _Penalty.apply(shift, names, *(trainable[name] for name in names))  # type: ignore[no-any-return, no-untyped-call]
