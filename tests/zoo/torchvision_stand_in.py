"""Lets timm be imported where torchvision is not installed.

timm's models need nothing of torchvision but one class to compare with; its data pipelines, which its models import
constants from, name many more. Inside the context, names of torchvision stand for empty classes; afterwards it is
absent again. A torchvision that is installed is left alone.
"""

from __future__ import annotations

import enum
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

NAMES = (
    "torchvision",
    "torchvision.datasets",
    "torchvision.ops",
    "torchvision.ops.misc",
    "torchvision.transforms",
    "torchvision.transforms.functional",
)


class InterpolationMode(enum.Enum):
    """The one class whose members timm reads when it is imported."""

    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class _StandIn(ModuleType):
    """A module in which every public name is an empty class."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__spec__ = ModuleSpec(name, None, is_package=True)
        self.InterpolationMode = InterpolationMode

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        value: Any = sys.modules.get(f"{self.__name__}.{name}") or type(name, (), {})
        setattr(self, name, value)
        return value


@contextmanager
def torchvision_or_stand_in() -> Iterator[None]:
    """Inside, `import torchvision` works, to the degree that timm's import needs it."""
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        yield
        return
    stand_ins = {name: _StandIn(name) for name in NAMES}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            del sys.modules[name]
