"""Data files -> records, whatever their layout: JSONL, CSV, Parquet, a Hugging Face dataset.

Every way a file can be wrong ends here as one sentence with the line (JSONL, CSV: counted from 1, as editors do) or the
row (Parquet, datasets: counted from 1) and the override that fixes it.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl_onoff.config import Format
from rl_onoff.errors import UsageError
from rl_onoff.models import resolve as models

ENDINGS = {".jsonl": Format.jsonl, ".csv": Format.csv, ".parquet": Format.parquet}


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A data file's records, with what error messages need."""

    name: str
    key: str  # the config key that named the file
    unit: str  # line | row
    columns: Sequence[str]
    records: Any  # a sequence of mappings; of a datasets id it is the Dataset, which reads a row when it is asked for
    numbers: Sequence[int]  # of each record's line or row

    def where(self, index: int) -> str:
        return f"{self.unit} {self.numbers[index]} of {self.name}"

    def column(self, name: str, key: str) -> str:
        """`name`, which is a column or `column.field`; its absence is an error that lists the columns there are."""
        if name in self.columns or name.split(".")[0] in self.columns:
            return name
        raise UsageError(f"{self.name} has no column {name!r} but {', '.join(self.columns)}: set {key} to one of them")

    def first(self, names: Iterable[str]) -> str | None:
        return next((name for name in names if name in self.columns), None)


def read_table(path: str, *, key: str, format: Format = Format.auto, split: str = "train") -> Table:
    """All records of a file, whatever its layout; a file that is not there, not readable or empty is one sentence."""
    file = Path(path).expanduser()
    if format is Format.auto:
        format = _format(path, file, key)
    if format is Format.datasets:
        table = _read_datasets(path, file, key, split)
    else:
        if not file.is_file():
            what = "is a folder" if file.is_dir() else "does not exist"
            raise UsageError(f"the file {key}={path} {what}: set {key} to an existing file")
        read = {Format.jsonl: _read_jsonl, Format.csv: _read_csv, Format.parquet: _read_parquet}[format]
        try:
            table = read(file, key)
        except OSError as error:
            cause = error.strerror or error
            raise UsageError(f"the file {key}={path} cannot be read ({cause}): set {key} to another file") from error
    if not len(table.records):
        raise UsageError(f"{table.name} has no rows: set {key} to a file that has some")
    return table


def _format(path: str, file: Path, key: str) -> Format:
    if file.is_dir():
        return Format.datasets
    if (ending := file.suffix.lower()) in ENDINGS:
        return ENDINGS[ending]
    if file.exists():
        otherwise = ", or set data.format=jsonl, for example" if key == "data.path" else ""
        raise UsageError(f"the ending of {key}={path} is none of {', '.join(ENDINGS)}: rename the file{otherwise}")
    for known in ENDINGS:
        if Path(f"{file}{known}").is_file():
            raise UsageError(f"the file {key}={path} does not exist: did you mean {key}={path}{known}?")
    looks_like_a_file = re.fullmatch(r"\.[a-z]{2,}", ending) is not None
    if models.is_hub_id(path.partition(":")[0]) and not looks_like_a_file:
        return Format.datasets
    raise UsageError(
        f"the file {key}={path} does not exist: set {key} to an existing file or to a Hugging Face datasets id"
    )


def _read_jsonl(file: Path, key: str) -> Table:
    records, numbers, columns = [], [], {}
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
                raise UsageError(
                    f"line {number} of {file.name} is not valid JSON ({error}): fix it, or set {key} to another file"
                ) from error
            if not isinstance(record, dict):
                raise UsageError(
                    f"line {number} of {file.name} is no JSON object but {kind_of(record)}: write every row as {{…}} on"
                    f" one line of {key}"
                )
            records.append(record)
            numbers.append(number)
            columns.update(dict.fromkeys(record))
    return Table(name=file.name, key=key, unit="line", columns=tuple(columns), records=records, numbers=numbers)


def _read_csv(file: Path, key: str) -> Table:
    csv.field_size_limit(2**31 - 1)  # prompts may be longer than the default of 128 KiB
    records, numbers = [], []
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        try:
            columns = tuple(reader.fieldnames or ())
            for record in reader:
                if None in record or None in record.values():
                    raise UsageError(
                        f"line {reader.line_num} of {file.name} has not {len(columns)} fields like the first line: fix"
                        f" it, or set {key} to another file"
                    )
                records.append(record)
                numbers.append(reader.line_num)
        except (csv.Error, UnicodeDecodeError) as error:
            raise UsageError(
                f"{file.name} is not valid CSV near line {reader.line_num + 1} ({error}): fix it, or set {key} to"
                " another file"
            ) from error
    return Table(name=file.name, key=key, unit="line", columns=columns, records=records, numbers=numbers)


def _read_parquet(file: Path, key: str) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file).read()
    except pyarrow.ArrowInvalid as error:
        cause = str(error).splitlines()[0]
        raise UsageError(
            f"{file.name} is not a Parquet file ({cause}): fix it, or set {key} to another file"
        ) from error
    columns, numbers = tuple(table.column_names), range(1, table.num_rows + 1)
    return Table(name=file.name, key=key, unit="row", columns=columns, records=table.to_pylist(), numbers=numbers)


def _read_datasets(path: str, file: Path, key: str, split: str) -> Table:
    """A folder written by save_to_disk, or an id on the hub, `owner/name` or `owner/name:configuration`."""
    import datasets

    if file.is_dir():
        if not any((file / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
            raise UsageError(
                f"the folder {key}={path} was not written by save_to_disk: set {key} to a file or to such a folder"
            )
        found = datasets.load_from_disk(str(file))
        if isinstance(found, datasets.DatasetDict):
            if split not in found:
                there = ", ".join(map(str, found))
                raise UsageError(f"{key}={path} has no split {split!r} but {there}: set data.split to one of them")
            found = found[split]
    else:
        repo, _, configuration = path.partition(":")
        try:
            with models.hub_errors(repo, key):
                found = datasets.load_dataset(repo, configuration or None, split=split)
        except ValueError as error:
            if isinstance(error, UsageError):
                raise
            cause = " ".join(str(error).split())  # the library lists the splits or configurations there are
            raise UsageError(
                f"{key}={path} cannot be loaded ({cause}): set data.split, or {key}={repo}:CONFIGURATION"
            ) from error
    numbers = range(1, len(found) + 1)
    return Table(name=path, key=key, unit="row", columns=tuple(found.column_names), records=found, numbers=numbers)


def look_up(record: Mapping[str, Any], column: str) -> Any:
    """The value of `column` or `column.field`; None where it is missing."""
    if column in record:
        return record[column]
    value: Any = record
    for part in column.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def kind_of(value: Any) -> str:
    if value is None or value == "":
        return "nothing"
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), f"a value of type {type(value).__name__}")
