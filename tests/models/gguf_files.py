"""Small GGUF files: a random Llama of one layer with a tokenizer of either kind, and the metadata a test wants."""

from __future__ import annotations

from pathlib import Path

import numpy as np

HIDDEN, HEADS, FEED_FORWARD = 32, 2, 64
BYTES = [f"<0x{i:02X}>" for i in range(256)]
SPM = ["<unk>", "<s>", "</s>", *BYTES, "▁", "a", "b", "c", "1", "2", "ab", "▁ab", "<|end|>"]
SPM_TYPES = [2, 3, 3, *[6] * 256, *[1] * 8, 3]


def byte_level() -> list[str]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return [*bytes_to_unicode().values(), "<|start|>", "<|end|>", "ab", "12", "abc", "<|turn|>", "<｜User｜>"]


BPE_TYPES = [*[1] * 256, 3, 3, 1, 1, 1, 3, 3]


def write_gguf(
    file: Path, kind: str = "gpt2", *, arch="llama", kv_heads: int = HEADS, quantised=None, tensors=(), **metadata
) -> dict[str, np.ndarray]:
    """Write the file and return its weights; `metadata` has keys of `tokenizer.ggml`, or `chat_template`."""
    import gguf

    tokens, types = (SPM, SPM_TYPES) if kind == "llama" else (byte_level(), BPE_TYPES)
    random = np.random.default_rng(0)
    head = 128 if arch == "qwen3" else HIDDEN // HEADS  # transformers reads no width of a head from a Qwen 3 file
    kv = head * kv_heads
    shapes = {
        "token_embd": (len(tokens), HIDDEN),
        "output_norm": (HIDDEN,),
        "blk.0.attn_norm": (HIDDEN,),
        "blk.0.ffn_norm": (HIDDEN,),
        "blk.0.attn_q": (head * HEADS, HIDDEN),
        "blk.0.attn_k": (kv, HIDDEN),
        "blk.0.attn_v": (kv, HIDDEN),
        "blk.0.attn_output": (HIDDEN, head * HEADS),
        "blk.0.ffn_gate": (FEED_FORWARD, HIDDEN),
        "blk.0.ffn_up": (FEED_FORWARD, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, FEED_FORWARD),
    }
    if arch == "gemma3":
        tokens, types = (
            [*tokens, "  ", "\n\n"],
            [*types, 4, 4],
        )  # runs of spaces are user-defined tokens, spelled as spaces
        shapes["token_embd"] = (len(tokens), HIDDEN)
        shapes |= {f"blk.0.post_{name}_norm": (HIDDEN,) for name in ("attention", "ffw")}
    if arch in ("gemma3", "qwen3"):
        shapes |= {f"blk.0.attn_{name}_norm": (head,) for name in "qk"}
    biases = {f"blk.0.attn_{name}.bias": shapes[f"blk.0.attn_{name}"][:1] for name in "qkv" if arch == "qwen2"}
    weights = {f"{name}.weight": random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    weights |= {name: random.normal(size=shape).astype(np.float32) for name, shape in biases.items()}
    writer = gguf.GGUFWriter(file, arch)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_key_length(HIDDEN // HEADS)
    writer.add_sliding_window(32)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if kind == "llama":
        writer.add_token_scores([-float(i) for i in range(len(tokens))])
    else:
        writer.add_token_merges(["a b", "1 2"])
    ids = {"bos_token_id": 1, "eos_token_id": 2} if kind == "llama" else {"bos_token_id": 256, "eos_token_id": 257}
    template = metadata.pop("chat_template", None)
    if template is not None:
        writer.add_chat_template(template)
    for key, value in (ids | metadata).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}[type(value)]
        add(f"tokenizer.ggml.{key}", value)
    for name, weight in (*weights.items(), *tensors):
        if quantised and weight.ndim == 2:
            type_ = gguf.GGMLQuantizationType[quantised]
            writer.add_tensor(name, gguf.quantize(weight, type_), raw_dtype=type_)
        else:
            writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights
