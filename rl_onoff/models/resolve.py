"""A model's name -> something every engine can load: a hub id, or a folder of safetensors; and what its files say.

Engines differ in what they read (SGLang and vLLM want no GGUF, a hub id may be unreachable), so a name is settled once,
here, before any engine starts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

from rl_onoff.errors import OnOffError, UsageError, nearest
from rl_onoff.models.convert import BUILT_IN, CONVERSION, SHA256, SMOLLM2, convert, gguf_name, made_once, make_smollm2
from rl_onoff.sampling import Sampling

OFFLINE = {  # names of exceptions of a hub that cannot be reached
    "OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectError", "ConnectTimeout", "ConnectionError", "ProxyError"
}  # fmt: skip
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # in a mixture's config.json
TAKEN = ("temperature", "top_p", "top_k", "min_p")  # of a model's generation_config.json
PENALTIES = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "typical_p": 1.0}  # with the value that does nothing


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFiles:
    """What an engine is told to load."""

    name: str  # as the user wrote it
    path: str  # a folder with config.json, or a hub id
    revision: str | None = None  # of a hub id


def resolve(name: str, *, revision: str | None = None, key: str = "model.name") -> ModelFiles:
    """Settle `model.name`: hub id, local folder, .gguf file, or the built-in `smollm2`; makes what has to be made."""
    check_name(name, revision=revision, key=key)
    path = Path(name).expanduser().resolve()
    if name == BUILT_IN:
        path = made_once(f"{SMOLLM2}-{SHA256[:8]}-v{CONVERSION}", make_smollm2)
    elif path.is_file():
        path = made_once(gguf_name(path), partial(convert, path))
    elif not path.is_dir():
        return ModelFiles(name=name, path=name, revision=revision)
    return ModelFiles(name=name, path=str(path))


def check_name(name: str, *, revision: str | None = None, key: str = "model.name") -> None:
    """Refuse a name that can be no model; looks at the local disk alone, so that it costs nothing before a run."""
    path = Path(name).expanduser()
    is_gguf = path.is_file() and path.suffix == ".gguf"
    marks = ("config.json", "tokenizer_config.json") if key == "model.tokenizer" else ("config.json",)
    if not name.strip():
        why = f"{key} is empty: set {key}={BUILT_IN}, a hub id, a local folder or a .gguf file"
    elif name != BUILT_IN and path.is_dir() and not any((path / mark).is_file() for mark in marks):
        why = f"the folder {key}={name} has no config.json, so it is not a model: set {key} to a model's folder"
        if (path / "adapter_config.json").is_file():
            why = f"the folder {key}={name} holds an adapter alone: set model.adapter to it, and {key} to the model's"
    elif key == "model.name" and path.is_dir() and (path / "adapter_config.json").is_file():
        has = f"the folder {key}={name} holds an adapter too, which Transformers alone would load"
        why = f"{has}: move the adapter to a folder of its own, and set model.adapter to that"
    elif name == BUILT_IN or path.is_dir() or is_gguf:
        if revision is None:
            return
        why = f"model.revision={revision} is for hub ids, and {key}={name} is not one: set model.revision=null"
    elif path.exists():
        why = f"the file {key}={name} is no model: set {key} to a folder with config.json or to a .gguf file"
    elif name.startswith(("/", "./", "../", "~")) or name in (".", "..") or path.suffix == ".gguf":
        why = f"{key}={name} does not exist: set {key} to an existing folder or .gguf file, or to a hub id"
    elif not is_hub_id(name):
        why = f"{key}={name!r} is neither a folder or .gguf file here, nor a hub id (owner/name): set {key}={BUILT_IN}"
    elif "/" not in name and nearest(name, (BUILT_IN, SMOLLM2), cutoff=0.7):  # few ids have no owner, none like these
        why = f"{key}={name} is neither a folder nor a hub id (owner/name): did you mean {key}={BUILT_IN}?"
    else:
        return
    raise UsageError(why)


def is_hub_id(name: str) -> bool:
    """Whether a name can be an id on the Hugging Face hub: `name` or `owner/name`."""
    pattern = r"(?!.*(--|\.\.))\w([\w.-]{0,94}\w)?(/\w([\w.-]{0,94}\w)?)?"
    return re.fullmatch(pattern, name, re.ASCII) is not None


@contextmanager
def hub_errors(name: str, key: str = "model.name") -> Iterator[None]:
    """Wrap a load from the hub: an exception about the hub becomes one sentence that names the override. Goes by the
    names of the exceptions and by transformers' words, so that nothing is imported to ask."""
    try:
        yield
    except Exception as error:  # whatever it is, it is only translated, never swallowed
        chain: list[BaseException] = [error]
        while (link := chain[-1].__cause__ or chain[-1].__context__) and link not in chain:
            chain.append(link)
        kinds = {type(link).__name__ for link in chain}  # no bases: a worker's BrokenPipeError is a ConnectionError too
        words = " ".join(map(str, chain))
        offline = bool(kinds & OFFLINE) or "couldn't connect to" in words
        absent = bool(kinds & {"RepositoryNotFoundError", "DatasetNotFoundError"})
        if "GatedRepoError" in kinds or "gated repo" in words:
            why = f"is gated on the hub: ask for access there and log in with `hf auth login`, or set another {key}"
        elif "RevisionNotFoundError" in kinds or "not a valid git identifier" in words:
            why = "has no such revision on the hub: set model.revision to one of its branches, tags or commits"
        elif absent or ("not a valid model identifier" in words and not offline):
            why = f"was not found on the hub: correct {key}, or log in with `hf auth login` if it is private"
        elif offline:
            why = f"is not in the local cache and the hub cannot be reached: get online, or set {key} to a folder"
        else:
            raise
        raise UsageError(f"{key}={name} {why}") from error


@contextmanager
def load_errors(name: str, key: str = "model.name", options: str = "") -> Iterator[None]:
    """Wrap a load by transformers: what it says of files that are missing or broken, of a model it does not know, or of
    one of the `options` it was given, becomes one sentence too."""
    from safetensors import SafetensorError

    try:
        with hub_errors(name, key):
            yield
    except UsageError:
        raise
    except (ValueError, TypeError, ImportError, OSError, SafetensorError) as error:  # about files, models or options
        cause = shorten(str(error), 300, placeholder="…").rstrip(".")
        fix = f"fix it, or {options}" if options else "fix it"
        why = f"transformers cannot load {key}={name} ({cause}): {fix}, or set another {key}"
        if "for this kind of AutoModel" in str(error):
            why = f"{key}={name} is no causal language model: set {key} to one that generates text"
        raise UsageError(why) from error


def load_tokenizer(
    model_name: str, *, tokenizer: str | None = None, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """The transformers tokenizer of `tokenizer`, or else of the model; pads on the left, as batched decoding needs."""
    import transformers

    key = "model.tokenizer" if tokenizer else "model.name"
    files = resolve(tokenizer or model_name, revision=None if tokenizer else revision, key=key)
    with load_errors(files.name, key):
        loaded = transformers.AutoTokenizer.from_pretrained(
            files.path, revision=files.revision or "main", trust_remote_code=trust_remote_code, padding_side="left"
        )
    if loaded.pad_token_id is None and loaded.eos_token_id is not None:
        loaded.pad_token = loaded.eos_token
    return loaded


def read_json_of(name: str, file: str, revision: str | None = None) -> dict[str, Any]:
    """One of a model's JSON files; empty where it has none."""
    from transformers.utils.hub import cached_file

    files = resolve(name, revision=revision)
    with hub_errors(name):
        options = {"revision": files.revision or "main", "_raise_exceptions_for_missing_entries": False}
        path = cached_file(files.path, file, **options)
    return {} if path is None else json.loads(Path(path).read_text(encoding="utf-8"))


def context_length(config: Any) -> int:
    """Most tokens a model's config allows for; a million where it sets no limit."""
    config = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_sequence_length")
    return next((int(limit) for name in names if (limit := getattr(config, name, None))), 1_000_000)


def model_shape(model_name: str, revision: str | None = None, trust_remote_code: bool = False) -> tuple[int, int]:
    """(number of decoder layers, hidden size) of a model, by its config."""
    import transformers

    files = resolve(model_name, revision=revision)
    with load_errors(files.name):
        found = transformers.AutoConfig.from_pretrained(
            files.path, revision=files.revision or "main", trust_remote_code=trust_remote_code
        )
    config = found.get_text_config()
    return config.num_hidden_layers, config.hidden_size


def num_experts(model_name: str, revision: str | None = None) -> int:
    """Experts of each layer of a mixture, by the model's config.json; 0 for a dense model."""
    config = read_json_of(model_name, "config.json", revision)
    config = config.get("text_config") or config
    return max((num for name in EXPERTS if isinstance(num := config.get(name), int)), default=0)


def end_ids(eos_token_id: int | Sequence[int] | None, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end a response: the model's own list (its generation config) and the tokenizer's EOS."""
    ids = {*(eos_token_id if isinstance(eos_token_id, Sequence) else [eos_token_id]), tokenizer.eos_token_id}
    return tuple(sorted(token_id for token_id in ids if token_id is not None))


def model_sampling(sampling: Sampling, model_name: str, revision: str | None = None) -> Sampling:
    """`sampling` with what the model's generation_config.json says instead; UsageError for what no sampler does."""
    from transformers import GenerationConfig

    files = resolve(model_name, revision=revision)
    try:
        with hub_errors(files.name):
            found = GenerationConfig.from_pretrained(files.path, revision=files.revision or "main")
    except OSError as error:
        why = f"model.name={model_name} has no generation_config.json: set model.sampling_defaults=false"
        raise UsageError(why) from error
    for name, nothing in PENALTIES.items():
        if (value := getattr(found, name, None)) not in (None, nothing):
            why = f"the model's generation_config.json asks for {name}={value}, which no sampler here does"
            raise UsageError(f"{why}: set model.sampling_defaults=false")
    return sampling.replace(**{name: value for name in TAKEN if (value := getattr(found, name, None)) is not None})


def different_tensors(a: tuple[str, str | None], b: tuple[str, str | None]) -> list[str]:
    """Names of the tensors in which two local safetensors models differ, each given as (name, revision), without
    loading a model; empty where it cannot be told (a hub id, other shapes). Compares bytes: NaN is NaN, -0 not 0."""
    import torch
    from safetensors import SafetensorError, safe_open

    def file_of_tensors(name: str, revision: str | None) -> dict[str, Any]:
        folder = Path(resolve(name, revision=revision).path)
        found = [files.enter_context(safe_open(file, "pt")) for file in sorted(folder.glob("*.safetensors"))]
        return {name: file for file in found for name in file.keys()}  # noqa: SIM118

    different = []
    try:
        with ExitStack() as files:
            ours, theirs = file_of_tensors(*a), file_of_tensors(*b)
            for name in sorted({*ours, *theirs}):
                one, other = ours[name].get_tensor(name), theirs[name].get_tensor(name)
                if (one.dtype, one.shape) != (other.dtype, other.shape):
                    return []
                if not torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8)):
                    different.append(name)
    except (OnOffError, OSError, SafetensorError, KeyError):  # a KeyError: only one of them has the tensor
        return []
    return different
