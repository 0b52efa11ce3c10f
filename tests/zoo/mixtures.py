"""Mixtures of experts of transformers.

The experts run as a loop over experts (`experts_implementation="eager"`): the library's default, a grouped matrix
product, has no float64 kernel.
"""

from __future__ import annotations

from functools import partial

from tests.zoo.decoders import LATENT_ATTENTION
from tests.zoo.hugging_face import source_and_target, text, zoo_model

entry = partial(zoo_model, family="mixture of experts", batch=text)
routed = partial(entry, experts_implementation="eager")

FOUR_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FOUR_ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}

MODELS = (
    routed("afmoe", "AfmoeModel", **FOUR_EXPERTS, num_dense_layers=1),
    routed("dbrx", "DbrxModel", n_heads=4, n_layers=2, max_seq_len=40,
           ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
           attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}),
    routed("deepseek_v2", "DeepseekV2Model", **LATENT_ATTENTION, **FOUR_ROUTED),
    routed("deepseek_v3", "DeepseekV3Model", **LATENT_ATTENTION, **FOUR_ROUTED),
    routed("dots1", "Dots1Model", **FOUR_ROUTED),
    routed("ernie4_5_moe", "Ernie4_5_MoeModel", moe_num_experts=4, moe_k=2, moe_intermediate_size=24),
    routed("flex_olmo", "FlexOlmoModel", num_experts=4, num_experts_per_tok=2),
    routed("glm4_moe", "Glm4MoeModel", **FOUR_ROUTED),
    routed("gpt_oss", "GptOssModel", num_local_experts=4, num_experts_per_tok=2),
    routed("granitemoe", "GraniteMoeModel", num_local_experts=4, num_experts_per_tok=2),
    routed("hunyuan_v1_moe", "HunYuanMoEV1Model", num_experts=4, moe_topk=2),
    routed("jetmoe", "JetMoeModel", kv_channels=8, num_local_experts=4),
    routed("llama4", "Llama4TextModel", num_local_experts=4, intermediate_size_mlp=40),
    routed("longcat_flash", "LongcatFlashModel", **LATENT_ATTENTION, n_routed_experts=4, moe_topk=2,
           expert_ffn_hidden_size=24, zero_expert_num=2, ffn_hidden_size=40),
    routed("minimax", "MiniMaxModel", num_local_experts=4, block_size=4),
    routed("minimax_m2", "MiniMaxM2Model", num_local_experts=4, num_experts_per_tok=2),
    routed("mixtral", "MixtralModel", num_local_experts=4, default=True),
    entry("nllb-moe", "NllbMoeModel", batch=source_and_target, num_experts=4, encoder_sparse_step=1,
          decoder_sparse_step=1, expert_capacity=20),
    routed("olmoe", "OlmoeModel", num_experts=4, num_experts_per_tok=2),
    routed("phimoe", "PhimoeModel", num_local_experts=4, mode="eval", notes="in training mode it routes at random"),
    routed("qwen2_moe", "Qwen2MoeModel", **FOUR_EXPERTS, shared_expert_intermediate_size=24),
    routed("qwen3_moe", "Qwen3MoeModel", **FOUR_EXPERTS),
    entry("switch_transformers", "SwitchTransformersModel", batch=source_and_target, num_experts=4,
          num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, expert_capacity=20),
)  # fmt: skip
