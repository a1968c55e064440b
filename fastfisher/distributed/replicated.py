"""Several processes, each with all parameters (``DistributedDataParallel``, or a process group alone)."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastfisher.distributed.messages import Doing, Gradients, Telling, by_kind
from fastfisher.distributed.single import Counts, Share, Single

T = TypeVar("T")

_FINE = 1 << 24
"""Messages are of integers, and what a mean divides by may be a sum of class weights: it is told in such parts of 1."""


class Replicated(Telling, Single):
    """The processes of a group, each with all parameters: gradients are summed by messages.

    The batch of a step is that of all processes, those of the lower ranks first, and a mean over it weighs each process
    by its rows. docs/distributed.md has the algebra and what each step costs.
    """

    group: dist.ProcessGroup
    alone, shares = False, True

    @contextmanager
    def measuring_together(self, call: str, model: nn.Module, trainable: Gradients, **settings: Any) -> Iterator[None]:
        """See :meth:`Single.measuring_together`; each process has its own buffers back afterwards."""
        with self.failing_together(lambda: Doing.of(trainable, call=call, **settings)):
            self.agree("the beginning")
            before = [(buffer, buffer.clone()) for buffer in model.buffers()]
            try:
                with torch.no_grad():
                    self.share_buffers(model)
                yield
            finally:
                with torch.no_grad():
                    for buffer, kept in before:
                        buffer.copy_(kept)

    def begin(self, model: nn.Module) -> None:
        """See :meth:`Single.begin`."""

    def part_of(self, examples: int | None) -> int | None:
        """See :meth:`Single.part_of`: an even part, one more in the lower ranks where the rest asks for it."""
        return None if examples is None else examples // self.size + (self.rank < examples % self.size)

    # ---- the parts of a step -----------------------------------------------------------------------------------------

    def share(self, counts: Counts, key: Tensor | None) -> Share:
        """See :meth:`Single.share`: from the counts of each process."""
        has = not counts.first_only or self.rank == 0
        mine = (_fine(counts.penalised()), counts.rows, counts.examples) if has else (0, 0, 0)
        drawn = [0, 0] if key is None else key.tolist()
        told = self.agree("the shares of a batch", _fine(counts.loss()), *mine, counts.batch, *drawn)
        losses, weights, rows, examples, batches = ([process[i] for process in told] for i in range(5))
        if key is not None:
            key.copy_(torch.tensor(told[0][-2:]))
        return Share(
            loss=self.weight(losses[self.rank], sum(losses)),
            penalised=self.weight(weights[self.rank], sum(weights)),
            first=sum(rows[: self.rank]),
            rows=sum(weights) // _FINE,
            examples=sum(examples),
            fraction=1.0 if counts.first_only else sum(examples) / max(1, sum(batches)),
        )

    def loss_weight(self, count: Callable[[], float]) -> float:
        """See :meth:`Single.loss_weight`."""
        mine = _fine(count())
        told = self.agree("the rows of a loss", mine)
        return self.weight(mine, sum(numbers[0] for numbers in told))

    def weight(self, mine: int, all_of_them: int) -> float:
        """The factor of a mean over ``mine`` rows with which :meth:`sum_gradients` gives the gradient of the mean of
        all."""
        return mine / max(1, all_of_them)

    def squared_norm(self, x: Tensor, in_parameters: bool) -> Tensor:
        """See :meth:`Single.squared_norm`."""
        return x if in_parameters else self.total(x)

    def sum_gradients(self, trainable: Gradients, *gradients: Gradients) -> list[Gradients]:
        """Each of ``gradients`` summed over the processes, in one message of a flat buffer for each dtype.

        A parameter that no process used stays absent; what one process alone did not use counts as 0 there.
        """
        names = [[name for name in trainable if name in named] for named in gradients]
        layout = zlib.crc32("\n".join(",".join(used) for used in names).encode())
        if any(other[0] != layout for other in self.agree("gradients", layout)):  # other parameters were used elsewhere
            used = torch.tensor([[int(name in named) for name in trainable] for named in gradients])
            by = torch.stack(self._gather(used)).sum(0)
            names = [[name for name, ranks in zip(trainable, row, strict=True) if ranks] for row in by.tolist()]
        flat = [
            named[name] if name in named else torch.zeros_like(trainable[name])
            for named, present in zip(gradients, names, strict=True)
            for name in present
        ]
        summed = iter(self._sum(flat))
        return [{name: next(summed) for name in present} for present in names]

    def any_counts(self, mine: bool) -> bool:
        """See :meth:`Single.any_counts`."""
        return any(numbers[0] for numbers in self.agree("whether a row counts", int(mine)))

    def for_mean(self, part: Gradients) -> Gradients:
        """See :meth:`Single.for_mean`."""
        torch._foreach_mul_(list(part.values()), float(self.size))
        return part

    def total(self, x: Tensor) -> Tensor:
        """See :meth:`Single.total`."""
        self.agree("a total")
        return self._sum([x.reshape(1)])[0].view(())

    def gather(self, x: Tensor) -> Tensor:
        """See :meth:`Single.gather`."""
        lengths = [numbers[0] for numbers in self.agree("the length of a vector", len(x))]
        padded = x.new_zeros(max(lengths))
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in lengths]
        with self._reaching("part of a vector"):
            dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    def aligned(self, batches: Iterable[T]) -> Iterator[T | None]:
        """See :meth:`Single.aligned`."""
        left = iter(batches)
        while True:
            batch = next(left, None)
            if not any(numbers[0] for numbers in self.agree("whether there is a batch", int(batch is not None))):
                return
            yield batch

    def share_key(self, key: Tensor, rows: int) -> tuple[Tensor, int, int]:
        """See :meth:`Single.share_key`."""
        told = self.agree("a key", rows, *key.tolist())
        counts = [numbers[0] for numbers in told]
        return torch.tensor(told[0][1:3], device=key.device), sum(counts[: self.rank]), sum(counts)

    def share_buffers(self, model: nn.Module) -> None:
        """See :meth:`Single.share_buffers`: as DDP does before a forward, by one broadcast for each dtype."""
        for buffers in by_kind(list(model.buffers())).values():
            flat = torch.cat([buffer.reshape(-1) for _, buffer in buffers])
            with self._reaching("buffers"):
                dist.broadcast(flat, self.root, group=self.group)
            parts = torch.split(flat, [buffer.numel() for _, buffer in buffers])
            for (_, buffer), part in zip(buffers, parts, strict=True):
                buffer.copy_(part.view_as(buffer))

    def _sum(self, tensors: list[Tensor]) -> list[Tensor]:
        """Each tensor summed over the processes, by one all-reduce for each dtype; the sums are views of its buffer."""
        out = list(tensors)
        for alike in by_kind(tensors).values():
            flat = torch.cat([x.reshape(-1) for _, x in alike])
            with self._reaching("sum"):
                dist.all_reduce(flat, group=self.group)
            parts = torch.split(flat, [x.numel() for _, x in alike])
            for (position, x), part in zip(alike, parts, strict=True):
                out[position] = part.view(x.shape)
        return out


def _fine(count: float | Tensor) -> int:
    return round(float(count) * _FINE)
