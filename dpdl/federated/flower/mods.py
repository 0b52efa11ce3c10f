"""Two mods for any `ClientApp`: one lists what a reply releases, one clips updates without Flower's mistakes.

A mod of Flower's stands around a training function and sees its reply before it leaves.

- `release_inventory` is for every app, with whatever library it trains: counts, losses, metrics and buffers in a reply
  are releases like the weights are, and are easily overlooked.
- `update_clipping` takes the place of `fixedclipping_mod` in an app that stays with Flower's own strategies.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Literal

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp.typing import ClientAppCallable, Mod
from flwr.common.constant import ErrorCode

from accountants import arguments
from dpdl.errors import ParameterError
from dpdl.federated.flower.records import METRICS, RELEASES, REPLY, UPDATE, inventory_from_record, record_from_inventory
from dpdl.federated.inventory import UNPROTECTED, Inventory, Release

__all__ = ["inventory_of", "release_inventory", "update_clipping"]

_LOG = logging.getLogger("dpdl.federated.flower")
_CLIPPING_NORM = "clipping_norm"  # Flower's name for it, in the settings its strategies send
_OWN = (UPDATE, REPLY, METRICS, RELEASES)


# ── what leaves ─────────────────────────────────────────────────────────────────────────────────────


def inventory_of(content: RecordDict, *, covered: Mapping[str, str] | None = None) -> Inventory:
    """All that a reply releases, with what covers it.

    Args:
        content: the reply's.
        covered: mechanisms, by the name of what they cover; the name may be a pattern ("arrays/*").

    Returns:
        One release for each array, metric and setting in the reply. What neither the reply's own inventory nor
        `covered` names is UNPROTECTED. Names are "record/entry"; those of dpdl's own replies are bare.

    Raises:
        DataError: the reply's own inventory cannot be read.
    """
    record = content.config_records.get(RELEASES)
    listed = {} if record is None else {_key(release): release for release in inventory_from_record(record)}
    found = []
    for release in _leaving(content):
        mechanism = next((words for name, words in (covered or {}).items() if fnmatchcase(release.name, name)), None)
        if mechanism is not None:
            release = Release(name=release.name, kind=release.kind, mechanism=mechanism, shape=release.shape)
        found.append(listed.get(_key(release), release))
    return Inventory(tuple(found))


def _key(release: Release) -> tuple[str, bool]:
    """A tensor may have the name of a number: a linear layer's weight, and that of the client in the mean."""
    return release.name, release.kind in ("parameter", "buffer")


def _leaving(content: RecordDict) -> Iterator[Release]:
    for name, arrays in content.array_records.items():
        for key, array in arrays.items():
            yield _release(key if name == UPDATE else f"{name}/{key}", "parameter", tuple(array.shape))
    for name, metrics in content.metric_records.items():
        for key in metrics:
            yield _release(f"{name}/{key}", "count" if "num" in key else "metric")
    for name, settings in content.config_records.items():
        if name not in _OWN:
            yield from (_release(f"{name}/{key}", "metric") for key in settings)
    yield from (_release(key, "metric") for key in content.config_records.get(METRICS, ()))
    if REPLY in content.config_records and content.config_records[REPLY].get("weight") != 1.0:
        yield _release("weight", "count")


def _release(name: str, kind: str, shape: tuple[int, ...] = ()) -> Release:
    return Release(name=name, kind=kind, mechanism=UNPROTECTED, shape=shape)


def release_inventory(
    *, on_unprotected: Literal["list", "refuse"] = "list", covered: Mapping[str, str] | None = None
) -> Mod:
    """A mod that lists what each reply releases, and, if asked to, stops what nothing covers.

    Args:
        on_unprotected: "list" logs it on the node, and sends the inventory along; "refuse" sends an error instead.
        covered: mechanisms by name of what they cover, for apps that do not say so themselves.

    Guarantee:
        None by itself: it says what leaves, as the app or `covered` claims it.

    Raises:
        ParameterError: `on_unprotected` is something else.
    """
    if on_unprotected not in ("list", "refuse"):
        raise ParameterError(f"on_unprotected must be 'list' or 'refuse', got {on_unprotected!r}.")

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        inventory = inventory_of(reply.content, covered=covered)
        names = ", ".join(release.name for release in inventory.unprotected)
        if names and on_unprotected == "refuse":
            why = f"the reply would release, with no mechanism to cover it: {names}"
            _LOG.error("%s", why)
            return Message(Error(code=ErrorCode.MOD_FAILED_PRECONDITION, reason=why), reply_to=message)
        if names:
            _LOG.warning("leaves %s: %s", UNPROTECTED, names)
        reply.content[RELEASES] = record_from_inventory(inventory)
        return reply

    return mod


# ── clipping ────────────────────────────────────────────────────────────────────────────────────────


def update_clipping(max_update_norm: float | None = None, *, weight_key: str | None = "num-examples") -> Mod:
    """A mod that clips what training changed, for replies that hold weights, as those to Flower's strategies do.

    All floating-point arrays count, those of shape () too. Integer arrays (counters of batch normalisation) go back as
    they came: they are no part of the norm and say nothing of the data. No change is no change; an update that is not
    finite is sent as none.

    Args:
        max_update_norm: the largest L2 norm; None takes the "clipping_norm" that Flower's strategy sends.
        weight_key: the metric that clients are weighted by, which is set to 1; None leaves it. The noise of Flower's
            strategies is right for equal weights only.

    Guarantee:
        The update's L2 norm is at most max_update_norm, up to rounding of the weights in their own type. It says
        nothing of noise: whoever aggregates must add it to every array.

    Raises:
        ParameterError: max_update_norm is not above 0.
    """
    if max_update_norm is not None:
        remedy = "Give a norm such as 1.0."
        if arguments.non_negative("max_update_norm", max_update_norm, remedy=remedy) == 0:
            raise ParameterError(f"max_update_norm must be > 0, got 0. {remedy}")

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        sent = _only_arrays(message.content)
        bound = max_update_norm
        if bound is None:
            given = [settings.get(_CLIPPING_NORM) for settings in message.content.config_records.values()]
            bound = next((value for value in given if isinstance(value, float) and value > 0), None)
        before = None if sent is None else {name: array.numpy() for name, array in sent[1].items()}
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        held = _only_arrays(reply.content)
        if bound is None or before is None or held is None or before.keys() != held[1].keys():
            why = (
                f"update_clipping needs a norm (got {bound}), and one ArrayRecord with the same names in request and "
                "reply"
            )
            return Message(Error(code=ErrorCode.MOD_FAILED_PRECONDITION, reason=why), reply_to=message)
        after = {name: array.numpy() for name, array in held[1].items()}
        clipped = _clipped(before, after, bound)
        reply.content[held[0]] = ArrayRecord({name: Array(values) for name, values in clipped.items()})
        for metrics in reply.content.metric_records.values():
            _equal_weight(metrics, weight_key)
        return reply

    return mod


def _only_arrays(content: RecordDict) -> tuple[str, ArrayRecord] | None:
    records = list(content.array_records.items())
    return records[0] if len(records) == 1 else None


def _equal_weight(metrics: MetricRecord, key: str | None) -> None:
    if key is not None and key in metrics:
        metrics[key] = 1


def _clipped(before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray], bound: float) -> dict[str, np.ndarray]:
    """Weights of which the update has at most that norm; what is not floating-point as it was before."""
    moved = {
        name: after[name].astype(np.float64) - old.astype(np.float64)
        for name, old in before.items()
        if np.issubdtype(old.dtype, np.floating)
    }
    norm = math.sqrt(sum(float(np.sum(change * change)) for change in moved.values()))
    if not math.isfinite(norm):
        return dict(before)
    factor = min(1.0, bound / norm) if norm > 0 else 1.0
    return {
        name: np.asarray(old + factor * moved[name], dtype=old.dtype) if name in moved else old
        for name, old in before.items()
    }
