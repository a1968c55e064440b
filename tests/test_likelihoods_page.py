"""docs/likelihoods.md: each line names its tests, and each cell of its table of labels is what happens."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastfisher
from fastfisher.likelihoods.base import Likelihood
from tests.test_likelihoods import LIKELIHOODS, Exponential, X, explicit_fisher, network, output_of, targets_of
from tests.test_limits import ROOT, test_each_line_has_its_test

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = (ROOT / "docs" / "likelihoods.md").read_text()
LINES = [line for line in PAGE.splitlines() if re.match(r"\| .*`test_\w+\.test_\w+` \|$", line)]
TABLES = re.findall(r"^\| .* \| test \|\n(?:\|.*\n)+", PAGE, re.MULTILINE)

OWN = "one's own with `draw` and `root`"
OBJECTS: dict[str, Likelihood] = {**LIKELIHOODS, OWN: Exponential()}
ALL = ("sampled", "true", "rademacher", "exact", "a tensor", "uniform")


def calls(likelihood: Any, labels: Any, y: Tensor) -> dict[str, Callable[[], Any]]:
    """Of each function of the table, a call that finds everything it needs beside the labels."""
    model, how = network(), {"likelihood": likelihood, "labels": labels}
    return {
        "`penalty`": lambda: fastfisher.penalty(model, X, y, **how),
        "`FisherPenalty`": lambda: fastfisher.FisherPenalty(model, 0.1, every=1, **how).backward(X, y),
        "`per_example_grad_norms`": lambda: fastfisher.per_example_grad_norms(model, X, y, **how),
        "`trace_fisher`": lambda: fastfisher.trace_fisher(model, (X, y), **how),
        "`grad_inner_products`": lambda: fastfisher.grad_inner_products(model, (X, y), (X, y), **how),
        "`gradient_covariance`": lambda: fastfisher.gradient_covariance(model, (X, y), **how),
    }


def cells() -> dict[tuple[str, str], dict[str, str]]:
    """What the table says of each likelihood and kind of labels: by function, "yes" or "refused"."""
    head, _, *lines = next(table for table in TABLES if table.startswith("| likelihood | labels |")).splitlines()
    functions = head.strip("| ").split(" | ")[2:-1]
    found: dict[tuple[str, str], dict[str, str]] = {}
    for line in lines:
        likelihoods, kinds, *values, _ = line.strip("| ").split(" | ")
        for name in likelihoods.split(", "):
            for kind in kinds.split(", "):
                assert (name, kind) not in found
                found[name, kind] = dict(zip(functions, values, strict=True))
    return found


CELLS = cells()


@pytest.mark.parametrize("line", LINES, ids=lambda line: line[2:50])
def test_each_line_names_tests_that_exist(line: str) -> None:
    test_each_line_has_its_test(line)


def test_no_line_goes_without_a_test() -> None:
    lines = [line for table in TABLES for line in table.splitlines()[2:]]
    assert sorted(lines) == sorted(LINES) and len(TABLES) == 4


def test_the_table_has_every_case() -> None:
    kinds = {name: {kind for other, kind in CELLS if other == name} for name in OBJECTS}
    assert kinds == {name: set(ALL) - ({"a tensor"} if name == OWN else set()) for name in OBJECTS}


@pytest.mark.parametrize(("name", "kind"), CELLS, ids=str)
def test_each_cell_is_what_happens(name: str, kind: str) -> None:
    y = targets_of("gaussian", 6, 4).abs() if name == OWN else targets_of(name, 6, 4)
    found = {}
    for function, call in calls(OBJECTS[name], y if kind == "a tensor" else kind, y).items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                call()
            found[function] = "yes"
        except ValueError as error:
            assert str(error).startswith("labels: ")
            found[function] = "refused"
    assert found == CELLS[name, kind]


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_labels_given_are_those_of_targets(name: str) -> None:
    model, y, how = network(), targets_of(name, 6, 4), {"likelihood": LIKELIHOODS[name]}
    for function in (fastfisher.penalty, fastfisher.per_example_grad_norms):
        given = function(model, X, labels=y, **how)  # type: ignore[operator]
        torch.testing.assert_close(given, function(model, X, y, labels="true", **how), rtol=1e-12, atol=0)  # type: ignore[operator]
    inner = fastfisher.grad_inner_products(model, X, X, labels=y, **how)  # type: ignore[arg-type]
    norms = fastfisher.per_example_grad_norms(model, X, labels=y, **how)  # type: ignore[arg-type]
    torch.testing.assert_close(inner.per_example, norms)


def test_the_page_s_own_likelihood_draws_alike_in_parts() -> None:
    scope: dict[str, Any] = {"fastfisher": fastfisher, "torch": torch}
    exec(re.findall(r"^class Exponential.*?(?=\n\n\n)", PAGE, re.MULTILINE | re.DOTALL)[0], scope)
    likelihood, output, key = scope["Exponential"](), output_of(4, 5), torch.tensor([3, 9])
    labels = likelihood.draw(output, key)
    assert torch.equal(likelihood.draw(output[1:], key, 5), labels[1:])
    many = likelihood.draw(torch.full((40_000,), 1.5, dtype=torch.float64), key)
    mean, error = float(many.mean()), float(many.std()) / 200
    assert abs(mean - 2.718281828**-1.5) < 4 * error and float(many.min()) > 0


def test_of_natural_parameters_the_gauss_newton_trace_is_that_of_the_fisher_matrix() -> None:
    """``natural`` is taken at its word: a Gaussian written by hand, whose information is 1, needs no probes."""

    class Normal(Exponential):
        natural = True

        def nll(self, output: Tensor, labels: Tensor) -> Tensor:
            return (labels - output).square() / 2

    model, y = network(act=torch.nn.ReLU), targets_of("gaussian", 6, 4)
    truth = float(explicit_fisher(model, Exponential(), X).trace()) / 4
    for method in ("auto", "ggn"):
        found = fastfisher.trace_hessian(model, X, y, likelihood=Normal(), method=method)  # type: ignore[arg-type]
        assert "fisher" in found.method and found.value == pytest.approx(truth, rel=1e-9)


def test_a_loss_has_no_labels_of_its_own() -> None:
    model, y = network(), targets_of("gaussian", 6, 4)
    each = lambda output, targets: (output - targets).square().sum(1)  # noqa: E731
    for function in (fastfisher.penalty, fastfisher.per_example_grad_norms):
        with pytest.raises(ValueError, match=r"loss: expected None with labels='sampled'"):
            function(model, X, y, loss=each)  # type: ignore[operator]
        with pytest.raises(ValueError, match=r"likelihood: expected none beside loss="):
            function(model, X, y, labels="true", loss=each, likelihood="gaussian")  # type: ignore[operator]


def test_a_loss_has_no_fisher_matrix() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'loss'"):
        fastfisher.trace_fisher(network(), X, loss=F.mse_loss)  # type: ignore[call-arg]
