"""Shadow models: the training under attack, done again and again on random halves, to see what each example changes.

    shadows = train_shadow_models(train, x, y, models=16)       # train(inputs, labels, number) -> a trained model
    print(lira(shadows))

Each model gets each example by a fair coin of its own [1, section V]. What is kept is not the models but how confident
each one is in each example's label.

Private: the confidences. The models are as private as any that `train` makes, and are thrown away.

References:
    [1] Carlini, Chien, Nasr, Song, Terzis, Tramer, Membership Inference Attacks From First Principles, 2022.
        arXiv:2112.03570.
"""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from accountants import arguments
from dpdl.errors import ParameterError

__all__ = ["ShadowModels", "logit_confidence", "train_shadow_models"]

Array = NDArray[np.float64]
Coins = NDArray[np.bool_]
Train = Callable[[Tensor, Tensor, int], nn.Module]
Augment = Callable[[Tensor], Tensor]
Score = Callable[[Tensor, Tensor], Tensor]

_FEWEST_MODELS = 4
_ROWS = 1000  # in one forward pass; bounds memory


@dataclass(frozen=True, kw_only=True, eq=False)
class ShadowModels:
    """What shadow models say of every candidate, and who of them had it.

    Attributes:
        confidences: shape [models, n, queries], finite; the higher, the surer the model is of the example's label. A
            query is the example itself or an augmentation of it.
        members: shape [models, n], bool: whose coin was True and who was trained on.

    Raises:
        ParameterError: shapes do not fit, there are fewer than four models, or a confidence is not finite.
    """

    confidences: Array
    members: Coins

    def __post_init__(self) -> None:
        values, coins = self.confidences, self.members
        if values.ndim != 3 or values.shape[:2] != coins.shape or coins.dtype != np.bool_ or 0 in values.shape:
            raise ParameterError(
                f"confidences must be [models, n, queries] and members [models, n] of bool, got {values.shape}, "
                f"{coins.shape}, {coins.dtype}."
            )
        if len(coins) < _FEWEST_MODELS:
            raise ParameterError(f"{len(coins)} shadow models: give at least {_FEWEST_MODELS}, better 16 or more.")
        if not np.isfinite(values).all():
            raise ParameterError("A confidence is not finite: a shadow model diverged. Train it more carefully.")


def train_shadow_models(
    train: Train,
    inputs: Tensor,
    labels: Tensor,
    *,
    models: int = 16,
    augmentations: Sequence[Augment] = (),
    score: Score | None = None,
    jobs: int = 1,
    seed: int | None = None,
    console: Console | None = None,
) -> ShadowModels:
    """Train on random halves and ask each model about every candidate.

    Args:
        train: (inputs, labels, number) to a trained model; the number counts models from 0. For a bound on epsilon it
            must be the private training, with its sampling rate and steps fixed beforehand.
        inputs: candidates, shape [n, ...].
        labels: shape [n].
        models: how many to train, at least 4; 16 are a start, 64 and more are better.
        augmentations: each from inputs to inputs, asked about besides the inputs themselves, such as
            `lambda x: x.flip(-1)`.
        score: (outputs, labels) to [n] numbers about normally distributed; by default `logit_confidence`.
        jobs: processes; with more than one, `train`, `augmentations` and `score` are functions of a module.
        seed: of the coins; by default from the operating system.
        console: where to show a progress bar; None for nowhere.

    Returns:
        Confidences, shape [models, n, 1 + augmentations], and coins.

    Raises:
        ParameterError: too few models, jobs or candidates; or a function that cannot be sent to another process.

    References:
        Carlini et al., Membership Inference Attacks From First Principles, 2022. arXiv:2112.03570
    """
    count = arguments.positive_whole("models", models, remedy="Give 16 or more.")
    if count < _FEWEST_MODELS:
        raise ParameterError(f"models must be at least {_FEWEST_MODELS}, got {count}. Give 16 or more.")
    jobs = arguments.positive_whole("jobs", jobs, remedy="Give the number of processes.")
    if len(inputs) != len(labels) or not len(inputs):
        raise ParameterError(f"inputs and labels must be as many, and some: got {len(inputs)} and {len(labels)}.")
    coins: Coins = np.random.default_rng(seed).random((count, len(inputs))) < 0.5
    task = _Task(train, inputs, labels, coins, tuple(augmentations), score or logit_confidence)
    confidences = list(_with_progress(task.run_all(jobs), count, console))
    return ShadowModels(confidences=np.stack(confidences), members=coins)


def logit_confidence(outputs: Tensor, labels: Tensor) -> Tensor:
    """log(p / (1 - p)) of each label's probability p under softmax, which is about normally distributed [1, eq. 3].

    Args:
        outputs: logits, shape [n, classes], two classes or more.
        labels: shape [n], int64.

    Returns:
        Shape [n], float64: the label's logit less the log-sum-exp of all others; no p is ever rounded to 1.

    Example:
        >>> logit_confidence(torch.tensor([[2.0, 0.0], [100.0, 0.0]]), torch.tensor([0, 0]))
        tensor([  2., 100.], dtype=torch.float64)
    """
    logits = outputs.double()
    own = logits.gather(1, labels[:, None])[:, 0]
    others = logits.scatter(1, labels[:, None], float("-inf"))
    return own - others.logsumexp(1)


@dataclass(frozen=True)
class _Task:
    """All that a process needs to train any of the models."""

    train: Train
    inputs: Tensor
    labels: Tensor
    coins: Coins
    augmentations: tuple[Augment, ...]
    score: Score

    def run_all(self, jobs: int) -> Iterator[Array]:
        if jobs == 1:
            yield from map(self.run, range(len(self.coins)))
            return
        try:
            pickle.dumps((self.train, self.augmentations, self.score))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ParameterError(
                f"jobs={jobs}: a function cannot be sent to another process ({error}). Define train, augmentations and "
                "score at the top of a module, or use jobs=1."
            ) from error
        # Spawned, not forked: torch's threads do not survive a fork.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, mp_context=context, initializer=_start, initargs=(self,)) as pool:
            yield from pool.map(_run_in_process, range(len(self.coins)))

    def run(self, number: int) -> Array:
        kept = torch.from_numpy(self.coins[number])
        model = self.train(self.inputs[kept], self.labels[kept], number)
        model.eval()
        first = next(model.parameters(), self.inputs)
        answers = []
        with torch.no_grad():
            for query in (None, *self.augmentations):
                inputs = self.inputs if query is None else query(self.inputs)
                parts = [
                    self.score(model(x.to(first.device)), y.to(first.device)).double().cpu()
                    for x, y in zip(inputs.split(_ROWS), self.labels.split(_ROWS), strict=True)
                ]
                answers.append(torch.cat(parts))
        found: Array = torch.stack(answers, dim=1).numpy()  # [n, queries]
        return found


_tasks: list[_Task] = []  # of this process, where it is one of several


def _start(task: _Task) -> None:
    torch.set_num_threads(1)
    _tasks[:] = [task]


def _run_in_process(number: int) -> Array:
    return _tasks[0].run(number)


def _with_progress(results: Iterator[Array], count: int, console: Console | None) -> Iterator[Array]:
    if console is None:
        yield from results
        return
    with Progress(console=console) as bar:
        yield from bar.track(results, total=count, description="shadow models")
