"""Ways to call and to run: several inputs, keywords, outputs, in-place, dropout, control flow."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.per_sample.case import N, SmallModel, normal, tokens

X = normal(N, 6, seed=61)
Z = normal(N, 2, 3, seed=62)
Y = tokens(N, vocabulary=4, seed=63)

NOT_TAPE = ("loop", "vmap", "auto")  # it records the batch, whose loss the model returns already reduced


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(6, 4)
        self.right = nn.Linear(3, 4)

    def forward(self, x: Tensor, z: Tensor, scale: Tensor | None = None) -> Tensor:
        h = self.left(x) * self.right(z).tanh().sum(1)
        return h if scale is None else h * scale.unsqueeze(1)


class TupleOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 6)
        self.classes = nn.Linear(6, 4)
        self.auxiliary = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x).tanh()
        return self.classes(h), self.auxiliary(h)


class DictOutput(TupleOutput):
    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        logits, auxiliary = super().forward(x)
        return {"logits": logits, "auxiliary": auxiliary}


class MixedOutput(nn.Module):
    """Logits beside things that have no gradient: predicted classes, and nothing at all."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor | None]:
        logits = self.head(x)
        return {"classes": logits.argmax(1), "hidden": None, "logits": logits}


class BatchSecondOutput(nn.Module):
    """Returns [T, N, classes] with T == N."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.tanh()).transpose(0, 1)


class LossInside(nn.Module):
    """Takes the classes along and returns the batch's loss, as language models often do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor, classes: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.body(x).tanh()), classes)


class AddInPlace(nn.Module):
    """`*=` and `+=` on the output of the first layer, then ReLU in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y *= 0.5
        y += x
        return self.head(self.relu(y))


class WritesIntoFreshTensor(nn.Module):
    """Assembles its features by assignment; torch.func cannot write a batched value in a plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(3, 3)
        self.right = nn.Linear(3, 3)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.shape, dtype=x.dtype)
        h[:, :3] = self.left(x[:, :3])
        h[:, 3:] = self.right(x[:, 3:]).tanh()
        return self.head(h)


class RowByRow(nn.Module):
    """Python decides, example by example, which layer an example goes through."""

    def __init__(self) -> None:
        super().__init__()
        self.positive = nn.Linear(6, 4)
        self.negative = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.positive(r) if float(r.sum()) > 0 else self.negative(r) for r in x])


class Checkpointed(nn.Module):
    """Recomputes its hidden layer in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.hidden, x, use_reentrant=False))


def two_losses(outputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
    logits, auxiliary = outputs
    return F.cross_entropy(logits, targets) + 0.1 * auxiliary.square().sum(1).mean()


def two_losses_of_dict(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    return two_losses((outputs["logits"], outputs["auxiliary"]), targets)


def loss_of_mixed(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs["logits"], targets)


def loss_of_batch_second(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.permute(1, 2, 0), targets)


def loss_is_the_output(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs


def with_dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Tanh(), nn.Dropout1d(0.3), nn.Linear(8, 4))


model = partial(SmallModel, inputs=X, targets=Y, loss_fn=F.cross_entropy)


MODELS = (
    model(name="two_positional_inputs", build=TwoInputs, inputs=(X, Z)),
    model(name="one_positional_input_in_a_tuple", build=lambda: nn.Linear(6, 4), inputs=(X,)),
    model(
        name="keyword_inputs",
        build=TwoInputs,
        inputs={"z": Z, "x": X, "scale": normal(N, seed=64)},
        notes="in another order than the signature's",
    ),
    model(name="tuple_output", build=TupleOutput, loss_fn=two_losses),
    model(name="dict_output", build=DictOutput, loss_fn=two_losses_of_dict),
    model(name="integers_and_none_beside_the_logits", build=MixedOutput, loss_fn=loss_of_mixed),
    model(
        name="batch_second_output",
        build=BatchSecondOutput,
        inputs=normal(N, N, 2, seed=65),
        targets=tokens(N, N, vocabulary=4, seed=66),
        loss_fn=loss_of_batch_second,
        notes="as many positions as examples",
    ),
    model(
        name="loss_inside_the_model",
        build=LossInside,
        inputs=(X, Y),
        loss_fn=loss_is_the_output,
        must_take=NOT_TAPE,
    ),
    model(
        name="relu_in_place",
        build=lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 4)),
    ),
    model(name="add_in_place", build=AddInPlace),
    model(name="writes_into_fresh_tensor", build=WritesIntoFreshTensor, must_take=("loop", "tape", "auto")),
    model(name="row_by_row_control_flow", build=RowByRow, must_take=("loop", "auto")),
    model(name="checkpointed", build=Checkpointed, must_take=("loop", "tape", "auto")),
    model(name="dropout_in_eval_mode", build=with_dropout, eval_mode=True),
)
