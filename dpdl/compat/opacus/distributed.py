"""Opacus's wrapper for several processes; this facade runs in one."""

from __future__ import annotations

from typing import Any

from torch import nn

from dpdl.compat.opacus.errors import NotOfferedError

__all__ = ["DifferentiallyPrivateDistributedDataParallel"]


class DifferentiallyPrivateDistributedDataParallel(nn.Module):
    """The name; making one of a model is refused.

    Raises:
        NotOfferedError: always.
    """

    def __init__(self, model: Any) -> None:
        raise NotOfferedError(
            "This facade runs in one process. For several, use dpdl.make_private, the library's own interface."
        )
