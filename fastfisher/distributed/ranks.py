"""The measurements' view of several processes, until they are written for a world."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastfisher.distributed import sharing
from fastfisher.distributed.messages import RankFailure as RankFailure
from fastfisher.distributed.messages import digest as digest
from fastfisher.distributed.replicated import Replicated

Ranks = Replicated


@dataclass(frozen=True)
class Shared:
    """A model and the processes that share it."""

    ranks: Ranks | None
    module: nn.Module


def shared_by(model: nn.Module, process_group: Any) -> Shared:
    """See :func:`sharing.shared_by`."""
    found = sharing.shared_by(model, process_group)
    return Shared(found.world if isinstance(found.world, Ranks) else None, found.module)


def measuring_together(
    ranks: Ranks | None, call: str, model: nn.Module, trainable: Any, **settings: Any
) -> AbstractContextManager[None]:
    """See :meth:`Single.measuring_together`."""
    return nullcontext() if ranks is None else ranks.measuring_together(call, model, trainable, **settings)
