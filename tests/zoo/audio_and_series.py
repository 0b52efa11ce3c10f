"""Models of transformers for sound, and for time series."""

from __future__ import annotations

from functools import partial

import torch

from tests.zoo.hugging_face import VOCABULARY, T, zoo_model
from tests.zoo.model import Batch, normal, tokens


def wave(n: int) -> Batch:
    """Samples of a sound."""
    return {"input_values": normal(n, 128)}


def _channel(n: int) -> Batch:
    """Samples, as one channel."""
    return {"input_values": normal(n, 1, 64)}


def _with_decoder(batch: Batch, n: int) -> Batch:
    return {**batch, "decoder_input_ids": tokens(n, T, vocabulary=VOCABULARY)}


def _spectrum(n: int, *shape: int, name: str = "input_features") -> Batch:
    return {name: normal(n, *shape)}


def _decoded_spectrum(n: int, *shape: int) -> Batch:
    return _with_decoder(_spectrum(n, *shape), n)


def _with_noise(n: int) -> Batch:
    """A spectrogram, and the noise that the vocoder shapes."""
    return {"input_features": normal(n, 5, 8), "noise_sequence": normal(n, 5, 8, seed=1)}


def _past_and_future(n: int, future: int = 3) -> Batch:
    """Ten known values, `future` to predict, and a covariate for each."""
    return {
        "past_values": normal(n, 10),
        "past_time_features": normal(n, 10, 1, seed=1),
        "past_observed_mask": torch.ones(n, 10, dtype=torch.float64),
        "future_values": normal(n, future, seed=2),
        "future_time_features": normal(n, future, 1, seed=3),
    }


def _channels(n: int) -> Batch:
    return {"past_values": normal(n, 16, 2)}


def _trajectory(n: int) -> Batch:
    """Four steps of a reinforcement learner."""
    return {
        "states": normal(n, 4, 3),
        "actions": normal(n, 4, 2, seed=1),
        "rewards": normal(n, 4, 1, seed=2),
        "returns_to_go": normal(n, 4, 1, seed=3),
        "timesteps": tokens(n, 4, vocabulary=10),
        "attention_mask": torch.ones(n, 4, dtype=torch.long),
    }


WAVES = {"conv_dim": [8, 8], "conv_stride": [4, 2], "conv_kernel": [8, 3], "num_feat_extract_layers": 2,
         "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0,
         "mask_feature_prob": 0.0}  # fmt: skip
FORECAST = {"prediction_length": 3, "context_length": 8, "lags_sequence": [1, 2], "num_time_features": 1}
PATCHES = {"num_input_channels": 2, "context_length": 16, "patch_length": 4, "patch_stride": 4, "d_model": 16,
           "do_mask_input": False}  # fmt: skip

audio = partial(zoo_model, family="audio", batch=wave)
series = partial(zoo_model, family="time series", batch=_past_and_future)

MODELS = (
    audio("audio-spectrogram-transformer", "ASTModel", max_length=24, num_mel_bins=16, frequency_stride=4,
          time_stride=4, batch=lambda n: _spectrum(n, 24, 16, name="input_values")),
    audio("clap_audio_model", "ClapAudioModel", group_norm=True, patch_size=4, spec_size=32,
          patch_embeds_hidden_size=8, hidden_size=16, depths=[1, 1], num_attention_heads=[1, 2], window_size=2,
          num_mel_bins=16, patch_stride=[4, 4],
          batch=lambda n: {**_spectrum(n, 1, 32, 16), "is_longer": torch.zeros(n, 1, dtype=torch.bool)}),
    audio("data2vec-audio", "Data2VecAudioModel", **{**WAVES, "num_conv_pos_embeddings": 2}, conv_pos_kernel_size=3),
    audio("encodec", "EncodecModel", num_filters=4, upsampling_ratios=[2, 2], codebook_size=16, hidden_size=16,
          codebook_dim=16, batch=_channel, output="audio_values", only=("audio_values",)),
    audio("hubert", "HubertModel", **WAVES),
    audio("mimi", "MimiModel", num_filters=4, upsampling_ratios=[2, 2], codebook_size=16, hidden_size=16,
          codebook_dim=8, vector_quantization_hidden_dimension=8, num_quantizers=2, num_semantic_quantizers=1,
          upsample_groups=16, head_dim=4, batch=_channel, output="audio_values", only=("audio_values",)),
    audio("moonshine", "MoonshineModel", batch=lambda n: _with_decoder({"input_values": normal(n, 2000)}, n)),
    audio("parakeet_encoder", "ParakeetEncoder", group_norm=True, num_mel_bins=16, subsampling_conv_channels=8,
          conv_kernel_size=3, batch=lambda n: _spectrum(n, 32, 16)),
    audio("sew", "SEWModel", **WAVES),
    audio("sew-d", "SEWDModel", **WAVES),
    audio("speech_to_text", "Speech2TextModel", input_feat_per_channel=10, num_conv_layers=2, conv_channels=16,
          max_source_positions=40, max_target_positions=40, batch=lambda n: _decoded_spectrum(n, 24, 10)),
    audio("speecht5", "SpeechT5ForSpeechToText", **WAVES, speech_decoder_prenet_units=16,
          encoder_max_relative_position=8, max_text_positions=20, batch=lambda n: _with_decoder(wave(n), n),
          output="logits"),
    audio("unispeech", "UniSpeechModel", **WAVES),
    audio("unispeech-sat", "UniSpeechSatModel", **WAVES),
    audio("univnet", "UnivNetModel", model_in_channels=8, model_hidden_channels=4, num_mel_bins=8,
          resblock_kernel_sizes=[3], resblock_stride_sizes=[4], resblock_dilation_sizes=[[1, 3]],
          kernel_predictor_num_blocks=1, kernel_predictor_hidden_channels=8, kernel_predictor_conv_size=3,
          batch=_with_noise, output="waveforms", notes="a network computes the convolutions' weights"),
    audio("wav2vec2", "Wav2Vec2Model", **WAVES, default=True, notes="weight-normalised convolution"),
    audio("wav2vec2-bert", "Wav2Vec2BertModel", feature_projection_input_dim=10, conv_depthwise_kernel_size=3,
          batch=lambda n: _spectrum(n, 12, 10), mask_time_prob=0.0),
    audio("wav2vec2-conformer", "Wav2Vec2ConformerModel", group_norm=True, **WAVES, conv_depthwise_kernel_size=3),
    audio("wavlm", "WavLMModel", **WAVES),
    audio("whisper", "WhisperModel", num_mel_bins=10, max_source_positions=12, max_target_positions=20,
          decoder_start_token_id=3, batch=lambda n: _decoded_spectrum(n, 10, 24)),
    series("autoformer", "AutoformerModel", **{**FORECAST, "prediction_length": 4}, label_length=2,
           moving_average=3, feature_size=5, batch=partial(_past_and_future, future=4),
           refused="mixes examples", notes="chooses delays by a mean over the batch"),
    series("decision_transformer", "DecisionTransformerModel", state_dim=3, act_dim=2, max_ep_len=10,
           batch=_trajectory, output="action_preds"),
    series("informer", "InformerModel", group_norm=True, **FORECAST),
    series("patchtsmixer", "PatchTSMixerModel", **PATCHES, batch=_channels),
    series("patchtst", "PatchTSTModel", **PATCHES, norm_type="layernorm", batch=_channels),
    series("time_series_transformer", "TimeSeriesTransformerModel", **FORECAST, feature_size=5),
)  # fmt: skip
