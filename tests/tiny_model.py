"""A random two-layer Llama with the built-in model's tokenizer: what engines run in the tests, and in
benchmarks/flips.py."""

from __future__ import annotations

from pathlib import Path


def make(folder: Path, tokenizer_from: str) -> str:
    """The model's folder. Its heads can be split over two devices, and its responses end now and then."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_from)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # a distribution that is not flat
        model.lm_head.weight[tokenizer.eos_token_id].mul_(1.7)  # the end token is now and then a likely one
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
