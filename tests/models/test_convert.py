"""What a GGUF file says of its tokenizer holds in the folder made of it, and its weights keep every bit."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from rl_onoff.errors import UsageError
from rl_onoff.models import convert as module
from rl_onoff.models.convert import convert
from tests.models.gguf_files import HEADS, HIDDEN, SPM, byte_level, write_gguf

BPE = byte_level()
START, END, TURN = BPE.index("<|start|>"), BPE.index("<|end|>"), BPE.index("<|turn|>")


def converted(tmp_path: Path, kind: str = "gpt2", **metadata):
    """The tokenizer and the generation config of the folder, as every engine reads them."""
    from transformers import AutoTokenizer, GenerationConfig

    write_gguf(tmp_path / "m.gguf", kind, **({"pre": "gpt-2"} if kind == "gpt2" else {}) | metadata)
    (tmp_path / "made").mkdir()
    convert(tmp_path / "m.gguf", tmp_path / "made")
    return AutoTokenizer.from_pretrained(tmp_path / "made"), GenerationConfig.from_pretrained(tmp_path / "made")


def spm(*tokens: str) -> list[int]:
    return [SPM.index(token) for token in tokens]


@pytest.mark.parametrize(
    ("metadata", "before", "after"),
    [
        ({}, [1], []),  # llama.cpp's default for this kind
        ({"add_bos_token": True}, [1], []),
        ({"add_bos_token": False}, [], []),
        ({"add_eos_token": True}, [1], [2]),
        ({"add_bos_token": False, "add_eos_token": True}, [], [2]),
        ({"bos_token_id": 267, "add_bos_token": True}, [267], []),
    ],
)
def test_bos_and_eos_of_a_sentencepiece_file(metadata, before, after, tmp_path):
    tokenizer, _ = converted(tmp_path, "llama", **metadata)
    assert tokenizer("abab").input_ids == before + spm("▁ab", "ab") + after
    assert tokenizer.encode("abab", add_special_tokens=False) == spm("▁ab", "ab")


@pytest.mark.parametrize(
    ("metadata", "before", "after"),
    [
        ({}, [], []),
        ({"add_bos_token": True}, [START], []),
        ({"add_bos_token": True, "add_eos_token": True}, [START], [END]),
        ({"pre": "llama-bpe"}, [START], []),  # whose default is another
        ({"pre": "llama-bpe", "add_bos_token": False}, [], []),
    ],
)
def test_bos_and_eos_of_a_byte_level_file(metadata, before, after, tmp_path):
    tokenizer, _ = converted(tmp_path, **metadata)
    assert tokenizer("ab").input_ids == [*before, BPE.index("ab"), *after]


@pytest.mark.parametrize(
    ("add", "ids"),
    [
        (True, [spm("▁ab"), spm("▁", "▁ab"), spm("▁ab", "</s>", "▁ab")]),
        (False, [spm("ab"), spm("▁ab"), spm("ab", "</s>", "ab")]),
    ],
)
def test_the_space_before_a_text(add, ids, tmp_path):
    tokenizer, _ = converted(tmp_path, "llama", add_space_prefix=add, add_bos_token=False)
    for text, expected in zip(("ab", " ab", "ab</s>ab"), ids, strict=True):
        assert tokenizer(text).input_ids == expected
        assert tokenizer.decode(expected).replace("</s> ab", "</s>ab") == text


def test_a_gemma_file_with_its_bos_and_its_runs_of_spaces(tmp_path):
    """Without its BOS, Gemma 3 answers every text with "The The The"."""
    chat_end = {"add_bos_token": True, "add_eos_token": False, "eot_token_id": 267}
    tokenizer, generation = converted(tmp_path, "llama", arch="gemma3", add_space_prefix=False, **chat_end)
    spaces, lines = len(SPM), len(SPM) + 1
    assert tokenizer("ab  c\n\n").input_ids == [1, *spm("ab"), spaces, *spm("c"), lines]
    assert tokenizer.decode(tokenizer("ab  c\n\n").input_ids, skip_special_tokens=True) == "ab  c\n\n"
    assert generation.eos_token_id == [2, 267]


def test_bytes_outside_of_the_vocabulary_come_back(tmp_path):
    tokenizer, _ = converted(tmp_path, "llama", add_bos_token=False)
    assert tokenizer("ä").input_ids == spm("▁", "<0xC3>", "<0xA4>")
    assert tokenizer.decode(tokenizer("ä").input_ids) == "ä"


@pytest.mark.parametrize(
    ("pre", "text", "tokens"),
    [
        ("gpt-2", "12", ["12"]),
        ("smollm", "\n\n12", ["Ċ", "Ċ", "1", "2"]),
        ("starcoder", "12", ["1", "2"]),
        ("qwen2", "12", ["1", "2"]),
        ("llama-bpe", "12", ["12"]),
        ("llama-bpe", "abc", ["abc"]),  # a whole word, though no merge makes it
        ("gpt-2", "abc", ["ab", "c"]),
    ],
)
def test_the_pre_tokeniser_that_the_file_names(pre, text, tokens, tmp_path):
    tokenizer, _ = converted(tmp_path, pre=pre)
    assert tokenizer.tokenize(text) == tokens


def test_a_pre_tokeniser_that_nobody_knows_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"pre-tokeniser 'frobnicate' is unknown .*set model\.name") as caught:
        converted(tmp_path, pre="frobnicate")
    assert "\n" not in str(caught.value)


def test_a_file_without_the_name_of_its_pre_tokeniser_is_told(tmp_path, caplog):
    write_gguf(tmp_path / "m.gguf")
    with caplog.at_level(logging.WARNING, logger=module.__name__):
        convert(tmp_path / "m.gguf", tmp_path)
    assert "names no pre-tokeniser" in caplog.text


@pytest.mark.parametrize(
    ("metadata", "ends"),
    [
        ({}, END),
        ({"eot_token_id": END}, END),
        ({"eot_token_id": TURN}, [END, TURN]),
        ({"eot_token_id": TURN, "eom_token_id": START}, [END, TURN, START]),
    ],
)
def test_every_id_that_ends_a_response(metadata, ends, tmp_path):
    tokenizer, generation = converted(tmp_path, **metadata)
    assert generation.eos_token_id == ends and tokenizer.eos_token_id == END


def test_special_tokens_and_the_chat_template(tmp_path):
    template = "{{ bos_token }}{% for m in messages %}<|turn|>{{ m.content }}{% endfor %}"
    tokenizer, generation = converted(
        tmp_path, padding_token_id=TURN, unknown_token_id=START, add_bos_token=True, chat_template=template
    )
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (START, END)
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id) == (TURN, START)
    assert (generation.bos_token_id, generation.pad_token_id) == (START, TURN)
    assert tokenizer.chat_template == template and tokenizer.model_max_length == 64
    chat = [{"role": "user", "content": "ab"}]
    assert tokenizer.apply_chat_template(chat)["input_ids"] == [START, TURN, BPE.index("ab")]


def test_a_control_token_outside_of_the_byte_alphabet_is_one_token(tmp_path):
    tokenizer, _ = converted(tmp_path)
    assert tokenizer("ab<｜User｜>ab").input_ids == [BPE.index("ab"), BPE.index("<｜User｜>"), BPE.index("ab")]
    assert len(tokenizer) == len(BPE) and tokenizer.decode([BPE.index("<｜User｜>")]) == "<｜User｜>"
    assert tokenizer.decode([BPE.index("<｜User｜>")], skip_special_tokens=True) == ""


def test_a_special_token_outside_of_the_vocabulary_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"cannot be read .*set model\.name"):
        converted(tmp_path, eos_token_id=9999)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma3"])
@pytest.mark.parametrize("quantised", [None, "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "F16", "BF16"])
def test_weights_have_the_same_bits_as_by_transformers(quantised, arch, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    tokenizer = {"kind": "gpt2", "pre": "qwen2"} if arch.startswith("qwen") else {"kind": "llama"}
    size = len(BPE if arch.startswith("qwen") else SPM)
    output = [("output.weight", np.random.default_rng(1).normal(size=(size, HIDDEN)).astype(np.float32))]
    tensors = output if arch in ("llama", "qwen3") else ()  # the others' LM heads are their embeddings
    write_gguf(tmp_path / "m.gguf", arch=arch, kv_heads=1, quantised=quantised, tensors=tensors, **tokenizer)
    convert(tmp_path / "m.gguf", tmp_path)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=ours.dtype, quantization_config=GgufConfig(dequantize=True)
    )
    assert ours.dtype == {None: torch.float32, "F16": torch.float16}.get(quantised, torch.bfloat16)
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys() and HEADS > 1
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    configs = [model.config.to_dict() for model in (ours, theirs)]
    for config in configs:
        for key in ("_name_or_path", "architectures", "quantization_config"):
            config.pop(key, None)
    assert configs[0] == configs[1]


def test_a_weight_without_a_place_is_refused(tmp_path):
    bias = [("blk.0.attn_q.bias", np.ones(HIDDEN, np.float32))]
    write_gguf(tmp_path / "m.gguf", "llama", tensors=bias)
    with pytest.raises(UsageError, match=r"no place for blk\.0\.attn_q\.bias"):
        convert(tmp_path / "m.gguf", tmp_path)


def test_the_rotary_scaling_of_llama_3(tmp_path):
    from transformers import AutoModelForCausalLM

    half = HIDDEN // HEADS // 2
    plain = 10000.0 ** (-np.arange(half) / half)
    scale = np.clip((8192 * plain / (2 * np.pi) - 1) / (4 - 1), 0, 1)  # 0: full scaling, 1: none
    factors = 1 / ((1 - scale) / 32 + scale)
    assert factors.min() == 1 and factors.max() == 32 and len(set(factors)) > 2
    write_gguf(tmp_path / "m.gguf", "llama", tensors=[("rope_freqs.weight", factors.astype(np.float32))])
    convert(tmp_path / "m.gguf", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    np.testing.assert_allclose(model.model.rotary_emb.inv_freq.numpy(), plain / factors, rtol=1e-4)

    write_gguf(tmp_path / "m.gguf", "llama", tensors=[("rope_freqs.weight", np.arange(1, half + 1, dtype=np.float32))])
    with pytest.raises(UsageError, match=r"rotary scaling is not Llama 3's.*set model\.name"):
        convert(tmp_path / "m.gguf", tmp_path)
