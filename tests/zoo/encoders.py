"""Text encoders of transformers."""

from __future__ import annotations

from functools import partial

from tests.zoo.hugging_face import VOCABULARY, T, padded_text, text, zoo_model
from tests.zoo.model import Batch, tokens, uniform

entry = partial(zoo_model, family="encoder", batch=text)


def _layout(n: int) -> Batch:
    """Words and their boxes."""
    return {**text(n), "bbox": tokens(n, T, 4, vocabulary=30, seed=4).sort(dim=-1).values}


def _unit_layout(n: int) -> Batch:
    return {**text(n), "bbox": uniform(n, T, 8, seed=4)}


def _chinese(n: int) -> Batch:
    """Tokens, their shapes and their pronunciation."""
    return {
        **text(n),
        "input_shape_ids": tokens(n, T, vocabulary=30, seed=2),
        "input_pronunciation_ids": tokens(n, T, vocabulary=30, seed=3),
    }


def _entities(n: int) -> Batch:
    """Two entities in each text, and where they stand."""
    return {
        **text(n),
        "entity_ids": tokens(n, 2, vocabulary=30, seed=2),
        "entity_position_ids": tokens(n, 2, 4, vocabulary=10, seed=3) - 4,
    }


MODELS = (
    entry("albert", "AlbertModel", embedding_size=16, notes="one layer's weights used twice"),
    entry("bert", "BertModel", batch=padded_text, default=True, notes="padded"),
    entry("bert-masked-lm", "BertForMaskedLM", output="logits", notes="embedding tied to the output"),
    entry("bert-generation", "BertGenerationEncoder"),
    entry("big_bird", "BigBirdModel", attention_type="original_full"),
    entry("bros", "BrosModel", batch=_unit_layout, hidden_size=64),
    entry("camembert", "CamembertModel"),
    entry("canine", "CanineModel", num_hash_buckets=64),
    entry("convbert", "ConvBertModel", embedding_size=16),
    entry("cpmant", "CpmAntModel", dim_model=32, dim_ff=40, dim_head=8, prompt_length=3, prompt_types=4,
          segment_types=4),
    entry("data2vec-text", "Data2VecTextModel"),
    entry("deberta", "DebertaModel", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    entry("deberta-v2", "DebertaV2Model", relative_attention=True, pos_att_type=["c2p", "p2c"], default=True,
          position_buckets=4, norm_rel_ebd="layer_norm", share_att_key=True, notes="disentangled attention"),
    entry("distilbert", "DistilBertModel", dim=32, n_layers=2, n_heads=4, hidden_dim=40),
    entry("dpr", "DPRContextEncoder", projection_dim=8, output="pooler_output"),
    entry("electra", "ElectraModel", embedding_size=16),
    entry("ernie", "ErnieModel"),
    entry("esm", "EsmModel", batch=padded_text),
    entry("eurobert", "EuroBertModel", batch=padded_text),
    entry("flaubert", "FlaubertModel", emb_dim=32, n_layers=2, n_heads=4, n_words=VOCABULARY),
    entry("fnet", "FNetModel", notes="Fourier transforms instead of attention"),
    entry("funnel", "FunnelModel", block_sizes=[1, 1], num_decoder_layers=1, d_head=8, d_inner=40),
    entry("ibert", "IBertModel", refused="keeps state", notes="tracks the range of activations in buffers"),
    entry("jina_embeddings_v3", "JinaEmbeddingsV3Model"),
    entry("layoutlm", "LayoutLMModel", batch=_layout, max_2d_position_embeddings=64),
    entry("lilt", "LiltModel", batch=_layout, max_2d_position_embeddings=64, channel_shrink_ratio=2, hidden_size=48),
    entry("longformer", "LongformerModel", attention_window=4, batch=partial(text, length=8)),
    entry("luke", "LukeModel", batch=_entities, entity_vocab_size=30, entity_emb_size=16),
    entry("markuplm", "MarkupLMModel", max_depth=5, xpath_unit_hidden_size=4, max_xpath_tag_unit_embeddings=20,
          max_xpath_subs_unit_embeddings=20, tag_pad_id=2, subs_pad_id=3),
    entry("megatron-bert", "MegatronBertModel"),
    entry("mobilebert", "MobileBertModel", embedding_size=16, intra_bottleneck_size=16, true_hidden_size=16),
    entry("modernbert", "ModernBertModel", batch=padded_text, default=True, global_attn_every_n_layers=2),
    entry("mpnet", "MPNetModel", batch=padded_text),
    entry("nomic_bert", "NomicBertModel"),
    entry("nystromformer", "NystromformerModel", num_landmarks=3, segment_means_seq_len=6,
          batch=partial(text, length=6), refused="EngineMismatchError",
          notes="scales its pseudo-inverse by a maximum over the batch"),
    entry("rembert", "RemBertModel", input_embedding_size=16, output_embedding_size=16),
    entry("roberta", "RobertaModel", batch=padded_text),
    entry("roberta-prelayernorm", "RobertaPreLayerNormModel"),
    entry("roc_bert", "RoCBertModel", batch=_chinese, pronunciation_vocab_size=30, shape_vocab_size=30,
          pronunciation_embed_dim=8, shape_embed_dim=8),
    entry("roformer", "RoFormerModel", embedding_size=16),
    entry("splinter", "SplinterModel"),
    entry("squeezebert", "SqueezeBertModel", embedding_size=32, q_groups=2, k_groups=2, v_groups=2,
          post_attention_groups=1, intermediate_groups=2, output_groups=2, default=True,
          notes="grouped convolutions of width 1 instead of linear layers"),
    entry("tapas", "TapasModel"),
    entry("xlm", "XLMModel", emb_dim=32, n_layers=2, n_heads=4, n_words=VOCABULARY),
    entry("xlm-roberta", "XLMRobertaModel", batch=padded_text),
    entry("xlm-roberta-xl", "XLMRobertaXLModel"),
    entry("xlnet", "XLNetModel", d_inner=40, notes="time first inside"),
    entry("xmod", "XmodModel", languages=["en"], default_language="en"),
    entry("reformer", "ReformerModel", batch=partial(text, length=8), axial_pos_shape=[2, 4],
          axial_pos_embds_dim=[16, 16], attn_layers=["local", "lsh"], feed_forward_size=40, attention_head_size=8,
          lsh_attn_chunk_length=4, local_attn_chunk_length=4, num_buckets=2, num_hashes=1,
          notes="reversible layers; random hashes"),
    entry("yoso", "YosoModel", use_expectation=True),
)  # fmt: skip
