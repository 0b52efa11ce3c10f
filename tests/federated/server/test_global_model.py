"""What is averaged of a model is its floating-point parameters; the rest stays, and is listed."""

import math

import pytest
import torch
from torch import nn

from dpdl.errors import CheckpointError, ModelError, ParameterError
from dpdl.federated.global_model import GlobalModel


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


def with_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


def test_a_module_says_itself_what_is_trained() -> None:
    module = with_norm()
    module[0].bias.requires_grad_(False)
    model = GlobalModel(module)
    assert model.trained == ("0.weight", "1.weight", "1.bias")
    assert set(model.excluded) == {"0.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"}


def test_of_a_state_all_floating_point_tensors_are_trained_and_no_others() -> None:
    model = GlobalModel({"w": torch.zeros(2), "s": torch.zeros(()), "n": torch.tensor(3), "m": torch.tensor([True])})
    assert (model.trained, model.excluded) == (("w", "s"), ("n", "m"))
    assert model.coordinates == 3


def test_a_state_with_statistics_is_refused_until_somebody_says_what_is_trained() -> None:
    module = with_norm()
    with pytest.raises(ModelError, match=r"1\.running_mean.*trained="):
        GlobalModel(module.state_dict())
    model = GlobalModel(module.state_dict(), trained=[name for name, _ in module.named_parameters()])
    assert model.trained == ("0.weight", "0.bias", "1.weight", "1.bias")


@pytest.mark.parametrize("by_state", [False, True])
def test_tied_weights_are_averaged_once_and_stay_tied(by_state: bool) -> None:
    module = Tied()
    model = GlobalModel(module.state_dict() if by_state else module)
    assert (model.trained, model.excluded) == (("embed.weight",), ())
    assert model.ignores("head.weight")
    model.replaced({"embed.weight": torch.ones(5, 3, dtype=torch.float64)})
    assert torch.equal(model.state["head.weight"], torch.ones(5, 3))
    module.load_state_dict(model.state)
    assert torch.equal(module.embed.weight, torch.ones(5, 3))
    assert GlobalModel(module, trained=["head.weight"]).trained == ("embed.weight",)


def test_the_state_is_the_models_own() -> None:
    given = {"w": torch.zeros(2)}
    model = GlobalModel(given)
    given["w"].fill_(1)
    copied = model.copy()
    copied["w"].fill_(2)
    before = model.state
    model.replaced({"w": torch.full((2,), 3.0, dtype=torch.float64)})
    assert before["w"].tolist() == [0, 0]
    assert model.state["w"].tolist() == [3, 3]
    assert model.state["w"].dtype == torch.float32


@pytest.mark.parametrize(
    ("state", "trained", "error"),
    [
        ({"n": torch.tensor(1)}, None, ModelError),
        ({"w": torch.zeros(2)}, [], ModelError),
        ({"w": torch.zeros(2)}, ["v"], ParameterError),
        ({"w": torch.zeros(2)}, "w", ParameterError),
        ({"w": torch.zeros(2), "n": torch.tensor(1)}, ["w", "n"], ParameterError),
        ({"w": torch.tensor([math.nan])}, None, ParameterError),
        ({"w": [0.0]}, None, ParameterError),
        ([torch.zeros(2)], None, ParameterError),
    ],
)
def test_what_cannot_be_averaged_is_refused(state: object, trained: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        GlobalModel(state, trained=trained)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "saved", [None, {}, {"w": torch.zeros(3)}, {"w": torch.zeros(2).double()}, {"w": 1}, {"v": torch.zeros(2)}]
)
def test_a_saved_state_of_another_model_is_refused(saved: object) -> None:
    with pytest.raises(CheckpointError):
        GlobalModel({"w": torch.zeros(2)}).refuse_unlike(saved)
