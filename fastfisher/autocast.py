"""The autocast that a call finds, asked the same way on every device, also on those that have none ("meta")."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype that autocast computes in on this type of device; None where it is off or there is none."""
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return None
    return torch.get_autocast_dtype(device)


def autocast_of(device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """A context as the caller's autocast is now, for a backward, where autograd does not restore it."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext
    found = autocast_dtype(device.type)
    dtype = torch.get_autocast_dtype(device.type) if found is None else found
    return lambda: torch.autocast(device.type, dtype=dtype, enabled=found is not None, cache_enabled=False)
