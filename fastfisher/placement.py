"""Where a model's parameters are: what around it is looked through, and what is refused by name.

Whether a model is one of several processes' is read off the modules, their parameters and PyTorch's own marks on them,
never off a type's name. A model that others have a part in, taken for one of this process alone, would give the
gradient of a part of the batch, or of a part of the parameters, without a word.
"""

from __future__ import annotations

import functools
import gc
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DataParallel, DistributedDataParallel

from fastfisher.checks import check_model
from fastfisher.slow_path import warn_slow_path

_LEAVE = "for the value of what this process alone is given, pass copy.deepcopy of the module within"


@dataclass(frozen=True)
class Placement:
    """A model, and what shares it.

    Attributes:
        module: the module that this process runs: what ``DistributedDataParallel`` wraps, or the model itself.
        ddp: the ``DistributedDataParallel`` in or around which the model was found; None where there is none.
        sharded: whether ``fully_shard`` was applied to a part of it.
    """

    module: nn.Module
    ddp: DistributedDataParallel | None
    sharded: bool


def placement_of(model: nn.Module) -> Placement:
    """What shares a model, with wrappers around ``DistributedDataParallel`` looked through.

    ``torch.compile`` and modules without parameters of their own may be around it, in any order.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a part of it is ``DataParallel``, FSDP1 or ``replicate``; or ``DistributedDataParallel``, and other
            parts have parameters that it does not hold, or it was made with an option that is not followed.
    """
    check_model(model)
    if not is_initialised() and not any(isinstance(m, DataParallel | DistributedDataParallel) for m in model.modules()):
        return Placement(model, None, False)  # all else needs torch.distributed
    if isinstance(model, _WithoutDDP):
        return Placement(model, model.around[0], False)
    _refuse_unsupported(model)
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, DistributedDataParallel)]
    if not found:
        return Placement(model, None, is_sharded(model))
    if len(found) > 1:
        raise ValueError(
            f"model: expected at most one DistributedDataParallel, found them at {', '.join(map(_at, dict(found)))}; "
            "put one around the whole model"
        )
    ((path, ddp),) = found
    _check_ddp(path, ddp)
    held = {id(p) for p in ddp.parameters()}
    outside = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if outside:
        raise ValueError(
            f"model: expected every trainable parameter within the DistributedDataParallel at {_at(path)}, got "
            f"{outside[0]!r} outside of it, whose gradient is this process's own; put DistributedDataParallel around "
            "the whole model"
        )
    inner = model
    while _is_compiled(inner):
        inner = inner._orig_mod  # type: ignore[assignment]
    around = [module for module in model.modules() if module is ddp or ddp in module.modules()]
    if any(_is_compiled(module) or getattr(module, "_compiled_call_impl", None) for module in around):
        warn_slow_path(
            "torch.compile around DistributedDataParallel is looked through: the model runs without it; "
            "DistributedDataParallel(torch.compile(model)) keeps what is compiled"
        )
    if inner is ddp and not (ddp._forward_hooks or ddp._forward_pre_hooks):
        return Placement(ddp.module, ddp, False)
    return Placement(_WithoutDDP(inner, ddp), ddp, False)


def check_reduced_as_mean(model: nn.Module) -> None:
    """Checks a model whose own backward reduces the gradients, before a penalty is taken of its forward.

    Raises:
        ValueError: as :func:`placement_of`; or its ``DistributedDataParallel`` has ``static_graph``, whose first
            backward, in which it learns the graph, may be that of a part of the loss.
    """
    ddp = placement_of(model).ddp
    if ddp is not None and getattr(ddp, "static_graph", False):
        raise ValueError(
            "model: expected DistributedDataParallel without static_graph, which learns the graph in the first "
            "backward, be it of a part of the loss; leave it out"
        )


def whole(model: nn.Module, purpose: str) -> nn.Module:
    """The module that this process runs, where what is measured is of one process: it holds all of the model alone.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: several processes have a part in it; ``purpose`` says what would be of this process's part.
    """
    placement = placement_of(model)
    if placement.ddp is not None:
        size = dist.get_world_size(placement.ddp.process_group)
        if size > 1:
            raise ValueError(
                f"model: expected that of one process for {purpose}, got a DistributedDataParallel of {size}, where it "
                f"would be of the examples of this process alone; {_LEAVE}"
            )
        return placement.module
    check_not_within(model, f"{purpose} would be of the examples of this process alone; {_LEAVE}")
    return model


def check_not_within(model: nn.Module, why: str) -> None:
    """Raises ValueError, with ``why``, where a live ``DistributedDataParallel`` of several processes has parameters of
    the model and is no part of it: ``ddp.module``, or a piece of it."""
    if not is_initialised() or dist.get_world_size() == 1:
        return
    mine = {id(p) for p in model.parameters()}
    size = _size_around(mine)
    if size > 1:
        gc.collect()  # it may be one that only a cycle of references keeps
        size = _size_around(mine)
    if size > 1:
        raise ValueError(
            f"model: expected the DistributedDataParallel itself, got a module within one of {size} processes: {why}"
        )


def _size_around(parameters: set[int]) -> int:
    """The most processes that a live ``DistributedDataParallel`` with one of the parameters (by id) has; 0 for none."""
    around = [ddp for ddp in _live() if not parameters.isdisjoint(map(id, ddp.parameters()))]
    return max((dist.get_world_size(ddp.process_group) for ddp in around if is_live(ddp.process_group)), default=0)


def is_initialised() -> bool:
    """Whether there are process groups."""
    return dist.is_available() and dist.is_initialized()


def is_live(group: dist.ProcessGroup) -> bool:
    """Whether ``destroy_process_group`` has not ended a group."""
    try:
        return bool(dist.get_process_group_ranks(group))
    except (KeyError, ValueError):
        return False


_ddps: weakref.WeakSet[DistributedDataParallel] | None = None
"""Those that exist; None before the first question."""


def _live() -> list[DistributedDataParallel]:
    """All ``DistributedDataParallel`` of this program: at first among the objects that Python's garbage collector
    knows, which takes some 0.1 s, and from then on as PyTorch registers the module within each."""
    global _ddps
    if _ddps is None:
        known = _ddps = weakref.WeakSet()
        kinds = {DistributedDataParallel, *_subclasses(DistributedDataParallel)}
        for found in gc.get_objects():
            if type(found) in kinds:
                known.add(found)

        def note(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
            if isinstance(module, DistributedDataParallel):
                known.add(module)

        register_module_module_registration_hook(note)
    return [ddp for ddp in _ddps if "_modules" in ddp.__dict__ and hasattr(ddp, "process_group")]


def check_held(trainable: dict[str, Tensor], sharded: bool) -> None:
    """Raises ValueError where a parameter is spread over processes, which only a caller with ``sharded`` can handle."""
    if sharded or "torch.distributed.tensor" not in sys.modules:
        return
    for name, p in trainable.items():
        if is_spread(p):
            raise ValueError(
                f"model: expected all parameters in each process, got {name!r} spread over processes as a DTensor "
                f"(fully_shard, or a plan of tensor parallelism), of which a process has {tuple(p.to_local().shape)} "  # type: ignore[attr-defined]
                f"of {tuple(p.shape)}; measure a whole copy of the model (with torch.distributed.checkpoint.state_dict."
                "get_model_state_dict and full_state_dict=True). FisherPenalty takes models of fully_shard"
            )


# The modules of fully_shard and DTensor take long to import, and who has no sharded model has not imported them.


def is_spread(x: Tensor) -> bool:
    """Whether a tensor is spread over processes."""
    tensor = sys.modules.get("torch.distributed.tensor")
    return tensor is not None and isinstance(x, tensor.DTensor)


def sharding_modules(model: nn.Module) -> list[Any]:
    """The modules that ``fully_shard`` was applied to."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    return [] if kind is None else [module for module in model.modules() if isinstance(module, kind)]


def is_sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to a part of the model."""
    return bool(sharding_modules(model))


# ---- what is refused -------------------------------------------------------------------------------------------------


def _refuse_unsupported(model: nn.Module) -> None:
    """Raises ValueError where a part of the model is shared in a way that nothing here follows."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    first_fsdp = getattr(fsdp, "FullyShardedDataParallel", ())
    managed = False
    for path, module in model.named_modules():
        if isinstance(module, DataParallel):
            raise ValueError(
                f"model: expected no DataParallel, found it at {_at(path)}: its replicas hide what the layers see and "
                "leave the mode and the hooks of the module behind; pass the module within, or DistributedDataParallel"
            )
        if isinstance(module, first_fsdp):
            raise ValueError(
                f"model: expected no FullyShardedDataParallel (FSDP1), found it at {_at(path)}: its parameters are "
                "views of a flat one that autograd does not know by name; use torch.distributed.fsdp.fully_shard"
            )
        if "replicate" in _contracts(module):
            raise ValueError(
                f"model: expected no replicate, found it at {_at(path)}: its reduction is tied to Tensor.backward, "
                "beside which nothing else may go; use DistributedDataParallel(model)"
            )
        managed = managed or getattr(module, "_is_fsdp_managed_module", False)
    if managed and not is_sharded(model) and not any(is_spread(p) for p in model.parameters()):
        raise ValueError(
            "model: expected a whole model, got a module within FullyShardedDataParallel (FSDP1); use "
            "torch.distributed.fsdp.fully_shard, and pass the whole model"
        )
    for name, p in model.named_parameters():
        if hasattr(p, "_st_info"):
            raise ValueError(
                f"model: expected whole parameters, got {name!r}, which tensor parallelism within "
                "DistributedDataParallel makes from parts in each forward; this combination is not supported"
            )


def _contracts(module: nn.Module) -> Any:
    """The names of PyTorch's composable ways to distribute that were applied to a module."""
    contract = sys.modules.get("torch.distributed._composable.contract")
    return () if contract is None else contract._get_registry(module) or ()


def _check_ddp(path: str, ddp: DistributedDataParallel) -> None:
    """Raises ValueError where the forward of a ``DistributedDataParallel`` is not that of its module, or where it
    leaves parameters out."""
    if type(ddp).forward is not DistributedDataParallel.forward or "forward" in ddp.__dict__:
        raise ValueError(
            f"model: expected DistributedDataParallel's own forward at {_at(path)}, got that of {type(ddp).__name__}; "
            "put what it does into the module within"
        )
    if getattr(ddp, "mixed_precision", None) is not None:
        raise ValueError(
            f"model: expected DistributedDataParallel without mixed_precision at {_at(path)}, whose casts belong to "
            "its own forward; use torch.autocast"
        )
    left_out = set(getattr(ddp, "parameters_to_ignore", ()))
    for name, p in ddp.module.named_parameters():
        if name in left_out and p.requires_grad:
            raise ValueError(
                f"model: expected DistributedDataParallel at {_at(path)} to hold every trainable parameter, but it "
                f"leaves {name!r} to each process; freeze it, or let DistributedDataParallel hold it"
            )


def _at(path: str) -> str:
    return repr(path) if path else "(the model itself)"


def _is_compiled(module: nn.Module) -> bool:
    """Whether it is what ``torch.compile`` returns."""
    frame = sys.modules.get("torch._dynamo.eval_frame")
    return frame is not None and isinstance(module, frame.OptimizedModule)


def _subclasses(kind: type) -> list[type]:
    children: list[type] = type.__subclasses__(kind)
    return [*children, *(further for child in children for further in _subclasses(child))]


# ---- wrappers --------------------------------------------------------------------------------------------------------


class _WithoutDDP(nn.Module):
    """A wrapper around ``DistributedDataParallel`` as it is, but that the latter only calls its module.

    What the wrapper does to inputs and outputs stays; the reducer of ``DistributedDataParallel``, which would wait for
    a ``Tensor.backward`` after each forward, and its broadcast of buffers are left out.
    """

    def __init__(self, outer: nn.Module, ddp: DistributedDataParallel) -> None:
        super().__init__()
        self.outer = outer
        self.around = (ddp,)  # a part of ``outer`` already, and so no child of its own
        self.compiled = any(_is_compiled(module) and ddp in module.modules() for module in outer.modules())

        @functools.wraps(outer.forward)  # whose signature says what inputs are called
        def forward(*args: Any, **kwargs: Any) -> Any:
            with _calling_its_module(ddp), self._eagerly():
                return outer(*args, **kwargs)

        self.forward = forward

    @property
    def training(self) -> bool:
        """That of the wrapper, which is the caller's to change."""
        return self.outer.training if "outer" in self.__dict__.get("_modules", {}) else True

    @training.setter
    def training(self, mode: bool) -> None:
        if "outer" in self.__dict__.get("_modules", {}):
            self.outer.training = mode

    def _eagerly(self) -> Any:
        """Without ``torch.compile``, whose code has the forward of ``DistributedDataParallel`` in it."""
        return torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()


@contextmanager
def _calling_its_module(ddp: DistributedDataParallel) -> Iterator[None]:
    """Within, the forward of ``DistributedDataParallel`` is that of its module."""
    if "forward" in ddp.__dict__:  # of a call around this one
        yield
        return
    ddp.__dict__["forward"] = lambda *args, **kwargs: ddp.module(*args, **kwargs)
    try:
        yield
    finally:
        del ddp.__dict__["forward"]
