"""One run as a paragraph: check, start the tracker, run the stages, conclude, close."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hydra.utils import instantiate

from rl_onoff.acceptance.accept import Acceptance, measured, run_acceptance
from rl_onoff.attribution.ladder import Attribution, run_attribute
from rl_onoff.backends import create_backend
from rl_onoff.backends.engine_config import EngineConfig
from rl_onoff.backends.placement import check_installed
from rl_onoff.compare import HEADLINES
from rl_onoff.config import RunConfig, Stage
from rl_onoff.data.prompts import load_rows
from rl_onoff.data.requests import check_lengths, encode_rows, with_template_kwargs
from rl_onoff.data.rollouts import load_responses
from rl_onoff.errors import UsageError, nearest, plural
from rl_onoff.layers.analysis import Layers
from rl_onoff.layers.stage import check_sides, run_layers
from rl_onoff.models.resolve import model_sampling
from rl_onoff.pipeline import stages
from rl_onoff.pipeline.compare import check_policies, compare_run, run_matrix, write_page
from rl_onoff.pipeline.compare_inputs import open_sources
from rl_onoff.pipeline.conclude import conclude, gate, track_rows
from rl_onoff.pipeline.engines import ANY, Slot, Steps, engines, known_engines, samplers, scorers
from rl_onoff.pipeline.stages import Run
from rl_onoff.report.tables import Matrix
from rl_onoff.rewards import load_reward
from rl_onoff.rundir.provenance import changes, landmarks, sampling_of, texts_of, texts_tokenizer
from rl_onoff.rundir.table import RunDir, Table
from rl_onoff.tracking import Tracker
from rl_onoff.types import Want

log = logging.getLogger(__name__)

Found = Matrix | Attribution | Layers | Acceptance


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
    if Stage.layers in config.stages:
        check_sides(config)
    asked = engines(config).values()
    if any(engine.merge_adapter for engine in asked) and not any(engine.adapter for engine in asked):
        raise UsageError("merge_adapter=true has no adapter to merge: set model.adapter, or model.merge_adapter=false")
    for engine in asked:
        create_backend(engine).check_model()
    load_reward(config.reward.function)
    asks = {Stage.generate, Stage.matrix, Stage.acceptance} & set(config.stages)
    rows = load_rows(config.data) if asks else []
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
    # most likely something is missing where nothing is there: an engine with its own process loads in the meantime
    tokenizer = this.slot.prepare(config.backend, begin=not completions.exists()).get_tokenizer()
    prompts = encode_rows(this.rows, config.data, tokenizer)
    this.rows = []  # a job of a sweep that waits for its next engine keeps no data
    missing = stages.missing_requests(this.folder, prompts, config.sampling)
    total, wanted = len(missing), len(prompts) * config.sampling.n
    if total < wanted:
        log.info("generate: %d of %s found on disk", wanted - total, plural(wanted, "response"))
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
    take_in_given(this)
    if not folder.completions.exists():
        fix = "set run_dir to an earlier run's folder, score.responses to a file, or experiment=analyse to sample first"
        raise UsageError(f"{folder.path} has no responses to score: {fix}")
    for name, engine in scorers(config).items():
        yield engine
        score_with(this, folder.scores(name), engine, name)


def take_in_given(this: Run) -> None:
    """Put the responses of score.responses, if any, into the run folder."""
    config, folder = this.config, this.folder
    if config.score.responses is not None:
        file, data = Path(config.score.responses), config.data
        tokenizer = this.slot.prepare(next(iter(scorers(config).values()))).get_tokenizer()
        options = {"chat_template": data.chat_template, "system": data.system, "format": config.compare.format}
        options["tools"] = "tools" not in data.template_kwargs
        texts = with_template_kwargs(tokenizer, data.template_kwargs)
        given = load_responses(config.score.responses, texts, **options)
        made_of = {"responses": str(file.absolute()), "content": given.file.source.content()}
        folder.completions.claim(made_of, changes)
        stages.take_in(folder, ((rollout, tokenizer.decode(rollout.prompt_ids.tolist())) for rollout in given))


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
    names = folder.score_names()
    records = [folder.completions.record(), *(folder.scores(name).record() for name in names)]
    tokenizer = texts_tokenizer(records, config.compare.tokenizer, known_engines(config)) if names else None
    comparisons = compare_run(folder, tokenizer)
    if not comparisons:
        if Stage.score in config.stages:
            return log.info("compare: the responses came without logprobs, so their scores have nothing to compare to")
        why = "has nothing to compare, which is responses with logprobs and scores of them"
        raise UsageError(f"{folder.path} {why}: set run_dir to such a run, or compare.behaviour and compare.target")
    this.comparisons |= comparisons
    this.page = write_page(folder, comparisons, texts_of(records, tokenizer))


def matrix(this: Run) -> Steps:
    """Every policy samples, every policy scores all samples."""
    found = yield from run_matrix(this, sample, score_with)
    rows, verdict = found.rows(), found.verdict()
    tell(this, "matrix", found, {"policies": found.names, "cells": rows, "verdict": verdict}, rows)
    this.page = this.folder.path / "matrix.html"


def attribute(this: Run) -> Steps:
    """Say why the target differs from the behaviour, and put it into the page."""
    yield ANY
    this.folder = open_sources(this.config.compare, this.folder)
    found = run_attribute(this, known_engines(this.config))
    section = found.to_dict()
    tell(this, "attribution", found, section, section["rows"])
    put_into_page(this)


def layers(this: Run) -> Steps:
    """Say where in the network backend and target part, and put it into the page."""
    take_in_given(this)
    found = yield from run_layers(this)
    tell(this, "layers", found, {"sentence": found.sentence}, found.rows())
    put_into_page(this)


def acceptance(this: Run) -> Steps:
    """Say whether the model on the engine is fit to be trained, and put it into the page; where the run scored nothing
    itself, into one of what acceptance drew and scored."""
    found = yield from run_acceptance(this)
    section = found.to_dict()
    tell(this, "acceptance", found, section, section["lines"])
    shown = this
    if not this.folder.score_names():
        shown = replace(this, folder=measured(this), comparisons={})
    if not shown.folder.score_names():
        log.warning("no page: nothing was scored, for acceptance.skip leaves it out")
        return
    put_into_page(shown)
    this.page = shown.page


def tell(this: Run, name: str, found: Found, section: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Take in what a stage found: `section` for metrics.json, `rows` for the tracker."""
    this.values.update(found.values())
    this.sections[name] = section
    this.texts.append(found.as_text())
    track_rows(this.tracker, name, rows)


def put_into_page(this: Run) -> None:
    """Write the page again, now that more lies in the folder."""
    try:
        compare(this)
    except UsageError as error:  # nothing was scored, or the sides cannot be compared: what the ladder may have named
        log.warning("no page: %s", error)


STAGES = {stage.__name__: stage for stage in (generate, score, compare, matrix, attribute, layers, acceptance)}
