"""However a function is called, its arguments come in the positions of its signature."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fastfisher.engine.calls import opened, positional


@pytest.mark.parametrize(
    ("func", "args", "kwargs", "expected"),
    [
        (torch.amax, (), {"input": 1, "axis": 2}, ((1, 2), {})),
        (Tensor.max, (1,), {"axis": 2, "keepdims": True}, ((1, 2, True), {})),
        (torch.maximum, (), {"other": 2, "input": 1}, ((1, 2), {})),
        (torch.add, (1,), {"other": 2, "alpha": 3}, ((1, 2), {"alpha": 3})),
        (torch.clamp, (), {"input": 1, "max": 3}, ((1, None, 3), {})),  # a gap has its default
        (Tensor.where, (1,), {"condition": 2, "other": 3}, ((1, 2, 3), {})),  # a method's tensor comes first
        (torch.where, (1,), {"input": 2, "other": 3}, ((1, 2, 3), {})),
        (F.conv2d, (), {"input": 1, "weight": 2, "padding": 3}, ((1, 2, None, [1, 1], 3), {})),
        (F.relu, (1,), {"inplace": True}, ((1, True), {})),
        (Tensor.norm, (1,), {"dim": 2}, ((1, "fro", 2), {})),
        (torch.amax, (1,), {"nonsense": 2}, ((1,), {"nonsense": 2})),  # PyTorch will say what is wrong with it
        (torch.amax, (1, 2), {"dim": 3}, ((1, 2), {"dim": 3})),
        (abs, (1,), {"x": 2}, ((1,), {"x": 2})),
    ],
)
def test_positional(func: Any, args: Any, kwargs: Any, expected: Any) -> None:
    assert positional(func, args, kwargs) == expected


def test_what_only_chooses_between_functions_is_not_opened():
    assert opened(F.max_pool2d) is None and opened(torch.tanh) is None and opened(torch.Tensor.norm) is None
    assert opened(F.mish) is not None and opened(torch.Tensor.norm, methods=True) is not None


def test_a_private_part_of_an_opened_function_is_opened_too():
    names: list[str] = []

    class Seen(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            names.append(func.__name__)
            inside = opened(func)
            if inside is not None:
                with self:
                    return inside(*args, **(kwargs or {}))
            return func(*args, **(kwargs or {}))

    x, y = torch.ones(2), torch.ones(3)
    with Seen():
        torch.meshgrid(x, y, indexing="ij")
    assert names == ["meshgrid", "meshgrid"]  # the Python function, and the operator that it calls
