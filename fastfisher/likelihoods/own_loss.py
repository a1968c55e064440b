"""A loss of the caller's in the place of a likelihood: it says nothing of a distribution."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastfisher.likelihoods.base import Likelihood


class OwnLoss(Likelihood):
    """The output is the loss itself, one value for each example; see :class:`fastfisher.outputs.Losses`."""

    needs_targets = False

    def fit(self, output: Tensor, targets: Any, *, name: str = "targets", **how: Any) -> Any:
        """What the loss was made of: the output knows."""
        return targets

    def nll(self, output: Tensor, labels: Tensor) -> Tensor:
        """The output."""
        return output

    def loss(self, output: Tensor, labels: Any, reduction: str = "mean") -> Tensor:
        """See :meth:`.Likelihood.loss`; one value that stands for all examples alike is not summed to be divided."""
        if reduction == "mean" and output.stride() == (0,):
            return output[0]
        return output if reduction == "none" else output.sum() if reduction == "sum" else output.mean()


OWN_LOSS = OwnLoss()
