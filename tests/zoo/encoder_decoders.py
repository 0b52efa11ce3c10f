"""Encoder-decoders for text of transformers."""

from __future__ import annotations

from functools import partial

from tests.zoo.hugging_face import VOCABULARY, source_and_target, text, zoo_model
from tests.zoo.model import Batch, tokens

entry = partial(zoo_model, family="encoder-decoder", batch=source_and_target)


def _even(n: int) -> Batch:
    """A source of an even length, which the model cuts into blocks."""
    return {**text(n, 8), "decoder_input_ids": tokens(n, 5, vocabulary=VOCABULARY, seed=1)}


MODELS = (
    entry("bart", "BartModel", notes="one embedding in encoder and decoder"),
    entry("bigbird_pegasus", "BigBirdPegasusModel", attention_type="original_full"),
    entry("blenderbot", "BlenderbotModel"),
    entry("blenderbot-small", "BlenderbotSmallModel"),
    entry("fsmt", "FSMTModel", src_vocab_size=VOCABULARY, tgt_vocab_size=VOCABULARY, langs=["a", "b"]),
    entry("led", "LEDModel", attention_window=4, max_encoder_position_embeddings=40,
          max_decoder_position_embeddings=40, batch=_even),
    entry("longt5", "LongT5Model", local_radius=3),
    entry("m2m_100", "M2M100Model"),
    entry("marian", "MarianModel"),
    entry("mbart", "MBartModel"),
    entry("mt5", "MT5Model"),
    entry("mvp", "MvpModel"),
    entry("pegasus", "PegasusModel"),
    entry("pegasus_x", "PegasusXModel", batch=_even, block_size=4, num_global_tokens=2),
    entry("plbart", "PLBartModel"),
    entry("prophetnet", "ProphetNetModel", num_encoder_layers=2, num_encoder_attention_heads=4,
          num_decoder_attention_heads=4),
    entry("t5", "T5ForConditionalGeneration", output="logits", default=True,
          notes="relative positions; one embedding used three times"),
    entry("t5gemma", "T5GemmaModel"),
    entry("umt5", "UMT5Model"),
)  # fmt: skip
