"""State-space, recurrent and hybrid decoders of transformers, by their plain torch paths (no CUDA kernels)."""

from __future__ import annotations

from functools import partial

from tests.zoo.hugging_face import text, zoo_model
from tests.zoo.mixtures import FOUR_EXPERTS

entry = partial(zoo_model, family="state space", batch=text)
BAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 4}
DELTA_NET = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}

MODELS = (
    entry("bamba", "BambaModel", **BAMBA, attn_layer_indices=[1]),
    entry("falcon_h1", "FalconH1Model", mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8,
          mamba_chunk_size=4),
    entry("falcon_mamba", "FalconMambaModel", state_size=8, time_step_rank=4),
    entry("granitemoehybrid", "GraniteMoeHybridModel", **BAMBA, layer_types=["mamba", "attention"],
          num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=24, experts_implementation="eager"),
    entry("jamba", "JambaModel", num_experts=4, mamba_dt_rank=4, mamba_d_state=8, attn_layer_period=2,
          attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, experts_implementation="eager"),
    entry("lfm2", "Lfm2Model", layer_types=["conv", "full_attention"], block_ff_dim=40,
          block_auto_adjust_ff_dim=False),
    entry("mamba", "MambaModel", state_size=8, time_step_rank=4, default=True),
    entry("mamba2", "Mamba2Model", num_heads=8, head_dim=8, state_size=8, n_groups=2, chunk_size=4),
    entry("nemotron_h", "NemotronHModel", layers_block_type=["linear_attention", "full_attention"],
          hybrid_override_pattern="M*", mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=8, chunk_size=4,
          n_groups=2, experts_implementation="eager"),
    entry("olmo_hybrid", "OlmoHybridModel", **DELTA_NET),
    entry("qwen3_next", "Qwen3NextModel", **FOUR_EXPERTS, **DELTA_NET, shared_expert_intermediate_size=24,
          experts_implementation="eager"),
    entry("recurrent_gemma", "RecurrentGemmaModel", block_types=["recurrent", "attention"],
          float32_inside=True, notes="its recurrence runs in float32"),
    entry("rwkv", "RwkvModel", rescale_every=0, notes="its weights are not rescaled in place"),
    entry("xlstm", "xLSTMModel", num_heads=4, chunk_size=4, float32_inside=True,
          notes="its state is kept in float32"),
)  # fmt: skip
