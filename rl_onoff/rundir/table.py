"""A run on disk. What is done is what the shards hold: there is no second record to disagree with them.

A table is a folder of Parquet shards. A shard is written under a temporary name, flushed to the disk and renamed, so a
crash leaves whole shards only. Beside them lies `_made_with.json`: what the rows depend on; rows that another config
would have made are refused, with the difference shown. Columns are documented in docs/run_folder.md.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from enum import Enum
from functools import cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rl_onoff.errors import UsageError
from rl_onoff.redaction import masked
from rl_onoff.rundir.files import disk_error, read_json, read_shard, write_shard, write_whole

if TYPE_CHECKING:  # the command line imports this module, and answers at once since it imports no numpy
    from rl_onoff.types import Key, Rollout, TokenScores

COMPLETIONS = {
    "request_id": "string", "sample": "int32", "prompt": "string", "prompt_ids": "list<int32>",
    "token_ids": "list<int32>", "text": "string", "logprobs": "list<float32>", "logprob_kind": "string",
    "mask": "list<bool>", "finish_reason": "string", "reward": "float64", "meta": "string",
}  # fmt: skip
# The fields of a Rollout whose columns have other names.
FIELDS = {"token_ids": "token_ids_T", "mask": "mask_T", "logprobs": "logprobs_T", "logprob_kind": "kind"}
RECORD = "_made_with.json"  # the underscore keeps it out of pandas.read_parquet(folder)
LOCK = ".lock"
SHARD_BYTES = 64 << 20  # of arrays in a shard before compression: what a writer holds

Row = dict[str, Any]


class RunDir:
    """The folder of one run: `completions/`, `scores/<name>/`, `metrics.json`, `report.html`, `run.log`, `.hydra/`."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def lock(self) -> AbstractContextManager[Any]:
        """Keep other processes from writing here until the context ends; UsageError when one does already."""
        from filelock import FileLock, Timeout

        try:
            self.path.mkdir(parents=True, exist_ok=True)
            return FileLock(self.path / LOCK).acquire(timeout=0)
        except Timeout as error:
            fix = "wait until it is done, or set run_dir (sweep_dir of a sweep) to another folder"
            raise UsageError(f"another process is writing to {self.path}: {fix}") from error
        except OSError as error:
            raise disk_error(error, self.path) from error

    @property
    def completions(self) -> Table:
        return Table(self.path / "completions", COMPLETIONS)

    def scores(self, name: str) -> Table:
        return Table(self.path / "scores" / name, score_columns())

    def score_names(self) -> list[str]:
        return sorted({shard.parent.name for shard in self.path.glob("scores/*/part-*.parquet")})

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
        found = self.path.glob("part-*.parquet")
        return sorted(found, key=lambda shard: (len(shard.name), shard.name))  # 1000000 comes after 999999

    def exists(self) -> bool:
        return bool(self.shards())

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[Row]:
        """All rows, a shard of them in memory at a time."""
        return chain.from_iterable(read_shard(shard, columns) for shard in self.shards())

    def keys(self) -> set[Key]:
        return {(row["request_id"], row["sample"]) for row in self.rows(["request_id", "sample"])}

    def record(self) -> dict[str, Any]:
        """What the rows depend on, and the engine that made them; empty for a table that has none."""
        return read_json(self.path / RECORD) or {}

    def claim(self, config: Mapping[str, Any], changes: Callable[[Any, Any], list[str]] | None = None) -> None:
        """Say what the rows depend on; UsageError when rows are there that another config made: one from which this one
        has `changes` (from the record's config to this one; `differences`, if not given)."""
        config, before = json.loads(json.dumps(masked(config))), self.record().get("config")
        if before is not None and self.exists() and (found := (changes or differences)(before, config)):
            why = f"{self.path} holds rows of another config ({'; '.join(found)})"
            raise UsageError(f"{why}: undo the change, or set run_dir to a new folder")
        self.describe(config=config)

    def describe(self, **facts: Any) -> None:
        """Add facts to the record, about the engine for instance."""
        record = json.dumps(masked({**self.record(), **facts}), indent=2, ensure_ascii=False)
        write_whole(self.path / RECORD, record + "\n")

    def writer(self, *, max_rows: int = 256, max_seconds: float = 10.0, max_bytes: int = SHARD_BYTES) -> Writer:
        return Writer(self, max_rows, max_seconds, max_bytes)


class Writer:
    """Appends rows to a table; a shard is closed after so many rows, seconds or bytes, and whenever the writer is."""

    def __init__(self, table: Table, max_rows: int, max_seconds: float, max_bytes: int):
        self.table, self.max_rows, self.max_seconds, self.max_bytes = table, max_rows, max_seconds, max_bytes
        self._rows: list[Row] = []
        self._bytes = 0  # of the rows' arrays
        self._number = max((int(shard.stem[5:]) for shard in table.shards()), default=-1) + 1  # of the next shard
        self._since = time.monotonic()

    def __enter__(self) -> Self:
        for leftover in self.table.path.glob(".part-*"):  # of a process that was killed
            leftover.unlink()
        return self

    def __exit__(self, *error: object) -> None:
        self.flush()

    def append(self, row: Row) -> None:
        if not self._rows:
            self._since = time.monotonic()
        self._rows.append(row)
        self._bytes += sum(getattr(value, "nbytes", 0) for value in row.values())
        full = len(self._rows) >= self.max_rows or self._bytes >= self.max_bytes
        if full or time.monotonic() - self._since >= self.max_seconds:
            self.flush()

    def flush(self) -> None:
        """Put what is held into a shard of its own."""
        if self._rows:
            shard = self.table.path / f"part-{self._number:06d}.parquet"
            if not shard.exists():  # it does when a Ctrl-C came between the rename and the line below
                write_shard(shard, self._rows, self.table.columns)
            self._rows, self._bytes, self._number = [], 0, self._number + 1


def differences(before: Any, after: Any, defaults: Any = None, name: str = "") -> list[str]:
    """The leaves in which two nested configs differ, as `a.b: 1 -> 2`. A key that one of them lacks counts as its value
    in `defaults`, which is nested likewise, or else as null."""
    if not (isinstance(before, Mapping) and isinstance(after, Mapping)):
        return [] if before == after else [f"{name}: {json.dumps(before)} -> {json.dumps(after)}"]
    found = []
    for key in dict.fromkeys((*before, *after)):
        default = defaults.get(key) if isinstance(defaults, Mapping) else None
        missing = None if isinstance(default, Mapping) and default else default  # a group of options is no option
        one, other = before.get(key, missing), after.get(key, missing)
        found += differences(one, other, default, f"{name}.{key}" if name else key)
    return found


def row_of_rollout(rollout: Rollout, prompt: str) -> Row:
    """One row of the completions table; `prompt` is the prompt's text."""
    values = {name: getattr(rollout, FIELDS.get(name, name), prompt) for name in COMPLETIONS}
    row = {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}
    return {**row, "meta": json.dumps(dict(rollout.meta), ensure_ascii=False, default=str)}


def rollout_of(row: Row) -> Rollout:
    """The response in a row of the completions table; a column that was not read counts as unknown."""
    from rl_onoff.types import FinishReason, LogprobKind, Rollout

    types = {"kind": LogprobKind, "finish_reason": FinishReason, "meta": json.loads}
    values = {FIELDS.get(name, name): row[name] for name in COMPLETIONS if row.get(name) is not None}
    values.pop("prompt", None)
    return Rollout(**{name: types[name](value) if name in types else value for name, value in values.items()})


@cache
def score_columns() -> dict[str, str]:
    """The columns of a scores table: the fields of `TokenScores`, arrays without their shapes in the names."""
    from rl_onoff.types import ARRAYS, TokenScores

    columns = {"request_id": "string", "sample": "int32"}
    for field in fields(TokenScores):
        if field.name in ARRAYS:
            name, _, shape = field.name.rpartition("_")
            columns[name] = "list<" * len(shape) + field.metadata.get("dtype", "float32") + ">" * len(shape)
        elif field.name == "kind":
            columns["logprob_kind"] = "string"
    return columns


def row_of_scores(scores: TokenScores) -> Row:
    """One row of a scores table."""
    arrays = {name.rpartition("_")[0]: array for name, array in scores.arrays().items()}
    return {"request_id": scores.request_id, "sample": scores.sample, "logprob_kind": scores.kind.value, **arrays}


def scores_of(row: Row) -> TokenScores:
    """What a row of a scores table says of every token; None for columns that are null, of width 0, or not read."""
    from rl_onoff.types import ARRAYS, LogprobKind, TokenScores

    arrays: dict[str, Any] = {name: row.get(name.rpartition("_")[0]) for name in ARRAYS}
    arrays = {name: array for name, array in arrays.items() if array is not None and 0 not in array.shape[1:]}
    kind = LogprobKind(row.get("logprob_kind") or LogprobKind.raw)
    return TokenScores(request_id=row.get("request_id", ""), sample=row.get("sample", 0), kind=kind, **arrays)
