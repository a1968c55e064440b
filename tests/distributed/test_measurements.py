"""Traces of several processes beside one process with the data of all."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastfisher
from tests.support.processes import in_processes
from tests.support.shared_batch import IMAGES, X, Y, ddp, network, own, rows_of, seeded, small_resnet


@in_processes(2, 4)
def test_traces() -> None:
    """Equal to one process whose batches are those of all, also where one process has less data."""
    model, x = network(), X.double()

    def batches(equal: bool, rank: int | None, size: int) -> list[tuple[Tensor, Tensor]]:
        """The batches of one rank, or of one process with all of them in order."""
        ranks = [rows_of(r, equal) for r in ([rank] if rank is not None else range(dist.get_world_size()))]
        found = []
        for b in range(24):
            rows = [
                i for part in ranks for i in range(part.start + b * size, min(part.stop, part.start + (b + 1) * size))
            ]
            if rows:
                found.append((x[rows], Y[rows]))
        return found

    for equal in (True, False):
        mine, whole = batches(equal, dist.get_rank(), 3), batches(equal, None, 3)
        for options in (
            {},
            {"labels": "sampled", "draws": 3},
            {"labels": "exact"},
            {"labels": "true"},
            {"tolerance": 0.1},
        ):
            found = fastfisher.trace_fisher(ddp(network()), mine, **seeded(**options))
            expected = fastfisher.trace_fisher(model, whole, **seeded(**options))
            assert (found.samples, found.draws, found.method) == (expected.samples, expected.draws, expected.method)
            for name in ("value", "standard_error"):
                assert abs(getattr(found, name) - getattr(expected, name)) <= 1e-10 * expected.value, (name, options)
            torch.testing.assert_close(found.per_parameter, expected.per_parameter, rtol=1e-10, atol=0)
        for options in ({}, {"method": "split"}, {"method": "hutchinson", "tolerance": 1.0}):
            with_probes = {"probes": 4, **options}
            found = fastfisher.trace_hessian(ddp(network()), mine, **seeded(**with_probes))
            expected = fastfisher.trace_hessian(model, whole, **seeded(**with_probes))
            assert (found.samples, found.draws, found.method) == (expected.samples, expected.draws, expected.method)
            for name in ("value", "standard_error"):
                scale = abs(expected.value) + expected.standard_error
                assert abs(getattr(found, name) - getattr(expected, name)) <= 1e-10 * scale, (name, options)
    with pytest.raises(ValueError, match="minibatch: expected False"):
        fastfisher.trace_fisher(ddp(network()), x[own()], minibatch=True)


@in_processes(2, 4)
def test_measured_on_the_buffers_of_rank_0() -> None:
    """As a forward of DDP has them, where a training forward has moved those of each process by its part."""
    x = IMAGES
    inner = small_resnet()
    model = ddp(inner)
    nn.functional.cross_entropy(model(x[own()]), Y[own()]).backward()
    buffers = [buffer.clone() for buffer in inner.buffers()]
    alone = copy.deepcopy(inner)
    for buffer in alone.buffers():
        dist.broadcast(buffer, 0)
    expected = fastfisher.trace_fisher(alone, x, **seeded()).value
    found = fastfisher.trace_fisher(model, x[own()], **seeded()).value
    assert abs(found - expected) < 1e-10 * expected
    assert all(torch.equal(a, b) for a, b in zip(inner.buffers(), buffers, strict=True)), "each has its own back"
