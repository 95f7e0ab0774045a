"""Files that are there whole or not at all: texts, and Parquet shards of numbers, texts and arrays of 1 or 2 axes."""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rl_onoff.errors import OnOffError, one_line

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def disk_error(error: OSError, path: Path) -> OnOffError:
    """One sentence for what a disk can do wrong."""
    if error.errno in FULL_DISK:
        fix = "free space and go on with the same run_dir, nothing written is lost; or set a run_dir on another disk"
        return OnOffError(f"the disk that holds {path} is full ({os.strerror(error.errno)}): {fix}")
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

    arrays = {name: _column(kind, [row.get(name) for row in rows]) for name, kind in columns.items()}
    leaves = {name: name + ".list.element" * kind.count("list<") for name, kind in columns.items()}
    apart = [leaves.pop(name) for name, kind in columns.items() if kind.rstrip(">").endswith("float32")]
    # floats have their bytes of equal weight side by side: a third smaller, and none is worth a dictionary
    encodings = {"use_dictionary": [*leaves.values()], "column_encoding": dict.fromkeys(apart, "BYTE_STREAM_SPLIT")}
    with whole(shard) as partial:
        pq.write_table(pa.table(arrays), partial, compression="zstd", **encodings)


def read_shard(shard: Path, columns: Sequence[str] | None = None, numbers: list[int] | None = None) -> Iterator[Any]:
    """The rows of a shard, as dicts of these columns, or of all; those with these numbers, counted from 0, or all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(shard) as file:  # read_table would take a folder `n=1` of a sweep for a column
            table = file.read(columns=columns)
        if numbers is not None and numbers != list(range(len(table))):
            table = table.take(numbers)
        for cells in zip(*table.columns, strict=True):
            yield dict(zip(table.column_names, map(_value, cells), strict=True))
    except (pa.ArrowException, OSError) as error:  # of the file: what is done with a row is not inside this block
        fix = "restore it, or delete it and what it held is made again"
        raise OnOffError(f"{shard} cannot be read ({one_line(error)}): {fix}") from error


def _column(kind: str, cells: Sequence[Any]) -> Any:
    """An Arrow column of numbers, texts, or arrays of one or two axes; None is null. Made of buffers, since pyarrow's
    own conversion imports pandas first, and takes an array of two axes row by row."""
    import numpy as np
    import pyarrow as pa

    def ends(lengths: Any) -> Any:
        """Where each of many lists or texts begins in the values of all, and where the last one ends."""
        found = np.append(0, np.cumsum(lengths, dtype=np.int64))
        if found[-1] >= 1 << 31:
            raise pa.ArrowCapacityError("a shard cannot hold 2^31 numbers of a column")
        return pa.py_buffer(found.astype(np.int32))

    def numbers(kind: str, values: Any, valid: Any = None) -> Any:
        if kind == "bool":
            made = np.packbits(np.asarray(values, bool), bitorder="little")
        else:
            made = np.ascontiguousarray(values, kind)
            if made.dtype.kind == "i" and (made != values).any():
                raise pa.ArrowInvalid(f"a column of {kind} cannot hold all of its numbers")
        return pa.Array.from_buffers(pa.type_for_alias(kind), len(values), [valid, pa.py_buffer(made)])

    there, count = np.array([cell is not None for cell in cells], bool), len(cells)
    valid = None if there.all() else pa.py_buffer(np.packbits(there, bitorder="little"))
    if kind != "string" and not kind.startswith("list<"):
        return numbers(kind, np.array([0 if cell is None else cell for cell in cells]), valid)
    given: list[Any] = [cell.encode() if kind == "string" else np.asarray(cell) for cell in cells if cell is not None]
    lengths = np.zeros(count, np.int64)
    lengths[there] = [len(cell) for cell in given]
    if kind == "string":
        return pa.Array.from_buffers(pa.string(), count, [valid, ends(lengths), pa.py_buffer(b"".join(given))])
    inner = kind.removeprefix("list<").removesuffix(">")
    leaf = inner.removeprefix("list<").removesuffix(">")
    values = numbers(leaf, np.concatenate([cell.ravel() for cell in given] or [np.zeros(0, bool)]))
    if leaf != inner:
        widths = np.repeat([cell.shape[1] for cell in given], [len(cell) for cell in given])
        values = pa.Array.from_buffers(pa.list_(values.type), len(widths), [None, ends(widths)], children=[values])
    return pa.Array.from_buffers(pa.list_(values.type), count, [valid, ends(lengths)], children=[values])


def _value(cell: Any) -> Any:
    """An Arrow cell as a number, a text or a numpy array, of (T, K) for lists of lists; None where it is null."""
    import pyarrow as pa

    if not cell.is_valid or not isinstance(cell, pa.ListScalar):
        return cell.as_py()
    if not pa.types.is_list(cell.values.type):
        return _numbers(cell.values).copy()
    # a view of the shard's memory, for lists of top tokens are most of it
    return _numbers(cell.values.flatten()).reshape(len(cell.values), -1 if len(cell.values) else 0)


def _numbers(array: Any) -> Any:
    """A view of an Arrow array's memory; pyarrow's own imports pandas first."""
    import numpy as np
    import pyarrow as pa

    if pa.types.is_boolean(array.type) or array.null_count or not len(array):  # bits, which are no numpy array
        return np.array(array.to_pylist(), array.type.to_pandas_dtype())
    numbers = np.frombuffer(array.buffers()[1], array.type.to_pandas_dtype())
    return numbers[array.offset : array.offset + len(array)]
