"""Mixtures of experts: which expert sees a token depends on the token."""

from __future__ import annotations

from torch import nn

from .architecture import Built, architecture, tokens
from .language import DECODER, NO_SPECIAL_TOKENS, last_logits


def _one_by_one(model: nn.Module) -> None:
    """Let experts run in a loop: the grouped matrix product that they are given to on CPUs has no float64."""
    model.set_experts_implementation("eager")


def _grouped(model: nn.Module) -> Built:
    return Built(model.eval(), tokens(), last_logits, for_float64=_one_by_one)


@architecture("Mixtral", "transformers")
def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**DECODER | NO_SPECIAL_TOKENS, num_local_experts=4, num_experts_per_tok=2)
    return _grouped(MixtralForCausalLM(config))


@architecture("Mixtral, experts in a loop", "transformers")
def mixtral_loop():
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**DECODER | NO_SPECIAL_TOKENS, num_local_experts=4, num_experts_per_tok=2)
    model = MixtralForCausalLM(config).eval()
    _one_by_one(model)
    return Built(model, tokens(), last_logits)


@architecture("Qwen2-MoE", "transformers")
def qwen2_moe():
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = Qwen2MoeConfig(
        **DECODER | NO_SPECIAL_TOKENS,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )
    return _grouped(Qwen2MoeForCausalLM(config))


@architecture("OLMoE", "transformers")
def olmoe():
    from transformers import OlmoeConfig, OlmoeForCausalLM

    config = OlmoeConfig(**DECODER | NO_SPECIAL_TOKENS, num_experts=4, num_experts_per_tok=2)
    return _grouped(OlmoeForCausalLM(config))


@architecture("Switch Transformer encoder", "transformers")
def switch():
    from transformers import SwitchTransformersConfig, SwitchTransformersEncoderModel

    config = SwitchTransformersConfig(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, num_experts=4, expert_capacity=16
    )
    model = SwitchTransformersEncoderModel(config).eval()
    return Built(model, tokens(), lambda output: output.last_hidden_state.mean(dim=1)[:, :3])
