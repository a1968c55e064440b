"""What shares a model, in one process; with several: tests/distributed/test_sharing.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastfisher
from fastfisher.placement import placement_of

X, Y = torch.ones(2, 3), torch.tensor([0, 1])
CALLS: dict[str, Callable[[nn.Module], Any]] = {
    "FisherPenalty": lambda model: fastfisher.FisherPenalty(model, 0.1),
    "penalty": lambda model: fastfisher.penalty(model, X),
    "per_example_grad_norms": lambda model: fastfisher.per_example_grad_norms(model, X),
    "trace_fisher": lambda model: fastfisher.trace_fisher(model, X),
    "trace_hessian": lambda model: fastfisher.trace_hessian(model, X, Y),
    "top_eigenvalues": lambda model: fastfisher.top_eigenvalues(model, X, Y),
    "gradient_covariance": lambda model: fastfisher.gradient_covariance(model, (X, Y)),
    "grad_inner_products": lambda model: fastfisher.grad_inner_products(model, (X, Y), (X, Y)),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_replicas_in_threads_are_refused(call: Callable[[nn.Module], Any]) -> None:
    with pytest.raises(ValueError, match="model: expected no DataParallel, found it at '0'"):
        call(nn.Sequential(nn.DataParallel(nn.Linear(3, 4))))


def test_a_model_of_one_process_is_itself() -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    placement = placement_of(model)
    assert placement.module is model and placement.ddp is None and not placement.sharded
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module"):
        placement_of(3)  # type: ignore[arg-type]
