"""The penalty of the gradient of a loss of one's own, in parameters or inputs, in a training loop."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fastfisher.checks import check_callable
from fastfisher.data import paired
from fastfisher.distributed.messages import TIMEOUT
from fastfisher.inputs import Inputs, LoopCall, check_examples, differentiable, map_inputs
from fastfisher.likelihoods.subject import subject_of
from fastfisher.outputs import Losses, OwnLossFunction
from fastfisher.penalise.norm import OfNorm
from fastfisher.penalise.options import EACH, Method, Options, Settings
from fastfisher.penalise.point import Point
from fastfisher.penalise.rho import Difference, Step
from fastfisher.penalise.shift import Gradients
from fastfisher.penalise.training import TrainingPenalty

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

STEP = "step(closure), whose batch is the loop's"
TERM = "term(inputs, targets), which adds to a loss of the loop"


class GradientPenalty(TrainingPenalty):
    """Fills ``.grad`` with the gradient of L + α·R, R = φ(‖∇L‖) of a loss L of your own.

    In the parameters, R = φ(‖∇_θ L‖): with φ(n) = n² the gradient penalty GP and the implicit regulariser of gradient
    descent (Barrett & Dherin, 2021), with ``of="norm"`` the first-order form of sharpness-aware minimisation. In the
    inputs, R = (1/B) Σ_i φ(‖∂ℓ_i/∂x_i‖): double backpropagation (Drucker & LeCun, 1992), R1 (φ(n) = n²) and, with
    ``of=lambda n: (n - 1) ** 2``, WGAN-GP. :class:`fastfisher.FisherPenalty` is the case whose labels are drawn.

    Finite differences of gradients with frozen gates take no second derivative, so that they go through fused attention
    and compiled layers: two forwards and two backwards a step, 2.0 plain steps, since L is trained and penalised.

    Example:
        >>> penalty = fastfisher.GradientPenalty(model, F.mse_loss, alpha=0.01)
        >>> for inputs, targets in loader:
        ...     optimizer.zero_grad()
        ...     loss = penalty.backward(inputs, targets)
        ...     optimizer.step()

    A loop that makes its loss itself, by any calls of the model, gives it as a function without arguments to
    :meth:`step`. Where another loss is trained than the one whose gradient is penalised, as in a GAN, :meth:`term` adds
    the penalty to it.

    Args:
        model: any module, with anything as its output.
        loss: L of (what the model returns, targets): a scalar, the mean over the examples it gets; or one value for
            each example, (B,), of which the mean is taken. The latter is needed with ``wrt="inputs"`` and ``examples``.
            None where only :meth:`step` is called.
        alpha: the coefficient α ≥ 0.
        wrt: what the gradient is taken with respect to.
        of: φ: "squared_norm", "norm", or a function of a tensor of norms, element by element.
        every, start, method, gates, step, difference, mixed: as in :class:`fastfisher.FisherPenalty`.
        examples: take R on the first so many examples, with the coefficient α·examples/B, as there: what the noise of
            the gradient has in R is the same then, and what its mean has is less.
        params, graphs, scaler, scope, process_group, timeout, verify: as there.

    Attributes:
        value: R at the last recomputation, a float64 scalar tensor; None before.
        steps: how many steps were taken.

    Raises:
        ValueError: an argument is out of range or does not go with another; it is named.
        TypeError: ``model`` is no module.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: OwnLossFunction | None,
        alpha: float,
        *,
        wrt: Literal["parameters", "inputs"] = "parameters",
        of: Literal["squared_norm", "norm"] | Callable[[Tensor], Tensor] = "squared_norm",
        every: int = 1,
        start: int = 0,
        method: Method = "finite_difference",
        gates: Literal["frozen", "free"] = "frozen",
        step: Step = "auto",
        difference: Difference = "forward",
        mixed: bool = False,
        examples: int | None = None,
        params: Iterable[Tensor] | None = None,
        graphs: bool = False,
        scaler: torch.amp.GradScaler | None = None,
        scope: Literal["global", "local"] = "global",
        process_group: ProcessGroup | None = None,
        timeout: float = TIMEOUT,
        verify: bool = True,
    ) -> None:
        check_callable("loss", loss)
        each = EACH if wrt == "inputs" or examples is not None else None
        subject = subject_of(loss=loss or _loss_of_loop, each=each)
        settings = Settings("true", method, gates, wrt, "batch", step, difference, subject, OfNorm(of))
        options = Options(settings, alpha, every, start, mixed, examples, None, None, graphs, scaler, scope, verify)
        self.penalised = loss
        super().__init__(model, options, params, process_group, timeout)

    def step(self, closure: Callable[[], Tensor], *, weight: float = 1.0) -> Tensor:
        """:meth:`backward` of the loss that ``closure()`` returns, by whatever calls of the model.

        Called twice where R is recomputed, the second time with other parameters in the model, and once where it is
        not; with ``verify`` four times more for the first time. Random numbers of torch's default generators are the
        same each time, and whatever else it does has to be, too: draw the batch outside of it.

        Several processes: each gives the loss of its own part, and L is their mean, whatever the parts' sizes. The
        closure calls ``penalty.model``, the module within ``DistributedDataParallel``: no other reduction may follow.

        Example:
            >>> penalty = fastfisher.GradientPenalty(policy, None, alpha=0.01)
            >>> penalty.step(lambda: -(advantage * log_prob(policy(states), actions)).mean())

        Args:
            closure: returns the loss, a scalar that depends on the model's parameters; it calls no ``backward``.
            weight: as in :meth:`backward`.

        Returns:
            The loss, a detached scalar.

        Raises:
            ValueError: the options need a batch that can be taken apart (``wrt="inputs"``, ``examples``), or graphs,
                whose forward is not the loop's; or the loss is no such scalar.
            RankFailure: another process raised.
        """
        if not callable(closure):
            raise ValueError(f"closure: expected a function that returns the loss, got {type(closure).__name__}")
        self._refuse(STEP, "wrt", "examples", "graphs")

        def function() -> Tensor:
            with _calling_no_backward(self.model):
                return closure()

        call = LoopCall((), {}, Losses(_loss_of_loop), function=function)
        return self._take(lambda trainable: (call, None), weight)

    def backward(self, inputs: Inputs, targets: Any = None, *, weight: float = 1.0) -> Tensor:
        """One forward and the gradients: adds weight·∇(L + α·R) to ``.grad``, as ``Tensor.backward`` would.

        If anything raises on the way, the step has not been: see :meth:`fastfisher.FisherPenalty.backward`.

        Args:
            inputs: a tensor, a tuple or list (positional arguments) or a mapping (keyword arguments), batch first; see
                docs/data.md.
            targets: whatever the loss takes.
            weight: what the gradient is multiplied by: 1/k for each of k micro-batches that accumulate in ``.grad``.

        Returns:
            L without the penalty and without the weight, a detached scalar.

        Raises:
            ValueError, TypeError, RankFailure: as there; and where the penalty was made without a loss.
        """
        self._check_loss("backward(inputs, targets)")
        return super().backward(inputs, targets, weight=weight)

    def term(self, inputs: Inputs, targets: Any = None) -> Tensor:
        """A term for another loss: its value is 0, its gradient that of α·R at these inputs. Counts as a step.

        By a forward of its own, at two plain steps where R is recomputed. Several processes: as in
        :meth:`fastfisher.FisherPenalty.term`.

        Example:
            >>> gp = fastfisher.GradientPenalty(critic, lambda score, _: score[:, 0], 10.0, wrt="inputs", of=one_sided)
            >>> (critic(fake).mean() - critic(real).mean() + gp.term(mixed)).backward()

        Raises:
            ValueError: the penalty was made without a loss, or with ``scaler``, ``graphs``, ``examples`` or ``mixed``.
            RankFailure: another process raised.
        """
        self._check_loss("term(inputs, targets)")
        self._refuse(TERM, "mixed", "examples", "graphs", "scaler")

        def point_at(trainable: Gradients) -> Point:
            call, _ = paired(self.model, inputs, targets, self.settings.subject.reading)
            call = map_inputs(call, differentiable)
            check_examples(call)
            return self._steps.own_point(call, trainable)

        return self._term(point_at, None)

    def _refuse(self, why: str, *names: str) -> None:
        """Raises ValueError where an option of one of these names needs another way."""
        options = self._options
        asked = {
            "wrt": not self.settings.of_parameters,
            "mixed": options.mixed,
            "examples": options.examples is not None,
            "graphs": options.graphs,
            "scaler": options.scaler is not None,
        }
        for name in names:
            if asked[name]:
                raise ValueError(f"{name}: not with {why}; use backward(inputs, targets)")

    def _check_loss(self, name: str) -> None:
        if self.penalised is None:
            raise ValueError(f"loss: expected one for {name}, got None; step(closure) takes that of the loop")


@contextmanager
def _calling_no_backward(model: nn.Module) -> Iterator[None]:
    """Within, a ``backward``, as optimisers want it of closures, is refused by the first parameter that it comes to."""

    def refuse(parameter: Tensor, before: Tensor | None) -> None:
        if before is None:
            parameter.grad = None
        raise ValueError(
            "closure: expected a function that returns the loss and calls no backward, which step() does, got one that "
            "calls it" + ("" if before is None else "; .grad has a part of its gradient, so that it has to be zeroed")
        )

    with ExitStack() as stack:
        with torch._C.DisableTorchFunction():  # no part of a forward that is recorded
            for p in model.parameters():
                if p.requires_grad and p.is_leaf:
                    watch: Any = p.register_post_accumulate_grad_hook
                    stack.callback(watch(functools.partial(refuse, before=p.grad)).remove)
        yield


def _loss_of_loop(output: Any, targets: Any) -> Tensor:
    """The loss that a closure has returned."""
    if not isinstance(output, Tensor) or output.numel() != 1:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"closure: expected a function that returns a scalar loss, got {got}")
    if not output.requires_grad and torch.is_grad_enabled():
        raise ValueError("closure: expected a loss that depends on the parameters, got one that requires no gradient")
    return output
