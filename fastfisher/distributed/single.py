"""A world: the processes that share a batch, and what they do together. Here that of a single process.

Steps and measurements call the methods of :class:`Single` without asking how many processes there are. With a single
one weights are 1, and a sum over the processes is what it was given; for several, ``replicated.py``, ``sharded.py``
and ``local.py`` override what differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from fastfisher.distributed.messages import Doing, Gradients
from fastfisher.engine.gradients import autograd_gradients
from fastfisher.placement import check_not_within

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


@dataclass(frozen=True)
class Counts:
    """How much of a batch a process has: what it knows before it has asked the others.

    A number that is on the GPU is given as a function, so that only a world that needs it waits for it.

    Attributes:
        loss: what its mean training loss divides by: rows of logits, a sum of class weights, or examples where the loss
            is a callable.
        penalised: how many rows the penalised loss is a mean of: those in ``rows`` whose target is not −100.
        rows: how many rows of logits are penalised, with those whose target is −100.
        examples: how many examples have these rows.
        batch: how many examples the process has in all.
        part: which fraction of the process's rows is penalised.
        first_only: whether of all processes together a single example is penalised, the first of rank 0.
    """

    loss: Callable[[], float]
    penalised: Callable[[], int | Tensor]
    rows: int
    examples: int
    batch: int
    part: Callable[[], float | Tensor]
    first_only: bool


@dataclass(frozen=True)
class Share:
    """How much of the batch of all processes this one has.

    Attributes:
        loss: the weight of its mean training loss in that of the batch.
        penalised: the same for the loss whose gradient is penalised.
        first: the number of its first penalised row among those of the batch. Labels are drawn by this number.
        rows: how many rows of the batch are penalised, without those whose target is −100.
        examples: how many examples of the batch are penalised.
        fraction: which fraction of the batch is penalised.
    """

    loss: float
    penalised: float
    first: int
    rows: int | Tensor
    examples: int
    fraction: float | Tensor


class Single:
    """A process that shares its model with no other.

    Attributes:
        rank, size: the number of this process, and how many there are.
        sharded: whether a process has only a part of each parameter.
        group: the processes as torch.distributed knows them; None where there is no other.
        alone: whether there is no other process.
        shares: whether there is one R, of the batch of all processes. Else each process has its own.
    """

    rank, size = 0, 1
    group: ProcessGroup | None = None
    sharded, alone, shares = False, True, False

    # ---- around a call ----------------------------------------------------------------------------------------------

    def failing_together(self, doing: Callable[[], Doing] | None = None) -> AbstractContextManager[None]:
        """Where one process raises within, all others raise. ``doing``: what is done within, for all to compare."""
        return nullcontext()

    def measuring_together(
        self, call: str, model: nn.Module, trainable: Gradients, **settings: Any
    ) -> AbstractContextManager[None]:
        """:meth:`failing_together` for a measurement: all processes make the same ``call`` with the same ``settings``,
        and have the buffers of rank 0 within."""
        return nullcontext()

    def begin(self, model: nn.Module) -> None:
        """Comes first in a step: whether the model can still be stepped in this world.

        Raises:
            ValueError: the model has been put into a ``DistributedDataParallel`` since.
        """
        check_alone(model)

    def part_of(self, examples: int | None) -> int | None:
        """How many examples this process takes where all together take so many; None: all that it has."""
        return examples

    # ---- the parts of a step -----------------------------------------------------------------------------------------

    def share(self, counts: Counts, key: Tensor | None) -> Share:
        """The share of this process in the batch. The ``key`` of the labels becomes that of rank 0, in place."""
        return Share(1.0, 1.0, 0, counts.penalised(), counts.examples, counts.part())

    def loss_weight(self, count: Callable[[], float]) -> float:
        """The weight of a mean over ``count()`` rows of this process in the mean over the rows of all."""
        return 1.0

    def differentiate(self, loss: Tensor, sources: Sequence[Tensor], retain_graph: bool) -> Sequence[Tensor | None]:
        """∂loss/∂source; None where a source is not used."""
        return autograd_gradients(loss, sources, retain_graph)

    def sum_gradients(self, trainable: Gradients, *gradients: Gradients) -> list[Gradients]:
        """Each of ``gradients`` summed over the processes."""
        return list(gradients)

    def at_end(self, trainable: Gradients, total: Gradients) -> Gradients:
        """The gradient as the optimiser gets it, from ``total``, that of a step with its sums done."""
        return total

    # ---- a term for a loop that reduces gradients itself -------------------------------------------------------------

    def after_forward(self, model: nn.Module) -> None:
        """Has the model's parameters where a gradient in them belongs, after a forward of the caller's."""

    def begin_term(self, model: nn.Module) -> None:
        """:meth:`begin` of a term, whose forward has been. Raises ValueError as that does."""
        self.begin(model)

    def own_reduction(self, model: nn.Module) -> AbstractContextManager[None]:
        """Within, gradients are reduced for R alone, whatever the caller's loop has left to reduce later."""
        return nullcontext()

    def any_counts(self, mine: bool) -> bool:
        """Whether R is of something: whether a row counts, here (``mine``) or in a process that shares the batch.

        All processes come here, also where R is not taken: one that failed is then known of.
        """
        return mine

    def for_mean(self, part: Gradients) -> Gradients:
        """What each process has to add to its gradient for the mean over the processes, which the caller's loop takes,
        to have the sum of the ``part`` of each."""
        return part

    # ---- norms and sums ----------------------------------------------------------------------------------------------

    def squared_norm(self, x: Tensor, in_parameters: bool) -> Tensor:
        """The squared norm of a gradient of all processes, from ``x``, that of what this process holds of it.

        ``in_parameters``: the gradient is one in the parameters, after :meth:`sum_gradients`; else it is one in the
        inputs, of which each process has its own examples.
        """
        return x

    def total(self, x: Tensor) -> Tensor:
        """A scalar summed over the processes."""
        return x

    def share_buffers(self, model: nn.Module) -> None:
        """Gives all processes the buffers of rank 0."""

    # ---- the parts of a measurement ----------------------------------------------------------------------------------

    def gather(self, x: Tensor) -> Tensor:
        """The vectors of all processes one after the other, by rank. Lengths may differ, the dtype not."""
        return x

    def aligned(self, batches: Iterable[T]) -> Iterator[T | None]:
        """The batches, then None as long as another process has more: all take part in each exchange."""
        return iter(batches)

    def share_key(self, key: Tensor, rows: int) -> tuple[Tensor, int, int]:
        """The key of rank 0 (on the device of ``key``), the number of this process's first row among those of all, and
        how many rows all have; ``rows``: how many this one has."""
        return key, 0, rows


def check_alone(model: nn.Module) -> None:
    """Raises ValueError where a model that is to be this process's alone is within a ``DistributedDataParallel``."""
    check_not_within(
        model,
        "gradients and traces would be of the examples of this process alone; pass that, or process_group=, or for the "
        "value of this process alone copy.deepcopy of the module",
    )
