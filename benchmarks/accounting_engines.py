"""The engines of `benchmarks.accounting`: ours and the peers', each as its users call it, behind the same questions.

A plan is a list of records {"mech": "gaussian" | "poisson_gaussian" | "laplace" | "poisson_laplace" | "wor_gaussian",
"count": steps, ...}, with "sigma" or "b" over the sensitivity of the relation, and "q" where sampled. Peers are
imported when their engine is made. What an engine has no function for raises NotImplementedError.
"""

from __future__ import annotations

import abc
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Record = Mapping[str, Any]
Bounds = tuple[float | None, float]  # lower, if the engine gives one, and upper


class Engine(abc.ABC):
    """Questions to one engine; the caller measures."""

    package: str

    @abc.abstractmethod
    def epsilon(self, mechanisms: Sequence[Record], delta: float, relation: str) -> Bounds:
        """Bounds on epsilon at delta."""

    def delta(self, mechanisms: Sequence[Record], epsilon: float) -> Bounds:
        """Bounds on delta at epsilon."""
        raise NotImplementedError("no query for delta")

    def noise_multiplier(self, *, epsilon: float, delta: float, q: float, steps: int) -> Bounds:
        """The noise multiplier for a budget of DP-SGD; the lower bound is always None."""
        raise NotImplementedError("no calibration")

    def curve(self, *, sigma: float, q: float, steps: Sequence[int], delta: float) -> Bounds:
        """Bounds on epsilon at the last of many numbers of steps, all of which are computed."""
        bounds: Bounds = (None, 0.0)
        for count in steps:
            record = {"mech": "poisson_gaussian", "q": q, "sigma": sigma, "count": count}
            bounds = self.epsilon([record], delta, "add_remove")
        return bounds


class _Accountants(Engine):
    """Ours: "prv" (the default) or "rdp"."""

    package = "accountants"

    def __init__(self, name: str) -> None:
        self._module: Any = importlib.import_module("accountants")
        self._events: Any = importlib.import_module("accountants.events")
        self._name = name

    def epsilon(self, mechanisms: Sequence[Record], delta: float, relation: str) -> Bounds:
        relation = {"add_remove": "add_or_remove"}.get(relation, relation)
        return tuple(self._accountant(mechanisms, relation).interval(delta))

    def delta(self, mechanisms: Sequence[Record], epsilon: float) -> Bounds:
        return tuple(self._accountant(mechanisms, "add_or_remove").delta_interval(epsilon))

    def noise_multiplier(self, *, epsilon: float, delta: float, q: float, steps: int) -> Bounds:
        return None, self._module.noise_multiplier(
            epsilon=epsilon, delta=delta, sample_rate=q, steps=steps, accountant=self._name
        )

    def curve(self, *, sigma: float, q: float, steps: Sequence[int], delta: float) -> Bounds:
        points = self._module.epsilon_curve(
            noise_multiplier=sigma, sample_rate=q, steps=steps, delta=delta, accountant=self._name
        )
        return None, float(points[-1])

    def _accountant(self, mechanisms: Sequence[Record], relation: str) -> Any:
        accountant = self._module.new_accountant(self._name, relation=relation)
        for record in mechanisms:
            accountant.compose(self._event(record), record["count"])
        return accountant

    def _event(self, record: Record) -> Any:
        ours = self._events
        match record["mech"]:
            case "gaussian":
                return ours.Gaussian(record["sigma"])
            case "poisson_gaussian":
                return ours.PoissonSampled(record["q"], ours.Gaussian(record["sigma"]))
            case "laplace":
                return ours.Laplace(record["b"])
            case "poisson_laplace":
                return ours.PoissonSampled(record["q"], ours.Laplace(record["b"]))
            case "wor_gaussian":
                gaussian = ours.Gaussian(2 * record["sigma"])  # over the clip norm; replacing moves the sum by two
                return ours.SampledWithoutReplacement(record["batch"], record["n"], gaussian)
        raise NotImplementedError(f"no event for {record['mech']}")


class _Opacus(Engine):
    """Opacus: "rdp" or "prv", whose upper bound is what it returns."""

    package = "opacus"

    def __init__(self, name: str) -> None:
        self._module: Any = importlib.import_module("opacus.accountants")
        self._utils: Any = importlib.import_module("opacus.accountants.utils")
        self._name = name

    def epsilon(self, mechanisms: Sequence[Record], delta: float, relation: str) -> Bounds:
        accountant = self._module.create_accountant(self._name)
        for record in mechanisms:
            _only(record, "gaussian", "poisson_gaussian")
            accountant.history.append((record["sigma"], record.get("q", 1.0), record["count"]))
        return None, accountant.get_epsilon(delta)

    def noise_multiplier(self, *, epsilon: float, delta: float, q: float, steps: int) -> Bounds:
        return None, self._utils.get_noise_multiplier(
            target_epsilon=epsilon, target_delta=delta, sample_rate=q, steps=steps, accountant=self._name
        )


class _DpAccounting(Engine):
    """dp_accounting: "rdp" with its default orders, or "pld" with its default grid, 1e-4."""

    package = "dp_accounting"

    def __init__(self, name: str) -> None:
        self._module: Any = importlib.import_module("dp_accounting")
        self._name = name
        self._engine: Any = importlib.import_module(f"dp_accounting.{name}")

    def epsilon(self, mechanisms: Sequence[Record], delta: float, relation: str) -> Bounds:
        return None, self._accountant(mechanisms, relation).get_epsilon(delta)

    def delta(self, mechanisms: Sequence[Record], epsilon: float) -> Bounds:
        return None, self._accountant(mechanisms, "add_remove").get_delta(epsilon)

    def noise_multiplier(self, *, epsilon: float, delta: float, q: float, steps: int) -> Bounds:
        def event(sigma: float) -> Any:
            sampled = self._module.PoissonSampledDpEvent(q, self._module.GaussianDpEvent(sigma))
            return self._module.SelfComposedDpEvent(sampled, steps)

        empty = self._engine.RdpAccountant if self._name == "rdp" else self._engine.PLDAccountant
        return None, self._module.calibrate_dp_mechanism(empty, event, epsilon, delta)

    def _accountant(self, mechanisms: Sequence[Record], relation: str) -> Any:
        relations = self._module.NeighboringRelation
        neighbours = relations.REPLACE_ONE if relation == "replace_one" else relations.ADD_OR_REMOVE_ONE
        if self._name == "rdp":
            accountant = self._engine.RdpAccountant(neighboring_relation=neighbours)
        else:
            accountant = self._engine.PLDAccountant(neighbours)
        for record in mechanisms:
            accountant.compose(self._event(record), record["count"])
        return accountant

    def _event(self, record: Record) -> Any:
        theirs = self._module
        match record["mech"]:
            case "gaussian":
                return theirs.GaussianDpEvent(record["sigma"])
            case "poisson_gaussian":
                return theirs.PoissonSampledDpEvent(record["q"], theirs.GaussianDpEvent(record["sigma"]))
            case "laplace":
                return theirs.LaplaceDpEvent(record["b"])
            case "poisson_laplace" if self._name == "pld":
                return theirs.PoissonSampledDpEvent(record["q"], theirs.LaplaceDpEvent(record["b"]))
            case "wor_gaussian" if self._name == "rdp":
                gaussian = theirs.GaussianDpEvent(record["sigma"])  # this engine's is over the move of a replacement
                return theirs.SampledWithoutReplacementDpEvent(record["n"], record["batch"], gaussian)
        raise NotImplementedError(f"no event for {record['mech']}")


class _PrvAccountant(Engine):
    """prv_accountant with the defaults of its command line: eps_error 0.1, delta_error delta / 1000."""

    package = "prv_accountant"
    EPSILON_ERROR = 0.1

    def __init__(self, name: str) -> None:
        assert name == "prv"
        self._module: Any = importlib.import_module("prv_accountant")
        self._dpsgd: Any = importlib.import_module("prv_accountant.dpsgd")

    def epsilon(self, mechanisms: Sequence[Record], delta: float, relation: str) -> Bounds:
        counts = [record["count"] for record in mechanisms]
        engine = self._engine(mechanisms, delta / 1000)
        lower, _, upper = engine.compute_epsilon(delta=delta, num_self_compositions=counts)
        return lower, upper

    def delta(self, mechanisms: Sequence[Record], epsilon: float) -> Bounds:
        counts = [record["count"] for record in mechanisms]
        lower, _, upper = self._engine(mechanisms, 1e-8).compute_delta(epsilon=epsilon, num_self_compositions=counts)
        return lower, upper

    def noise_multiplier(self, *, epsilon: float, delta: float, q: float, steps: int) -> Bounds:
        return None, self._dpsgd.find_noise_multiplier(
            sampling_probability=q, num_steps=steps, target_epsilon=epsilon, target_delta=delta
        )

    def curve(self, *, sigma: float, q: float, steps: Sequence[int], delta: float) -> Bounds:
        """With one object for all, as its documentation advises."""
        record = {"mech": "poisson_gaussian", "q": q, "sigma": sigma, "count": max(steps)}
        engine = self._engine([record], delta / 1000)
        points = [engine.compute_epsilon(delta=delta, num_self_compositions=[count]) for count in steps]
        return points[-1][0], points[-1][2]

    def _engine(self, mechanisms: Sequence[Record], delta_error: float) -> Any:
        counts = [record["count"] for record in mechanisms]
        return self._module.PRVAccountant(
            prvs=[self._mechanism(record) for record in mechanisms],
            max_self_compositions=counts,
            eps_error=self.EPSILON_ERROR,
            delta_error=delta_error,
        )

    def _mechanism(self, record: Record) -> Any:
        match record["mech"]:
            case "gaussian":
                return self._module.GaussianMechanism(record["sigma"])
            case "poisson_gaussian":
                return self._module.PoissonSubsampledGaussianMechanism(record["q"], record["sigma"])
            case "laplace":
                return self._module.LaplaceMechanism(1 / record["b"])
        raise NotImplementedError(f"no mechanism for {record['mech']}")


class _Autodp(Engine):
    """autodp's Renyi accountant."""

    package = "autodp"

    def __init__(self, name: str) -> None:
        assert name == "rdp"
        self._mechanisms: Any = importlib.import_module("autodp.mechanism_zoo")
        self._transformers: Any = importlib.import_module("autodp.transformer_zoo")

    def epsilon(self, mechanisms: Sequence[Record], delta: float, relation: str) -> Bounds:
        return None, self._composed(mechanisms).get_approxDP(delta)

    def delta(self, mechanisms: Sequence[Record], epsilon: float) -> Bounds:
        return None, self._composed(mechanisms).get_approx_delta(epsilon)

    def _composed(self, mechanisms: Sequence[Record]) -> Any:
        counts = [record["count"] for record in mechanisms]
        return self._transformers.Composition()([self._mechanism(record) for record in mechanisms], counts)

    def _mechanism(self, record: Record) -> Any:
        _only(record, "gaussian", "poisson_gaussian", "laplace")
        if record["mech"] == "laplace":
            return self._mechanisms.LaplaceMechanism(record["b"])
        gaussian = self._mechanisms.GaussianMechanism(record["sigma"])
        if record["mech"] == "gaussian":
            return gaussian
        gaussian.neighboring = "add_remove"
        return self._transformers.AmplificationBySampling()(gaussian, record["q"], improved_bound_flag=True)


def _only(record: Record, *known: str) -> None:
    if record["mech"] not in known:
        raise NotImplementedError(f"no event for {record['mech']}")


ENGINES: dict[str, tuple[type[Engine], str]] = {
    "accountants PRV": (_Accountants, "prv"),
    "accountants RDP": (_Accountants, "rdp"),
    "dp_accounting PLD": (_DpAccounting, "pld"),
    "dp_accounting RDP": (_DpAccounting, "rdp"),
    "opacus PRV": (_Opacus, "prv"),
    "opacus RDP": (_Opacus, "rdp"),
    "prv_accountant": (_PrvAccountant, "prv"),
    "autodp RDP": (_Autodp, "rdp"),
}


def make_engine(name: str) -> Engine:
    """The engine of that name; imports its package."""
    kind, variant = ENGINES[name]
    return kind(variant)


def plain(value: Any) -> Any:
    """Numbers as Python's own."""
    return value.item() if isinstance(value, np.generic) else value
