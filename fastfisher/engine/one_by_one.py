"""Per-example gradients without formulas: of one example after the other, for all parameters that need it together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from fastfisher.engine.layers import chunks
from fastfisher.inputs import Inputs, input_tensors, is_shared, map_inputs, take_rows
from fastfisher.model import call_model, call_within, uncompiled

Gradients = dict[str, Tensor]
"""By parameter, [n, *shape]."""

Reduce = Callable[[Gradients], Gradients]
"""Gradients of n examples to something else of n rows."""


def gradients_of_each(
    model: nn.Module, inputs: Inputs, parameters: dict[str, Tensor], names: Iterable[str], cotangent: Tensor,
    limit: int | None = None, reduced: Reduce | None = None,
) -> Iterator[Gradients]:  # fmt: skip
    """The gradients of Σ logits·cotangent of each example in the parameters ``names``, chunk by chunk.

    On a CPU by a forward and backward for each example. On a GPU, where small ones wait for launches, a chunk of
    examples goes through ``vmap(grad)``, and one by one where that does not know an operation.

    Args:
        model, inputs: the batch; the model is in the mode in which it is measured.
        parameters: stand-ins for the model's parameters, leaves that require a gradient.
        names: whose gradients are wanted.
        cotangent: shaped as the logits.
        limit: how many elements a chunk may have.
        reduced: what to make of the gradients of some examples, where that is all that is wanted of them; it need not
            keep them.
    """
    wanted = {name: parameters[name] for name in names}
    examples = len(cotangent)
    if cotangent.device.type == "cpu":
        yield from _backwards(model, inputs, wanted, cotangent, limit, reduced)
        return
    elements = sum(p.numel() for p in wanted.values())
    for rows in chunks(examples, 8 * max(elements, input_tensors(inputs)[0][0].numel()), limit):
        some = take_rows(inputs, rows)
        try:
            found = by_vmap(model, some, wanted, cotangent[rows])
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            yield from _backwards(model, some, wanted, cotangent[rows], limit, reduced)
            continue
        yield found if reduced is None else reduced(found)


def _backwards(
    model: nn.Module, inputs: Inputs, wanted: Gradients, cotangent: Tensor, limit: int | None, reduced: Reduce | None,
) -> Iterator[Gradients]:  # fmt: skip
    elements = 1 if reduced is not None else sum(p.numel() for p in wanted.values())
    leaves = list(wanted.values())
    examples = len(cotangent)
    tensors = input_tensors(inputs)
    pieces = [[x] * examples if is_shared(x, examples) else x.split_with_sizes([1] * examples) for x in tensors]

    def of_one(i: int) -> Gradients:
        rest = iter(pieces)
        one = map_inputs(inputs, lambda _: next(rest)[i])
        total = (call_model(model, one) * cotangent[i : i + 1]).sum()
        if total.requires_grad:
            found = torch.autograd.grad(total, leaves, materialize_grads=True)
        else:
            found = tuple(torch.zeros_like(leaf, requires_grad=False) for leaf in leaves)
        dense = [g.to_dense() if g.is_sparse else g for g in found]
        gradients = {name: g[None] for name, g in zip(wanted, dense, strict=True)}
        return gradients if reduced is None else reduced(gradients)

    for rows in chunks(len(cotangent), elements, limit):
        state = {name: buffer.clone() for name, buffer in model.named_buffers()} | _stand_ins(model, wanted)
        with torch.enable_grad(), uncompiled(model, "the measurement"):
            # All examples within one call_within: swapping the parameters in and out takes longer than a small forward.
            each = call_within(model, state, lambda rows=rows: [of_one(i) for i in range(rows.start, rows.stop)])  # type: ignore[misc]
        yield {name: torch.cat([gradients[name] for gradients in each]) for name in each[0]}


def by_vmap(model: nn.Module, inputs: Inputs, wanted: Gradients, cotangent: Tensor) -> Gradients:
    """The same for a few examples at once."""
    tensors = input_tensors(inputs)
    shared = [is_shared(x, len(cotangent)) for x in tensors]
    state = {name: buffer.clone() for name, buffer in model.named_buffers()} | _stand_ins(model, {})
    state = {name: value.detach() for name, value in state.items()}

    def value(parameters: Gradients, cotangent: Tensor, *example: Tensor) -> Tensor:
        rest = iter(zip(example, shared, strict=True))

        def place(_: Tensor) -> Tensor:
            x, alike = next(rest)
            return x if alike else x[None]

        one = map_inputs(inputs, place)
        logits: Tensor = call_within(model, state | parameters, lambda: call_model(model, one))
        return (logits[0] * cotangent).sum()

    dims = tuple(None if alike else 0 for alike in shared)
    with uncompiled(model, "the measurement"):
        held = {name: p.detach() for name, p in wanted.items()}
        found: Gradients = torch.func.vmap(torch.func.grad(value), in_dims=(None, 0, *dims))(held, cotangent, *tensors)
    return found


def _stand_ins(model: nn.Module, wanted: Gradients) -> Gradients:
    return {name: wanted.get(name, p.detach()) for name, p in model.named_parameters()}
