"""Models of transformers for texts together with images."""

from __future__ import annotations

from functools import partial

import torch

from tests.zoo.hugging_face import VOCABULARY, T, text, zoo_model
from tests.zoo.model import Batch, normal, tokens, uniform
from tests.zoo.vision import images


def captions(n: int) -> Batch:
    """A text and an image."""
    return {**text(n), **images(n)}


def _page(n: int) -> Batch:
    """Words, their boxes and the page's image."""
    return {**captions(n), "bbox": tokens(n, T, 4, vocabulary=60, seed=4).sort(dim=-1).values}


def _page_and_answer(n: int) -> Batch:
    boxes = uniform(n, T, 4, seed=4).sort(dim=-1).values
    return {**captions(n), "bbox": boxes, "decoder_input_ids": tokens(n, 5, vocabulary=VOCABULARY, seed=1)}


def _regions(n: int) -> Batch:
    """A text, features of four regions, and where they are."""
    return {**text(n), "visual_feats": normal(n, 4, 10, seed=2), "visual_pos": uniform(n, 4, 4, seed=3)}


def _visual_embeddings(n: int) -> Batch:
    return {**text(n), "visual_embeds": normal(n, 4, 10, seed=2)}


def _prompt(n: int) -> Batch:
    """Four places for an image's patches, then the text."""
    ids = torch.cat([torch.full((n, 4), 4), text(n)["input_ids"]], dim=1)
    return {"input_ids": ids, **images(n)}


LLAMA = {"model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 40,
         "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
CLIP_VISION = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
               "num_attention_heads": 4, "image_size": 16, "patch_size": 8}  # fmt: skip

entry = partial(zoo_model, family="multimodal", batch=captions)
# Their similarities are a matrix over the batch, which is no loss of one example: the embeddings are taken alone.
two_towers = partial(entry, output="image_embeds", only=("image_embeds", "text_embeds"), projection_dim=16)

MODELS = (
    two_towers("altclip", "AltCLIPModel", text_config={"project_dim": 16}, output="text_embeds"),
    two_towers("blip", "BlipModel", text_config={"encoder_hidden_size": 32}),
    two_towers("chinese_clip", "ChineseCLIPModel"),
    two_towers("clip", "CLIPModel"),
    entry("clipseg", "CLIPSegForImageSegmentation", projection_dim=16, extract_layers=[0, 1], reduce_dim=8,
          decoder_num_attention_heads=2, decoder_intermediate_size=8, conditional_layer=0, output="logits",
          only=("logits",)),
    entry("flava", "FlavaModel", output="multimodal_embeddings"),
    entry("git", "GitModel"),
    entry("layoutlmv3", "LayoutLMv3Model", batch=_page, input_size=16, max_2d_position_embeddings=64,
          coordinate_size=4, shape_size=8),
    entry("llava", "LlavaModel", batch=_prompt, text_config=LLAMA, vision_config=CLIP_VISION, image_token_id=4,
          vision_feature_layer=-1, only=("last_hidden_state",)),
    entry("lxmert", "LxmertModel", batch=_regions, l_layers=1, x_layers=1, r_layers=1, visual_feat_dim=10,
          output="pooled_output"),
    two_towers("metaclip_2", "MetaClip2Model", output="text_embeds"),
    two_towers("owlvit", "OwlViTModel"),
    entry("siglip", "SiglipModel", output="text_embeds", only=("image_embeds", "text_embeds")),
    entry("udop", "UdopModel", batch=_page_and_answer),
    entry("vilt", "ViltModel", max_image_length=-1, output="pooler_output", notes="patches in random order"),
    entry("visual_bert", "VisualBertModel", batch=_visual_embeddings, visual_embedding_dim=10),
)  # fmt: skip
