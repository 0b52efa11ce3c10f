"""Attention, and the raw parameters that come with it: class tokens, positions, layer scale."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.per_sample.case import N, SmallModel, normal, tokens

T, D = 5, 4
X = normal(N, T, D, seed=41)
Y = tokens(N, vocabulary=3, seed=42)


class SelfAttention(nn.Module):
    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, batch_first=batch_first)
        self.head = nn.Linear(T * D, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.attention.batch_first:
            h, _ = self.attention(x, x, x, need_weights=False)
        else:
            s = x.transpose(0, 1)
            h = self.attention(s, s, s)[0].transpose(0, 1)
        return self.head(h.flatten(1))


class CrossAttention(nn.Module):
    """Queries, keys and values of three widths, and learned key and value rows."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, kdim=3, vdim=2, add_bias_kv=True, batch_first=True)
        self.head = nn.Linear(T * D, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.attention(x, x[..., :3], x[..., :2], need_weights=False)
        return self.head(h.flatten(1))


class Flattened(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(T * D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).flatten(1))


class TinyViT(nn.Module):
    """Class token by `expand` and `cat`, positions by `+`, layer scale by `*`."""

    def __init__(self) -> None:
        super().__init__()
        self.class_token = nn.Parameter(torch.zeros(1, 1, D))
        self.positions = nn.Parameter(torch.zeros(1, T + 1, D))
        self.layer_scale = nn.Parameter(torch.ones(D))
        self.qkv = nn.Linear(D, 3 * D)
        self.norm = nn.LayerNorm(D)
        self.head = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + self.layer_scale * F.scaled_dot_product_attention(q, k, v)
        return self.head(x[:, 0])


class WindowAttention(nn.Module):
    """Cuts each example in windows: N * 2 rows, example-major, and a relative bias shared by all."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(D, 3 * D)
        self.relative_bias = nn.Parameter(torch.zeros(3, 3))
        self.head = nn.Linear(6 * D, 3)

    def forward(self, x: Tensor) -> Tensor:
        windows = x.reshape(-1, 3, D)  # [N * 2, 3, D]
        q, k, v = self.qkv(windows).chunk(3, dim=-1)
        scores = q @ k.transpose(1, 2) / D**0.5 + self.relative_bias
        return self.head((scores.softmax(-1) @ v).reshape(x.shape[0], -1))


class MaskedAttention(nn.Module):
    """Which positions count is part of the example."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)
        self.head = nn.Linear(D, 3)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        h, _ = self.attention(x, x, x, key_padding_mask=padding, need_weights=False)
        return self.head(h.masked_fill(padding.unsqueeze(-1), 0.0).sum(1))


PADDING = torch.arange(T)[None, :] > torch.arange(N)[:, None]  # example n keeps n + 1 positions


def encoder(*, norm_first: bool) -> nn.Module:
    return nn.TransformerEncoderLayer(D, 2, dim_feedforward=6, dropout=0.0, batch_first=True, norm_first=norm_first)


model = partial(SmallModel, inputs=X, targets=Y, loss_fn=F.cross_entropy)


MODELS = (
    model(name="attention_batch_first", build=lambda: SelfAttention(batch_first=True)),
    model(name="attention_time_major", build=lambda: SelfAttention(batch_first=False)),
    model(name="attention_three_widths_and_bias_kv", build=CrossAttention),
    model(name="attention_padding_mask", build=MaskedAttention, inputs=(X, PADDING)),
    model(name="transformer_encoder_layer", build=lambda: Flattened(encoder(norm_first=False))),
    model(name="transformer_encoder_layer_norm_first", build=lambda: Flattened(encoder(norm_first=True))),
    model(
        name="transformer_encoder_layer_eval_mode",
        build=lambda: Flattened(encoder(norm_first=False)),
        eval_mode=True,
    ),
    model(name="tiny_vit", build=TinyViT, notes="class token, positions, layer scale"),
    model(name="window_attention", build=WindowAttention, inputs=normal(N, 6, D, seed=43)),
)
