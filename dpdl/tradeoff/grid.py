"""The runs of a sweep, from its arguments: every plan is made, and every argument checked, before anything is spent."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from accountants import arguments
from dpdl.errors import ParameterError
from dpdl.execution import EngineName, Execution
from dpdl.plan import PrivacyPlan
from dpdl.tradeoff.point import Point

__all__ = ["MOST_RUNS", "Grid", "HeldOut"]

HeldOut = Literal["public", "private"]
MOST_RUNS = 100_000  # of one sweep: all are planned, and kept in memory, before the first begins
_SEEDS = 2**32  # of first weights: what torch, numpy and random all take


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What a sweep tries: each epsilon (or plan) with each clipping norm, batch size, learning rate and seed.

    Args:
        epsilons: budgets of single runs, each at `delta`; or
        plans: the plans themselves, which then hold clipping norms and batch sizes too.
        dataset_size: examples to train on, a public number; not with plans.
        epochs: passes over the data, in expectation; not with plans.
        delta: in (0, 1).
        max_grad_norms: clipping norms.
        batch_sizes: expected examples in a step.
        lrs: learning rates, told to the function as `point.lr`; empty if it chooses its own.
        seeds: of first weights.
        baseline: whether there is a non-private line: each batch size and seed, without clipping and noise.
        baseline_lrs: learning rates of the non-private line, whose gradients are not clipped; `lrs` by default.
        settings: names to values that JSON can hold; told to the function in each run.
        engine: what computes per-sample gradients.
        max_physical_batch_size: the most examples in one forward pass.
        held_out: whose records scores are computed on. "private": people whom no epsilon of the sweep protects.
            "public": records that are no secret.
        insecure_seed: reproducible noise and sampling, of each run its own; for research only.

    Raises:
        ParameterError: an argument is out of range, or missing, or contradicts another.
    """

    epsilons: tuple[float, ...] = ()
    plans: tuple[PrivacyPlan, ...] = ()
    dataset_size: int | None = None
    epochs: int | None = None
    delta: float
    max_grad_norms: tuple[float, ...] = ()
    batch_sizes: tuple[int, ...] = ()
    lrs: tuple[float, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    baseline: bool = True
    baseline_lrs: tuple[float, ...] = ()
    settings: Mapping[str, Any]
    engine: EngineName = "auto"
    max_physical_batch_size: int | None = None
    held_out: HeldOut = "private"
    insecure_seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("epsilons", "max_grad_norms", "lrs", "baseline_lrs"):
            self._hold(name, tuple(_positive(name, value) for value in getattr(self, name)))
        whole = functools.partial(arguments.positive_whole, remedy="Count examples.")
        self._hold("batch_sizes", tuple(whole("batch_sizes", value) for value in self.batch_sizes))
        self._hold("seeds", tuple(_seed(value) for value in self.seeds))
        self._hold("delta", arguments.delta(self.delta))
        for name in ("epsilons", "plans", "max_grad_norms", "batch_sizes", "lrs", "seeds", "baseline_lrs"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ParameterError(f"{name} names one value twice: {values}. Give each once; seeds repeat a run.")
        if not self.seeds:
            raise ParameterError("seeds is empty: no run would be made. Give for example seeds=(0, 1, 2).")
        if self.held_out not in get_args(HeldOut):
            raise ParameterError(f"held_out must be one of {get_args(HeldOut)}, got {self.held_out!r}.")
        if type(self.baseline) is not bool:
            raise ParameterError(f"baseline must be True or False, got {self.baseline!r}.")
        if self.baseline_lrs and not self.baseline:
            raise ParameterError("baseline_lrs are of the non-private line, which baseline=False leaves out.")
        if self.baseline_lrs and not self.lrs:
            raise ParameterError("baseline_lrs needs lrs: the function is told a learning rate in each run or in none.")
        self._check_settings()
        self._execution()
        self._check_plans() if self.plans else self._check_budgets()
        self._check_count()

    def points(self) -> tuple[Point, ...]:
        """The runs, the non-private ones last; the same every time.

        Raises:
            ParameterError: an epsilon out of reach, or a batch larger than the data.
        """
        found: list[Point] = []
        for target, plan in self._private_plans():
            for lr in self.lrs or (None,):
                found += [self._point(plan, target, seed, lr) for seed in self.seeds]
        if self.baseline:
            for plan in self._baseline_plans():
                for lr in self.baseline_lrs or self.lrs or (None,):
                    found += [self._point(plan, math.inf, seed, lr) for seed in self.seeds]
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """The arguments as JSON holds them: what a sweep is compared by when it is resumed."""
        values = {**asdict(self), "plans": [json.loads(plan.to_json()) for plan in self.plans]}
        return dict(json.loads(json.dumps({**values, "settings": dict(self.settings)})))

    def _hold(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # frozen: brought to plain types once, here

    def _check_settings(self) -> None:
        try:
            same = json.loads(json.dumps(dict(self.settings), allow_nan=False)) == dict(self.settings)
        except (TypeError, ValueError) as error:
            raise ParameterError(f"settings must hold what JSON holds: {error}. Give names, numbers, lists.") from error
        if not same:
            raise ParameterError("settings must hold what JSON holds: string keys, and lists instead of tuples.")

    def _check_plans(self) -> None:
        for plan in self.plans:
            if not isinstance(plan, PrivacyPlan):
                raise ParameterError(f"plans must hold PrivacyPlans, got {type(plan).__name__}.")
            if not plan.noise_multiplier > 0:
                raise ParameterError("plans: one has noise_multiplier 0. The non-private line is baseline=True.")
        if len({plan.relation for plan in self.plans}) > 1:
            raise ParameterError("plans are of several neighbouring relations, whose costs do not add up. Give one.")
        beside = [
            name
            for name in ("epsilons", "max_grad_norms", "batch_sizes", "dataset_size", "epochs")
            if getattr(self, name) not in ((), None)
        ]
        if beside:
            raise ParameterError(f"plans are given, so leave out {', '.join(beside)}: the plans say it.")

    def _check_budgets(self) -> None:
        for name in ("epsilons", "max_grad_norms", "batch_sizes"):
            if not getattr(self, name):
                raise ParameterError(f"{name} is empty. Give at least one value, or plans.")
        for name in ("dataset_size", "epochs"):
            value = getattr(self, name)
            if value is None:
                raise ParameterError(f"{name} is missing: plans are computed from epsilons and it. Or give plans.")
            self._hold(name, arguments.positive_whole(name, value, remedy="Give a positive whole number."))
        assert self.dataset_size is not None
        if max(self.batch_sizes) > self.dataset_size:
            raise ParameterError(
                f"batch_sizes: {max(self.batch_sizes)} is more than the {self.dataset_size} examples there are."
            )

    def _check_count(self) -> None:
        plans = len(self.plans) or len(self.epsilons) * len(self.max_grad_norms) * len(self.batch_sizes)
        bare = (len(self.plans) or len(self.batch_sizes)) * self.baseline
        rates, bare_rates = len(self.lrs) or 1, len(self.baseline_lrs) or len(self.lrs) or 1
        runs = (plans * rates + bare * bare_rates) * len(self.seeds)
        if runs > MOST_RUNS:
            raise ParameterError(
                f"the sweep would be {runs:,} runs, more than {MOST_RUNS:,}. Give fewer values, or seeds."
            )

    def _private_plans(self) -> list[tuple[float | None, PrivacyPlan]]:
        if self.plans:
            return [(None, plan) for plan in self.plans]
        found: list[tuple[float | None, PrivacyPlan]] = []
        for epsilon in self.epsilons:
            for size in self.batch_sizes:
                plan = self._plan(size).calibrated(epsilon=epsilon, delta=self.delta)
                found += [(epsilon, replace(plan, max_grad_norm=norm)) for norm in self.max_grad_norms]
        return found

    def _baseline_plans(self) -> list[PrivacyPlan]:
        """Of each length and batch size one, with nothing that protects."""
        plans = self.plans or tuple(self._plan(size) for size in self.batch_sizes)
        bare = [replace(plan, noise_multiplier=0.0, max_grad_norm=math.inf) for plan in plans]
        return list(dict.fromkeys(bare))

    def _plan(self, batch_size: int) -> PrivacyPlan:
        assert self.dataset_size is not None
        assert self.epochs is not None
        return PrivacyPlan(
            sample_rate=batch_size / self.dataset_size,
            expected_batch_size=batch_size,
            steps=self.epochs * math.ceil(self.dataset_size / batch_size),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            dataset_size=self.dataset_size,
        )

    def _point(self, plan: PrivacyPlan, target: float | None, seed: int, lr: float | None) -> Point:
        size = round(plan.expected_batch_size)
        what = "baseline" if target == math.inf else f"eps{target:g}" if target is not None else "plan"
        named = f"{what}-b{size}" if target == math.inf else f"{what}-C{plan.max_grad_norm:g}-b{size}"
        if lr is not None:
            named += f"-lr{lr:g}"
        # What numbers were shortened to may be alike; the plan in full is not.
        mark = hashlib.blake2b(f"{plan.to_json()} {target!r} {lr!r}".encode(), digest_size=3).hexdigest()
        key = f"{named}-{mark}-seed{seed}"
        return Point(
            key=key,
            plan=plan,
            delta=self.delta,
            target=target,
            batch_size=size,
            seed=seed,
            lr=lr,
            settings=dict(self.settings),
            execution=self._execution(key),
        )

    def _execution(self, key: str = "") -> Execution:
        """Noise of an insecure seed is of the run's own: equal noise in two runs would cancel in their difference."""
        execution = Execution(
            engine=self.engine,
            max_physical_batch_size=self.max_physical_batch_size,
            insecure_seed=self.insecure_seed,
        )
        if execution.insecure_seed is None:
            return execution
        return replace(execution, insecure_seed=seed_of_its_own(execution.insecure_seed, key))


def seed_of_its_own(insecure_seed: int, name: str) -> int:
    """A seed for one use of an insecure seed, the same each time, other than that of any other name."""
    return int.from_bytes(hashlib.blake2b(f"{insecure_seed} {name}".encode(), digest_size=7).digest(), "big")


def _positive(name: str, value: object) -> float:
    number = arguments.real(name, value, remedy="Give positive numbers.")
    if not 0 < number < math.inf:
        raise ParameterError(f"{name} must hold positive finite numbers, got {value!r}.")
    return number


def _seed(value: object) -> int:
    if type(value) is not int or not 0 <= value < _SEEDS:
        raise ParameterError(f"seeds must hold whole numbers in [0, 2**32), got {value!r}.")
    return value
