"""Models sharded by `torch.distributed.fsdp.fully_shard` (FSDP2): each rank keeps a slice of every parameter.

    loader hands out a batch ─▶ weights put together ─▶ forward, backward, clipped sum: as for any module
    optimizer.step(): sums ─▶ rank 0: total + noise, once ─▶ each rank its slice ─▶ the optimizer steps on slices
    ─▶ whole weights are let go

Between steps a rank holds its slices of weights, noisy gradient and optimizer state. During a step it holds the whole
weights and a whole clipped sum besides: per-sample gradients are those of the plain module, whose operations the
engines follow, and not of one unit of it after another.

What fully_shard adds to a module (hooks that gather a unit's weights, free them, and reduce gradients) is taken off
while the private step runs it: an engine hands in parameters of its own, and no gradient may go another way.

Noise is drawn for whole parameters, from the stream and in the order of one process; slices are cut from the sum. So
what is released, and its guarantee, do not depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from dpdl.errors import CheckpointError, StepError
from dpdl.placement import Placement
from dpdl.ranks import Ranks
from dpdl.types import ClippedSum, NoisyGradient

if TYPE_CHECKING:  # importing it takes most of a second; who has a sharded model has done so
    from torch.distributed.tensor import DTensor

__all__ = ["Shards", "fsdp_hooks", "fsdp_modules", "is_sharded"]


def is_sharded(tensor: object) -> bool:
    """Whether it is a DTensor."""
    return isinstance(tensor, Tensor) and hasattr(tensor, "device_mesh")


def fsdp_modules(module: nn.Module) -> list[tuple[str, Any]]:
    """Those of a module's parts that fully_shard was called on, with their paths."""
    from torch.distributed.fsdp import FSDPModule

    return [(path, child) for path, child in module.named_modules() if isinstance(child, FSDPModule)]


def fsdp_hooks(child: Any) -> list[tuple[dict[int, Callable[..., Any]], int]]:
    """Where fully_shard has put hooks on a module: registry and key, those before its forward first."""
    state = child._get_fsdp_state()
    return [
        (registry, key)
        for registry in (child._forward_pre_hooks, child._forward_hooks)
        for key, hook in registry.items()
        if _belongs_to(hook, state)
    ]


def _belongs_to(hook: Any, state: object) -> bool:
    """Whether a hook is a method of `state`, or a wrapper of one (where a list of modules is one unit)."""
    while hook is not None:
        if getattr(hook, "__self__", None) is state:
            return True
        hook = getattr(hook, "__wrapped__", None)
    return False


def _put(module: nn.Module, name: str, parameter: Any) -> None:
    """Exchange a parameter. A module that watches this (recurrent ones keep a list of their own) is told."""
    if type(module).__setattr__ is nn.Module.__setattr__:
        module._parameters[name] = parameter
    else:
        setattr(module, name, parameter)


@dataclass(frozen=True, kw_only=True)
class _Gathered:
    """A parameter put together, and the slice here that it was made from, as that was then."""

    whole: nn.Parameter
    mine: Tensor
    local: Tensor
    versions: tuple[int, int]

    @classmethod
    def of(cls, mine: DTensor) -> _Gathered:
        whole = nn.Parameter(_full(mine), requires_grad=mine.requires_grad)
        return cls(whole=whole, mine=mine, local=mine._local_tensor, versions=_versions(mine))

    @property
    def is_current(self) -> bool:
        """Whether the slice was not written to, or exchanged, since."""
        mine: Any = self.mine
        return mine._local_tensor is self.local and _versions(mine) == self.versions


def _versions(tensor: DTensor) -> tuple[int, int]:
    return tensor._version, tensor._local_tensor._version


def _full(tensor: DTensor) -> Tensor:
    """The whole of it, in memory of its own. All ranks call this."""
    with torch.no_grad():
        whole: Tensor = tensor.full_tensor().contiguous()
        return whole.clone() if whole.data_ptr() == tensor._local_tensor.data_ptr() else whole


def _slice_of(whole: Tensor, like: DTensor) -> DTensor:
    """This rank's slice of a whole tensor, placed as `like`; nothing is sent."""
    from torch.distributed.tensor import DTensor

    (placement,) = like.placements
    dim: int = placement.dim  # type: ignore[attr-defined]  # a Shard: others were refused
    chunks, rank = whole.chunk(like.device_mesh.size(), dim), like.device_mesh.get_local_rank()
    mine = chunks[rank] if rank < len(chunks) else whole.narrow(dim, 0, 0)
    assert mine.shape == like._local_tensor.shape, f"a slice of {tuple(mine.shape)}"
    mine = mine.to(like.device, copy=True).contiguous()
    shape, stride = whole.shape, torch.empty(whole.shape, device="meta").stride()
    return DTensor.from_local(mine, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)


@final
class Shards(Placement):
    """Each rank has a slice of every parameter; the whole weights are put together for a batch.

    Args:
        module: checked by `dpdl.sharding_checks`.
        ranks: all of the mesh.
    """

    takes_loss_scales = False

    def __init__(self, module: nn.Module, ranks: Ranks) -> None:
        super().__init__(ranks)
        self._module = module
        self._gathered: dict[int, _Gathered] | None = None  # by the slice's id; each keeps its slice alive

    def settle(self) -> None:
        """Undo what a call of the plain module has left: its root's weights stay together."""
        for _, child in fsdp_modules(self._module):
            child.reshard()

    def begin_batch(self) -> None:
        """Put the weights together, unless they are: all ranks begin a logical batch together.

        Raises:
            StepError: on all ranks, if one does something else.
            ProcessGroupError: a rank is gone.
        """
        if self._gathered is None or not self._is_current(self._gathered):
            self._gathered = None  # their memory is needed for the next ones
            self._gathered = self._gather()

    def _gather(self) -> dict[int, _Gathered]:
        self.settle()
        self._ranks.agree("putting the weights together", {})
        with self._ranks.message("putting the weights together"):
            return {id(p): _Gathered.of(p) for p in self._own_parameters()}

    def _own_parameters(self) -> list[Any]:
        return [p for p in self._module.parameters() if is_sharded(p)]

    def _is_current(self, gathered: Mapping[int, _Gathered]) -> bool:
        mine = {id(p) for p in self._own_parameters()}
        return mine == gathered.keys() and all(one.is_current for one in gathered.values())

    @contextmanager
    def whole(self) -> Iterator[None]:
        """With the weights of the open batch."""
        self.settle()
        if self._gathered is None or not self._is_current(self._gathered):
            raise StepError(
                "The weights were written to after the private loader handed out its batch, for which they had been "
                "put together from all ranks. Load or exchange weights after optimizer.step() and before the next "
                "batch."
            )
        with self._in_place(self._gathered):
            yield

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """With the weights as they are now, put together for this if they are not; all ranks call it then."""
        self.settle()
        kept = self._gathered
        with self._in_place(kept if kept is not None and self._is_current(kept) else self._gather()):
            yield

    @contextmanager
    def _in_place(self, gathered: Mapping[int, _Gathered]) -> Iterator[None]:
        """Inside, whole parameters are in the places of slices, and fully_shard's hooks are off."""
        for one in gathered.values():
            one.whole.requires_grad_(one.mine.requires_grad)
        places = [
            (child, name, p)
            for child in self._module.modules()
            for name, p in child._parameters.items()
            if p is not None and id(p) in gathered
        ]
        hooks = [place for _, child in fsdp_modules(self._module) for place in fsdp_hooks(child)]
        registries = {id(registry): (registry, dict(registry)) for registry, _ in hooks}
        try:
            for registry, key in hooks:
                del registry[key]
            for child, name, p in places:
                _put(child, name, gathered[id(p)].whole)
            yield
        finally:
            for child, name, p in places:
                _put(child, name, p)
            ours = {(id(registry), key) for registry, key in hooks}
            for registry, before in registries.values():  # in the order in which they were
                now = dict(registry)
                registry.clear()
                registry.update({k: h for k, h in before.items() if k in now or (id(registry), k) in ours} | now)

    def whole_of(self, parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Those that were put together."""
        assert self._gathered is not None
        return {name: self._gathered[id(p)].whole for name, p in parameters.items()}

    def refuse_loss_scale(self, *, given: bool) -> None:
        """A scaler looks for overflows in gradients, of which there are none here for it to unscale."""
        if given:
            raise StepError(
                "GradScaler does not work on a sharded model's optimizer, in which it finds no gradient to look at. "
                "Train without it: bfloat16 needs none."
            )

    def part_here(self, tensor: Tensor) -> Tensor:
        """Its slice here: to ask for more is a message, which the other ranks may not wait for."""
        return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]

    def total(self, mine: ClippedSum) -> ClippedSum:
        """As for copies, in the memory of `mine`."""
        return self._ranks.total(mine, reuse=True)

    def from_first(self, noisy: NoisyGradient) -> NoisyGradient:
        """Each rank's slices of what rank 0 has released."""
        from torch.distributed.tensor import distribute_tensor

        parameters: dict[str, Any] = dict(self._module.named_parameters())
        slices: dict[str, Tensor] = {}
        with self._ranks.message("sending out the noisy sum"):
            for name in sorted(noisy.tensors):
                p = parameters[name]
                slices[name] = distribute_tensor(noisy.tensors[name], p.device_mesh, p.placements)
        return replace(noisy, tensors=slices)

    def end_step(self) -> None:
        """Let the whole weights go."""
        self._gathered = None

    def full_weights(self, state: Any) -> Any:
        """The same mapping with whole tensors, on the CPU; all ranks call this together."""
        self._ranks.agree("collecting the weights", {})
        with self._ranks.message("collecting the weights"):
            for name, value in state.items():
                if is_sharded(value):
                    state[name] = _full(value).cpu()
        return state

    def own_weights(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """With this rank's slices of whole tensors."""
        own: dict[str, Any] = {n: p for n, p in self._module.named_parameters(remove_duplicate=False) if is_sharded(p)}
        found = dict(state)
        for name in own.keys() & found.keys():
            value = found[name]
            if isinstance(value, Tensor) and not is_sharded(value) and value.shape == own[name].shape:
                found[name] = _slice_of(value, own[name])
        return found

    def full_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """With whole tensors, on the CPU; all ranks call this together.

        Raises:
            CheckpointError: the optimizer keeps sums over rows or columns, which have a slicing of their own.
        """
        state = optimizer.state_dict()
        parameters = _numbered(state, optimizer)
        for number, values in state["state"].items():
            own = parameters[number]
            for what, value in values.items():
                if is_sharded(value) and (value.shape, value.placements) != (own.shape, own.placements):
                    raise CheckpointError(
                        f"{what} of {type(optimizer).__name__} for parameter {number} is sharded in another way "
                        f"({tuple(value.shape)}, {value.placements}) than its parameter ({tuple(own.shape)}, "
                        f"{own.placements}), and cannot be saved. Use an optimizer whose state is shaped as its "
                        "parameters, such as SGD or Adam."
                    )
        self._ranks.agree("collecting the optimizer's state", {})
        with self._ranks.message("collecting the optimizer's state"):
            whole = {
                number: {what: _full(value).cpu() if is_sharded(value) else value for what, value in values.items()}
                for number, values in state["state"].items()
            }
        return {**state, "state": whole}

    def own_state(self, state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """With this rank's slices of what is shaped as its parameter."""
        parameters = _numbered(state, optimizer)

        def own(value: Any, like: Any) -> Any:
            fits = isinstance(value, Tensor) and not is_sharded(value) and is_sharded(like)
            return _slice_of(value, like) if fits and value.shape == like.shape else value

        mine = {
            number: {what: own(value, parameters[number]) for what, value in values.items()}
            for number, values in state["state"].items()
        }
        return {**state, "state": mine}


def _numbered(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[int, Any]:
    """An optimizer's parameters by the numbers that a state has for them."""
    return {
        number: parameter
        for group, own in zip(state["param_groups"], optimizer.param_groups, strict=True)
        for number, parameter in zip(group["params"], own["params"], strict=True)
    }
