"""Audio and time series."""

from __future__ import annotations

from typing import Any

import torch

from .architecture import Built, WithArguments, architecture
from .language import logits, mean_state

WAVES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "num_labels": 3,
    "classifier_proj_size": 16,
    "vocab_size": 12,
}


def _waves(name: str, **options: Any) -> Built:
    import transformers

    config = getattr(transformers, f"{name}Config")(**WAVES | options)
    model = getattr(transformers, f"{name}ForSequenceClassification")(config).eval()
    return Built(model, torch.randn(4, 400), logits)


@architecture("Wav2Vec2", "transformers")
def wav2vec2():
    return _waves("Wav2Vec2")


@architecture("Wav2Vec2, layer norm", "transformers")
def wav2vec2_stable():
    return _waves("Wav2Vec2", feat_extract_norm="layer", do_stable_layer_norm=True)


@architecture("HuBERT", "transformers")
def hubert():
    return _waves("Hubert")


@architecture("WavLM", "transformers")
def wavlm():
    return _waves("WavLM", num_buckets=16, max_bucket_distance=32)


@architecture("Whisper encoder", "transformers")
def whisper():
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = WhisperConfig(
        d_model=32,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=16,
    )
    return Built(WhisperEncoder(config).eval(), torch.randn(4, 8, 32), mean_state)


@architecture("Whisper", "transformers")
def whisper_whole():
    from transformers import WhisperConfig, WhisperModel

    config = WhisperConfig(
        vocab_size=64,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )

    def call(net, x):
        return net(input_features=x, decoder_input_ids=torch.ones(len(x), 2, dtype=torch.long))

    return Built(WithArguments(WhisperModel(config).eval(), call), torch.randn(4, 8, 32), mean_state)


@architecture("Audio Spectrogram Transformer", "transformers")
def ast():
    from transformers import ASTConfig, ASTForAudioClassification

    config = ASTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        patch_size=8,
        frequency_stride=8,
        time_stride=8,
        max_length=32,
        num_mel_bins=16,
        num_labels=3,
    )
    return Built(ASTForAudioClassification(config).eval(), torch.randn(4, 32, 16), logits)


@architecture("EnCodec", "transformers")
def encodec():
    from transformers import EncodecConfig, EncodecModel

    config = EncodecConfig(
        num_filters=4,
        hidden_size=16,
        num_residual_layers=1,
        upsampling_ratios=[4, 2],
        codebook_size=16,
        codebook_dim=16,
        num_lstm_layers=1,
    )
    return Built(EncodecModel(config).eval().encoder, torch.randn(4, 1, 64), lambda codes: codes.mean(dim=2)[:, :3])


@architecture("PatchTST", "transformers")
def patchtst():
    from transformers import PatchTSTConfig, PatchTSTForPrediction

    config = PatchTSTConfig(
        num_input_channels=2,
        context_length=16,
        prediction_length=2,
        patch_length=4,
        patch_stride=4,
        d_model=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=32,
    )
    return Built(PatchTSTForPrediction(config).eval(), torch.randn(4, 16, 2), lambda o: o.prediction_outputs)


@architecture("PatchTSMixer", "transformers")
def patchtsmixer():
    from transformers import PatchTSMixerConfig, PatchTSMixerForPrediction

    config = PatchTSMixerConfig(
        num_input_channels=2,
        context_length=16,
        prediction_length=2,
        patch_length=4,
        patch_stride=4,
        d_model=16,
        num_layers=2,
        norm_mlp="LayerNorm",
    )
    return Built(PatchTSMixerForPrediction(config).eval(), torch.randn(4, 16, 2), lambda o: o.prediction_outputs)
