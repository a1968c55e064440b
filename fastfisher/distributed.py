"""Several processes that share a batch: what they tell and send each other for the penalty and the traces.

``DistributedDataParallel`` keeps all parameters in each process and ``fully_shard`` a part of them (FSDP2). Either way
the batch of a step is that of all processes, those of the lower ranks first, and a mean over it weighs each process by
its rows. docs/distributed.md has the algebra and what each step costs.

Before every message that carries data the processes tell each other in a small one that they got so far. One that
fails tells that instead, so that all of them raise and none waits.
"""

from __future__ import annotations

import functools
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastfisher import ops
from fastfisher.model import call_model
from fastfisher.penalty import FiniteDifference, autograd_gradients

Gradients = dict[str, Tensor]
T = TypeVar("T")

TIMEOUT = 600.0
"""Seconds that a process waits for the others to get as far as it did."""

_NUMBERS = 8
"""How many integers a process tells the others, besides whether it failed."""


class RankFailure(RuntimeError):
    """Another process failed, ended, or did not get as far in time."""


@dataclass(frozen=True)
class Share:
    """What one process has of a batch.

    Attributes:
        loss: the weight of its mean training loss in that of the batch.
        penalised: likewise of the loss whose gradient is penalised.
        first: the number of its first penalised row among those of the batch.
        rows: how many penalised rows of the batch count.
        examples: how many penalised examples the batch has.
        fraction: the penalised examples over all of the batch.
        key: what labels are drawn with, (seed, offset).
    """

    loss: float
    penalised: float
    first: int
    rows: int
    examples: int
    fraction: float
    key: list[int]


class Ranks:
    """The processes of a group, each with all parameters.

    Args:
        group: the group that gradients are summed in; the default one where None.
        timeout: seconds that a process waits for the others to get as far. The sums themselves, which start when
            all are there, are bounded by the group's own timeout.

    All of the group have to construct it: it makes a group of its own, by gloo, for what they tell each other.
    """

    difference: type[FiniteDifference] = FiniteDifference
    sharded = False

    def __init__(self, group: dist.ProcessGroup | None, timeout: float) -> None:
        self.group, self.timeout = group, timeout
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        members = dist.get_process_group_ranks(group)
        self.root = members[0]
        self._depth = 0
        self._telling: Any = dist.new_group(
            members, timeout=timedelta(seconds=timeout), backend="gloo", use_local_synchronization=True
        )

    # ---- what processes tell each other ------------------------------------------------------------------------------

    def agree(self, *numbers: int) -> list[list[int]]:
        """At most 8 integers of each process, by rank: 72 bytes from each to each.

        Raises:
            RankFailure: a process failed, ended, or did not come within the timeout.
        """
        told = self._tell([0, *numbers])
        failed = [rank for rank, (failure, *_) in enumerate(told) if failure]
        if failed:
            raise RankFailure(f"rank {', '.join(map(str, failed))} failed in this step: its own error says why")
        return [given[1:] for given in told]

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """An exception within ends the step of the others with a :class:`RankFailure`, and passes on here."""
        self._depth += 1
        try:
            yield
        except RankFailure:
            raise
        except BaseException:
            if self._depth == 1:  # told once, by the outermost
                with suppress(RankFailure):
                    self._tell([1])
            raise
        finally:
            self._depth -= 1

    def _tell(self, numbers: Sequence[int]) -> list[list[int]]:
        mine = torch.tensor([*numbers, *[0] * (1 + _NUMBERS - len(numbers))], dtype=torch.int64)
        told = [torch.empty_like(mine) for _ in range(self.size)]
        with self._reaching("a message"):
            dist.all_gather(told, mine, group=self._telling)
        return [given.tolist() for given in told]

    @contextmanager
    def _reaching(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RankFailure(
                f"rank {self.rank} had no {what} from the others: one of them ended, or did not come within "
                f"{self.timeout:g} s (timeout)"
            ) from error

    # ---- the parts of a step -----------------------------------------------------------------------------------------

    def share(
        self, *, loss: int, penalised: int, rows: int, examples: int, batch: int, key: list[int], weight: float
    ) -> Share:
        """What this process has of the batch, from the counts of each; all take the key of rank 0.

        Raises:
            ValueError: the gradient is to be multiplied by another ``weight`` in another process; in all of them.
        """
        told = self.agree(_bits(weight), loss, penalised, rows, examples, batch, *key)
        _check_weights(told)
        losses, weights, row_counts, example_counts, batches = ([process[i] for process in told] for i in range(1, 6))
        return Share(
            loss=self.weight(loss, sum(losses)),
            penalised=self.weight(penalised, sum(weights)),
            first=sum(row_counts[: self.rank]),
            rows=sum(weights),
            examples=sum(example_counts),
            fraction=sum(example_counts) / max(1, sum(batches)),
            key=told[0][-2:],
        )

    def loss_weight(self, count: int, weight: float) -> float:
        """The weight of a mean over ``count`` rows of this process in that over the rows of all.

        Raises:
            ValueError: see :meth:`share`.
        """
        told = self.agree(_bits(weight), count)
        _check_weights(told)
        return self.weight(count, sum(numbers[1] for numbers in told))

    def weight(self, mine: int, all_of_them: int) -> float:
        """What a mean of this process is multiplied by for gradients that :meth:`sum_gradients` gets."""
        return mine / max(1, all_of_them)

    def differentiate(self, loss: Tensor, sources: Sequence[Tensor], retain_graph: bool) -> Sequence[Tensor | None]:
        """∂loss/∂source, of this process alone; None where a source is not used."""
        return autograd_gradients(loss, sources, retain_graph)

    def sum_gradients(self, trainable: Gradients, *gradients: Gradients) -> list[Gradients]:
        """Each of ``gradients`` summed over the processes, in one message of a flat buffer for each dtype.

        A parameter that no process used stays absent; what one process alone did not use counts as 0 there.
        """
        names = [[name for name in trainable if name in named] for named in gradients]
        layout = zlib.crc32("\n".join(",".join(used) for used in names).encode())
        if any(other[0] != layout for other in self.agree(layout)):
            used = torch.tensor([[float(name in named) for name in trainable] for named in gradients])
            (used,) = self._sum([used], self._telling)
            names = [[name for name, by in zip(trainable, row, strict=True) if by > 0] for row in used.tolist()]
        flat = [
            named[name] if name in named else torch.zeros_like(trainable[name])
            for named, present in zip(gradients, names, strict=True)
            for name in present
        ]
        summed = iter(self._sum(flat, self.group))
        return [{name: next(summed) for name in present} for present in names]

    def mean_gradients(self, trainable: Gradients, gradients: Gradients) -> Gradients:
        """The mean over the processes, one weight each."""
        (summed,) = self.sum_gradients(trainable, gradients)
        torch._foreach_div_(list(summed.values()), float(self.size))
        return summed

    def total(self, x: Tensor) -> Tensor:
        """A scalar summed over the processes."""
        self.agree()
        return self._sum([x.reshape(1)], self.group)[0].view(())

    def gather(self, x: Tensor) -> Tensor:
        """The vectors of all processes, of any lengths and one dtype, by rank."""
        lengths = [numbers[0] for numbers in self.agree(len(x))]
        padded = x.new_zeros(max(lengths))
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in lengths]
        with self._reaching("part of a vector"):
            dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    def aligned(self, batches: Iterable[T]) -> Iterator[T | None]:
        """The batches, and then None for as long as another process has more."""
        left = iter(batches)
        while True:
            batch = next(left, None)
            if not any(numbers[0] for numbers in self.agree(int(batch is not None))):
                return
            yield batch

    def share_key(self, key: Tensor, rows: int) -> tuple[Tensor, int]:
        """The key of rank 0, on the device of ``key``, and the number of this process's first row."""
        told = self.agree(rows, *key.tolist())
        return torch.tensor(told[0][1:3], device=key.device), sum(numbers[0] for numbers in told[: self.rank])

    def share_buffers(self, model: nn.Module) -> None:
        """The buffers of rank 0 everywhere, in one message for each dtype: as DDP has it before a forward."""
        for buffers in _by_kind(list(model.buffers())).values():
            flat = torch.cat([buffer.reshape(-1) for _, buffer in buffers])
            with self._reaching("buffers"):
                dist.broadcast(flat, self.root, group=self.group)
            parts = torch.split(flat, [buffer.numel() for _, buffer in buffers])
            for (_, buffer), part in zip(buffers, parts, strict=True):
                buffer.copy_(part.view_as(buffer))

    def _sum(self, tensors: list[Tensor], group: Any) -> list[Tensor]:
        """Views of flat buffers of sums."""
        out = list(tensors)
        for alike in _by_kind(tensors).values():
            flat = torch.cat([x.reshape(-1) for _, x in alike])
            with self._reaching("sum"):
                dist.all_reduce(flat, group=group)
            parts = torch.split(flat, [x.numel() for _, x in alike])
            for (position, x), part in zip(alike, parts, strict=True):
                out[position] = part.view(x.shape)
        return out


def _bits(x: float) -> int:
    """The bits of a float64 as an integer."""
    bits: int = struct.unpack("q", struct.pack("d", x))[0]
    return bits


def _check_weights(told: list[list[int]]) -> None:
    """Raises ValueError where the processes do not begin with the same float64."""
    weights = [struct.unpack("d", struct.pack("q", numbers[0]))[0] for numbers in told]
    if len(set(weights)) > 1:
        raise ValueError(f"weight: expected the same in each process, got {', '.join(map(str, weights))} by rank")


def _by_kind(tensors: list[Tensor]) -> dict[tuple[torch.dtype, torch.device], list[tuple[int, Tensor]]]:
    """The tensors with their positions, by dtype and device."""
    kinds: dict[tuple[torch.dtype, torch.device], list[tuple[int, Tensor]]] = {}
    for position, x in enumerate(tensors):
        kinds.setdefault((x.dtype, x.device), []).append((position, x))
    return kinds


@contextmanager
def failing_together(ranks: Ranks | None) -> Iterator[None]:
    """:meth:`Ranks.failing_together`, where there is more than this process."""
    if ranks is None:
        yield
    else:
        with ranks.failing_together():
            yield


# ---- parameters in shards --------------------------------------------------------------------------------------------


class ShardedDifference(FiniteDifference):
    """The gradient at θ + ρd where each process has a part of θ.

    ``functional_call`` cannot serve: the forward gathers the parameters from the shards itself. So the shards are
    shifted in place, and put back from copies whatever is raised in between.
    """

    def mixed_gradient(self, weight: float, loss: Callable[[Tensor], Tensor]) -> Gradients:
        """See :meth:`FiniteDifference.mixed_gradient`."""
        rho = self.rho()
        coefficient = weight * self.coefficient(rho)
        found = self._gradient_there(rho, coefficient, loss)
        for name, gradient in self.gradient.items():
            _local(found[name]).addcmul_(_local(gradient), -coefficient.to(gradient.dtype))
        return found

    def _norm(self, named: Gradients) -> Tensor:
        return super()._norm({name: _local(x) for name, x in named.items()})

    def _size(self, whole: bool) -> Tensor:
        return self.norm if whole else self._norm(self.gradient)

    def add_to(self, out: Gradients, weight: float | Tensor) -> Tensor:
        """See :meth:`FiniteDifference.add_to`; the step is as long in all processes, whatever one of them meets."""
        rho = self.rho()
        scale = weight * self.coefficient(rho)
        squared = self._add(out, rho, scale)
        if self.settings.difference == "central":
            self._add(out, -rho, -scale)
        return torch.where(self.norm > 0, squared.sqrt() / self.size, torch.nan)

    def _add(self, out: Gradients, rho: Tensor, scale: Tensor) -> Tensor:
        found = self._gradient_there(rho)
        mine, there, here = ([_local(named[name]) for name in self.gradient] for named in (out, found, self.gradient))
        assert self.total is not None
        return self.total(ops.axpy_diff(mine, there, here, scale))

    def _gradient_there(
        self, rho: Tensor, weight: Tensor | None = None, loss: Callable[[Tensor], Tensor] | None = None
    ) -> Gradients:
        """The gradient of the loss of :meth:`FiniteDifference.shifted_loss`, 0 for a parameter not used there."""
        length = self.length(rho)
        leaves = {name: self.parameters[name] for name in self.gradient}
        with self._shifted(length):
            there = self.loss_of(lambda: call_model(self.model, self.shifted_inputs(length)), weight, loss)
            found = _backward(there, list(leaves.values()), False)
        return {
            name: torch.zeros_like(leaf, requires_grad=False) if g is None else g
            for (name, leaf), g in zip(leaves.items(), found, strict=True)
        }

    @contextmanager
    def _shifted(self, length: Tensor) -> Iterator[None]:
        """Within, the parameters are at θ + ρd; they and the buffers are as before afterwards."""
        shifts = self.direction if self.settings.wrt == "parameters" else {}
        shards = {name: _local(self.parameters[name]) for name in shifts}
        buffers = dict(self.model.named_buffers())
        before = [(x, x.clone()) for x in (*shards.values(), *buffers.values())]
        try:
            with torch.no_grad():
                for name, buffer in self.gates.buffers.items():  # as the forward at θ found them
                    buffers[name].copy_(buffer)
                for name, shard in shards.items():
                    shard.addcmul_(_local(shifts[name]), length.to(shard.dtype))
            yield
        finally:
            reshard(self.model)  # what was gathered is of the shifted shards
            with torch.no_grad():
                for x, kept in before:
                    x.copy_(kept)


class Shards(Ranks):
    """The processes of a group, each with a part of every parameter (``fully_shard``).

    Gradients are summed and scattered by the backward itself, which takes the mean over the processes; what is left to
    sum here are squares.
    """

    difference: type[FiniteDifference] = ShardedDifference
    sharded = True

    def weight(self, mine: int, all_of_them: int) -> float:
        """See :meth:`Ranks.weight`; the backward divides by the number of processes."""
        return self.size * super().weight(mine, all_of_them)

    def differentiate(self, loss: Tensor, sources: Sequence[Tensor], retain_graph: bool) -> Sequence[Tensor | None]:
        """∂loss/∂source: of a parameter the shard of the sum over the processes, of an input its own."""
        found = _backward(loss, sources, retain_graph)
        return [g if g is None or is_shard(g) else g / self.size for g in found]

    def sum_gradients(self, trainable: Gradients, *gradients: Gradients) -> list[Gradients]:
        """The gradients as they are: the backward has summed them."""
        self.agree()
        return list(gradients)


# The modules of fully_shard take long to import, and who has no sharded model has not imported them.


def is_shard(x: Tensor) -> bool:
    """Whether a tensor is spread over processes."""
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def _local(x: Tensor) -> Tensor:
    """This process's part, in the same memory."""
    return x.detach().to_local() if is_shard(x) else x  # type: ignore[attr-defined]


def _backward(loss: Tensor, sources: Sequence[Tensor], retain_graph: bool) -> list[Tensor | None]:
    """∂loss/∂source by a backward, which the hooks of ``fully_shard`` need; every ``.grad`` is put back."""
    before = [source.grad for source in sources]
    for source in sources:
        source.grad = None
    try:
        loss.backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]
        return [source.grad for source in sources]
    finally:
        for source, grad in zip(sources, before, strict=True):
            source.grad = grad


def reshard(model: nn.Module) -> None:
    """Lets go of gathered parameters: the model's own are the shards again."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


# ---- which processes a model is shared by ----------------------------------------------------------------------------


def precision_below(model: nn.Module) -> torch.dtype | None:
    """The dtype in which ``fully_shard`` gathers parameters, where it is not their own."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            dtype: torch.dtype | None = module._get_fsdp_state()._mp_policy.param_dtype
            if dtype is not None and any(p.dtype != dtype for p in module.parameters()):
                return dtype
    return None


def is_sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to a part of the model."""
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def bare(model: nn.Module) -> nn.Module:
    """The module within ``DistributedDataParallel``; any other model itself."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def ranks_of(model: nn.Module, process_group: dist.ProcessGroup | None, timeout: float = TIMEOUT) -> Ranks | None:
    """The processes that share a model and its batches; None where it is alone.

    Those of ``process_group``, else those of ``DistributedDataParallel`` or ``fully_shard`` around the model.

    Raises:
        ValueError: ``timeout`` is no positive number, ``process_group`` is given without torch.distributed, or
            parameters are not all sharded over one dimension of processes.
    """
    if not timeout > 0:
        raise ValueError(f"timeout: expected a number of seconds > 0, got {timeout!r}")
    if not (dist.is_available() and dist.is_initialized()):
        if process_group is not None:
            raise ValueError("process_group: expected None, as torch.distributed is not initialised")
        return None
    if is_sharded(model):
        meshes = {getattr(p, "device_mesh", None) for p in model.parameters()}
        (mesh, *more) = meshes
        if more or mesh is None or mesh.ndim != 1:
            raise ValueError(
                "model: expected every parameter sharded over the same processes in one dimension (fully_shard of the "
                f"whole model), got the meshes {sorted(map(str, meshes))}"
            )
        return _joined(Shards, process_group or mesh.get_group(), timeout)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return _joined(Ranks, process_group or model.process_group, timeout)
    return None if process_group is None else _joined(Ranks, process_group, timeout)


@functools.lru_cache(maxsize=16)
def _joined(kind: type[Ranks], group: dist.ProcessGroup, timeout: float) -> Ranks:
    """One object, and one group of its own, for all that a group shares."""
    return kind(group, timeout)
