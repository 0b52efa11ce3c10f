"""Plain local training, against a loop by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from dpdl.errors import ParameterError
from dpdl.federated.messages import FitReply, Refusal
from dpdl.federated.plain_client import PlainClient
from tests.federated.clients.worlds import N, network, records, request, same, sgd, weights


def plain(name: str = "plain", **changed: Any) -> PlainClient:
    settings: dict[str, Any] = {"optimizer": sgd(0.5), "batch_size": N, "steps": 4, **changed}
    return PlainClient(name, network, TensorDataset(*records()), F.cross_entropy, **settings)


def update_of(answer: object) -> dict[str, Tensor]:
    assert isinstance(answer, FitReply), answer
    return dict(answer.update)


def by_hand(steps: int, proximal: float = 0.0) -> dict[str, Tensor]:
    """Full-batch gradient descent, with the proximal term written into the loss."""
    start = list(weights().values())
    now = [w.clone() for w in start]
    x, y = records()
    for _ in range(steps):
        variables = [w.clone().requires_grad_() for w in now]
        hidden = torch.tanh(x @ variables[0].T + variables[1])
        loss = F.cross_entropy(hidden @ variables[2].T + variables[3], y)
        loss = loss + proximal / 2 * sum(((w - s) ** 2).sum() for w, s in zip(variables, start, strict=True))
        gradients = torch.autograd.grad(loss, variables)
        now = [w - 0.5 * g for w, g in zip(now, gradients, strict=True)]
    return {name: w - s for name, w, s in zip(weights(), now, start, strict=True)}


@pytest.mark.parametrize("proximal", [0.0, 0.3])
def test_full_batches_are_gradient_descent(proximal: float) -> None:
    found = update_of(plain(proximal=proximal).answer(request()))
    for name, expected in by_hand(4, proximal).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-12)
    other = by_hand(4, proximal + 0.1)
    assert not torch.allclose(found["0.weight"], other["0.weight"], rtol=1e-4)


def test_each_round_starts_from_the_requests_weights_with_a_fresh_optimizer() -> None:
    asked = plain(optimizer=sgd(0.5, momentum=0.9))
    first, second = update_of(asked.answer(request(1))), update_of(asked.answer(request(2)))
    for name, change in first.items():  # in another order
        torch.testing.assert_close(second[name], change, rtol=1e-10, atol=1e-12)


def test_a_seed_repeats_batches_by_name_federation_and_round() -> None:
    def update(name: str = "plain", seed: int | None = 2, **asked: Any) -> dict[str, Tensor]:
        return update_of(plain(name, batch_size=4, insecure_seed=seed).answer(request(**asked)))

    assert same(update(), update())
    for other in (update("other"), update(seed=3), update(round=2), update(federation="b"), update(seed=None)):
        assert not same(update(), other)


def test_a_loop_that_serves_private_clients_serves_plain_ones() -> None:
    def train(model: nn.Module, optimizer: Any, loader: Any, steps: int) -> dict[str, float]:
        for _ in range(steps):
            for x, y in loader:
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
        return {"passes": float(steps)}

    asked = plain(train=train, metrics=["passes"], weight=N)
    answer = asked.answer(request())
    assert isinstance(answer, FitReply)
    assert (answer.metrics, answer.weight) == ({"passes": 4.0}, N)
    torch.testing.assert_close(dict(answer.update), by_hand(4))


def test_batch_normalisation_is_welcome_and_errors_become_refusals() -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()

    def losing(*_: Any) -> Tensor:
        raise ValueError("patient 17")

    dataset = TensorDataset(*records())
    asked = PlainClient(
        "plain", model, dataset, F.cross_entropy, optimizer=sgd(), batch_size=4, steps=2, send_buffers=True
    )
    answer = asked.answer(request(state=model().state_dict()))
    assert isinstance(answer, FitReply)
    assert answer.update["1.num_batches_tracked"] == 2
    bad = PlainClient("plain", network, dataset, losing, optimizer=sgd(), batch_size=4, steps=2)
    refusal = bad.answer(request())
    assert isinstance(refusal, Refusal)
    assert (refusal.reason, "17" in refusal.message) == ("failed", False)
    with pytest.raises(ParameterError):
        plain(batch_size=0)
    assert isinstance(plain(steps=None).answer(request()), Refusal)
