"""What a penalty remembers from one step to the next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastfisher.distributed.sharded import local_part, placed_like
from fastfisher.model import trainable_parameters
from fastfisher.ops.sampled import new_key
from fastfisher.penalise.options import Options
from fastfisher.penalise.outcome import Outcome
from fastfisher.penalise.rho import AdaptiveStep
from fastfisher.penalise.shift import Gradients

_NO_KEY = [0, -1]
_NO_ROWS = -1
"""What a state holds before the first penalty: of the same types as later, for torch.distributed.checkpoint."""


class Memory:
    """The key of the labels, R and its gradient as they were taken last, the adaptive step, and how many steps came.

    Tensors are written in place for good once there are captured steps, which read them where they are.

    Attributes:
        in_place: whether captured steps read what is here, so that it has to stay where it is.
        steps: how many steps were taken.
        key: (seed, offset) of the labels that were drawn last; None before.
        value: R at the last recomputation; None before.
        rows: the rows of logits that it is the mean over.
        reused: ∇R by name, to be reused.
    """

    def __init__(self, model: nn.Module, options: Options) -> None:
        self.model, self.kind, self.generator = model, options.settings.kind, options.generator
        self.step, self.in_place = options.settings.step, options.graphs
        self.steps = 0
        self.key: Tensor | None = None
        self.value: Tensor | None = None
        self.rows: int | Tensor | None = None
        self.reused: Gradients | None = None

    def next_key(self, device: torch.device, rank: int) -> Tensor | None:
        """The key of the next labels; None where none are drawn. The first one is of the generator, and of each process
        its own, where all are seeded alike; a world that shares a batch takes that of rank 0."""
        if not self.kind.drawn:
            return None
        if self.key is None:
            self.key = new_key(self.generator, device)
            if rank:
                self.key[0] += rank
        else:
            self.key[1] += 1
        return self.key

    def note(self, outcome: Outcome) -> None:
        """A step was taken."""
        self.steps += 1
        if outcome.value is not None:
            self.value, self.rows = outcome.value, outcome.rows
        if outcome.reused is not None:
            self.reused = outcome.reused

    def of(self, trainable: Gradients) -> Gradients:
        """∇R to be reused, of the parameters that require a gradient now."""
        return {name: g for name, g in (self.reused or {}).items() if name in trainable}

    def keep(self, penalty: Gradients) -> Gradients:
        """∇R for the steps to come, in the place of the last one where captured steps read it there."""
        kept = self.reused if self.in_place and self.reused is not None else {}
        return {name: kept[name].copy_(g) if name in kept else g for name, g in penalty.items()}

    @property
    def places(self) -> list[Tensor | None]:
        """The tensors that a captured step reads."""
        return [self.key, self._rho, *(self.reused or {}).values()]

    @property
    def _rho(self) -> Tensor | None:
        return self.step._rho if isinstance(self.step, AdaptiveStep) else None

    def state_dict(self, reuses: bool) -> dict[str, Any]:
        """See :meth:`fastfisher.FisherPenalty.state_dict`; ``reuses``: with the gradient for reuse."""
        trainable = trainable_parameters(self.model)
        value = self.value if self.value is not None else torch.zeros((), dtype=torch.float64)
        reused = None
        if reuses:  # all of them, also before there is one: a fresh process has where to load them
            found = self.reused or {}
            reused = {n: found[n].clone() if n in found else torch.zeros_like(p.detach()) for n, p in trainable.items()}
        return {
            "key": torch.tensor(_NO_KEY) if self.key is None else self.key.clone(),
            "steps": self.steps,
            "value": value.clone(),
            "rows": _NO_ROWS if self.rows is None else int(self.rows),
            "reused": reused,
            "rho": self.step.rho if isinstance(self.step, AdaptiveStep) else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`fastfisher.FisherPenalty.load_state_dict`."""
        expected = {"key", "steps", "value", "rows", "reused", "rho"}
        if set(state) != expected:
            raise ValueError(f"state: expected the keys {sorted(expected)}, got {sorted(state)}")
        trainable = trainable_parameters(self.model)
        for name, gradient in (state["reused"] or {}).items():
            if name not in trainable or trainable[name].shape != gradient.shape:
                raise ValueError(f"state: the reused gradient of {name!r} does not fit a parameter of the model")
        device = next(iter(trainable.values())).device
        drawn = state["key"] is not None and state["key"].tolist() != _NO_KEY
        self.key = _placed(self.key, state["key"].to(device, copy=True)) if drawn else None
        taken = state["rows"] is not None and int(state["rows"]) != _NO_ROWS
        self.steps, self.rows = state["steps"], state["rows"] if taken else None
        self.value = state["value"].to(device, copy=True) if taken else None
        # A gradient of 0 stands for that of a parameter that is not used, too: such a one keeps its .grad of None.
        reused = {n: placed_like(g, trainable[n]) for n, g in (state["reused"] or {}).items() if taken}
        kept = self.reused or {}
        found = {n: _placed(kept.get(n), g) for n, g in reused.items() if bool(local_part(g).any())}
        self.reused = found or None
        if isinstance(self.step, AdaptiveStep):
            self.step.rho = state["rho"]

    @contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """Puts the key and the adaptive step back where anything is raised within, in the memory where they are."""
        key, rho = self.key, self._rho
        key_before, rho_before = (None if x is None else x.clone() for x in (key, rho))
        try:
            yield
        except BaseException:
            self.key = _restored(key, key_before)
            if isinstance(self.step, AdaptiveStep):
                self.step._rho = _restored(rho, rho_before)
            raise


def _restored(x: Tensor | None, before: Tensor | None) -> Tensor | None:
    return x if x is None or before is None else x.copy_(before)


def _placed(kept: Tensor | None, value: Tensor) -> Tensor:
    """The value in the memory that is kept for it, if it fits there: captured steps go on reading that."""
    fits = kept is not None and (kept.shape, kept.dtype, kept.device) == (value.shape, value.dtype, value.device)
    return kept.copy_(value) if kept is not None and fits else value
