"""zᵀHz of a loss for many directions z: the second derivative of the loss along z, without a backward per direction.

Let every operation y = f(x) of the forward carry, besides its value, its derivatives y′ and y″ along θ + tz. The loss's
second derivative is zᵀHz. Second derivatives obey y″ = f′(x)·x″ + f″(x)[x′, x′]: linear in x″, with a source term. So
the loss's second derivative is the sum over operations of the source, weighted by how the loss answers to it, and that
is the gradient δ = ∂loss/∂y, which does not depend on z:

    zᵀHz = Σ over operations ⟨δ, f″(x)[x′, x′]⟩.

One forward and one backward (of data gradients alone) give x and δ, for all directions; a direction then costs one
sweep of first derivatives. Operations that are linear in what moves have no source; a product y = a·b, such as a
convolution with its weight, has 2 a′·b′, so a convolution costs three: a′·b + a·b′ for the derivative, a′·b′ for the
source. That is 3 F, in units of the forward F, where forward and backward together cost 3 F; the first layer, whose
input does not move, costs one convolution.

A piecewise linear function (ReLU, max-pool) has the derivatives that autograd gives it: those of the side it is on.
"""

from __future__ import annotations

from fastfisher.engine.taylor import losses as losses  # registers its rules
from fastfisher.engine.taylor import rules as rules  # and so does this
from fastfisher.engine.taylor.registry import NoRule
from fastfisher.engine.taylor.tape import Tape

__all__ = ["NoRule", "Tape"]
