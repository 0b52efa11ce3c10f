"""A request's weights: checked against the client's model before anything is done, loaded, and told from the trained.

Trained parameters have to come with every request, under the names that the model's `state_dict()` has. Frozen
parameters and buffers may be left out: the model's own are then used, whatever an earlier request has brought.

Public: all of it; the weights are the server's.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from dpdl.errors import ModelError, ParameterError

__all__ = ["GlobalWeights", "digest_of"]

_LARGEST = 1e9  # weights beyond serve to make activations overflow: nobody has trained them
_NAMED = 5  # names in an error; the others are counted
_REMEDY = "Send the state_dict of the model that this client was made with."


class GlobalWeights:
    """Brings the weights of requests into one model.

    Args:
        module: the client's model.
        trained: names of the parameters that are trained, and whose changes leave.
        with_buffers: whether changes of buffers leave, too.

    Attributes:
        trained, buffers: names of what leaves.
        shapes: by those names.
        tied: by further names of trained parameters, the name under which their changes leave.

    Raises:
        ModelError: a trained parameter is not in the model's state_dict, or a buffer has no difference.
    """

    def __init__(self, module: nn.Module, trained: Iterable[str], *, with_buffers: bool = False) -> None:
        self._module = module
        self.trained = tuple(trained)
        own = self._tensors()
        for name in self.trained:
            if name not in own:
                raise ModelError(
                    f"Parameter '{name}' is trained, but the model's state_dict() does not have it under that name, so "
                    "no server could send it. Give a model whose state_dict names its parameters."
                )
        buffers = [name for name, _ in module.named_buffers() if name in own]
        if with_buffers and (flags := [name for name in buffers if own[name].dtype is torch.bool]):
            raise ModelError(
                f"send_buffers: the buffer '{flags[0]}' is of bool, which has no difference. Leave it out."
            )
        self.buffers = tuple(buffers) if with_buffers else ()
        self.shapes = {name: tuple(own[name].shape) for name in (*self.trained, *self.buffers)}
        self._forms = {name: (tensor.shape, tensor.dtype) for name, tensor in own.items()}
        parameters = dict(module.named_parameters(remove_duplicate=False))
        first: dict[int, str] = {}
        self._first_name = {name: first.setdefault(id(p), name) for name, p in parameters.items()}
        leaving = frozenset(self.trained)
        also = {name: one for name, one in self._first_name.items() if name != one and one in leaving}
        self.tied = {name: one for name, one in also.items() if name in own}
        self._replaced: dict[
            str, Tensor
        ] = {}  # the model's own values of what a request need not bring, and has brought

    def refuse_unfit(self, state: Mapping[str, Tensor]) -> None:
        """Raise unless these are weights for this model; nothing is changed.

        Raises:
            ParameterError: names are missing or unknown, or a tensor has another shape or dtype, or is not finite, or
                has numbers that no weight has.
        """
        if not isinstance(state, Mapping):
            raise ParameterError(
                f"state must be a mapping from names to tensors, got {type(state).__name__}. {_REMEDY}"
            )
        for what, names in (
            ("lacks", [name for name in (*self.trained, *self.buffers) if name not in state]),
            ("has, besides the model's,", [name for name in state if name not in self._forms]),
        ):
            if names:
                raise ParameterError(f"The request's state {what} {_listed(names)}. {_REMEDY}")
        for name, tensor in state.items():
            _refuse_other_form(name, tensor, *self._forms[name])
            if not _is_moderate(tensor) and not self._is_as_large_as_ours(name, tensor):
                raise ParameterError(
                    f"'{name}' in the request's state has NaN or infinite values, or some beyond {_LARGEST:g}: "
                    "training would go nowhere, and spend. Send weights of a round that went well."
                )
            other = self._first_name.get(name, name)
            if other != name and other in state and not torch.equal(tensor, state[other]):
                raise ParameterError(
                    f"'{name}' and '{other}' are one parameter of the model, but differ in the request's state. "
                    f"Updates come under the name '{other}': send the state without '{name}'."
                )

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Bring a state that was not refused into the model."""
        brought = {name: tensor for name, tensor in state.items() if self._first_name.get(name, name) == name}
        if first := brought.keys() - set(self.trained) - self._replaced.keys():
            own = self._tensors()
            self._replaced.update({name: own[name].detach().clone() for name in first})
        back = {name: tensor for name, tensor in self._replaced.items() if name not in brought}
        self._module.load_state_dict({**back, **brought}, strict=False)  # names were checked; the rest stays
        for name in back:
            del self._replaced[name]

    def update(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What training has added to the loaded state, by name, on the CPU.

        Raises:
            ModelError: it is not finite.
        """
        now = self._tensors()
        moved = {name: now[name].detach().cpu() - state[name].detach().cpu() for name in (*self.trained, *self.buffers)}
        for name, change in moved.items():
            if not _is_finite(change):
                raise ModelError(
                    f"'{name}' is not finite after the local steps: training diverged. Use a smaller learning rate."
                )
        return moved

    def _tensors(self) -> dict[str, Tensor]:
        """The model's state; what a module keeps in it besides tensors is its own business."""
        return {name: value for name, value in self._module.state_dict().items() if isinstance(value, Tensor)}

    def _is_as_large_as_ours(self, name: str, tensor: Tensor) -> bool:
        """Whether a buffer is infinite, NaN or huge where the model's own is the same, as attention masks are."""
        if name in self._first_name:
            return False  # a parameter
        ours = (self._replaced[name] if name in self._replaced else self._tensors()[name]).cpu()
        theirs = tensor.detach().cpu()
        same = (theirs == ours) | (theirs.isnan() & ours.isnan())
        return bool(((theirs.abs() <= _LARGEST) | same).all())


def digest_of(state: Mapping[str, Tensor], *facts: object) -> str:
    """What tells a request from others: BLAKE2b over names, dtypes, shapes, bytes, and further plain facts."""
    digest = hashlib.blake2b(repr(facts).encode(), digest_size=16)
    for name in sorted(state, key=str):
        tensor = state[name]
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.is_meta:
            digest.update(repr((name, type(tensor))).encode())  # it will be refused
            continue
        tensor = tensor.detach().cpu().contiguous()
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _refuse_other_form(name: str, tensor: object, shape: torch.Size, dtype: torch.dtype) -> None:
    if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
        raise ParameterError(
            f"'{name}' in the request's state is no dense tensor, but {type(tensor).__name__}. {_REMEDY}"
        )
    if tensor.shape != shape or tensor.dtype != dtype:
        raise ParameterError(
            f"'{name}' in the request's state has shape {tuple(tensor.shape)} and dtype {tensor.dtype}; the model's "
            f"has shape {tuple(shape)} and dtype {dtype}. {_REMEDY}"
        )


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() and not tensor.is_complex():
        return True
    if tensor.is_complex():
        return bool(torch.isfinite(tensor).all())
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor.detach())  # NaN if any is
    return math.isfinite(low.item()) and math.isfinite(high.item())


def _is_moderate(tensor: Tensor) -> bool:
    """Whether all numbers are finite, and of a size that weights have."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return _is_finite(tensor)
    low, high = torch.aminmax(tensor.detach())
    return low.item() >= -_LARGEST and high.item() <= _LARGEST  # NaN is neither


def _listed(names: Sequence[object]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(f"'{name}'" for name in names[:_NAMED]) + more
