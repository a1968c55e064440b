"""Whatever the public functions are given, only the errors that they document come out, and these name an argument."""

from __future__ import annotations

import inspect
import math
from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fastfisher

pytestmark = pytest.mark.usefixtures("one_thread")


class Refused(Exception):
    """What the model raises of itself."""


class Careful(nn.Module):
    """A network that takes float32 tensors (N, 6) only: what it is not given right is its own affair."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x = args[0] if len(args) == 1 and not kwargs else None
        if not (isinstance(x, Tensor) and x.dtype == torch.float32 and x.dim() == 2 and x.shape[1] == 6):
            raise Refused
        return self.second(self.first(x).relu())


X, Y = torch.linspace(-1, 1, 30).view(5, 6), torch.tensor([0, 1, 2, 1, 0])
MODEL = Careful()

TENSORS: list[Tensor] = [
    torch.empty(0), torch.empty(0, 6), torch.tensor(1.0), torch.ones(5), torch.ones(5, 3) / 3, torch.full((5, 3),
    math.nan), torch.tensor([0, 1, 2, 1, 7]), torch.tensor([0, 1, 2, 1, -100]), torch.tensor([0, 1, 2, -3, 0]),
    torch.zeros(4).long(), torch.zeros(5).int(), torch.zeros(5).bool(), torch.zeros(5, 2).long(), torch.ones(5,
    6).double(), torch.ones(1, 6), torch.ones(5, 6, 2), torch.full((5, 6), math.inf), torch.zeros(5, 3,
    dtype=torch.int8), torch.ones(2, dtype=torch.cfloat), torch.tensor([1, 2]), torch.tensor([[1, 2]]),
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, -0.5, 0.0, 0.5, 1.5, math.nan, math.inf, "", "x", "true", "sampled",
    "exact", "auto", "free", b"x", [], (), {}, [1], (1, 2), {"a": 1}, object(), int, len, nn.ReLU(), nn.Sequential(),
    torch.float32, torch.device("cpu"), range(3), [X], (X,), (X, Y), [X, Y], [(X, Y)], [(X, None)], {"x": X}, [(X, Y),
    (X[:0], Y[:0])], (X, None), (None, Y), (X[:3], Y), iter([(X, Y)]), torch.Generator(), MODEL,
    list(MODEL.parameters()), [MODEL.first.weight], [X, X, Y], [[X], Y], {"x": X, "labels": Y}, UserDict(x=X, labels=Y),
    [{"x": X}, Y], [None], (None,), [["a"], Y], (X, "a", None), torch.nn.utils.rnn.pack_sequence([X]),
]  # fmt: skip
anything = st.sampled_from([*TENSORS, *VALUES])


def backward(model: nn.Module, inputs: Any, targets: Any, alpha: float, **options: Any) -> Tensor:
    return fastfisher.FisherPenalty(model, alpha, **options).backward(inputs, targets)


def any_loss(output: Tensor, targets: Any) -> Tensor:
    return output.square().mean()  # what a loss raises of its targets is its own


def gradient_penalty(model: nn.Module, loss: Any, alpha: float, inputs: Any, targets: Any, **options: Any) -> Tensor:
    return fastfisher.GradientPenalty(model, loss, alpha, **options).backward(inputs, targets)


def recorded(model: Any, frozen: Any, rewind: Any) -> None:
    with fastfisher.record_gates(model, frozen=frozen, rewind=rewind):
        pass


OPTIONS = {
    "labels": "sampled", "method": "finite_difference", "gates": "frozen", "wrt": "parameters", "reduction": "batch",
    "step": "auto", "difference": "forward", "generator": None, "params": None, "class_dim": None,
    "likelihood": "categorical", "logits_of": None, "of": "squared_norm",
}  # fmt: skip
# What is called, with arguments that serve; each case replaces some.
CALLS: dict[str, tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]] = {
    "sample_cross_entropy": (
        fastfisher.sample_cross_entropy,
        fastfisher.sample_cross_entropy,
        {"logits": X, "generator": None, "key": None, "reduction": "mean", "class_dim": None},
    ),
    "sample_binary_cross_entropy": (
        fastfisher.sample_binary_cross_entropy,
        fastfisher.sample_binary_cross_entropy,
        {"logits": X, "generator": None, "key": None, "reduction": "mean", "first": 0},
    ),
    "penalty": (
        fastfisher.penalty,
        fastfisher.penalty,
        {"model": MODEL, "inputs": X, "targets": Y, "logits": None, **OPTIONS},
    ),
    "FisherPenalty": (
        backward,
        fastfisher.FisherPenalty,
        {"model": MODEL, "inputs": X, "targets": Y, "alpha": 0.1, **OPTIONS, "every": 1, "start": 0, "mixed": False,
         "examples": None, "loss": None, "graphs": False},
    ),
    "GradientPenalty": (
        gradient_penalty,
        fastfisher.GradientPenalty,
        {"model": MODEL, "inputs": X, "targets": Y, "alpha": 0.1, "loss": any_loss, "wrt": "parameters",
         "of": "squared_norm", "every": 1, "start": 0, "method": "finite_difference", "gates": "frozen",
         "step": "auto", "difference": "forward", "mixed": False, "examples": None, "params": None, "graphs": False},
    ),
    "Categorical": (
        fastfisher.Categorical,
        fastfisher.Categorical,
        {"weight": None, "label_smoothing": 0.0, "ignore_index": -100},
    ),
    "Bernoulli": (fastfisher.Bernoulli, fastfisher.Bernoulli, {"pos_weight": None}),
    "Gaussian": (fastfisher.Gaussian, fastfisher.Gaussian, {"variance": 1.0}),
    "per_example_grad_norms": (
        fastfisher.per_example_grad_norms,
        fastfisher.per_example_grad_norms,
        {"model": MODEL, "inputs": X, "targets": Y, "labels": "true", "draws": 1, "squared": True, "params": None,
         "loss": None, "generator": None, "class_dim": None, "likelihood": "categorical", "logits_of": None},
    ),
    "trace_fisher": (
        fastfisher.trace_fisher,
        fastfisher.trace_fisher,
        {"model": MODEL, "data": (X, Y), "samples": None, "labels": "true", "draws": 1, "batch_size": 4,
         "tolerance": None, "minibatch": False, "params": None, "generator": None, "class_dim": None,
         "likelihood": "categorical", "logits_of": None},
    ),
    "trace_hessian": (
        fastfisher.trace_hessian,
        fastfisher.trace_hessian,
        {"model": MODEL, "data": X, "targets": Y, "method": "auto", "probes": 1, "distribution": "gaussian",
         "hvp": "taylor", "tolerance": None, "generator": None, "params": None, "batch_size": None, "mode": "eval",
         "class_dim": None, "likelihood": "categorical", "logits_of": None, "loss": None},
    ),
    "grad_inner_products": (
        fastfisher.grad_inner_products,
        fastfisher.grad_inner_products,
        {"model": MODEL, "first": (X, Y), "second": (X, Y), "labels": "true", "params": None, "loss": None,
         "generator": None, "class_dim": None},
    ),
    "top_eigenvalues": (
        fastfisher.top_eigenvalues,
        fastfisher.top_eigenvalues,
        {"model": MODEL, "data": X, "targets": Y, "k": 1, "tolerance": 0.5, "max_iterations": 3, "generator": None,
         "params": None, "batch_size": None, "mode": "eval", "class_dim": None, "likelihood": "categorical",
         "logits_of": None, "loss": None},
    ),
    "gradient_covariance": (
        fastfisher.gradient_covariance,
        fastfisher.gradient_covariance,
        {"model": MODEL, "data": (X, Y), "batch_size": None, "labels": "true", "samples": None, "params": None,
         "generator": None, "class_dim": None, "likelihood": "categorical", "logits_of": None, "loss": None},
    ),
    "record_gates": (recorded, fastfisher.record_gates, {"model": MODEL, "frozen": True, "rewind": True}),
    "linear_sample_cross_entropy": (
        fastfisher.linear_sample_cross_entropy,
        fastfisher.linear_sample_cross_entropy,
        {"hidden": X.flatten(1), "weight": torch.ones(3, X[0].numel()), "targets": None, "bias": None,
         "labels": "sampled", "generator": None, "key": None, "first": 0, "reduction": "mean", "ignore_index": -100,
         "label_smoothing": 0.0, "chunk_bytes": 1 << 20},
    ),
    "AdaptiveStep": (fastfisher.AdaptiveStep, fastfisher.AdaptiveStep, {"target": 0.5, "rho": None}),
}  # fmt: skip
PARTS = {"inputs", "targets", "data", "logits"}  # of pairs and batches, and what the model makes of them
RESULTS = {"FisherTrace", "Gates", "GradInnerProducts", "GradientCovariance", "TopEigenvalues", "TraceEstimate"}


def test_every_public_name_is_fuzzed_or_a_result() -> None:
    others = {"AccuracyWarning", "SlowPathWarning", "RankFailure", "Likelihood", "Poisson"}  # which take no arguments
    assert {*CALLS, *RESULTS, *others} == set(fastfisher.__all__)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLS)
def test_only_documented_errors_come_out(name: str) -> None:
    function, documented, arguments = CALLS[name]
    text = inspect.getdoc(documented) or ""
    if name.endswith("Penalty"):
        text += inspect.getdoc(documented.backward) or ""

    @given(st.dictionaries(st.sampled_from(sorted(arguments)), anything, min_size=1, max_size=2))
    def call(replaced: dict[str, Any]) -> None:
        if any(callable(replaced.get(name)) for name in ("loss", "logits_of", "of")):
            return  # whatever it raises is its own
        try:
            function(**{**arguments, **replaced})
        except Refused:
            return
        except (ValueError, TypeError) as error:
            assert type(error).__name__ in text, f"{type(error).__name__} is not documented: {error}"
            named = str(error).split(":")[0].replace(" and ", ", ").split(", ")
            assert set(named) <= {*arguments, *PARTS}, f"names no argument: {error}"

    call()
    assert "ValueError" in text
