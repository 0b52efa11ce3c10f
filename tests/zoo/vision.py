"""Vision models of transformers: images, and a few for videos."""

from __future__ import annotations

from functools import partial

from tests.zoo.hugging_face import zoo_model
from tests.zoo.model import Batch, normal, uniform


def images(n: int, size: int = 16) -> Batch:
    """Square images of three channels."""
    return {"pixel_values": normal(n, 3, size, size)}


def video(n: int, name: str = "pixel_values") -> Batch:
    """Four frames."""
    return {name: normal(n, 4, 3, 16, 16)}


entry = partial(zoo_model, family="vision", batch=images)
large = partial(entry, batch=partial(images, size=32))
FOUR_STAGES = {"hidden_sizes": [8, 16, 16, 24], "depths": [1, 1, 1, 1]}
FOUR_STAGES_OF_ATTENTION = {**FOUR_STAGES, "num_attention_heads": [1, 2, 2, 2]}
TWO_STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1]}
WINDOWS = {"embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 2}
SMALL_EFFICIENT_NET = {
    "width_coefficient": 0.125,
    "depth_coefficient": 0.25,
    "hidden_dim": 160,
    "kernel_sizes": [3, 3],
    "in_channels": [16, 8],
    "out_channels": [8, 16],
    "depthwise_padding": [],
    "strides": [1, 2],
    "num_block_repeats": [1, 1],
    "expand_ratios": [1, 2],
}

MODELS = (
    entry("aimv2", "Aimv2VisionModel"),
    entry("beit", "BeitModel", use_relative_position_bias=True, use_absolute_position_embeddings=True),
    large("bit", "BitModel", num_groups=4, embedding_size=8, **TWO_STAGES, notes="standardised convolution weights"),
    entry("clip_vision_model", "CLIPVisionModel"),
    entry("convnext", "ConvNextModel", **TWO_STAGES, num_stages=2, default=True),
    entry("convnextv2", "ConvNextV2Model", **TWO_STAGES, num_stages=2, notes="global response normalisation"),
    entry("data2vec-vision", "Data2VecVisionModel"),
    entry("deit", "DeiTModel"),
    large("detr", "DetrModel", num_queries=5, group_norm=True, use_timm_backbone=False, backbone=None,
          backbone_config={"model_type": "resnet", "embedding_size": 8, **TWO_STAGES, "out_features": ["stage2"]}),
    entry("dinov2", "Dinov2Model"),
    entry("dinov2_with_registers", "Dinov2WithRegistersModel"),
    large("dinov3_convnext", "DINOv3ConvNextModel", **TWO_STAGES),
    entry("dinov3_vit", "DINOv3ViTModel", pos_embed_rescale=None),
    entry("dpt", "DPTModel", is_hybrid=False, backbone_out_indices=[0, 0, 1, 1], neck_hidden_sizes=[8, 8, 16, 16],
          fusion_hidden_size=16, backbone_config=None),
    large("efficientnet", "EfficientNetModel", group_norm=True, **SMALL_EFFICIENT_NET),
    entry("eomt", "EomtForUniversalSegmentation", num_upscale_blocks=1, num_blocks=1, num_queries=4,
          output="masks_queries_logits"),
    entry("focalnet", "FocalNetModel", embed_dim=8, **TWO_STAGES, focal_levels=[2, 2], focal_windows=[3, 3]),
    large("glpn", "GLPNModel", **FOUR_STAGES_OF_ATTENTION, decoder_hidden_size=8),
    entry("hiera", "HieraModel", patch_size=[3, 3], embed_dim=8, depths=[1, 1], num_heads=[1, 2],
          image_size=[16, 16], query_stride=[2, 2], masked_unit_size=[2, 2], masked_unit_attention=[True, False],
          patch_stride=[2, 2], patch_padding=[1, 1], num_query_pool=1),
    entry("ijepa", "IJepaModel"),
    entry("levit", "LevitModel", group_norm=True, image_size=64, patch_size=16, hidden_sizes=[16, 24, 32],
          depths=[1, 1, 1], num_attention_heads=[2, 2, 2], key_dim=[8, 8, 8], batch=partial(images, size=64)),
    entry("mgp-str", "MgpstrModel", image_size=[16, 16]),
    large("mobilenet_v1", "MobileNetV1Model", group_norm=True, depth_multiplier=0.125),
    large("mobilenet_v2", "MobileNetV2Model", group_norm=True, depth_multiplier=0.125),
    large("mobilevit", "MobileViTModel", group_norm=True, hidden_sizes=[16, 24, 32],
          neck_hidden_sizes=[8, 8, 16, 16, 16, 16, 24]),
    entry("mobilevitv2", "MobileViTV2Model", group_norm=True, width_multiplier=0.25, patch_size=2,
          batch=partial(images, size=64)),
    entry("pixio", "PixioModel"),
    large("poolformer", "PoolFormerModel", **FOUR_STAGES),
    large("pvt", "PvtModel", image_size=32, **FOUR_STAGES_OF_ATTENTION, sequence_reduction_ratios=[2, 1, 1, 1]),
    large("pvt_v2", "PvtV2Model", **FOUR_STAGES_OF_ATTENTION),
    large("regnet", "RegNetModel", group_norm=True, embedding_size=8, **TWO_STAGES, groups_width=4),
    large("resnet", "ResNetModel", group_norm=True, embedding_size=8, **TWO_STAGES, default=True),
    entry("sam_vision_model", "SamVisionModel", output_channels=8, window_size=2, global_attn_indexes=[1],
          num_pos_feats=16, mlp_dim=40),
    entry("sapiens2", "Sapiens2Model", pos_embed_rescale=None),
    large("segformer", "SegformerForSemanticSegmentation", **FOUR_STAGES_OF_ATTENTION, decoder_hidden_size=8,
          group_norm=True, output="logits"),
    entry("siglip_vision_model", "SiglipVisionModel", output="pooler_output", notes="attention pooling"),
    large("swiftformer", "SwiftFormerModel", group_norm=True, depths=[1, 1], embed_dims=[8, 16]),
    entry("swin", "SwinModel", **WINDOWS, default=True, notes="shifted windows: N*k rows in attention"),
    entry("swin2sr", "Swin2SRModel", **WINDOWS, patch_size=1),
    entry("swinv2", "Swinv2Model", **WINDOWS, notes="a network computes the position biases"),
    large("textnet", "TextNetModel", group_norm=True, hidden_sizes=[8, 8, 16, 16, 16], stem_out_channels=8),
    entry("timesformer", "TimesformerModel", num_frames=4, batch=video),
    entry("videomae", "VideoMAEModel", num_frames=4, batch=video),
    entry("vit", "ViTForImageClassification", output="logits", default=True),
    entry("vit_mae", "ViTMAEModel", mask_ratio=0.0, decoder_hidden_size=16, decoder_num_hidden_layers=1,
          decoder_num_attention_heads=2, decoder_intermediate_size=24,
          batch=lambda n: {**images(n), "noise": uniform(n, 16)},
          notes="patches in an order drawn beforehand"),
    entry("vit_msn", "ViTMSNModel"),
    entry("vitdet", "VitDetModel", window_block_indices=[0], window_size=2, residual_block_indices=[1]),
    entry("vivit", "VivitModel", tubelet_size=[2, 4, 4], num_frames=4, video_size=[4, 16, 16], batch=video),
    entry("vjepa2", "VJEPA2Model", crop_size=16, frames_per_clip=4, tubelet_size=2, pred_hidden_size=16,
          pred_num_attention_heads=2, pred_num_hidden_layers=1,
          batch=partial(video, name="pixel_values_videos")),
    entry("yolos", "YolosModel", image_size=[16, 16], num_detection_tokens=4),
)  # fmt: skip
