"""Records what is discrete in a forward (ReLU masks, max-pool indices, comparisons, …) and replays it in another.

Finite differences of the gradient converge to the Hessian that autograd sees only where no kink lies between the two
points, and in a ReLU network kinks are everywhere. Replaying at θ + ρd the gates of the forward at θ leaves a network
that is smooth in ρ, with the same value, gradient and (autograd's) Hessian at θ. Recorded are

- the kinks of the functions that have a rule in :mod:`fastfisher.engine.piecewise`;
- every value that autograd holds fixed although it was computed from something that moves: results of comparisons,
  indices, bins, numbers read by Python, and whatever was computed under ``detach()`` or ``no_grad()``.

The replayed forward starts where the recorded one did: with the buffers as they were, and with the state of the random
number generators if the recorded forward drew from them (dropout masks, stochastic depth).

Recorded, replayed or neither (:func:`fused_forward`), a forward of the penalty runs ReLU, max-pool, large convolutions
and batch normalisation through our own Functions, which take less time and memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastfisher.checks import check_flags, check_model
from fastfisher.engine.fused.forward import device_of, fused_forward
from fastfisher.engine.hooks import watched_hooks
from fastfisher.engine.piecewise.table import refuse_random
from fastfisher.engine.random_state import RandomState
from fastfisher.engine.recording import Record, Recording, Replay
from fastfisher.model import copy_buffers, uncompiled

_FROZEN = 'gates="frozen", unlike gates="free",'


@dataclass
class Gates(Recording):
    """The gates of one forward. Made by :func:`record_gates`; pass it as ``gates=`` beside ``logits=``.

    Attributes:
        random: the state of the random number generators when the recording began.
        frozen: whether there are gates to replay.
        model: the model that ran.
        buffers: its buffers as they were when the recording began, by name.
        drew: whether the forward drew from the default random number generators: only then are they set back.
        changed: the parameters that the forward wrote into, by name.
        precision: the coarsest dtype that the logits may depend on; None before :meth:`end_at`.
    """

    random: RandomState | None
    frozen: bool = True
    model: torch.nn.Module | None = None
    buffers: dict[str, Tensor] = field(default_factory=dict)
    drew: bool = True
    changed: frozenset[str] = frozenset()
    precision: torch.dtype | None = None

    def end_at(self, logits: Tensor) -> None:
        """Notes where the forward ends: what the model computes after its logits, such as a loss, has no part in R."""
        last = logits.grad_fn._sequence_nr() if logits.grad_fn is not None else 0
        before = [dtype for dtype, first in self.met.items() if first <= last]
        self.precision = max(before, key=lambda dtype: torch.finfo(dtype).eps, default=None)

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Within, recorded calls repeat the gates in order, and random draws repeat the recorded ones.

        Raises:
            ValueError: the forward took another path than the recorded one.
        """
        if self.random is None or not self.drew:
            with self._replay_gates():
                yield
            return
        outer = RandomState.current(self.random.cuda)
        self.random.restore()
        try:
            with self._replay_gates():
                yield
        finally:
            outer.restore()

    @contextmanager
    def _replay_gates(self) -> Iterator[None]:
        if not self.frozen:
            yield
            return
        with (
            uncompiled(self.model, _FROZEN),
            self.arithmetic(),
            Replay(self, keep_random=self.random is None) as replay,
        ):
            yield
        replay.check_complete()


@contextmanager
def record_gates(
    model: torch.nn.Module | None = None,
    *,
    frozen: bool = True,
    rewind: bool = True,
    buffers: dict[str, Tensor] | None = None,
    full_precision: bool = False,
) -> Iterator[Gates]:
    """Records the gates, the buffers and the random state of the forward run within.

    Example:
        >>> with fastfisher.record_gates(model) as gates:
        ...     logits = model(inputs)
        >>> penalty = fastfisher.penalty(model, inputs, logits=logits, method="finite_difference", gates=gates)

    Args:
        model: the model about to run; tells which CUDA devices' random states matter, and has the buffers.
        frozen: False records the random state and the buffers alone (for ``gates="free"``).
        rewind: False keeps the masks of dropout instead of the random state, which a CUDA graph cannot go back to.
        buffers: copies of the model's buffers, where the caller has made some already.
        full_precision: True switches autocast off, for this forward and its replays, wherever it is switched on.

    Raises:
        ValueError: a module is a TorchScript module, which hides its gates; or, without ``rewind``, a function draws
            numbers that are not those of a dropout, or free gates meet a dropout; or a flag is no boolean.
        TypeError: ``model`` is no module.
    """
    check_flags(frozen=frozen, rewind=rewind)
    parameters: dict[str, torch.nn.Parameter] = {}
    if model is not None:
        check_model(model)
        parameters = dict(model.named_parameters())
    if buffers is None:
        buffers = {} if model is None else copy_buffers(model)
    random = RandomState.on_devices_of(parameters.values()) if rewind else None
    gates = Gates(random, frozen, model, buffers, full_precision=full_precision, device=device_of(model))
    versions = {name: p._version for name, p in parameters.items()}
    record: Record | None = None
    if frozen:
        if model is not None:
            check_recordable(model)
        record = Record(gates, keep_random=not rewind)
        with uncompiled(model, _FROZEN), gates.arithmetic(), watched_hooks(model, gates.watched), record:
            yield gates
    else:
        with fused_forward(model) if model is not None else nullcontext(), nullcontext() if rewind else _NoRandom():
            yield gates
    gates.changed = frozenset(name for name, p in parameters.items() if p._version != versions[name])
    # Another thread may have drawn meanwhile: only a forward that may have drawn itself is a reason to rewind.
    gates.drew = random is not None and (record is None or record.may_have_drawn) and random.has_moved()


def check_recordable(model: torch.nn.Module) -> None:
    """Raises ValueError where a TorchScript module would hide its gates from the recording."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f'gates="frozen": module {name or "(the model itself)"!r} is a TorchScript module, so its gates cannot '
                'be recorded; pass the module it was made from, or gates="free"'
            )


class _NoRandom(TorchFunctionMode):
    """Refuses calls that draw random numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        refuse_random(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))
