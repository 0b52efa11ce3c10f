"""Runs a module on copies of its buffers, and notices what its forward writes to."""

from __future__ import annotations

from types import TracebackType

from torch import Tensor, nn

__all__ = ["BorrowedState"]


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

    def __enter__(self) -> BorrowedState:
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
        self._written = []
        for (path, registry, name), copy, original in zip(self._places, self._copies, self._originals, strict=True):
            if registry.get(name) is not copy or (copy is not None and copy._version):
                self._written.append(path)
            registry[name] = original
        self._originals, self._copies = [], []

    @property
    def written(self) -> list[str]:
        """Names of the buffers that were written to, or replaced, in the last use."""
        return self._written
