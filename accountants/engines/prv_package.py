"""Microsoft's `prv_accountant` as a second engine: an independent check on ours, within what it can be trusted with.

It discretises the privacy loss of removing one unit (never of adding one) and composes by Fourier transforms in
extended precision. Only its Poisson-sampled Gaussian is used, at rate 1 for a Gaussian without sampling: version
0.2.0's own Gaussian works in double precision and its `PureDPMechanism` and `ApproximateDPMechanism` return bounds
below the truth. Its `eps_max` option gives up the bound on wrap-around, and its estimate may be off by its whole
error, so neither is used.

What it cannot do, and is refused by name: other noise than Gaussian, other sampling than Poisson, delta below 1e-10,
noise multipliers outside [0.1, 1000], meshes of more than 2^22 points (many steps at a high rate), meshes that its
long double rounds by more than its error (it expects 80 bits), and whatever it itself gives up on. The default engine
answers all of these.

Example:
    >>> from accountants.events import Gaussian, PoissonSampled
    >>> from accountants.reduction.normal_form import normal_form
    >>> from accountants.relation import NeighboringRelation
    >>> event = PoissonSampled(0.01, Gaussian(1.0)) * 1000
    >>> low, high = epsilon_interval(normal_form(event, NeighboringRelation.ADD_OR_REMOVE), 1e-5)
    >>> low < 1.8282 < high < low + 0.11
    True

References:
    [1] Gopi, Lee, Wutschitz, Numerical Composition of Differential Privacy, 2021. arXiv:2106.02848
"""

from __future__ import annotations

import functools
import importlib
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np

from accountants.components.sampled_noise import SampledNoise
from accountants.errors import PrivacyError, UnsupportedEventError
from accountants.interval import Interval
from accountants.reduction.normal_form import NormalForm

EPSILON_ERROR = 0.05  # half the width of the interval; time grows as its inverse
DELTA_ERROR = 1e-3  # of delta, the package's own default on its command line
LEAST_DELTA = 1e-10  # below it, rounding of 80-bit transforms is no longer negligible
LEAST_NOISE, MOST_NOISE = 0.1, 1000.0  # outside, its Renyi series overflow or do not end
MOST_POINTS = 2**22  # about 1 GB and 15 s

_REMEDY = "Use the default engine."


def epsilon_interval(form: NormalForm, delta: float) -> Interval:
    """Bounds on epsilon at `delta`, about 0.1 apart.

    Args:
        form: what to bound; not unbounded, not empty.
        delta: in (0, 1).

    Returns:
        Interval(lower, upper), lower >= 0.

    Guarantee:
        As far as the package's arithmetic is right, lower is below the tight epsilon, and upper above the epsilon of
        removing a unit. That adding one costs no more is a theorem for un-sampled noise and for one step, and no
        counterexample is known for more; but there it is not proved, so quote the default engine, which bounds both.

    Raises:
        UnsupportedEventError: one of the package's limits, or a failure of its own, whose text is quoted.
        PrivacyError: the package is not installed.
    """
    if delta < LEAST_DELTA:
        raise UnsupportedEventError(
            f"engine 'prv-accountant' is not reliable below delta {LEAST_DELTA:g}, got {delta!r}. {_REMEDY}"
        )
    counts = [count for _, count in form.counts]
    with _failures_named():
        engine = _engine(form, delta * DELTA_ERROR)
        lower, _, upper = engine.compute_epsilon(delta=delta, num_self_compositions=counts)
    return _checked(lower, upper)


def delta_interval(form: NormalForm, epsilon: float) -> Interval:
    """Bounds on delta at `epsilon`; arguments, guarantee and refusals as in `epsilon_interval`.

    Its absolute error is 1e-10 on top of an error of 0.05 in epsilon.
    """
    counts = [count for _, count in form.counts]
    with _failures_named():
        engine = _engine(form, LEAST_DELTA)
        lower, _, upper = engine.compute_delta(epsilon=epsilon, num_self_compositions=counts)
    return _checked(lower, min(upper, 1.0))


def _engine(form: NormalForm, delta_error: float) -> Any:
    """The package's accountant for `form`, after predicting that it is within its limits."""
    package = _package()
    mechanisms = []
    for component, _ in form.counts:
        if not isinstance(component, SampledNoise) or component.noise != "gaussian":
            raise UnsupportedEventError(
                f"engine 'prv-accountant' knows Gaussian noise, alone or Poisson-sampled; got {component!r}. {_REMEDY}"
            )
        if not LEAST_NOISE <= component.scale <= MOST_NOISE:
            raise UnsupportedEventError(
                f"engine 'prv-accountant' takes noise between {LEAST_NOISE:g} and {MOST_NOISE:g} times the "
                f"sensitivity, got {component.scale!r}. {_REMEDY}"
            )
        mechanism = package.PoissonSubsampledGaussianMechanism(
            sampling_probability=component.rate, noise_multiplier=component.scale
        )
        mechanism.rdp = functools.cache(mechanism.rdp)  # asked for the same orders four times
        mechanisms.append(mechanism)
    counts = [count for _, count in form.counts]
    reach = package.accountant.compute_safe_domain_size(mechanisms, counts, EPSILON_ERROR, delta_error)
    points = 2 * reach * math.sqrt(sum(counts) / 2 * math.log(12 / delta_error)) / EPSILON_ERROR  # [1, Theorem 5.5]
    if not points <= MOST_POINTS:
        raise UnsupportedEventError(
            f"engine 'prv-accountant' would need a mesh of {points:.2g} points for {sum(counts)} steps, more than "
            f"{MOST_POINTS}. {_REMEDY}"
        )
    precision = float(np.finfo(np.longdouble).eps)
    if precision * points > delta_error:
        raise UnsupportedEventError(
            f"engine 'prv-accountant' would round by {precision * points:.2g} in delta, more than its error of "
            f"{delta_error:.2g}: this machine's long double has a precision of {precision:.2g}. {_REMEDY}"
        )
    return package.PRVAccountant(
        prvs=mechanisms, max_self_compositions=counts, eps_error=EPSILON_ERROR, delta_error=delta_error
    )


def _package() -> ModuleType:
    try:
        return importlib.import_module("prv_accountant")
    except ImportError:
        raise PrivacyError(
            "engine 'prv-accountant' needs the package of that name: pip install prv-accountant. The default engine "
            "needs nothing more."
        ) from None


@contextmanager
def _failures_named() -> Iterator[None]:
    """Turn the package's own failures into ours, and silence overflows that it handles.

    Doubts of the quadrature behind its means are failures too: an error there shifts the loss of every step.
    """
    with warnings.catch_warnings(), np.errstate(over="ignore", under="ignore", divide="ignore"):
        warnings.filterwarnings("error", category=UserWarning, module=r"scipy\.integrate|prv_accountant")
        try:
            yield
        except (RuntimeError, ValueError, ArithmeticError, LookupError, AssertionError, UserWarning) as failure:
            text = str(failure) or type(failure).__name__
            raise UnsupportedEventError(f"engine 'prv-accountant' gave up: {text.rstrip('.')}. {_REMEDY}") from failure


def _checked(lower: float, upper: float) -> Interval:
    if not lower <= upper:
        raise UnsupportedEventError(f"engine 'prv-accountant' returned [{lower!r}, {upper!r}]. {_REMEDY}")
    return Interval(max(0.0, float(lower)), float(upper))
