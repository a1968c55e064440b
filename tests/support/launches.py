"""What a step launches on a device, counted without one: on tensors without values (``device="meta"``)."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

HOST = torch.device("cpu")


class Launches(TorchDispatchMode):
    """Counts the calls that are kernels: all but those that only look at memory in another way, or take some.

    Attributes:
        kernels: how often each was called.
        copies: the calls that bring values from the host. A CPU tensor without dimensions is an argument of a kernel,
            but for the functions that copy it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self._made = _Made(self.copies)

    def __enter__(self) -> Launches:
        self._made.__enter__()
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._made.__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        given, made = ([x for x in tree_flatten(t)[0] if isinstance(x, Tensor)] for t in ((args, kwargs), out))
        name = function._schema.name.split("::")[1]
        on_device = any(x.device != HOST for x in (*given, *made))
        if on_device and any(x.device == HOST and (x.dim() > 0 or name in _COPIED) for x in given):
            self.copies[name] += 1
        memory = {x.untyped_storage()._cdata for x in given}
        view = made and all(x.untyped_storage()._cdata in memory for x in made) and not function._schema.is_mutable
        if on_device and not view and not name.startswith(("empty", "new_empty")) and name not in _NOTHING:
            self.kernels[name] += 1
        return out


class _Made(TorchFunctionMode):
    """Counts the tensors that are made of numbers of the host: no call of a kernel shows them."""

    def __init__(self, copies: Counter[str]) -> None:
        self.copies = copies

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if function in (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy) and out.device != HOST:
            self.copies[function.__name__] += 1
        return out


_COPIED = ("_to_copy", "copy_", "where", "stack", "cat")
_NOTHING = ("detach", "alias", "set_", "lift_fresh", "_reshape_alias", "_unsafe_view")
