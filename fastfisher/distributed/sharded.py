"""Several processes, each with a part of every parameter (``fully_shard``, FSDP2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastfisher.distributed.messages import Gradients
from fastfisher.distributed.replicated import Replicated
from fastfisher.placement import is_spread, sharding_modules


class Sharded(Replicated):
    """The processes of a group, each with a part of every parameter.

    The backward itself takes the mean of the gradients over the processes, and leaves each process its part of it. What
    is left to sum here are squares.
    """

    sharded = True

    def weight(self, mine: int, all_of_them: int) -> float:
        """See :meth:`Replicated.weight`; the backward divides by the number of processes."""
        return self.size * super().weight(mine, all_of_them)

    def differentiate(self, loss: Tensor, sources: Sequence[Tensor], retain_graph: bool) -> Sequence[Tensor | None]:
        """∂loss/∂source: for a parameter this process's part of the sum over the processes; for an input, which is this
        process's alone, without the factor that :meth:`weight` has put in for the mean over the processes."""
        found = backward(loss, sources, retain_graph)
        return [g if g is None or is_spread(g) else g / self.size for g in found]

    def sum_gradients(self, trainable: Gradients, *gradients: Gradients) -> list[Gradients]:
        """The gradients as they are: the backward has summed them."""
        self.agree("gradients")
        return list(gradients)

    def after_forward(self, model: nn.Module) -> None:
        """See :meth:`Single.after_forward`: the outermost parameters stay gathered until the backward, which gathers
        them again where they are not."""
        reshard(model)

    @contextmanager
    def own_reduction(self, model: nn.Module) -> Iterator[None]:
        """See :meth:`Single.own_reduction`: what micro-batches under ``set_requires_gradient_sync(False)`` have left in
        the gathered parameters is taken out, and back at the end."""
        groups = list(_parameter_groups(model))
        reduced = [(group.reduce_grads, group.all_reduce_grads) for group in groups]  # one call sets both
        left = [(parameter, _left_by_backwards(parameter)) for group in groups for parameter in group.fsdp_params]
        try:
            for group in groups:
                group.reduce_grads = group.all_reduce_grads = True
            for parameter, _ in left:
                _leave(parameter, None, None)
            _check_reduction(model)
            yield
        finally:
            for group, was in zip(groups, reduced, strict=True):
                group.reduce_grads, group.all_reduce_grads = was
            for parameter, grads in left:
                _leave(parameter, *grads)

    def for_mean(self, part: Gradients) -> Gradients:
        """See :meth:`Single.for_mean`: a gradient in shards comes into ``.grad`` as it is."""
        return part

    def squared_norm(self, x: Tensor, in_parameters: bool) -> Tensor:
        """See :meth:`Single.squared_norm`: of parameters each process has a part."""
        return self.total(x)

    def begin(self, model: nn.Module) -> None:
        """See :meth:`Single.begin`; frees what a forward without a backward has left gathered, and waits for all.

        The forward gathers parameters, so where one process raised before it the others would wait there.

        Raises:
            ValueError: the model's reduction of gradients is not the mean at each backward.
        """
        _check_reduction(model)
        reshard(model)
        self.agree("the beginning")

    def begin_term(self, model: nn.Module) -> None:
        """See :meth:`Single.begin_term`."""


def local_part(x: Tensor) -> Tensor:
    """This process's part of a tensor, in the same memory; all of it where it is not in parts."""
    return x.detach().to_local() if is_spread(x) else x  # type: ignore[attr-defined]


def backward(loss: Tensor, sources: Sequence[Tensor], retain_graph: bool) -> list[Tensor | None]:
    """∂loss/∂source by a backward, which the hooks of ``fully_shard`` need; every ``.grad`` is put back."""
    before = [source.grad for source in sources]
    for source in sources:
        source.grad = None
    try:
        loss.backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]
        return [source.grad for source in sources]
    finally:
        for source, grad in zip(sources, before, strict=True):
            source.grad = grad


def reshard(model: nn.Module) -> None:
    """Frees gathered parameters, so that those of the model are the shards again."""
    for module in sharding_modules(model):
        module.reshard()


def _check_reduction(model: nn.Module) -> None:
    """Raises ValueError where a backward through ``fully_shard`` would not leave the mean gradient of the processes."""
    for group in _parameter_groups(model):
        settings = {
            "set_requires_gradient_sync(False)": not group.reduce_grads,
            "set_requires_all_reduce(False)": not group.all_reduce_grads,
            "set_reshard_after_backward(False)": not group.reshard_after_backward,
            "set_gradient_divide_factor": group.gradient_divide_factor is not None,
            "set_all_reduce_hook": group._all_reduce_hook is not None,
        }
        for name, is_set in settings.items():
            if is_set:
                raise ValueError(
                    f"model: expected the reduction that fully_shard begins with, a mean at each backward, got {name}; "
                    "undo it before FisherPenalty.backward, which accumulates micro-batches by its weight"
                )
        for parameter in group.fsdp_params:
            if any(grad is not None for grad in _left_by_backwards(parameter)):
                raise ValueError(
                    "model: expected every gradient reduced, got one of a backward before under "
                    "set_requires_gradient_sync(False); take each micro-batch by FisherPenalty.backward(weight=...), "
                    "or the last one before it with the gradients reduced"
                )


def _left_by_backwards(parameter: Any) -> tuple[Tensor | None, Tensor | None]:
    """The gradients that backwards without a reduction have left for a parameter of ``fully_shard``: the one in the
    dtype of the reduction, and the one in its own."""
    whole = getattr(parameter, "_unsharded_param", None)
    return parameter.unsharded_accumulated_grad, None if whole is None else whole.grad


def _leave(parameter: Any, accumulated: Tensor | None, grad: Tensor | None) -> None:
    parameter.unsharded_accumulated_grad = accumulated
    if getattr(parameter, "_unsharded_param", None) is not None:
        parameter._unsharded_param.grad = grad


def _parameter_groups(model: nn.Module) -> Iterator[Any]:
    """The groups of parameters that ``fully_shard`` gathers and reduces together."""
    for module in sharding_modules(model):
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)  # several in newer versions of PyTorch
        yield from [state._fsdp_param_group] if groups is None and state._fsdp_param_group is not None else groups or ()


def placed_like(x: Tensor, parameter: Tensor) -> Tensor:
    """A copy of ``x`` on the device, in the dtype and over the processes of ``parameter``: whole, or as its shards.

    Where ``x`` is in shards and ``parameter`` is whole, or in other shards, the processes gather ``x``: all must call.
    """
    if is_spread(x) and not (is_spread(parameter) and _spread_alike(x, parameter)):
        x = x.full_tensor()  # type: ignore[attr-defined]
    if is_spread(parameter) and not is_spread(x):
        from torch.distributed.tensor import distribute_tensor

        x = x.to(parameter.to_local(), copy=True)  # type: ignore[attr-defined]
        mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
        return distribute_tensor(x, mesh, placements, src_data_rank=None)  # each process has all of x: nothing is sent
    return x.to(parameter.dtype if is_spread(x) else parameter, copy=True)


def whole_state(state: dict[str, Any]) -> dict[str, Any]:
    """A state with whole tensors for those in shards, which the processes gather: all must call."""

    def whole(x: Any) -> Any:
        if isinstance(x, dict):
            return {name: whole(value) for name, value in x.items()}
        return x.full_tensor() if isinstance(x, Tensor) and is_spread(x) else x  # type: ignore[attr-defined]

    return {name: whole(value) for name, value in state.items()}


def _spread_alike(x: Any, y: Any) -> bool:
    same: bool = x.device_mesh == y.device_mesh and x.placements == y.placements
    return same


def precision_below(model: nn.Module) -> torch.dtype | None:
    """The dtype in which ``fully_shard`` gathers parameters; None where it is their own."""
    for module in sharding_modules(model):
        dtype: torch.dtype | None = module._get_fsdp_state()._mp_policy.param_dtype
        if dtype is not None and any(p.dtype != dtype for p in module.parameters()):
            return dtype
    return None
