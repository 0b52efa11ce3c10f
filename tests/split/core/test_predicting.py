"""What cannot be predicted, or trained, is refused in one line before a row crosses a cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dpdl.errors import ChannelError, DataError, ParameterError, PrivacyError
from dpdl.split.channel import Packet
from dpdl.split.session import SplitRun
from tests.split.core.networks import ROWS
from tests.split.core.runs import plan_of
from tests.split.core.test_refusals import data, small


@pytest.mark.parametrize(
    ("asked", "error", "says"),
    [
        ({"columns": 3}, ParameterError, r"columns \['x'\], got int"),
        ({"columns": {"z": torch.ones(2, 4)}}, ParameterError, r"got \['z'\]"),
        ({"columns": {"x": [1.0]}}, ParameterError, "got list"),
        ({"columns": torch.ones(2, 5)}, ParameterError, r"shape \(4,\).*got \(2, 5\)"),
        ({"columns": torch.ones(4)}, ParameterError, r"got \(4,\)"),
        ({"columns": torch.tensor(1.0)}, ParameterError, r"got \(\)"),
        ({"columns": torch.ones(2, 4).double()}, ParameterError, "got .* of torch.float64"),
        ({"rows": [1, 2]}, ParameterError, "got list"),
        ({"rows": torch.tensor(1)}, ParameterError, r"got \(\) of torch.int64"),
        ({"rows": torch.ones(2)}, ParameterError, "torch.float32"),
        ({"rows": torch.tensor([0, ROWS])}, DataError, f"0 to {ROWS - 1}; got 0 to {ROWS}"),
        ({"rows": torch.tensor([-1])}, DataError, "got -1 to -1"),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value)[:20],
)
def test_what_cannot_be_predicted_is_refused_in_one_line_and_nothing_leaves(
    asked: dict[str, Any], error: type[PrivacyError], says: str
) -> None:
    graph, optimizers = small()
    left: list[Any] = []
    run = SplitRun(graph, optimizers, data(), plan_of(noise_multiplier=1.0), release=left.append)  # type: ignore[arg-type]
    with pytest.raises(error, match=says) as raised:
        run.predict(**asked)
    assert "\n" not in str(raised.value)
    assert left == []


def test_a_server_that_has_been_probed_refuses_other_rows_to_predict_too() -> None:
    graph, optimizers = small()
    run = SplitRun(graph, optimizers, data(), plan_of(noise_multiplier=1.0))
    run.step()
    asked = Packet(
        kind="infer",
        header={"session": run.client.session, "step": 9, "client": "client", "sender": "client", "exchanged": -1},
        tensors={"z/bottom": torch.ones(2, 9)},
    )
    with pytest.raises(ChannelError, match=r"rows of shape \(9,\)"):
        run.servers["server"].handle(asked)
    assert run.predict(torch.ones(2, 4))["loss"].shape == (2, 3)


@pytest.mark.parametrize("steps", ["a", 1.5, True])
def test_steps_are_whole_numbers(steps: Any) -> None:
    graph, optimizers = small()
    run = SplitRun(graph, optimizers, data(), plan_of(noise_multiplier=1.0))
    with pytest.raises(ParameterError, match="steps must be a whole number"):
        run.run(steps)
