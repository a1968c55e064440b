"""Several processes, of which each penalises the gradient of its own part of the batch (``scope="local"``)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import nn

from fastfisher.distributed.messages import Doing, Gradients
from fastfisher.distributed.replicated import Replicated
from fastfisher.distributed.single import Single


class Local(Single):
    """Each process takes a step as if it were alone; at its end the gradients are averaged over the processes."""

    alone = False

    def __init__(self, others: Replicated) -> None:
        self.others = others
        self.rank, self.size = others.rank, others.size

    def failing_together(self, doing: Callable[[], Doing] | None = None) -> AbstractContextManager[None]:
        """See :meth:`Single.failing_together`."""
        return self.others.failing_together(doing)

    def begin(self, model: nn.Module) -> None:
        """See :meth:`Single.begin`."""
        self.others.begin(model)

    def any_counts(self, mine: bool) -> bool:
        """See :meth:`Single.any_counts`: each process has an R of its own."""
        self.others.any_counts(mine)
        return mine

    def at_end(self, trainable: Gradients, total: Gradients) -> Gradients:
        """See :meth:`Single.at_end`: the mean over the processes, which all count the same."""
        (summed,) = self.others.sum_gradients(trainable, total)
        torch._foreach_div_(list(summed.values()), float(self.size))
        return summed

    def share_buffers(self, model: nn.Module) -> None:
        """See :meth:`Single.share_buffers`."""
        self.others.share_buffers(model)
