"""Which processes share a model."""

from __future__ import annotations

import atexit
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import nn

from fastfisher.checks import is_number
from fastfisher.distributed.messages import TIMEOUT
from fastfisher.distributed.replicated import Replicated
from fastfisher.distributed.sharded import Sharded
from fastfisher.distributed.single import Single, check_alone
from fastfisher.placement import is_initialised, is_live, placement_of, sharding_modules


@dataclass(frozen=True)
class Shared:
    """A model and the processes that share it.

    Attributes:
        world: the processes; :class:`Single` where the model is this one's alone.
        module: the module that this process runs.
        buffers_follow: whether a step ends with the buffers of rank 0 in all processes.
    """

    world: Single
    module: nn.Module
    buffers_follow: bool


def shared_by(model: nn.Module, process_group: dist.ProcessGroup | None, timeout: float = TIMEOUT) -> Shared:
    """The processes that share a model and its batches.

    Those of ``process_group``, else those of ``DistributedDataParallel`` or ``fully_shard`` around the model.

    Raises:
        ValueError: ``timeout`` is no positive number; ``process_group`` is no group of this process; parameters are
            not all sharded over one dimension of processes, or over others than ``process_group``; the model is within
            ``DistributedDataParallel`` and no ``process_group`` is given; or see
            :func:`fastfisher.placement.placement_of`.
    """
    if not (is_number(timeout) and timeout > 0):
        raise ValueError(f"timeout: expected a number of seconds > 0, got {timeout!r}")
    placement = placement_of(model)
    module, ddp = placement.module, placement.ddp
    if not is_initialised():
        if process_group is not None:
            raise ValueError("process_group: expected None, as torch.distributed is not initialised")
        return Shared(Single(), module, False)
    if process_group is not None:
        _check_group(process_group)
    if placement.sharded:
        group = _sharding_group(module)
        if process_group is not None and dist.get_process_group_ranks(process_group) != dist.get_process_group_ranks(
            group
        ):
            raise ValueError(
                "process_group: expected None or the processes that the model is sharded over, "
                f"{dist.get_process_group_ranks(group)}, got {dist.get_process_group_ranks(process_group)}"
            )
        return Shared(_joined(Sharded, group, timeout), module, False)
    if ddp is not None:
        ranks = _joined(Replicated, process_group or ddp.process_group, timeout)
        return Shared(ranks, module, bool(ddp.broadcast_buffers))
    if process_group is not None:
        return Shared(_joined(Replicated, process_group, timeout), module, False)
    check_alone(model)
    return Shared(Single(), module, False)


def _check_group(group: Any) -> None:
    """Raises ValueError where ``group`` is no group that this process is in."""
    if not isinstance(group, dist.ProcessGroup):
        what = "a group that this process is not in" if group == dist.GroupMember.NON_GROUP_MEMBER else repr(group)
        raise ValueError(f"process_group: expected a torch.distributed.ProcessGroup or None, got {what}")
    if not is_live(group):
        raise ValueError("process_group: expected a live group, got one that destroy_process_group has ended")


def _sharding_group(model: nn.Module) -> dist.ProcessGroup:
    """The group that all parameters are sharded over.

    Raises:
        ValueError: there is no such group, or the model is a part of one that is sharded as a whole.
    """
    parameters = dict(model.named_parameters())
    (mesh, *more) = {getattr(p, "device_mesh", None) for p in parameters.values()}
    if more or mesh is None or mesh.ndim != 1:
        raise ValueError(
            "model: expected every parameter sharded over the same processes in one dimension (fully_shard of the "
            f"whole model), got the meshes {sorted(map(str, [mesh, *more]))}"
        )
    for name, p in parameters.items():
        placement = p.placements[0]  # type: ignore[attr-defined]
        if not placement.is_shard():
            raise ValueError(
                f"model: expected every parameter sharded by fully_shard, got {name!r} with the placement {placement}; "
                "use DistributedDataParallel for whole parameters in each process"
            )
    if any(module._get_fsdp_state()._is_root is False for module in _outermost(model)):
        raise ValueError(
            "model: expected the whole model that fully_shard was applied to, got a part of it, whose parameters "
            "the forward of the whole gathers; pass the whole model, with params= for a part"
        )
    return mesh.get_group()  # type: ignore[no-any-return]


def _outermost(model: nn.Module) -> Iterator[Any]:
    """The modules that ``fully_shard`` was applied to and that are within no other such module of the model."""
    found = sharding_modules(model)
    inner = {id(module) for outer in found for module in outer.modules() if module is not outer}
    yield from (module for module in found if id(module) not in inner)


_RANKS: dict[tuple[type[Replicated], dist.ProcessGroup, float], Replicated] = {}
"""One object for each kind, group and timeout: all penalties and measurements use its connections."""


@atexit.register
def _disconnect() -> None:
    """At the end of the program: ends the connections before the interpreter is gone, which their threads need."""
    for ranks in _RANKS.values():
        ranks.disconnect()
    _RANKS.clear()


def _joined(kind: type[Replicated], group: dist.ProcessGroup, timeout: float) -> Replicated:
    """The object for a group, made where there is none yet; those of groups that have ended go."""
    for known in [known for known in _RANKS if not is_live(known[1])]:
        _RANKS.pop(known).disconnect()
    name = kind, group, timeout
    if name not in _RANKS:
        _RANKS[name] = kind(group, timeout)
    return _RANKS[name]
