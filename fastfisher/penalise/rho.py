"""ρ, the length of the step of a finite difference: what it is by default, and how it adapts with free gates."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from fastfisher.checks import check_number

Difference = Literal["forward", "central"]

FROZEN_STEP: dict[torch.dtype, dict[str, float]] = {
    torch.float64: {"forward": 1e-7, "central": 1e-5},
    torch.float32: {"forward": 2e-4, "central": 1e-3},
    torch.float16: {"forward": 1e-2, "central": 3e-2},
    torch.bfloat16: {"forward": 5e-2, "central": 1e-1},
}
"""ρ with frozen gates, by the precision of the forward (TF32 counts as float16, which has as many bits).

Chosen for the smallest worst error over SimpleCNN and VGG-11, at initialisation and after 50 steps, on digits and on
noise (``bench/step_size.py`` prints the table).
"""

INPUTS_STEP = 0.5
"""Shifted inputs take this times ‖x‖, over the whole batch, times the step of parameters: their size is their own.

Chosen on eight networks of the paper, digits and noise, at initialisation and after 50 steps: the worst error in
float32 is 6e-3 (forward) and 5e-4 (central). A step of the parameters' length erred up to 9e-2, by rounding.
"""

REACH = {"forward": 2e-2, "central": 1e-1}
"""How far logits may move (root mean square) over a default step with frozen gates.

The error of a forward difference was about half of that movement, that of a central one its square, on networks of
ReLUs, sorts and maxima whose logits have a scale from 0.2 to 200.
"""

CEILING = 0.5
"""The relative change of the gradient above which a short step with frozen gates is not believed."""

FREE_START = 1e-2
"""The first ρ with free gates, as a fraction of ‖θ‖; :class:`AdaptiveStep` takes it from there."""


class AdaptiveStep:
    """A step ρ for free gates that follows the relative change of the gradient, ‖∇ℓ_ŷ(θ + ρd) − g‖/‖g‖.

    With free gates a step must be long enough to cross many kinks, or it measures their noise; neither a fixed ρ nor a
    fixed fraction of ‖θ‖ carries over between networks, but the relative change it causes does. After each penalty ρ
    is multiplied by target/change, at most doubled or halved: no pass is spent on it.

    Args:
        target: the relative change to hold.
        rho: the ρ to start with; ``FREE_START``·‖θ‖ at the first penalty otherwise.

    Raises:
        ValueError: an argument is no positive number; it is named.
    """

    def __init__(self, target: float = 0.5, rho: float | None = None) -> None:
        check_number("target", target)
        self.target = target
        self._rho: Tensor | None = None  # on the device, so that no step waits for it
        self.rho = rho

    @property
    def rho(self) -> float | None:
        """The current ρ; None before the first penalty."""
        return None if self._rho is None else float(self._rho)

    @rho.setter
    def rho(self, value: float | None) -> None:
        if value is not None:
            check_number("rho", value, "a positive number or None")
        if value is None or self._rho is None:
            self._rho = None if value is None else torch.tensor(value, dtype=torch.float64)
        else:
            self._rho.fill_(value)  # captured steps go on reading it where it is

    def current(self, norm: Callable[[], Tensor], device: torch.device) -> Tensor:
        """The ρ to use, a float64 scalar on the device, where the shifted quantity has norm ``norm()``."""
        if self._rho is None:
            start = norm()
            self._rho = FREE_START * torch.where(start > 0, start, 1.0)
        elif self._rho.device != device:
            self._rho = self._rho.to(device)
        return self._rho

    def update(self, change: Tensor) -> None:
        """Takes note of the relative change that the current ρ caused; one that is not finite says nothing."""
        if self._rho is not None:
            factor = (self.target / change.clamp(min=1e-12)).clamp(0.5, 2.0)
            self._rho.mul_(torch.where(change.isfinite(), factor, 1.0))


Step = Literal["auto"] | float | AdaptiveStep


def lower_precision(device: torch.device) -> torch.dtype | None:
    """What PyTorch's switches let products of float32 be computed in, as a dtype as coarse; None for float32."""
    backends: Any = torch.backends
    cuda, cpu = (backends.cuda.matmul, backends.cudnn.conv), (backends.mkldnn.matmul, backends.mkldnn.conv)
    allowed = [place.fp32_precision for place in {"cuda": cuda, "cpu": cpu}.get(device.type, ())]
    return torch.bfloat16 if "bf16" in allowed else torch.float16 if "tf32" in allowed else None  # as many bits as TF32


def coarsest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The floating dtype with the fewest bits of precision."""
    return max((dtype for dtype in dtypes if dtype.is_floating_point), key=lambda dtype: torch.finfo(dtype).eps)
