"""The processes that measure one model together; one process is a world of one, in which all of this does nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from fastfisher.distributed.ranks import Ranks, measuring_together, shared_by

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


class World:
    """A process alone."""

    size, alone = 1, True
    group: ProcessGroup | None = None

    def measuring_together(
        self, call: str, model: nn.Module, trainable: dict[str, Tensor], **settings: Any
    ) -> AbstractContextManager[None]:
        """An exception within ends the measurement of the others, too; they compare what they measure."""
        return nullcontext()

    def gather(self, x: Tensor) -> Tensor:
        """The vectors of all processes, of any lengths and one dtype, by rank."""
        return x

    def aligned(self, batches: Iterable[T]) -> Iterator[T | None]:
        """The batches, and then None for as long as another process has more."""
        return iter(batches)

    def share_key(self, key: Tensor, rows: int) -> tuple[Tensor, int, int]:
        """The key of rank 0, on the device of ``key``, the number of this process's first row, and the rows of all."""
        return key, 0, rows


ALONE = World()


class _Several(World):
    """Several processes."""

    alone = False

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.size, self.group = ranks, ranks.size, ranks.group
        self.gather, self.share_key = ranks.gather, ranks.share_key  # type: ignore[method-assign]

    def measuring_together(
        self, call: str, model: nn.Module, trainable: dict[str, Tensor], **settings: Any
    ) -> AbstractContextManager[None]:
        return measuring_together(self.ranks, call, model, trainable, **settings)

    def aligned(self, batches: Iterable[T]) -> Iterator[T | None]:
        return self.ranks.aligned(batches)


def whole_model(model: nn.Module, process_group: ProcessGroup | None) -> tuple[World, nn.Module]:
    """The processes that share the data, and the module that each of them has.

    Raises:
        ValueError: a process has only a part of the parameters.
    """
    shared = shared_by(model, process_group)
    if shared.ranks is not None and shared.ranks.sharded:
        raise ValueError("model: expected all parameters in each process, got a model sharded by fully_shard")
    return ALONE if shared.ranks is None else _Several(shared.ranks), shared.module
