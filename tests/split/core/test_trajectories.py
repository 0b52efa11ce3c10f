"""Fifty steps of each topology are fifty steps of the network in one piece, with and without noise."""

from __future__ import annotations

import itertools

import pytest

from tests.split.core.networks import cases
from tests.split.core.runs import RATE, Mechanism, batches, clips, known_noise, plan_of, run_of
from tests.split.core.whole_network import clipped_sums, distance, parameters, step

TOPOLOGIES = {case.name: case for case in cases()}
WAYS = list(itertools.product(["none", "part", "joint"], [False, True]))
FIRST = [("none", False), ("part", True), ("joint", True)]  # a topology has one of these by default
ALL = [
    pytest.param(
        name,
        *way,
        id=f"{name}-{way[0]}-{'known noise' if way[1] else 'no noise'}",
        marks=[] if way == FIRST[number % len(FIRST)] else [pytest.mark.slow],
    )
    for number, name in enumerate(TOPOLOGIES)
    for way in WAYS
]


@pytest.mark.parametrize(("name", "kind", "noisy"), ALL)
def test_fifty_steps_are_those_of_the_whole_network(
    name: str, kind: str, noisy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, whole = TOPOLOGIES[name].fresh(), TOPOLOGIES[name].fresh()
    clip, part, joint, total = clips(case, kind)
    Mechanism(noise=known_noise if noisy else None).use(monkeypatch)
    before = {n: p.detach().clone() for n, p in parameters(case).items()}
    run = run_of(case, plan_of(max_grad_norm=total), clip=clip)
    run.run()
    for number, rows in enumerate(batches(run, 50)):
        sums = clipped_sums(whole, rows, part=part, joint=joint)
        noise = {n: known_noise(number, n, p) for n, p in parameters(whole).items()} if noisy else None
        step(whole, sums, noise, divisor=6, rate=RATE)
    assert distance({n: p.detach() for n, p in parameters(case).items()}, parameters(whole)) < 1e-9
    assert distance(before, parameters(whole)) > 1e-2
