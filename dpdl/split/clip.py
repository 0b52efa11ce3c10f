"""How the gradient of one row is bounded when its pieces are with different parties.

    PartClip(max_grad_norm={"bottom": 0.3, "top": 0.95})       # nothing is exchanged
    JointClip(max_grad_norm=1.0)                                # the parties tell each other the rows' norms

Row i's gradient of the whole network is the pieces g_i^h of its parts h, end to end. With part clipping each piece
is brought to norm C_h, so the whole has norm at most C = sqrt(sum_h C_h^2); every party adds noise of standard
deviation sigma * C to its own coordinates, and all of them together are one Gaussian mechanism of noise multiplier
sigma. With joint clipping the whole is brought to norm C, which needs ||g_i||^2 = sum_h ||g_i^h||^2: each party tells
its share, and is told the row's weight. Those are un-noised functions of single rows. Against the parties that see
them there is no guarantee; consumers of the trained model are promised the same as with part clipping.

References:
    Abadi et al., Deep Learning with Differential Privacy, CCS 2016. arXiv:1607.00133, section 3.1 (per-layer norms).
    He et al., Exploring the Limits of Differentially Private Deep Learning with Group-wise Clipping, ICLR 2023.
    arXiv:2212.01539 (clipping per device).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from accountants import arguments
from dpdl.errors import ParameterError
from dpdl.plan import PrivacyPlan
from dpdl.split.graph import SplitGraph

__all__ = ["Clip", "JointClip", "PartClip", "clip_for"]

# The total is a root of squares: its last digits are not the user's.
TOLERANCE = 1e-9


@dataclass(frozen=True, kw_only=True)
class PartClip:
    """Each part on its own; nothing of single rows is exchanged.

    Attributes:
        max_grad_norm: C_h > 0, an L2 norm over all of a part's trained parameters; the same for all parts that train,
            or one for each by name.

    Guarantee:
        One row moves all parts' sums together by at most C = sqrt(sum of C_h^2), which noise is scaled to.

    Raises:
        ParameterError: a norm is no number.

    Source:
        arXiv:1607.00133, section 3.1; arXiv:2212.01539 (clipping per device).
    """

    max_grad_norm: float | Mapping[str, float]

    def __post_init__(self) -> None:
        given = self.max_grad_norm
        # A copy that nobody can change: the noise is scaled to these norms once, and they are clipped to ever after.
        norms = (
            MappingProxyType({name: _norm(f"max_grad_norm of part '{name}'", norm) for name, norm in given.items()})
            if isinstance(given, Mapping)
            else _norm("max_grad_norm of PartClip", given)
        )
        object.__setattr__(self, "max_grad_norm", norms)

    @classmethod
    def equal(cls, total: float, graph: SplitGraph) -> PartClip:
        """The same C_h for every part that trains, C / sqrt(parts), so that together they are C = `total`.

        Args:
            total: C > 0.
            graph: whose parts.
        """
        return cls(max_grad_norm=total / math.sqrt(len(graph.trained)))

    def of(self, part: str) -> float:
        """C_h of a part."""
        return self.max_grad_norm[part] if isinstance(self.max_grad_norm, Mapping) else self.max_grad_norm

    def total(self, graph: SplitGraph) -> float:
        """C, the most that one row moves the sums of all parts of a graph together.

        Raises:
            ParameterError: a norm is missing, for no part that trains, or not positive.
        """
        trained = [part.name for part in graph.trained]
        if isinstance(self.max_grad_norm, Mapping) and set(self.max_grad_norm) != set(trained):
            raise ParameterError(
                f"max_grad_norm of PartClip is for parts {sorted(self.max_grad_norm)}, but {sorted(trained)} train. "
                "Give one for each of these."
            )
        for name in trained:
            if not self.of(name) > 0:
                raise ParameterError(f"max_grad_norm of part '{name}' must be > 0, got {self.of(name)!r}.")
        return math.sqrt(sum(self.of(name) ** 2 for name in trained))


@dataclass(frozen=True, kw_only=True)
class JointClip:
    """All parts together, as on one machine; the norms of single rows are exchanged, without noise.

    Attributes:
        max_grad_norm: C > 0, an L2 norm over all parts' trained parameters.

    Guarantee:
        As `PartClip` against who gets the trained network. Against parties that see the norms: none, whatever else
        protects the rows.

    Raises:
        ParameterError: the norm is no number.

    Source:
        arXiv:1607.00133, algorithm 1.
    """

    max_grad_norm: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_grad_norm", _norm("max_grad_norm of JointClip", self.max_grad_norm))

    def total(self, graph: SplitGraph) -> float:
        """C, the same for any graph.

        Raises:
            ParameterError: it is not positive.
        """
        if not self.max_grad_norm > 0:
            raise ParameterError(f"max_grad_norm of JointClip must be > 0, got {self.max_grad_norm!r}.")
        return self.max_grad_norm


Clip = PartClip | JointClip


def _norm(name: str, value: object) -> float:
    return arguments.real(name, value, remedy="Give a number > 0.")


def clip_for(graph: SplitGraph, plan: PrivacyPlan, clip: Clip | None) -> Clip:
    """The clip that was asked for, or C in equal parts, if it is what the plan accounts for.

    Raises:
        ParameterError: the clip's total is not the plan's max_grad_norm.
    """
    chosen = PartClip.equal(plan.max_grad_norm, graph) if clip is None else clip
    if not isinstance(chosen, (PartClip, JointClip)):
        raise ParameterError(f"clip must be a PartClip or a JointClip, got {type(chosen).__name__}.")
    total = chosen.total(graph)
    if not math.isclose(total, plan.max_grad_norm, rel_tol=TOLERANCE):
        raise ParameterError(
            f"The parts' clips make C = {total:.12g}, but the plan's max_grad_norm is {plan.max_grad_norm:.12g}, which "
            "the noise is scaled to. Make the plan with C = sqrt(sum of squares), or use PartClip.equal(C, graph)."
        )
    return chosen
