"""The stage: one side after the other runs over the same ids; the target's hidden states lie on disk meanwhile."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Generator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rl_onoff.backends.engine_config import EngineConfig
from rl_onoff.backends.layers import points_of, states_name
from rl_onoff.config import RunConfig
from rl_onoff.errors import UsageError, plural
from rl_onoff.layers.analysis import Layers
from rl_onoff.layers.rule import Response
from rl_onoff.models.resolve import model_shape, num_experts
from rl_onoff.pipeline.engines import Wish, unseen
from rl_onoff.pipeline.stages import Run, responses
from rl_onoff.redaction import masked
from rl_onoff.rundir.table import Table
from rl_onoff.types import LayerWant, Rollout, Want

log = logging.getLogger(__name__)

COLUMNS = {"request_id": "string", "sample": "int32", "logprobs": "list<float32>", "logsumexp": "list<float32>",
           **dict.fromkeys(("differences", "norms", "overlap"), "list<list<float32>>")}  # fmt: skip
SPARE_BYTES = 1 << 30  # of the disk that are left free


def check_sides(config: RunConfig) -> None:
    """What is wrong with the two sides, before anything is loaded."""
    if config.target is None:
        fix = "set target=huggingface target.dtype=float32, or another engine"
        raise UsageError(f"experiment=layers compares the layers of backend and target, and there is no target: {fix}")
    for option, engine in {"backend": config.backend, "target": config.target}.items():
        if why := unseen(option, engine):
            raise UsageError(why)


def run_layers(this: Run) -> Generator[Wish, None, Layers]:
    """Compare the two sides' hidden states and write layers.json. A side that is done is not run again."""
    config, folder = this.config, this.folder
    assert config.target is not None
    sides = {"target": config.target.with_all_layers_run(), "backend": config.backend.with_all_layers_run()}
    named = ("model_name", "revision", "trust_remote_code")
    shapes = {who: model_shape(**{name: getattr(engine, name) for name in named}) for who, engine in sides.items()}
    if shapes["target"] != shapes["backend"]:
        sizes = " and ".join(f"{who} has {num} layers of {size}" for who, (num, size) in shapes.items())
        raise UsageError(f"their layers cannot be compared, {sizes} numbers: set model and target to one architecture")
    num_layers, size = shapes["target"]
    chosen = chosen_responses(this)
    longest = sorted(chosen.values(), key=lambda rollout: -rollout.num_tokens)[: config.layers.inside]
    inside = frozenset(map(states_name, longest))
    of = masked({who: engine.what_it_computes() for who, engine in sides.items()})
    digest = hashlib.blake2b(json.dumps(of, sort_keys=True).encode(), digest_size=4).hexdigest()
    place = folder.path / "layers" / digest
    tables, states = {who: Table(place / who, COLUMNS) for who in sides}, place / "states"
    done = tables["backend"].keys()
    waiting = {key: rollout for key, rollout in chosen.items() if key not in done}
    bytes_of = {
        key: 4 * size * (rollout.num_tokens - 1) * len(points_of(num_layers, states_name(rollout) in inside))
        for key, rollout in waiting.items()
    }
    written = {key for key, rollout in waiting.items() if _size(states / states_name(rollout)) == bytes_of[key]}
    written &= tables["target"].keys()
    if waiting:
        states.mkdir(parents=True, exist_ok=True)
        needed = sum(num for key, num in bytes_of.items() if key not in written)
        if needed + SPARE_BYTES > (free := shutil.disk_usage(states).free):
            what = f"the hidden states of {plural(len(waiting), 'response')} take {needed / 2**30:.1f} GiB"
            fix = f"set layers.limit below {len(chosen)}, layers.inside=0, or run_dir to another disk"
            raise UsageError(f"{what}, and {folder.path} has {free / 2**30:.1f} free: {fix}")
    for who, engine in sides.items():
        yield engine
        missing = [rollout for key, rollout in waiting.items() if who == "backend" or key not in written]
        if not missing:
            log.info("layers: the %s is done already", who)
            continue
        backend, table, done = this.slot.get(engine), tables[who], tables[who].keys()
        highest = max(int(ids.max()) for rollout in missing for ids in (rollout.prompt_ids, rollout.token_ids_T))
        if highest >= backend.info.vocab_size:
            what = f"the responses hold token ids up to {highest}, past the {backend.info.vocab_size} rows of the {who}"
            raise UsageError(f"{what}'s model: set model and target to ones with the tokenizer that sampled")
        table.describe(config=of[who], engine=asdict(backend.info))
        want = Want(layers=LayerWant(folder=str(states.absolute()), writes=who == "target", inside=inside))
        with table.writer() as writer, this.progress("layers", len(missing)) as progress:
            for scores in backend.score(missing, want):
                if scores.key not in done:
                    row = {"request_id": scores.request_id, "sample": scores.sample, "logprobs": scores.logprobs_T}
                    differences, norms = (None, None) if scores.layers is None else scores.layers
                    row |= {"logsumexp": scores.logsumexp_T, "differences": differences, "norms": norms}
                    row["overlap"] = scores.experts
                    writer.append(row)
                progress.add(len(scores.token_ids_T))
    shutil.rmtree(states, ignore_errors=True)
    engines = {who: table.record()["engine"] for who, table in tables.items()}
    found = Layers.of(read(tables, chosen), num_layers, {who: _said(sides[who], engines[who]) for who in sides})
    if found.routers is None and num_experts(config.backend.model_name, config.backend.revision):
        why = "their choice could not be read on both sides, or is of other numbers of experts"
        log.warning("nothing is said of the routers of this mixture of experts: %s", why)
    folder.write_json("layers.json", found.to_dict())
    return found


def chosen_responses(this: Run) -> dict[Any, Rollout]:
    """The responses that are looked at: the same ones every time, in whatever order they lie on disk."""
    path = this.folder.path
    if not this.folder.completions.exists():
        fix = "set run_dir to an earlier run's folder, score.responses to a file, or stages=[generate,score,layers]"
        raise UsageError(f"{path} has no responses whose layers could be compared: {fix}")
    found = {states_name(rollout): rollout for rollout in responses(this.folder) if len(rollout.prompt_ids)}
    if not found:
        raise UsageError(f"the responses in {path} came without prompt ids: set run_dir to one with them")
    return {found[name].key: found[name] for name in sorted(found)[: this.config.layers.limit]}


def read(tables: Mapping[str, Table], chosen: Mapping[Any, Rollout]) -> list[Response]:
    """What both sides said of the chosen responses."""
    rows = {who: {(row["request_id"], row["sample"]): row for row in table.rows()} for who, table in tables.items()}
    both = ((rollout, rows["backend"][key], rows["target"][key]) for key, rollout in chosen.items())
    return [
        Response(
            differences_PL=a["differences"],
            norms_PL=a["norms"],
            num_prompt=len(rollout.prompt_ids),
            logprobs_T=a["logprobs"],
            logprobs_target_T=b["logprobs"],
            logsumexp_T=b["logsumexp"],
            overlap_ML=a.get("overlap"),
        )
        for rollout, a, b in both
    ]


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else -1


def _said(config: EngineConfig, engine: Mapping[str, Any]) -> dict[str, Any]:
    return {name: engine[name] for name in ("engine", "version", "dtype")} | {"model": config.model_name}
