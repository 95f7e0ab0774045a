"""Data files -> rows: prompt, id, reference answer and groups, checked, before any tokenizer or model is loaded.

Every way a file can be wrong ends here as one sentence with the line (JSONL, CSV: counted from 1, as editors do) or the row
(Parquet, datasets: counted from 1) and the override that mends it, so that a wrong file costs a second and not a model's load.
"""

from __future__ import annotations

import csv
import json
import math
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from rl_onoff import models
from rl_onoff.config import DataConfig, Format
from rl_onoff.errors import MissingDependencyError, UsageError

PROBLEMS = Path(__file__).with_name("problems.jsonl")  # the bundled set
ROW_NUMBER = "row_number"  # `data.id=row_number` numbers the rows, for files whose ids are of no use

ENDINGS = {".jsonl": Format.jsonl, ".csv": Format.csv, ".parquet": Format.parquet}
PROMPT_COLUMNS = ("prompt_ids", "prompt_token_ids", "prompt", "messages", "question", "problem")
GROUP_COLUMNS = ("data_source", "subject", "level")

Messages = list[dict[str, str]]
Prompt = str | Messages | list[int]


def is_chat(prompt: Prompt) -> TypeGuard[Messages]:
    return not isinstance(prompt, str) and isinstance(prompt[0], dict)


def is_ids(prompt: Prompt) -> TypeGuard[list[int]]:
    return not isinstance(prompt, str) and isinstance(prompt[0], int)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One prompt as it stands in the data, not yet a chat and not yet tokens."""

    id: str
    prompt: Prompt
    where: str  # for error messages: "line 3 of problems.jsonl"
    meta: Mapping[str, Any] = field(default_factory=dict)  # question, answer (where there is one) and the group columns


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


def load_rows(data: DataConfig) -> list[Row]:
    """The rows that `data` selects, in its order; the ids of rows do not depend on shuffling or the limit."""
    table = read_table(str(PROBLEMS) if data.path is None else data.path, key="data.path", format=data.format, split=data.split)
    if data.prompt is not None:
        prompt_column = table.column(data.prompt, "data.prompt")
    elif (found := table.first(PROMPT_COLUMNS)) is not None:
        prompt_column = found
    else:
        raise UsageError(f"{table.name} has no column for the prompt but {', '.join(table.columns)}: set data.prompt to one of them")
    answer_column = answer_column_of(table) if data.answer is None else table.column(data.answer, "data.answer")
    id_column = _id_column(table, data.id)
    groups = [table.column(name, "data.groups") for name in data.groups] or [name for name in GROUP_COLUMNS if name in table.columns]

    order = list(range(len(table.records)))
    if data.shuffle:
        random.Random(data.seed).shuffle(order)
    rows: dict[str, Row] = {}
    for index in order[: data.limit]:
        record, where = table.records[index], table.where(index)
        prompt = parse_prompt(look_up(record, prompt_column), where=where, column=prompt_column, key="data.prompt")
        if is_chat(prompt) and prompt[-1]["role"] == "assistant":
            raise UsageError(
                f"the conversation in {where} ends with the assistant's turn: remove that turn, or set data.prompt to another column"
            )
        row_id = str(index) if id_column is None else _id(look_up(record, id_column), where=where, column=id_column)
        if row_id in rows:
            raise UsageError(
                f"{where} and {rows[row_id].where} share the id {row_id!r}: set data.id to a column without repetitions,"
                f" or data.id={ROW_NUMBER}"
            )
        meta: dict[str, Any] = {"question": question_of(prompt, record)}
        if answer_column is not None and (answer := answer_of(look_up(record, answer_column), where=where)) is not None:
            meta["answer"] = answer
        meta.update({name: jsonable(look_up(record, name)) for name in groups})
        rows[row_id] = Row(id=row_id, prompt=prompt, where=where, meta=meta)
    return list(rows.values())


# Records of a file


def read_table(path: str, *, key: str, format: Format = Format.auto, split: str = "train") -> Table:
    """All records of a file, whatever its layout; a file that is not there, not readable or empty is one sentence."""
    file = Path(path).expanduser()
    if format is Format.auto:
        format = _format(path, file, key)
    if format is Format.datasets:
        table = _read_datasets(path, file, key, split)
    else:
        if not file.is_file():
            raise UsageError(f"the file {key}={path} {'is a folder' if file.is_dir() else 'does not exist'}: set {key} to an existing file")
        try:
            table = {Format.jsonl: _read_jsonl, Format.csv: _read_csv, Format.parquet: _read_parquet}[format](file, key)
        except OSError as error:
            raise UsageError(f"the file {key}={path} cannot be read ({error.strerror or error}): set {key} to another file") from error
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
    raise UsageError(f"the file {key}={path} does not exist: set {key} to an existing file or to a Hugging Face datasets id")


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
                    f"line {number} of {file.name} is not valid JSON ({error}): mend the line, or set {key} to another file"
                ) from error
            if not isinstance(record, dict):
                raise UsageError(
                    f"line {number} of {file.name} is no JSON object but {_kind(record)}: write every row as {{…}} on one line of {key}"
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
                        f"line {reader.line_num} of {file.name} has not {len(columns)} fields like the first line: mend it,"
                        f" or set {key} to another file"
                    )
                records.append(record)
                numbers.append(reader.line_num)
        except (csv.Error, UnicodeDecodeError) as error:
            raise UsageError(
                f"{file.name} is not valid CSV near line {reader.line_num + 1} ({error}): mend it, or set {key} to another file"
            ) from error
    return Table(name=file.name, key=key, unit="line", columns=columns, records=records, numbers=numbers)


def _read_parquet(file: Path, key: str) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file).read()
    except pyarrow.ArrowInvalid as error:
        raise UsageError(
            f"{file.name} is not a Parquet file ({str(error).splitlines()[0]}): mend it, or set {key} to another file"
        ) from error
    numbers = range(1, table.num_rows + 1)
    return Table(name=file.name, key=key, unit="row", columns=tuple(table.column_names), records=table.to_pylist(), numbers=numbers)


def _read_datasets(path: str, file: Path, key: str, split: str) -> Table:
    """A folder written by save_to_disk, or an id on the hub, `owner/name` or `owner/name:configuration`."""
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError(f"{key}={path} needs the package datasets: pip install datasets") from error

    if file.is_dir():
        if not any((file / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
            raise UsageError(f"the folder {key}={path} was not written by save_to_disk: set {key} to a file or to such a folder")
        found = datasets.load_from_disk(str(file))
        if isinstance(found, datasets.DatasetDict):
            if split not in found:
                raise UsageError(f"{key}={path} has no split {split!r} but {', '.join(map(str, found))}: set data.split to one of them")
            found = found[split]
    else:
        repo, _, configuration = path.partition(":")
        try:
            with models.hub_errors(repo, key):
                found = datasets.load_dataset(repo, configuration or None, split=split)
        except ValueError as error:
            if isinstance(error, UsageError):
                raise
            # A split or configuration that is not there: the library's sentence lists those there are.
            cause = " ".join(str(error).split())
            raise UsageError(f"{key}={path} cannot be loaded ({cause}): set data.split, or {key}={repo}:CONFIGURATION") from error
    numbers = range(1, len(found) + 1)
    return Table(name=path, key=key, unit="row", columns=tuple(found.column_names), records=found, numbers=numbers)


# Fields of a record


def look_up(record: Mapping[str, Any], column: str) -> Any:
    """The value of `column` or `column.field`; None where it is missing."""
    if column in record:
        return record[column]
    value: Any = record
    for part in column.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def parse_prompt(value: Any, *, where: str, column: str, key: str) -> Prompt:
    """A prompt as text, chat messages or token ids; anything else, and an empty one, is refused."""
    mend = f"fill column {column} or set {key} to another {'file' if key == 'score.responses' else 'column'}"
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        raise UsageError(f"{where} has an empty prompt: {mend}")
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        if all(isinstance(item, int) and not isinstance(item, bool) for item in value):
            if min(value) < 0:
                raise UsageError(f"{where} has a negative token id in its prompt: {mend}")
            return value
        if all(isinstance(item, dict) and isinstance(item.get("role"), str) and isinstance(item.get("content"), str) for item in value):
            messages = [{"role": item["role"], "content": item["content"]} for item in value]
            if not any(message["content"].strip() for message in messages):
                raise UsageError(f"{where} has an empty prompt: {mend}")
            return messages
    raise UsageError(
        f"{where} has {_kind(value)} as its prompt where text, a list of chat messages (role and content as text) or a list of token ids"
        f" is wanted: {mend}"
    )


def question_of(prompt: Prompt, record: Mapping[str, Any]) -> str:
    """What the prompt asks, for people."""
    if is_chat(prompt):
        asked = [message["content"] for message in prompt if message["role"] == "user"] or [prompt[-1]["content"]]
        return asked[-1]
    if isinstance(prompt, str):
        return prompt
    return next((record[name] for name in PROMPT_COLUMNS if isinstance(record.get(name), str)), "")


def answer_column_of(table: Table) -> str | None:
    if "answer" in table.columns:
        return "answer"
    return "reward_model.ground_truth" if "reward_model" in table.columns else None


def answer_of(value: Any, *, where: str) -> str | None:
    """The reference answer as text, from a string, a number, or verl's object with `target`; None if the row has none."""
    if isinstance(value, Mapping):
        if "target" not in value:
            raise UsageError(f"{where} has an object without `target` as its reference answer: set data.answer to another column")
        value = value["target"]
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(int(value)) if value == int(value) else str(value)
    raise UsageError(
        f"{where} has {_kind(value)} as its reference answer where text or a number is wanted: set data.answer to another column"
    )


def jsonable(value: Any) -> Any:
    """A group's value as JSON can hold it."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, Mapping):
        return {str(name): jsonable(item) for name, item in value.items()}
    return [jsonable(item) for item in value] if isinstance(value, (list, tuple)) else str(value)


def _id_column(table: Table, name: str | None) -> str | None:
    """The column with the ids; None: number the rows from 0, as verl does."""
    if name is not None:
        return None if name == ROW_NUMBER and name not in table.columns else table.column(name, "data.id")
    if "id" in table.columns:
        return "id"
    return "extra_info.index" if look_up(table.records[0], "extra_info.index") is not None else None


def _id(value: Any, *, where: str, column: str) -> str:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise UsageError(
        f"{where} has {_kind(value)} as its id in column {column} where text or a whole number is wanted: set data.id to another column,"
        f" or data.id={ROW_NUMBER}"
    )


def _kind(value: Any) -> str:
    if value is None or value == "":
        return "nothing"
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), f"a value of type {type(value).__name__}")
