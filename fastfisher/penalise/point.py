"""The forward at θ that R is taken of: which rows, in which precision, and with which labels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastfisher.autocast import autocast_dtype
from fastfisher.distributed.single import Single
from fastfisher.engine.fused.forward import fused_forward
from fastfisher.engine.gates import Gates, record_gates
from fastfisher.engine.twice import twice_differentiable
from fastfisher.host import looking_waits
from fastfisher.inputs import Inputs, count_examples, take_rows
from fastfisher.labels import Labels, Rows
from fastfisher.likelihoods.base import Chosen, Likelihood
from fastfisher.model import call_copy, call_model, copy_buffers, couples_examples, uncompiled
from fastfisher.penalise.options import Settings
from fastfisher.slow_path import warn_slow_path

IN_FULL_PRECISION = (
    "under autocast in {} the two gradients of the finite difference are taken in the precision of the parameters, in "
    "forwards of their own, because rounding would hide their difference; step=<a number> keeps the autocast"
)


@dataclass
class Point:
    """A forward at θ, and the loss at the labels whose gradient is penalised.

    Whoever takes the last gradient of it drops its graph by :meth:`release`.

    Attributes:
        logits: those of all ``inputs``.
        inputs: what the model was called with.
        first_only: whether only the first row counts; the others were there for the statistics of the batch.
        gates: what the forward did, to be replayed.
        kept: whether the graph is the caller's, who goes on using it.
        likelihood: what the output stands for.
        labels: the labels, so that the loss can be taken again elsewhere.
        loss: the mean loss there, times ``share``: the weight of this process's rows among those of all.
        values: the logits without their graph.
        examples: how many examples R is of: with ``wrt="inputs"`` it is a mean over them.
    """

    logits: Tensor
    inputs: Inputs
    first_only: bool
    gates: Gates
    kept: bool = False
    share: float = 1.0

    def __post_init__(self) -> None:
        self.gates.end_at(self.logits)
        self.values = self.logits.detach()
        self.examples = len(self.rows)
        self.likelihood: Likelihood
        self.labels: Chosen
        self.loss: Tensor

    @property
    def rows(self) -> Tensor:
        """The logits that count."""
        return self.logits[:1] if self.first_only else self.logits

    def draw(self, kind: Labels, likelihood: Likelihood, targets: Any, key: Tensor | None, first: int = 0) -> None:
        """Chooses labels of a kind and takes the loss there; see :class:`fastfisher.labels.Rows`."""
        self.likelihood = likelihood = kind.of(likelihood)
        self.loss, self.labels = kind.loss(Rows(likelihood, self.rows, targets, key, first))

    def weigh(self, share: float) -> None:
        """Multiplies the loss by this process's weight."""
        if share != 1.0:
            self.share, self.loss = share, self.loss * share

    def release(self) -> None:
        """Lets go of the graph."""
        del self.logits, self.loss


@contextmanager
def recorded_forward(
    model: nn.Module,
    settings: Settings,
    *,
    buffers: dict[str, Tensor] | None = None,
    full_precision: bool = False,
    rewind: bool = True,
) -> Iterator[Gates]:
    """Within, a forward that ∇R can be taken of: by its gates, or by a second derivative; see :func:`record_gates`."""
    if not settings.differs:
        with uncompiled(model, 'method="double_backprop"'), fused_forward(model), twice_differentiable():
            yield Gates(None, frozen=False)
        return
    recording = record_gates(
        model, frozen=settings.frozen, rewind=rewind, buffers=buffers, full_precision=full_precision
    )
    with recording as gates:
        yield gates


def forward_of_copy(
    model: nn.Module,
    settings: Settings,
    trainable: dict[str, Tensor],
    inputs: Inputs,
    first_only: bool,
    *,
    buffers: dict[str, Tensor] | None = None,
    full_precision: bool = False,
    rewind: bool = True,
) -> Point:
    """A forward that R alone is taken of, on copies of ``buffers``, or of the model's own where None."""
    recording = recorded_forward(model, settings, buffers=buffers, full_precision=full_precision, rewind=rewind)
    with torch.enable_grad(), recording as gates:
        logits = call_copy(model, trainable, inputs, buffers)
    return Point(logits, inputs, first_only, gates)


class Sampling:
    """Of which rows of a batch R is taken, and whether by the forward of the training loss or one of its own.

    Args:
        model: the model.
        settings: what R is.
        few: R is of the first so many examples; None for all.
        world: the processes that share the batch.
        mixed: whether the training gradient is taken at θ + ρd, too.
        rewind: whether a replayed forward puts the random generators back; not within a captured graph.

    Attributes:
        meets_no_logits: whether a forward of the caller's returned no logits, so that the next is not recorded, either.
    """

    def __init__(
        self, model: nn.Module, settings: Settings, few: int | None, world: Single, *, mixed: bool, rewind: bool
    ) -> None:
        self.model, self.settings, self.few, self.world = model, settings, few, world
        self.mixed, self.rewind, self.meets_no_logits = mixed, rewind, False
        self._moving: dict[tuple[bool, ...], bool] = {}  # by the modules' modes: whether a forward moves buffers
        self._met_autocast: torch.dtype | None = None  # within the model, where its caller need not know of it

    def forward(self, inputs: Inputs, trainable: dict[str, Tensor]) -> tuple[Tensor, Point]:
        """The logits of the batch, and the point that R is taken of: the same forward, where that is possible."""
        few = rest = inputs
        if self.few is not None and self.few < count_examples(inputs):
            few, rest = (take_rows(inputs, part) for part in (slice(None, self.few), slice(self.few, None)))
        whole = few is inputs
        modes = () if whole else tuple(module.training for module in self.model.modules())
        sharded = self.world.sharded
        coupled = not whole and (couples_examples(self.model) or (self._moves_buffers(modes) and not sharded))
        if coupled and sharded:
            raise ValueError("examples: expected None with fully_shard and a BatchNorm in train mode")
        # With reduction="first", the first example is as the batch's statistics make it.
        first_only = coupled and self.settings.first_only
        penalised = inputs if first_only else few
        full = self.in_full_precision()
        if (full and not self.mixed) or (coupled and not first_only):
            buffers = copy_buffers(self.model)
            with fused_forward(self.model):
                logits = call_model(self.model, inputs)
            self._note_moved(modes, buffers)
            return logits, self.apart(trainable, penalised, first_only, buffers)
        with self.recording(full_precision=full) as gates:
            part = call_model(self.model, penalised)
        if first_only or (sharded and modes):
            self._note_moved(modes, gates.buffers)
            if sharded and self._moving[modes]:  # the second forward, of the rest, would start from others
                raise ValueError("examples: expected None with fully_shard and a forward that moves buffers")
        logits = part
        if penalised is not inputs:
            with fused_forward(self.model):
                logits = torch.cat([part, call_model(self.model, rest)])
        if self.learns_of_autocast(gates):
            return logits, self.apart(trainable, penalised, first_only, gates.buffers)
        return logits, Point(part, penalised, first_only, gates)

    def apart(
        self, trainable: dict[str, Tensor], inputs: Inputs, first_only: bool, buffers: dict[str, Tensor] | None
    ) -> Point:
        """:func:`forward_of_copy` in the precision that it takes."""
        full = self.in_full_precision()
        options = {"buffers": buffers, "full_precision": full, "rewind": self.rewind}
        return forward_of_copy(self.model, self.settings, trainable, inputs, first_only, **options)  # type: ignore[arg-type]

    def recording(self, *, full_precision: bool = False) -> AbstractContextManager[Gates]:
        """:func:`recorded_forward` of the model's own forward."""
        return recorded_forward(self.model, self.settings, full_precision=full_precision, rewind=self.rewind)

    def in_full_precision(self) -> bool:
        """Whether R's gradients are to be taken without the autocast that is on, or that the model switches on."""
        if not self.settings.default_step:
            return False
        parameter = next(self.model.parameters())
        met = autocast_dtype(parameter.device.type) or self._met_autocast
        if met is None or torch.finfo(met).eps <= torch.finfo(parameter.dtype).eps:
            return False
        warn_slow_path(IN_FULL_PRECISION.format(met))
        return True

    def learns_of_autocast(self, gates: Gates) -> bool:
        """Whether a forward met an autocast within the model, so that R needs another one."""
        if gates.full_precision or gates.autocast is None:
            return False
        self._met_autocast = gates.autocast
        return self.in_full_precision()

    def _moves_buffers(self, modes: tuple[bool, ...]) -> bool:
        """Whether a forward in these modes moves buffers; where it is not known yet, whether there are any."""
        return self._moving.get(modes, True) and next(self.model.buffers(), None) is not None

    def _note_moved(self, modes: tuple[bool, ...], before: dict[str, Tensor]) -> None:
        """Compares the buffers after a forward with those before it, once; on a GPU they count as moved."""
        if modes and modes not in self._moving:
            # With shards a moved buffer is refused, so that it has to be looked at.
            if not self.world.sharded and any(looking_waits(buffer) for buffer in before.values()):
                self._moving[modes] = True
                return
            pairs = ((buffer, before[name]) for name, buffer in self.model.named_buffers())
            self._moving[modes] = any(not torch.equal(buffer, old) for buffer, old in pairs)
