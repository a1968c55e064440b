"""What a penalty is, apart from model and data: its options, what each may be, and which do not go together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastfisher.checks import check_callable, check_choice, check_count, check_flags, check_generator, check_number
from fastfisher.distributed.single import Single
from fastfisher.engine.gates import Gates
from fastfisher.labels import PENALISED, Labels, labels_beside, labels_of
from fastfisher.likelihoods.base import Likelihood
from fastfisher.likelihoods.subject import CROSS_ENTROPY, Subject
from fastfisher.penalise.norm import SQUARED, OfNorm
from fastfisher.penalise.rho import AdaptiveStep, Difference, Step

Method = Literal["double_backprop", "finite_difference"]

EACH = ", of which R is taken one by one"
"""Why a loss of the caller's has to be one value for each example."""

CHOICES: dict[str, tuple[str, ...]] = {
    "method": ("double_backprop", "finite_difference"),
    "gates": ("frozen", "free"),
    "wrt": ("parameters", "inputs"),
    "reduction": ("batch", "first"),
    "difference": ("forward", "central"),
    "scope": ("global", "local"),
}


@dataclass(frozen=True)
class Settings:
    """What R is and how its gradient is taken. Checked on construction; errors name the argument."""

    labels: str | Tensor = "sampled"
    method: Method = "double_backprop"
    gates: Literal["frozen", "free"] | Gates = "frozen"
    wrt: Literal["parameters", "inputs"] = "parameters"
    reduction: Literal["batch", "first"] = "batch"
    step: Step = "auto"
    difference: Difference = "forward"
    subject: Subject = CROSS_ENTROPY
    of: OfNorm = SQUARED

    def __post_init__(self) -> None:
        labels_beside(self.subject.is_loss, self.labels, PENALISED)
        for name in ("method", "gates", "wrt", "reduction", "difference"):
            if not isinstance(value := getattr(self, name), Gates):
                check_choice(name, value, CHOICES[name])
        if not (isinstance(self.step, AdaptiveStep) or (isinstance(self.step, str) and self.step == "auto")):
            check_number("step", self.step, 'a positive number, "auto" or an AdaptiveStep')

    @property
    def kind(self) -> Labels:
        """The kind of labels that R is at."""
        return labels_of(self.labels, PENALISED)

    @property
    def likelihood(self) -> Likelihood:
        """What the model's output stands for."""
        return self.subject.likelihood

    @property
    def differs(self) -> bool:
        """Whether ∇R is a difference of two gradients."""
        return self.method == "finite_difference"

    @property
    def frozen(self) -> bool:
        """Whether the shifted forward replays the gates."""
        return self.gates.frozen if isinstance(self.gates, Gates) else self.gates == "frozen"

    @property
    def of_parameters(self) -> bool:
        """Whether the norm is that of a gradient in the parameters."""
        return self.wrt == "parameters"

    @property
    def first_only(self) -> bool:
        """Whether R is of the first example alone."""
        return self.reduction == "first"

    @property
    def default_step(self) -> bool:
        """Whether the step is the short one of frozen gates, which is chosen by the precision."""
        return self.differs and self.frozen and self.step == "auto"


@dataclass(frozen=True)
class Options:
    """The further options of a :class:`fastfisher.FisherPenalty`, which its docstring explains."""

    settings: Settings
    alpha: float
    every: int
    start: int
    mixed: bool
    examples: int | None
    loss: Callable[[Any, Any], Tensor] | None
    generator: torch.Generator | None
    graphs: bool
    scaler: torch.amp.GradScaler | None
    scope: str
    verify: bool

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha, "a finite number >= 0", 0)
        check_count("every", self.every)
        check_count("start", self.start, 0)
        check_generator(self.generator)
        check_flags(mixed=self.mixed, graphs=self.graphs, verify=self.verify)
        check_callable("loss", self.loss)
        check_count("examples", self.examples, optional=True)
        check_choice("scope", self.scope, CHOICES["scope"])

    def check_together(self, world: Single) -> None:
        """Raises ValueError where options do not go together, or with the processes that share the model."""
        for name, clash, why in CLASHES:
            if clash(self, world):
                raise ValueError(f"{name}: expected {why.format(o=self, s=self.settings, size=world.size)}")

    def check_watched(self) -> None:
        """Raises ValueError where an option needs a forward of its own, and the caller's is to be watched."""
        own = {
            "mixed": self.mixed,
            "examples": self.examples is not None,
            "graphs": self.graphs,
            "loss": self.loss is not None,
            'wrt="inputs"': not self.settings.of_parameters,
            "scaler": self.scaler is not None,
        }
        for name, asked in own.items():
            if asked:
                raise ValueError(f"{name}: not with a forward of the caller's; FisherPenalty.backward runs its own")


def _mixed_alone(o: Options) -> bool:
    s = o.settings
    return (
        o.every == 1
        and s.differs
        and s.difference == "forward"
        and s.of_parameters
        and o.examples is None
        and not s.first_only
    )


CLASHES: tuple[tuple[str, Callable[[Options, Single], Any], str], ...] = (
    (
        "gates",
        lambda o, w: isinstance(o.settings.gates, Gates),
        '"frozen" or "free"; FisherPenalty records its own',
    ),
    (
        "labels",
        lambda o, w: isinstance(o.settings.labels, Tensor),
        '"sampled", "true", "uniform" or "rademacher", got a tensor',
    ),
    (
        "examples",
        lambda o, w: o.examples is not None and o.settings.first_only,
        'None with reduction="first", which is on one example',
    ),
    (
        "step",
        lambda o, w: o.mixed and not o.settings.frozen and o.settings.step == "auto",
        'a number with mixed=True and gates="free", whose step cannot adapt itself',
    ),
    (
        "mixed",
        lambda o, w: o.mixed and not _mixed_alone(o),
        "every=1, a forward finite difference in the parameters, and the whole batch with mixed=True, got "
        "every={o.every}, method={s.method!r}, difference={s.difference!r}, wrt={s.wrt!r}, examples={o.examples}, "
        "reduction={s.reduction!r}",
    ),
    (
        "scaler",
        lambda o, w: o.graphs and o.scaler is not None,
        "None with graphs=True, whose captured steps keep what overflowed; autocast in bfloat16 needs no scaler",
    ),
    (
        "scope",
        lambda o, w: w.sharded and o.scope == "local",
        '"global" with fully_shard, whose backward sums over the processes',
    ),
    (
        "method",
        lambda o, w: w.sharded and not o.settings.differs,
        '"finite_difference" with fully_shard, which has no second derivative',
    ),
    (
        "scaler",
        lambda o, w: not w.alone and o.scaler is not None,
        "None where several processes share a batch, of which one alone may overflow; autocast in bfloat16 needs no "
        "scaler",
    ),
    (
        "graphs",
        lambda o, w: not w.alone and o.graphs,
        "False where several processes share a batch, whose messages wait",
    ),
    (
        "examples",
        lambda o, w: o.examples is not None and o.scope == "global" and o.examples < w.size,
        "at least one for each of {size} processes, got {o.examples}",
    ),
)
"""An argument, when it clashes with the others or with the processes, and what was expected of it."""
