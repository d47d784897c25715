"""State spaces and other recurrences that stand in for attention."""

from __future__ import annotations

import torch

from .architecture import Built, architecture, tokens
from .language import last_logits


@architecture("Mamba", "transformers")
def mamba():
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4, use_cache=False)
    return Built(MambaForCausalLM(config).eval(), tokens(), last_logits)


@architecture("Mamba2", "transformers")
def mamba2():
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=8,
        num_heads=8,
        head_dim=8,
        n_groups=1,
        chunk_size=4,
        use_cache=False,
    )
    return Built(Mamba2ForCausalLM(config).eval(), tokens(), last_logits)


@architecture("RWKV", "transformers", cure="RWKV, called once")
def rwkv():
    from transformers import RwkvConfig, RwkvForCausalLM

    config = RwkvConfig(
        vocab_size=64, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2, context_length=16, use_cache=False
    )
    return Built(RwkvForCausalLM(config).eval(), tokens(), last_logits)


@architecture("RWKV, called once", "transformers")
def rwkv_called():
    built = rwkv()
    with torch.no_grad():
        built.model(built.x)  # rescales its layers, which it does once after eval()
    return built


@architecture("RecurrentGemma", "transformers")
def recurrent_gemma():
    from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

    config = RecurrentGemmaConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        intermediate_size=48,
        lru_width=32,
        attention_window_size=8,
        use_cache=False,
    )
    return Built(RecurrentGemmaForCausalLM(config).eval(), tokens(), last_logits)
