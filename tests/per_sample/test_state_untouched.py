"""Asking for gradients changes nothing: not the model, not its grads or buffers, not the data."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

import dpdl
from tests.per_sample.case import ENGINES, SmallModel
from tests.per_sample.small_models import BY_NAME, TAKEN, name_of

each_engine = pytest.mark.parametrize("engine", ENGINES)


@pytest.mark.parametrize(("engine", "case"), TAKEN, ids=name_of)
def test_model_and_data_are_left_as_they_were(engine: str, case: SmallModel) -> None:
    model = case.module()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    state = copy.deepcopy(model.state_dict())
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    inputs, targets = case.batch()

    dpdl.clipped_sum(
        model,
        case.loss_fn,
        inputs,
        targets,
        engine=engine,
        loss_reduction=case.loss_reduction,
        max_grad_norm=1.0,
    )

    assert all(torch.equal(p.grad, torch.full_like(p, 7.0)) for p in model.parameters())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    assert modes == [module.training for module in model.modules()]
    clean_inputs, clean_targets = case.batch()
    torch.testing.assert_close((inputs, targets), (clean_inputs, clean_targets), rtol=0.0, atol=0.0)


@each_engine
def test_results_carry_no_graph(engine: str) -> None:
    case = BY_NAME["mlp_tanh"]
    gradients = dpdl.per_sample_gradients(case.module(), case.loss_fn, *case.batch(), engine=engine)
    assert not any(g.requires_grad for g in gradients.values())
    norms = dpdl.per_sample_norms(case.module(), case.loss_fn, *case.batch(), engine=engine)
    assert not norms.requires_grad


@each_engine
def test_a_parameter_frozen_after_a_first_call_leaves_the_second(engine: str) -> None:
    case = BY_NAME["mlp_tanh"]
    model = case.module()
    assert "0.weight" in dpdl.per_sample_gradients(model, F.cross_entropy, *case.batch(), engine=engine)
    model[0].weight.requires_grad_(False)
    gradients = dpdl.per_sample_gradients(model, F.cross_entropy, *case.batch(), engine=engine)
    assert set(gradients) == {"0.bias", "2.weight", "2.bias"}


class KeepsItsBias(torch.nn.Module):
    """Computes its bias once in eval mode, and keeps it in a dictionary or an attribute, as LeViT and TinyViT do."""

    def __init__(self, *, in_a_dictionary: bool) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)
        self.table = torch.nn.Parameter(torch.tensor([0.1, 0.2, 0.3]))
        self.kept: dict[str, torch.Tensor] | None = {} if in_a_dictionary else None
        self.bias: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.table[torch.tensor([2, 0])].square()
        if not self.training:
            if self.kept is None:
                self.bias = bias if self.bias is None else self.bias
                bias = self.bias
            else:
                bias = self.kept.setdefault("cpu", bias)
        return self.linear(x) + bias


@each_engine
@pytest.mark.parametrize("in_a_dictionary", [True, False])
def test_what_a_model_keeps_in_eval_mode_is_neither_met_nor_left_behind(engine: str, in_a_dictionary: bool) -> None:
    model = KeepsItsBias(in_a_dictionary=in_a_dictionary)
    x, y = torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 1, 0])
    data = torch.utils.data.TensorDataset(x, y)
    loader = torch.utils.data.DataLoader(data, batch_size=3)
    plan = dpdl.PrivacyPlan.for_loader(loader, steps=3, noise_multiplier=1.0, max_grad_norm=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    private = dpdl.make_private(model, optimizer, loader, plan, execution=dpdl.Execution(engine=engine))  # type: ignore[arg-type]
    while private.optimizer.steps_taken < 3:
        for xs, ys in private.loader:
            private.optimizer.zero_grad()
            F.cross_entropy(private.model(xs), ys).backward()
            private.optimizer.step()
            if private.optimizer.steps_taken == 3:
                break
    assert not model.kept
    assert model.bias is None
