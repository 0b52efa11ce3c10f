"""How the part of a network changes while its rows are released: the state that leaks, or does not.

    PartTraining.frozen()                         # its weights know nothing of the private rows
    PartTraining.private(noise_multiplier=2.0)    # DP-SGD
    PartTraining.unprotected()                    # plain training: no claim about rows survives it

A row released at step t + 1 was computed with weights that all rows of steps 1 to t have moved. Unless they moved them
by noisy steps, the row noise of one example does not hide it in the rows of the others.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field

from accountants import Event, Gaussian, arguments
from dpdl.errors import ParameterError
from dpdl.split.clip import TOLERANCE, Clip, PartClip
from dpdl.split.graph import SplitGraph

__all__ = ["PartTraining"]


@dataclass(frozen=True, kw_only=True)
class PartTraining:
    """How the weights before a release come to change.

    Attributes:
        trained: whether they change with the private rows.
        noise_multiplier: of a trained part's steps: noise std over *the part's own* clipping norm, the least over what
            one example moves. With several parts of a party clipped to C_h each under noise std sigma C, that is
            sigma C / sqrt(sum of C_h^2). 0: no noise.
        checked: whether a run has compared it with its own graph, clip and plan (`ReleaseDoor.bind`).

    Guarantee:
        None: it is what a party says of a run, and what a claim on its releases rests on. `ReleaseDoor.bind` holds the
        two together.

    Raises:
        ParameterError: a frozen part with noise; a multiplier out of range.
    """

    trained: bool
    noise_multiplier: float = 0.0
    checked: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise_multiplier", arguments.noise_scale("noise_multiplier", self.noise_multiplier))
        if not self.trained and self.noise_multiplier:
            raise ParameterError(
                f"A frozen part takes no noisy steps, got noise_multiplier={self.noise_multiplier!r}. Leave it out."
            )

    @classmethod
    def frozen(cls) -> PartTraining:
        """Weights that stay, and were not trained on the private rows before either."""
        return cls(trained=False)

    @classmethod
    def private(cls, *, noise_multiplier: float) -> PartTraining:
        """Weights that take noisy steps, of this noise_multiplier, on clipped gradients."""
        return cls(trained=True, noise_multiplier=noise_multiplier)

    @classmethod
    def unprotected(cls) -> PartTraining:
        """Weights that take plain steps."""
        return cls(trained=True)

    @classmethod
    def of(cls, graph: SplitGraph, *parties: str, clip: Clip, noise_multiplier: float) -> PartTraining:
        """How some parties' parts change in a run.

        Args:
            graph: the network.
            parties: all that have parts between the records and what is released. Parts that do not train must not have
                been trained on the private rows before either.
            clip: of the run.
            noise_multiplier: of the run's plan: noise std over the whole network's clipping norm.

        Returns:
            Frozen, or trained with noise over what one example moves of these parts together.

        Raises:
            ParameterError: no such party.
        """
        if unknown := sorted(set(parties) - set(graph.parties)) or not parties:
            raise ParameterError(f"parties must be some of {list(graph.parties)}, got {unknown or 'none'}.")
        parts = [part.name for part in graph.parts if part.party in parties]
        return cls.of_parts(graph, parts, clip=clip, noise_multiplier=noise_multiplier)

    @classmethod
    def of_parts(
        cls, graph: SplitGraph, parts: Collection[str], *, clip: Clip, noise_multiplier: float
    ) -> PartTraining:
        """How these parts change in a run, as `of` has it.

        Args:
            graph: the network.
            parts: the names of its parts in question.
            clip: how their gradients are clipped.
            noise_multiplier: the plan's, of all trained parts together; 0 for none.
        """
        own = [part.name for part in graph.trained if part.name in parts]
        if not own:
            return cls.frozen()
        total = clip.total(graph)
        share = math.hypot(*(clip.of(name) for name in own)) if isinstance(clip, PartClip) else total
        return cls(trained=True, noise_multiplier=noise_multiplier * total / share)

    def covers(self, real: PartTraining) -> bool:
        """Whether what was said is no better than what really happens, `real`."""
        if not (self.trained and real.trained):
            return self.trained or not real.trained
        return self.noise_multiplier <= real.noise_multiplier * (1 + TOLERANCE)

    @property
    def event(self) -> Event | None:
        """What one step that an example takes part in gives away of it, under REPLACE_ONE; None if there is no step.

        No amplification by sampling: who receives the rows sees which examples take part. Replacing an example moves
        the part's clipped sum by two norms, which the relation brings in.
        """
        return Gaussian(self.noise_multiplier) if self.trained else None

    def __str__(self) -> str:
        if not self.trained:
            return "frozen and public"
        return (
            f"trained with noise of {self.noise_multiplier:g} times its norm"
            if self.noise_multiplier
            else ("trained without noise")
        )
