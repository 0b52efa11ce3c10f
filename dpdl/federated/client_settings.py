"""What both kinds of client are given, and what both are asked: checked, and brought to one form."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from accountants import arguments
from dpdl.errors import ModelError, ParameterError
from dpdl.federated.global_weights import GlobalWeights
from dpdl.federated.inventory import UNPROTECTED, Inventory, Release
from dpdl.federated.messages import FitRequest
from dpdl.per_sample.randomness import isolated_randomness
from dpdl.plan import PrivacyPlan
from dpdl.secure_random import RandomStream
from dpdl.uniform_loader import uniform_loader_sizes

__all__ = [
    "EXAMPLES",
    "MAX_STEPS",
    "checked_flag",
    "checked_metrics",
    "checked_name",
    "framework_randomness",
    "inventory_of",
    "loader_over",
    "own_model",
    "own_steps",
    "planned",
    "refuse_no_function",
    "round_stream",
    "steps_of",
]

MAX_STEPS = 10_000  # local steps in a round: what a server may ask for unless the client says otherwise
EXAMPLES = "examples"  # the metric that counts records
_OF_THE_OWN_LOOP = ("loss", EXAMPLES)


def checked_name(name: object, *, of: str = "name of a client") -> str:
    """A client's name, or a federation's: it will stand in reports and logs, between other words.

    Raises:
        ParameterError: it is not a text, or empty, or of several lines.
    """
    if not isinstance(name, str) or not name.strip() or not name.isprintable():
        raise ParameterError(f"{of} must be a text in one line of printable characters, got {name!r}.")
    return name


def refuse_no_function(name: str, value: object, *, remedy: str) -> None:
    """Raise unless this can be called.

    Raises:
        ParameterError: it cannot.
    """
    if not callable(value):
        raise ParameterError(f"{name} must be a function, got {value!r}. {remedy}")


def checked_flag(name: str, value: object) -> bool:
    """True or False, and nothing that Python takes for one of them: "no" is true.

    Raises:
        ParameterError: it is something else.
    """
    if not isinstance(value, bool):
        raise ParameterError(f"{name} must be True or False, got {value!r}.")
    return value


def own_model(model: nn.Module | Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """What makes the client's own model: the function that was given, or one that hands out a copy taken now.

    Raises:
        ModelError: the module cannot be copied, or what was given is neither.
    """
    if not isinstance(model, nn.Module):
        if not callable(model):
            raise ModelError(f"model must be a module, or a function that makes one, got {type(model).__name__}.")
        return model
    try:
        copied = copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise ModelError(
            f"The {type(model).__name__} cannot be copied ({error}), and a client trains a copy. Give a function that "
            "makes the model."
        ) from error
    return lambda: copied


def loader_over(dataset: Dataset[Any], batch_size: int) -> DataLoader[Any]:
    """An ordinary loader over a client's data, which is not touched.

    Raises:
        LoaderError: the dataset has no length, or nothing in it.
    """
    loader: DataLoader[Any] = DataLoader(dataset, batch_size=batch_size)
    uniform_loader_sizes(loader)
    return loader


def checked_metrics(metrics: Sequence[str], *, own_loop: bool) -> tuple[str, ...]:
    """Names of the numbers that are sent besides the update.

    Raises:
        ParameterError: they are not names, or nobody would compute them.
    """
    listed = isinstance(metrics, Sequence) and not isinstance(metrics, str)
    if not listed or not all(isinstance(name, str) and name for name in metrics):
        raise ParameterError(f"metrics must be names, got {metrics!r}. Give metrics=('loss',).")
    for name in metrics:
        if not own_loop and name not in _OF_THE_OWN_LOOP:
            raise ParameterError(
                f"The metric {name!r} is none of {_OF_THE_OWN_LOOP}. Give a loop that computes it: "
                "train=function(model, optimizer, loader, steps) that returns numbers by name."
            )
    return tuple(dict.fromkeys(metrics))


def steps_of(request: FitRequest, by_default: int | None, *, at_most: int | None = None) -> int:
    """How many local steps a request asks for.

    Raises:
        ParameterError: nobody says, or it is more than `at_most`, or the request's round or federation is not one.
    """
    if type(request.round) is not int or request.round < 1:
        raise ParameterError(f"round must be a whole number from 1, got {request.round!r}.")
    checked_name(request.federation, of="federation")
    steps = by_default if request.steps is None else request.steps
    if steps is None:
        raise ParameterError("Nobody says how many local steps there are. Give the client, or the request, steps=...")
    steps = arguments.positive_whole("steps", steps, remedy="Ask for at least one local step.")
    if at_most is not None and steps > at_most:
        raise ParameterError(
            f"The request asks for {steps} local steps, and this client takes at most {at_most} in a round. Ask for "
            "fewer, or make the client with max_steps=..."
        )
    return steps


def own_steps(steps: int | None, max_steps: int) -> tuple[int | None, int]:
    """A client's local steps, and the most that it takes in a round.

    Raises:
        ParameterError: they are none, or the first is more than the second.
    """
    most = arguments.positive_whole("max_steps", max_steps, remedy="Give the most local steps that a round may have.")
    if steps is None:
        return None, most
    steps = arguments.positive_whole("steps", steps, remedy="Give local steps.")
    if steps > most:
        raise ParameterError(f"steps is {steps}, more than max_steps={most}. Give fewer, or a larger max_steps.")
    return steps, most


def round_stream(seed: int | None, name: str, request: FitRequest) -> RandomStream:
    """A round's own key: fresh, or from (seed, client, federation, round) and nothing else."""
    if seed is None:
        return RandomStream.from_os()
    whose = RandomStream.from_insecure_seed(seed).child(f"client {name}")
    return whose.child(f"federation {request.federation}").child(f"round {request.round}")


@contextlib.contextmanager
def framework_randomness(stream: RandomStream, device: torch.device) -> Iterator[None]:
    """Inside, torch's own draws (dropout) follow from a seeded stream; with a secure one they are torch's."""
    if stream.secure:
        yield
        return
    with isolated_randomness(device):
        torch.manual_seed(int(stream.child("framework").words(1, message=0)[0] >> 1))
        yield


def inventory_of(weights: GlobalWeights, *, mechanism: str, metrics: Sequence[str], weight: float) -> Inventory:
    """Everything in a reply, and what covers it: `mechanism` for parameters, nothing for the rest."""
    shapes = weights.shapes
    of_parameters = [Release(name=n, kind="parameter", mechanism=mechanism, shape=shapes[n]) for n in weights.trained]
    of_buffers = [Release(name=n, kind="buffer", mechanism=UNPROTECTED, shape=shapes[n]) for n in weights.buffers]
    kinds = {name: "count" if name == EXAMPLES else "metric" for name in metrics}
    if weight != 1.0:
        kinds["weight"] = "count"
    others = [Release(name=name, kind=kind, mechanism=UNPROTECTED) for name, kind in kinds.items()]
    return Inventory((*of_parameters, *of_buffers, *others))


def planned(
    dataset: Dataset[Any],
    batch_size: int | None,
    sample_rate: float | None,
    noise_multiplier: float,
    max_grad_norm: float,
) -> tuple[DataLoader[Any], PrivacyPlan]:
    """A loader over the data, and the plan of one step."""
    if (batch_size is None) == (sample_rate is None):
        raise ParameterError(f"Give batch_size or sample_rate, got {batch_size!r} and {sample_rate!r}.")
    if batch_size is None:
        rate = arguments.sample_rate(sample_rate)
        size, *_ = uniform_loader_sizes(loader_over(dataset, 1))
        batch_size, expected = max(1, round(rate * size)), rate * size
        loader = loader_over(dataset, batch_size)
    else:
        batch_size = arguments.positive_whole("batch_size", batch_size, remedy="Give an expected number of records.")
        loader = loader_over(dataset, batch_size)
        size, *_ = uniform_loader_sizes(loader)
        expected = float(min(batch_size, size))
        rate = expected / size
    plan = PrivacyPlan(
        sample_rate=rate,
        expected_batch_size=expected,
        steps=1,
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        dataset_size=size,
    )
    return loader, plan
