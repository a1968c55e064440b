"""The states of torch's default random number generators, to be put back for a forward that repeats another."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class RandomState:
    """The states of the CPU's and of some devices' default generators."""

    cpu: Tensor
    cuda: dict[int, Tensor]

    @classmethod
    def current(cls, devices: Iterable[int]) -> RandomState:
        """The states now, for the CPU and the CUDA devices given by index."""
        return cls(torch.get_rng_state(), {i: torch.cuda.get_rng_state(i) for i in devices})

    @classmethod
    def on_devices_of(cls, tensors: Iterable[Tensor]) -> RandomState:
        """The states now, for the CPU and the CUDA devices of some tensors."""
        return cls.current({x.device.index for x in tensors if x.device.type == "cuda"})

    def restore(self) -> None:
        """Puts the generators into these states."""
        torch.set_rng_state(self.cpu)
        for index, state in self.cuda.items():
            torch.cuda.set_rng_state(state, index)

    def has_moved(self) -> bool:
        """Whether any of the generators is in another state now."""
        now = RandomState.current(self.cuda)
        return not torch.equal(now.cpu, self.cpu) or any(not torch.equal(now.cuda[i], s) for i, s in self.cuda.items())
