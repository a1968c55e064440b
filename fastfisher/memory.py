"""How much memory a GPU has left, to choose by it how many examples go through a model at once."""

from __future__ import annotations

import torch

BATCH = 128
"""So many examples at a time are enough for a CPU, and for the first batch on a GPU."""

ROOM = 8
"""A batch is doubled where so many times the activations of the last one would still fit: the next one has twice as
many, and its backward holds less than three times those."""


def held(device: torch.device) -> int:
    """The bytes that tensors on the device take; 0 on a CPU, where nobody counts them."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def free(device: torch.device) -> int:
    """The bytes that can still be had on a GPU: those of the driver, and those that PyTorch keeps for later."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def may_double(activations: int, device: torch.device) -> bool:
    """Whether a batch of twice as many examples fits, where the last one's forward kept so many bytes.

    Never on a CPU: more examples at once are no faster there.
    """
    return device.type == "cuda" and activations * ROOM <= free(device)
