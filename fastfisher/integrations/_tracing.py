"""What the callbacks that note Tr(F) have in common: when, with which draws, under which names."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fastfisher.checks import check_count, check_generator
from fastfisher.measure.fisher import trace_fisher
from fastfisher.placement import is_initialised, is_sharded


class TraceAtSteps:
    """Tr(F) every so many steps, with draws that depend on the step alone: a resumed run has those of a whole one.

    Args:
        every_n_steps: so many steps from one measurement to the next.
        options: those of :func:`fastfisher.trace_fisher`; of a generator the seed is taken once.

    Raises:
        ValueError: ``every_n_steps`` is not an integer ≥ 1.
        TypeError: an option is none of ``trace_fisher``.
    """

    def __init__(self, every_n_steps: int, options: dict[str, Any]) -> None:
        check_count("every_n_steps", every_n_steps)
        inspect.signature(trace_fisher).bind(None, None, **options)
        generator = options.pop("generator", None)
        check_generator(generator)
        self.every_n_steps, self.options, self._seed = every_n_steps, options, 0
        if generator is not None:
            self._seed = int(torch.randint(1 << 62, (), generator=generator, device=generator.device))

    def due(self, step: int) -> bool:
        """Whether to measure after so many steps."""
        return step % self.every_n_steps == 0

    def measure(self, model: nn.Module, data: Any, step: int) -> dict[str, float]:
        """What goes into the log: of the data of all processes that train the model."""
        generator = torch.Generator().manual_seed(self._seed + step)
        shared = is_initialised() and dist.get_world_size() > 1 and not is_sharded(model)
        group = {"process_group": dist.group.WORLD} if shared else {}
        trace = trace_fisher(model, data, generator=generator, **{**group, **self.options})
        return {"fisher_trace": trace.value, "fisher_trace_error": trace.standard_error}
