"""What was sampled beside what was scored, joined on disk by (request id, sample), for the metrics and for the page."""

from __future__ import annotations

import json
import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from rl_onoff.compare import Pair, as_kind
from rl_onoff.compare.row_checks import other_text, outside_vocab
from rl_onoff.errors import UsageError, plural
from rl_onoff.rewards import FAILED
from rl_onoff.rundir.files import read_shard
from rl_onoff.rundir.table import Row, RunDir, Table, rollout_of, scores_of
from rl_onoff.types import Key, LogprobKind, Rollout, Sampling, TokenScores

log = logging.getLogger(__name__)

BLOCK_BYTES = 256 << 20  # of scores, as on the disk, that are held at a time
GROUP_LIMIT = 40  # a column with more values than this is an id, not a group
STEPS = ("step", "weight_version")  # of the meta of a response that a trainer wrote
SCORES = ("request_id", "sample", "token_ids", "logprobs", "logprob_kind", "processed_logprobs", "nucleus_mass")
TRANSFORM = ("temperature", "top_p", "top_k", "min_p")


def beside(
    rows: Iterable[Row], tables: Mapping[str, Table], columns: Sequence[str] | None = None
) -> Iterator[tuple[Row, dict[str, TokenScores | None]]]:
    """Each of these rows, with the scores of the same key in every table; None where a table has none.

    Scores are large (top tokens, full logits), so a block of keys is looked up at a time, and neighbours in one table
    may lie in any shard of another, since engines finish in an order of their own (shortest first, fastest replica).
    """
    places: dict[str, dict[Key, tuple[Path, int]]] = {name: {} for name in tables}
    row_bytes = 1.0  # of one key's rows in all tables
    for name, table in tables.items():
        for shard in table.shards():
            for number, row in enumerate(read_shard(shard, ["request_id", "sample"])):
                places[name][row["request_id"], row["sample"]] = shard, number
        row_bytes += sum(shard.stat().st_size for shard in table.shards()) / max(len(places[name]), 1)
    rows, size = iter(rows), max(1, int(BLOCK_BYTES / row_bytes))
    while block := list(islice(rows, size)):
        keys = [(row["request_id"], row["sample"]) for row in block]
        found = {name: _scores_at(filter(None, map(of.get, keys)), columns) for name, of in places.items()}
        for row, key in zip(block, keys, strict=True):
            yield row, {name: of.pop(key, None) for name, of in found.items()}


def _scores_at(places: Iterable[tuple[Path, int]], columns: Sequence[str] | None) -> dict[Key, TokenScores]:
    """The scores in these rows of shards, each shard read once."""
    numbers: dict[Path, list[int]] = defaultdict(list)
    for shard, number in places:
        numbers[shard].append(number)
    scores = (scores_of(row) for shard, of in numbers.items() for row in read_shard(shard, columns, of))
    return {each.key: each for each in scores}


@dataclass(frozen=True, kw_only=True, slots=True)
class Joined:
    """A response with what its behaviour and every target that scored it say; all logprobs are of one kind."""

    rollout: Rollout
    prompt: str
    behaviour: TokenScores | None  # None: the response came without logprobs, and its engine did not score it
    targets: dict[str, TokenScores]


def joined(
    run: RunDir, targets: Sequence[str], own: str | None, columns: Sequence[str] | None = None
) -> Iterator[Joined]:
    """Every response of the run, with these columns of the scores, or all. The kind of logprobs is that of the sampled
    ones: processed meet processed.

    `own` names the scores by the engine that sampled, if there are any: its distribution stands beside the sampled
    logprobs, and its logprobs in their place where the responses came without.
    """
    tables = {name: run.scores(name) for name in (*targets, *([own] if own else []))}
    samplers = {name: sampler_of(table) for name, table in tables.items()}
    drawn_with = run.completions.record().get("config", {}).get("sampling")
    for row, found in beside(run.completions.rows(), tables, columns):
        rollout = rollout_of(row)
        behaviour, kind = found[own] if own else None, LogprobKind.raw
        if rollout.logprobs_T is not None:
            kind = rollout.kind or kind
            behaviour = behaviour or TokenScores(token_ids_T=rollout.token_ids_T, logprobs_T=rollout.logprobs_T)
            behaviour = replace(behaviour.of(rollout), logprobs_T=rollout.logprobs_T, kind=kind)
        elif behaviour is not None:
            behaviour = as_kind(behaviour, kind)
        scored = {name: scores for name in targets if (scores := found[name]) is not None}
        if behaviour is not None:
            for name, scores in scored.items():
                sampler = samplers[name] if kind is not LogprobKind.raw else None
                if drawn_with and sampler and any(drawn_with[x] != getattr(sampler, x) for x in TRANSFORM):
                    why = f"the behaviour's logprobs are {kind.value} and {name} was scored under another sampler"
                    fix = "score the tokens again in a folder of their own, with the options of the run that sampled"
                    raise UsageError(f"{why} than the one that drew the tokens: {fix}")
                scored[name] = as_kind(scores, kind, sampler)
        yield Joined(rollout=rollout, prompt=row["prompt"] or "", behaviour=behaviour, targets=scored)


def pairs(
    run: RunDir, target: str, own: str | None, *, group_columns: Sequence[str] = (), tokenizer: Any = None
) -> Iterator[Pair]:
    """Every response of the run that has a behaviour and that `scores/<target>` has; how many have none is said. One
    that the target's model has no rows for has a `fault`, and so has, with a tokenizer, one whose ids are not the
    tokenizer's or not its text's.
    """
    unknown, vocab_size = 0, run.scores(target).record().get("engine", {}).get("vocab_size", math.inf)
    for found in joined(run, [target], own if own != target else None):
        rollout, q, p = found.rollout, found.behaviour, found.targets.get(target)
        unknown += q is None
        if q is None:
            continue
        if p is None:
            check, wrong = "outside_vocab", outside_vocab(rollout, vocab_size)
        else:
            check, wrong = "other_text", ""
            if tokenizer is not None and (wrong := outside_vocab(rollout, len(tokenizer))):
                check = "outside_tokenizer"
            elif tokenizer is not None:
                wrong = other_text(rollout, tokenizer.decode)
        if p is not None or wrong:
            groups, facts = groups_of(rollout, group_columns), facts_of(rollout)
            fault = (check, wrong) if wrong else None
            yield Pair(behaviour=q, target=p or q, mask_T=rollout.mask_T, groups=groups, facts=facts, fault=fault)
    if unknown:
        log.warning("%s came without logprobs: nothing to compare with %s there", plural(unknown, "response"), target)


def sampler_of(table: Table) -> Sampling | None:
    """The sampler whose transform a table's processed logprobs are under."""
    sampler = table.record().get("config", {}).get("want", {}).get("sampler")
    return Sampling(**sampler) if sampler else None


def groups_of(rollout: Rollout, columns: Sequence[str]) -> dict[str, str]:
    """The groups of a response: those columns of its row that have a value, and whether its answer was right."""
    groups = {name: str(rollout.meta[name]) for name in columns if rollout.meta.get(name) is not None}
    if rollout.reward is not None:
        groups["reward"] = "right" if rollout.reward >= 1 else "wrong"
    return groups


def facts_of(rollout: Rollout) -> dict[str, float]:
    """The training step of a response, how many steps its sampler's weights were behind, and its reward, if known."""
    step, version = (rollout.meta.get(name) for name in STEPS)
    staleness = step - version if isinstance(step, int | float) and isinstance(version, int | float) else None
    found = {"step": step, "staleness": staleness, "reward": rollout.reward}
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}


def group_columns(run: RunDir) -> list[str]:
    """Columns of the data that make groups: all but question, answer and a failed reward that have few values."""
    values: dict[str, set[str]] = {}
    for row in run.completions.rows(["meta"]):
        for name, value in json.loads(row["meta"] or "{}").items():
            if name not in ("question", "answer", FAILED, *STEPS) and isinstance(value, str | int | float | bool):
                values.setdefault(name, set()).add(str(value))
    return [name for name, seen in values.items() if 1 < len(seen) <= GROUP_LIMIT]
