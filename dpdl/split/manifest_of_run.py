"""The manifest that a run's own plan, graph and mechanisms make: what is signed is what is done.

    terms = manifest_of(graph, plan, topology="vanilla", rows={"bottom": z, "y": y}, door=door, deltas={"server": 1e-5})

All parties make it from the same objects, so a mechanism that one of them lacks is a difference that `agree` names.

Public: everything in it.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dpdl.errors import ManifestError
from dpdl.plan import PrivacyPlan
from dpdl.split.clip import Clip, PartClip, clip_for
from dpdl.split.cut_release import CutRelease
from dpdl.split.door import ReleaseDoor
from dpdl.split.gradient_release import GradientRelease
from dpdl.split.graph import SplitGraph
from dpdl.split.labels import MemoizedRandomizedResponse
from dpdl.split.manifest import CutTerms, LabelTerms, Manifest, ReleaseTerms

__all__ = ["manifest_of"]


def manifest_of(
    graph: SplitGraph,
    plan: PrivacyPlan,
    *,
    topology: str,
    rows: Mapping[str, Tensor],
    deltas: Mapping[str, float],
    clip: Clip | None = None,
    door: ReleaseDoor | None = None,
    activations: CutRelease | None = None,
    labels: MemoizedRandomizedResponse | None = None,
    gradients: GradientRelease | None = None,
    weight_sync: str = "none",
) -> Manifest:
    """The terms of a run.

    Args:
        graph: the network.
        plan: what all parties are held to.
        topology: what to call it.
        rows: some rows, made up, of each part's output and each column of labels that crosses: for shapes and dtypes.
        deltas: adversary to delta.
        clip: of the run; by default as the parties'.
        door: of the party that releases; the mechanisms are then its own.
        activations, labels, gradients: in place of `door`, where that is another party's: its mechanisms, None where it
            has none.
        weight_sync: how clients pass on weights.

    Raises:
        ManifestError: rows of something that crosses are missing, the plan's batch size is not whole, or mechanisms are
            given twice.
        ParameterError: the clip is not the plan's.
    """
    if door is not None:
        if (activations, labels, gradients) != (None, None, None):
            raise ManifestError("Give either the door or its mechanisms: the door's are the ones that are used.")
        activations, labels, gradients = door.activations, door.labels, door.gradients
    if missing := sorted({cut.name for cut in graph.cuts} - set(rows)):
        raise ManifestError(f"rows of the manifest lack {missing}, which cross a cut. Give made-up rows of each.")
    if plan.expected_batch_size != int(plan.expected_batch_size):
        raise ManifestError(f"expected_batch_size of the plan must be whole, got {plan.expected_batch_size!r}.")
    chosen = clip_for(graph, plan, clip)
    clips = {
        part.name: chosen.of(part.name) if isinstance(chosen, PartClip) else chosen.total(graph)
        for part in graph.trained
    }
    return Manifest(
        topology=topology,
        parties=graph.parties,
        cuts=tuple(
            CutTerms(
                name=cut.name,
                sender=cut.sender,
                receiver=cut.receiver,
                shape=tuple(rows[cut.name].shape[1:]),
                dtype=str(rows[cut.name].dtype).removeprefix("torch."),
            )
            for cut in graph.cuts
        ),
        sampling=plan.sampling,
        sample_rate=plan.sample_rate,
        expected_batch_size=int(plan.expected_batch_size),
        clipping="part" if isinstance(chosen, PartClip) else "joint",
        clips=clips,
        noise_multiplier=plan.noise_multiplier,
        max_steps=plan.steps,
        deltas=deltas,
        cut_release=None if activations is None else _terms(activations, activations.mode),
        labels=None
        if labels is None
        else LabelTerms(mechanism="memoized_randomized_response", epsilon=labels.epsilon, classes=labels.classes),
        gradient_release=None if gradients is None else _terms(gradients, "per_step"),
        weight_sync=weight_sync,
    )


def _terms(release: CutRelease | GradientRelease, mode: str) -> ReleaseTerms:
    return ReleaseTerms(mode=mode, max_norm=release.max_norm, noise_multiplier=release.noise_multiplier)
