"""One run as a paragraph: check, start the tracker, run the stages, summarise, close."""

from __future__ import annotations

import logging
import math
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from hydra.utils import instantiate

from rl_onoff.attribution.ladder import run_attribute
from rl_onoff.backends import build
from rl_onoff.backends.engine_config import EngineConfig
from rl_onoff.compare import Comparison
from rl_onoff.config import RunConfig, Stage
from rl_onoff.data.prompts import Row, load_rows
from rl_onoff.data.requests import check_lengths, encode_rows
from rl_onoff.data.rollouts import load_responses
from rl_onoff.errors import UsageError
from rl_onoff.models.sampling_defaults import model_sampling
from rl_onoff.pipeline import stages
from rl_onoff.pipeline.compare import compare_run, gap_of, verdict_of, write_page
from rl_onoff.pipeline.compare_inputs import open_sources
from rl_onoff.pipeline.context import Run
from rl_onoff.pipeline.engine_slot import NotItsTurn, Slot
from rl_onoff.pipeline.engines import engines, known_engines, samplers, scorers
from rl_onoff.pipeline.matrix import check_policies, run_matrix
from rl_onoff.rewards import load_reward
from rl_onoff.rundir.files import content_of
from rl_onoff.rundir.provenance import changes, landmarks, texts_of
from rl_onoff.rundir.summary import Summary, as_text, summarise
from rl_onoff.rundir.table import RunDir, Table
from rl_onoff.tracking import Tracker
from rl_onoff.types import Sampling, Want

log = logging.getLogger(__name__)


def run(config: RunConfig, path: Path, *, group: str | None = None, slot: Slot | None = None) -> float | None:
    """Run the stages of `config` in the folder `path`; returns the number that `config.metric` names, if there is one.

    With the `slot` of a sweep it raises NotItsTurn when it wants an engine that is not loaded now: to go on, run it again.
    """
    rows = check(config)
    if config.model.sampling_defaults:
        config.sampling = model_sampling(config.sampling, config.backend)
    for engine in samplers(config):
        build(engine).check_sampling(config.sampling)
    slot = slot or Slot()
    tracker, values = slot.go_on(path, list(engines(config).values())) or (_tracker(config, path, group), {})
    try:
        with slot.job() as engine:
            this = Run(config, rows, RunDir(path), tracker, engine, values, brief=group is not None)
            for stage in config.stages:
                STAGES[stage](this)
        summary = summarise(this.folder)
        summary.values.update(this.values)
        for name, comparison in this.comparisons.items():
            summary.values.update(flat(name, comparison))
        if this.comparisons:
            summary.values.update(
                {f"onoff/{name}": value for name, value in gap_of(this.folder, this.comparisons).items()}
            )
        report(this, summary)
    except NotItsTurn:
        slot.wait(path, (tracker, values))
        raise
    except BaseException:
        tracker.close(failed=True)
        raise
    tracker.close(failed=False)
    if config.metric is not None and config.metric not in summary.values:
        log.warning("metric=%s is not among this run's numbers, the values in metrics.json", config.metric)
    return None if config.metric is None else summary.values.get(config.metric)


def _tracker(config: RunConfig, path: Path, group: str | None) -> Tracker:
    tracker: Tracker = instantiate({"_target_": config.tracking._target_}, config.tracking)
    tracker.start(config=asdict(config), run_dir=path, group=config.tracking.group or group, job_type=job_type(config))
    return tracker


def check(config: RunConfig) -> list[Row]:
    """Find what is wrong before anything is loaded or started; returns the data's rows."""
    for engine in engines(config).values():
        build(engine).check_model()
    reward_of(config)
    if Stage.matrix in config.stages:
        check_policies(config)
    return load_rows(config.data) if {Stage.generate, Stage.matrix} & set(config.stages) else []


def reward_of(config: RunConfig) -> stages.Reward | None:
    return load_reward(config.reward.function) if config.reward.function else None


def job_type(config: RunConfig) -> str:
    return "+".join(stage.value for stage in config.stages)


# -- stages ------------------------------------------------------------------------------------------------------------


def generate(this: Run) -> None:
    """Sample what is missing of n responses to every row of the data."""
    config, completions = this.config, this.folder.completions
    completions.claim(generate_record(config), changes)
    engine = config.backend
    tokenizer = build(engine).get_tokenizer()
    prompts = encode_rows(this.rows, config.data, tokenizer)
    missing = stages.missing_requests(this.folder, prompts, config.sampling)
    total, wanted = len(missing), len(prompts) * config.sampling.n
    if total < wanted:
        log.info("generate: %d of %d responses are there already", wanted - total, wanted)
    if not missing:
        return
    backend = this.slot.get(engine)
    check_lengths(missing, backend.info.max_len)
    completions.describe(engine=asdict(backend.info), tokenizer=landmarks(tokenizer))
    progress = this.progress("generate", total)
    stages.generate(this.folder, missing, prompts, backend, reward_of(config), progress)
    this.values["generate/tokens_per_s"] = progress.tokens_per_s


def generate_record(config: RunConfig) -> dict[str, Any]:
    """What the sampled rows depend on. More rows of the data, or more samples, only add to them."""
    data = {name: value for name, value in asdict(config.data).items() if name not in ("limit", "shuffle", "seed")}
    sampling = {name: value for name, value in asdict(config.sampling).items() if name != "n"}
    return {"backend": config.backend.what_it_computes(), "data": data, "sampling": sampling}


def score(this: Run) -> None:
    """Score the run's responses with every engine that is asked to."""
    config, folder = this.config, this.folder
    if config.score.responses is not None:
        file, data = Path(config.score.responses), config.data
        tokenizer = build(next(iter(scorers(config).values()))).get_tokenizer()
        given = load_responses(config.score.responses, tokenizer, chat_template=data.chat_template, system=data.system)
        made_of = {"responses": str(file.absolute()), "content": content_of(file.expanduser())}
        folder.completions.claim(made_of, changes)
        stages.take_in(folder, ((rollout, tokenizer.decode(rollout.prompt_ids.tolist())) for rollout in given))
    if not folder.completions.exists():
        raise UsageError(
            f"{folder.path} has no responses to score: set run_dir to an earlier run's folder, score.responses to a file, "
            "or experiment=analyse to sample first"
        )
    for name, engine in scorers(config).items():
        _score(this, folder.scores(name), engine, name)


def _score(this: Run, table: Table, engine: EngineConfig, name: str) -> None:
    want = wanted(this)
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


def wanted(this: Run) -> Want:
    """What to compute of every token; the sampler's view is that of the sampler that made the responses."""
    config = this.config
    made_with = this.folder.completions.record().get("config", {}).get("sampling")
    sampler = (
        (Sampling(**made_with) if made_with else replace(config.sampling, n=1)) if config.score.processed else None
    )
    return Want(top_k=config.score.top_k, full_logits=config.score.full_logits, sampler=sampler)


def compare(this: Run) -> None:
    """Compare every table of scores with what was sampled, and write the page. Reads the disk alone."""
    config = this.config
    this.folder = folder = open_sources(config.compare, this.folder)
    comparisons = compare_run(folder)
    if not comparisons and Stage.score in config.stages:
        log.info("compare: the responses came without logprobs, so there is nothing to compare their scores with")
        return
    if not comparisons:
        raise UsageError(
            f"{folder.path} has nothing to compare, which is responses with logprobs and scores of them: set run_dir to such a run, or "
            "compare.behaviour and compare.target"
        )
    this.comparisons.update(comparisons)
    records = [folder.completions.record(), *(folder.scores(name).record() for name in comparisons)]
    this.page = write_page(folder, comparisons, texts_of(records, config.compare.tokenizer, known_engines(config)))


def matrix(this: Run) -> None:
    """Every policy samples, every policy scores all samples."""
    found = run_matrix(this, generate, _score)
    this.values.update(found.values())
    rows, verdict = found.rows(), found.verdict()
    this.sections["matrix"] = {"policies": found.names, "cells": rows, "verdict": verdict}
    this.texts += [found.as_text(), f"  {verdict}"]
    this.page = this.folder.path / "matrix.html"
    this.tracker.table("matrix", tuple(rows[0]), (tuple(row.values()) for row in rows), total=len(rows))


def attribute(this: Run) -> None:
    """Say why the target differs from the behaviour, and put it into the page."""
    this.folder = open_sources(this.config.compare, this.folder)
    found = run_attribute(this, known_engines(this.config))
    this.values.update(found.values())
    this.sections["attribution"] = found.to_dict()
    this.texts.append(found.as_text())
    rows = [row.to_dict() for row in found.rows]
    this.tracker.table("attribution", tuple(rows[0]), (tuple(row.values()) for row in rows), total=len(rows))
    try:
        compare(this)
    except UsageError as error:  # ids or kinds that differ: the very causes that the ladder may have named
        log.warning("no page: %s", error)


STAGES = {
    Stage.generate: generate,
    Stage.score: score,
    Stage.compare: compare,
    Stage.matrix: matrix,
    Stage.attribute: attribute,
}


# -- the end -----------------------------------------------------------------------------------------------------------


def report(this: Run, summary: Summary) -> None:
    """Write, print and log what the run found."""
    folder, tracker = this.folder, this.tracker
    comparisons = {name: comparison.to_dict() for name, comparison in this.comparisons.items()}
    said = {"verdict": verdict_of(folder, this.comparisons)} if this.comparisons else {}
    folder.write_json("metrics.json", {**said, "values": summary.values, "comparisons": comparisons, **this.sections})
    tracker.summary(summary.values)
    for name, (counts, edges) in summary.histograms.items():
        tracker.histogram(name, counts, edges)
    columns = ("request_id", "sample", "prompt", "text", "reward", "finish_reason")
    if folder.completions.exists():
        rows = (tuple(row[column] for column in columns) for row in folder.completions.rows(columns))
        tracker.table("responses", columns, rows, total=int(summary.values["generate/responses"]))
    for name, comparison in this.comparisons.items():
        track(tracker, name, comparison)
    if this.page is not None:
        tracker.html("report", this.page)
    tracker.artifact(folder.path)
    in_words = re.compile("matrix/|attribute/|onoff/kl_k3")
    shown = {name: value for name, value in summary.values.items() if not in_words.match(name)}
    texts = [*([] if this.brief else [as_text(shown)]), *this.texts, *(f"  {sentence}" for sentence in said.values())]
    print("\n\n".join([*texts, ""]), end="")
    print(f"  run folder  {folder.path}")
    if this.page is not None:
        print(f"  page        {this.page}")
    if tracker.where:
        print(f"  W&B         {tracker.where}")


HEADLINES = ("kl", "kl_k3", "logprob_diff_mean", "logprob_diff_max", "prob_pearson", "ess_token", "ess_seq", "ppl_ratio", "kl_forward_topk",
             "kl_forward", "argmax_agreement", "impossible_fraction")  # fmt: skip


def track(tracker: Tracker, name: str, comparison: Comparison) -> None:
    """What the page shows of a comparison, for W&B: intervals, histograms, and the tokens that differ most."""
    headlines = {metric: comparison[metric] for metric in HEADLINES if metric in comparison}
    tracker.summary({f"onoff/{name}/{metric}_lo": estimate.lo for metric, estimate in headlines.items()})
    tracker.summary({f"onoff/{name}/{metric}_hi": estimate.hi for metric, estimate in headlines.items()})
    for what in ("l", "abs_l", "entropy_behaviour", "entropy_target"):
        if what in comparison.histograms:
            histogram = comparison.histograms[what]
            tracker.histogram(f"onoff/{name}/{what}", np.asarray(histogram["counts"]), np.asarray(histogram["edges"]))
    if comparison.worst:
        rows = (tuple(token.values()) for token in comparison.worst)
        tracker.table(f"onoff/{name}/worst_tokens", tuple(comparison.worst[0]), rows, total=len(comparison.worst))


def flat(name: str, comparison: Comparison) -> dict[str, float]:
    """The headline metrics of a comparison, as `onoff/<name>/<metric>`."""
    estimates = {metric: comparison[metric].value for metric in HEADLINES if metric in comparison}
    return {f"onoff/{name}/{metric}": value for metric, value in estimates.items() if math.isfinite(value)}
