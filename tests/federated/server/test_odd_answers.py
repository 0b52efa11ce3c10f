"""Answers that no client of ours sends are counted, and never raise out of a round."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpdl.errors import ModelError
from dpdl.federated.messages import FitReply, Refusal
from dpdl.federated.server import FederatedServer
from tests.federated.server.small_federation import names, plan, reply, server, zeros


def low_precision() -> dict[str, Tensor]:
    return {name: tensor.to(torch.float8_e4m3fn) for name, tensor in zeros().items()}


ODD: dict[str, Any] = {
    "float8": lambda: reply("client-0", low_precision()),
    "a list as reason": lambda: Refusal(client="client-0", round=1, reason=["x"]),  # type: ignore[arg-type]
    "a list as name": lambda: reply(["client-0"], zeros()),  # type: ignore[arg-type]
    "a list as name of a refusal": lambda: Refusal(client=["client-0"], round=1, reason="failed"),  # type: ignore[arg-type]
    "no name": lambda: reply(None, zeros()),  # type: ignore[arg-type]
    "tensors as round": lambda: reply("client-0", zeros(), round=torch.ones(3)),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("what", ODD)
@pytest.mark.parametrize("planned", [True, False])
def test_it_is_counted_as_malformed(what: str, planned: bool) -> None:
    ours = server(plan=plan() if planned else None)
    ours.open_round(names(10))
    assert ours.add(ODD[what]()) == "malformed"
    assert ours.add(reply("client-1", zeros())) == "accepted"
    summary = ours.close_round()
    counted = [*summary.private.outcomes.values()].count("malformed") + summary.private.refused.get("malformed", 0)
    assert counted == 1


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight = self.a.weight


def test_a_tied_weight_moves_under_both_names_round_after_round() -> None:
    model = Tied()
    for source in (model, model.state_dict()):
        trained = None if source is model else ["a.weight", "a.bias", "b.bias"]
        ours = FederatedServer(source, trained=trained)
        for number in (1, 2, 3):
            ours.open_round(["c"])
            moved = {name: torch.ones_like(ours.state[name]) for name in ours.trained}
            ours.add(FitReply(client="c", round=number, update=moved))
            ours.close_round()
            state = ours.state
            evaluated = Tied()
            evaluated.load_state_dict(state)
            assert torch.equal(state["b.weight"], state["a.weight"])
            torch.testing.assert_close(evaluated.b.weight.detach(), model.a.weight.detach() + number)


def test_a_copy_of_a_tied_weight_that_would_go_stale_is_refused() -> None:
    copied = {name: tensor.clone() for name, tensor in Tied().state_dict().items()}
    with pytest.raises(ModelError, match=r"'b.weight' has the values of 'a.weight'.*Give the module"):
        FederatedServer(copied, trained=["a.weight", "a.bias", "b.bias"])
    fresh = {"w": torch.zeros(3), "running_mean": torch.zeros(3), "mask": torch.ones(3)}
    FederatedServer(fresh, trained=["w"])  # zeros like others say nothing of ties
