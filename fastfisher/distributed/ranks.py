"""Several processes that share a batch: what they tell and send each other for the penalty and the traces.

``DistributedDataParallel`` keeps all parameters in each process and ``fully_shard`` a part of them (FSDP2). Either way
the batch of a step is that of all processes, those of the lower ranks first, and a mean over it weighs each process by
its rows. docs/distributed.md has the algebra and what each step costs.

Before every message that carries data the processes tell each other in a small one that they got so far, and what they
are doing. One that fails tells that instead, and where they do different things all see it: all of them raise and none
waits, and nothing is summed that does not belong together.
"""

from __future__ import annotations

import atexit
import json
import math
import struct
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from time import monotonic
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastfisher import ops
from fastfisher.checks import is_number
from fastfisher.lists import add_
from fastfisher.model import call_model
from fastfisher.penalise.function import FiniteDifference, autograd_gradients
from fastfisher.placement import check_not_within, is_initialised, is_live, is_spread, placement_of, sharding_modules

Gradients = dict[str, Tensor]
T = TypeVar("T")

TIMEOUT = 600.0
"""Seconds that a process waits for the others to get as far as it did."""

_NUMBERS = 7
"""How many integers a process tells the others, besides whether it failed and what it is doing."""

_SAME = 1e-6
"""How much sums of squares may differ between processes, relatively, of what is the same but for rounding."""


class RankFailure(RuntimeError):
    """Another process failed, ended, or did not get as far in time."""


class _OutOfStep(ValueError):
    """The processes do not do the same: all of them know it, or none can be told."""


@dataclass(frozen=True)
class Doing:
    """What a process is doing, which all others have to do too.

    Attributes:
        settings: a call and its arguments by name, as the error message has them.
        parameters: the sum of squares of the parameters; 0 where they are not to be compared.
        gradients: likewise of what is in ``.grad``.
    """

    settings: Mapping[str, object] = field(default_factory=dict)
    parameters: float = 0.0
    gradients: float = 0.0

    @classmethod
    def of(cls, trainable: Gradients, sharded: bool = False, *, compared: bool = True, **settings: Any) -> Doing:
        """``settings`` for the parameters ``trainable``, in shards or whole; ``compared``: these are to be the same."""
        grads = {name: p.grad for name, p in trainable.items() if p.grad is not None}
        everything = {
            **settings,
            "trainable parameters": digest(f"{name}{tuple(p.shape)}" for name, p in trainable.items()),
            ".grad": digest(grads),
        }
        if sharded:
            return cls(everything)
        return cls(everything, _squares(trainable.values()) if compared else 0.0, _squares(grads.values()))


def digest(names: Iterable[str]) -> str:
    """How many names there are, and what tells them from others."""
    each = list(names)
    return f"{len(each)} ({zlib.crc32(chr(10).join(each).encode()):08x})"


def _squares(tensors: Iterable[Tensor]) -> float:
    found = [x.detach().coalesce().values() if x.is_sparse else x.detach() for x in tensors]
    real = [torch.view_as_real(x) if x.is_complex() else x for x in found]
    return float(sum(float(ops.sum_squares([x for _, x in alike])) for alike in _by_kind(real).values()))


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


class _Messages:
    """Small tensors on the CPU from each process of a group to each, by gloo connections of their own.

    These are made at the first message, so that to construct this takes no other process, and anew after a message that
    failed: what did not come in time may still come, and would be taken for the answer to the next. They are no group
    of torch.distributed's, whose names depend on which groups each process has been in.
    """

    def __init__(self, group: dist.ProcessGroup, timeout: float) -> None:
        self.group, self.timeout = group, timeout
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.connections: Any = None

    def gather(self, mine: Tensor) -> list[Tensor]:
        """The tensors of all, by rank; of one shape and dtype."""
        found = [torch.empty_like(mine) for _ in range(self.size)]
        try:
            if self.connections is None:
                self.connections = self._connect()
            self.connections.allgather([found], [mine]).wait()
        except BaseException:
            self.connections = None
            raise
        return found

    def _connect(self) -> Any:
        """Connections to all others, under a name that nobody has used: one that was left half made is never met.

        Each process but the first asks under a random name of its own, and takes no answer but that to this name.
        """
        from torch._C._distributed_c10d import PrefixStore  # absent where torch was built without distributed

        store = PrefixStore("fastfisher", self.group.get_group_store())
        name = uuid.uuid4().hex
        end = monotonic() + self.timeout

        def wait(key: str) -> str:
            store.wait([key], timedelta(seconds=max(0.001, end - monotonic())))
            found: str = store.get(key).decode()
            return found

        if self.rank == 0:
            asked = [wait(f"ask/{rank}") for rank in range(1, self.size)]
            for rank in range(1, self.size):
                store.delete_key(f"ask/{rank}")
            for other in asked:
                store.set(f"answer/{other}", name)
        else:
            store.set(f"ask/{self.rank}", name)
            try:
                name, asked_as = wait(f"answer/{name}"), name
            except BaseException:
                store.delete_key(f"ask/{self.rank}")
                raise
            store.delete_key(f"answer/{asked_as}")
        return dist.ProcessGroupGloo(PrefixStore(name, store), self.rank, self.size, timedelta(seconds=self.timeout))


class Ranks:
    """The processes of a group, each with all parameters.

    Args:
        group: the group that gradients are summed in.
        timeout: seconds that a process waits for the others to get as far. The sums themselves, which start when
            all are there, are bounded by the group's own timeout.
    """

    difference: type[FiniteDifference] = FiniteDifference
    sharded = False

    def __init__(self, group: dist.ProcessGroup, timeout: float) -> None:
        self.group, self.timeout = group, timeout
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.root = dist.get_process_group_ranks(group)[0]
        self._messages = _Messages(group, timeout)
        self._doing = Doing()
        self._depth = 0

    # ---- what processes tell each other ------------------------------------------------------------------------------

    def agree(self, what: str, *numbers: int) -> list[list[int]]:
        """At most 7 integers of each process, by rank: 88 bytes from each to each.

        Args:
            what: the name of the message, which has to be the same for all.
            numbers: the integers.

        Raises:
            RankFailure: a process failed, ended, or did not come within the timeout.
            ValueError: not all are doing the same, or have the same parameters; in all of them.
        """
        told = self._tell(what, numbers)
        failed = [rank for rank, (failure, *_) in enumerate(told) if failure]
        if failed:
            raise RankFailure(f"rank {', '.join(map(str, failed))} failed in this step: its own error says why")
        if len({doing for _, doing, *_ in told}) > 1:
            raise _OutOfStep(self._what_differs(what))
        for position, (name, why) in enumerate(_COMPARED.items(), 2):
            squares = [_from_bits(given[position]) for given in told]
            if not all(
                math.isclose(x, squares[0], rel_tol=_SAME) or (math.isnan(x) and math.isnan(squares[0]))
                for x in squares
            ):
                got = ", ".join(f"{x:.9g}" for x in squares)
                raise _OutOfStep(
                    f"{name}: expected the same in each process, got {got} by rank (sums of squares): {why}"
                )
        return [given[4:] for given in told]

    @contextmanager
    def failing_together(self, doing: Callable[[], Doing] | None = None) -> Iterator[None]:
        """An exception within ends the step of the others with a :class:`RankFailure`, and passes on here.

        Args:
            doing: what is done within, for the others to compare with what they do.
        """
        if not is_live(self.group):
            raise ValueError(
                "process_group: expected a live group, got one that destroy_process_group has ended; make the model's "
                "DistributedDataParallel or fully_shard, and then FisherPenalty, for the new group"
            )
        before = self._doing
        self._depth += 1
        try:
            if doing is not None:
                self._doing = doing()
            yield
        except (RankFailure, _OutOfStep):
            raise
        except BaseException:
            if self._depth == 1:  # told once, by the outermost
                with suppress(RankFailure):
                    self._tell("", failed=True)
            raise
        finally:
            self._depth -= 1
            self._doing = before

    def _tell(self, what: str, numbers: Sequence[int] = (), *, failed: bool = False) -> list[list[int]]:
        doing = zlib.crc32(repr([what, *self._doing.settings.items()]).encode())
        squares = [_bits(self._doing.gradients), _bits(self._doing.parameters)]
        padding = [0] * (_NUMBERS - len(numbers))
        mine = torch.tensor([int(failed), doing, *squares, *numbers, *padding], dtype=torch.int64)
        return [given.tolist() for given in self._gather(mine)]

    def _what_differs(self, what: str) -> str:
        """In words, from what each process is doing."""
        said = {name: str(value) for name, value in self._doing.settings.items()}
        mine = torch.frombuffer(bytearray(json.dumps({**said, "message": what}).encode()), dtype=torch.uint8)
        lengths = [int(length) for length in self._gather(torch.tensor([len(mine)]))]
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(mine)] = mine
        texts = zip(self._gather(padded), lengths, strict=True)
        everyone = [json.loads(bytes(text[:length].tolist())) for text, length in texts]
        names = dict.fromkeys(name for told in everyone for name in told)
        values = {name: [told.get(name, "nothing") for told in everyone] for name in names}
        found = {name: got for name, got in values.items() if len(set(got)) > 1}
        if "call" in found:  # of another call all else is another too
            found = {"call": found["call"]}
        elif len(found) > 1:  # the messages differ because something else does
            found.pop("message", None)
        return "; ".join(
            f"{name}: expected the same in each process, got {', '.join(got)} by rank" for name, got in found.items()
        )

    def _gather(self, mine: Tensor) -> list[Tensor]:
        with self._reaching("a message"):
            return self._messages.gather(mine)

    @contextmanager
    def _reaching(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RankFailure(
                f"rank {self.rank} had no {what} from the others: one of them ended, or did not come within "
                f"{self.timeout:g} s (timeout)"
            ) from error

    def disconnect(self) -> None:
        """Ends the connections for messages; the next message makes new ones."""
        self._messages.connections = None

    def begin(self, model: nn.Module) -> None:
        """What a step begins with."""

    # ---- the parts of a step -----------------------------------------------------------------------------------------

    def share(self, *, loss: int, penalised: int, rows: int, examples: int, batch: int, key: list[int]) -> Share:
        """What this process has of the batch, from the counts of each; all take the key of rank 0."""
        told = self.agree("the shares of a batch", loss, penalised, rows, examples, batch, *key)
        losses, weights, row_counts, example_counts, batches = ([process[i] for process in told] for i in range(5))
        return Share(
            loss=self.weight(loss, sum(losses)),
            penalised=self.weight(penalised, sum(weights)),
            first=sum(row_counts[: self.rank]),
            rows=sum(weights),
            examples=sum(example_counts),
            fraction=sum(example_counts) / max(1, sum(batches)),
            key=told[0][-2:],
        )

    def loss_weight(self, count: int) -> float:
        """The weight of a mean over ``count`` rows of this process in that over the rows of all."""
        told = self.agree("the rows of a loss", count)
        return self.weight(count, sum(numbers[0] for numbers in told))

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
        if any(other[0] != layout for other in self.agree("gradients", layout)):
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

    def mean_gradients(self, trainable: Gradients, gradients: Gradients) -> Gradients:
        """The mean over the processes, one weight each."""
        (summed,) = self.sum_gradients(trainable, gradients)
        torch._foreach_div_(list(summed.values()), float(self.size))
        return summed

    def total(self, x: Tensor) -> Tensor:
        """A scalar summed over the processes."""
        self.agree("a total")
        return self._sum([x.reshape(1)])[0].view(())

    def gather(self, x: Tensor) -> Tensor:
        """The vectors of all processes, of any lengths and one dtype, by rank."""
        lengths = [numbers[0] for numbers in self.agree("the length of a vector", len(x))]
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
            if not any(numbers[0] for numbers in self.agree("whether there is a batch", int(batch is not None))):
                return
            yield batch

    def share_key(self, key: Tensor, rows: int) -> tuple[Tensor, int, int]:
        """The key of rank 0, on the device of ``key``, the number of this process's first row, and the rows of all."""
        told = self.agree("a key", rows, *key.tolist())
        counts = [numbers[0] for numbers in told]
        return torch.tensor(told[0][1:3], device=key.device), sum(counts[: self.rank]), sum(counts)

    def share_buffers(self, model: nn.Module) -> None:
        """The buffers of rank 0 everywhere, in one message for each dtype: as DDP has it before a forward."""
        for buffers in _by_kind(list(model.buffers())).values():
            flat = torch.cat([buffer.reshape(-1) for _, buffer in buffers])
            with self._reaching("buffers"):
                dist.broadcast(flat, self.root, group=self.group)
            parts = torch.split(flat, [buffer.numel() for _, buffer in buffers])
            for (_, buffer), part in zip(buffers, parts, strict=True):
                buffer.copy_(part.view_as(buffer))

    @contextmanager
    def one_network(self, model: nn.Module) -> Iterator[None]:
        """Within, the buffers are those of rank 0 in each process; each has its own back afterwards."""
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

    def _sum(self, tensors: list[Tensor]) -> list[Tensor]:
        """Views of flat buffers of sums."""
        out = list(tensors)
        for alike in _by_kind(tensors).values():
            flat = torch.cat([x.reshape(-1) for _, x in alike])
            with self._reaching("sum"):
                dist.all_reduce(flat, group=self.group)
            parts = torch.split(flat, [x.numel() for _, x in alike])
            for (position, x), part in zip(alike, parts, strict=True):
                out[position] = part.view(x.shape)
        return out


def _bits(x: float) -> int:
    """The bits of a float64 as an integer."""
    bits: int = struct.unpack("q", struct.pack("d", x))[0]
    return bits


def _from_bits(bits: int) -> float:
    x: float = struct.unpack("d", struct.pack("q", bits))[0]
    return x


_COMPARED = {
    ".grad": "a backward of each process alone came before, as under no_sync; take each micro-batch by "
    "FisherPenalty.backward(weight=...), or the last one before it with the gradients reduced",
    "model": "each process has parameters of its own; start from the same ones, as DistributedDataParallel does",
}
"""What the sums of squares in a message are of, and what it means where they differ."""


def _by_kind(tensors: list[Tensor]) -> dict[tuple[torch.dtype, torch.device], list[tuple[int, Tensor]]]:
    """The tensors with their positions, by dtype and device."""
    kinds: dict[tuple[torch.dtype, torch.device], list[tuple[int, Tensor]]] = {}
    for position, x in enumerate(tensors):
        kinds.setdefault((x.dtype, x.device), []).append((position, x))
    return kinds


@contextmanager
def failing_together(ranks: Ranks | None, doing: Callable[[], Doing] | None = None) -> Iterator[None]:
    """:meth:`Ranks.failing_together`, where there is more than this process."""
    if ranks is None:
        yield
    else:
        with ranks.failing_together(doing):
            yield


@contextmanager
def measuring_together(
    ranks: Ranks | None, call: str, model: nn.Module, trainable: Gradients, **settings: Any
) -> Iterator[None]:
    """:func:`failing_together` for a measurement: of one network, with the buffers of rank 0, by one call of all."""
    if ranks is None:
        yield
        return
    with ranks.failing_together(lambda: Doing.of(trainable, call=call, **settings)), ranks.one_network(model):
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
        mine, here = ([local_part(named[name]) for name in self.gradient] for named in (found, self.gradient))
        add_(mine, -coefficient, here)
        return found

    def _norm(self, named: Gradients) -> Tensor:
        return super()._norm({name: local_part(x) for name, x in named.items()})

    def _size(self, whole: bool) -> Tensor:
        return self.norm if whole else self._norm(self.gradient)

    def add_to(self, out: Gradients, weight: float | Tensor) -> Tensor:
        """See :meth:`FiniteDifference.add_to`; the step is as long in all processes, whatever one of them meets."""
        rho = self.rho()
        scale = weight * self.coefficient(rho)
        squared = self._add(out, rho, scale)
        if self.settings.difference == "central":
            self._add(out, -rho, -scale)
        return (squared.sqrt() / self.size).masked_fill(self.norm == 0, torch.nan)

    def _add(self, out: Gradients, rho: Tensor, scale: Tensor) -> Tensor:
        found = self._gradient_there(rho)
        mine, there, here = (
            [local_part(named[name]) for name in self.gradient] for named in (out, found, self.gradient)
        )
        assert self.total is not None
        return self.total(ops.axpy_diff(mine, there, here, scale))

    def _gradient_there(
        self, rho: Tensor, weight: Tensor | None = None, loss: Callable[[Tensor], Tensor] | None = None
    ) -> Gradients:
        """The gradient of the loss of :meth:`FiniteDifference.shifted_loss`, 0 for a parameter not used there."""
        length = self.length(rho)
        leaves = {name: self.parameters[name] for name in self.gradient}
        inputs = self.shifted_inputs(length)  # before the replay, which takes what it sees for the forward's
        with self._shifted(length):
            there = self.loss_of(lambda: call_model(self.model, inputs), weight, loss)
            found = _backward(there, list(leaves.values()), False)
        return {
            name: torch.zeros_like(leaf, requires_grad=False) if g is None else g
            for (name, leaf), g in zip(leaves.items(), found, strict=True)
        }

    @contextmanager
    def _shifted(self, length: Tensor) -> Iterator[None]:
        """Within, the parameters are at θ + ρd; they and the buffers are as before afterwards."""
        shifts = self.direction if self.settings.wrt == "parameters" else {}
        shards = {name: local_part(self.parameters[name]) for name in shifts}
        buffers = dict(self.model.named_buffers())
        before = [(x, x.clone()) for x in (*shards.values(), *buffers.values())]
        try:
            with torch.no_grad():
                for name, buffer in self.gates.buffers.items():  # as the forward at θ found them
                    buffers[name].copy_(buffer)
                add_(list(shards.values()), length, [local_part(shifts[name]) for name in shards])
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
        return [g if g is None or is_spread(g) else g / self.size for g in found]

    def sum_gradients(self, trainable: Gradients, *gradients: Gradients) -> list[Gradients]:
        """The gradients as they are: the backward has summed them."""
        self.agree("gradients")
        return list(gradients)

    def begin(self, model: nn.Module) -> None:
        """Lets go of gathered parameters that a forward without a backward has left, and waits for all: the forward
        itself has messages, and a process that raises before it would leave the others there.

        Raises:
            ValueError: the model's reduction of gradients is not the mean at each backward.
        """
        _check_reduction(model)
        reshard(model)
        self.agree("the beginning")


def local_part(x: Tensor) -> Tensor:
    """This process's part, in the same memory."""
    return x.detach().to_local() if is_spread(x) else x  # type: ignore[attr-defined]


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
    for module in sharding_modules(model):
        module.reshard()


def _check_reduction(model: nn.Module) -> None:
    """Raises ValueError where a backward through ``fully_shard`` would not leave the mean gradient of the processes."""
    for group in _parameter_groups(model):
        settings = {
            "set_requires_gradient_sync(False)": not group.reduce_grads,
            "set_requires_all_reduce(False)": not group.all_reduce_grads,
            "set_reshard_after_backward(False)": not group.reshard_after_backward,
            "set_gradient_divide_factor": group.gradient_divide_factor is not None,
            "set_all_reduce_hook": group._all_reduce_hook is not None,
        }
        for name, is_set in settings.items():
            if is_set:
                raise ValueError(
                    f"model: expected the reduction that fully_shard begins with, a mean at each backward, got {name}; "
                    "undo it before FisherPenalty.backward, which accumulates micro-batches by its weight"
                )
        for parameter in group.fsdp_params:
            whole = getattr(parameter, "_unsharded_param", None)
            if parameter.unsharded_accumulated_grad is not None or (whole is not None and whole.grad is not None):
                raise ValueError(
                    "model: expected every gradient reduced, got one of a backward before under "
                    "set_requires_gradient_sync(False); take each micro-batch by FisherPenalty.backward(weight=...), "
                    "or the last one before it with the gradients reduced"
                )


def _parameter_groups(model: nn.Module) -> Iterator[Any]:
    """What ``fully_shard`` gathers and reduces at once."""
    for module in sharding_modules(model):
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)  # several in newer versions of PyTorch
        yield from [state._fsdp_param_group] if groups is None and state._fsdp_param_group is not None else groups or ()


def placed_like(x: Tensor, parameter: Tensor) -> Tensor:
    """A copy of ``x`` on the device, in the dtype and over the processes of ``parameter``: whole, or as its shards.

    Every process has to call it where ``x`` is in shards and ``parameter`` is not, or is in other ones.
    """
    if is_spread(x) and not (is_spread(parameter) and _spread_alike(x, parameter)):
        x = x.full_tensor()  # type: ignore[attr-defined]
    if is_spread(parameter) and not is_spread(x):
        from torch.distributed.tensor import distribute_tensor

        x = x.to(parameter.to_local(), copy=True)  # type: ignore[attr-defined]
        mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
        return distribute_tensor(x, mesh, placements, src_data_rank=None)  # each has all of it: no message
    return x.to(parameter.dtype if is_spread(x) else parameter, copy=True)


def _spread_alike(x: Any, y: Any) -> bool:
    same: bool = x.device_mesh == y.device_mesh and x.placements == y.placements
    return same


# ---- which processes a model is shared by ----------------------------------------------------------------------------


def precision_below(model: nn.Module) -> torch.dtype | None:
    """The dtype in which ``fully_shard`` gathers parameters, where it is not their own."""
    for module in sharding_modules(model):
        dtype: torch.dtype | None = module._get_fsdp_state()._mp_policy.param_dtype
        if dtype is not None and any(p.dtype != dtype for p in module.parameters()):
            return dtype
    return None


@dataclass(frozen=True)
class Shared:
    """A model and the processes that share it.

    Attributes:
        ranks: the processes; None where the model is this one's alone.
        module: the module that this process runs.
        buffers_follow: whether the buffers of rank 0 become those of all.
    """

    ranks: Ranks | None
    module: nn.Module
    buffers_follow: bool


def shared_by(model: nn.Module, process_group: dist.ProcessGroup | None, timeout: float = TIMEOUT) -> Shared:
    """The processes that share a model and its batches.

    Those of ``process_group``, else those of ``DistributedDataParallel`` or ``fully_shard`` around the model.

    Raises:
        ValueError: ``timeout`` is no positive number; ``process_group`` is no group of this process; parameters are
            not all sharded over one dimension of processes, or over others than ``process_group``; the model is within
            ``DistributedDataParallel`` and no ``process_group`` is given; or see
            :func:`fastfisher.placement.placement_of`.
    """
    if not (is_number(timeout) and timeout > 0):
        raise ValueError(f"timeout: expected a number of seconds > 0, got {timeout!r}")
    placement = placement_of(model)
    module, ddp = placement.module, placement.ddp
    if not is_initialised():
        if process_group is not None:
            raise ValueError("process_group: expected None, as torch.distributed is not initialised")
        return Shared(None, module, False)
    if process_group is not None:
        _check_group(process_group)
    if placement.sharded:
        group = _sharding_group(module)
        if process_group is not None and dist.get_process_group_ranks(process_group) != dist.get_process_group_ranks(
            group
        ):
            raise ValueError(
                "process_group: expected None or the processes that the model is sharded over, "
                f"{dist.get_process_group_ranks(group)}, got {dist.get_process_group_ranks(process_group)}"
            )
        return Shared(_joined(Shards, group, timeout), module, False)
    if ddp is not None:
        ranks = _joined(Ranks, process_group or ddp.process_group, timeout)
        return Shared(ranks, module, bool(ddp.broadcast_buffers))
    if process_group is not None:
        return Shared(_joined(Ranks, process_group, timeout), module, False)
    check_alone(model)
    return Shared(None, module, False)


def check_alone(model: nn.Module) -> None:
    """Raises ValueError where a model that is shared by no processes is within a ``DistributedDataParallel``."""
    check_not_within(
        model,
        "gradients and traces would be of the examples of this process alone; pass that, or process_group=, or for the "
        "value of this process alone copy.deepcopy of the module",
    )


def _check_group(group: Any) -> None:
    """Raises ValueError where ``group`` is no group that this process is in."""
    if not isinstance(group, dist.ProcessGroup):
        what = "a group that this process is not in" if group == dist.GroupMember.NON_GROUP_MEMBER else repr(group)
        raise ValueError(f"process_group: expected a torch.distributed.ProcessGroup or None, got {what}")
    if not is_live(group):
        raise ValueError("process_group: expected a live group, got one that destroy_process_group has ended")


def _sharding_group(model: nn.Module) -> dist.ProcessGroup:
    """The group that all parameters are sharded over.

    Raises:
        ValueError: there is no such group, or the model is a part of one that is sharded as a whole.
    """
    parameters = dict(model.named_parameters())
    (mesh, *more) = {getattr(p, "device_mesh", None) for p in parameters.values()}
    if more or mesh is None or mesh.ndim != 1:
        raise ValueError(
            "model: expected every parameter sharded over the same processes in one dimension (fully_shard of the "
            f"whole model), got the meshes {sorted(map(str, [mesh, *more]))}"
        )
    for name, p in parameters.items():
        placement = p.placements[0]  # type: ignore[attr-defined]
        if not placement.is_shard():
            raise ValueError(
                f"model: expected every parameter sharded by fully_shard, got {name!r} with the placement {placement}; "
                "use DistributedDataParallel for whole parameters in each process"
            )
    if any(module._get_fsdp_state()._is_root is False for module in _outermost(model)):
        raise ValueError(
            "model: expected the whole model that fully_shard was applied to, got a part of it, whose parameters "
            "the forward of the whole gathers; pass the whole model, with params= for a part"
        )
    return mesh.get_group()  # type: ignore[no-any-return]


def _outermost(model: nn.Module) -> Iterator[Any]:
    """The modules of ``fully_shard`` that no other one of the model is around."""
    found = sharding_modules(model)
    inner = {id(module) for outer in found for module in outer.modules() if module is not outer}
    yield from (module for module in found if id(module) not in inner)


_RANKS: dict[tuple[type[Ranks], dist.ProcessGroup, float], Ranks] = {}
"""One object for all that a group shares, for its connections serve all of them."""


@atexit.register
def _disconnect() -> None:
    """Ends the connections while their threads can still end."""
    for ranks in _RANKS.values():
        ranks.disconnect()
    _RANKS.clear()


def _joined(kind: type[Ranks], group: dist.ProcessGroup, timeout: float) -> Ranks:
    for known in [known for known in _RANKS if not is_live(known[1])]:
        _RANKS.pop(known).disconnect()
    name = kind, group, timeout
    if name not in _RANKS:
        _RANKS[name] = kind(group, timeout)
    return _RANKS[name]
