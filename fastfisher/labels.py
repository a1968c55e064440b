"""Which labels a gradient is taken at: one class for each kind, with all that penalty and measurements ask of it.

The penalty needs the loss as a function that can be differentiated, and taken again with other parameters (``loss``);
the measurements need its gradient in the output of the model (``cotangents``). What a label is, and which distribution
it has, is said by the likelihood (:mod:`fastfisher.likelihoods`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from fastfisher.likelihoods.base import Chosen, Likelihood
from fastfisher.likelihoods.categorical import CATEGORICAL

NO_LABEL = ", which is an expectation over all labels; here a gradient is taken at one label of each row"

LabelName = Literal["sampled", "true", "uniform", "rademacher", "exact"]


@dataclass(frozen=True)
class Rows:
    """Rows of a model's output whose labels are wanted.

    Attributes:
        likelihood: what the output stands for.
        output: (N, …), its classes, if any, last.
        targets: such as fit the output; None where there are none. The rows that they leave out (−100) have no part in
            anything, whichever the labels.
        key: what labels are drawn with; None where they are not ``drawn``.
        first: the number of the first row.
    """

    likelihood: Likelihood
    output: Tensor
    targets: Any = None
    key: Tensor | None = None
    first: int = 0

    @property
    def draw(self) -> tuple[Tensor, Tensor, int]:
        """The arguments of the likelihood's functions that draw."""
        assert self.key is not None
        return self.output, self.key, self.first

    @functools.cached_property
    def out(self) -> Tensor | None:
        """The rows that are left out; None where there are none."""
        return self.likelihood.ignored(self.output, self.targets)

    def labels(self, labels: Chosen) -> Chosen:
        """The labels without the rows that are left out."""
        return labels if self.out is None else self.likelihood.leave_out(labels, self.out)

    def cotangent(self, cotangent: Tensor) -> Tensor:
        """The cotangent with 0 in the rows that are left out."""
        return cotangent if self.out is None else cotangent.masked_fill(self.likelihood.over_rows(self.out), 0)


class Labels:
    """A kind of labels."""

    name: ClassVar[str] = ""
    drawn: ClassVar[bool] = False
    """Whether it takes a key to have such labels."""

    of_model: ClassVar[bool] = False
    """Whether the labels have the distribution that the output stands for, which has to be one: no NaN."""

    def check_targets(self, targets: Any, likelihood: Likelihood = CATEGORICAL) -> None:
        """Raises ValueError where the labels are the targets, the likelihood needs some, and there are none."""

    def of(self, likelihood: Likelihood) -> Likelihood:
        """The likelihood whose loss is taken at such labels: where they are not given, the distribution alone."""
        return likelihood.distribution if self.drawn or self.of_model else likelihood

    def fitted(self, likelihood: Likelihood, output: Tensor, **how: Any) -> Labels:
        """The same, where labels are given as the loss takes them; ``how`` as in :meth:`.Likelihood.fit`."""
        return self

    def of_first(self) -> Labels:
        """The same for the first example alone."""
        return self

    def choose(self, rows: Rows) -> Chosen:
        """A label for each row.

        Raises:
            ValueError: the kind is not one label a row.
        """
        raise ValueError(f'labels: got "{self.name}"{NO_LABEL}')

    def loss(self, rows: Rows) -> tuple[Tensor, Chosen]:
        """The mean loss at such labels, and the labels, so that ``likelihood.loss`` can be taken at them elsewhere."""
        rows.likelihood.check(rows.output)
        chosen = self.choose(rows)
        return rows.likelihood.loss(rows.output, chosen, "mean"), chosen

    def cotangents(self, rows: Rows) -> Iterator[Tensor]:
        """The gradient of the summed loss in the output; where there are several, their squared norms add up."""
        yield rows.likelihood.gradient(rows.output, self.choose(rows))


class Sampled(Labels):
    """ŷ ~ p(y | output): the expectation of ‖∇ℓ(ŷ)‖² is the trace of the Fisher matrix (eq. 2 of the paper)."""

    name, drawn, of_model = "sampled", True, True

    def choose(self, rows: Rows) -> Chosen:
        return rows.labels(rows.likelihood.draw(*rows.draw))

    def loss(self, rows: Rows) -> tuple[Tensor, Chosen]:
        rows.likelihood.check(rows.output)
        losses, labels = rows.likelihood.drawn_loss(*rows.draw)
        if rows.out is None:
            return losses.mean(), labels
        return losses.masked_fill(rows.out, 0).sum() / (~rows.out).sum(), rows.labels(labels)

    def cotangents(self, rows: Rows) -> Iterator[Tensor]:
        yield rows.cotangent(rows.likelihood.drawn_gradient(*rows.draw))


class TrueLabels(Labels):
    """The targets: the labels of the empirical Fisher matrix."""

    name = "true"

    def check_targets(self, targets: Any, likelihood: Likelihood = CATEGORICAL) -> None:
        if targets is None and likelihood.needs_targets:
            raise ValueError('targets: expected the true labels with labels="true", got None')

    def choose(self, rows: Rows) -> Chosen:
        chosen: Tensor = rows.targets  # the loss itself leaves out what they leave out
        return chosen


class Uniform(Labels):
    """Labels drawn without a look at the output, all alike probable (GP_r of the paper)."""

    name, drawn = "uniform", True

    def choose(self, rows: Rows) -> Chosen:
        return rows.labels(rows.likelihood.draw_uniform(*rows.draw))


class Rademacher(Labels):
    """Random signs in place of labels.

    The gradient has the mean and the covariance of that at a sampled label, so its squared norm the same expectation,
    and, once the data are fitted, a far smaller variance.
    """

    name, drawn, of_model = "rademacher", True, True

    def choose(self, rows: Rows) -> Chosen:
        return rows.labels(rows.likelihood.draw_signs(*rows.draw))

    def cotangents(self, rows: Rows) -> Iterator[Tensor]:
        yield rows.cotangent(rows.likelihood.signs_gradient(*rows.draw))


class Exact(Labels):
    """All labels with their probabilities: cotangents whose squared norms add up to the expectation E_ŷ‖∇ℓ(ŷ)‖².

    They are the columns of a square root of the output's Fisher information, each for one row of an example at a time:
    the labels of its rows are independent, so their gradients' squared norms add up.
    """

    name, of_model = "exact", True

    def cotangents(self, rows: Rows) -> Iterator[Tensor]:
        count = rows.likelihood.shape_of_labels(rows.output)[1:].numel()
        for column in map(rows.cotangent, rows.likelihood.root(rows.output)):
            if count == 1:
                yield column
                continue
            flat = column.reshape(len(column), count, -1)
            for row in range(count):
                one = flat.new_zeros(flat.shape)
                one[:, row] = flat[:, row]
                yield one.view_as(column)


class Given(Labels):
    """Labels that the caller gives as a tensor, in place of the targets."""

    name = "given"

    def __init__(self, given: Tensor) -> None:
        self.given = given

    def fitted(self, likelihood: Likelihood, output: Tensor, **how: Any) -> Labels:
        return Given(likelihood.fit(output, self.given, name="labels", **how))

    def of_first(self) -> Labels:
        return Given(self.given[:1])

    def choose(self, rows: Rows) -> Chosen:
        return rows.labels(self.given)


KINDS: dict[str, Labels] = {kind.name: kind for kind in (Sampled(), TrueLabels(), Uniform(), Rademacher(), Exact())}

PENALISED = ("sampled", "true", "uniform", "rademacher")
"""The kinds that are one label a row, at which a gradient can be penalised."""


def labels_of(labels: Any, names: Sequence[str] = tuple(KINDS), *, given: bool = True) -> Labels:
    """The kind of labels that an argument means: a name, or a tensor of labels.

    Args:
        labels: the argument.
        names: the kinds that the function serves.
        given: whether it takes a tensor.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(labels, Tensor) and given:
        return Given(labels)
    if isinstance(labels, str) and labels in names:
        return KINDS[labels]
    *others, last = [*(f'"{name}"' for name in names), *(["a tensor"] if given else [])]
    got = "a tensor" if isinstance(labels, Tensor) else repr(labels)
    reason = NO_LABEL if isinstance(labels, str) and labels == "exact" else ""
    raise ValueError(f"labels: expected {', '.join(others)} or {last}, got {got}{reason}")


def labels_beside(loss: bool, labels: Any, names: Sequence[str] = tuple(KINDS), *, given: bool = True) -> Labels:
    """:func:`labels_of`, beside a loss of the caller's where there is one (``loss``).

    Raises:
        ValueError: as there, or the labels are not the targets, the only ones that such a loss has.
    """
    kind = labels_of(labels, names, given=given)
    if loss and kind.name != "true":
        raise ValueError(
            f"loss: expected None with labels={labels!r}: a loss of your own says no distribution that labels could be "
            'drawn from; it goes with labels="true", or a likelihood= in its place'
        )
    return kind
