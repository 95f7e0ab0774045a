"""A Parquet shard: rows of numbers, texts, arrays and lists of arrays, written as a whole and read a part at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rl_onoff.errors import OnOffError
from rl_onoff.rundir.files import disk_error, sync

GROUP_ROWS = 32  # of a shard that are compressed, and read, together


def write_shard(shard: Path, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    """Write rows under a temporary name, flush them to the disk and rename the file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {name: _arrow_type(kind) for name, kind in columns.items()}
    arrays = [pa.array([row.get(name) for row in rows], type=kind) for name, kind in types.items()]
    partial = shard.with_name(f".{shard.name}")
    try:
        pq.write_table(pa.table(arrays, names=list(types)), partial, compression="zstd", row_group_size=GROUP_ROWS)
        sync(partial)
        partial.rename(shard)
        sync(shard.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise disk_error(error, shard.parent) from error


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


def num_bytes(value: Any) -> int:
    """Of a row's value: an array, or a list of arrays of one width."""
    if isinstance(value, list) and value:
        return len(value) * num_bytes(value[0])
    return getattr(value, "nbytes", 0)


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
