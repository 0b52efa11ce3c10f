"""Two ways to keep a tree of plain values and tensors in a file, neither of which can run code when it is read.

- `torch.save`, read with `weights_only=True`: the default.
- safetensors, for a path that ends in ".safetensors": tensors by number, and the tree, in JSON, as metadata. The
  package is optional: `pip install dpdl[safetensors]`.
"""

from __future__ import annotations

import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpdl.errors import CheckpointError

__all__ = ["read_tree", "write_tree"]

SUFFIX = ".safetensors"
_KEY = "dpdl"  # of the tree in the metadata

# What torch.load was seen to raise for files with a flipped bit, and its neighbours.
_UNREADABLE: tuple[type[Exception], ...] = (
    *(RuntimeError, EOFError, OSError, pickle.UnpicklingError, LookupError, ValueError, TypeError, AttributeError),
    *(ArithmeticError, AssertionError, MemoryError),
)


def write_tree(tree: dict[str, Any], file: Path, *, named: Path) -> None:
    """Write a tree to a file, in the format that its final name asks for.

    Raises:
        CheckpointError: safetensors is not installed, cannot write there, or the tree holds what its format cannot.
    """
    if named.suffix != SUFFIX:
        with file.open("wb") as stream:
            torch.save(tree, stream)
        return
    safetensors = _safetensors()
    tensors: dict[str, Tensor] = {}
    skeleton = json.dumps(_skeleton(tree, tensors))
    try:
        safetensors.torch.save_file(tensors, file, metadata={_KEY: skeleton})
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"The checkpoint {named} could not be written: {error}.") from error


def read_tree(path: str | os.PathLike[str], *, named: Path) -> Any:
    """The tree that `write_tree` wrote, on the CPU; unchecked.

    Raises:
        CheckpointError: the file is missing or unreadable, or safetensors is not installed.
    """
    try:
        if named.suffix != SUFFIX:
            return torch.load(path, weights_only=True, map_location="cpu")
        safetensors = _safetensors()
        with safetensors.safe_open(path, framework="pt") as file:
            return _tree(json.loads(file.metadata()[_KEY]), file.get_tensor)
    except FileNotFoundError as error:
        raise CheckpointError(f"There is no checkpoint at {path}.") from error
    except (*_UNREADABLE, *_errors_of_safetensors(named)) as error:
        raise CheckpointError(
            f"The checkpoint {path} cannot be read: it is damaged, something else, or holds more than plain values "
            f"and tensors ({type(error).__name__})."
        ) from error


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise CheckpointError(
            "A checkpoint whose name ends in .safetensors needs that package: pip install dpdl[safetensors]. Or give "
            "the file another ending, for torch's own format."
        ) from error
    return safetensors


def _errors_of_safetensors(named: Path) -> tuple[type[Exception], ...]:
    return (_safetensors().SafetensorError,) if named.suffix == SUFFIX else ()


def _skeleton(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The tree as JSON, each container with its kind, each tensor by its number; tensors are collected."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()  # the format shares no memory between tensors
        return {"tensor": name}
    if isinstance(value, dict) and type(value) in (dict, OrderedDict):
        kind = "ordered" if isinstance(value, OrderedDict) else "dict"
        return {kind: [[_skeleton(k, tensors), _skeleton(v, tensors)] for k, v in value.items()]}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_skeleton(item, tensors) for item in value]}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise CheckpointError(
        f"A checkpoint holds plain values and tensors, not {type(value).__name__}. Leave it out of extra, or turn it "
        "into numbers, texts, lists or dicts."
    )


def _tree(skeleton: Any, tensor: Any) -> Any:
    if not isinstance(skeleton, dict):
        return skeleton
    ((kind, content),) = skeleton.items()
    if kind == "tensor":
        return tensor(content)
    if kind in ("dict", "ordered"):
        made = OrderedDict if kind == "ordered" else dict
        return made((_tree(k, tensor), _tree(v, tensor)) for k, v in content)
    return {"list": list, "tuple": tuple}[kind](_tree(item, tensor) for item in content)
