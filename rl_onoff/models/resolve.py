"""A model's name -> something every engine can load: a hub id, or a folder of safetensors.

Engines differ in what they read (SGLang and vLLM want no GGUF, a hub id may be unreachable), so a name is settled once,
here, before any engine starts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rl_onoff.errors import UsageError, nearest
from rl_onoff.models.builtin import BUILT_IN, SMOLLM2, from_gguf, smollm2

MAX_CAUSE = 300  # characters of what another program says of a failure

_HUB_ID = re.compile(r"(?!.*(--|\.\.))\w([\w.-]{0,94}\w)?(/\w([\w.-]{0,94}\w)?)?", re.ASCII)
OFFLINE = {  # names of exceptions of a hub that cannot be reached
    "OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectError", "ConnectTimeout", "ConnectionError", "ProxyError"
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFiles:
    """What an engine is told to load."""

    name: str  # as the user wrote it
    path: str  # a folder with config.json, or a hub id
    revision: str | None = None  # of a hub id

    @property
    def is_local(self) -> bool:
        return os.path.isabs(self.path)

    @property
    def label(self) -> str:
        """A short name that can be part of a file name; equal weights under one name have one label."""
        return SMOLLM2 if self.name == BUILT_IN else Path(self.name).name.removesuffix(".gguf")


def resolve(name: str, *, revision: str | None = None, key: str = "model.name") -> ModelFiles:
    """Settle `model.name`: hub id, local folder, .gguf file, or the built-in `smollm2`; makes what has to be made."""
    check_name(name, revision=revision, key=key)
    path = Path(name).expanduser()
    if name == BUILT_IN:
        found = smollm2()
    elif path.is_dir():
        found = path.resolve()
    elif path.is_file():
        found = from_gguf(path.resolve())
    else:
        return ModelFiles(name=name, path=name, revision=revision)
    return ModelFiles(name=name, path=str(found))


def check_name(name: str, *, revision: str | None = None, key: str = "model.name") -> None:
    """Refuse a name that can be no model; looks at the local disk alone, so that it costs nothing before a run."""
    path = Path(name).expanduser()
    is_gguf = path.is_file() and path.suffix == ".gguf"
    marks = ("config.json", "tokenizer_config.json") if key == "model.tokenizer" else ("config.json",)
    if not name.strip():
        why = f"{key} is empty: set {key}={BUILT_IN}, a hub id, a local folder or a .gguf file"
    elif name != BUILT_IN and path.is_dir() and not any((path / mark).is_file() for mark in marks):
        adapter = (path / "adapter_config.json").is_file()
        lacks = "holds an adapter alone" if adapter else "has no config.json, so it is not a model"
        why = f"the folder {key}={name} {lacks}: set {key} to a model's folder"
    elif name == BUILT_IN or path.is_dir() or is_gguf:
        if revision is None:
            return
        why = f"model.revision={revision} is for hub ids, and {key}={name} is not one: set model.revision=null"
    elif path.exists():
        why = f"the file {key}={name} is no model: set {key} to a folder with config.json or to a .gguf file"
    elif name.startswith(("/", "./", "../", "~")) or name in (".", "..") or path.suffix == ".gguf":
        why = f"{key}={name} does not exist: set {key} to an existing folder or .gguf file, or to a hub id"
    elif not is_hub_id(name):
        why = (
            f"{key}={name!r} is neither an existing folder or .gguf file, nor a hub id (owner/name), nor the built-in"
            f" {BUILT_IN}: set {key}={BUILT_IN}, for example"
        )
    elif "/" not in name and nearest(name, (BUILT_IN, SMOLLM2), cutoff=0.7):
        # the hub's ids without an owner are few, none like these
        why = (
            f"{key}={name} is neither a folder nor a hub id (owner/name): did you mean {key}={BUILT_IN}, the built-in?"
        )
    else:
        return
    raise UsageError(why)


def is_hub_id(name: str) -> bool:
    """Whether a name can be an id on the Hugging Face hub: `name` or `owner/name`."""
    return _HUB_ID.fullmatch(name) is not None


# Errors of the hub


def hub_error(error: BaseException, name: str, key: str = "model.name") -> UsageError | None:
    """The sentence for an exception raised during a fetch from the hub; None when it is about something else.

    Goes by the names of the exceptions and by transformers' words, so that nothing is imported to ask.
    """
    chain, kinds = [], set()
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        kinds.add(type(link).__name__)  # not its bases: a worker's BrokenPipeError is a ConnectionError too
        link = link.__cause__ or link.__context__
    words = " ".join(str(link) for link in chain)
    offline = bool(kinds & OFFLINE) or "couldn't connect to" in words
    if "GatedRepoError" in kinds or "gated repo" in words:
        why = f"is gated on the hub: ask for access on its page and log in with `hf auth login`, or set another {key}"
    elif "RevisionNotFoundError" in kinds or "not a valid git identifier" in words:
        why = "has no such revision on the hub: set model.revision to one of its branches, tags or commits"
    elif kinds & {"RepositoryNotFoundError", "DatasetNotFoundError"} or (
        "not a valid model identifier" in words and not offline
    ):
        why = f"was not found on the hub: correct {key}, or log in with `hf auth login` if it is private"
    elif offline:
        why = (
            f"is not in the local cache and the hub cannot be reached: connect to the network, or set {key} to a folder"
        )
    else:
        return None
    return UsageError(f"{key}={name} {why}")


@contextmanager
def hub_errors(name: str, key: str = "model.name") -> Iterator[None]:
    """Wrap a load from the hub: its exceptions become one sentence that names the override."""
    try:
        yield
    except Exception as error:  # whatever it is, it is only translated, never swallowed
        known = hub_error(error, name, key)
        if known is None:
            raise
        raise known from error


@contextmanager
def load_errors(name: str, key: str = "model.name", options: str = "") -> Iterator[None]:
    """Wrap a load by transformers: what it says of files that are missing or broken, of a model it does not know, or of
    one of the `options` it was given, becomes one sentence too."""
    try:
        with hub_errors(name, key):
            yield
    except UsageError:
        raise
    except Exception as error:  # translated where it is about files, models or options, and never swallowed
        about_files = isinstance(error, ValueError | TypeError | ImportError | OSError)
        if not about_files and type(error).__name__ != "SafetensorError":
            raise
        cause = " ".join(str(error).split())
        if "for this kind of AutoModel" in cause:
            why = f"{key}={name} is no causal language model: set {key} to one that generates text"
        else:
            cause = cause if len(cause) <= MAX_CAUSE else f"{cause[:MAX_CAUSE]}…"
            fix = f"fix it, or {options}" if options else "fix it"
            why = f"transformers cannot load {key}={name} ({cause.rstrip('.')}): {fix}, or set another {key}"
        raise UsageError(why) from error
