"""Data files -> records, whatever their layout: JSONL, CSV, Parquet, a Hugging Face dataset.

What is wrong in a file is one sentence with the line (JSONL, CSV) or the row (Parquet, datasets), counted from 1.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from rl_onoff.config import Format
from rl_onoff.errors import UsageError, one_line
from rl_onoff.models.resolve import hub_errors, is_hub_id

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


def read_table(path: str, *, key: str, format: Format = Format.auto, split: str = "train") -> Table:
    """All records of a file, whatever its layout; a file that is not there, not readable or empty is one sentence."""
    file = Path(path).expanduser()
    format = format_of(path, file, key) if format is Format.auto else format
    if format is Format.datasets:
        name, unit, records = path, "row", _read_datasets(path, file, key, split)
        columns, numbers = records.column_names, range(1, len(records) + 1)
    elif not file.is_file():
        what = "is a folder" if file.is_dir() else "does not exist"
        raise UsageError(f"the file {key}={path} {what}: set {key} to an existing file")
    else:
        (read, language, unit), name, last, found = READERS[format], file.name, 0, {}
        try:
            for last, record in read(file):
                if record is not None:
                    found[last] = record
        except (ValueError, csv.Error, OSError) as error:  # JSON's, UnicodeDecodeError and Arrow's are ValueErrors
            what = "cannot be read" if isinstance(error, OSError) else f"is not valid {language}"
            why = f"{unit} {last + 1} of {name} {what} ({one_line(error)})"
            raise UsageError(f"{why}: fix it, or set {key} to another file") from error
        numbers, records = list(found), list(found.values())
        columns = dict.fromkeys(column for record in records for column in record)
    if not len(records):
        raise UsageError(f"{name} has no rows: set {key} to a file that has some")
    return Table(name=name, key=key, unit=unit, columns=tuple(columns), records=records, numbers=numbers)


def format_of(path: str, file: Path, key: str) -> Format:
    if file.is_dir():
        return Format.datasets
    if (ending := file.suffix.lower()) in ENDINGS:
        return ENDINGS[ending]
    if file.exists():
        otherwise = ", or set data.format=jsonl, for example" if key == "data.path" else ""
        raise UsageError(f"the ending of {key}={path} is none of {', '.join(ENDINGS)}: rename the file{otherwise}")
    why = f"the file {key}={path} does not exist"
    if near := next((path + known for known in ENDINGS if Path(f"{file}{known}").is_file()), None):
        raise UsageError(f"{why}: did you mean {key}={near}?")
    if is_hub_id(path.partition(":")[0]) and not re.fullmatch(r"\.[a-z]{2,}", ending):  # an ending as of a file
        return Format.datasets
    raise UsageError(f"{why}: set {key} to an existing file or to a Hugging Face datasets id")


def _read_jsonl(file: Path) -> Iterator[tuple[int, Any]]:
    """Every line with its number, as every reader gives it; None stands for one that holds no record."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:  # nine times as fast as json, which knows NaN too and says what is wrong
                record = msgspec.json.decode(line) if line.strip() else {}
            except msgspec.MsgspecError:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            if not isinstance(record, dict):
                raise ValueError(f"{kind_of(record)} where every line is an object {{…}}")
            yield number, record if line.strip() else None


def _read_csv(file: Path) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(2**31 - 1)  # prompts may be longer than the default of 128 KiB
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, strict=True)
        columns = next(reader, [])
        yield reader.line_num, None
        for row in reader:
            if row and len(row) != len(columns):
                raise ValueError(f"{len(row)} fields where the first line has {len(columns)}")
            yield reader.line_num, dict(zip(columns, row, strict=True)) if row else None


def _read_parquet(file: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow.parquet

    return enumerate(pyarrow.parquet.ParquetFile(file).read().to_pylist(), 1)


READERS = {
    Format.jsonl: (_read_jsonl, "JSON", "line"), Format.csv: (_read_csv, "CSV", "line"),
    Format.parquet: (_read_parquet, "Parquet", "row"),
}  # fmt: skip


def _read_datasets(path: str, file: Path, key: str, split: str) -> Any:
    """A folder written by save_to_disk, or an id on the hub, `owner/name` or `owner/name:configuration`."""
    import datasets

    repo, _, configuration = path.partition(":")
    try:
        if not file.is_dir():
            with hub_errors(repo, key):
                return datasets.load_dataset(repo, configuration or None, split=split)
        found = datasets.load_from_disk(str(file))
    except UsageError:
        raise
    except (ValueError, FileNotFoundError) as error:
        fix = f"set data.split, {key}={repo}:CONFIGURATION, or {key} to a file or a folder written by save_to_disk"
        why = f"{key}={path} cannot be loaded ({one_line(error)})"  # it lists the splits or configurations there are
        raise UsageError(f"{why}: {fix}") from error
    splits = found if isinstance(found, datasets.DatasetDict) else {split: found}
    if split not in splits:
        there = ", ".join(map(str, splits))
        raise UsageError(f"{key}={path} has no split {split!r} but {there}: set data.split to one of them")
    return splits[split]


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
    if value in (math.inf, -math.inf):
        return "infinity"
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), f"a value of type {type(value).__name__}")
