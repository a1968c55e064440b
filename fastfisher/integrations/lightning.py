"""Callbacks for Lightning: the penalty in a ``LightningModule``'s training step, and Tr(F) to the trainer's loggers.

They work with ``pytorch_lightning``, or with ``lightning.pytorch`` where the program has imported it before.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from fastfisher.alignment import Alignments, labels_in
from fastfisher.inputs import Call
from fastfisher.integrations._tracing import TraceAtSteps
from fastfisher.outputs import Output, logits_of
from fastfisher.penalise.regularizer import FisherPenalty
from fastfisher.placement import check_reduced_as_mean, is_sharded, placement_of


def _callback_class() -> Any:
    names = ["pytorch_lightning", "lightning.pytorch"]
    names.sort(key=lambda name: name not in sys.modules)
    for name in names:
        try:
            return importlib.import_module(name).Callback
        except ModuleNotFoundError as error:
            if error.name not in (name, name.split(".")[0]):  # it is there, and something that it needs is not
                raise
    raise ModuleNotFoundError("fastfisher.integrations.lightning needs Lightning: pip install fastfisher[lightning]")


_Callback: Any = _callback_class()


def _network(module: nn.Module, name: str | None) -> nn.Module:
    if name is None:
        return module
    network = getattr(module, name, None)
    if not isinstance(network, nn.Module):
        raise ValueError(f"network: expected the name of a submodule of {type(module).__name__}, got {name!r}")
    return network


def _labels_of(batch: Any) -> Tensor | None:
    """The second of a pair, or the labels of a dict."""
    pair = isinstance(batch, list | tuple) and len(batch) == 2 and isinstance(batch[1], Tensor)
    return batch[1] if pair else labels_in(batch)


def _called(name: str | None, calls: int) -> str:
    network = "the module itself" if name is None else name
    return (
        f"network: expected training_step to call {network} once, it did {calls} times; give the name of the submodule "
        "that makes the logits, or by call= the number of the call that R is of"
    )


class _Targets:
    """The targets of the logits of a batch: what the user states, or those that the loss has."""

    def __init__(self, stated: Callable[[Any], Tensor | None] | None, class_dim: int | None) -> None:
        self._stated, self._alignments = stated, Alignments(class_dim)

    def of(self, batch: Any, loss: Tensor, logits: Tensor) -> Tensor | None:
        if self._stated is not None:
            return self._stated(batch)
        try:
            return self._alignments.targets(loss, logits, _labels_of(batch))
        except ValueError as error:
            raise ValueError(f"{error} by targets=") from None


class FisherPenaltyCallback(_Callback):  # type: ignore[misc]
    """Adds the gradient of α·R, R = ‖(1/B) Σ_i ∇_θ ℓ(x_i, ŷ_i)‖² (eq. 3 and 5 of the paper), to each training step.

    The training step's own forward is shared, and the loss that it returns and logs keeps its value. The penalty is a
    term of that loss for autograd alone, so gradient accumulation, clipping, precision and optimisers apply to it as to
    the loss; with accumulation it is the mean of R over the micro-batches. Its state is in the checkpoints.

    Example:
        >>> Trainer(callbacks=[FisherPenaltyCallback(alpha=0.1, network="model")]).fit(module, loader)

    Args:
        alpha: the coefficient α ≥ 0.
        network: the name of the submodule that makes the logits, called once in a training step; None: the
            LightningModule itself, by its ``forward``.
        targets: the targets of the logits of a batch, −100 where a position does not count; None of it: all count.
            Otherwise the labels are the second of a pair or "labels" of a dict, and the loss of the first batch says
            how they lie to the logits (:func:`fastfisher.alignment.alignment_of`).
        call: which call of the network in a training step R is of, from 0, where there are several, as for two views of
            each example; None: there is one. Calls without gradients do not count.
        options: as in :class:`fastfisher.FisherPenalty`, but for ``mixed``, ``examples``, ``graphs``, ``loss`` and
            ``wrt="inputs"``, which need a forward of their own.

    Several processes, with Lightning's DDP strategies or a network that ``configure_model`` has given to
    ``fully_shard``: R is of the batch of all (``scope="global"``), and the update that of one process with this batch.

    Attributes:
        penalty: the :class:`fastfisher.FisherPenalty` once training has started; None before.

    Raises:
        ValueError: at the start of the training: an option is out of range, the optimisation is manual, a strategy of
            several processes is neither of these, gradients are scaled (16-mixed) or the module is compiled. In
            training: the network is not called exactly once for a batch, or not as often as ``call`` says, the training
            step is called again, or the loss is no cross-entropy of its logits and ``targets`` is not given. It is
            named.
    """

    def __init__(
        self,
        alpha: float,
        *,
        network: str | None = None,
        targets: Callable[[Any], Tensor | None] | None = None,
        call: int | None = None,
        **options: Any,
    ) -> None:
        self.alpha, self.network, self.targets, self.call, self.options = alpha, network, targets, call, options
        self.penalty: FisherPenalty | None = None
        self._state: dict[str, Any] | None = None
        self._give_back: Callable[[], None] | None = None
        self._stepped = False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Takes its place around the training step."""
        _check_trainer(trainer, pl_module)
        network = _network(pl_module, self.network)
        penalty = FisherPenalty(network, self.alpha, **{**_group_of(trainer, network), **self.options})
        with penalty.watching(self.call):  # refuses an option now, not at the first step
            pass
        if self._state is not None:
            penalty.load_state_dict(self._state)
            self._state = None
        self.penalty, targets, training_step = (
            penalty,
            _Targets(self.targets, penalty.class_dim),
            pl_module.training_step,
        )

        @functools.wraps(training_step)  # Lightning looks at the signature
        def penalised(batch: Any, *args: Any, **kwargs: Any) -> Any:
            if self._stepped:
                raise ValueError(
                    "optimizer: expected one that calls training_step once for a batch, got one that calls it again, "
                    "as LBFGS does: the value of the loss is without the penalty"
                )
            self._stepped = True
            with penalty.watching(self.call) as forward:  # what is raised within, other processes are told
                output = training_step(batch, *args, **kwargs)
                loss = output.get("loss") if isinstance(output, Mapping) else output
                if loss is None:  # the step is left out
                    return output
                if not forward.is_finished:
                    raise ValueError(_called(self.network, forward.calls))
                if forward.without is not None:
                    raise forward.without
                aligned = None if forward.logits is None else targets.of(batch, loss, forward.logits)
            term = penalty.term(forward, aligned)
            return {**output, "loss": loss + term} if isinstance(output, Mapping) else loss + term

        replaced = vars(pl_module).get("training_step")
        pl_module.training_step = penalised

        def give_back() -> None:
            if replaced is None:
                del pl_module.training_step
            else:
                pl_module.training_step = replaced

        self._give_back = give_back

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Another batch."""
        self._stepped = False

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Gives the training step back."""
        if self._give_back is not None:
            self._give_back()
            self._give_back = None

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Gives the training step back."""
        self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """That of the penalty."""
        return {} if self.penalty is None else self.penalty.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps it until the training starts and the parameters are where they belong."""
        self._state = state_dict or None


def _check_trainer(trainer: Any, pl_module: Any) -> None:
    """Raises ValueError where the trainer does not go with a penalty."""
    if not pl_module.automatic_optimization:
        raise ValueError("pl_module: expected automatic optimization; where it is manual, call FisherPenalty.backward")
    if trainer.scaler is not None:
        raise ValueError(
            f"precision: expected gradients that are not scaled, got {trainer.precision!r}: in float16 they have to be "
            'scaled before the norm is taken of them; use "bf16-mixed"'
        )
    if getattr(pl_module, "_compiler_ctx", None) is not None:
        raise ValueError(
            "pl_module: expected one that is not compiled, since compiled code hides the calls of the layers; compile "
            "the network in it, of which the steps that do not recompute the penalty run compiled"
        )


def _group_of(trainer: Any, network: nn.Module) -> dict[str, Any]:
    """The ``process_group`` of a penalty, where ``DistributedDataParallel`` is around the LightningModule.

    Raises:
        ValueError: several processes share the training in another way.
    """
    if trainer.world_size == 1 or is_sharded(network):  # fully_shard says itself which processes share the network
        return {}
    around = trainer.strategy.model
    check_reduced_as_mean(around)
    ddp = placement_of(around).ddp
    if ddp is None:
        raise ValueError(
            f"trainer: expected DistributedDataParallel or fully_shard in {trainer.world_size} processes, got "
            f"{type(trainer.strategy).__name__} with a {type(around).__name__}; use strategy='ddp', or "
            "ModelParallelStrategy with fully_shard of the network in configure_model"
        )
    return {"process_group": ddp.process_group}


class FisherTraceMonitor(_Callback):  # type: ignore[misc]
    """Logs Tr(F) = E_x E_ŷ ‖∇_θ ℓ(x, ŷ)‖² (eq. 2 of the paper) to every logger of the trainer.

    The metrics are ``fisher_trace`` and ``fisher_trace_error``, its standard error. The draws depend on the step alone:
    the training's random numbers stay as they are, and a resumed run has the draws of an uninterrupted one.

    Example:
        >>> monitor = FisherTraceMonitor(every_n_steps=100, network="model")
        >>> Trainer(callbacks=[monitor], logger=TensorBoardLogger("runs")).fit(module, loader)

    Args:
        every_n_steps: so many optimiser steps from one measurement to the next.
        data: as in :func:`fastfisher.trace_fisher`; None: what the network was called with in that step, and the
            targets of the batch.
        network: as in :class:`FisherPenaltyCallback`. A module that training_step does not call takes the batch.
        targets: as in :class:`FisherPenaltyCallback`, for the batch of a step.
        options: further options of :func:`fastfisher.trace_fisher`.

    Raises:
        ValueError: ``every_n_steps`` is not an integer ≥ 1; in training, the network is called more than once for a
            batch, or the loss is no cross-entropy of its logits and neither ``targets`` nor ``data`` is given.
        TypeError: an option is none of ``trace_fisher``.
    """

    def __init__(
        self,
        every_n_steps: int,
        data: Any = None,
        *,
        network: str | None = None,
        targets: Callable[[Any], Tensor | None] | None = None,
        **options: Any,
    ) -> None:
        self.data, self.network, self._trace = data, network, TraceAtSteps(every_n_steps, options)
        self._class_dim = options.get("class_dim")
        self._targets, self._measured = _Targets(targets, self._class_dim), 0
        self._hook: Any = None
        self._begin(None)

    def _begin(self, batch: Any) -> None:
        self._batch, self._calls = batch, 0
        self._inputs: Call | None = None
        self._logits: Tensor | None = None
        self._labels: Tensor | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Where a run is resumed, the last measurement has been made."""
        self._measured = trainer.global_step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Notes what the network is called with, where the batch may be the one to measure on."""
        self._begin(batch)
        if self.data is not None or not self._trace.due(trainer.global_step + 1):
            return

        network = _network(pl_module, self.network)
        own = next(network.parameters(), None)

        def note(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if next(network.parameters(), None) is not own:  # a penalty's forward at other parameters
                return
            self._calls += 1
            self._inputs, self._logits = Call(args, kwargs, Output(self._class_dim)), logits_of(output)

        self._hook = network.register_forward_hook(note, with_kwargs=True)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Asks the loss which positions count, while its graph is there."""
        if self._calls == 1 and self._logits is not None:
            self._labels = self._targets.of(self._batch, loss, self._logits)
        self._logits = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Measures where it is time."""
        self._release()
        step = trainer.global_step
        if step != self._measured and self._trace.due(step):  # and not the same step, which gathers micro-batches
            self._measured = step
            metrics = self._trace.measure(_network(pl_module, self.network), self._data(batch), step)
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=step)
        self._begin(None)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leaves no hook behind."""
        self._release()

    def _data(self, batch: Any) -> Any:
        if self.data is not None:
            return self.data
        if self._calls > 1:
            raise ValueError(_called(self.network, self._calls))
        if self._calls == 1:
            return self._inputs, self._labels
        return tuple(batch) if isinstance(batch, list) else batch

    def _release(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
