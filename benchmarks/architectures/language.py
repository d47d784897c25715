"""Language models of ``transformers``: encoders, decoders, and both."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .architecture import Built, WithArguments, architecture, tokens

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 32}
ENCODER = SMALL | {"intermediate_size": 48, "max_position_embeddings": 32, "num_labels": 3}
NO_SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def last_logits(output: Any) -> Tensor:
    return output.logits[:, -1, :3]


def logits(output: Any) -> Tensor:
    return output.logits


def mean_state(output: Any) -> Tensor:
    return output.last_hidden_state.mean(dim=1)[:, :3]


def _eager(config: Any) -> Any:
    config._attn_implementation = "eager"
    return config


def _decoder(name: str, **options: Any) -> Built:
    import transformers

    config = getattr(transformers, f"{name}Config")(**DECODER | NO_SPECIAL_TOKENS | options)
    return Built(getattr(transformers, f"{name}ForCausalLM")(config).eval(), tokens(), last_logits)


def _encoder(name: str, **options: Any) -> Built:
    import transformers

    config = getattr(transformers, f"{name}Config")(**ENCODER | options)
    return Built(getattr(transformers, f"{name}ForSequenceClassification")(config).eval(), tokens(), logits)


@architecture("GPT-2", "transformers")
def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    return Built(GPT2LMHeadModel(config).eval(), tokens(), last_logits)


@architecture("GPT-2, eager attention, no cache", "transformers")
def gpt2_eager():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = _eager(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, use_cache=False))
    return Built(GPT2LMHeadModel(config).eval(), tokens(), last_logits)


@architecture("GPT-2, all hidden states", "transformers")
def gpt2_hidden():
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, output_hidden_states=True)
    return Built(GPT2Model(config).eval(), tokens(), lambda output: output.hidden_states[1][:, -1, :3])


@architecture("GPT-2, classifier", "transformers")
def gpt2_classifier():
    from transformers import GPT2Config, GPT2ForSequenceClassification

    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, num_labels=3, pad_token_id=0)
    return Built(GPT2ForSequenceClassification(config).eval(), tokens(), logits)


@architecture("Llama", "transformers")
def llama():
    return _decoder("Llama")


@architecture("Llama, token by token", "transformers")
def llama_tokens():
    built = _decoder("Llama")
    return Built(built.model, tokens(3, 4), lambda output: output.logits[..., :2].flatten(1))


@architecture("Qwen2", "transformers")
def qwen2():
    return _decoder("Qwen2")


@architecture("Qwen3", "transformers")
def qwen3():
    return _decoder("Qwen3", head_dim=8)


@architecture("Mistral", "transformers")
def mistral():
    return _decoder("Mistral", sliding_window=4)


@architecture("Gemma2", "transformers")
def gemma2():
    return _decoder("Gemma2", head_dim=8, sliding_window=4)


@architecture("Phi", "transformers")
def phi():
    return _decoder("Phi")


@architecture("Phi3", "transformers")
def phi3():
    return _decoder("Phi3")


@architecture("Falcon", "transformers")
def falcon():
    return _decoder("Falcon")


@architecture("Falcon, ALiBi", "transformers")
def falcon_alibi():
    return _decoder("Falcon", alibi=True)


@architecture("GPT-NeoX", "transformers")
def gpt_neox():
    return _decoder("GPTNeoX")


@architecture("OLMo2", "transformers")
def olmo2():
    return _decoder("Olmo2")


@architecture("StableLM", "transformers")
def stablelm():
    return _decoder("StableLm")


@architecture("Bloom", "transformers")
def bloom():
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)
    return Built(BloomForCausalLM(config).eval(), tokens(), last_logits)


@architecture("OPT", "transformers")
def opt():
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(**SMALL, ffn_dim=48, max_position_embeddings=32, word_embed_proj_dim=32)
    return Built(OPTForCausalLM(config).eval(), tokens(), last_logits)


@architecture("T5", "transformers")
def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    return Built(
        WithArguments(model, lambda net, x: net(input_ids=x, decoder_input_ids=x[:, :3])), tokens(), last_logits
    )


@architecture("T5 encoder", "transformers")
def t5_encoder():
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    return Built(T5EncoderModel(config).eval(), tokens(), mean_state)


@architecture("BART", "transformers")
def bart():
    from transformers import BartConfig, BartModel

    config = BartConfig(
        vocab_size=64,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=32,
    )
    return Built(BartModel(config).eval(), tokens(), mean_state)


@architecture("BERT", "transformers")
def bert():
    return _encoder("Bert")


@architecture("BERT, masked", "transformers")
def bert_masked():
    built = _encoder("Bert")

    def call(net, x):
        return net(input_ids=x, attention_mask=(x > 20).long())

    return Built(WithArguments(built.model, call), tokens(), logits)


@architecture("RoBERTa", "transformers")
def roberta():
    return _encoder("Roberta", pad_token_id=1)


@architecture("DistilBERT", "transformers")
def distilbert():
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(
        vocab_size=64, dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=32, num_labels=3
    )
    return Built(DistilBertForSequenceClassification(config).eval(), tokens(), logits)


@architecture("ALBERT", "transformers")
def albert():
    return _encoder("Albert", embedding_size=16)


@architecture("ELECTRA", "transformers")
def electra():
    return _encoder("Electra", embedding_size=16)


@architecture("DeBERTa-v2", "transformers")
def deberta():
    return _encoder("DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8)


@architecture("ModernBERT", "transformers")
def modernbert():
    return _encoder("ModernBert", pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)


@architecture("FNet", "transformers")
def fnet():
    return _encoder("FNet")


@architecture("XLNet", "transformers")
def xlnet():
    from transformers import XLNetConfig, XLNetModel

    config = XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=48)
    return Built(XLNetModel(config).eval(), tokens(), mean_state)
