"""Options that every engine has; an engine's own are in the `config.py` of its folder. Hydra's schemas too.

The dataclass owns names, types, defaults and the sentence that documents each field; YAML owns choices only. Options go
by the engine's own names; what is not typed passes through `engine_kwargs`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Self

from rl_onoff.errors import UsageError, at_least, nearest
from rl_onoff.sampling import LogprobKind

if TYPE_CHECKING:
    from rl_onoff.models.resolve import ModelFiles

DTYPES = ("auto", "float32", "float16", "bfloat16")  # of the weights, on every engine
DTYPES_ELSEWHERE = {
    "bf16": "bfloat16", "half": "float16", "fp16": "float16", "f16": "float16", "fp32": "float32", "f32": "float32",
}  # fmt: skip


class PoolKind(Enum):
    """Where an engine's replicas run."""

    local = "local"  # processes of this machine
    ray = "ray"  # actors on a Ray cluster


@dataclass(kw_only=True, slots=True)
class PoolConfig:
    """Where the engines' replicas run."""

    kind: PoolKind = PoolKind.local
    """local: processes of this machine; ray: actors on a Ray cluster, whose nodes have rl_onoff and the engine."""
    address: str | None = None
    """Ray cluster to use: auto, HOST:PORT or ray://HOST:PORT; null is RAY_ADDRESS, else the one `ray start` began on
    this machine, else one that is started for the run."""
    cpus_per_replica: int = 1
    """CPUs a replica reserves on its Ray node, beside its GPUs; also the threads Ray lets it compute with on a CPU."""
    wait_s: float = 300.0
    """Longest wait for room on the Ray cluster, in seconds."""
    runtime_env: dict[str, Any] = field(default_factory=dict)
    """Ray's runtime environment of the replicas, passed on as it is: env_vars, working_dir, pip."""

    def __post_init__(self) -> None:
        at_least(1, "pool.cpus_per_replica", self.cpus_per_replica, 1)
        at_least(0, "pool.wait_s", self.wait_s, 300)


WHEN = {
    "": "always", "gpu": "on a GPU, or where it is set", "set": "where it is set",
    "low": "with weights in less than float32",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Switch:
    """One thing that can be turned on an engine without another model: what the attribution tries, one at a time."""

    name: str
    change: str  # in words
    options: dict[str, Any]  # options of the engine's config, others in engine_kwargs; None takes the option away
    when: str = ""  # it applies: a key of WHEN
    tried: str = "CPU"  # where it was run; empty: nowhere yet


@dataclass(kw_only=True, slots=True)
class EngineConfig:
    """Options every engine has."""

    _target_: str = ""
    """The backend class that Hydra instantiates."""
    model_name: str = ""
    """Hub id, local folder, .gguf file, or the built-in `smollm2`."""
    revision: str | None = None
    """Hub revision (branch, tag or commit); null is the default branch."""
    tokenizer: str | None = None
    """Hub id or folder of the tokenizer; null is the model's own."""
    trust_remote_code: bool = False
    """Run code that ships with the model; only for models you trust."""
    dtype: str | None = None
    """Type of the weights: auto, float32, float16, bfloat16 or, with HuggingFace, float64; null is auto, what the model
    was saved in."""
    adapter: str | None = None
    """LoRA adapter on top of the weights: a folder that PEFT wrote, or a hub id; null is none."""
    merge_adapter: bool = False
    """Merge the adapter into a copy of the weights, in their type; false computes it beside them, as a trainer does."""
    tp_size: int | None = None
    """Devices one replica is split over; null is 1."""
    dp_size: int | None = None
    """Replicas that share out the work, each with tp_size devices; null is one (HuggingFace with tp_size above 1: GPUs
    / tp_size; on a Ray cluster: as many as its GPUs hold)."""
    pool: PoolConfig = field(default_factory=PoolConfig)
    """Where the replicas run: the fields of the group `pool`."""
    python: str | None = None
    """Interpreter the engine runs under, for an engine that lives in an environment of its own; null is this one."""
    worker: bool | None = None
    """Run the engine in a process of its own; null is the engine's habit (vLLM, SGLang: yes; HuggingFace: no)."""
    logprob_kind: LogprobKind = LogprobKind.raw
    """Kind of logprobs reported while sampling: raw, scaled or processed (not every engine gives all three)."""
    seed: int = 0
    """Seed of the engine itself; sampling has its own in sampling.seed."""
    engine_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further options, passed to the engine as they are."""

    name: ClassVar[str] = ""  # the backend's name: huggingface, vllm, …
    second_names: ClassVar[dict[str, str]] = {}  # of an option above -> the engine's own name for it
    dtypes: ClassVar[tuple[str, ...]] = DTYPES
    owned_kwargs: ClassVar[tuple[str, ...]] = ()  # engine_kwargs that would contradict an option above: name=option
    reference: ClassVar[str] = "huggingface"  # the engine whose forward pass in float32 is the truth about the weights
    inexact: ClassVar[tuple[str, ...]] = ("engine_kwargs",)  # options that a truth must not have
    switches: ClassVar[tuple[Switch, ...]] = ()
    placement: ClassVar[frozenset[str]] = frozenset(  # where and how fast the engine runs, not what it computes
        ("python", "worker", "dp_size", "pool", "device", "device_map", "batch_size", "max_batch_tokens",
         "gpu_memory_utilization", "mem_fraction_static", "enforce_eager", "trust_remote_code")
    )  # fmt: skip

    def what_it_computes(self) -> dict[str, Any]:
        """The options that numbers depend on, JSON-able; two configs that agree here give the same rows."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in self.placement}
        return {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}

    def option(self, name: str) -> Any:
        """The value of an option, which may be set under the engine's own name."""
        own = getattr(self, self.second_names.get(name, name))
        return getattr(self, name) if own is None else own

    @property
    def num_devices(self) -> int:
        """Devices that one replica is split over."""
        return self.option("tp_size") or 1

    @property
    def gpus_per_replica(self) -> int:
        """GPUs that a replica must have to itself, on a machine that has some."""
        device = str(getattr(self, "device", None) or self.engine_kwargs.get("device") or "")
        return 0 if device.startswith(("cpu", "mps")) else self.num_devices

    @property
    def weights_dtype(self) -> str:
        return self.option("dtype") or "auto"

    def model_files(self) -> ModelFiles:
        """What the engine loads: the model, or the copy of it that the adapter is merged into."""
        from rl_onoff.models.adapter import merged, open_adapter
        from rl_onoff.models.resolve import resolve

        files = resolve(self.model_name, revision=self.revision)
        if self.adapter is None or not self.merge_adapter:
            return files
        options = {"dtype": self.weights_dtype, "trust_remote_code": self.trust_remote_code}
        return merged(files, open_adapter(self.adapter), **options)

    @property
    def adapter_beside(self) -> str | None:
        """The adapter that the engine itself computes."""
        return None if self.merge_adapter else self.adapter

    # The same engine with one thing changed: what the attribution and the view into layers ask for

    def with_option(self, name: str, value: Any) -> Self:
        return dataclasses.replace(self, **{name: value, self.second_names.get(name, name): value})

    def turned(self, switch: Switch) -> Self | None:
        """With a switch turned; None where it does not apply, or is turned already."""
        kwargs, values, is_set = dict(self.engine_kwargs), {}, False
        for name, value in switch.options.items():
            options = values if hasattr(self, name) else kwargs
            now = getattr(self, name) if hasattr(self, name) else kwargs.get(name)
            options[name] = {**(now or {}), **value} if isinstance(value, dict) else value
            is_set |= bool(value.keys() & (now or {}).keys() if isinstance(value, dict) else now)
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        turned = dataclasses.replace(self, **values, engine_kwargs=kwargs)
        applies = is_set or switch.when in ("", "low")
        if switch.when == "gpu" and not is_set:
            import torch

            applies = self.gpus_per_replica > 0 and torch.cuda.is_available()
        return turned if applies and turned != self else None

    def across_nodes(self) -> Self | None:
        """With one replica on several nodes of a Ray cluster; None where the engine cannot do that."""
        return None

    def with_all_layers_run(self) -> Self:
        """With every layer run as a module over every token: nothing compiled, captured or taken from a cache."""
        return self

    def with_model_of(self, other: EngineConfig) -> Self:
        names = ("model_name", "revision", "tokenizer", "trust_remote_code", "adapter", "merge_adapter")
        return dataclasses.replace(self, **{name: getattr(other, name) for name in names})

    def __post_init__(self) -> None:
        for ours, own in self.second_names.items():
            one, other = getattr(self, ours), getattr(self, own)
            if one is not None and other is not None and one != other:
                both = f"backend.{ours}={one} and backend.{own}={other}"
                raise UsageError(f"{both} are one option with two values: set one of them")
        at_least(1, "backend.tp_size", self.option("tp_size"), 1)
        at_least(1, "backend.dp_size", self.dp_size, 1)
        if (dtype := self.option("dtype")) not in (None, *self.dtypes):
            what = f"backend.{self.second_names['dtype'] if self.dtype is None else 'dtype'} is {dtype!r}"
            name = str(dtype).lower().removeprefix("torch.")
            meant = DTYPES_ELSEWHERE.get(name) or nearest(name, DTYPES) or "float32"
            fix = f"set model.dtype={meant}, or that of backend or target where it is set"
            raise UsageError(f"{what} but must be one of {', '.join(self.dtypes)}: {fix}")
        if self.python is not None and self.worker is False:
            raise UsageError("backend.python needs a process of its own: drop backend.worker=false")
        for owned in self.owned_kwargs:
            name, _, option = owned.partition("=")
            if name in self.engine_kwargs:
                instead = option or f"backend.{name}"
                raise UsageError(f"backend.engine_kwargs.{name} is decided elsewhere: set {instead} instead")
