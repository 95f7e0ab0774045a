"""A run on disk. What is done is what the shards hold: there is no second record to disagree with them.

A table is a folder of Parquet shards. A shard is written under a temporary name, flushed to the disk and renamed, so a crash
leaves whole shards only. Beside them lies `_made_with.json`: what the rows depend on; rows that another config would have made
are refused, with the difference shown. Columns are documented in docs/run_folder.md.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rl_onoff.errors import OnOffError, UsageError
from rl_onoff.redaction import redact, secret_values
from rl_onoff.rundir.files import disk_error, read_json, sync, write_whole
from rl_onoff.types import FinishReason, LogprobKind, Rollout, TokenScores

COLUMNS: dict[str, dict[str, str]] = {
    "completions": {
        "request_id": "string",
        "sample": "int32",
        "prompt": "string",
        "prompt_ids": "list<int32>",
        "token_ids": "list<int32>",
        "text": "string",
        "logprobs": "list<float32>",
        "logprob_kind": "string",
        "finish_reason": "string",
        "reward": "float64",
        "meta": "string",
    },
    "scores": {
        "request_id": "string",
        "sample": "int32",
        "token_ids": "list<int32>",
        "logprobs": "list<float32>",
        "logprob_kind": "string",
        "entropy": "list<float32>",
        "logsumexp": "list<float32>",
        "rank": "list<int32>",
        "top_ids": "list<list<int32>>",
        "top_logprobs": "list<list<float32>>",
        "processed_logprobs": "list<float32>",
        "nucleus_mass": "list<float32>",
        "logits": "list<list<float32>>",
    },
}

RECORD = "_made_with.json"  # the underscore keeps it out of pandas.read_parquet(folder)

LOCK = ".lock"
GROUP_ROWS = 32  # of a shard that are compressed, and read, together
SHARD_BYTES = 64 << 20  # of arrays in a shard before compression: what a writer holds

Row = dict[str, Any]
Key = tuple[str, int]


class RunDir:
    """The folder of one run: `completions/`, `scores/<name>/`, `metrics.json`, `report.html`, `run.log`, `.hydra/`."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from writing here meanwhile; UsageError when one does already."""
        from filelock import FileLock, Timeout

        lock = FileLock(self.path / LOCK)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout as error:
            raise UsageError(
                f"another process is writing to {self.path}: wait until it is done, or set run_dir (sweep_dir of a sweep) to another folder"
            ) from error
        except OSError as error:
            raise disk_error(error, self.path) from error
        try:
            yield
        finally:
            lock.release()

    @property
    def completions(self) -> Table:
        return Table(self.path / "completions", COLUMNS["completions"])

    def scores(self, name: str) -> Table:
        return Table(self.path / "scores" / name, COLUMNS["scores"])

    def score_names(self) -> list[str]:
        folder = self.path / "scores"
        return (
            sorted(p.name for p in folder.iterdir() if p.is_dir() and any(p.glob("*.parquet")))
            if folder.is_dir()
            else []
        )

    def write_json(self, name: str, value: Any) -> Path:
        """Replace a small file as a whole."""
        return write_whole(self.path / name, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def read_json(self, name: str) -> Any:
        return read_json(self.path / name)


class Table:
    """A folder of shards that only ever grows, one row per (request id, sample)."""

    def __init__(self, path: Path, columns: Mapping[str, str]):
        self.path, self.columns = path, columns

    def shards(self) -> list[Path]:
        return sorted(
            self.path.glob("part-*.parquet"), key=lambda shard: (len(shard.name), shard.name)
        )  # 1000000 after 999999

    def exists(self) -> bool:
        return bool(self.shards())

    def rows(self, columns: Sequence[str] | None = None, shards: Sequence[Path] | None = None) -> Iterator[Row]:
        """All rows (of these shards), a small batch in memory at a time; lists of numbers come as numpy arrays."""
        for shard in self.shards() if shards is None else shards:
            yield from _rows(
                shard, lambda file: file.iter_batches(batch_size=64, columns=list(columns) if columns else None)
            )

    def rows_at(self, shard: Path, numbers: Collection[int]) -> Iterator[Row]:
        """The rows of a shard with these numbers, from 0; only the row groups they lie in are read."""

        def parts(file: Any) -> Iterator[Any]:
            end = 0
            for group in range(file.num_row_groups):
                start, end = end, end + file.metadata.row_group(group).num_rows
                if wanted := [number - start for number in numbers if start <= number < end]:
                    yield file.read_row_group(group).take(wanted)

        yield from _rows(shard, parts)

    def num_bytes(self) -> int:
        """Of all rows before compression, as the shards' footers say."""
        import pyarrow.parquet as pq

        footers = [pq.read_metadata(shard) for shard in self.shards()]
        return sum(footer.row_group(i).total_byte_size for footer in footers for i in range(footer.num_row_groups))

    def keys(self) -> set[Key]:
        return {(row["request_id"], row["sample"]) for row in self.rows(["request_id", "sample"])}

    def record(self) -> dict[str, Any]:
        """What the rows depend on, and the engine that made them; empty for a table that has none."""
        return read_json(self.path / RECORD) or {}

    def claim(self, config: Mapping[str, Any]) -> None:
        """Say what the rows depend on; raises UsageError when rows are there that another config made."""
        before = self.record().get("config")
        if before is not None and self.exists():
            changes = _told_once(differences(before, json.loads(json.dumps(redact(config, secret_values(os.environ))))))
            if changes:
                raise UsageError(
                    f"{self.path} holds rows of another config ({'; '.join(changes)}): undo the change, or set run_dir to a new folder"
                )
        self._write_record({**self.record(), "config": config})

    def describe(self, **facts: Any) -> None:
        """Add facts about the engine to the record."""
        self._write_record({**self.record(), **facts})

    def _write_record(self, record: Mapping[str, Any]) -> None:
        write_whole(
            self.path / RECORD,
            json.dumps(redact(record, secret_values(os.environ)), indent=2, ensure_ascii=False) + "\n",
        )

    def writer(self, *, max_rows: int = 256, max_seconds: float = 10.0, max_bytes: int = SHARD_BYTES) -> Writer:
        return Writer(self, max_rows, max_seconds, max_bytes)


class Writer:
    """Appends rows to a table; a shard is closed after so many rows, seconds or bytes, and on the way out, whatever happened."""

    def __init__(self, table: Table, max_rows: int, max_seconds: float, max_bytes: int):
        self.table, self.max_rows, self.max_seconds, self.max_bytes = table, max_rows, max_seconds, max_bytes
        self._rows: list[Row] = []
        self._bytes = 0  # of their arrays
        self._shard: Path | None = None  # where the rows held go
        self._since = time.monotonic()

    def __enter__(self) -> Self:
        try:
            self.table.path.mkdir(parents=True, exist_ok=True)
            for leftover in self.table.path.glob(".part-*"):
                leftover.unlink()
        except OSError as error:
            raise disk_error(error, self.table.path) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flush()

    def append(self, row: Row) -> None:
        if not self._rows:
            self._since = time.monotonic()
        self._rows.append(row)
        self._bytes += sum(_num_bytes(value) for value in row.values())
        full = len(self._rows) >= self.max_rows or self._bytes >= self.max_bytes
        if full or time.monotonic() - self._since >= self.max_seconds:
            self.flush()

    def flush(self) -> None:
        """Put what is held into a shard of its own."""
        if not self._rows:
            return
        if self._shard is None:
            shards = self.table.shards()
            number = int(shards[-1].stem.removeprefix("part-")) + 1 if shards else 0
            self._shard = self.table.path / f"part-{number:06d}.parquet"
        if not self._shard.exists():  # it does when a Ctrl-C came between the rename and the lines below
            self._write(self._shard)
        self._rows, self._bytes = [], 0
        self._shard = None

    def _write(self, shard: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        fields = {name: _arrow_type(kind) for name, kind in self.table.columns.items()}
        columns = [pa.array([row.get(name) for row in self._rows], type=kind) for name, kind in fields.items()]
        partial = shard.with_name(f".{shard.name}")
        try:
            pq.write_table(
                pa.table(columns, names=list(fields)), partial, compression="zstd", row_group_size=GROUP_ROWS
            )
            sync(partial)
            partial.rename(shard)
            sync(shard.parent)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise disk_error(error, self.table.path) from error


def rollout_of(row: Row) -> Rollout:
    """A row of completions as a Rollout; what the row has no column for is left out."""
    kind, reason, prompt_ids = row.get("logprob_kind"), row.get("finish_reason"), row.get("prompt_ids")
    return Rollout(
        request_id=row["request_id"],
        sample=row["sample"],
        **({} if prompt_ids is None else {"prompt_ids": prompt_ids}),
        token_ids_T=row["token_ids"],
        logprobs_T=row.get("logprobs"),
        kind=None if kind is None else LogprobKind(kind),
        text=row.get("text") or "",
        finish_reason=None if reason is None else FinishReason(reason),
        reward=row.get("reward"),
        meta=json.loads(row.get("meta") or "{}"),
    )


def row_of_scores(scores: TokenScores) -> Row:
    """One row of a scores table."""
    return {
        "request_id": scores.request_id,
        "sample": scores.sample,
        "token_ids": scores.token_ids_T,
        "logprobs": scores.logprobs_T,
        "logprob_kind": scores.kind.value,
        "entropy": scores.entropy_T,
        "logsumexp": scores.logsumexp_T,
        "rank": scores.rank_T,
        "top_ids": _lists(scores.top_ids_TK),
        "top_logprobs": _lists(scores.top_logprobs_TK),
        "processed_logprobs": scores.processed_logprobs_T,
        "nucleus_mass": scores.nucleus_mass_T,
        "logits": _lists(scores.logits_TV),
    }


def _lists(array: Any | None) -> list[Any] | None:
    return None if array is None else list(array)


def scores_of(row: Row) -> TokenScores:
    """A row of scores as TokenScores; what the row has no column for is None, and so are top tokens of width 0."""
    top_ids, top_logprobs = row.get("top_ids"), row.get("top_logprobs")
    has_top = top_ids is not None and top_ids.shape[-1] > 0
    return TokenScores(
        request_id=row["request_id"],
        sample=row["sample"],
        token_ids_T=row["token_ids"],
        logprobs_T=row["logprobs"],
        kind=LogprobKind(row.get("logprob_kind") or "raw"),
        entropy_T=row.get("entropy"),
        logsumexp_T=row.get("logsumexp"),
        rank_T=row.get("rank"),
        top_ids_TK=top_ids if has_top else None,
        top_logprobs_TK=top_logprobs if has_top else None,
        processed_logprobs_T=row.get("processed_logprobs"),
        nucleus_mass_T=row.get("nucleus_mass"),
        logits_TV=row.get("logits"),
    )


def _rows(shard: Path, parts: Callable[[Any], Iterator[Any]]) -> Iterator[Row]:
    """The rows of some parts of a shard."""
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


def differences(before: Any, after: Any, name: str = "") -> list[str]:
    """The leaves in which two nested configs differ, as `a.b: 1 -> 2`."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [*before, *(key for key in after if key not in before)]
        return [
            line
            for key in keys
            for line in differences(before.get(key), after.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if before == after else [f"{name}: {json.dumps(before)} -> {json.dumps(after)}"]


def _told_once(changes: list[str]) -> list[str]:
    """Without the changes of an option under its engine's own name where they are told under ours."""
    ours = {
        change: re.sub(r"torch_dtype(?=: )", "dtype", change).replace("tensor_parallel_size: ", "tp_size: ")
        for change in changes
    }
    return [change for change, ours in ours.items() if ours == change or ours not in changes]


def _num_bytes(value: Any) -> int:
    """Of a row's value: an array, or a list of arrays of one width."""
    if isinstance(value, list) and value:
        return len(value) * _num_bytes(value[0])
    return getattr(value, "nbytes", 0)


def _arrow_type(kind: str) -> Any:
    import pyarrow as pa

    if kind.startswith("list<"):
        return pa.list_(_arrow_type(kind[5:-1]))
    return {"string": pa.string(), "int32": pa.int32(), "float32": pa.float32(), "float64": pa.float64()}[kind]


def _values(column: Any) -> list[Any]:
    """An Arrow column as Python values: numbers and strings, numpy arrays for lists, (T, K) arrays for lists of lists."""
    import numpy as np
    import pyarrow as pa

    if not pa.types.is_list(column.type):
        return column.to_pylist()
    if not pa.types.is_list(column.type.value_type):
        return [None if not item.is_valid else item.values.to_numpy(zero_copy_only=False).copy() for item in column]
    rows: list[Any] = []
    for item in column:
        if not item.is_valid:
            rows.append(None)
            continue
        flat = item.values.flatten().to_numpy(zero_copy_only=False).copy()
        rows.append(flat.reshape(len(item.values), -1) if len(item.values) else np.empty((0, 0), flat.dtype))
    return rows
