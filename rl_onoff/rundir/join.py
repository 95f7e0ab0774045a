"""Two views of every response, joined on disk by (request id, sample), for the metrics and for the page.

Scores are large (top tokens, full logits) and are read a block at a time, so that memory does not grow with the run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from rl_onoff.compare import Pair, Side
from rl_onoff.errors import UsageError
from rl_onoff.report import ReportResponse, TokenView
from rl_onoff.rewards import FAILED
from rl_onoff.rundir.table import Key, Row, RunDir, Table
from rl_onoff.types import LogprobKind, Sampling

BLOCK_BYTES = 256 << 20  # of scores that are held at a time

GROUP_LIMIT = 40  # a column with more values than this is an id, not a group


class Lookup:
    """Rows of tables by key, a block of keys at a time, so that no part of a shard is read for one row alone.

    Engines finish in an order of their own (shortest first, whichever replica is fastest): neighbours in one table may lie in any
    shard of another.
    """

    def __init__(self, tables: Mapping[str, Table]):
        self._tables = tables
        self._places: dict[str, dict[Key, tuple[Path, int]]] = {}
        self._row_bytes = 1.0  # of one key's rows in all tables, before compression
        for name, table in tables.items():
            places = self._places[name] = {}
            for shard in table.shards():
                for number, row in enumerate(table.rows(["request_id", "sample"], shards=[shard])):
                    places[row["request_id"], row["sample"]] = shard, number
            self._row_bytes += table.num_bytes() / max(len(places), 1)

    def beside(self, rows: Iterable[Row]) -> Iterator[tuple[Row, dict[str, Row | None]]]:
        """Each of these rows, with the row of the same key in every table; None where a table has none."""
        rows, size = iter(rows), max(1, int(BLOCK_BYTES / self._row_bytes))
        while block := list(islice(rows, size)):
            found = {name: self._found(name, block) for name in self._tables}
            for row in block:
                yield row, {name: of.pop((row["request_id"], row["sample"]), None) for name, of in found.items()}

    def _found(self, name: str, block: Sequence[Row]) -> dict[Key, Row]:
        numbers: dict[Path, list[int]] = {}
        for row in block:
            place = self._places[name].get((row["request_id"], row["sample"]))
            if place is not None:
                numbers.setdefault(place[0], []).append(place[1])
        rows = (row for shard, of in numbers.items() for row in self._tables[name].rows_at(shard, of))
        return {(row["request_id"], row["sample"]): row for row in rows}


def pairs(run: RunDir, target: str, own: str | None, *, group_columns: Sequence[str] = ()) -> Iterator[Pair]:
    """Every response of the run that `scores/<target>` has: the sampler's logprobs against the target's.

    `own` names the scores by the engine that sampled, if there are any: its distribution stands beside the sampled logprobs,
    or in their place where the responses came without. Processed logprobs are compared with processed ones.
    """
    tables, target_sampler = {"target": run.scores(target)}, sampler_of(run.scores(target))
    if own is not None and own != target:
        tables["own"] = run.scores(own)
    own_sampler = sampler_of(run.scores(own)) if own is not None else None
    drawn_with = run.completions.record().get("config", {}).get("sampling")
    for row, found in Lookup(tables).beside(run.completions.rows()):
        key = row["request_id"], row["sample"]
        scored, own_row = found["target"], found.get("own")
        if scored is None or (row["logprobs"] is None and own_row is None):
            continue
        kind = LogprobKind.raw if row["logprobs"] is None else LogprobKind[row["logprob_kind"]]
        if (
            kind is not LogprobKind.raw
            and drawn_with
            and target_sampler
            and not _same_transform(Sampling(**drawn_with), target_sampler)
        ):
            raise UsageError(
                f"the behaviour's logprobs are {kind.value} and {target} was scored under another sampler than the one that drew the "
                "tokens: score them again in a folder of their own, with the sampling options of the run that sampled"
            )
        yield Pair(
            request_id=key[0],
            sample=key[1],
            behaviour=_behaviour(row, own_row, kind, own_sampler),
            target=_side(scored, kind, target_sampler),
            groups=groups_of(row, group_columns),
        )


def _behaviour(row: Row, own: Row | None, kind: LogprobKind, sampler: Sampling | None) -> Side:
    if own is None:
        return Side(token_ids_T=row["token_ids"], logprobs_T=row["logprobs"], kind=kind)
    return _side(own, kind, sampler, logprobs=row["logprobs"])


def _side(scores: Row, kind: LogprobKind, sampler: Sampling | None, logprobs: Any = None) -> Side:
    """A row of a scores table as one side of a comparison of `kind`; `logprobs` stand in place of the scored ones."""
    if logprobs is None:
        logprobs = scored_as(scores, kind, sampler)
    has_top = scores["top_ids"] is not None and scores["top_ids"].shape[-1] > 0
    return Side(
        token_ids_T=scores["token_ids"],
        logprobs_T=logprobs,
        kind=kind,
        entropy_T=scores["entropy"],
        rank_T=scores["rank"],
        top_ids_TK=scores["top_ids"] if has_top else None,
        top_logprobs_TK=scores["top_logprobs"] if has_top else None,
        logits_TV=scores["logits"],
        distribution_kind=LogprobKind.raw,
        processed_logprobs_T=scores["processed_logprobs"],
        nucleus_mass_T=scores["nucleus_mass"],
    )


def scored_as(scores: Row, kind: LogprobKind, sampler: Sampling | None) -> np.ndarray:
    """A scored response's logprobs as logprobs of `kind`; refused where they cannot be had from what was kept.

    Scores are raw and, under `sampler`, processed; what the sampler kept of the probability joins the two, so the scaled ones
    are the processed ones plus the logarithm of the kept mass.
    """
    stored = LogprobKind(scores["logprob_kind"] or "raw")
    where = f"response {scores['request_id']}/{scores['sample']}"
    if stored is kind or (
        stored is LogprobKind.raw and kind is LogprobKind.scaled and sampler and sampler.temperature in (0, 1)
    ):
        return scores["logprobs"]
    if (
        stored is not LogprobKind.raw
        or scores["processed_logprobs"] is None
        or (sampler is None and kind is LogprobKind.scaled)
    ):
        raise UsageError(
            f"the behaviour's logprobs of {where} are {kind.value} and the target's are {stored.value}: score the tokens with "
            "score.processed=true, or say what a file's logprobs are in compare.behaviour_kind and compare.target_kind"
        )
    if kind is LogprobKind.processed:
        return scores["processed_logprobs"]
    if np.isneginf(scores["processed_logprobs"]).any():
        raise UsageError(
            f"the scaled logprobs of {where} are not known, since the target's sampler could not have drawn some of its tokens: "
            "sample with backend.logprob_kind=raw or processed"
        )
    return scores["processed_logprobs"] + np.log(scores["nucleus_mass"])


def sampler_of(table: Table) -> Sampling | None:
    """The sampler whose transform a table's processed logprobs are under."""
    sampler = table.record().get("config", {}).get("want", {}).get("sampler")
    return Sampling(**sampler) if sampler else None


def _same_transform(ours: Sampling, theirs: Sampling) -> bool:
    return all(getattr(ours, name) == getattr(theirs, name) for name in ("temperature", "top_p", "top_k", "min_p"))


def groups_of(row: Row, columns: Sequence[str]) -> dict[str, str]:
    """The groups a response belongs to: those columns of its row that have a value, and whether its answer was right."""
    meta = json.loads(row["meta"] or "{}")
    groups = {name: str(meta[name]) for name in columns if meta.get(name) is not None}
    if row["reward"] is not None:
        groups["reward"] = "right" if row["reward"] >= 1 else "wrong"
    return groups


def group_columns(run: RunDir) -> list[str]:
    """Columns of the data that make groups: everything but question, answer and a failed reward that has few values."""
    values: dict[str, set[str]] = {}
    for row in run.completions.rows(["meta"]):
        for name, value in json.loads(row["meta"] or "{}").items():
            if name not in ("question", "answer", FAILED) and isinstance(value, str | int | float | bool):
                values.setdefault(name, set()).add(str(value))
    return [name for name, seen in values.items() if 1 < len(seen) <= GROUP_LIMIT]


def report_responses(
    run: RunDir, targets: Sequence[str], own: str | None, token_text: Callable[[int], str], columns: Sequence[str]
) -> Iterator[ReportResponse]:
    """Every response as the page shows it."""
    lookup = Lookup({name: run.scores(name) for name in {*targets, *([own] if own else [])}})
    for row, found in lookup.beside(run.completions.rows()):
        key = row["request_id"], row["sample"]
        scored = [found[name] for name in targets]
        if any(scores is None for scores in scored):
            continue
        own_row = found[own] if own else None
        yield ReportResponse(
            request_id=key[0],
            sample=key[1],
            prompt=row["prompt"] or "",
            text=row["text"] or "",
            tokens=[token_text(int(i)) for i in row["token_ids"]],
            token_ids_T=row["token_ids"],
            behaviour=_view(own_row, row["logprobs"]),
            targets=[_view(scores, None) for scores in scored],  # type: ignore[misc]
            reward=row["reward"],
            finish_reason=row["finish_reason"] or "",
            groups=groups_of(row, columns),
        )


def _view(scores: Row | None, logprobs: Any) -> TokenView | None:
    if scores is None:
        return None if logprobs is None else TokenView(logprobs_T=logprobs)
    return TokenView(
        logprobs_T=scores["logprobs"] if logprobs is None else logprobs,
        entropy_T=scores["entropy"],
        rank_T=scores["rank"],
        top_ids_TK=scores["top_ids"],
        top_logprobs_TK=scores["top_logprobs"],
    )


def facts(name: str, record: Mapping[str, Any], role: str) -> dict[str, Any]:
    """What the page says about a policy, from the record beside its rows."""
    engine, config = record.get("engine", {}), record.get("config", {})
    backend = config.get("backend", {})
    found = {
        "role": role,
        "name": name,
        "engine": engine.get("engine"),
        "model": backend.get("model_name"),
        "dtype": engine.get("dtype"),
        "version": engine.get("version"),
        "logprobs": backend.get("logprob_kind"),
    }
    sampling = config.get("sampling")
    if sampling:
        shown = ("temperature", "top_p", "top_k", "min_p", "max_new_tokens", "seed")
        found["sampling"] = ", ".join(f"{key} {sampling[key]:g}" for key in shown if key in sampling)
    return {key: value for key, value in found.items() if value is not None}
