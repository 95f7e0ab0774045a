"""Files that are there whole or not at all: small texts, and Parquet shards, whose rows hold numbers, texts and arrays
of one or two axes. One sentence for what a disk can do wrong."""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rl_onoff.errors import OnOffError

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
GROUP_ROWS = 32  # of a shard that are compressed, and read, together


def disk_error(error: OSError, path: Path) -> OnOffError:
    """One sentence for what a disk can do wrong."""
    if error.errno in FULL_DISK:
        return OnOffError(
            f"the disk that holds {path} is full ({os.strerror(error.errno)}): free some space and go on with the same"
            " run_dir, nothing written is lost; or set run_dir to a folder on another disk"
        )
    return OnOffError(f"cannot write to {path} ({error.strerror or error}): set run_dir to a folder you can write to")


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """A temporary path that takes the place of `file`, flushed to the disk, when what is written to it is complete."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")  # jobs of a sweep side by side write multirun.yaml
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        sync(partial)
        partial.replace(file)
        sync(file.parent)
    except OSError as error:
        raise disk_error(error, file.parent) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_whole(file: Path, text: str) -> Path:
    """Replace a text file in one step, so that a reader never sees half of it."""
    with whole(file) as partial:
        partial.write_text(text, encoding="utf-8")
    return file


def write_csv(file: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write a table; its columns are the keys of all rows, in the order of their first row."""
    with whole(file) as partial, partial.open("w", encoding="utf-8", newline="") as stream:
        table = csv.DictWriter(stream, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
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


def write_shard(shard: Path, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    """Write rows as a shard."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {name: _arrow_type(kind) for name, kind in columns.items()}
    arrays = [pa.array([_lists(row.get(name)) for row in rows], type=kind) for name, kind in types.items()]
    with whole(shard) as partial:
        pq.write_table(pa.table(arrays, names=list(types)), partial, compression="zstd", row_group_size=GROUP_ROWS)


def read_shard(shard: Path, parts: Callable[[Any], Iterator[Any]]) -> Iterator[dict[str, Any]]:
    """The rows of some parts (of the open file) of a shard."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(shard) as file:
            for part in parts(file):
                values = {name: _values(part.column(name)) for name in part.schema.names}
                for i in range(part.num_rows):
                    yield {name: column[i] for name, column in values.items()}
    except (pa.ArrowException, OSError) as error:  # of the file: what is done with a row is not inside this block
        cause = " ".join(str(error).split()).rstrip(".")
        raise OnOffError(
            f"{shard} cannot be read ({cause}): restore it, or delete it and what it held is made again"
        ) from error


def _lists(value: Any) -> Any:
    """A row's value as Arrow takes it, which knows no (T, K) arrays."""
    return list(value) if getattr(value, "ndim", 1) == 2 else value


def _arrow_type(kind: str) -> Any:
    import pyarrow as pa

    return pa.list_(_arrow_type(kind[5:-1])) if kind.startswith("list<") else getattr(pa, kind)()


def _values(column: Any) -> list[Any]:
    """An Arrow column as Python values: numbers and texts, numpy arrays for lists, (T, K) arrays for lists of lists."""
    import pyarrow as pa

    if not pa.types.is_list(column.type):
        return column.to_pylist()
    nested = pa.types.is_list(column.type.value_type)
    return [_array(item.values, nested) if item.is_valid else None for item in column]


def _array(values: Any, nested: bool) -> Any:
    array = (values.flatten() if nested else values).to_numpy(zero_copy_only=False).copy()
    if not nested:
        return array
    return array.reshape(len(values), -1) if len(values) else array.reshape(0, 0)
