"""The global model's state, and which of its tensors a round changes.

Averaged are trainable parameters. Everything else in a state is left as it is and listed in `excluded`: whole numbers
(`num_batches_tracked` would outweigh every parameter in an update's norm, and noise on it means nothing), buffers (the
statistics of normalisation layers are releases of their own), frozen parameters. A tensor under two names (tied
weights) is averaged once, under the first, and the other follows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from dpdl.errors import CheckpointError, ModelError, ParameterError

__all__ = ["GlobalModel"]

_STATISTICS = ("running_mean", "running_var")  # floating-point buffers by the names of torch.nn's normalisation layers


class GlobalModel:
    """A state by name, of which some tensors are trained.

    Args:
        source: a module, whose parameters that require gradients are trained; or a state, all of whose floating-point
            tensors are, unless `trained` names them.
        trained: the names of the tensors that rounds change.

    Attributes:
        state: all tensors by name, detached; replaced and never changed in place.
        trained: names of those that rounds change.
        excluded: names of those that stay as they are.

    Raises:
        ModelError: there is nothing to train, or the state has statistics and nobody said what is trained, or what
            looks like a second name of a trained tensor would stay as it is.
        ParameterError: `trained` names what is not there, or is not floating-point.
    """

    def __init__(self, source: Mapping[str, Tensor] | nn.Module, *, trained: Iterable[str] | None = None) -> None:
        of_module = isinstance(source, nn.Module)
        if isinstance(source, nn.Module):
            if trained is None:
                trained = [name for name, parameter in source.named_parameters() if parameter.requires_grad]
            source = source.state_dict()
        _refuse_other_than_tensors(source)
        self._follows = dict(_ties(source))
        self.state: dict[str, Tensor] = {name: tensor.detach().clone() for name, tensor in source.items()}
        if trained is None:
            _refuse_statistics(self.state)
            trained = [name for name, tensor in self.state.items() if tensor.is_floating_point()]
        self.trained = self._named(trained)
        if not of_module:
            self._refuse_likely_ties()
        self.excluded = tuple(name for name in self.state if self._follows.get(name, name) not in self.trained)
        if not self.trained:
            raise ModelError("The state has no floating-point tensor to train. Give the model's state_dict().")

    @property
    def coordinates(self) -> int:
        """How many numbers a round changes."""
        return sum(self.state[name].numel() for name in self.trained)

    def zeros(self) -> dict[str, Tensor]:
        """A float64 zero for each trained tensor, to add up in."""
        return {name: torch.zeros_like(self.state[name], dtype=torch.float64) for name in self.trained}

    def ignores(self, name: str) -> bool:
        """Whether a tensor of that name is in the state, and what a client sends under it is not used."""
        return name in self.state and name not in self.trained

    def copy(self) -> dict[str, Tensor]:
        """The state in tensors of its own, which somebody else may change."""
        return {name: tensor.clone() for name, tensor in self.state.items()}

    def replaced(self, changed: Mapping[str, Tensor]) -> None:
        """Take new values of trained tensors, in the dtypes that the state has."""
        new = {name: tensor.to(self.state[name]) for name, tensor in changed.items()}
        tied = {name: new[first] for name, first in self._follows.items() if first in new}
        self.state = {**self.state, **new, **tied}

    def refuse_unlike(self, state: object) -> dict[str, Tensor]:
        """A saved state, if it has the same tensors.

        Raises:
            CheckpointError: it has others.
        """
        if not isinstance(state, Mapping) or set(state) != set(self.state):
            raise CheckpointError("The saved state has other tensors than this server's model. Build the same model.")
        for name, mine in self.state.items():
            saved = state[name]
            if not isinstance(saved, Tensor) or (saved.shape, saved.dtype) != (mine.shape, mine.dtype):
                raise CheckpointError(f"The saved '{name}' is not a tensor of shape {tuple(mine.shape)}, {mine.dtype}.")
        return {name: state[name].detach().to(mine.device).clone() for name, mine in self.state.items()}

    def _refuse_likely_ties(self) -> None:
        """A copy of a tied weight, under its second name, would stay as it is while the first one moves."""
        for name, tensor in self.state.items():
            if name in self.trained or name in self._follows or not tensor.is_floating_point() or _is_constant(tensor):
                continue
            for first in self.trained:
                if _is_same(tensor, self.state[first]):
                    raise ModelError(
                        f"'{name}' has the values of '{first}', is not trained, and is a tensor of its own: if the "
                        "model ties the two, it would go stale from the first round on, and take the trained one's "
                        "place in an evaluation. Give the module itself in place of its state: that tells ties from "
                        "copies."
                    )

    def _named(self, trained: Iterable[str]) -> tuple[str, ...]:
        if isinstance(trained, str):
            raise ParameterError(f"trained must be a list of names, got the text {trained!r}.")
        wanted = list(dict.fromkeys(trained))
        for name in wanted:
            if name not in self.state:
                raise ParameterError(f"trained has {name!r}, which is not in the state. It has {_some(self.state)}.")
            if not self.state[name].is_floating_point():
                raise ParameterError(
                    f"trained has {name!r}, of {self.state[name].dtype}: noise and averages need floating-point "
                    "numbers. Leave it out, and it stays as it is."
                )
        firsts = {self._follows.get(name, name) for name in wanted}
        return tuple(name for name in self.state if name in firsts)


def _refuse_other_than_tensors(state: object) -> None:
    if not isinstance(state, Mapping):
        raise ParameterError(f"state must be a module or a dict of tensors, got {type(state).__name__}.")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ParameterError(f"state must have tensors by name, got {type(tensor).__name__} under {name!r}.")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ParameterError(f"state has a tensor that is not finite: '{name}'. Start from finite weights.")


def _refuse_statistics(state: Mapping[str, Tensor]) -> None:
    found = [name for name in state if name.rpartition(".")[2] in _STATISTICS]
    if found:
        raise ModelError(
            f"The state has running statistics ({_some(found)}), which are no parameters: noise would make them "
            "worthless, and averages of them are releases of their own. Give the module itself in place of its state, "
            "or trained=[name for name, _ in model.named_parameters()]; they then stay as they are."
        )


def _ties(state: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Names of tensors that are the same memory as an earlier one, and that one's name."""
    first: dict[object, str] = {}
    for name, tensor in state.items():
        if tensor.numel():
            place = (str(tensor.device), tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
            if place in first:
                yield name, first[place]
            first.setdefault(place, name)


def _is_constant(tensor: Tensor) -> bool:
    """Whether all its numbers are one, as those of fresh biases and buffers are: that says nothing of ties."""
    return tensor.numel() == 0 or bool((tensor == tensor.flatten()[0]).all())


def _is_same(tensor: Tensor, other: Tensor) -> bool:
    return (tensor.shape, tensor.dtype, tensor.device) == (other.shape, other.dtype, other.device) and torch.equal(
        tensor, other
    )


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(f"'{name}'" for name in listed[:5]) + (", ..." if len(listed) > 5 else "")
