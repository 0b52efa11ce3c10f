"""The models of the engine benchmarks: one case for each row of the targets, and one of many small layers.

Each is written plainly, as a user would, with no thought of any engine. Weights and batches are random: only
time and memory are measured, and neither depends on the values.

Axes: `n` example, `c` channel, `h` and `w` pixel rows and columns, `t` position, `d` width, `v` vocabulary.

References:
    [1] Zagoruyko and Komodakis, Wide Residual Networks, 2016. arXiv:1605.07146
    [2] De, Berrada, Hayes, Smith, Balle, Unlocking High-Accuracy Differentially Private Image Classification
        through Scale, 2022 (wide ResNet 16-4 with GroupNorm and weight standardisation). arXiv:2204.13650
    [3] Brock, De, Smith, Characterizing signal propagation to close the performance gap in unnormalized
        ResNets, 2021 (scaled weight standardisation). arXiv:2101.08692
    [4] Dosovitskiy et al., An Image is Worth 16x16 Words, 2020. arXiv:2010.11929
    [5] Radford et al., Language Models are Unsupervised Multitask Learners, 2019 (GPT-2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpdl.models import build_model

__all__ = ["CASES", "OVERHEAD", "Case", "case_named", "token_loss"]

VOCABULARY = 8192  # of the language models
WORDS = 10_000  # of the text classifier
PATCH = 4  # pixels a side
GROUPS = 16
EPSILON = 1e-4  # the least variance that weight standardisation divides by [3]
OVERHEAD_LAYERS = 100

Loss = Callable[[Tensor, Tensor], Tensor]
Draw = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, and batches for it.

    Attributes:
        name: on the command line.
        title: in tables.
        build: a fresh model.
        draw: inputs and targets for so many examples.
        batch_size: of the measurement.
        loss: mean over the batch of each example's loss, from outputs and targets.
    """

    name: str
    title: str
    build: Callable[[], nn.Module]
    draw: Draw
    batch_size: int
    loss: Loss

    def batch(self, size: int | None = None) -> tuple[Tensor, Tensor]:
        """Inputs and targets; the same at every call."""
        return self.draw(size or self.batch_size, torch.Generator().manual_seed(0))


def class_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of logits [n, classes]."""
    return F.cross_entropy(outputs, targets)


def token_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of logits [n, t, v], the mean over positions being an example's loss."""
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def images_or_features(count: int, generator: torch.Generator, *, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Normal inputs [n, *shape] and one of ten classes."""
    return torch.randn((count, *shape), generator=generator), torch.randint(10, (count,), generator=generator)


def next_tokens(count: int, generator: torch.Generator, *, length: int) -> tuple[Tensor, Tensor]:
    """Token numbers [n, t], and those that follow each."""
    text = torch.randint(VOCABULARY, (count, length + 1), generator=generator)
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def labelled_text(count: int, generator: torch.Generator, *, length: int) -> tuple[Tensor, Tensor]:
    """Word numbers [n, t], and one of two classes."""
    return torch.randint(WORDS, (count, length), generator=generator), torch.randint(2, (count,), generator=generator)


# ── wide residual network ──────────────────────────────────────────────────────────────────────────────────


class StandardizedConv2d(nn.Conv2d):
    """A convolution whose weights have mean 0 and variance 1 / fan-in within each output channel [3]."""

    def forward(self, x: Tensor) -> Tensor:
        """[n, c, h, w] to [n, c', h', w']."""
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, correction=0)
        fan_in = self.weight[0].numel()
        weight = (self.weight - mean) * torch.rsqrt(torch.clamp(variance * fan_in, min=EPSILON))
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class ResidualBlock(nn.Module):
    """Normalise, ReLU, convolve, twice; plus the input, projected where its shape changes [1]."""

    def __init__(self, channels: int, width: int, *, stride: int, conv: type[nn.Conv2d]) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(min(GROUPS, channels), channels)
        self.conv1 = conv(channels, width, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(GROUPS, width)
        self.conv2 = conv(width, width, 3, padding=1, bias=False)
        same = channels == width and stride == 1
        self.shortcut = None if same else conv(channels, width, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[n, c, h, w] to [n, width, h / stride, w / stride]."""
        active = F.relu(self.norm1(x))
        kept = x if self.shortcut is None else self.shortcut(active)
        out: Tensor = kept + self.conv2(F.relu(self.norm2(self.conv1(active))))
        return out


class WideResNet(nn.Module):
    """Wide ResNet 16-4 with GroupNorm in place of batch normalisation [1, 2]."""

    def __init__(self, *, conv: type[nn.Conv2d] = nn.Conv2d, widening: int = 4, blocks: int = 2) -> None:
        super().__init__()
        self.stem = conv(3, 16, 3, padding=1, bias=False)
        layers: list[nn.Module] = []
        channels = 16
        for stage, width in enumerate((16 * widening, 32 * widening, 64 * widening)):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(ResidualBlock(channels, width, stride=stride, conv=conv))
                channels = width
        self.blocks = nn.Sequential(*layers)
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[n, 3, 32, 32] to logits [n, 10]."""
        features = F.relu(self.norm(self.blocks(self.stem(x))))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits


# ── transformers ───────────────────────────────────────────────────────────────────────────────────────────


class Attention(nn.Module):
    """Self-attention, queries, keys and values from one projection."""

    def __init__(self, width: int, *, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.project = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[n, t, d] to the same."""
        n, t, d = x.shape
        parts = self.project(x).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        queries, keys, values = parts.unbind(0)  # [n, heads, t, d / heads]
        mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=self.causal)
        out: Tensor = self.merge(mixed.transpose(1, 2).reshape(n, t, d))
        return out


class TransformerBlock(nn.Module):
    """Attention and a feed-forward network of four times the width, each after a layer norm, each added."""

    def __init__(self, width: int, *, heads: int, causal: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads=heads, causal=causal)
        self.norm2 = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """[n, t, d] to the same."""
        x = x + self.attention(self.norm1(x))
        x = x + self.feed_forward(self.norm2(x))
        return x


class PositionTable(nn.Module):
    """Positions looked up for every example, which is how they have to be written for hook-based engines."""

    def __init__(self, positions: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(positions, width)

    def forward(self, x: Tensor) -> Tensor:
        """[n, t, d] to the same."""
        n, t = x.shape[:2]
        rows: Tensor = self.table(torch.arange(t, device=x.device).expand(n, t))
        return x + rows


class ClassTokenAndPositions(nn.Module):
    """A learned token before the others and learned positions, as plain parameters [4]."""

    def __init__(self, positions: int, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, positions + 1, width))

    def forward(self, x: Tensor) -> Tensor:
        """[n, t, d] to [n, 1 + t, d]."""
        return torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions


class VisionTransformer(nn.Module):
    """Vision transformer on 8 x 8 patches of 4 x 4 pixels [4]: width 192, depth 6."""

    def __init__(self, *, raw: bool, width: int = 192, depth: int = 6, heads: int = 3) -> None:
        super().__init__()
        self.raw = raw
        self.patches = nn.Conv2d(3, width, PATCH, stride=PATCH)
        count = (32 // PATCH) ** 2
        self.place = ClassTokenAndPositions(count, width) if raw else PositionTable(count, width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads=heads, causal=False) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[n, 3, 32, 32] to logits [n, 10]."""
        tokens = self.place(self.patches(x).flatten(2).transpose(1, 2))
        features = self.norm(self.blocks(tokens))
        logits: Tensor = self.head(features[:, 0] if self.raw else features.mean(dim=1))
        return logits


class LanguageModel(nn.Module):
    """A small GPT [5]: width 256, 4 layers."""

    def __init__(self, *, tied: bool, length: int = 128, width: int = 256, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.place = PositionTable(length, width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads=heads, causal=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        """Token numbers [n, t] to logits [n, t, v]."""
        logits: Tensor = self.head(self.norm(self.blocks(self.place(self.tokens(x)))))
        return logits


# ── the rest ───────────────────────────────────────────────────────────────────────────────────────────────


class TextClassifier(nn.Module):
    """Embedding, LSTM, and a linear layer on its last output."""

    def __init__(self, *, width: int = 64, hidden: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width)
        self.lstm = nn.LSTM(width, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Word numbers [n, t] to logits [n, 2]."""
        outputs, _ = self.lstm(self.embedding(x))
        logits: Tensor = self.head(outputs[:, -1])
        return logits


def multilayer_perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))


def many_small_layers() -> nn.Module:
    return nn.Sequential(*(nn.Linear(10, 10) for _ in range(OVERHEAD_LAYERS)))


def _images(name: str, title: str, build: Callable[[], nn.Module], batch_size: int, *shape: int) -> Case:
    draw = partial(images_or_features, shape=shape)
    return Case(name=name, title=title, build=build, draw=draw, batch_size=batch_size, loss=class_loss)


def _gpt(name: str, title: str, *, tied: bool) -> Case:
    return Case(
        name=name,
        title=title,
        build=partial(LanguageModel, tied=tied),
        draw=partial(next_tokens, length=128),
        batch_size=16,
        loss=token_loss,
    )


_mnist = partial(build_model, "papernot-cnn", in_channels=1, image_size=28, classes=10)
_cifar = partial(build_model, "cifar-cnn", in_channels=3, image_size=32, classes=10)
_standardized = partial(WideResNet, conv=StandardizedConv2d)

CASES = (
    _images("mnist", "MNIST tanh CNN (256)", _mnist, 256, 1, 28, 28),
    _images("mnist-512", "MNIST tanh CNN (512)", _mnist, 512, 1, 28, 28),
    _images("logistic", "logistic regression, 10,000 features (512)", partial(nn.Linear, 10_000, 10), 512, 10_000),
    _images("mlp", "MLP 784-1024-1024-10 (512)", multilayer_perceptron, 512, 784),
    _images("cifar", "CIFAR-10 CNN (64)", _cifar, 64, 3, 32, 32),
    _images("wrn", "wide ResNet 16-4, GroupNorm (16)", WideResNet, 16, 3, 32, 32),
    _images("wrn-ws", "the same, weight standardisation (16)", _standardized, 16, 3, 32, 32),
    _images("vit", "ViT, width 192, depth 6 (32)", partial(VisionTransformer, raw=False), 32, 3, 32, 32),
    _images("vit-raw", "the same, raw token and positions (32)", partial(VisionTransformer, raw=True), 32, 3, 32, 32),
    _gpt("gpt", "GPT, width 256, 4 layers (16)", tied=False),
    _gpt("gpt-tied", "the same, tied (16)", tied=True),
    Case(
        name="lstm",
        title="LSTM with embedding (64)",
        build=TextClassifier,
        draw=partial(labelled_text, length=64),
        batch_size=64,
        loss=class_loss,
    ),
)

# Python time a step, with almost nothing to compute.
OVERHEAD = _images("layers", f"{OVERHEAD_LAYERS} linear layers (1)", many_small_layers, 1, 10)


def case_named(name: str) -> Case:
    """The case of this name.

    Raises:
        KeyError: there is none.
    """
    return {case.name: case for case in (*CASES, OVERHEAD)}[name]
