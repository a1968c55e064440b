"""One process alone: the world that every step and measurement is written for.

What several processes do more, they do in methods of the same names (``replicated.py``, ``sharded.py``, ``local.py``).
Here each of them does nothing, so that nothing else has to ask whether there are others.
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
    """What a process has of a batch. Where a GPU would have to be waited for, it is a function, for those who need it.

    Attributes:
        loss: how much its mean training loss counts: by rows of logits, or by examples where the loss is a callable.
        penalised: over how many rows the loss is a mean whose gradient is penalised.
        rows: how many rows of logits these are taken from.
        counted: how many of them count: not those whose target is −100; a tensor where that is not known here.
        examples: how many examples they are of.
        batch: how many examples the batch has.
        part: how much the penalised rows are of all rows of the batch.
        first_only: whether only the very first example of all processes is penalised.
    """

    loss: Callable[[], int]
    penalised: Callable[[], int]
    rows: int
    counted: Callable[[], int | Tensor]
    examples: int
    batch: int
    part: Callable[[], float | Tensor]
    first_only: bool


@dataclass(frozen=True)
class Share:
    """What one process has of the batch of all.

    Attributes:
        loss: the weight of its mean training loss in that of the batch.
        penalised: likewise of the loss whose gradient is penalised.
        first: the number of its first penalised row among those of the batch.
        rows: how many penalised rows of the batch count.
        examples: how many penalised examples the batch has.
        fraction: what is penalised over all of the batch.
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
        shares: whether R is of the batch of all processes.
    """

    rank, size = 0, 1
    group: ProcessGroup | None = None
    sharded, alone, shares = False, True, False

    # ---- a call of all ----------------------------------------------------------------------------------------------

    def failing_together(self, doing: Callable[[], Doing] | None = None) -> AbstractContextManager[None]:
        """An exception within ends the step of the others, too. ``doing``: what is done within, which all compare."""
        return nullcontext()

    def measuring_together(
        self, call: str, model: nn.Module, trainable: Gradients, **settings: Any
    ) -> AbstractContextManager[None]:
        """For a measurement, :meth:`failing_together`: of one network, with rank 0's buffers, by one call of all."""
        return nullcontext()

    def begin(self, model: nn.Module) -> None:
        """What a step begins with.

        Raises:
            ValueError: the model has got into a ``DistributedDataParallel`` since.
        """
        check_alone(model)

    def part_of(self, examples: int | None) -> int | None:
        """How many of so many examples of the batch of all are this process's; None where all are meant."""
        return examples

    # ---- the parts of a step -----------------------------------------------------------------------------------------

    def share(self, counts: Counts, key: Tensor | None) -> Share:
        """What this process has of the batch; the ``key`` of the labels becomes that of rank 0, in place."""
        return Share(1.0, 1.0, 0, counts.counted(), counts.examples, counts.part())

    def loss_weight(self, count: Callable[[], int]) -> float:
        """The weight of a mean over ``count()`` rows of this process in that over the rows of all."""
        return 1.0

    def differentiate(self, loss: Tensor, sources: Sequence[Tensor], retain_graph: bool) -> Sequence[Tensor | None]:
        """∂loss/∂source; None where a source is not used."""
        return autograd_gradients(loss, sources, retain_graph)

    def sum_gradients(self, trainable: Gradients, *gradients: Gradients) -> list[Gradients]:
        """Each of ``gradients`` summed over the processes."""
        return list(gradients)

    def finished(self, trainable: Gradients, total: Gradients) -> Gradients:
        """The gradient of a step, summed by the step itself, as the optimiser gets it."""
        return total

    def square(self, x: Tensor, in_parameters: bool) -> Tensor:
        """A sum of squares of a gradient that :meth:`sum_gradients` has summed where it is ``in_parameters``; one in
        the inputs is each process's own, and added up here."""
        return x

    def total(self, x: Tensor) -> Tensor:
        """A scalar summed over the processes."""
        return x

    def share_buffers(self, model: nn.Module) -> None:
        """The buffers of rank 0 everywhere."""

    # ---- the parts of a measurement ----------------------------------------------------------------------------------

    def gather(self, x: Tensor) -> Tensor:
        """The vectors of all processes, of any lengths and one dtype, by rank."""
        return x

    def aligned(self, batches: Iterable[T]) -> Iterator[T | None]:
        """The batches, and then None for as long as another process has more."""
        return iter(batches)

    def share_key(self, key: Tensor, rows: int) -> tuple[Tensor, int, int]:
        """The key of rank 0, on the device of ``key``, the number of this process's first row, and the rows of all."""
        return key, 0, rows


def check_alone(model: nn.Module) -> None:
    """Raises ValueError where a model that is shared by no processes is within a ``DistributedDataParallel``."""
    check_not_within(
        model,
        "gradients and traces would be of the examples of this process alone; pass that, or process_group=, or for the "
        "value of this process alone copy.deepcopy of the module",
    )
