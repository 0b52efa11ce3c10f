"""Tiny timm models, with random weights: nothing is downloaded. BatchNorm is replaced by GroupNorm."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tests.zoo.model import ZooModel, normal, with_group_norm
from tests.zoo.torchvision_stand_in import torchvision_or_stand_in


def library() -> Any:
    """The timm package."""
    with torchvision_or_stand_in():
        return importlib.import_module("timm")


class OfImages(nn.Module):
    """A model of one argument, under the name that the batch has for it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """The model's output."""
        output: Tensor = self.model(images)
        return output


def built(source: str, arguments: dict[str, Any] | Callable[[Any], dict[str, Any]]) -> nn.Module:
    """A registered model by its name, or one of a module of `timm.models` by "module.Class".

    Args:
        source: the name.
        arguments: of the constructor; where they are themselves things of that module, a function of it.
    """
    timm = library()
    if "." not in source:
        assert isinstance(arguments, dict)
        return OfImages(with_group_norm(timm.create_model(source, num_classes=4, **arguments)))
    module_name, class_name = source.split(".")
    module = importlib.import_module(f"timm.models.{module_name}")
    values = arguments if isinstance(arguments, dict) else arguments(module)
    return OfImages(with_group_norm(getattr(module, class_name)(num_classes=4, **values)))


def entry(
    name: str,
    source: str,
    arguments: dict[str, Any] | Callable[[Any], dict[str, Any]] | None = None,
    *,
    size: int = 32,
    default: bool = False,
    refused: str = "",
    notes: str = "",
) -> ZooModel:
    """An entry of the table: square images of this size, the logits as output."""
    return ZooModel(
        name=name,
        family="timm",
        build=lambda: built(source, arguments or {}),
        batch=lambda n: {"images": normal(n, 3, size, size)},
        output=None,
        default=default,
        refused=refused,
        notes=notes,
    )


VIT = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}
FOUR = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
WINDOWS = {"img_size": 32, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}
MIXER = {"img_size": 32, "patch_size": 8, "num_blocks": 2, "embed_dim": 16}


def _byob(attention: str, **settings: Any) -> Callable[[Any], dict[str, Any]]:
    """A residual network of two blocks, the second with self-attention of this kind."""

    def arguments(module: Any) -> dict[str, Any]:
        convolution = module.ByoBlockCfg(type="bottle", d=1, c=16, s=2)
        attending = module.ByoBlockCfg(
            type="self_attn", d=1, c=32, s=2, self_attn_layer=attention, self_attn_kwargs=settings
        )
        cfg = module.ByoModelCfg(
            blocks=(convolution, attending),
            stem_chs=8,
            stem_pool="",
            num_features=0,
            fixed_input_size=attention == "bottleneck",
        )
        return {"cfg": cfg, **({"img_size": 32} if attention == "bottleneck" else {})}

    return arguments


MODELS = (
    entry("beit", "beit_base_patch16_224", VIT),
    entry("bottleneck-transformer", "byobnet.ByobNet", _byob("bottleneck")),
    entry("cait", "cait_xxs24_224", VIT),
    entry("caformer", "metaformer.MetaFormer", lambda m: {
        "depths": (1, 1, 1, 1), "dims": (8, 16, 32, 32),
        "token_mixers": [m.SepConv, m.SepConv, m.Attention, m.Attention],
        "norm_layers": [m.LayerNorm2dNoBias] * 2 + [m.LayerNormNoBias] * 2}),
    entry("convit", "convit_tiny", {**VIT, "embed_dim": 16, "depth": 3, "local_up_to_layer": 2},
          refused="keeps state", notes="writes distances between patches to a buffer in forward"),
    entry("convmixer", "convmixer.ConvMixer", {"dim": 16, "depth": 2, "kernel_size": 3}, size=28),
    entry("convnext", "convnext_atto", FOUR, default=True),
    entry("crossvit", "crossvit.CrossVit", {
        "img_size": 32, "img_scale": (1.0, 1.0), "patch_size": (8, 16), "embed_dim": (16, 32), "depth": ((1, 1, 0),),
        "num_heads": (2, 2), "mlp_ratio": (2, 2, 1)}),
    entry("davit", "davit_tiny", {
        "depths": (1, 1), "embed_dims": (16, 32), "num_heads": (1, 2), "window_size": 2}),
    entry("deit-distilled", "deit_tiny_distilled_patch16_224", VIT),
    entry("deit3", "deit3_small_patch16_224", VIT),
    entry("densenet", "densenet121", {"growth_rate": 4, "block_config": (1, 1, 1, 1)}),
    entry("dla", "dla34", {"channels": [8, 8, 16, 16, 16, 16]}),
    entry("dpn", "dpn.DPN", {
        "k_sec": (1, 1, 1, 1), "inc_sec": (4, 4, 4, 4), "k_r": 16, "groups": 4, "num_init_features": 8,
        "small": True}),
    entry("edgenext", "edgenext_xx_small", FOUR),
    entry("efficientnet", "test_efficientnet"),
    entry("efficientnet-evonorm", "test_efficientnet_evos"),
    entry("efficientvit-mit", "efficientvit_mit.EfficientVit", {
        "widths": (8, 16, 16, 32, 32), "depths": (1, 1, 1, 1, 1), "head_dim": 8, "head_widths": (32, 32)}),
    entry("efficientvit-msra", "efficientvit_msra.EfficientVitMsra", {
        "img_size": 64, "embed_dim": (16, 32, 32), "key_dim": (4, 4, 4), "depth": (1, 1, 1), "num_heads": (2, 2, 2),
        "window_size": (2, 2, 2), "kernels": (3, 3, 3, 3)}, size=64),
    entry("eva02", "eva02_tiny_patch14_224", {**VIT, "img_size": 28}, size=28),
    entry("fasternet", "fasternet_t0", {"embed_dim": 8, "depths": (1, 1, 1, 1)}),
    entry("fastvit", "fastvit_t8", {"layers": (1, 1, 1, 1), "embed_dims": (48, 48, 48, 48)}, size=64),
    entry("focalnet", "focalnet.FocalNet", {
        "embed_dim": 8, "depths": (1, 1), "focal_levels": (2, 2), "focal_windows": (3, 3)}),
    entry("gcvit", "gcvit.GlobalContextVit", {
        "img_size": 64, "window_ratio": (16, 16), "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2)}, size=64),
    entry("ghostnet", "ghostnet.GhostNet", {
        "cfgs": [[[3, 16, 16, 0, 1]], [[3, 48, 24, 0.25, 2]]], "width": 0.5}),
    entry("gmlp", "mlp_mixer.MlpMixer", lambda m: {
        **MIXER, "mlp_ratio": 4, "block_layer": m.SpatialGatingBlock, "mlp_layer": m.GatedMlp}),
    entry("mlp-mixer", "mlp_mixer.MlpMixer", MIXER),
    entry("resmlp", "mlp_mixer.MlpMixer", lambda m: {
        **MIXER, "mlp_ratio": 4, "block_layer": m.ResBlock, "norm_layer": m.Affine}),
    entry("halonet", "byobnet.ByobNet", _byob("halo", block_size=4, halo_size=1)),
    entry("hiera", "hiera_tiny_224", {"embed_dim": 16, "num_heads": 1, "stages": (1, 1, 1, 1)}, size=224),
    entry("inception-next", "inception_next.MetaNeXt", lambda m: {
        "depths": (1, 1, 1, 1), "dims": (16, 16, 24, 32), "token_mixers": m.InceptionDWConv2d}),
    entry("lambda-network", "byobnet.ByobNet", _byob("lambda", r=3)),
    entry("levit", "levit.Levit", {
        "img_size": 64, "embed_dim": (16, 24, 32), "key_dim": 8, "depth": (1, 1, 1), "num_heads": (2, 2, 2)}, size=64),
    entry("mambaout", "mambaout_femto", FOUR),
    entry("maxvit", "maxxvit.MaxxVit", lambda m: {
        "cfg": m.MaxxVitCfg(embed_dim=(32, 32), depths=(1, 1), block_type=("M", "M"), stem_width=8),
        "img_size": 32}),
    entry("coatnet", "maxxvit.MaxxVit", lambda m: {
        "cfg": m.MaxxVitCfg(embed_dim=(8, 32), depths=(1, 1), block_type=("C", "T"), stem_width=8), "img_size": 32}),
    entry("mobilenetv3", "mobilenetv3_small_050"),
    entry("mobilevit", "mobilevit_xxs"),
    entry("mvitv2", "mvitv2.MultiScaleVit", lambda m: {
        "cfg": m.MultiScaleVitCfg(depths=(1, 1), embed_dim=16, num_heads=1), "img_size": 32}),
    entry("naflexvit", "naflexvit_base_patch16_gap", {"embed_dim": 32, "depth": 2, "num_heads": 2}),
    entry("nest", "nest.Nest", {
        "img_size": 32, "embed_dims": (8, 16, 32), "num_heads": (1, 1, 2), "depths": (1, 1, 1)}),
    entry("nfnet", "nfnet.NormFreeNet", lambda m: {
        "cfg": m.NfCfg(depths=(1, 1), channels=(16, 32), stem_chs=8, group_size=8, attn_layer="se",
                       attn_kwargs={"rd_ratio": 0.5}, extra_conv=True)}, default=True,
          notes="scaled weight standardisation"),
    entry("poolformer", "metaformer.MetaFormer", lambda m: {
        **FOUR, "token_mixers": m.Pooling, "norm_layers": m.GroupNorm1, "use_mlp_head": False}),
    entry("pvt_v2", "pvt_v2.PyramidVisionTransformerV2", {
        "depths": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 24), "num_heads": (1, 2, 2, 2)}),
    entry("repvit", "repvit.RepVit", {"embed_dim": (8, 16), "depth": (1, 1)}),
    entry("resnet", "resnet18", {"layers": (1, 1, 1, 1), "channels": (8, 16, 16, 32)}),
    entry("resnetv2-standardised", "resnetv2.ResNetV2", lambda m: {
        "layers": [1, 1], "channels": [16, 32], "conv_layer": m.StdConv2d,
        "norm_layer": m.partial(m.GroupNormAct, num_groups=4)}),
    entry("rexnet", "rexnet.RexNet", {"initial_chs": 8, "final_chs": 24, "width_mult": 0.5}),
    entry("sequencer", "sequencer.Sequencer2d", {
        "img_size": 28, "layers": [1, 1], "patch_sizes": [7, 1], "embed_dims": [16, 16], "hidden_sizes": [8, 8],
        "mlp_ratios": [2, 2]}, size=28, notes="LSTM"),
    entry("shvit", "shvit.SHViT", {
        "embed_dim": (16, 16, 16), "partial_dim": (4, 4, 4), "qk_dim": (4, 4, 4), "depth": (1, 1, 1)}, size=64),
    entry("starnet", "starnet_s050"),
    entry("swiftformer", "swiftformer.SwiftFormer", {"layers": [1, 1, 1, 1], "embed_dims": [8, 16, 16, 24]}, size=64),
    entry("swin", "swin_tiny_patch4_window7_224", WINDOWS, default=True),
    entry("swinv2", "swinv2_tiny_window8_256", WINDOWS),
    entry("swinv2-cr", "swin_transformer_v2_cr.SwinTransformerV2Cr", WINDOWS),
    entry("tiny-vit", "tiny_vit_5m_224", {
        "embed_dims": (8, 16, 16, 24), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}, size=224),
    entry("tnt", "tnt_s_patch16_224", {
        "img_size": 32, "embed_dim": 32, "inner_dim": 16, "depth": 2, "num_heads_inner": 2, "num_heads_outer": 2}),
    entry("twins", "twins.Twins", {
        "img_size": 32, "embed_dims": (8, 16, 16, 24), "num_heads": (1, 1, 2, 2), "depths": (1, 1, 1, 1),
        "wss": (4, 2, 1, 1)}),
    entry("visformer", "visformer.Visformer", {
        "img_size": 32, "init_channels": 8, "embed_dim": 16, "depth": (1, 1, 1), "num_heads": 2}),
    entry("vision-transformer", "vit_tiny_patch16_224", VIT, default=True),
    entry("vit-relative-position", "vit_relpos_small_patch16_224", VIT),
    entry("volo", "volo.VOLO", {
        "img_size": 64, "layers": (1, 1), "embed_dims": (16, 32), "num_heads": (1, 2), "downsamples": (True, False),
        "outlook_attention": (True, False), "mlp_ratio": 2.0, "use_mix_token": False, "post_layers": ("ca",)},
        size=64),
    entry("vovnet", "vovnet.VovNet", {"cfg": {
        "stem_chs": [8, 8, 8], "stage_conv_chs": [8, 8, 8, 8], "stage_out_chs": [16, 16, 16, 16],
        "layer_per_block": 2, "block_per_stage": [1, 1, 1, 1], "residual": True, "depthwise": False, "attn": "ese"}}),
    entry("xcit", "xcit_nano_12_p16_224", VIT),
)  # fmt: skip
