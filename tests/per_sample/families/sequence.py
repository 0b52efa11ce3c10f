"""Embeddings, recurrent networks, language models."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.per_sample.case import (
    ENGINES,
    N,
    SmallModel,
    language_model_mean,
    language_model_sum,
    normal,
    tokens,
)

V, T, D = 7, 5, 4  # words, positions (as many as examples, on purpose), features
WORDS = tokens(N, T, vocabulary=V, seed=31)
SERIES = normal(N, T, 3, seed=32)
Y = tokens(N, vocabulary=3, seed=33)
NOT_VMAP = ("loop", "tape", "auto")  # torch.func cannot batch the fused recurrent kernels


class Embedded(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, D, **options)
        self.head = nn.Linear(T * D, 3)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.embedding(words).tanh().flatten(1))


class Bag(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(V, D, mode=mode)
        self.head = nn.Linear(D, 3)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.bag(words).tanh())


class Recurrent(nn.Module):
    """Reads [N, T, d] whichever order the inner network wants; the head sees every output."""

    def __init__(self, network: nn.Module, features: int) -> None:
        super().__init__()
        self.network = network
        self.head = nn.Linear(T * features, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.network.batch_first:
            outputs, _ = self.network(x)
        else:
            outputs = self.network(x.transpose(0, 1))[0].transpose(0, 1)
        return self.head(outputs.flatten(1))


class LastState(nn.Module):
    """The head sees the final hidden and cell state, not the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.LSTM(3, D, num_layers=2, batch_first=True)
        self.head = nn.Linear(2 * D, 3)

    def forward(self, x: Tensor) -> Tensor:
        _, (hidden, cell) = self.network(x)
        return self.head(torch.cat([hidden[-1], cell[-1]], dim=1))


class Unrolled(nn.Module):
    """A recurrent cell called T times: one parameter, many uses."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell
        self.head = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], D)
        for position in range(x.shape[1]):
            state = self.cell(x[:, position], state)
        return self.head(state)


class LanguageModel(nn.Module):
    """Predicts each next word; the output layer may be the embedding itself."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.mix = nn.Linear(D, D)
        self.output = nn.Linear(D, V, bias=not tied)
        if tied:
            self.output.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.output(self.mix(self.embedding(words)).tanh().cumsum(1))


def padded_targets() -> Tensor:
    """Each example has another number of real words."""
    targets = tokens(N, T, vocabulary=V, seed=34)
    for n in range(N):
        targets[n, n + 1 :] = -1
    return targets


words = partial(SmallModel, inputs=WORDS, targets=Y, loss_fn=F.cross_entropy)
series = partial(SmallModel, inputs=SERIES, targets=Y, loss_fn=F.cross_entropy, must_take=NOT_VMAP)


NEXT_WORDS = tokens(N, T, vocabulary=V, seed=35)

MODELS = (
    words(name="embedding", build=Embedded),
    words(name="embedding_padding_idx", build=lambda: Embedded(padding_idx=int(WORDS[0, 0]))),
    words(name="embedding_bag_mean", build=lambda: Bag("mean")),
    words(name="embedding_bag_sum", build=lambda: Bag("sum")),
    series(
        name="rnn_time_major",
        build=lambda: Recurrent(nn.RNN(3, D), D),
        notes="as many positions as examples, batch second",
    ),
    series(
        name="rnn_relu_batch_first",
        build=lambda: Recurrent(nn.RNN(3, D, nonlinearity="relu", batch_first=True), D),
    ),
    series(name="lstm_batch_first", build=lambda: Recurrent(nn.LSTM(3, D, batch_first=True), D)),
    series(
        name="lstm_bidirectional_time_major",
        build=lambda: Recurrent(nn.LSTM(3, D, bidirectional=True), 2 * D),
    ),
    series(name="lstm_projected", build=lambda: Recurrent(nn.LSTM(3, D, proj_size=2, batch_first=True), 2)),
    series(name="lstm_two_layers_last_state", build=LastState),
    series(name="gru_batch_first", build=lambda: Recurrent(nn.GRU(3, D, batch_first=True), D)),
    series(
        name="gru_bidirectional_two_layers",
        build=lambda: Recurrent(nn.GRU(3, D, num_layers=2, bidirectional=True, batch_first=True), 2 * D),
    ),
    series(name="rnn_cell_unrolled", build=lambda: Unrolled(nn.RNNCell(3, D)), must_take=ENGINES),
    series(name="gru_cell_unrolled", build=lambda: Unrolled(nn.GRUCell(3, D)), must_take=ENGINES),
    words(
        name="language_model",
        build=lambda: LanguageModel(tied=False),
        targets=NEXT_WORDS,
        loss_fn=language_model_mean,
    ),
    words(
        name="language_model_tied",
        build=lambda: LanguageModel(tied=True),
        targets=NEXT_WORDS,
        loss_fn=language_model_mean,
        notes="embedding and output layer are one parameter",
    ),
    words(
        name="language_model_padded_sum",
        build=lambda: LanguageModel(tied=True),
        targets=padded_targets(),
        loss_fn=language_model_sum,
        loss_reduction="sum",
    ),
)
