"""PEFT adapters on one tiny decoder: only the adapter is trained."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from tests.zoo.hugging_face import built, text
from tests.zoo.model import ZooModel

LINEAR = ["q_proj", "v_proj", "down_proj"]
TASK = {"task_type": "CAUSAL_LM"}


def adapted(config_name: str, settings: dict[str, Any]) -> nn.Module:
    """A decoder of two layers with an adapter."""
    decoder = built("LlamaForCausalLM", {})
    peft = importlib.import_module("peft")
    module: nn.Module = peft.get_peft_model(decoder, getattr(peft, config_name)(**TASK, **settings))
    return module


def entry(name: str, config_name: str, *, default: bool = False, notes: str = "", **settings: Any) -> ZooModel:
    """An adapter by its configuration's class."""
    return ZooModel(
        name=name,
        family="peft",
        build=lambda: adapted(config_name, settings),
        batch=text,
        output="logits",
        default=default,
        notes=notes,
    )


MODELS = (
    entry("adalora", "AdaLoraConfig", target_modules=LINEAR, init_r=4, target_r=2, total_step=10),
    entry("adaption-prompt", "AdaptionPromptConfig", adapter_len=3, adapter_layers=1),
    entry("boft", "BOFTConfig", target_modules=LINEAR, boft_block_size=4),
    entry("bone", "MissConfig", target_modules=LINEAR, r=4),
    entry("c3a", "C3AConfig", target_modules=["q_proj"], block_size=8),
    entry("delora", "DeloraConfig", target_modules=LINEAR, r=4),
    entry("dora", "LoraConfig", target_modules=LINEAR, r=4, use_dora=True),
    entry("gralora", "GraloraConfig", target_modules=["q_proj"], r=4, gralora_k=2),
    entry("hra", "HRAConfig", target_modules=LINEAR, r=4),
    entry("ia3", "IA3Config", target_modules=LINEAR, feedforward_modules=["down_proj"], default=True),
    entry("layer-norms", "LNTuningConfig", target_modules=["input_layernorm", "norm"]),
    entry("loha", "LoHaConfig", target_modules=LINEAR, r=4),
    entry("lokr", "LoKrConfig", target_modules=LINEAR, r=4),
    entry("lora", "LoraConfig", target_modules=LINEAR, r=4, default=True),
    entry("lora-embedding", "LoraConfig", target_modules=["embed_tokens", "q_proj"], r=4),
    entry("lora-saved-head", "LoraConfig", target_modules=LINEAR, r=4, modules_to_save=["lm_head"]),
    entry("oft", "OFTConfig", target_modules=LINEAR, oft_block_size=4, use_cayley_neumann=False),
    entry("p-tuning", "PromptEncoderConfig", num_virtual_tokens=3, encoder_hidden_size=8),
    entry("prefix-tuning", "PrefixTuningConfig", num_virtual_tokens=3, default=True),
    entry("prompt-tuning", "PromptTuningConfig", num_virtual_tokens=3),
    entry("randlora", "RandLoraConfig", target_modules=LINEAR, r=4),
    entry("road", "RoadConfig", target_modules=LINEAR, group_size=8),
    entry("rslora", "LoraConfig", target_modules=LINEAR, r=4, use_rslora=True),
    entry("shira", "ShiraConfig", target_modules=LINEAR, r=4),
    entry("trainable-tokens", "TrainableTokensConfig", token_indices=[10, 11, 12]),
    entry("vblora", "VBLoRAConfig", target_modules=["q_proj"], r=4, num_vectors=8, vector_length=8),
    entry("vera", "VeraConfig", target_modules=["q_proj"], r=4),
    entry("waveft", "WaveFTConfig", target_modules=["q_proj"], n_frequency=10),
)  # fmt: skip
