"""Adapters of ``peft`` on a small GPT-2: the kernel of what is trained, and of everything."""

from __future__ import annotations

from typing import Any

from torch import nn

from .architecture import Built, architecture, tokens
from .language import last_logits


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    return GPT2LMHeadModel(config).eval()


def _adapted(config: Any, pattern: str | None) -> Built:
    from peft import get_peft_model

    model = get_peft_model(_gpt2(), config).eval()
    return Built(model, tokens(), last_logits, None if pattern is None else [pattern])


@architecture("LoRA on GPT-2", "peft")
def lora():
    from peft import LoraConfig

    return _adapted(LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True), "*lora_*")


@architecture("LoRA on GPT-2, all parameters", "peft")
def lora_all():
    from peft import LoraConfig

    return _adapted(LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True), None)


@architecture("DoRA on GPT-2", "peft")
def dora():
    from peft import LoraConfig

    return _adapted(LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True), "*lora_*")


@architecture("IA3 on GPT-2", "peft")
def ia3():
    from peft import IA3Config

    config = IA3Config(target_modules=["c_attn", "c_fc"], feedforward_modules=["c_fc"], fan_in_fan_out=True)
    return _adapted(config, "*ia3_*")


@architecture("VeRA on GPT-2", "peft")
def vera():
    from peft import VeraConfig

    return _adapted(VeraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True), "*vera_*")


@architecture("Prefix tuning on GPT-2", "peft")
def prefix():
    from peft import PrefixTuningConfig

    return _adapted(PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "*prompt_encoder*")


@architecture("Prompt tuning on GPT-2", "peft")
def prompt():
    from peft import PromptTuningConfig

    return _adapted(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "*prompt_encoder*")
