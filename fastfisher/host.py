"""Which values the host may read at once, and for which it would have to wait."""

from __future__ import annotations

from torch import Tensor

HOST = "cpu"
"""The type of device whose values the host reads at once; a test has others wait, too."""


def looking_waits(x: Tensor) -> bool:
    """Whether the host would wait for a value, as on a GPU, where that stalls the stream."""
    return x.device.type != HOST
