"""A stand-in for CUDA graphs: what a step calls of ATen, recorded once and repeated on the memory it was recorded on.

It freezes what CUDA freezes: Python's decisions, numbers, and the memory that is read and written. A value that the
host reads while it records is refused, as by CUDA, and recording leaves everything as it was: CUDA launches nothing
meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

READS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "unique", "_unique2", "masked_select")
"""Functions of which the host needs a value: for itself, or for the shape of their output."""


class Recorded:
    """The recorded calls, each with its arguments and with the tensors that it made."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, list[tuple[int, Tensor]]]] = []

    @torch.no_grad()
    def replay(self) -> None:
        """Makes the calls again, and puts what they give to where it was."""
        for function, args, kwargs, made in self.calls:
            out = tree_flatten(function(*args, **kwargs))[0]
            for position, x in made:
                x.copy_(out[position])


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.graph = Recorded()
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # by storage: what was written to, and a copy of it
        self.own: set[int] = set()  # storages that were made within

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function._schema.name.split("::")[1]
        if name in READS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        for argument, x in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for y in tree_flatten(x)[0]:
                    self._keep(y)
        out = function(*args, **kwargs)
        flat = tree_flatten(out)[0]
        memory = {x.untyped_storage()._cdata for x in given}
        made = [
            (position, x.detach())
            for position, x in enumerate(flat)
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in memory
        ]
        self.own |= {x.untyped_storage()._cdata for _, x in made}
        views = not made and not function._schema.is_mutable
        if not views and not name.startswith(("empty", "new_empty")):
            held = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, (args, kwargs))
            self.graph.calls.append((function, *held, made))
        return out

    def _keep(self, x: Any) -> None:
        if not isinstance(x, Tensor):
            return
        storage = x.untyped_storage()
        if storage._cdata not in self.own and storage._cdata not in self.before:
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)
            self.before[storage._cdata] = whole, whole.clone()


def capture(function: Callable[[], Any]) -> tuple[Recorded, Any]:
    """The :data:`fastfisher.penalise.graphs.Capture` of the stand-in."""
    random = torch.get_rng_state()
    recording = _Recording()
    try:
        with recording:
            result = function()
    finally:
        for whole, before in recording.before.values():
            whole.copy_(before)
        torch.set_rng_state(random)
    return recording.graph, result
