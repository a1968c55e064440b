"""Steps with ``scope="local"``: each process penalises the gradient of its own part of the batch."""

from __future__ import annotations

import torch
import torch.distributed as dist

from fastfisher import FisherPenalty
from tests.support.processes import in_processes
from tests.support.shared_batch import ALPHA, X, Y, ddp, error, gradients, network, own, rows_of, seeded


@in_processes(2, 4)
def test_ddp_local_scope() -> None:
    """The mean over the processes of what each computes alone, and the same labels on no two of them."""
    for every in (1, 2):
        model, x = network(), X.double()
        local = FisherPenalty(ddp(model), ALPHA, every=every, scope="local", **seeded())
        local.backward(x[own()], Y[own()])
        expected = []
        for rank in range(dist.get_world_size()):
            other, rows = network(), rows_of(rank)
            alone = FisherPenalty(other, ALPHA, every=every, **seeded())
            alone.load_state_dict(
                {**alone.state_dict(), "key": local.state_dict()["key"] + torch.tensor([rank - dist.get_rank(), -1])}
            )
            alone.backward(x[rows], Y[rows])
            expected.append(gradients(other))
        assert error(gradients(model), torch.stack(expected).mean(0)) < 1e-12


@in_processes(2, 4)
def test_a_weight_multiplies_the_gradient() -> None:
    model, twice = network(), network()
    for one, weight in ((model, 1.0), (twice, 2.0)):
        local = FisherPenalty(ddp(one), ALPHA, every=1, scope="local", **seeded())
        local.backward(X.double()[own()], Y[own()], weight=weight)
    assert error(gradients(twice), 2 * gradients(model)) < 1e-5
