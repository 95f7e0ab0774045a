"""One run as a paragraph: check, start the tracker, run the stages, conclude, close."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from hydra.utils import instantiate

from rl_onoff.attribution.ladder import run_attribute
from rl_onoff.backends import create_backend
from rl_onoff.backends.engine_config import EngineConfig
from rl_onoff.backends.placement import check_installed
from rl_onoff.compare import HEADLINES, METRICS
from rl_onoff.config import RunConfig, Stage
from rl_onoff.data.prompts import load_rows
from rl_onoff.data.requests import check_lengths, encode_rows, with_template_kwargs
from rl_onoff.data.rollouts import load_responses
from rl_onoff.errors import GateError, NotComparableError, UsageError, nearest
from rl_onoff.models.resolve import model_sampling
from rl_onoff.pipeline import stages
from rl_onoff.pipeline.compare import check_policies, compare_run, gap_of, run_matrix, verdict_of, write_page
from rl_onoff.pipeline.compare_inputs import open_sources, own_scores
from rl_onoff.pipeline.engines import ANY, Slot, Steps, engines, known_engines, samplers, scorers
from rl_onoff.pipeline.stages import Run
from rl_onoff.report.tables import summary_text
from rl_onoff.rewards import load_reward
from rl_onoff.rundir.provenance import changes, landmarks, sampling_of, texts_of
from rl_onoff.rundir.summary import Summary, summarise
from rl_onoff.rundir.table import RunDir, Table
from rl_onoff.tracking import Tracker
from rl_onoff.types import Want

log = logging.getLogger(__name__)


def run(config: RunConfig, path: Path, *, group: str | None = None) -> float | None:
    """Run the stages of `config` in the folder `path`; returns the number that `config.metric` names, if any."""
    with Slot() as slot:
        steps = run_steps(config, path, slot, group=group)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                return end.value


def run_steps(config: RunConfig, path: Path, slot: Slot, *, group: str | None = None) -> Steps:
    """A run, step by step: yields what the next step wants of the slot, first when all is checked and nothing begun."""
    if (metric := config.compare.fail_metric) not in HEADLINES:
        fix = f"set compare.fail_metric={nearest(metric, HEADLINES) or 'kl_k3'}"
        raise UsageError(f"compare.fail_metric is {metric!r} but must be one of {', '.join(HEADLINES)}: {fix}")
    if Stage.matrix in config.stages:
        check_policies(config)
    for engine in engines(config).values():
        create_backend(engine).check_model()
    load_reward(config.reward.function)
    rows = load_rows(config.data) if {Stage.generate, Stage.matrix} & set(config.stages) else []
    if config.model.sampling_defaults:
        config.sampling = model_sampling(config.sampling, config.backend.model_name, config.backend.revision)
    for engine in samplers(config):
        create_backend(engine).check_sampling(config.sampling)
    for option, engine in engines(config).items():
        check_installed(create_backend(engine).package, engine, option)
    yield next(iter(engines(config).values()), None)
    tracker: Tracker = instantiate({"_target_": config.tracking._target_}, config.tracking)
    job_type = "+".join(stage.value for stage in config.stages)
    tracker.start(config=asdict(config), run_dir=path, group=config.tracking.group or group, job_type=job_type)
    try:
        this = Run(config, rows, RunDir(path), tracker, slot, brief=group is not None)
        del rows
        for stage in config.stages:
            yield from STAGES[stage.name](this) or ()
        values = conclude(this)
    except BaseException:  # also when the steps that are left are given up; the engine may be broken
        slot.close()
        tracker.close(failed=True)
        raise
    tracker.close(failed=False)
    gate(this)
    if config.metric is not None and config.metric not in values:
        log.warning("metric=%s is not among this run's numbers, the values in metrics.json", config.metric)
    return None if config.metric is None else values.get(config.metric)


def generate(this: Run) -> Steps:
    yield this.config.backend
    sample(this)


def sample(this: Run) -> None:
    """Sample what is missing of n responses to every row of the data."""
    config, completions = this.config, this.folder.completions
    # more rows of the data, or more samples, only add to the rows that are there
    data = {name: value for name, value in asdict(config.data).items() if name not in ("limit", "shuffle", "seed")}
    sampling = {name: value for name, value in asdict(config.sampling).items() if name != "n"}
    completions.claim({"backend": config.backend.what_it_computes(), "data": data, "sampling": sampling}, changes)
    tokenizer = this.slot.of(config.backend).get_tokenizer()
    prompts = encode_rows(this.rows, config.data, tokenizer)
    this.rows = []  # a job of a sweep that waits for its next engine keeps no data
    missing = stages.missing_requests(this.folder, prompts, config.sampling)
    total, wanted = len(missing), len(prompts) * config.sampling.n
    if total < wanted:
        log.info("generate: %d of %d responses are there already", wanted - total, wanted)
    if not missing:
        return
    backend = this.slot.get(config.backend)
    check_lengths(missing, backend.info.max_len)
    completions.describe(engine=asdict(backend.info), tokenizer=landmarks(tokenizer))
    progress = this.progress("generate", total)
    stages.generate(this.folder, missing, prompts, backend, load_reward(config.reward.function), progress)
    this.values["generate/tokens_per_s"] = progress.tokens_per_s


def score(this: Run) -> Steps:
    """Score the run's responses with every engine that is asked to."""
    config, folder = this.config, this.folder
    if config.score.responses is not None:
        file, data = Path(config.score.responses), config.data
        tokenizer = this.slot.of(next(iter(scorers(config).values()))).get_tokenizer()
        options = {"chat_template": data.chat_template, "system": data.system, "format": config.compare.format}
        texts = with_template_kwargs(tokenizer, data.template_kwargs)
        given = load_responses(config.score.responses, texts, **options)
        made_of = {"responses": str(file.absolute()), "content": given.file.source.content()}
        folder.completions.claim(made_of, changes)
        stages.take_in(folder, ((rollout, tokenizer.decode(rollout.prompt_ids.tolist())) for rollout in given))
    if not folder.completions.exists():
        fix = "set run_dir to an earlier run's folder, score.responses to a file, or experiment=analyse to sample first"
        raise UsageError(f"{folder.path} has no responses to score: {fix}")
    for name, engine in scorers(config).items():
        yield engine
        score_with(this, folder.scores(name), engine, name)


def score_with(this: Run, table: Table, engine: EngineConfig, name: str) -> None:
    """Score with one engine what its table lacks."""
    asked = this.config.score  # the sampler's view is that of the sampler that made the responses
    sampler = sampling_of(this.folder.completions.record()) or replace(this.config.sampling, n=1)
    want = Want(top_k=asked.top_k, full_logits=asked.full_logits, sampler=sampler if asked.processed else None)
    table.claim({"backend": engine.what_it_computes(), "want": asdict(want)}, changes)
    total = stages.unscored(this.folder, table)
    if not total:
        log.info("score: all responses are scored already in %s", table.path)
        return
    backend = this.slot.get(engine)
    table.describe(engine=asdict(backend.info), tokenizer=landmarks(backend.get_tokenizer()))
    progress = this.progress("score", total)
    stages.score(this.folder, table, backend, want, progress)
    this.values[f"score/{name}/tokens_per_s"] = progress.tokens_per_s


def compare(this: Run) -> None:
    """Compare every table of scores with what was sampled, and write the page. Reads the disk alone."""
    config = this.config
    this.folder = folder = open_sources(config.compare, this.folder)
    comparisons = compare_run(folder)
    if not comparisons:
        if Stage.score in config.stages:
            return log.info("compare: the responses came without logprobs, so their scores have nothing to compare to")
        why = "has nothing to compare, which is responses with logprobs and scores of them"
        raise UsageError(f"{folder.path} {why}: set run_dir to such a run, or compare.behaviour and compare.target")
    this.comparisons |= comparisons
    records = [folder.completions.record(), *(folder.scores(name).record() for name in comparisons)]
    this.page = write_page(folder, comparisons, texts_of(records, config.compare.tokenizer, known_engines(config)))


def matrix(this: Run) -> Steps:
    """Every policy samples, every policy scores all samples."""
    found = yield from run_matrix(this, sample, score_with)
    this.values.update(found.values())
    rows, verdict = found.rows(), found.verdict()
    this.sections["matrix"] = {"policies": found.names, "cells": rows, "verdict": verdict}
    this.texts += [found.as_text(), f"  {verdict}"]
    this.page = this.folder.path / "matrix.html"
    track_rows(this.tracker, "matrix", rows)


def attribute(this: Run) -> Steps:
    """Say why the target differs from the behaviour, and put it into the page."""
    yield ANY
    this.folder = open_sources(this.config.compare, this.folder)
    found = run_attribute(this, known_engines(this.config))
    this.values.update(found.values())
    this.sections["attribution"] = found.to_dict()
    this.texts.append(found.as_text())
    track_rows(this.tracker, "attribution", found.to_dict()["rows"])
    try:
        compare(this)
    except UsageError as error:  # ids or kinds that differ: the very causes that the ladder may have named
        log.warning("no page: %s", error)


STAGES = {stage.__name__: stage for stage in (generate, score, compare, matrix, attribute)}


def conclude(this: Run) -> dict[str, float]:
    """Gather the run's numbers, then write, log and print what it found."""
    folder, comparisons = this.folder, this.comparisons
    summary, said = summarise(folder), {}
    summary.values |= this.values
    for name, comparison in comparisons.items():
        estimates = {metric: comparison[metric].value for metric in HEADLINES if metric in comparison}
        summary.values |= {f"onoff/{name}/{metric}": x for metric, x in estimates.items() if math.isfinite(x)}
    if comparisons:
        summary.values |= {f"onoff/{name}": value for name, value in gap_of(folder, comparisons).items()}
        said = {"verdict": verdict_of(folder, comparisons)}
    summary.values = {name: value for name, value in summary.values.items() if math.isfinite(value)}  # −inf is no JSON
    found = {"values": summary.values, "comparisons": {name: each.to_dict() for name, each in comparisons.items()}}
    folder.write_json("metrics.json", {**said, **found, **this.sections})
    track(this, summary)
    in_words = re.compile("matrix/|attribute/|onoff/kl_k3")
    shown = {name: value for name, value in summary.values.items() if not in_words.match(name)}
    texts = [] if this.brief else [summary_text(shown)]
    texts += this.texts
    if all(comparison.comparable for comparison in comparisons.values()) or Stage.compare not in this.config.stages:
        texts += [f"  {name}: set aside, {x.sentence()}" for name, each in comparisons.items() for x in each.findings]
        texts += [f"  {sentence}" for sentence in said.values()]
    where = {"run folder": folder.path, "page": this.page, "W&B": this.tracker.where}
    print("\n\n".join([*texts, "\n".join(f"  {name:10}  {place}" for name, place in where.items() if place)]))
    return summary.values


def gate(this: Run) -> None:
    """NotComparableError (exit code 3) where numbers mean nothing, GateError (4) beyond compare.fail_above."""
    if Stage.compare not in this.config.stages:  # experiment=attribute says the cause
        return
    asked, own = this.config.compare, own_scores(this.folder) if this.comparisons else None
    if not all(comparison.comparable for comparison in this.comparisons.values()):
        raise NotComparableError(verdict_of(this.folder, this.comparisons))
    metric, bar = METRICS[asked.fail_metric], asked.fail_above
    for name, comparison in this.comparisons.items():
        if bar is None or (name == own and len(this.comparisons) > 1) or asked.fail_metric not in comparison:
            continue
        value = comparison[asked.fail_metric].value
        size = abs(value - 1) if metric.better == "one" else abs(value)
        if value < bar if metric.better == "higher" else size > bar:
            which = "below" if metric.better == "higher" else "beyond"
            raise GateError(f"{asked.fail_metric} of {name} is {value:.4g}, {which} compare.fail_above={bar:g}")


def track(this: Run, summary: Summary) -> None:
    """Log what the run ends with; of a comparison what its page shows: intervals, histograms, the worst tokens."""
    folder, tracker = this.folder, this.tracker
    tracker.summary(summary.values)
    for name, (counts, edges) in summary.histograms.items():
        tracker.histogram(name, counts, edges)
    columns = ("request_id", "sample", "prompt", "text", "reward", "finish_reason")
    if folder.completions.exists():
        rows = (tuple(row[column] for column in columns) for row in folder.completions.rows(columns))
        tracker.table("responses", columns, rows, total=int(summary.values["generate/responses"]))
    for name, comparison in this.comparisons.items():
        for metric in HEADLINES:
            if metric in comparison:
                estimate = comparison[metric]
                tracker.summary({f"onoff/{name}/{metric}_lo": estimate.lo, f"onoff/{name}/{metric}_hi": estimate.hi})
        for what in ("l", "abs_l", "entropy_behaviour", "entropy_target"):
            if histogram := comparison.histograms.get(what):
                counts, edges = np.asarray(histogram["counts"]), np.asarray(histogram["edges"])
                tracker.histogram(f"onoff/{name}/{what}", counts, edges)
        tables = {"worst_tokens": comparison.worst, "findings": [asdict(each) for each in comparison.findings]}
        for what, rows in tables.items():
            if rows:
                track_rows(tracker, f"onoff/{name}/{what}", rows)
    if this.page is not None:
        tracker.html("report", this.page)
    tracker.artifact(folder.path)


def track_rows(tracker: Tracker, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Log a table, one row or more."""
    tracker.table(name, tuple(rows[0]), (tuple(row.values()) for row in rows), total=len(rows))
