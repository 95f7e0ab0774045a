"""Files that are there whole or not at all, and one sentence for what a disk can do wrong."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from rl_onoff.errors import OnOffError

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def disk_error(error: OSError, path: Path) -> OnOffError:
    """One sentence for what a disk can do wrong."""
    if error.errno in FULL_DISK:
        return OnOffError(
            f"the disk that holds {path} is full ({os.strerror(error.errno)}): free some space and go on with the same"
            " run_dir, nothing written is lost; or set run_dir to a folder on another disk"
        )
    return OnOffError(f"cannot write to {path} ({error.strerror or error}): set run_dir to a folder you can write to")


def write_whole(file: Path, text: str) -> Path:
    """Replace a text file in one step, so that a reader never sees half of it."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")  # jobs of a sweep side by side write multirun.yaml
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        partial.replace(file)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise disk_error(error, file.parent) from error
    return file


def read_json(file: Path) -> Any:
    """The content of a small file of ours, None when it is not there."""
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    except (ValueError, OSError) as error:
        raise OnOffError(f"{file} cannot be read ({error}): restore it, or set run_dir to a new folder") from error


def content_of(file: Path) -> str:
    """A hash of a file's content: what rows made from the file depend on."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
