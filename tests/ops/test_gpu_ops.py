"""Every operator on CUDA: the tests of the CPU's kernels over the same grids, and what only a GPU can show.

The tests of each family run here as they are, with operators that take their tensors to the GPU and bring the
results back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import fastfisher
from fastfisher import ops
from fastfisher.ops import reference
from tests.ops import test_gates, test_lists, test_norms, test_rows
from tests.support.operators import KEY, assert_labels_are_the_exact_inverse_cdf, cases, logits_for

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


class OnTheGPU:
    """The functions of fastfisher.ops, on copies of their tensors on the GPU."""

    UNAVAILABLE = "values are not checked on a GPU"  # skips what the tests expect of those checks

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            moved = tree_map_only(Tensor, lambda x: x.cuda(), args)
            result = getattr(ops, name)(*moved)
            if name == "gate_relu_":
                args[0].copy_(moved[0])
            elif name in ("axpy_diff", "perturb"):
                for target, written in zip(args[0], moved[0], strict=True):
                    target.copy_(written)
            return tree_map_only(Tensor, lambda x: x.cpu(), result)

        return call


@pytest.fixture(autouse=True)
def on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for family in (test_rows, test_gates, test_lists, test_norms):
        monkeypatch.setattr(family, "ops", OnTheGPU())


test_values_err_at_most_twice_what_pytorch_errs = test_rows.test_values_err_at_most_twice_what_pytorch_errs
test_labels_are_the_exact_inverse_cdf = test_rows.test_labels_are_the_exact_inverse_cdf
test_draws_follow_the_softmax = test_rows.test_draws_follow_the_softmax
test_each_tile_of_the_widest_row_is_drawn_within = test_rows.test_each_tile_of_the_widest_row_is_drawn_within
test_extreme_and_masked_logits = test_rows.test_extreme_and_masked_logits
test_derivatives_to_second_order = test_rows.test_derivatives_to_second_order
test_binary_values_err_at_most_twice_what_pytorch_errs = (
    test_rows.test_binary_values_err_at_most_twice_what_pytorch_errs
)
test_binary_labels_are_those_of_the_definition = test_rows.test_binary_labels_are_those_of_the_definition
test_binary_draws_follow_the_sigmoid = test_rows.test_binary_draws_follow_the_sigmoid
test_a_part_of_the_elements_is_drawn_as_in_the_whole = test_rows.test_a_part_of_the_elements_is_drawn_as_in_the_whole
test_infinite_logits_are_certain = test_rows.test_infinite_logits_are_certain
test_binary_derivatives_to_third_order = test_rows.test_binary_derivatives_to_third_order
test_relu_gates_agree_with_the_reference = test_gates.test_relu_gates_agree_with_the_reference
test_leaky_relu_and_its_backward_are_those_of_pytorch = test_gates.test_leaky_relu_and_its_backward_are_those_of_pytorch
test_differences_and_sums_agree_with_the_reference = test_lists.test_differences_and_sums_agree_with_the_reference
test_max_pool_agrees_with_the_reference = test_gates.test_max_pool_agrees_with_the_reference
test_max_pool_names_what_is_wrong = test_gates.test_max_pool_names_what_is_wrong
test_max_pool_gates_agree_with_the_reference = test_gates.test_max_pool_gates_agree_with_the_reference
test_norms_of_convolution_gradients = test_norms.test_norms_of_convolution_gradients
test_norms_of_linear_gradients = test_norms.test_norms_of_linear_gradients
test_the_gram_form_notices_that_it_cancels = test_norms.test_the_gram_form_notices_that_it_cancels
test_channel_products_agree_with_the_reference = test_norms.test_channel_products_agree_with_the_reference
test_rademacher_cotangents_agree_with_the_reference = test_rows.test_rademacher_cotangents_agree_with_the_reference
test_rademacher_cotangents_have_the_covariance = test_rows.test_rademacher_cotangents_have_the_covariance_of_the_score
test_signs_are_those_of_the_reference = test_lists.test_signs_are_those_of_the_reference
test_normal_numbers_are_those_of_the_reference = (
    test_lists.test_normal_numbers_are_those_of_the_reference_within_rounding
)
test_both_probe_operators_agree_with_the_reference = test_lists.test_both_operators_agree_with_the_reference
test_the_probe_depends_on_key_and_element_alone = test_lists.test_the_probe_depends_on_key_and_element_alone


# ---- what only a GPU can show ---------------------------------------------------------------------------------------


OPERATORS = list(ops.GPU_KERNELS)


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str) -> None:
    for arguments in cases("cuda")[name]:
        torch.library.opcheck(getattr(torch.ops.fastfisher, name).default, arguments)


@pytest.mark.parametrize("name", OPERATORS)
def test_nothing_waits_for_the_gpu_and_the_bits_are_those_of_every_run(name: str) -> None:
    def call(arguments: list[tuple[Any, ...]]) -> list[Any]:
        return [getattr(ops, name)(*each) for each in arguments]

    first = call(cases("cuda")[name])  # compiles
    again = cases("cuda")[name]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = call(again)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(tree_leaves(first), tree_leaves(second), strict=True):
        assert one is None or torch.equal(one, other)


def test_a_graph_draws_by_the_key_that_it_finds() -> None:
    logits, key = torch.zeros(64, 5000, device="cuda"), KEY.cuda()
    ops.sample_cross_entropy(logits, key, 1.0)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, labels, _ = ops.sample_cross_entropy(logits, key, 1.0)
    for offset in (0, 1):
        key[1] = offset
        graph.replay()
        assert torch.equal(labels, ops.sample_cross_entropy(logits, key, 1.0)[1])


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
@pytest.mark.parametrize("classes", [10, 3000, 20_000])  # each form of the kernels
def test_a_row_without_a_softmax_is_marked_and_harms_no_other(classes: int, bad: float | None) -> None:
    logits = torch.randn(50, classes, device="cuda")
    good = ops.sample_cross_entropy(logits, KEY.cuda(), 1.0)
    if bad is None:
        logits[17] = -math.inf
    else:
        logits[17, classes // 2] = bad
    found = ops.sample_cross_entropy(logits, KEY.cuda(), 1.0)
    assert found[1][17] == -1 and bool(found[0][17].isnan()) and bool(found[2][17].isnan().all())
    others = torch.arange(50, device="cuda") != 17
    assert all(torch.equal(x[others], y[others]) for x, y in zip(found, good, strict=True))
    cotangent = ops.rademacher_cotangent(logits, KEY.cuda(), 1.0)
    assert bool(cotangent[17].isnan().all()) and bool(cotangent[others].isfinite().all())


def test_a_nan_among_binary_logits_is_marked_and_harms_no_other() -> None:
    logits = torch.randn(50, 130, device="cuda")
    good = ops.sample_binary_cross_entropy(logits, KEY.cuda(), 1.0, 5)
    logits[17, 3] = math.nan
    nll, labels, dlogits = found = ops.sample_binary_cross_entropy(logits, KEY.cuda(), 1.0, 5)
    assert labels[17, 3] == -1 and bool(nll[17, 3].isnan()) and bool(dlogits[17, 3].isnan())
    others = ~logits.isnan()
    assert all(torch.equal(x[others], y[others]) for x, y in zip(found, good, strict=True))


def test_rows_beyond_2_31_elements() -> None:
    rows, columns = 2**31 // 50257 + 2, 50257
    last = logits_for(columns, torch.float16, rows=2)
    logits = torch.zeros(rows, columns, dtype=torch.float16, device="cuda")
    logits[-2:] = last.cuda()
    nll, labels, dlogits = ops.sample_cross_entropy(logits, KEY.cuda(), 1.0)
    u = reference.philox(KEY, torch.tensor([rows - 2, rows - 1])).double() * 2.0**-32
    for i in range(2):  # the draw of these rows, by hand: their numbers are not those of a batch of two
        weights = torch.nn.functional.pad(last[i].double().softmax(0), (0, -columns % 1024)).view(-1, 1024)
        tile = int((weights.sum(1).cumsum(0) <= u[i, 0] * weights.sum()).sum())
        element = int((weights[tile].cumsum(0) <= u[i, 1] * weights[tile].sum()).sum())
        assert abs(int(labels[rows - 2 + i]) - (1024 * tile + element)) <= 1  # or the neighbour, by rounding
        expected = last[i].double().softmax(0)
        expected[labels[rows - 2 + i]] -= 1
        torch.testing.assert_close(dlogits[rows - 2 + i].cpu().double(), expected, rtol=0, atol=1e-3)
    assert bool(nll.isfinite().all())


def test_labels_equal_those_of_the_cpu() -> None:
    logits = logits_for(1000, torch.float32, rows=5000)
    labels = ops.sample_cross_entropy(logits.cuda(), KEY.cuda(), 1.0)[1].cpu()
    assert_labels_are_the_exact_inverse_cdf(logits, labels, KEY)
    assert (labels != ops.sample_cross_entropy(logits, KEY, 1.0)[1]).float().mean() < 1e-3


def test_the_trace_of_the_hessian_equals_that_of_the_cpu() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 4)).double()
    x, y = torch.randn(12, 6, dtype=torch.float64), torch.randint(4, (12,))
    # The same seed gives the same key, and so the same probes, up to the rounding of a normal number in float32.
    expected, found = (
        fastfisher.trace_hessian(
            model.to(device), x.to(device), y.to(device), method="hutchinson", probes=5,
            generator=torch.Generator().manual_seed(3),
        )
        for device in ("cpu", "cuda")
    )  # fmt: skip
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
