"""The tensors that a forward pass has derived from parameters so far, found by identity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from dpdl.per_sample.tape.call import Call, tensors_in
from dpdl.per_sample.tape.source import Source, moved_within

__all__ = ["Sources"]


class Sources(Mapping[int, Source]):
    """Sources by the identity of their tensors. Holds the tensors, so that identities stay good.

    Args:
        trainable: the parameters to start from, by name.
    """

    def __init__(self, trainable: Mapping[str, Tensor]) -> None:
        self._by_id: dict[int, Source] = {
            id(p): Source(key=name, tensor=p, parameters=(name,), moved=True, version=p._version)
            for name, p in trainable.items()
        }

    def derive(self, call: Call, outputs: list[Tensor]) -> None:
        """Take in what a call on parameters alone has given."""
        parameters = tuple(dict.fromkeys(name for source in call.sources for name in source.parameters))
        for position, tensor in enumerate(outputs):
            if tensor.requires_grad and id(tensor) not in self._by_id:
                self._by_id[id(tensor)] = Source(
                    key=(call.name, position),
                    tensor=tensor,
                    parameters=parameters,
                    moved=moved_within(call.function, call.sources, tensor),
                    version=tensor._version,
                    rounded=_rounds(call, tensor),
                )
        self._take_in_writes(call, parameters)

    def _take_in_writes(self, call: Call, parameters: tuple[str, ...]) -> None:
        """After a call on parameters alone: what it has written to depends on all that went into it."""
        for tensor in tensors_in(call.args, call.kwargs):
            source = self._by_id.get(id(tensor))
            written = source is not None and not source.is_untouched
            if (source is None and tensor.requires_grad) or written:
                behind = parameters if source is None else tuple(dict.fromkeys((*source.parameters, *parameters)))
                for one in self._sharing_numbers_with(tensor):
                    self._by_id[id(one)] = Source(
                        key=(call.name, "written"),
                        tensor=one,
                        parameters=behind,
                        moved=False,
                        version=one._version,
                        rounded=_rounds(call, one),
                    )

    def _sharing_numbers_with(self, tensor: Tensor) -> list[Tensor]:
        base = tensor if tensor._base is None else tensor._base
        held = [source.tensor for source in self._by_id.values()]
        return [tensor, *(t for t in held if t is not tensor and (t is base or t._base is base))]

    def as_constants(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with every source as a constant."""

        def constant(leaf: Any) -> Any:
            source = self._by_id.get(id(leaf))
            return leaf if source is None else source.constant

        plain: tuple[tuple[Any, ...], dict[str, Any]] = tree_map(constant, (args, dict(kwargs)))
        return plain

    def __getitem__(self, identity: int) -> Source:
        return self._by_id[identity]

    def __contains__(self, identity: object) -> bool:
        return identity in self._by_id

    def __iter__(self) -> Iterator[int]:
        return iter(self._by_id)

    def __len__(self) -> int:
        return len(self._by_id)


def _rounds(call: Call, result: Tensor) -> bool:
    return result.dtype.itemsize < torch.float32.itemsize or any(source.rounded for source in call.sources)
