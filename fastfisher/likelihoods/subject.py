"""What a gradient is of: the likelihood that the model's output stands for, or a loss of the caller's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from fastfisher.checks import check_callable
from fastfisher.likelihoods.base import Likelihood
from fastfisher.likelihoods.categorical import CATEGORICAL
from fastfisher.likelihoods.elementwise import BERNOULLI, Gaussian, Poisson
from fastfisher.likelihoods.own_loss import OWN_LOSS
from fastfisher.outputs import OUTPUT, Losses, Output, OwnLossFunction, Reading, check_class_dim

LikelihoodName = Literal["categorical", "bernoulli", "gaussian", "poisson"]

BY_NAME: dict[str, Likelihood] = {
    "categorical": CATEGORICAL,
    "bernoulli": BERNOULLI,
    "gaussian": Gaussian(),
    "poisson": Poisson(),
}


@dataclass(frozen=True)
class Subject:
    """What a gradient is of.

    Attributes:
        likelihood: what the tensor that is read stands for.
        reading: how that tensor is read of what the model returns.
    """

    likelihood: Likelihood = CATEGORICAL
    reading: Reading = OUTPUT

    @property
    def is_loss(self) -> bool:
        """Whether it is a loss of the caller's, which has no Fisher matrix."""
        return self.reading.takes_targets

    def fit(self, output: Tensor, targets: Any, **how: Any) -> Any:
        """The targets as the likelihood's loss takes them, of those that the caller gave."""
        return self.likelihood.fit(output, targets, class_dim=self.reading.class_dim, **how)


CROSS_ENTROPY = Subject()


def subject_of(
    likelihood: Any = "categorical",
    class_dim: Any = None,
    logits_of: Callable[[Any], Tensor] | None = None,
    loss: OwnLossFunction | None = None,
    *,
    each: str | None = None,
) -> Subject:
    """What the arguments of these names mean.

    Args:
        likelihood: a name of BY_NAME, or a likelihood.
        class_dim: which dimension of the output holds the classes, of a likelihood that has some.
        logits_of: finds the output of the distribution in what the model returns.
        loss: a loss of what the model returns and the targets, in the place of a likelihood.
        each: why the loss has to be one value for each example; None where a scalar will do.

    Raises:
        ValueError: an argument is none of these, or they do not go together; it is named.
    """
    found = likelihood_of(likelihood)
    check_class_dim(class_dim)
    check_callable("logits_of", logits_of)
    check_callable("loss", loss)
    if class_dim is not None and found.row_dims != 1:
        raise ValueError(
            f"class_dim: expected None with likelihood={type(found).__name__}, whose output has no dimension of "
            f"classes, got {class_dim}"
        )
    if loss is None:
        return Subject(found, Output(class_dim, found.row_dims, logits_of))
    if found is not CATEGORICAL:
        raise ValueError(f"likelihood: expected none beside loss=, which stands in its place, got {likelihood!r}")
    if logits_of is not None:
        raise ValueError("logits_of: expected None with loss=, which gets all that the model returns")
    return Subject(OWN_LOSS, Losses(loss, each is not None, each or ""))


def likelihood_of(likelihood: Any) -> Likelihood:
    """The likelihood that an argument means: a name, or an object.

    Raises:
        ValueError: it is none.
    """
    if isinstance(likelihood, Likelihood):
        return likelihood
    if isinstance(likelihood, str) and likelihood in BY_NAME:
        return BY_NAME[likelihood]
    got = repr(likelihood) if not isinstance(likelihood, type) else f"the class {likelihood.__name__}; give an object"
    names = ", ".join(f'"{name}"' for name in BY_NAME)
    raise ValueError(f"likelihood: expected {names} or a fastfisher.Likelihood, got {got}")
