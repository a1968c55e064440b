"""What a forward shows of how the logits depend on the parameters: whether Tr(H) = Tr(F), and what may be left out.

With S = diag(p) − ppᵀ the Hessian is E[JᵀSJ] + E[Σ_c (p − y)_c ∇²logit_c], and the trace of the first part is Tr(F).
Where every logit is piecewise linear in each single parameter, all ∇²logit_c have a zero diagonal: Tr(H) = Tr(F),
whatever the labels y.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastfisher.distributed.single import Single
from fastfisher.engine.taylor import NoRule, Tape
from fastfisher.inputs import Call, count_examples, take_rows
from fastfisher.likelihoods.base import Likelihood
from fastfisher.measure.mean_loss import forward
from fastfisher.model import call_copy


@dataclass(frozen=True)
class LogitsForm:
    """What a forward shows of how the logits depend on the parameters.

    Attributes:
        columns: how many backwards an example takes where its Fisher information is taken whole, by its root.
        rows: how many rows of output an example has: 1 of a classifier, positions, or numbers.
        curved: why they may not be piecewise linear in every single parameter; None where they are.
        coupled: why the trace of the Gauss-Newton part may not be that of the Fisher matrix, as it is of natural
            parameters that depend on their own example alone, in eval mode; None where it is.
        unknown: whether an operation has no rule in :mod:`fastfisher.engine.taylor`.
    """

    columns: int
    rows: int
    curved: str | None
    coupled: str | None
    unknown: bool


def logits_form(model: nn.Module, parameters: dict[str, Tensor], inputs: Call, likelihood: Likelihood) -> LogitsForm:
    """Looks at the operations that a forward really runs; see :meth:`.taylor.Tape.why_not_multilinear`."""
    tape, unknown = Tape(parameters), False
    try:
        logits = forward(model, inputs, tape)
        curved = tape.why_not_multilinear(logits)
    except NoRule as error:
        curved, unknown = str(error), True
        logits = forward(model, inputs)
    coupled = None
    if not likelihood.natural:
        coupled = f"the Hessian of the loss of {type(likelihood).__name__} in the output depends on the targets"
    elif any(module.training for module in model.modules()):
        coupled = "the model is in train mode, and Tr(F) is taken in eval mode"
    elif not _same_alone(model, inputs, logits.detach()):
        coupled = "the logits of an example are not the same in another batch"
    rows = likelihood.shape_of_labels(logits)[1:].numel()
    return LogitsForm(rows * likelihood.columns(logits), rows, curved, coupled, unknown)


def agreed_form(form: LogitsForm, world: Single, device: torch.device) -> LogitsForm:
    """The form on which all processes go on: each looked at a batch of its own, and they must take the same way."""
    flags = [form.curved is not None, form.coupled is not None, form.unknown]
    everyone = world.gather(torch.tensor(flags, dtype=torch.float64, device=device)).view(world.size, -1)
    curved, coupled, unknown = (bool(flag) for flag in everyone.any(0))
    elsewhere = "another process found so"
    return LogitsForm(
        form.columns,
        form.rows,
        form.curved or (elsewhere if curved else None),
        form.coupled or (elsewhere if coupled else None),
        unknown,
    )


SAME = 3e-4
"""Up to what difference, over the largest logit, logits count as the same: rounding of float32 and no more."""


def _same_alone(model: nn.Module, inputs: Call, logits: Tensor) -> bool:
    """Whether the logits of the first and the last example are the same without the others, and in the other order."""
    if len(logits) == 1:
        return True
    if count_examples(inputs) != len(logits):
        return False
    two = torch.tensor([len(logits) - 1, 0])
    expected = logits[two.to(logits.device)]

    def call() -> Tensor:
        with torch.enable_grad():  # models may go another way without
            return call_copy(model, {}, take_rows(inputs, two)).detach()

    try:
        alone = call()
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a model for batches of one size fails again, whatever passed by does not
        try:
            alone = call()
        except torch.OutOfMemoryError:
            raise
        except Exception:
            return False
    if alone.shape != expected.shape:
        return False
    finite = logits[logits.isfinite()]
    tolerance = max(SAME, torch.finfo(logits.dtype).eps ** 0.5) * (finite.abs().max() if len(finite) else 0)
    return bool(((alone == expected) | ((alone - expected).abs() <= tolerance)).all())
