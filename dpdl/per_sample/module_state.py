"""Runs a module on copies of its buffers, and notices what its forward writes to."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from torch import Tensor, nn

__all__ = ["BorrowedState", "EmptyPlaces", "OwnAttributes"]

_OF_MODULES = frozenset(vars(nn.Module()))  # registries, hooks and flags that torch keeps


class EmptyPlaces:
    """Where a module holds nothing: names of parameters and buffers that are None, or that are not registered.

    Args:
        module: the module, as it is when this is made or `look` is called.
    """

    def __init__(self, module: nn.Module) -> None:
        self._registries: list[tuple[str, dict[str, Any]]] = [
            (f"{path}." if path else "", registry)
            for path, child in module.named_modules()
            for registry in (child._parameters, child._buffers)
        ]
        self.look()

    def look(self) -> None:
        """Take the module as it is now."""
        self._empty = [{name: tensor is None for name, tensor in registry.items()} for _, registry in self._registries]

    def cleared(self) -> list[str]:
        """Take out what was put there since, and name it."""
        found = []
        for (path, registry), known in zip(self._registries, self._empty, strict=True):
            for name in [n for n, tensor in registry.items() if tensor is not None and known.get(n, True)]:
                found.append(path + name)
                if name in known:
                    registry[name] = None
                else:
                    del registry[name]
        return found


class OwnAttributes:
    """What a module keeps in plain attributes: tensors, and containers of anything. Not its parameters and buffers.

    Some models keep there what they compute once in eval mode, with its graph.

    Args:
        module: the module, as it is when this is made.
    """

    def __init__(self, module: nn.Module) -> None:
        self._containers: list[tuple[Any, Any]] = []
        self._tensors: list[tuple[dict[str, Any], dict[str, Tensor | None]]] = []
        for child in module.modules():
            own = {name: value for name, value in vars(child).items() if name not in _OF_MODULES}
            self._containers += [(c, c.copy()) for c in own.values() if type(c) in (dict, list, set)]
            self._tensors.append((vars(child), {n: v for n, v in own.items() if v is None or isinstance(v, Tensor)}))

    def restore(self) -> None:
        """Put back the tensors that were there, and what was in the containers."""
        for container, was in self._containers:
            container.clear()
            container.extend(was) if isinstance(container, list) else container.update(was)
        for attributes, before in self._tensors:
            put = [n for n, v in attributes.items() if n not in _OF_MODULES and isinstance(v, Tensor)]
            for name in [n for n in put if n not in before]:
                del attributes[name]
            attributes.update(before)


class BorrowedState:
    """A context in which a module's buffers are copies; the originals come back when it ends.

    Parameters stay in place: code that holds them by other ways than the module (lists, flattened weights) finds the
    same tensors.

    Args:
        module: the module. The places of its buffers are listed when this is made; what is in them, each time.
    """

    def __init__(self, module: nn.Module) -> None:
        self._places = [
            (f"{path}.{name}" if path else name, child._buffers, name)
            for path, child in module.named_modules()
            for name, buffer in child._buffers.items()
            if buffer is not None
        ]
        self._originals: list[Tensor | None] = []
        self._copies: list[Tensor | None] = []
        self._written: list[str] = []
        self._empty = EmptyPlaces(module)

    def __enter__(self) -> BorrowedState:
        self._empty.look()
        copies: dict[int, Tensor] = {}  # a buffer in two places stays one
        self._originals = [registry.get(name) for _, registry, name in self._places]
        self._copies = [
            None if buffer is None else copies.setdefault(id(buffer), buffer.detach().clone())
            for buffer in self._originals
        ]
        for (_, registry, name), copy in zip(self._places, self._copies, strict=True):
            registry[name] = copy
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._written = self._empty.cleared()
        for (path, registry, name), copy, original in zip(self._places, self._copies, self._originals, strict=True):
            if registry.get(name) is not copy or (copy is not None and copy._version):
                self._written.append(path)
            registry[name] = original
        self._originals, self._copies = [], []

    @property
    def written(self) -> list[str]:
        """Names of the buffers that were written to, or replaced, in the last use."""
        return self._written
