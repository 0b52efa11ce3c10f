"""Which sharded models `make_private` takes: those that fully_shard has cut over all ranks of the run, no others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dpdl.errors import ModelError, WrapError
from dpdl.placement import Copies, Placement
from dpdl.ranks import Ranks
from dpdl.sharding import Shards, fsdp_hooks, fsdp_modules, is_sharded

__all__ = ["placement_of"]

_PLAIN = "Pass the plain module instead: in a process group make_private trains it data-parallel."


def placement_of(model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks, *, data_parallel: bool) -> Placement:
    """How the ranks of a run hold a model.

    Args:
        model: as the user built it.
        optimizer: of its parameters.
        ranks: the processes that train together.
        data_parallel: whether they do, however many they are.

    Raises:
        ModelError: it is sharded in another way than the private step can follow.
        WrapError: parts of what is trained are sharded, and parts are not.
    """
    sharded = [p for p in model.parameters() if is_sharded(p)]
    if not sharded:
        return Copies(ranks)
    units = fsdp_modules(model)
    for path, unit in units:
        unit.reshard()
        _refuse_unit(path, unit)
    _refuse_parameters(model, [path for path, _ in units], ranks if data_parallel else None)
    _refuse_mixtures(model, optimizer)
    return Shards(model, ranks)


def _refuse_unit(path: str, unit: Any) -> None:
    where = _where(path, unit)
    policy = getattr(unit._get_fsdp_state(), "_mp_policy", None)
    settings = {name: getattr(policy, name, "?") for name in ("param_dtype", "reduce_dtype", "output_dtype")}
    if any(value is not None for value in settings.values()):
        raise ModelError(
            f"fully_shard was given a mixed-precision policy for {where} ({settings}). Gradients are clipped and "
            "summed in float32 here, so it would not be carried out. Call fully_shard without mp_policy; for half "
            "precision use torch.autocast, or convert the model before fully_shard."
        )
    registries = [registry for registry, _ in fsdp_hooks(unit)]
    for wanted in (unit._forward_pre_hooks, unit._forward_hooks):
        if not any(registry is wanted for registry in registries):
            raise ModelError(
                f"fully_shard's hooks on {where} were not found where torch {torch.__version__} is known to keep them, "
                f"so they cannot be held back in the private step. {_PLAIN}"
            )


def _refuse_parameters(model: nn.Module, units: list[str], ranks: Ranks | None) -> None:
    from torch.distributed.tensor import Shard

    for path, child in model.named_modules():
        for name, p in child.named_parameters(recurse=False):
            if not is_sharded(p):
                continue
            which = f"Parameter '{name}' of {_where(path, child)}"
            mesh: Any = p.device_mesh
            placements: Any = p.placements
            by_fsdp = any(unit in ("", path) or path.startswith(f"{unit}.") for unit in units)
            if not by_fsdp or mesh.ndim != 1 or [type(one) for one in placements] != [Shard]:
                raise ModelError(
                    f"{which} is sharded over processes in another way than by fully_shard over one mesh dimension "
                    f"(mesh of shape {tuple(mesh.shape)}, {placements}), such as tensor parallelism or replicas of "
                    f"shards, whose per-example gradients this version cannot compute. {_PLAIN}"
                )
            if ranks is None or mesh.mesh.flatten().tolist() != list(range(ranks.size)):
                raise ModelError(
                    f"{which} is sharded over ranks {mesh.mesh.flatten().tolist()}, but those of the private run are "
                    f"{'this one alone' if ranks is None else list(range(ranks.size))}. Call fully_shard with a mesh "
                    "of all processes, and leave Execution(data_parallel=True)."
                )
            if p.is_meta:
                continue  # refused for that, as in any model
            if p.device.type != mesh.device_type or type(p._local_tensor) is not Tensor:
                raise ModelError(
                    f"{which} is kept on {p.device.type} as a {type(p._local_tensor).__name__}, "
                    f"for a mesh of {mesh.device_type}: weights that are offloaded or stored in another format are not "
                    "put together here. Call fully_shard without offload_policy, on plain parameters."
                )


def _refuse_mixtures(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    names = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for p in group["params"]:
            if id(p) in names and not is_sharded(p):
                raise WrapError(
                    f"The optimizer holds parameter '{names[id(p)]}', which is not sharded, beside others that are. "
                    "Call fully_shard on the whole model too, after its parts, and build the optimizer after that."
                )


def _where(path: str, module: nn.Module) -> str:
    return (f"module '{path}'" if path else "the model") + f" ({type(module).__name__})"
