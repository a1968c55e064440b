"""What processes tell each other before each sum: that they got there, and what they are doing.

A process that failed tells that instead. So where one fails, or does something else than the others, all of them raise:
none waits for a process that will not come, and no sums are taken of what does not belong together.
"""

from __future__ import annotations

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
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastfisher import ops
from fastfisher.placement import is_live

Gradients = dict[str, Tensor]

TIMEOUT = 600.0
"""Seconds that a process waits for the others to get as far as it did."""

_NUMBERS = 7
"""How many integers a process tells the others, besides whether it failed and what it is doing."""

_SAME = 1e-6
"""Up to which relative difference two processes' sums of squares are of the same numbers: they may round otherwise."""


class RankFailure(RuntimeError):
    """Another process failed, ended, or did not get as far in time."""


class OutOfStep(ValueError):
    """The processes do different things. Each of them sees it and raises this, so none has to be told."""


@dataclass(frozen=True)
class Doing:
    """What a process is doing, which all others have to do too.

    Attributes:
        settings: a call and its arguments by name, as the error message has them.
        parameters: the sum of squares of the parameters; 0 where they are not to be compared.
        gradients: the sum of squares of what is in ``.grad``.
    """

    settings: Mapping[str, object] = field(default_factory=dict)
    parameters: float = 0.0
    gradients: float = 0.0

    @classmethod
    def of(
        cls,
        trainable: Gradients,
        sharded: bool = False,
        *,
        compared: bool = True,
        accumulates: bool = True,
        **settings: Any,
    ) -> Doing:
        """``settings``, with what is known of the parameters ``trainable``. Whole ones have to be the same in all
        processes, if ``compared``; shards (``sharded``) differ. So must ``.grad`` be, where this package adds to it
        (``accumulates``); what a loop of the caller's has there it may still have to reduce."""
        grads = {name: p.grad for name, p in trainable.items() if accumulates and p.grad is not None}
        everything = {
            **settings,
            "trainable parameters": digest(f"{name}{tuple(p.shape)}" for name, p in trainable.items()),
            ".grad": digest(grads),
        }
        if sharded:
            return cls(everything)
        return cls(everything, _squares(trainable.values()) if compared else 0.0, _squares(grads.values()))


def digest(names: Iterable[str]) -> str:
    """How many names there are, and a checksum of them."""
    each = list(names)
    return f"{len(each)} ({zlib.crc32(chr(10).join(each).encode()):08x})"


def _squares(tensors: Iterable[Tensor]) -> float:
    found = [x.detach().coalesce().values() if x.is_sparse else x.detach() for x in tensors]
    real = [torch.view_as_real(x) if x.is_complex() else x for x in found]
    return float(sum(float(ops.sum_squares([x for _, x in alike])) for alike in by_kind(real).values()))


class Messages:
    """Sends small CPU tensors from each process of a group to each other, by gloo connections of its own.

    The connections are made at the first message, so constructing this waits for no other process. They are made anew
    after a message that failed, because an answer that comes late would be taken for the answer to the next message.
    They are no group of torch.distributed: the name of a new one depends on which groups a process has been in.
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
        """Connections to all others, under a random name from rank 0 that the others ask for in the group's store.

        Each asks under a random name of its own and takes the answer to this name alone. So an attempt that was given
        up halfway leaves nothing in the store that a later one could take for its own.
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


class Telling:
    """The processes of a group, and the messages in which they tell each other what they do.

    Args:
        group: the group that gradients are summed in.
        timeout: seconds that a process waits for the others to get as far. The sums themselves, which start when
            all are there, are bounded by the group's own timeout.
    """

    def __init__(self, group: dist.ProcessGroup, timeout: float) -> None:
        self.group, self.timeout = group, timeout
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.root = dist.get_process_group_ranks(group)[0]
        self._messages = Messages(group, timeout)
        self._doing = Doing()
        self._depth = 0

    def agree(self, what: str, *numbers: int) -> list[list[int]]:
        """Exchanges at most 7 integers, and checks that all are doing the same. Each process sends each other 88 bytes.

        Args:
            what: the name of the message, which has to be the same for all.
            numbers: the integers.

        Returns:
            Those of each process, by rank.

        Raises:
            RankFailure: a process failed, ended, or did not come within the timeout.
            ValueError: in all processes, where what they are doing or their parameters differ.
        """
        told = self._tell(what, numbers)
        failed = [rank for rank, (failure, *_) in enumerate(told) if failure]
        if failed:
            raise RankFailure(f"rank {', '.join(map(str, failed))} failed in this step: its own error says why")
        if len({doing for _, doing, *_ in told}) > 1:
            raise OutOfStep(self._what_differs(what))
        for position, (name, why) in enumerate(_COMPARED.items(), 2):
            squares = [_from_bits(given[position]) for given in told]
            if not all(
                math.isclose(x, squares[0], rel_tol=_SAME) or (math.isnan(x) and math.isnan(squares[0]))
                for x in squares
            ):
                got = ", ".join(f"{x:.9g}" for x in squares)
                raise OutOfStep(
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
        except (RankFailure, OutOfStep):
            raise
        except BaseException:
            if self._depth == 1:  # nested calls tell it once
                with suppress(RankFailure):
                    self._tell("", failed=True)
            raise
        finally:
            self._depth -= 1
            self._doing = before

    def _tell(self, what: str, numbers: Sequence[int] = (), *, failed: bool = False) -> list[list[int]]:
        """By rank: whether it failed, a checksum of what it does, the squares in the order of _COMPARED, numbers."""
        doing = zlib.crc32(repr([what, *self._doing.settings.items()]).encode())
        squares = [_bits(self._doing.gradients), _bits(self._doing.parameters)]
        padding = [0] * (_NUMBERS - len(numbers))
        mine = torch.tensor([int(failed), doing, *squares, *numbers, *padding], dtype=torch.int64)
        return [given.tolist() for given in self._gather(mine)]

    def _what_differs(self, what: str) -> str:
        """A text that says what differs: the processes exchange the settings of which they compared checksums."""
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
        if "call" in found:  # everything else differs because the call does
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
        """What torch.distributed raises within becomes a :class:`RankFailure`."""
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
"""What the sums of squares in a message are of, and the likely reason and way out where they differ."""


def by_kind(tensors: list[Tensor]) -> dict[tuple[torch.dtype, torch.device], list[tuple[int, Tensor]]]:
    """The tensors with their positions, by dtype and device."""
    kinds: dict[tuple[torch.dtype, torch.device], list[tuple[int, Tensor]]] = {}
    for position, x in enumerate(tensors):
        kinds.setdefault((x.dtype, x.device), []).append((position, x))
    return kinds
