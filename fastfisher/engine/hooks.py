"""Whether a hook within a model changes the gradient that it is given."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fastfisher.engine.calls import tensors_in

Hook = Callable[..., Any]


def watched(hook: Hook, given: int, note: Callable[[str], None]) -> Hook:
    """``hook``, with its name noted when it gives another gradient than its argument ``given``."""

    @functools.wraps(hook, updated=())
    def watched(*args: Any) -> Any:
        was = list(tensors_in(args[given]))
        versions = [x._version for x in was]
        out = hook(*args)
        now = was if out is None else list(tensors_in(out))
        same = len(now) == len(was) and all(a is b or torch.equal(a, b) for a, b in zip(was, now, strict=True))
        if not (same and versions == [x._version for x in was]):
            note(getattr(hook, "__qualname__", type(hook).__qualname__))
        return out

    return watched


@contextmanager
def watched_hooks(model: nn.Module | None, watch: Callable[[Hook, int], Hook]) -> Iterator[None]:
    """Within, a forward takes the modules' backward hooks as ``watch(hook, place of the gradient)`` makes them."""
    places = [] if model is None else list(model.modules())
    hooks = [hooked for m in places for hooked in (m._backward_hooks, m._backward_pre_hooks) if hooked]
    own = [(hooked, dict(hooked)) for hooked in hooks]
    try:
        for hooked, before in own:
            for key, hook in before.items():  # (module, the gradient, …)
                hooked[key] = watch(hook, 1)
        yield
    finally:
        for hooked, before in own:
            for key, hook in before.items():
                if key in hooked:
                    hooked[key] = hook
