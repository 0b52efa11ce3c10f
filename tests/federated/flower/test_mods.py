"""The two mods: everything in a reply is listed; updates are clipped whatever they are made of."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr")

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from dpdl.errors import ParameterError
from dpdl.federated.flower import client_app, inventory_of, ledger_path, partition, release_inventory, update_clipping
from dpdl.federated.flower.records import inventory_from_record, record_from_reply
from dpdl.federated.flower.strategy import DPStrategy
from dpdl.federated.inventory import UNPROTECTED, Inventory, Release
from dpdl.federated.messages import FitReply
from tests.federated.flower.grid import OneProcess, arrays_of, context, travelled
from tests.federated.flower.task import make_client, model, server

SENT = {"weight": np.zeros((2, 2), np.float32), "scale": np.float32(1.0), "steps": np.int64(5)}


def arrays(values: dict[str, Any]) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(value)) for name, value in values.items()})


def answer(mod: Any, trained: dict[str, Any], *, sent: dict[str, Any] = SENT, config: Any = None) -> Message:
    """What leaves a foreign app that sends weights, a count and a loss."""
    app = ClientApp(mods=[mod])

    @app.train()
    def train(message: Message, node: Context) -> Message:
        metrics = MetricRecord({"num-examples": 123, "loss": 0.5})
        content = RecordDict({"arrays": arrays(trained), "metrics": metrics, "more": ConfigRecord({"mean": 1.5})})
        return Message(content, reply_to=message)

    content = RecordDict({"arrays": arrays(sent), "config": ConfigRecord(config or {})})
    return travelled(app(Message(content=content, dst_node_id=2, message_type="train"), context()))


def test_everything_in_a_foreign_reply_is_listed_as_unprotected(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="dpdl.federated.flower"):
        reply = answer(release_inventory(), SENT)
    listed = inventory_from_record(reply.content.config_records["dpdl.releases"])
    assert [(r.name, r.kind, r.mechanism) for r in listed] == [
        ("arrays/weight", "parameter", UNPROTECTED),
        ("arrays/scale", "parameter", UNPROTECTED),
        ("arrays/steps", "parameter", UNPROTECTED),
        ("metrics/num-examples", "count", UNPROTECTED),
        ("metrics/loss", "metric", UNPROTECTED),
        ("more/mean", "metric", UNPROTECTED),
    ]
    assert "leaves UNPROTECTED: arrays/weight, arrays/scale" in caplog.text
    assert reply.content.metric_records["metrics"]["loss"] == 0.5  # the reply itself is as it was


def test_what_is_declared_is_covered_and_the_rest_is_refused() -> None:
    covered = {"arrays/*": "Opacus, noise 1.0", "metrics/num-*": "rounded to thousands"}
    reply = answer(release_inventory(on_unprotected="refuse", covered=covered), SENT)
    assert reply.error.code == ErrorCode.MOD_FAILED_PRECONDITION
    assert reply.error.reason is not None
    assert "with no mechanism to cover it: metrics/loss, more/mean" in reply.error.reason
    everything = {"*": "a mechanism"}
    reply = answer(release_inventory(on_unprotected="refuse", covered=everything), SENT)
    listed = inventory_from_record(reply.content.config_records["dpdl.releases"])
    assert {release.mechanism for release in listed} == {"a mechanism"}


def test_our_own_replies_pass_unless_they_hold_what_nothing_covers(tmp_path: Path) -> None:
    def outcome(**more: Any) -> tuple[dict[str, str], str]:
        app = client_app(
            lambda node: make_client(*partition(node), ledger=ledger_path(node), **more),
            mods=[release_inventory(on_unprotected="refuse")],
        )
        strategy = DPStrategy(server(), clients=1)
        folder = tmp_path / str(len(more))
        folder.mkdir()
        grid = OneProcess(app, [context(0, 1, ledger=str(folder / "a.ledger"))])
        strategy.start(grid, num_rounds=1)
        return dict(strategy.summaries[0].private.outcomes), str(strategy.summaries[0])

    assert outcome()[0] == {"client-0": "accepted"}
    assert outcome(metrics=("loss",))[0] == {"client-0": "failed"}


def test_what_a_reply_does_not_list_is_unprotected_whatever_it_says() -> None:
    parameters = dict(model().state_dict())
    listed = Inventory((Release(name="weight", kind="parameter", mechanism="DP-SGD", shape=(2, 4)),))
    reply = FitReply(client="a", round=1, update=parameters, releases=listed, weight=2.0, metrics={"n": 3})
    found = inventory_of(record_from_reply(reply))
    assert [(r.name, r.protected) for r in found] == [
        ("weight", True),
        ("bias", False),
        ("n", False),
        ("weight", False),
    ]


def test_an_error_goes_on_as_it_is() -> None:
    def fails(message: Message, node: Context, call_next: Any) -> Message:
        from flwr.app import Error

        return Message(Error(7, "no"), reply_to=message)

    for mod in (release_inventory(on_unprotected="refuse"), update_clipping(1.0)):
        message = Message(content=RecordDict({"arrays": arrays(SENT)}), dst_node_id=2, message_type="train")
        assert mod(message, context(), lambda m, c: fails(m, c, None)).error.code == 7


def test_an_update_is_clipped_over_all_floating_point_arrays() -> None:
    trained = {"weight": np.full((2, 2), 3.0, np.float32), "scale": np.float32(9.0), "steps": np.int64(45)}
    left = arrays_of(answer(update_clipping(0.5), trained).content)
    change = np.concatenate([(left["weight"] - 0.0).ravel(), [left["scale"] - 1.0]])
    assert np.linalg.norm(change) == pytest.approx(0.5, rel=1e-6)
    assert np.allclose(change / np.linalg.norm(change), np.array([3, 3, 3, 3, 8]) / 10)
    assert left["steps"] == 5
    assert {name: values.dtype for name, values in left.items()} == {
        "weight": np.float32,
        "scale": np.float32,
        "steps": np.int64,
    }


def test_a_small_update_is_left_alone_to_the_last_bit() -> None:
    trained = SENT | {"weight": np.full((2, 2), 0.1, np.float32)}
    left = arrays_of(answer(update_clipping(0.5), trained).content)
    assert np.array_equal(left["weight"], trained["weight"])


def test_the_norm_may_be_the_servers_and_weights_become_equal() -> None:
    trained = SENT | {"weight": np.full((2, 2), 3.0, np.float32)}
    reply = answer(update_clipping(), trained, config={"clipping_norm": 2.0})
    assert np.linalg.norm(arrays_of(reply.content)["weight"]) == pytest.approx(2.0)
    assert reply.content.metric_records["metrics"]["num-examples"] == 1
    kept = answer(update_clipping(2.0, weight_key=None), trained)
    assert kept.content.metric_records["metrics"]["num-examples"] == 123


@pytest.mark.parametrize(
    ("config", "trained"),
    [({}, SENT), ({"clipping_norm": -1.0}, SENT), ({"clipping_norm": 1.0}, {"weight": np.zeros((2, 2))})],
    ids=["no norm", "a negative norm", "other names"],
)
def test_what_cannot_be_clipped_does_not_leave(config: dict[str, float], trained: dict[str, Any]) -> None:
    reply = answer(update_clipping(), trained, config=config)
    assert reply.error.code == ErrorCode.MOD_FAILED_PRECONDITION


def test_arguments_out_of_range_are_refused() -> None:
    with pytest.raises(ParameterError, match="max_update_norm"):
        update_clipping(0.0)
    with pytest.raises(ParameterError, match="on_unprotected"):
        release_inventory(on_unprotected="warn")  # type: ignore[arg-type]
