"""Plans, their JSON, and questions to the accountants, from random numbers."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import torch
from hypothesis import strategies as st
from scipy.special import log_ndtr
from torch.utils.data import DataLoader, TensorDataset

import accountants
import dpdl
from tests.misuse.fuzzing import ours
from tests.misuse.odd_values import as_json, changed, often

__all__ = ["plan", "plan_for_a_loader", "plans_json", "question"]

DELTAS = st.sampled_from((1e-9, 1e-5, 1e-3, 0.3))
NOISES = st.sampled_from((0.0, 0.4, 1.0, 3.7, 20.0))


def gaussian_delta(epsilon: float, mu: float) -> float:
    """delta of the Gaussian mechanism with means mu apart [Balle and Wang 2018, theorem 8], by logarithms."""
    if mu == 0:
        return 0.0
    above = log_ndtr(mu / 2 - epsilon / mu)
    below = epsilon + log_ndtr(-mu / 2 - epsilon / mu)
    return float(math.exp(above) * -math.expm1(min(0.0, below - above)))


def assert_bounded(epsilon: float, *, noise: float, rate: float, steps: int, delta: float, apart: float) -> None:
    """Sampling only helps: no more than without; without it, what the closed form says; 0 steps spend nothing."""
    assert epsilon >= 0
    if steps == 0:
        assert epsilon == 0
        return
    if noise == 0:
        assert math.isinf(epsilon) or 1 - (1 - rate) ** steps <= delta
        return
    mu = apart * math.sqrt(steps) / noise
    if math.isfinite(mu) and epsilon < 500:
        assert gaussian_delta(epsilon * (1 - 1e-6) - 1e-9, mu) > delta * (1 - 1e-3) or epsilon == 0 or rate < 1
        if rate == 1:
            assert gaussian_delta(epsilon, mu) <= delta * (1 + 1e-9)


def plan(data: st.DataObject) -> None:
    fields = {
        "sample_rate": often(st.sampled_from((0.01, 0.1, 1.0))),
        "expected_batch_size": often(st.sampled_from((1, 10, 100.0))),
        "steps": often(st.sampled_from((1, 7, 100))),
        "noise_multiplier": often(NOISES),
        "max_grad_norm": often(st.sampled_from((0.1, 1.0, 30.0))),
        "relation": often(st.sampled_from(("add_or_remove", "zero_out", "replace_one"))),
        "dataset_size": often(st.sampled_from((None, None, None, 100, 1000))),
    }
    given = {name: data.draw(strategy, label=name) for name, strategy in fields.items()}
    delta = data.draw(often(DELTAS), label="delta")
    with ours() as refused:
        made = dpdl.PrivacyPlan(**given)
    if refused:
        return
    assert dpdl.PrivacyPlan.from_json(made.to_json()) == made
    assert str(made)
    assert all(type(value) in (int, float, str, type(None)) for value in asdict(made).values())
    with ours() as refused:
        spent = made.epsilon(delta)
    if not refused:
        assert_bounded(
            spent,
            noise=made.noise_multiplier,
            rate=made.sample_rate,
            steps=made.steps,
            delta=float(delta),
            apart=2.0 if made.relation == "replace_one" else 1.0,
        )


def plan_for_a_loader(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 300), label="n")
    batch_size = data.draw(st.integers(1, 320), label="batch_size")
    drop_last = data.draw(st.booleans(), label="drop_last")
    loader = DataLoader(TensorDataset(torch.zeros(size)), batch_size, drop_last=drop_last)
    names = {
        "epochs": st.sampled_from((1, 3)),
        "steps": st.sampled_from((1, 40)),
        "epsilon": st.sampled_from((0.5, 8.0)),
        "delta": DELTAS,
        "noise_multiplier": NOISES,
    }
    wanted = data.draw(
        st.sampled_from((("epochs", "noise_multiplier"), ("steps", "epsilon", "delta"), tuple(names), ("steps",))),
        label="given",
    )
    given: dict[str, Any] = {name: data.draw(often(names[name]), label=name) for name in wanted}
    with ours() as refused:
        made = dpdl.PrivacyPlan.for_loader(loader, max_grad_norm=1.0, **given)
    if refused:
        return
    passes = size // batch_size if drop_last else -(-size // batch_size)
    assert made.sample_rate == min(batch_size, size) / size
    assert made.expected_batch_size == min(batch_size, size)
    assert made.dataset_size == size
    assert made.steps == (int(given["epochs"]) * passes if given.get("epochs") is not None else int(given["steps"]))
    if given.get("epsilon") is not None:
        spent = made.epsilon(float(given["delta"])) if given["delta"] < 1 / size else None
        assert spent is None or spent <= float(given["epsilon"])


def question(data: st.DataObject) -> None:
    sound = {
        "noise_multiplier": st.sampled_from((0.5, 1.0, 4.0)),
        "sample_rate": st.sampled_from((0.01, 0.2, 1.0)),
        "steps": st.sampled_from((1, 30, 1000)),
        "delta": DELTAS,
        "epsilon": st.sampled_from((0.5, 3.0)),
        "relation": st.sampled_from(("add_or_remove", "replace_one", accountants.NeighboringRelation.ZERO_OUT)),
    }
    name, missing = data.draw(
        st.sampled_from(
            (
                ("epsilon", "epsilon"),
                ("delta", "delta"),
                ("interval", "epsilon"),
                ("noise_multiplier", "noise_multiplier"),
                ("steps", "steps"),
                ("sample_rate", "sample_rate"),
            )
        ),
        label="question",
    )
    given = {key: data.draw(often(values), label=key) for key, values in sound.items() if key != missing}
    with ours() as refused:
        answer = getattr(accountants, name)(**given)
    if refused:
        return
    known = {**given, missing: answer.upper if name == "interval" else answer}
    relation = accountants.NeighboringRelation.of(known["relation"])
    apart = 2.0 if relation is accountants.NeighboringRelation.REPLACE_ONE else 1.0
    if name in ("epsilon", "interval"):
        assert_bounded(
            known["epsilon"],
            noise=float(known["noise_multiplier"]),
            rate=float(known["sample_rate"]),
            steps=int(known["steps"]),
            delta=float(known["delta"]),
            apart=apart,
        )
        return
    noise, rate, steps = float(known["noise_multiplier"]), float(known["sample_rate"]), int(known["steps"])
    assert noise >= 0
    assert 0 <= rate <= 1
    assert 0 <= float(known["delta"]) <= 1
    if rate == 1 and noise > 0 and steps < 1e6:  # within the budget, by the closed form
        within = gaussian_delta(float(known["epsilon"]), apart * math.sqrt(steps) / noise)
        assert within <= float(known["delta"]) * (1 + 1e-6) + 1e-300


def plans_json(data: st.DataObject) -> None:
    made = dpdl.PrivacyPlan(
        sample_rate=0.1,
        expected_batch_size=10,
        steps=5,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        dataset_size=100,
    )
    values = changed(data, json.loads(made.to_json()))
    with ours() as refused:
        again = dpdl.PrivacyPlan.from_json(as_json(values))
    if not refused:
        written = {key: value for key, value in values.items() if key != "schema"}
        assert asdict(again) == written
