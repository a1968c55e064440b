"""What processes send, counted, and in which groups."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastfisher
from fastfisher import FisherPenalty
from fastfisher.distributed import messages
from tests.support.processes import in_processes
from tests.support.shared_batch import ALPHA, X, Y, ddp, network, own, rows_of, seeded, sharded


@contextmanager
def counting() -> Iterator[list[tuple[str, int]]]:
    """The collectives that the package starts, with the bytes that this process puts in."""
    sent: list[tuple[str, int]] = []
    patch = pytest.MonkeyPatch()
    for name in ("all_gather", "all_reduce", "broadcast"):
        whole = getattr(dist, name)

        def counted(*args: Any, name: str = name, whole: Any = whole, **kwargs: Any) -> Any:
            x = args[1] if name == "all_gather" else args[0]
            sent.append((name, x.numel() * x.element_size()))
            return whole(*args, **kwargs)

        patch.setattr(messages.dist, name, counted)
    gather = messages.Messages.gather

    def told(messages: Any, mine: Tensor) -> list[Tensor]:
        sent.append(("told", mine.numel() * mine.element_size()))
        return gather(messages, mine)

    patch.setattr(messages.Messages, "gather", told)
    try:
        yield sent
    finally:
        patch.undo()


@in_processes(2, 4)
def test_messages_and_bytes_of_a_term() -> None:
    """On top of what the loop's own backward sends."""
    told = ("told", 88)

    def sent_by(steps: int, **options: Any) -> list[tuple[str, int]]:
        model = ddp(network())
        penalty = FisherPenalty(model, ALPHA, **seeded(**options))
        for _ in range(steps):
            with counting() as sent:
                with penalty.watching() as forward:
                    model(X.double()[own()])
                penalty.term(forward, Y[own()])
        return sent

    size = 8 * sum(p.numel() for p in network().parameters())
    reduced = [told, ("all_reduce", size)]
    assert sent_by(1, every=1) == [told, told, *reduced]
    assert sent_by(1, every=2) == [told, told, *reduced, *reduced]
    assert sent_by(2, every=2) == [told]
    assert sent_by(1, every=1, scope="local") == [told]


@in_processes(2, 4)
def test_messages_and_bytes() -> None:
    """As in docs/distributed.md: told, a message of 88 bytes; then the data."""
    size = sum(p.numel() * p.element_size() for p in network().parameters())
    told = ("told", 88)

    def step(*, wrap: Any = ddp, second: bool = False, **options: Any) -> list[tuple[str, int]]:
        model = wrap(network())
        penalty = FisherPenalty(model, ALPHA, **options)
        if second:
            penalty.backward(X.double()[own()], Y[own()])
        with counting() as sent:
            penalty.backward(X.double()[own()], Y[own()])
        return sent

    def data(*factors: float) -> list[tuple[str, int]]:
        messages = [told]
        for factor in factors:
            messages += [told, ("all_reduce", int(factor * size))]
        return messages

    assert step(every=1) == data(1, 1)
    assert step(every=10) == data(1, 2)
    assert step(every=10, second=True) == data(1)
    assert step(every=1, mixed=True) == data(1, 1)
    assert step(every=1, gates="free") == data(1, 2)
    assert step(every=1, method="double_backprop") == data(1, 1)
    squares = [told, ("all_reduce", 8)]
    # Of the gradient in the inputs, and of the inputs, whose size the step has.
    assert step(every=1, labels="true", wrt="inputs") == [told, *squares, *squares, told, ("all_reduce", size)]
    for every in (1, 10):
        assert step(every=every, scope="local") == [told, ("all_reduce", size)]
    # Of the gradient, and of its change.
    assert step(every=1, wrap=sharded) == [told, told, told, *squares, *squares, told]
    with counting() as sent:
        fastfisher.trace_fisher(ddp(network()), X.double()[own()], batch_size=3, draws=2)
    batches = len(X[own()]) // 3
    names, examples = 6, len(X[own()])
    vectors = [told, ("all_gather", 16 * examples), told, ("all_gather", 8 * names)]
    assert sent == [told] + batches * [told] * 3 + [told] + vectors + [told, ("all_gather", 16)]
    with counting() as sent:
        fastfisher.trace_hessian(ddp(network()), X.double()[own()], Y[own()], method="hutchinson", probes=5)
    assert sent == [told, told, told, ("all_gather", 8 * (5 + 3))]


@in_processes(2, 4)
def test_groups_with_members_of_others() -> None:
    """Groups that overlap, made by those who are in them alone, in another order by each, and two of the same members;
    whatever groups each process has been in before."""
    rank, size = dist.get_rank(), dist.get_world_size()
    for _ in range(rank):
        dist.new_group([rank], use_local_synchronization=True)  # other processes know nothing of it
    groups = [dist.new_group([0, 1]), dist.new_group([0, size - 1]), dist.new_group([0, 1]), dist.group.WORLD]
    for group in groups:
        if group == dist.GroupMember.NON_GROUP_MEMBER:
            continue
        assert group is not None
        members = dist.get_process_group_ranks(group)
        parts = [rows_of(member) for member in members]
        rows = [i for part in parts for i in range(part.start, part.stop)]
        found = fastfisher.trace_fisher(network(), X.double()[own()], process_group=group, **seeded()).value
        expected = fastfisher.trace_fisher(network(), X.double()[rows], **seeded()).value
        assert abs(found - expected) < 1e-10 * expected


def test_without_processes_nothing_is_asked_or_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a collective")

    for name in ("all_gather", "all_reduce", "broadcast", "new_group"):
        monkeypatch.setattr(messages.dist, name, never)
    monkeypatch.setattr(messages.Messages, "gather", never)
    penalty = FisherPenalty(nn.Linear(3, 3), 0.1)
    assert penalty._world.alone
    penalty.backward(torch.ones(2, 3), torch.tensor([0, 1]))
