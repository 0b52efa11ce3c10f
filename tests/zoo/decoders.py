"""Text decoders of transformers that attend everywhere and have no experts."""

from __future__ import annotations

from functools import partial

from tests.zoo.hugging_face import VOCABULARY, padded_text, text, zoo_model

entry = partial(zoo_model, family="decoder", batch=text)

LATENT_ATTENTION = {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}

MODELS = (
    entry("apertus", "ApertusModel", notes="learned activation"),
    entry("arcee", "ArceeModel"),
    entry("biogpt", "BioGptModel"),
    entry("bitnet", "BitNetModel"),
    entry("bloom", "BloomModel"),
    entry("codegen", "CodeGenModel", rotary_dim=4, n_head=4),
    entry("cohere", "CohereModel"),
    entry("cohere2", "Cohere2Model"),
    entry("ctrl", "CTRLModel", dff=40),
    entry("diffllama", "DiffLlamaModel", notes="differential attention"),
    entry("doge", "DogeModel"),
    entry("ernie4_5", "Ernie4_5Model"),
    entry("exaone4", "Exaone4Model"),
    entry("falcon", "FalconModel", alibi=False),
    entry("falcon-alibi", "FalconModel", alibi=True),
    entry("gemma", "GemmaModel"),
    entry("gemma2", "Gemma2Model"),
    entry("gemma3", "Gemma3TextModel", default=True, notes="tied embedding scaled; normalised queries and keys"),
    entry("gemma3n", "Gemma3nTextModel", num_kv_shared_layers=0, vocab_size_per_layer_input=VOCABULARY,
          hidden_size_per_layer_input=8, activation_sparsity_pattern=None, laurel_rank=4),
    entry("gemma4", "Gemma4TextModel", vocab_size_per_layer_input=VOCABULARY, hidden_size_per_layer_input=8,
          num_kv_shared_layers=0, global_head_dim=8, sliding_window=4),
    entry("glm", "GlmModel"),
    entry("glm4", "Glm4Model"),
    entry("gpt2", "GPT2LMHeadModel", output="logits", default=True, notes="embedding tied to the output; Conv1D"),
    entry("gpt_bigcode", "GPTBigCodeModel"),
    entry("gpt_neo", "GPTNeoModel", attention_types=[[["global", "local"], 1]], window_size=3),
    entry("gpt_neox", "GPTNeoXModel"),
    entry("gpt_neox_japanese", "GPTNeoXJapaneseModel"),
    entry("gptj", "GPTJModel", rotary_dim=4),
    entry("granite", "GraniteModel"),
    entry("helium", "HeliumModel"),
    entry("hunyuan_v1_dense", "HunYuanDenseV1Model"),
    entry("imagegpt", "ImageGPTModel"),
    entry("jais2", "Jais2Model"),
    entry("llama", "LlamaForCausalLM", output="logits", default=True, batch=padded_text),
    entry("minicpm3", "MiniCPM3Model", **LATENT_ATTENTION),
    entry("ministral", "MinistralModel"),
    entry("mistral", "MistralModel", sliding_window=4),
    entry("modernbert-decoder", "ModernBertDecoderModel"),
    entry("mpt", "MptModel", n_heads=4, n_layers=2, max_seq_len=40),
    entry("nanochat", "NanoChatModel"),
    entry("nemotron", "NemotronModel"),
    entry("olmo", "OlmoModel"),
    entry("olmo2", "Olmo2Model"),
    entry("olmo3", "Olmo3Model"),
    entry("openai-gpt", "OpenAIGPTModel"),
    entry("opt", "OPTModel"),
    entry("persimmon", "PersimmonModel"),
    entry("phi", "PhiModel"),
    entry("phi3", "Phi3Model"),
    entry("qwen2", "Qwen2Model"),
    entry("qwen3", "Qwen3Model"),
    entry("seed_oss", "SeedOssModel"),
    entry("smollm3", "SmolLM3Model"),
    entry("stablelm", "StableLmModel"),
    entry("starcoder2", "Starcoder2Model"),
    entry("vaultgemma", "VaultGemmaModel"),
)  # fmt: skip
