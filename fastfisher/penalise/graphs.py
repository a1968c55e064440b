"""CUDA graphs of a training step: the few hundred kernels of a step, launched by the device in one go.

The networks of the paper are small, and on a GPU their steps are bound by launches. A step that has come a few times is
captured; from then on its inputs are copied to where the captured kernels read them, and it is replayed. What it leaves
stays in the same memory from one replay to the next.

A graph goes on reading the memory it was captured on. So whatever a step reads and that is not given to it anew is
either written in place for good, or a part of the step's kind by its address: see :func:`places`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from fastfisher.autocast import autocast_dtype
from fastfisher.inputs import Inputs, input_tensors, map_inputs
from fastfisher.slow_path import warn_slow_path

Result = TypeVar("Result")

WARM_UP = 3
"""Steps of each kind that run as usual before one is captured: in them, libraries choose their algorithms."""


KINDS = 32
"""So many kinds of steps, none of which came often enough, are no beginning any more."""


class Graph(Protocol):
    """What was launched by a function."""

    def replay(self) -> None:
        """Launches it again."""


Capture = Callable[[Callable[[], Any]], tuple[Graph, Any]]
"""Calls a function; returns the graph of what it launched, which has not run yet, and its result."""


@dataclass
class _OnDevice:
    """A graph that is launched on its own device, whichever is the current one."""

    graph: Graph
    device: torch.device

    def replay(self) -> None:
        with torch.cuda.device(self.device):
            self.graph.replay()


class CudaCapture:
    """The :data:`Capture` of a CUDA device; the graphs share one pool of memory, and must not run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool: Any = None
        with torch.cuda.device(device):
            # Its own: that of torch.cuda.graph is on whichever device came first.
            self.stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, function: Callable[[], Result]) -> tuple[Graph, Result]:
        """Captures what ``function`` launches on the device.

        Other threads may go on using the device meanwhile, as those of a DataLoader do that pin memory.
        """
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(self.device),
            torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"),
        ):
            result = function()
        self.pool = graph.pool()
        return _OnDevice(graph, self.device), result


def places(tensors: Iterable[Tensor | None]) -> tuple[tuple[int, bool] | None, ...]:
    """Where each tensor lies in memory, and whether it requires a gradient: what a graph takes for fixed."""
    return tuple(None if x is None else (x.data_ptr(), x.requires_grad) for x in tensors)


@dataclass
class _Captured(Generic[Result]):
    graph: Graph
    tensors: list[Tensor]  # where it reads
    result: Result  # where it writes


class CapturedSteps(Generic[Result]):
    """Runs steps of a model, and captures those that keep coming."""

    def __init__(self, model: nn.Module, capture: Capture) -> None:
        self.model, self.capture = model, capture
        self.seen: dict[Any, int] = {}
        self.captured: dict[Any, _Captured[Result]] = {}
        self.replaced = 0  # steps in a row that put a tensor in the place of another

    def run(self, kind: Any, step: Callable[[Inputs, Any], Result], inputs: Inputs, targets: Any) -> Result:
        """``step(inputs, targets)``, or what a replay of it gives.

        Args:
            kind: what the step depends on, hashable, beside the values of the tensors in inputs and targets; their
                shapes and dtypes, the places of the model's parameters and buffers, and autocast, are seen to here.

        Raises:
            ValueError: the step cannot be captured: it reads a value on the host, or replaces a buffer; the module is
                named.
        """
        tensors = _tensors(inputs, targets)
        autocast = autocast_dtype(tensors[0].device.type)
        rest = repr(map_inputs(inputs, lambda x: None))  # what is no tensor is fixed in what is captured
        before = self._places()
        kind = kind, autocast, tuple((x.shape, x.stride(), x.dtype) for x in tensors), rest, before
        captured = self.captured.get(kind)
        if captured is None:
            self.seen[kind] = self.seen.get(kind, 0) + 1
            if self.seen[kind] <= WARM_UP:
                if len(self.seen) == KINDS and not self.captured:
                    warn_slow_path(
                        f"graphs: none of the steps could be captured: {KINDS} kinds of them came, and none more "
                        f"than {WARM_UP} times: batches of ever new shapes, an alpha or a weight that changes with "
                        "each step, or tensors that are replaced between steps. They run as without graphs"
                    )
                outcome = step(inputs, targets)
                self._check_places(before)
                return outcome
            captured = self.captured[kind] = self._record(step, inputs, targets)
        for fixed, given in zip(captured.tensors, tensors, strict=True):
            fixed.copy_(given, non_blocking=True)
        captured.graph.replay()
        return captured.result

    def _record(self, step: Callable[[Inputs, Any], Result], inputs: Inputs, targets: Any) -> _Captured[Result]:
        inputs = map_inputs(inputs, lambda x: x.detach().clone())
        targets = targets.clone() if isinstance(targets, Tensor) else targets
        # Within one autocast block weights are converted once and kept. Kept from before, the graph would never convert
        # them again; kept from the capture, they would be read by others before a replay has written them.
        torch.clear_autocast_cache()
        try:
            graph, result = self.capture(lambda: step(inputs, targets))
        except RuntimeError as error:
            if "captur" not in str(error):
                raise
            raise ValueError(
                "graphs: expected a step that reads no value on the host, which no graph can repeat, got one that does "
                f"{_where(self.model, error)}; write it with tensors alone, or leave graphs=False ({error})"
            ) from error
        finally:
            torch.clear_autocast_cache()
        return _Captured(graph, _tensors(inputs, targets), result)

    def _places(self) -> tuple[Any, ...]:
        return places(self.model.parameters()), places(self.model.buffers())

    def _check_places(self, before: tuple[Any, ...]) -> None:
        """Raises ValueError where steps keep putting another tensor in the place of a parameter or buffer.

        Once is no harm: a buffer may have been made by that step.
        """
        self.replaced = 0 if self._places() == before else self.replaced + 1
        if self.replaced < 2:
            return
        for kind, named, old in zip(
            ("parameter", "buffer"), (self.model.named_parameters(), self.model.named_buffers()), before, strict=True
        ):
            for index, (name, x) in enumerate(named):
                if index >= len(old) or places([x])[0] != old[index]:
                    raise ValueError(
                        f"graphs: expected a forward that writes into its buffers (buffer.copy_(new)), got one that "
                        f"puts another tensor in the place of the {kind} {name!r}, where no graph would look for it"
                    )


def _tensors(inputs: Inputs, targets: Any) -> list[Tensor]:
    return input_tensors(inputs) + ([targets] if isinstance(targets, Tensor) else [])


def _where(model: nn.Module, error: BaseException) -> str:
    """In which module of the model an error was raised."""
    names = {id(module): name for name, module in model.named_modules()}
    found, trace = "outside of the model", error.__traceback__
    while trace is not None:
        module = trace.tb_frame.f_locals.get("self")
        if id(module) in names:
            name, kind = names[id(module)], type(module).__name__
            found = f"in {name!r} ({kind})" if name else f"in the forward of the model ({kind})"
        trace = trace.tb_next
    return found


def cuda_of(trainable: dict[str, Tensor]) -> torch.device:
    """The CUDA device of the parameters.

    Raises:
        ValueError: they are on another one.
    """
    device = next(iter(trainable.values())).device
    if device.type != "cuda":
        raise ValueError(f"graphs: expected False with a model on {device}; graphs are for CUDA devices")
    return device
