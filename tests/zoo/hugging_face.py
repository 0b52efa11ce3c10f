"""Tiny transformers models from configurations alone: nothing is downloaded.

A model is named by its class; its configuration is that class's, with the sizes of `SMALL` where it has fields
of these names, every dropout rate 0, and what the table adds.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.model import Batch, ZooModel, tokens, with_group_norm

VOCABULARY = 80
T = 7  # positions

# Sizes by field name; heads of 8 channels.
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layer": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_decoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "d_kv": 8,
    "intermediate_size": 40,
    "ffn_dim": 40,
    "d_ff": 40,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 40,
    "n_positions": 40,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "use_cache": False,
    "image_size": 16,
    "patch_size": 4,
    "num_channels": 3,
}
RANDOM = ("drop", "jitter")  # in the names of rates that are set to 0
SWITCHED_OFF = ("apply_spec_augment",)


def library() -> Any:
    """The transformers package, told to stay off the network."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    return importlib.import_module("transformers")


def tiny_config(config_class: type, changes: Mapping[str, Any]) -> Any:
    """A configuration of small sizes without dropout; a part's configuration is made in the same way."""
    defaults = {name: field.default for name, field in inspect.signature(config_class.__init__).parameters.items()}
    values: dict[str, Any] = {name: value for name, value in SMALL.items() if name in defaults}
    for name, default in defaults.items():
        if isinstance(default, float) and any(word in name for word in RANDOM):
            values[name] = 0.0
        if isinstance(default, bool) and name in SWITCHED_OFF:
            values[name] = False
    values |= changes
    for part, part_class in getattr(config_class, "sub_configs", {}).items():
        # A part of any class ("AutoConfig") is given in full by the table, with its model_type.
        if part in defaults and part_class.__name__ != "AutoConfig":
            values[part] = tiny_config(part_class, changes.get(part, {})).to_dict()
    return config_class(**values)


def built(
    class_name: str, changes: Mapping[str, Any], *, group_norm: bool = False, only: tuple[str, ...] = ()
) -> nn.Module:
    """The model of that class, with random weights."""
    model_class = getattr(library(), class_name)
    config = tiny_config(model_class.config_class, changes)
    model: nn.Module = model_class(config)
    model = with_group_norm(model) if group_norm else model
    return Only(model, only) if only else model


class Only(nn.Module):
    """A model without those of its outputs that are not one for each example."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """The outputs of these names."""
        outputs = self.model(**inputs)
        return {name: outputs[name] for name in self.names}


def text(n: int, length: int = T, vocabulary: int = VOCABULARY, seed: int = 0) -> Batch:
    """Tokens of one length."""
    return {"input_ids": tokens(n, length, vocabulary=vocabulary, seed=seed)}


def padded_text(n: int) -> Batch:
    """Tokens of several lengths, with the mask that says so."""
    mask = torch.ones(n, T, dtype=torch.long)
    for row in range(n):
        mask[row, T - row :] = 0
    return {**text(n), "attention_mask": mask}


def source_and_target(n: int) -> Batch:
    """What an encoder-decoder is trained on."""
    return {**text(n), "decoder_input_ids": tokens(n, T - 2, vocabulary=VOCABULARY, seed=1)}


def zoo_model(
    name: str,
    class_name: str,
    *,
    family: str,
    batch: Callable[[int], Batch],
    group_norm: bool = False,
    output: str | int | None = "last_hidden_state",
    notes: str = "",
    default: bool = False,
    axis: int = 0,
    mode: Any = "train",
    only: tuple[str, ...] = (),
    refused: str = "",
    float32_inside: bool = False,
    **changes: Any,
) -> ZooModel:
    """An entry of a table: the model's class, and what its configuration has beyond the small sizes."""
    return ZooModel(
        name=name,
        family=family,
        build=lambda: built(class_name, changes, group_norm=group_norm, only=only),
        batch=batch,
        output=output,
        axis=axis,
        mode=mode,
        default=default,
        refused=refused,
        float32_inside=float32_inside,
        notes="; ".join(part for part in ("BatchNorm replaced by GroupNorm" if group_norm else "", notes) if part),
    )
