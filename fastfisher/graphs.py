"""CUDA graphs of a training step: the few hundred kernels of a step, launched by the device in one go.

The networks of the paper are small, and on a GPU their steps are bound by launches. A step that has come a few times is
captured; from then on its inputs are copied to where the captured kernels read them, and it is replayed. What it leaves
stays in the same memory from one replay to the next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from fastfisher.autocast import autocast_dtype
from fastfisher.model import Inputs, input_tensors, map_inputs

Result = TypeVar("Result")

WARM_UP = 3
"""Steps of each kind that run as usual before one is captured: in them, libraries choose their algorithms."""


class Graph(Protocol):
    """What was launched by a function."""

    def replay(self) -> None:
        """Launches it again."""


Capture = Callable[[Callable[[], Any]], tuple[Graph, Any]]
"""Calls a function; returns the graph of what it launched, which has not run yet, and its result."""


class CudaCapture:
    """The :data:`Capture` of CUDA; the graphs share one pool of memory, and must not run at the same time."""

    def __init__(self) -> None:
        self.pool: Any = None

    def __call__(self, function: Callable[[], Result]) -> tuple[Graph, Result]:
        """Captures what ``function`` launches on the current device."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            result = function()
        self.pool = graph.pool()
        return graph, result


@dataclass
class _Captured(Generic[Result]):
    graph: Graph
    tensors: list[Tensor]  # where it reads
    result: Result  # where it writes


class CapturedSteps(Generic[Result]):
    """Runs steps, and captures those that keep coming."""

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self.seen: dict[Any, int] = {}
        self.captured: dict[Any, _Captured[Result]] = {}

    def run(self, kind: Any, step: Callable[[Inputs, Any], Result], inputs: Inputs, targets: Any) -> Result:
        """``step(inputs, targets)``, or what a replay of it gives.

        Args:
            kind: what the step depends on, hashable, beside the values of the tensors in inputs and targets; their
                shapes and dtypes, and autocast, are seen to here.
        """
        tensors = _tensors(inputs, targets)
        device = tensors[0].device.type
        autocast = autocast_dtype(device)
        rest = repr(map_inputs(inputs, lambda x: None))  # what is no tensor is fixed in what is captured
        kind = kind, autocast, tuple((x.shape, x.stride(), x.dtype) for x in tensors), rest
        captured = self.captured.get(kind)
        if captured is None:
            self.seen[kind] = self.seen.get(kind, 0) + 1
            if self.seen[kind] <= WARM_UP:
                return step(inputs, targets)
            inputs = map_inputs(inputs, lambda x: x.detach().clone())
            targets = targets.clone() if isinstance(targets, Tensor) else targets
            graph, result = self.capture(lambda: step(inputs, targets))
            captured = self.captured[kind] = _Captured(graph, _tensors(inputs, targets), result)
        for fixed, given in zip(captured.tensors, tensors, strict=True):
            fixed.copy_(given, non_blocking=True)
        captured.graph.replay()
        return captured.result


def _tensors(inputs: Inputs, targets: Any) -> list[Tensor]:
    return input_tensors(inputs) + ([targets] if isinstance(targets, Tensor) else [])
