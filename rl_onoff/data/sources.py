"""Files of rollouts -> records, one at a time: JSONL by the line, Parquet by the batch, `.pt` and `.pkl` by the file.

A folder of step files is one source, in the order of its steps. Pickles are a stranger's code: only tensors, arrays and
plain containers are taken from them, and what needs more is refused with the way out.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl_onoff.data.prompts import without_nulls
from rl_onoff.data.readers import READERS, format_of
from rl_onoff.errors import UsageError, one_line
from rl_onoff.rundir.files import content_of

ENDINGS = (".jsonl", ".parquet", ".pt", ".pkl")
BATCH_ROWS = 64  # of a Parquet file that are held at a time
NESTED = ("samples", "rollout_data")  # what a record that is no batch of columns keeps its responses under


@dataclass(frozen=True, slots=True)
class Source:
    """The file or the folder of step files that a config key names."""

    path: Path
    key: str
    files: tuple[Path, ...]

    @property
    def name(self) -> str:
        return self.path.name or str(self.path)

    def label(self, file: Path) -> str:
        """What a file is called in messages: its place in the folder, where the source is one."""
        return file.name if file == self.path else f"{self.name}/{file.relative_to(self.path)}"

    def step(self, file: Path) -> int | None:
        """The training step that the file's path tells, for files whose rows do not say it."""
        step = step_of(file.name if file == self.path else str(file.relative_to(self.path)))
        above = re.findall(r"step[_-]?(\d+)", str(file.absolute()))
        return int(above[-1]) if step is None and above else step

    def records(self, file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each record of a file with its place for messages ("line 3 of 7.jsonl"); a broken file is one sentence."""
        name, last, wanted = self.label(file), 0, f"set {self.key} to another file"
        if file.suffix.lower() in (".pt", ".pkl"):
            records, language, unit = _pickled(file, name, self.key), "a pickle of rows", "row"
        elif file.suffix.lower() == ".parquet":
            records, language, unit = _parquet(file), "Parquet", "row"
        else:
            read, language, unit = READERS[format_of(str(file), file, self.key)]
            records = read(file)
        try:
            for last, record in records:
                if record is not None:
                    yield f"{unit} {last} of {name}", record
        except (ValueError, csv.Error, OSError) as error:
            if isinstance(error, UsageError):
                raise
            cause = one_line(error)
            what = "cannot be read" if isinstance(error, OSError) else f"is not valid {language}"
            raise UsageError(f"{unit} {last + 1} of {name} {what} ({cause}): fix it, or {wanted}") from error

    def content(self) -> str:
        """A hash of what the files hold and are called: what rows made from them depend on."""
        if self.files == (self.path,):
            return content_of(self.path)
        texts = (f"{self.label(file)} {content_of(file)}\n" for file in self.files)
        return hashlib.blake2b("".join(texts).encode(), digest_size=16).hexdigest()


def open_source(path: str, key: str) -> Source:
    """The files that `path` names; one that is not there, and a folder without rollouts, is one sentence."""
    file = Path(path).expanduser()
    if file.is_dir():
        files = rollout_files(file)
        if not files:
            raise UsageError(
                f"the folder {key}={path} holds no {', '.join(ENDINGS)} file: set {key} to a file, or to a folder of"
                " step files"
            )
        return Source(file, key, files)
    if not file.is_file() or file.suffix.lower() not in ENDINGS:
        format_of(path, file, key)  # has sentences for what is missing or misspelt
    if not file.is_file():
        raise UsageError(f"the file {key}={path} does not exist: set {key} to an existing file")
    return Source(file, key, (file,))


def rollout_files(folder: Path) -> tuple[Path, ...]:
    """The files of rollouts in a folder and the folders in it, in the order of their steps, else of the numbers in
    their names. Hidden files are none of them.
    """
    found = [file for ending in ENDINGS for file in folder.rglob(f"*{ending}") if file.is_file()]
    paths = {file: file.relative_to(folder) for file in found}
    kept = [file for file, path in paths.items() if not any(part.startswith(".") for part in path.parts)]
    return tuple(sorted(kept, key=lambda file: _order(str(paths[file]))))


def step_of(path: str) -> int | None:
    """The training step in a path: the number after `step`, else the only number in the file's name, else that of its
    folder.
    """
    if said := re.findall(r"step[_-]?(\d+)", path):
        return int(said[-1])
    for part in reversed(Path(path).with_suffix("").parts):
        numbers = re.findall(r"(?<![\w.])\d+(?![\w.])", re.sub(r"(rank|shard)[_-]?\d+|_", " ", part))
        if len(numbers) == 1:
            return int(numbers[0])
    return None


def _order(path: str) -> tuple[Any, ...]:
    """Sorts by step, and then with 10 after 9."""
    step = step_of(path)
    parts = re.split(r"(\d+)", path)
    return step is None, step or 0, [int(part) if part.isdigit() else part for part in parts]


def _parquet(file: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow.parquet

    number = 0
    with pyarrow.parquet.ParquetFile(file, memory_map=True) as parquet:  # else a row group, often all, is held whole
        for batch in parquet.iter_batches(batch_size=BATCH_ROWS):
            for record in batch.to_pylist():
                number += 1
                yield number, {name: without_nulls(x) if _is_objects(x) else x for name, x in record.items()}


def _is_objects(value: Any) -> bool:
    """Messages or tools; lists of numbers are long, and have no nulls that Arrow added."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _pickled(file: Path, name: str, key: str) -> Iterator[tuple[int, Any]]:
    """The records in a `.pt` or `.pkl` file: a list of rows, a batch whose columns are taken apart, or what holds its
    rows in a list of its own.
    """
    try:
        if file.suffix.lower() == ".pt":
            value = _load_pt(file)
        else:
            with file.open("rb") as stream:
                value = Unpickler(stream).load()
    except Exception as error:  # a broken or foreign pickle fails wherever its instructions lead
        cause = one_line(error)[:200]
        raise UsageError(
            f"{name} does not open as tensors and plain containers alone, and other pickles may run code ({cause}):"
            " write its rows out where the trainer's packages are, with"
            f" pandas.DataFrame(rows).to_parquet('rollouts.parquet'), and set {key} to that file"
        ) from error
    rows = value if isinstance(value, list) else _apart(value)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise ValueError(f"{type(row).__name__} where every row is a dict")
        yield number, dict(row)


def _apart(value: Any) -> Iterator[Any]:
    """A batch of columns of one length, taken apart into rows; any other value as it is."""
    columns = {name: column for name, column in value.items() if _is_column(column)} if _is_batch(value) else {}
    lengths = Counter(len(column) for column in columns.values())
    if not lengths:
        yield value
        return
    size = lengths.most_common(1)[0][0]
    common = {name: each for name, each in value.items() if name not in columns and not isinstance(each, Mapping)}
    for i in range(size):
        yield common | {name: column[i] for name, column in columns.items() if len(column) == size}


def _is_batch(value: Any) -> bool:
    return isinstance(value, Mapping) and not any(isinstance(value.get(name), list | Mapping) for name in NESTED)


def _is_column(value: Any) -> bool:
    return isinstance(value, list) or getattr(value, "ndim", 0) > 0


def _load_pt(file: Path) -> Any:
    """A file of torch.save; its tensors stay on the disk until a row is looked at, where its layout allows that."""
    import torch

    with torch.serialization.safe_globals(_arrays()):
        with suppress(RuntimeError):  # mmap needs the zip layout; what else is wrong comes up again below
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return torch.load(file, map_location="cpu", weights_only=True)


def _arrays() -> list[Any]:
    """What numpy's arrays and numbers are pickled as."""
    import numpy as np

    core: Any = np._core  # pyright: ignore[reportAttributeAccessIssue]
    made_by = [np.dtype, np.ndarray, core.multiarray.scalar, core.multiarray._reconstruct, core.numeric._frombuffer]
    return [*made_by, *{type(np.dtype(letter)) for letter in "?bBhHiIlLqQefdgSUO"}]


class Batch(dict):
    """SkyRL's TrainingInputBatch, whose state is a dict of what torch.save made of every tensor."""

    def __setstate__(self, state: Any) -> None:
        for name, saved in state["batch_dict"].items():
            self[name] = _load_saved(saved)


def _load_saved(saved: bytes) -> Any:
    import torch

    return torch.load(io.BytesIO(saved), map_location="cpu", weights_only=True)


class Unpickler(pickle.Unpickler):
    """Reads plain containers, numpy's arrays and torch's tensors, and refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        import torch
        from torch._utils import _rebuild_tensor_v2

        if name in ("TrainingInputBatch", "TensorBatch"):
            return Batch
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _load_saved
        known: dict[tuple[str, str], Callable[..., Any]] = {
            (each.__module__, each.__name__): each
            for each in (_rebuild_tensor_v2, torch.device, torch.Size, codecs.encode, *_arrays())
        }
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        module = module.replace("numpy.core", "numpy._core").replace("__builtin__", "builtins")  # older names
        if module in ("builtins", "collections") and name in ("OrderedDict", "set", "frozenset", "bytearray"):
            return super().find_class(module, name)
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return known[module, name]
