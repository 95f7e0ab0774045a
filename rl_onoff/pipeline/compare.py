"""The compare stage: what a run folder says about its policies, and the page. The matrix stage: N policies score what
each of them sampled into a run folder of its own, `<run_dir>/<policy>/`, that everything reads as any other.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from rl_onoff.backends.engine_config import EngineConfig
from rl_onoff.compare import METRICS, Comparison, compare, verdict, whose_error
from rl_onoff.config import RunConfig
from rl_onoff.errors import NotComparableError, UsageError
from rl_onoff.pipeline.compare_inputs import Sources, own_scores
from rl_onoff.pipeline.engines import Wish
from rl_onoff.pipeline.stages import Run
from rl_onoff.report import ReportInput, ReportResponse, write_report
from rl_onoff.report.tables import Matrix
from rl_onoff.rundir.files import disk_error, write_csv, write_whole
from rl_onoff.rundir.join import SCORES, TRANSFORM, group_columns, groups_of, joined, pairs
from rl_onoff.rundir.provenance import check_tokenizers, is_truth, same_weights, sampling_of, texts_of, texts_tokenizer
from rl_onoff.rundir.summary import summarise
from rl_onoff.rundir.table import RunDir, Table
from rl_onoff.types import LogprobKind, Sampling

log = logging.getLogger(__name__)

TAKEN_FROM = {"file", "responses", "monitor"}  # keys of the record of rows that another program wrote


def compare_run(run: RunDir, tokenizer: Any = None) -> dict[str, Comparison]:
    """Every table of scores against what was sampled, by the table's name; the behaviour's own scores come first. With
    a tokenizer, ids that another program wrote are compared with the text beside them.
    """
    own, columns, comparisons = own_scores(run), group_columns(run), {}
    for name in sorted(run.score_names(), key=lambda name: (name != own, name)):
        check_tokenizers(run.completions.record(), run.scores(name).record(), name)
        sides = {"behaviour": run.completions.record(), "target": run.scores(name).record()}
        recorded = [side for side, record in sides.items() if TAKEN_FROM & record.get("config", {}).keys()]
        found = pairs(run, name, own, group_columns=columns, tokenizer=tokenizer if "behaviour" in recorded else None)
        if (first := next(found, None)) is not None:
            try:
                comparisons[name] = compare(chain([first], found), recorded=recorded, scratch=run.path)
            except OSError as error:
                raise disk_error(error, run.path) from error
    return comparisons | dict(_with_errors(run, own, comparisons))


def _with_errors(
    run: RunDir, own: str | None, comparisons: Mapping[str, Comparison]
) -> Iterator[tuple[str, Comparison]]:
    """The comparisons that the run has a truth for, with whose error their gap is. The behaviour, the target and the
    truth must have the same weights, as far as the records say.
    """
    records = {name: run.scores(name).record() for name, comparison in comparisons.items() if comparison.comparable}
    records = {name: record for name, record in records.items() if same_weights(run.completions.record(), record)}
    truth = next((name for name, record in records.items() if is_truth(record)), None)
    for name, record in records.items():
        if truth is not None and not is_truth(record) and same_weights(record, records[truth]):
            aside = {*comparisons[name].set_aside, *comparisons[truth].set_aside}
            found = (
                [x.logprobs_T if mask_T is None else x.logprobs_T[mask_T] for x in (q, p, t)]
                for row in joined(run, [name, truth], own, SCORES)
                if (q := row.behaviour) and (p := row.targets.get(name)) and (t := row.targets.get(truth))
                for mask_T in [row.rollout.mask_T] if "{}/{}".format(*q.key) not in aside
            )  # fmt: skip
            yield name, replace(comparisons[name], whose_error=whose_error(truth, name, found))


def distance(comparison: Comparison) -> float:
    """The mean k3 KL; infinite where nothing can be compared."""
    return comparison["kl_k3"].value if comparison.comparable else math.inf


def furthest(own: str | None, comparisons: Mapping[str, Comparison]) -> tuple[str, float | None]:
    """The target with the largest mean k3 KL (the behaviour's own scores only where there is no other), and the noise
    floor: the mean k3 KL between what the engine said while it sampled and when it scored, None when not measured.
    """
    others = [name for name in comparisons if name != own]
    name = max(others or comparisons, key=lambda name: distance(comparisons[name]))
    floor = distance(comparisons[own]) if own and own in comparisons and others else math.inf
    return name, floor if math.isfinite(floor) else None


def gap_of(run: RunDir, comparisons: Mapping[str, Comparison]) -> dict[str, float]:
    """The verdict's numbers, by names that no target's name is part of: what sweeps are looked at and optimised by."""
    name, floor = furthest(own_scores(run), comparisons)
    found = {"kl_k3": distance(comparisons[name]), "kl_k3_floor": math.nan if floor is None else floor}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def verdict_of(run: RunDir, comparisons: Mapping[str, Comparison]) -> str:
    """A sentence about the target that is furthest away, a second one where raw logprobs are compared of tokens that
    were not drawn from the raw distribution, and one about whose error the gap is where a truth was scored.
    """
    own = own_scores(run)
    name, floor = furthest(own, comparisons)
    if name == own and comparisons[name].comparable:
        return (
            "The sampler against itself: what it said while sampling and what it says of the same tokens now are "
            f"{comparisons[name]['kl_k3'].value:.2g} nats a token apart (mean k3 KL). That is the sampler's noise "
            "floor; set target=… to compare it with another policy."
        )
    said = verdict(comparisons[name], floor)
    drawn, default = sampling_of(run.completions.record()) or Sampling(), Sampling()
    how = [f"{x}={getattr(drawn, x):g}" for x in TRANSFORM if getattr(drawn, x) != getattr(default, x)]
    if how and comparisons[name].comparable and comparisons[name].kind is LogprobKind.raw:
        said += (
            f" The tokens were drawn with {', '.join(how)}, but these are raw logprobs (temperature 1, nothing cut "
            "off): a distance at these tokens, not the KL of what they were drawn from, which "
            "backend.logprob_kind=processed compares."
        )
    if len(comparisons.keys() - {own}) > 1 or (own in comparisons and is_truth(run.scores(name).record())):
        said = f"{name}: {said}"
    split = {name: comparison for name, comparison in comparisons.items() if comparison.whose_error and name != own}
    found = split[furthest(own, split)[0]].whose_error if split else None
    return f"{said} {found.sentence()}" if found else said


def write_page(run: RunDir, comparisons: Mapping[str, Comparison], token_text: Callable[[int], str]) -> Path:
    """`report.html`: targets in the order of how far they are, the behaviour's own scores last."""
    own = own_scores(run)
    names = sorted(comparisons, key=lambda name: (name == own, -distance(comparisons[name])))
    behaviour = _facts("behaviour", run.completions.record(), "behaviour")
    counts = [comparison.overall.counts for comparison in comparisons.values()]
    report = ReportInput(
        title=f"{behaviour.get('model', run.path.name)}: how on-policy?",
        verdict=verdict_of(run, comparisons),
        policies=[behaviour, *(_facts(name, run.scores(name).record(), "target") for name in names)],
        responses=_responses(run, names, token_text),
        comparisons=[{"name": name, **comparisons[name].to_dict()} for name in names],
        metrics=METRICS,
        token_text=token_text,
        attribution=run.read_json("attribution.json"),
        layers=run.read_json("layers.json"),
        acceptance=run.read_json("acceptance.json"),
        num_responses=min(c["responses"] + c["responses_empty"] + c["responses_set_aside"] for c in counts),
    )
    return write_report(run.path / "report.html", report)


def _facts(name: str, record: Mapping[str, Any], role: str) -> dict[str, Any]:
    """What the page says about a policy, from the record beside its rows."""
    engine, config = record.get("engine", {}), record.get("config", {})
    backend, sampling = config.get("backend", {}), config.get("sampling") or {}
    drawn = (f"{key} {sampling[key]:g}" for key in (*TRANSFORM, "max_new_tokens", "seed") if key in sampling)
    found = {"role": role, "name": name, "engine": engine.get("engine"), "model": backend.get("model_name")}
    if (adapter := backend.get("adapter")) is not None:
        found["adapter"] = adapter + (", merged" if backend["merge_adapter"] else "")
    found |= {"dtype": engine.get("dtype"), "version": engine.get("version"), "logprobs": backend.get("logprob_kind")}
    found["sampling"] = ", ".join(drawn) or None
    return {key: value for key, value in found.items() if value is not None}


def _responses(run: RunDir, targets: Sequence[str], token_text: Callable[[int], str]) -> Iterator[ReportResponse]:
    """Every response that all targets scored, as the page shows it."""
    columns = group_columns(run)
    for found in joined(run, targets, own_scores(run)):
        if len(found.targets) == len(targets):
            yield ReportResponse(
                rollout=found.rollout,
                prompt=found.prompt,
                tokens=[token_text(i) for i in found.rollout.token_ids_T.tolist()],
                behaviour=found.behaviour,
                targets=[found.targets[name] for name in targets],
                groups=groups_of(found.rollout, columns),
            )


def check_policies(config: RunConfig) -> None:
    """What is wrong with the policies, before anything is loaded."""
    if len(config.policies) < 2:
        raise UsageError(
            f"experiment=matrix needs two policies or more and has {len(config.policies)}: set policies=engines, "
            "policies=dtypes, or +backend@policies.NAME=huggingface once for each"
        )
    for name in config.policies:
        if not re.fullmatch(r"[\w.-]+", name) or name in ("completions", "scores", ".hydra", ".", ".."):
            raise UsageError(
                f"the policy {name!r} cannot be the name of a folder: use letters, digits, '-' and '.' in policies"
            )


def run_matrix(
    this: Run, sample: Callable[[Run], None], score: Callable[[Run, Table, EngineConfig, str], None]
) -> Generator[Wish, None, Matrix]:
    """Sample and score with every policy. The last to sample scores first since it is still loaded, and each engine is
    loaded at most twice: once to sample, once to score everybody's samples.
    """
    policies, path = this.config.policies, this.folder.path
    subs = {
        name: replace(this, config=replace(this.config, backend=engine), folder=RunDir(path / name), values={})
        for name, engine in policies.items()
    }
    for name, sub in subs.items():
        yield policies[name]
        log.info("matrix: %s samples", name)
        sample(sub)
    for name in reversed(policies):
        yield policies[name]
        for sampled, sub in subs.items():
            log.info("matrix: %s scores what %s sampled", name, sampled)
            score(sub, sub.folder.scores(name), policies[name], name)
    matrix, sentences = Matrix(list(policies), {}), {}
    for a, sub in subs.items():
        completions, scores = sub.folder.completions, {b: sub.folder.scores(b) for b in policies}
        folder = Sources(sub.folder.path, completions, scores, own=a)
        comparisons = compare_run(folder)
        for b, comparison in comparisons.items():
            if not comparison.comparable:
                raise NotComparableError(f"{a} (sampled) and {b} (scored): {verdict(comparison)}")
        if missing := [b for b in policies if b not in comparisons]:
            raise UsageError(
                f"{folder.path} has no response with tokens to compare with {missing[0]}: change data.path"
            )
        records = [completions.record()]
        write_page(folder, comparisons, texts_of(records, texts_tokenizer(records, None, policies.values())))
        found = {b: comparison.to_dict() for b, comparison in comparisons.items()}
        folder.write_json("metrics.json", {"values": summarise(sub.folder).values | sub.values, "comparisons": found})
        matrix.cells.update({(a, b): comparison for b, comparison in comparisons.items()})
        sentences[a] = verdict_of(folder, comparisons)
    write_csv(path / "matrix.csv", matrix.rows())
    write_whole(path / "matrix.html", matrix.page(sentences))
    return matrix
