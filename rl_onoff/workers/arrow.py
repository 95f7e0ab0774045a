"""Requests, responses and results as Arrow record batches: what travels between the nodes of a cluster.

A batch holds many of one kind. Ids and numbers are lists of int32 and float32, one buffer a column, which Ray puts into its
object store and out again without a copy; a (T, K) or (T, V) array lies flat, and a column says how wide it is. A sampler is
written once for all requests that share it. Everything comes back as it went, in arrays of its own: they can be written to,
and none of them keeps a batch, or a node's object store, alive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from rl_onoff.types import Completion, FinishReason, LogprobKind, Request, Response, Sampling, TokenScores

if TYPE_CHECKING:
    from pyarrow import Array, RecordBatch

FLOATS = (
    "logprobs_T",
    "entropy_T",
    "logsumexp_T",
    "top_logprobs_TK",
    "processed_logprobs_T",
    "nucleus_mass_T",
    "logits_TV",
)
INTEGERS = ("prompt_ids", "token_ids_T", "rank_T", "top_ids_TK")
KINDS = {"completion": Completion, "request": Request, "response": Response, "scores": TokenScores}


def batch_of(
    items: Sequence[Request] | Sequence[Response] | Sequence[Completion] | Sequence[TokenScores],
) -> RecordBatch:
    """One or more objects of one type as a batch. A request's text and meta, which no engine reads, stay behind."""
    import pyarrow as pa

    first = items[0]
    kind = next(name for name, of in KINDS.items() if isinstance(first, of))
    columns: dict[str, Array] = {}
    for name in first.__dataclass_fields__:
        values = [getattr(item, name) for item in items]
        if name in FLOATS + INTEGERS:
            columns[name] = _lists(values, np.dtype(np.float32 if name in FLOATS else np.int32))
            if name in ("top_ids_TK", "logits_TV"):  # the other (T, K) array is as wide
                columns[f"{name} width"] = pa.array(
                    [None if value is None else value.shape[1] for value in values], pa.int32()
                )
        elif name == "sampling":
            written = {id(value): msgspec.json.encode(value).decode() for value in {id(v): v for v in values}.values()}
            columns[name] = pa.array([written[id(value)] for value in values]).dictionary_encode()
        elif name == "samples":
            columns[name] = pa.array(values, pa.list_(pa.int32()))
        elif name in ("kind", "finish_reason"):
            columns[name] = pa.array([value.value for value in values], pa.string())
        elif name not in ("prompt", "meta"):
            columns[name] = pa.array(values, pa.int64() if name == "sample" else pa.string())
    return pa.record_batch(columns).replace_schema_metadata({"kind": kind})


def items_of(batch: RecordBatch) -> list[Any]:
    """The objects of a batch."""
    of = KINDS[batch.schema.metadata[b"kind"].decode()]
    columns = {name: _values(name, column) for name, column in zip(batch.schema.names, batch.columns, strict=True)}
    top, logits = columns.pop("top_ids_TK width", None), columns.pop("logits_TV width", None)
    for name, widths in (("top_ids_TK", top), ("top_logprobs_TK", top), ("logits_TV", logits)):
        if widths is not None:
            lengths = (len(ids) for ids in columns["token_ids_T"])
            triples = zip(columns[name], lengths, widths, strict=True)
            columns[name] = [None if flat is None else flat.reshape(length, width) for flat, length, width in triples]
    return [of(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]


def _lists(arrays: Sequence[np.ndarray | None], dtype: np.dtype) -> Array:
    """A column of lists, flat; int64 offsets, for the full logits of one long response can pass 2^31."""
    import pyarrow as pa

    flat = [np.zeros(0, dtype) if array is None else array.reshape(-1) for array in arrays]
    offsets = np.zeros(len(arrays) + 1, np.int64)
    np.cumsum([len(array) for array in flat], out=offsets[1:])
    values = pa.array(np.concatenate(flat, dtype=dtype, casting="same_kind"))
    missing = np.array([array is None for array in arrays])
    return pa.LargeListArray.from_arrays(pa.array(offsets), values, mask=pa.array(missing) if missing.any() else None)


def _values(name: str, column: Any) -> list[Any]:
    if name in FLOATS + INTEGERS:
        flat, offsets = column.values.to_numpy(), column.offsets.to_numpy()
        valid = column.is_valid().to_pylist()
        return [flat[offsets[i] : offsets[i + 1]].copy() if there else None for i, there in enumerate(valid)]
    if name == "sampling":
        shared = [msgspec.json.decode(text, type=Sampling) for text in column.dictionary.to_pylist()]
        return [shared[index] for index in column.indices.to_pylist()]
    values: Iterable[Any] = column.to_pylist()
    make: dict[str, Callable[[Any], Any]] = {"kind": LogprobKind, "finish_reason": FinishReason, "samples": _tuple}
    return [make[name](value) for value in values] if name in make else list(values)


def _tuple(values: list[int] | None) -> tuple[int, ...] | None:
    return None if values is None else tuple(values)
