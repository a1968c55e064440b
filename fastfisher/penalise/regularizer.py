"""FisherPenalty: the penalty inside a training loop, at close to the cost of a plain step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fastfisher import ops
from fastfisher.autocast import autocast_dtype
from fastfisher.checks import check_flags, check_generator, is_count, is_number
from fastfisher.data import check_own_loss, paired
from fastfisher.distributed.ranks import (
    TIMEOUT,
    Doing,
    Share,
    check_alone,
    digest,
    failing_together,
    local_part,
    placed_like,
    precision_below,
    shared_by,
)
from fastfisher.engine.fused.convolution import saving_memory
from fastfisher.engine.gates import Gates, fused_forward, record_gates
from fastfisher.engine.rollback import undone_on_error
from fastfisher.engine.twice import differentiable_gradients, second_derivatives
from fastfisher.labels import (
    IGNORED,
    are_drawn,
    averaged_rows,
    check_certain,
    check_classes,
    check_counted,
    check_targets,
    counted_rows,
    cross_entropy,
    fit,
    label_loss,
    looking_waits,
    new_key,
)
from fastfisher.lists import add_, zeros
from fastfisher.model import (
    Call,
    Inputs,
    as_given,
    call_copy,
    call_model,
    check_class_dim,
    check_examples,
    check_heads,
    chosen_names,
    class_last,
    copy_buffers,
    count_examples,
    couples_examples,
    differentiable,
    input_tensors,
    logits_of,
    map_inputs,
    requiring_grad,
    take_rows,
    taking_gradients,
    trainable_parameters,
    unhooked,
)
from fastfisher.penalise.function import (
    IN_FULL_PRECISION,
    AdaptiveStep,
    Difference,
    Differentiate,
    FiniteDifference,
    Method,
    Settings,
    Step,
    autograd_gradients,
    dense,
    gradient_at,
    real,
    scaled,
    twice_forward,
)
from fastfisher.penalise.graphs import CapturedSteps, CudaCapture, places
from fastfisher.slow_path import warn_slow_path

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Gradients = dict[str, Tensor]

_NO_KEY = [0, -1]
_NO_ROWS = -1
"""What a state holds before the first penalty: of the same types as later, for torch.distributed.checkpoint."""


@dataclass
class _Outcome:
    """What one step computes: the training loss and its logits, the gradient for the optimiser, and of a step that
    recomputes the penalty R, the rows of logits it is the mean over, and R's gradient where it is to be reused."""

    loss: Tensor
    logits: Tensor
    total: Gradients
    value: Tensor | None = None
    rows: int | Tensor | None = None
    reused: Gradients | None = None

    @property
    def finite(self) -> bool:
        """Whether R and the gradients are: that for the optimiser, and that for reuse. The host waits for them."""
        kept = [] if self.value is None else [self.value]
        kept += [
            ops.sum_squares([real(g.coalesce().values() if g.is_sparse else g) for g in gradients.values()])
            for gradients in (self.total, self.reused)
            if gradients
        ]
        return all(bool(x.isfinite()) for x in kept)


@dataclass
class _Point:
    """A forward at θ that R is taken of: its logits and inputs, whether only the first row counts, and its gates."""

    logits: Tensor
    inputs: Inputs
    first_only: bool
    gates: Gates

    def __post_init__(self) -> None:
        self.gates.end_at(self.logits)

    @property
    def rows(self) -> Tensor:
        """The logits that count."""
        return self.logits[:1] if self.first_only else self.logits


@dataclass
class WatchedForward:
    """A forward of the caller's that :meth:`FisherPenalty.watching` saw: its arguments, and its logits as they are."""

    inputs: Call | None = None
    logits: Tensor | None = None
    gates: Gates | None = None
    buffers: dict[str, Tensor] | None = None
    calls: int = 0


class _Term(torch.autograd.Function):
    """0, with a given gradient."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], alpha: float, *parameters: Tensor) -> Tensor:
        ctx.gradients, ctx.alpha = gradients, alpha
        return gradients[0].new_zeros(())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        scale = grad * ctx.alpha
        return (None, None, *(g * scale.to(g.dtype) for g in ctx.gradients))


class FisherPenalty:
    """Fills ``.grad`` with the gradient of loss + α·R, R = ‖(1/B) Σ_i ∇_θ ℓ(x_i, ŷ_i)‖² (eq. 3 and 5 of the paper).

    Example:
        >>> penalty = fastfisher.FisherPenalty(model, alpha=0.1)
        >>> for inputs, targets in loader:
        ...     optimizer.zero_grad()
        ...     loss = penalty.backward(inputs, targets)  # instead of loss.backward()
        ...     optimizer.step()

    The optimiser, scheduler, clipping and checkpoints stay the caller's: this object only makes gradients. The forward
    of the training loss is shared with the penalty, R's gradient is recomputed every ``every`` steps and reused in
    between (eq. 5). With finite differences a recomputing step costs two forwards and three backwards (2.67 plain
    steps), with ``mixed=True`` or true labels two and two (2.0).

    Args:
        model: any module from inputs to logits (..., C), or to an object with ``.logits``. Positions whose target is
            −100 (padding) have no part in loss or R; R is of the mean over the others. Of a model that
            ``torch.compile`` compiled, the steps that recompute R with frozen gates or by double backprop run
            uncompiled, with a :class:`SlowPathWarning`; all others, and free gates, compiled.
        alpha: the coefficient α ≥ 0.
        every: recompute the penalty's gradient every this many steps.
        start: the first step (counted from 0) with the penalty; plain steps before (figure 3).
        labels, wrt, method, gates, reduction, step, difference, params: as in :func:`fastfisher.penalty`.
            ``step="auto"`` with free gates keeps an :class:`AdaptiveStep` over the steps.
        mixed: take the training gradient at θ + ρd too, in the same backward: one backward fewer, at a bias of ρ H d in
            the training gradient (tiny at the default step of frozen gates). Needs ``every=1`` and
            "finite_difference", with a "forward" difference.
        examples: take R on the first so many examples, with the coefficient α·examples/B, which keeps the expected
            penalty (Tr(F)/B) and lowers the cost. None: on all.
        graphs: capture the steps as CUDA graphs once each kind has come three times (see :mod:`.graphs`), and
            launch them by replay. Values of tensors may change from step to step, and what is hashed with a captured
            step: shapes, dtypes, train and eval mode, ``alpha``, which parameters require a gradient, and where
            parameters and buffers are in memory. Anything else that the model's Python code decides stays as it was at
            the capture. A forward that reads a value, or puts another tensor in the place of a buffer, is refused.
            ``.grad`` and ``logits`` are overwritten by the next step. Dropout repeats its masks; of other random
            functions none may be met.
        scaler: the ``torch.amp.GradScaler`` of the loop, for autocast in float16: gradients are taken of scaled losses,
            and ``.grad`` is left scaled, as ``scaler.scale(loss).backward()`` leaves it. Unscale, clip, step and update
            are the caller's as ever. A recomputing step that overflowed is not kept: ``value`` and what is reused stay
            as they were, and the step does not count, so that the next one takes the penalty again.
        loss: the training loss as a callable of (logits, targets), both as they are; mean cross-entropy otherwise. R is
            always taken of the cross-entropy at ``labels``.
        class_dim: which dimension of the logits holds the classes; by default the last, but where logits have four
            dimensions or more, or targets fit another one, it has to be said.
        generator: where the key of the drawn labels comes from, at the first penalty; torch's default generator
            otherwise. Each further penalty advances the key, on the device.
        scope: where several processes share a batch, which gradient is penalised: "global", that of the batch of all
            (the same update as of one process, for any number of them), or "local", of each process its own. See
            docs/distributed.md.
        process_group: the processes that share a batch; by default those of ``DistributedDataParallel`` or
            ``fully_shard``, and none of any other model.
        timeout: seconds that a process waits for the others to get as far as it did.
        verify: with finite differences, look once for each kind of batch (shapes, dtypes, modes) whether a step of
            length 0 gives the same logits, and refuse a model that gives others: one with random numbers that are not
            torch's, or with a state outside of its buffers; and whether half of the step gives the same gradient, and
            warn where it does not. Costs four forwards and two backwards, once; not done with ``fully_shard``.

    Precision. Under autocast in bfloat16 or float16 the difference of two gradients would drown in rounding. With
    ``step="auto"`` and frozen gates R is therefore taken by two forwards and backwards in the precision of the
    parameters, of its own; the training loss keeps the autocast. A recomputing step then costs a plain step and two
    thirds of three in that precision; a number as ``step`` keeps the autocast everywhere.

    Hooks on parameters act as in ``Tensor.backward``: those of ``register_hook`` once, on what is added to ``.grad``;
    those of ``register_post_accumulate_grad_hook`` when ``.grad`` is there.

    Several processes. All of them construct the penalty, around the model that DistributedDataParallel or
    ``fully_shard`` made, and call :meth:`backward` on their parts of the batch; ``.grad`` is then the same on each, and
    no other reduction may follow. With P parameters of s bytes and the weights by rows, a plain step sends one sum of
    P·s bytes, a step that recomputes the penalty two, of P·s and of P·s (``every=1``) or 2P·s; each follows a message
    of 88 bytes per process, and one more comes before the first. ``scope="local"`` sends one sum of P·s in any step.
    ``examples`` counts those of all processes, divided evenly; ``reduction="first"`` takes the first of rank 0.
    ``value`` is that of all, the loss and ``logits`` are each process's own. If a process raises, all others raise a
    :class:`fastfisher.RankFailure` in the same step.

    Attributes:
        value: R at the last recomputation, a float64 scalar tensor; None before.
        logits: the logits of the last training forward, detached; None before.
        steps: how many steps were taken.

    Raises:
        ValueError: an argument is out of range or does not go with another; it is named.
        TypeError: ``model`` is no module.
    """

    def __init__(
        self,
        model: nn.Module,
        alpha: float,
        *,
        every: int = 10,
        start: int = 0,
        labels: Literal["sampled", "true", "uniform", "rademacher"] = "sampled",
        wrt: Literal["parameters", "inputs"] = "parameters",
        reduction: Literal["batch", "first"] = "batch",
        method: Method = "finite_difference",
        gates: Literal["frozen", "free"] = "frozen",
        step: Step = "auto",
        difference: Difference = "forward",
        mixed: bool = False,
        examples: int | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        generator: torch.Generator | None = None,
        params: Iterable[Tensor] | None = None,
        graphs: bool = False,
        scaler: torch.amp.GradScaler | None = None,
        class_dim: int | None = None,
        scope: Literal["global", "local"] = "global",
        process_group: ProcessGroup | None = None,
        timeout: float = TIMEOUT,
        verify: bool = True,
    ) -> None:
        if not (is_number(alpha) and alpha >= 0):
            raise ValueError(f"alpha: expected a finite number >= 0, got {alpha!r}")
        if not is_count(every):
            raise ValueError(f"every: expected an integer >= 1, got {every!r}")
        if not is_count(start, 0):
            raise ValueError(f"start: expected an integer >= 0, got {start!r}")
        check_generator(generator)
        check_flags(mixed=mixed, graphs=graphs, verify=verify)
        check_class_dim(class_dim)
        if not (loss is None or callable(loss)):
            raise ValueError(f"loss: expected a function or None, got {type(loss).__name__}")
        if examples is not None and not is_count(examples):
            raise ValueError(f"examples: expected an integer >= 1 or None, got {examples!r}")
        if isinstance(gates, Gates):
            raise ValueError('gates: expected "frozen" or "free"; FisherPenalty records its own')
        if isinstance(labels, Tensor):
            raise ValueError('labels: expected "sampled", "true", "uniform" or "rademacher", got a tensor')
        if examples is not None and reduction == "first":
            raise ValueError('examples: expected None with reduction="first", which is on one example')
        fits = every == 1 and method == "finite_difference" and difference == "forward" and wrt == "parameters"
        if mixed and gates == "free" and step == "auto":
            raise ValueError('step: expected a number with mixed=True and gates="free", whose step cannot adapt itself')
        if mixed and not (fits and examples is None and reduction == "batch"):
            raise ValueError(
                "mixed: expected every=1, a forward finite difference in the parameters, and the whole batch with "
                f"mixed=True, got every={every}, method={method!r}, difference={difference!r}, wrt={wrt!r}, "
                f"examples={examples}, reduction={reduction!r}"
            )
        if graphs and scaler is not None:
            raise ValueError(
                "scaler: expected None with graphs=True, whose captured steps keep what overflowed; "
                "autocast in bfloat16 needs no scaler"
            )
        if step == "auto" and gates == "free" and method == "finite_difference":
            step = AdaptiveStep()
        self.settings = Settings(labels, method, gates, wrt, reduction, step, difference)
        if scope not in ("global", "local"):
            raise ValueError(f'scope: expected "global" or "local", got {scope!r}')
        shared = shared_by(model, process_group, timeout)
        self.scope, self.ranks, model, self._buffers_follow = scope, shared.ranks, shared.module, shared.buffers_follow
        if self.ranks is not None and self.ranks.sharded:
            self._check_sharded(model)
        if self.ranks is not None and scaler is not None:
            raise ValueError(
                "scaler: expected None where several processes share a batch, of which one alone may overflow; "
                "autocast in bfloat16 needs no scaler"
            )
        if self.ranks is not None and graphs:
            raise ValueError("graphs: expected False where several processes share a batch, whose messages wait")
        self._shared = self.ranks if scope == "global" else None
        self._differentiate: Differentiate = autograd_gradients if self.ranks is None else self.ranks.differentiate
        self.model, self.alpha, self.every, self.start = model, float(alpha), every, start
        self.mixed, self.examples, self.generator = mixed, 1 if reduction == "first" else examples, generator
        self.loss, self.scaler, self.class_dim = loss, scaler, class_dim
        # With parameters in shards, all processes would have to know when one of them looks.
        self._verifies = verify and not (self.ranks is not None and self.ranks.sharded)
        self._sparse: set[int] = set()  # by id: parameters whose gradient autograd makes sparse, as .grad is then too
        self._moving: dict[tuple[bool, ...], bool] = {}  # by the modules' modes: whether a forward moves buffers
        self._met_autocast: torch.dtype | None = None  # within the model, where its caller need not know of it
        self._few = self.examples
        if self._shared is not None and examples is not None:
            if examples < self._shared.size:
                raise ValueError(
                    f"examples: expected at least one for each of {self._shared.size} processes, got {examples}"
                )
            self._few = examples // self._shared.size + (self._shared.rank < examples % self._shared.size)
        self.params = list(params) if isinstance(params, Iterator | list) else params
        sharded = self.ranks is not None and self.ranks.sharded
        chosen_names(
            trainable_parameters(model), self.params, sharded=sharded
        )  # a wrong list is refused now, not at the first step
        self.value: Tensor | None = None
        self.logits: Tensor | None = None
        self.steps = 0
        self._rows: int | Tensor | None = None
        self._reused: Gradients | None = None
        self._all_small: set[tuple[torch.Size, ...]] = set()  # inputs of which a forward makes no large tensor
        self._captured: CapturedSteps[_Outcome] | None = None
        if graphs:
            device = next(iter(trainable_parameters(model).values())).device
            if device.type != "cuda":
                raise ValueError(f"graphs: expected False with a model on {device}; graphs are for CUDA devices")
            self._captured = CapturedSteps(model, CudaCapture(device))
        self._key: Tensor | None = None

    @property
    def trace_estimate(self) -> Tensor | None:
        """B·‖g‖², whose expectation is Tr(F) (eq. 2), exactly: E_ŷ[g_i] = 0 for each example, so cross terms vanish.

        Of logits (B, T, C) it is Tr(F) per position that counts; ``trace_fisher`` sums over an example's positions.

        None before the first penalty, and where R is not of sampled labels and all parameters. Not unbiased with
        BatchNorm in train mode, which couples the examples.
        """
        sampled = (
            self.settings.labels in ("sampled", "rademacher")
            and self.settings.wrt == "parameters"
            and self.params is None
        )
        return self.value * self._rows if sampled and self.value is not None and self._rows is not None else None

    def backward(self, inputs: Inputs, targets: Any = None, *, weight: float = 1.0) -> Tensor:
        """One forward and the gradients: adds weight·∇(loss + α·R) to ``.grad``, as ``Tensor.backward`` would.

        If anything raises on the way, Ctrl-C and a lack of memory included, the step has not been: ``.grad``, the
        buffers, the random generators and this object are as before. (With ``graphs``, a gradient kept for reuse may
        be the new one already.)

        Args:
            inputs: a tensor, a tuple or list (positional arguments) or a mapping (keyword arguments), batch first; see
                docs/data.md.
            targets: as the training loss takes them; class indices or probabilities for cross-entropy. By default the
                ``labels`` in a mapping of inputs. Where ``loss`` is given they may be anything, but for
                ``labels="true"``; class indices of −100 for each row of logits are left out of R all the same.
            weight: what the gradient is multiplied by: 1/k for each of k micro-batches that accumulate in ``.grad``.
                Each counts as a step, and R is that of a micro-batch of B/k examples: k times Tr(F)/B in expectation.

        Returns:
            The training loss without the penalty and without the weight, a detached scalar.

        Raises:
            ValueError: ``weight`` is not positive and finite, or not the same in each process (scope "global"), there
                are no inputs, the targets do not fit, the loss is no scalar, a row of logits has no softmax to draw a
                label from, or without ``loss`` the model returns another head, which would not be trained, or makes
                another loss of the labels in a batch.
            TypeError: the inputs are of a type that cannot be any.
            RankFailure: another process raised.
        """
        with taking_gradients(self.model), undone_on_error(self.model, self.generator), self._undone_on_error():
            with failing_together(self.ranks, lambda: self._doing(weight)):
                if not (is_number(weight) and weight > 0):
                    raise ValueError(f"weight: expected a finite number > 0, got {weight!r}")
                if self.ranks is None:
                    check_alone(self.model)  # it may have got into one since
                else:
                    self.ranks.begin(self.model)
                trainable = trainable_parameters(self.model)
                inputs, targets = self._batch(inputs, targets, len(trainable))
                due = self._due()
                step = functools.partial(self._penalised if due else self._plain, scale=self._scale(weight))
                if self._captured is None:
                    outcome = step(inputs, targets)
                else:
                    outcome = self._replayed((due, weight), step, inputs, targets)
                if self.ranks is not None and self._shared is None:
                    outcome = dataclasses.replace(outcome, total=self.ranks.mean_gradients(trainable, outcome.total))
                if self.ranks is not None and self._buffers_follow:
                    self.ranks.share_buffers(self.model)
            total = _after_hooks(outcome.total, trainable)
            found = {name: g for name in total if (g := trainable[name].grad) is not None}
            with torch.no_grad():
                if found:  # in one call, which adds to all of them or to none
                    torch._foreach_add_(list(found.values()), [total[name] for name in found])
        for name in total.keys() - found:
            trainable[name].grad = total[name]
        for name in total:
            for hook in (trainable[name]._post_accumulate_grad_hooks or {}).values():
                hook(trainable[name])
        self.logits = as_given(outcome.logits, self.class_dim)
        if due and self.scaler is not None and not outcome.finite:  # the scaler waits for the device in any case
            return outcome.loss
        if due:
            self.value, self._rows = outcome.value, outcome.rows
            if outcome.reused is not None:
                self._reused = outcome.reused
        self.steps += 1
        return outcome.loss

    @contextmanager
    def watching(self) -> Iterator[WatchedForward]:
        """Watches the one forward of the model that the caller runs within, for :meth:`term` to share.

        For loops that make the loss themselves, such as those of a framework.

        Example:
            >>> with penalty.watching() as forward:
            ...     loss = F.cross_entropy(model(inputs), targets)
            >>> (loss + penalty.term(forward, targets)).backward()

        Raises:
            ValueError: an option of the penalty needs a forward of its own: ``mixed``, ``examples``, ``graphs``,
                ``loss``, ``wrt="inputs"``, ``scaler``, several processes.
        """
        own = {
            "mixed": self.mixed,
            "examples": self.examples is not None and self.settings.reduction == "batch",
            "graphs": self._captured is not None,
            "loss": self.loss is not None,
            'wrt="inputs"': self.settings.wrt == "inputs",
            "scaler": self.scaler is not None,
            "process_group": self.ranks is not None,
        }
        for name, asked in own.items():
            if asked:
                raise ValueError(f"{name}: not with a forward of the caller's; FisherPenalty.backward runs its own")
        forward, recording = WatchedForward(), ExitStack()

        def before(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            forward.calls += 1
            if forward.calls == 1:
                forward.inputs = Call(args, kwargs, self.class_dim)  # labels too: a decoder starts from them
                if self._due():
                    own = self._in_full_precision()
                    forward.buffers = copy_buffers(model) if own else None
                    forward.gates = None if own else recording.enter_context(self._record_gates())

        def after(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            recording.close()
            forward.logits = logits_of(output, -1)

        hooks = [
            self.model.register_forward_pre_hook(before, with_kwargs=True),
            self.model.register_forward_hook(after, with_kwargs=True),
        ]
        try:
            yield forward
        finally:
            recording.close()
            for hook in hooks:
                hook.remove()

    def term(self, forward: WatchedForward, targets: Tensor | None = None) -> Tensor:
        """A term for the caller's loss: its value is 0, its gradient that of α·R. Counts as a step.

        The loss keeps its value, and whatever scales it (a gradient scaler, accumulation, an average over processes)
        scales the penalty too. R's gradient is taken at once: the graph of the forward must still be there. Where no
        row counts, R is of nothing, and the step has the gradient that was kept, if any.

        Args:
            forward: what :meth:`watching` saw.
            targets: where ``labels="true"``, and where some are −100 (padding).

        Raises:
            ValueError: the model was not called exactly once, or targets are missing.
        """
        if forward.calls != 1 or forward.logits is None or forward.inputs is None:
            raise ValueError(f"forward: expected one finished call of the model, saw {forward.calls}")
        if self._due() and not _none_counts(targets):
            with taking_gradients(self.model), undone_on_error(self.model, self.generator), self._undone_on_error():
                self._reused = self._recomputed(forward, targets)
        self.logits = forward.logits.detach()
        self.steps += 1
        trainable = trainable_parameters(self.model)
        reused = {name: g for name, g in (self._reused or {}).items() if name in trainable}
        if self.every == 1:
            self._reused = None
        if not reused or self.alpha == 0:
            return self.logits.new_zeros(())
        parameters = [trainable[name] for name in reused]
        return _Term.apply(list(reused.values()), self.alpha, *parameters)  # type: ignore[no-any-return, no-untyped-call]

    def _recomputed(self, forward: WatchedForward, targets: Tensor | None) -> Gradients:
        """∇R from a forward whose graph is kept; notes R."""
        assert forward.logits is not None and forward.inputs is not None
        trainable = trainable_parameters(self.model)
        logits = class_last(forward.logits, self.class_dim)
        if targets is not None:
            targets = fit(logits, targets, class_dim=self.class_dim, model=self.model)
        inputs, gates, first_only = forward.inputs, forward.gates, self.settings.reduction == "first"
        shared = gates is not None and not self._learns_of_autocast(gates)
        if gates is not None and shared:
            point = _Point(logits, inputs, first_only, gates)
        else:
            buffers = forward.buffers if gates is None else gates.buffers
            point = self._own_forward(trainable, inputs, first_only, buffers)
        rows, gates = point.rows, point.gates
        true = targets[:1] if first_only and targets is not None else targets
        check_targets(self.settings.labels, true)
        chosen = self._chosen(trainable)
        with torch.enable_grad():
            loss, labels = label_loss(rows, self.settings.labels, true, self._next_key(rows.device))
        if self.settings.method == "double_backprop":
            with second_derivatives('method="finite_difference"'):
                value, squared_norm = self._squared_norm(loss, trainable, inputs, chosen, 1.0, 1.0)
                gradient = self._gradients(squared_norm, trainable, retain_graph=True)
        else:
            with gates.arithmetic():
                at, direction = gradient_at(loss, trainable, inputs, self.settings, chosen, retain_graph=shared)
            shift = FiniteDifference(self.model, inputs, first_only, self.settings, gates, labels, at, direction, 1.0)
            shift.expected = point.logits.detach()
            if self._verifies:
                shift.verify()
            gradient = dict(zip(at, zeros(at.values()), strict=True))
            self._judge(shift, shift.add_to(gradient, 1.0))
            value = shift.value
        self.value, self._rows = value, counted_rows(rows, true)
        return gradient

    def _chosen(self, trainable: dict[str, Tensor]) -> frozenset[str]:
        """The names of the parameters in ``params``; one that is frozen meanwhile drops out."""
        sharded = self.ranks is not None and self.ranks.sharded
        kept = None if self.params is None else [p for p in self.params if p.requires_grad]
        return frozenset() if kept == [] else chosen_names(trainable, kept, sharded=sharded)

    def _due(self) -> bool:
        """Whether the next step recomputes R."""
        return self.steps >= self.start and self.alpha > 0 and (self.steps - self.start) % self.every == 0

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to be the same run, as tensors and plain values.

        The step count, the key of the labels, the reused gradient, and the adaptive step.
        """
        step = self.settings.step
        trainable = trainable_parameters(self.model)
        value = self.value if self.value is not None else torch.zeros((), dtype=torch.float64)
        reused = None
        if self.every > 1:  # all of them, also before there is one: a fresh process has where to load them
            found = self._reused or {}
            reused = {n: found[n].clone() if n in found else torch.zeros_like(p.detach()) for n, p in trainable.items()}
        return {
            "key": torch.tensor(_NO_KEY) if self._key is None else self._key.clone(),
            "steps": self.steps,
            "value": value.clone(),
            "rows": _NO_ROWS if self._rows is None else int(self._rows),
            "reused": reused,
            "rho": step.rho if isinstance(step, AdaptiveStep) else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave.

        Raises:
            ValueError: a key is missing or unknown, or a gradient does not fit the model; nothing is restored then.
        """
        expected = {"key", "steps", "value", "rows", "reused", "rho"}
        if set(state) != expected:
            raise ValueError(f"state: expected the keys {sorted(expected)}, got {sorted(state)}")
        trainable = trainable_parameters(self.model)
        for name, gradient in (state["reused"] or {}).items():
            if name not in trainable or trainable[name].shape != gradient.shape:
                raise ValueError(f"state: the reused gradient of {name!r} does not fit a parameter of the model")
        device = next(iter(trainable.values())).device
        drawn = state["key"] is not None and state["key"].tolist() != _NO_KEY
        self._key = _placed(self._key, state["key"].to(device, copy=True)) if drawn else None
        taken = state["rows"] is not None and int(state["rows"]) != _NO_ROWS
        self.steps, self._rows = state["steps"], state["rows"] if taken else None
        self.value = state["value"].to(device, copy=True) if taken else None
        # A gradient of 0 stands for that of a parameter that is not used, too: such a one keeps its .grad of None.
        reused = {n: placed_like(g, trainable[n]) for n, g in (state["reused"] or {}).items() if taken}
        kept = self._reused or {}
        found = {n: _placed(kept.get(n), g) for n, g in reused.items() if bool(local_part(g).any())}
        self._reused = found or None
        if isinstance(self.settings.step, AdaptiveStep):
            self.settings.step.rho = state["rho"]

    @contextmanager
    def _undone_on_error(self) -> Iterator[None]:
        """Puts the key of the labels and the adaptive step back where anything is raised within.

        Both stay where they are in memory: captured steps read them there.
        """
        key, step = self._key, self.settings.step
        rho = step._rho if isinstance(step, AdaptiveStep) else None
        key_before, rho_before = (None if x is None else x.clone() for x in (key, rho))
        try:
            yield
        except BaseException:
            self._key = key if key is None or key_before is None else key.copy_(key_before)
            if isinstance(step, AdaptiveStep):
                step._rho = rho if rho is None or rho_before is None else rho.copy_(rho_before)
            raise

    # ---- the steps ---------------------------------------------------------------------------------------------------

    def _scale(self, weight: float) -> float | Tensor:
        """What the losses are multiplied by before their gradients are taken; of a scaler, a float64 scalar tensor."""
        if self.scaler is None:
            return weight
        device = next(iter(trainable_parameters(self.model).values())).device
        scale: Tensor = self.scaler.scale(torch.full((), weight, dtype=torch.float64, device=device))
        return scale

    def _replayed(
        self, drawn: tuple[bool, float], step: Callable[[Inputs, Any], _Outcome], inputs: Inputs, targets: Any
    ) -> _Outcome:
        """The step's outcome by its captured graph, if there is one by now."""
        assert self._captured is not None
        handed_out = {id(g) for captured in self._captured.captured.values() for g in captured.result.total.values()}
        for parameter in self.model.parameters():
            if id(parameter.grad) in handed_out:  # kept by the caller, to accumulate: the replay would overwrite it
                parameter.grad = None if parameter.grad is None else parameter.grad.clone()
        modes = tuple(module.training for module in self.model.modules())
        adaptive = self.settings.step._rho if isinstance(self.settings.step, AdaptiveStep) else None
        state = places([self._key, adaptive, *(self._reused or {}).values()])
        kind = *drawn, self.alpha, modes, tuple(self._reused or ()), state
        outcome = self._captured.run(kind, step, inputs, targets)
        # What is handed out here and kept by the caller stays as it is when the next replay writes its own.
        value = None if outcome.value is None else outcome.value.clone()
        rows = outcome.rows.clone() if isinstance(outcome.rows, Tensor) else outcome.rows
        return dataclasses.replace(outcome, loss=outcome.loss.clone(), value=value, rows=rows)

    def _plain(self, inputs: Inputs, targets: Any, scale: float | Tensor = 1.0) -> _Outcome:
        """The gradient of scale·(loss + α·(R as it was recomputed last))."""
        trainable = trainable_parameters(self.model)
        shapes = tuple(x.shape for x in input_tensors(inputs))
        with torch.enable_grad():
            with nullcontext() if shapes in self._all_small else fused_forward(self.model) as fused:
                logits = call_model(self.model, inputs)
            if fused is not None and not fused.met_large:
                self._all_small.add(shapes)
            targets, _ = self._fitting(logits, targets)
            loss = self._training_loss(logits, targets)
        weighted = scaled(loss, scale)
        if self._shared is not None:
            weighted = weighted * self._shared.loss_weight(self._counted(logits, targets))
        total = self._gradients(weighted, trainable)
        if self._shared is not None:
            (total,) = self._shared.sum_gradients(trainable, total)
        reused = {name: g for name, g in (self._reused or {}).items() if name in trainable}
        _add(total, reused, self.alpha * scale)
        return _Outcome(loss.detach(), logits.detach(), _laid_out(total, trainable, self._sparse))

    def _penalised(self, inputs: Inputs, targets: Any, scale: float | Tensor = 1.0) -> _Outcome:
        """The gradient of scale·(loss + α·R), with R, and its gradient for reuse, both without the scale."""
        trainable = trainable_parameters(self.model)
        if self.settings.wrt == "inputs":
            inputs = requiring_grad(inputs)
        with torch.enable_grad():
            logits, point = self._forwards(inputs, trainable)
            part, part_inputs, first_only, gates = point.rows, point.inputs, point.first_only, point.gates
            expected, detached = point.logits.detach(), logits.detach()
            del point
            targets, rows_targets = self._fitting(logits, targets)
            loss = self._training_loss(logits, targets)
            true = None if rows_targets is None else rows_targets[: len(part)]
            check_targets(self.settings.labels, true)
            key, share = self._next_key(part.device), None
            if self._shared is not None:
                share = self._share(logits, targets, part, true, key)
            first = 0 if share is None else share.first
            penalised, labels = label_loss(part, self.settings.labels, true, key, first)
            own, rows, examples = loss.detach(), counted_rows(part, true), len(part)
            if share is not None:
                loss, penalised = loss * share.loss, penalised * share.penalised
                rows, examples = share.rows, share.examples
        alpha: float | Tensor = self.alpha
        if self.settings.reduction == "batch":  # Tr(F)/n over n rows, Tr(F)/B over those of the batch
            if share is not None:
                alpha *= share.fraction
            elif part is not logits:
                alpha *= rows / counted_rows(logits, rows_targets)
        factor = float(examples) if self.settings.wrt == "inputs" else 1.0
        chosen = self._chosen(trainable)
        reused: Gradients | None = None
        # An adaptive step follows the change of the gradient of all processes, which is known once it is summed.
        adaptive = share is not None and isinstance(self.settings.step, AdaptiveStep)
        apart = self.every > 1 or adaptive
        summed: Gradients = {}

        if self.settings.method == "double_backprop":
            with second_derivatives('method="finite_difference"'):
                value, squared_norm = self._squared_norm(penalised, trainable, part_inputs, chosen, factor, scale)
                if not apart:
                    total = self._gradients((loss + alpha * squared_norm) * scale, trainable)
                else:
                    reused = self._gradients(squared_norm * scale, trainable, retain_graph=True)
                    for g in reused.values():
                        g.div_(scale)
                    total = self._gradients(loss * scale, trainable)
        else:
            # With true labels the training gradient is the one that is penalised: one backward serves both.
            same = self.settings.labels == "true" and self.loss is None and part is logits
            same = same and (share is None or share.loss == share.penalised)
            keep = not (same or self.mixed)
            # All activations are kept over this backward: the peak of the whole step.
            with saving_memory() if keep else nullcontext(), gates.arithmetic():
                gradient, direction = gradient_at(
                    scaled(penalised, scale),
                    trainable,
                    part_inputs,
                    self.settings,
                    chosen,
                    retain_graph=keep,
                    differentiate=self._derivatives,
                )
            total = gradient if same and not self.mixed else {}
            if keep:
                total = self._gradients(scaled(loss, scale), trainable)
            del logits, loss, part, penalised  # the first graph is not needed while the second one is built
            arguments = self.model, part_inputs, first_only, self.settings, gates, labels, gradient
            if share is None:
                shift = FiniteDifference(*arguments, direction, factor, scale)
            else:
                assert self._shared is not None
                by_parameters = self.settings.wrt == "parameters"
                if adaptive or by_parameters:
                    (summed,) = self._shared.sum_gradients(trainable, gradient if adaptive else direction)
                if by_parameters:
                    direction = {name: g for name, g in summed.items() if name in chosen}
                parts = self._shared.sharded or not by_parameters
                add_parts = self._shared.total if parts else None
                shift = self._shared.difference(*arguments, direction, factor, scale, share.penalised, add_parts)
            shift.expected = expected
            if self._verifies:
                shift.verify()
            value = shift.value
            if self.mixed:

                def training_loss(shifted: Tensor) -> Tensor:
                    there = self._training_loss(shifted, targets)
                    return there if share is None else there * share.loss

                total = shift.mixed_gradient(self.alpha, training_loss)
            elif not apart:
                if total is gradient and self.settings.difference == "central":
                    total = {name: g.clone() for name, g in gradient.items()}
                for name in gradient.keys() - total.keys():
                    total[name] = torch.zeros_like(gradient[name])
                self._judge(shift, shift.add_to(total, alpha))
            else:
                reused = dict(zip(gradient, zeros(gradient.values()), strict=True))
                change = shift.add_to(reused, 1.0 / scale)
                if not adaptive:
                    self._judge(shift, change)
        if self._shared is not None:
            total, *rest = self._shared.sum_gradients(trainable, total, *([] if reused is None else [reused]))
            reused = rest[0] if rest else None
            if adaptive and reused is not None:
                self._judge(shift, change if self._shared.sharded else shift.relative_change(reused, summed))
        if reused is not None:
            if alpha is not self.alpha:
                ratio = alpha / self.alpha
                for g in reused.values():
                    g.mul_(ratio)
            _add(total, reused, self.alpha * scale)
            if self._captured is not None and self._reused is not None:
                kept = self._reused  # captured steps read it where it is
                reused = {name: kept[name].copy_(g) if name in kept else g for name, g in reused.items()}
        return _Outcome(
            own, detached, _laid_out(total, trainable, self._sparse), value, rows, reused if self.every > 1 else None
        )

    def _forwards(self, inputs: Inputs, trainable: dict[str, Tensor]) -> tuple[Tensor, _Point]:
        """The forward at θ: the logits of the batch, and what R is taken of."""
        batch = count_examples(inputs)
        few = inputs
        if self._few is not None and self._few < batch:
            few, rest = (take_rows(inputs, part) for part in (slice(None, self._few), slice(self._few, None)))
        modes = tuple(module.training for module in self.model.modules()) if few is not inputs else ()
        sharded = self.ranks is not None and self.ranks.sharded
        coupled = few is not inputs and (couples_examples(self.model) or (self._moves_buffers(modes) and not sharded))
        if coupled and sharded:
            raise ValueError("examples: expected None with fully_shard and a BatchNorm in train mode")
        # With reduction="first", the first example is as the batch's statistics make it.
        first_only = coupled and self.settings.reduction == "first"
        penalised = inputs if first_only else few
        full = self._in_full_precision()
        if (full and not self.mixed) or (coupled and not first_only):
            buffers = copy_buffers(self.model)
            with fused_forward(self.model):
                logits = call_model(self.model, inputs)
            self._note_moved(modes, buffers)
            return logits, self._own_forward(trainable, penalised, first_only, buffers)
        with self._record_gates(full_precision=full) as gates:
            part = call_model(self.model, penalised)
        if first_only or (sharded and modes):
            self._note_moved(modes, gates.buffers)
            if sharded and self._moving[modes]:  # the second forward, of the rest, would start from others
                raise ValueError("examples: expected None with fully_shard and a forward that moves buffers")
        logits = part
        if penalised is not inputs:
            with fused_forward(self.model):
                logits = torch.cat([part, call_model(self.model, rest)])
        if self._learns_of_autocast(gates):
            return logits, self._own_forward(trainable, penalised, first_only, gates.buffers)
        return logits, _Point(part, penalised, first_only, gates)

    def _moves_buffers(self, modes: tuple[bool, ...]) -> bool:
        """Whether a forward in these modes moves buffers; where it is not known yet, whether there are any."""
        return self._moving.get(modes, True) and next(self.model.buffers(), None) is not None

    def _note_moved(self, modes: tuple[bool, ...], before: dict[str, Tensor]) -> None:
        """Compares the buffers after a forward with those before it, once; on a GPU they count as moved."""
        if modes and modes not in self._moving:
            sharded = self.ranks is not None and self.ranks.sharded  # there it would be refused
            if not sharded and any(looking_waits(buffer) for buffer in before.values()):
                self._moving[modes] = True
                return
            pairs = ((buffer, before[name]) for name, buffer in self.model.named_buffers())
            self._moving[modes] = any(not torch.equal(buffer, old) for buffer, old in pairs)

    def _own_forward(
        self, trainable: dict[str, Tensor], inputs: Inputs, first_only: bool, buffers: dict[str, Tensor] | None
    ) -> _Point:
        """A forward that R alone is taken of, from ``buffers``, or from the model's own where None."""
        with torch.enable_grad(), self._record_gates(buffers, full_precision=self._in_full_precision()) as gates:
            logits = call_copy(self.model, trainable, inputs, buffers)
        return _Point(logits, inputs, first_only, gates)

    def _in_full_precision(self) -> bool:
        """Whether R's gradients are to be taken without the autocast that is on, or that the model switches on."""
        settings = self.settings
        if settings.method != "finite_difference" or settings.step != "auto" or not settings.frozen:
            return False
        parameter = next(self.model.parameters())
        met = autocast_dtype(parameter.device.type) or self._met_autocast
        if met is None or torch.finfo(met).eps <= torch.finfo(parameter.dtype).eps:
            return False
        warn_slow_path(IN_FULL_PRECISION.format(met))
        return True

    def _learns_of_autocast(self, gates: Gates) -> bool:
        """Whether a forward met an autocast within the model, so that R needs another one."""
        if gates.full_precision or gates.autocast is None:
            return False
        self._met_autocast = gates.autocast
        return self._in_full_precision()

    @contextmanager
    def _record_gates(
        self, buffers: dict[str, Tensor] | None = None, *, full_precision: bool = False
    ) -> Iterator[Gates]:
        if self.settings.method == "double_backprop":  # there is no second forward
            with twice_forward(self.model):
                yield Gates(None, frozen=False)
            return
        frozen, rewind = self.settings.frozen, self._captured is None
        recording = record_gates(
            self.model, frozen=frozen, rewind=rewind, buffers=buffers, full_precision=full_precision
        )
        with recording as gates:
            yield gates

    def _next_key(self, device: torch.device) -> Tensor | None:
        if not are_drawn(self.settings.labels):
            return None
        if self._key is None:
            self._key = new_key(self.generator, device)
            if self.ranks is not None:  # where all are seeded alike, each still draws its own; "global" takes rank 0's
                self._key[0] += self.ranks.rank
        else:
            self._key[1] += 1
        return self._key

    def _judge(self, shift: FiniteDifference, change: Tensor) -> None:
        """Adapts the step, and warns of a bad one; on a GPU, where the host would wait, of the first one only."""
        shift.adapt(change)
        if not looking_waits(change) or self.value is None:
            shift.judge(change)

    def _share(self, logits: Tensor, targets: Any, part: Tensor, true: Tensor | None, key: Tensor | None) -> Share:
        """What this process has of the batch; its key becomes that of all."""
        assert self._shared is not None
        has = self.settings.reduction == "batch" or self._shared.rank == 0
        rows, of_targets = part[..., 0].numel() if has else 0, self.settings.labels == "true"
        share = self._shared.share(
            loss=self._counted(logits, targets),
            penalised=0 if not has else averaged_rows(true, rows) if of_targets else int(counted_rows(part, true)),
            rows=rows,
            examples=len(part) if has else 0,
            batch=len(logits),
            key=[0, 0] if key is None else key.tolist(),
        )
        if key is not None:
            key.copy_(torch.tensor(share.key))
        return share

    def _counted(self, logits: Tensor, targets: Any) -> int:
        """How much the mean training loss of this process counts: by rows, or by examples where it is a callable."""
        count = averaged_rows(targets, logits[..., 0].numel()) if self.loss is None else len(logits)
        if count == 0:
            raise ValueError("targets: expected at least one that counts in each process, got none")
        return count

    def _squared_norm(
        self,
        penalised: Tensor,
        trainable: dict[str, Tensor],
        inputs: Inputs,
        chosen: frozenset[str],
        factor: float,
        scale: float | Tensor,
    ) -> tuple[Tensor, Tensor]:
        """R, and what has the gradient of R: R itself, or this process's part of it; both without the scale."""
        sources = {name: p for name, p in trainable.items() if name in chosen}
        if self.settings.wrt == "inputs":
            sources = {str(i): x for i, x in enumerate(input_tensors(inputs)) if x.requires_grad}
        elif not sources:  # all of params are frozen meanwhile: R is 0, and so is its gradient
            nothing = 0 * penalised
            return nothing.detach().double(), nothing
        with unhooked(sources.values()):
            found = differentiable_gradients(penalised * scale, list(sources.values()))
        own = {name: real(g) / scale for name, g in zip(sources, found, strict=True) if g is not None}
        if self._shared is None or self.settings.wrt == "inputs":
            squared_norm = factor * torch.stack([g.square().sum() for g in own.values()]).sum()
            value = squared_norm.detach().double()
            return value if self._shared is None else self._shared.total(value), squared_norm
        of_real = {name: real(p) for name, p in trainable.items()}
        (summed,) = self._shared.sum_gradients(of_real, {name: g.detach() for name, g in own.items()})
        value = torch.stack([g.double().square().sum() for g in summed.values()]).sum()
        return value, 2 * torch.stack([(g * summed[name]).sum() for name, g in own.items()]).sum()

    def _gradients(self, loss: Tensor, trainable: dict[str, Tensor], *, retain_graph: bool = False) -> Gradients:
        """∇_θ loss by name; a parameter that is not used is absent."""
        found = self._derivatives(loss, list(trainable.values()), retain_graph)
        return {name: g for name, g in zip(trainable, found, strict=True) if g is not None}

    def _doing(self, weight: float) -> Doing:
        """What this step is, which has to be the same in each process."""
        due, trainable = self._due(), trainable_parameters(self.model)
        sharded = self.ranks is not None and self.ranks.sharded
        settings = {field.name: getattr(self.settings, field.name) for field in dataclasses.fields(self.settings)}
        if isinstance(step := self.settings.step, AdaptiveStep):  # at scope "local" each process adapts its own
            settings["step"] = step.target, step.rho if due and self._shared is not None else None
        return Doing.of(
            trainable,
            sharded,
            compared=due,  # when the host waits for the device in any case
            call="FisherPenalty.backward",
            steps=self.steps,
            alpha=self.alpha,
            every=self.every,
            start=self.start,
            scope=self.scope,
            mixed=self.mixed,
            examples=self.examples,
            loss=self.loss is not None,
            weight=weight if self._shared is not None else None,
            params=digest(sorted(self._chosen(trainable))),
            reused=self._reused is not None,
            training=digest(name for name, module in self.model.named_modules() if module.training),
            autocast=[autocast_dtype(kind) for kind in ("cpu", "cuda")],
            **settings,
        )

    def _derivatives(self, loss: Tensor, sources: Sequence[Tensor], retain_graph: bool) -> Sequence[Tensor | None]:
        """∂loss/∂source, dense; None where a source is not used. Notes whose gradient autograd makes sparse."""
        found = self._differentiate(loss, sources, retain_graph)
        self._sparse |= {id(x) for x, g in zip(sources, found, strict=True) if g is not None and g.is_sparse}
        return dense(found)

    def _check_sharded(self, model: nn.Module) -> None:
        """Raises ValueError where an option needs what ``fully_shard`` does not have."""
        if self.scope == "local":
            raise ValueError('scope: expected "global" with fully_shard, whose backward sums over the processes')
        if self.settings.method == "double_backprop":
            raise ValueError('method: expected "finite_difference" with fully_shard, which has no second derivative')
        low = precision_below(model)
        if low is not None and self.settings.step == "auto":
            raise ValueError(f"step: expected a number with fully_shard in {low}, which the default does not know of")

    def _batch(self, inputs: Inputs, targets: Any, trainable: int) -> tuple[Call, Any]:
        """The call of the model and the targets; the first forward of a kind looks for heads beside the logits."""
        given = targets
        call, targets = paired(self.model, inputs, given, self.class_dim)
        call = map_inputs(call, differentiable)
        targets = differentiable(targets) if isinstance(targets, Tensor) else targets
        check_examples(call)
        if self.loss is not None:
            return call, targets
        if targets is None:
            raise ValueError("targets: expected those of the training loss, got None")
        call = check_heads(self.model, call, trainable)
        return (call if given is not None else check_own_loss(self.model, call, targets)), targets

    def _fitting(self, logits: Tensor, targets: Any) -> tuple[Any, Tensor | None]:
        """The targets of the training loss, and those of the rows of logits, where there are any.

        Raises:
            ValueError: they do not fit.
        """
        if self.loss is None or self.settings.labels == "true":
            check_targets("true", targets)
            rows = fit(logits, targets, class_dim=self.class_dim, model=self.model, in_range=self.loss is not None)
            if self._shared is None:
                check_counted(rows)
            return (rows if self.loss is None else targets), rows
        check_classes(logits)
        check_certain(logits, targets, self.class_dim)
        by_row = isinstance(targets, Tensor) and targets.shape == logits.shape[:-1]
        return targets, targets if by_row else None

    def _training_loss(self, logits: Tensor, targets: Any) -> Tensor:
        if self.loss is None:
            return cross_entropy(logits, targets)
        loss = self.loss(as_given(logits, self.class_dim), targets)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise ValueError("loss: expected a scalar tensor that depends on the logits")
        return loss


def _placed(kept: Tensor | None, value: Tensor) -> Tensor:
    """The value in the memory that is kept for it, if it fits there: captured steps go on reading that."""
    fits = kept is not None and (kept.shape, kept.dtype, kept.device) == (value.shape, value.dtype, value.device)
    return kept.copy_(value) if kept is not None and fits else value


def _none_counts(targets: Tensor | None) -> bool:
    """Whether all targets are of rows that do not count: a micro-batch of prompts."""
    return targets is not None and not targets.is_floating_point() and not bool((targets != IGNORED).any())


def _laid_out(gradients: Gradients, trainable: dict[str, Tensor], sparse: set[int]) -> Gradients:
    """The gradients, each in memory as ``Tensor.backward`` leaves it: as its parameter is, because fused optimisers
    read element by element without a look at strides; or the rows that are not 0, where it is sparse."""

    def laid_out(g: Tensor, parameter: Tensor) -> Tensor:
        if id(parameter) in sparse:
            return g.to_sparse(1)
        return g if g.stride() == parameter.stride() else torch.empty_like(parameter).copy_(g)

    return {name: laid_out(g, trainable[name]) for name, g in gradients.items()}


def _after_hooks(gradients: Gradients, trainable: dict[str, Tensor]) -> Gradients:
    """The gradients as the hooks on their parameters (``Tensor.register_hook``) make them."""
    found = dict(gradients)
    for name in found:
        for hook in (trainable[name]._backward_hooks or {}).values():
            changed = hook(found[name])
            found[name] = found[name] if changed is None else changed
    return found


def _add(total: Gradients, gradients: Gradients, weight: float | Tensor) -> None:
    """total += weight·gradients, by name."""
    both = [name for name in gradients if name in total]
    add_([total[name] for name in both], weight, [gradients[name] for name in both])
    for name in gradients.keys() - total.keys():
        total[name] = gradients[name] * weight
