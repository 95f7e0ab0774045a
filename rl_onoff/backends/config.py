"""What a backend is told: one dataclass per engine (Hydra's schemas too), and the nested form of the public API.

The dataclass owns names, types, defaults and the sentence that documents each field; YAML owns choices only. Options go by
the engine's own names; what is not typed here passes through `engine_kwargs`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Self

from rl_onoff.errors import UsageError, nearest
from rl_onoff.sampling import LogprobKind

DTYPES = ("auto", "float32", "float16", "bfloat16")
DTYPES_ELSEWHERE = {"bf16": "bfloat16", "half": "float16", "fp16": "float16", "f16": "float16", "fp32": "float32", "f32": "float32"}


class PoolKind(Enum):
    """Where an engine's replicas run."""

    local = "local"  # processes of this machine
    ray = "ray"  # actors on a Ray cluster


@dataclass(kw_only=True, slots=True)
class PoolConfig:
    """Where the engines' replicas run."""

    kind: PoolKind = PoolKind.local
    """local: processes of this machine; ray: actors on a Ray cluster, whose nodes must be able to import rl_onoff and the engine."""
    address: str | None = None
    """Ray cluster to use: auto, HOST:PORT or ray://HOST:PORT; null is RAY_ADDRESS, else the one `ray start` began on this machine, else
    one that is started for the run."""
    cpus_per_replica: int = 1
    """CPUs a replica reserves on its Ray node, beside its GPUs; also how many threads Ray lets it compute with on a CPU."""
    wait_s: float = 300.0
    """Longest wait for room on the Ray cluster, in seconds."""
    runtime_env: dict[str, Any] = field(default_factory=dict)
    """Ray's runtime environment of the replicas, passed on as it is: env_vars, working_dir, pip."""

    def __post_init__(self) -> None:
        if self.cpus_per_replica < 1:
            raise UsageError(f"pool.cpus_per_replica is {self.cpus_per_replica} but must be at least 1: set pool.cpus_per_replica=1")
        if self.wait_s < 0:
            raise UsageError(f"pool.wait_s is {self.wait_s} but must be at least 0: set pool.wait_s=300")


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
    """Type of the weights: auto, float32, float16 or bfloat16; null is auto, what the model was saved in."""
    tp_size: int | None = None
    """Devices one replica is split over; null is 1."""
    dp_size: int | None = None
    """Replicas that share out the work, each with tp_size devices; null is one (HuggingFace with tp_size above 1: GPUs / tp_size; on a Ray
    cluster: as many as its GPUs hold)."""
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

    owned_kwargs: ClassVar[tuple[str, ...]] = ()  # engine_kwargs that would contradict an option above: name=option
    placement: ClassVar[frozenset[str]] = frozenset(  # where and how fast the engine runs, not what it computes
        ("python", "worker", "dp_size", "pool", "device", "device_map", "batch_size", "max_batch_tokens", "gpu_memory_utilization",
         "mem_fraction_static", "enforce_eager", "trust_remote_code")
    )  # fmt: skip

    @property
    def name(self) -> str:
        """The backend's name: huggingface, vllm, …"""
        return next(name for name, schema in ENGINE_CONFIGS.items() if isinstance(self, schema))

    def what_it_computes(self) -> dict[str, Any]:
        """The options that numbers depend on, JSON-able; two configs that agree here give the same rows."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in self.placement}
        return {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}

    @property
    def num_devices(self) -> int:
        """Devices that one replica is split over."""
        return self.tp_size or 1

    @property
    def gpus_per_replica(self) -> int:
        """GPUs that a replica must have to itself, on a machine that has some."""
        device = str(getattr(self, "device", None) or self.engine_kwargs.get("device") or "")
        return 0 if device.startswith(("cpu", "mps")) else self.num_devices

    # The same engine with one thing changed: what the attribution tries.

    def with_dtype(self, dtype: str | None) -> Self:
        return dataclasses.replace(self, dtype=dtype)

    def with_float32_head(self) -> Self | None:
        """With the LM head in float32; None where the engine cannot do that."""
        return None

    def on_one_device(self) -> Self:
        return dataclasses.replace(self, tp_size=1)

    def across_nodes(self) -> Self | None:
        """With one replica on several nodes of a Ray cluster; None where the engine cannot do that."""
        return None

    def with_model_of(self, other: EngineConfig) -> Self:
        """With the other's weights and tokenizer."""
        names = ("model_name", "revision", "tokenizer", "trust_remote_code")
        return dataclasses.replace(self, **{name: getattr(other, name) for name in names})

    def __post_init__(self) -> None:
        for name in ("tp_size", "dp_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"backend.{name} is {value} but must be at least 1: set backend.{name}=1 or larger")
        _check_dtype("the dtype", self.dtype)
        if self.python is not None and self.worker is False:
            raise UsageError("backend.python names another interpreter, which needs a process of its own: drop backend.worker=false")
        for owned in self.owned_kwargs:
            name, _, option = owned.partition("=")
            if name in self.engine_kwargs:
                raise UsageError(f"backend.engine_kwargs.{name} is decided elsewhere: set {option or 'backend.' + name} instead")

    def _check_context(self, name: str) -> None:
        if (value := getattr(self, name)) is not None and value < 1:
            raise UsageError(f"backend.{name} is {value} but must be at least 1: set backend.{name}=4096, or null for the model's own")

    @property
    def weights_dtype(self) -> str:
        return self.dtype or "auto"

    def _same(self, ours: str, engines: str) -> Any:
        """The value of an option that has two names; an error when both are set and differ."""
        mine, theirs = getattr(self, ours), getattr(self, engines)
        if mine is not None and theirs is not None and mine != theirs:
            raise UsageError(f"backend.{ours}={mine} and backend.{engines}={theirs} are one option with two values: set one of them")
        return theirs if mine is None else mine


@dataclass(kw_only=True, slots=True)
class HuggingFaceBackendConfig(EngineConfig):
    """HuggingFace Transformers, in this process."""

    _target_: str = "rl_onoff.backends.huggingface.HuggingFaceBackend"
    device: str | None = None
    """cpu, cuda, cuda:0, mps, …; null is cuda where there is one, else cpu."""
    torch_dtype: str | None = None
    """The engine's own name for dtype."""
    device_map: str | None = None
    """auto, balanced, …: split the layers over the GPUs; overrides device. Null with several GPUs and no tp_size is auto."""
    head_dtype: str | None = None
    """Type the LM head computes in: float32, or null for the weights' own."""
    attn_implementation: str | None = None
    """eager, sdpa, flash_attention_2, …; null is the engine's choice."""
    batch_size: int = 16
    """Most responses computed at once."""
    max_batch_tokens: int = 16384
    """Most tokens (prompts and responses, padding included) computed at once; a single longer response still runs, alone."""
    owned_kwargs: ClassVar[tuple[str, ...]] = (
        "dtype", "torch_dtype", "device_map", "attn_implementation", "revision=model.revision", "trust_remote_code=model.trust_remote_code",
    )  # fmt: skip

    def __post_init__(self) -> None:
        EngineConfig.__post_init__(self)
        _check_dtype("backend.torch_dtype", self.torch_dtype)
        self._same("dtype", "torch_dtype")
        if self.head_dtype not in (None, "float32"):
            raise UsageError(f"backend.head_dtype is {self.head_dtype!r} but must be float32 or null: set backend.head_dtype=float32")
        if ":" in (self.device or "") and (self.dp_size or self.tp_size or 1) > 1:
            raise UsageError(
                f"backend.device={self.device} names one device, but replicas and their parts share out all: set backend.device=cuda"
            )
        for name in ("batch_size", "max_batch_tokens"):
            if getattr(self, name) < 1:
                raise UsageError(f"backend.{name} is {getattr(self, name)} but must be at least 1: set backend.{name}=16")

    @property
    def weights_dtype(self) -> str:
        return self._same("dtype", "torch_dtype") or "auto"

    def with_dtype(self, dtype: str | None) -> Self:
        return dataclasses.replace(self, dtype=dtype, torch_dtype=dtype)

    def with_float32_head(self) -> Self:
        return dataclasses.replace(self, head_dtype="float32")


@dataclass(kw_only=True, slots=True)
class VLLMBackendConfig(EngineConfig):
    """vLLM, in a process of its own."""

    _target_: str = "rl_onoff.backends.vllm.VLLMBackend"
    tensor_parallel_size: int | None = None
    """The engine's own name for tp_size."""
    gpu_memory_utilization: float | None = None
    """Fraction of GPU memory to use, 0 to 1; null is 0.9."""
    max_model_len: int | None = None
    """Longest sequence in tokens; null is the model's own."""
    enforce_eager: bool = False
    """Skip compilation and CUDA graphs: starts faster, runs slower."""
    in_engine_stats: bool = True
    """Compute token statistics inside the engine; false takes them through the engine's public API, slowly."""
    owned_kwargs: ClassVar[tuple[str, ...]] = (
        "model=model.name", "tokenizer=model.tokenizer", "dtype", "seed", "tensor_parallel_size", "gpu_memory_utilization", "max_model_len",
        "enforce_eager", "revision=model.revision", "trust_remote_code=model.trust_remote_code", "logprobs_mode=backend.logprob_kind",
        "max_logprobs=score.top_k", "worker_extension_cls=backend.in_engine_stats", "data_parallel_size=backend.dp_size",
    )  # fmt: skip

    def __post_init__(self) -> None:
        EngineConfig.__post_init__(self)
        self._same("tp_size", "tensor_parallel_size")
        self._check_context("max_model_len")
        if self.gpu_memory_utilization is not None and not 0 < self.gpu_memory_utilization <= 1:
            raise UsageError(
                f"backend.gpu_memory_utilization is {self.gpu_memory_utilization} but must be above 0 and at most 1: "
                "set backend.gpu_memory_utilization=0.9"
            )

    @property
    def num_devices(self) -> int:
        return self.tensor_parallel

    @property
    def tensor_parallel(self) -> int:
        return self._same("tp_size", "tensor_parallel_size") or 1

    def on_one_device(self) -> Self:
        return dataclasses.replace(self, tp_size=1, tensor_parallel_size=1)

    def across_nodes(self) -> Self:
        # its executor takes GPUs of the cluster that RAY_ADDRESS names, in a placement group of its own. Written from vLLM 0.32's source
        # and not run: its CPU platform refuses this executor, and there was no cluster with GPUs
        return dataclasses.replace(self, engine_kwargs={"distributed_executor_backend": "ray", **self.engine_kwargs})

    def with_float32_head(self) -> Self:
        overrides = {**self.engine_kwargs.get("hf_overrides", {}), "head_dtype": "float32"}
        return dataclasses.replace(self, engine_kwargs={**self.engine_kwargs, "hf_overrides": overrides})


@dataclass(kw_only=True, slots=True)
class SGLangBackendConfig(EngineConfig):
    """SGLang, in a process of its own."""

    _target_: str = "rl_onoff.backends.sglang.SGLangBackend"
    mem_fraction_static: float | None = None
    """Fraction of memory for weights and cache, 0 to 1; null is 0.85."""
    context_length: int | None = None
    """Longest sequence in tokens; null is the model's own."""
    in_engine_stats: bool = True
    """Compute token statistics inside the engine; false takes them through the engine's public API, slowly."""
    owned_kwargs: ClassVar[tuple[str, ...]] = (
        "model_path=model.name", "tokenizer_path=model.tokenizer", "dtype", "tp_size", "dp_size", "mem_fraction_static", "context_length",
        "random_seed=backend.seed", "revision=model.revision", "trust_remote_code=model.trust_remote_code",
    )  # fmt: skip

    def __post_init__(self) -> None:
        EngineConfig.__post_init__(self)
        self._check_context("context_length")
        if self.mem_fraction_static is not None and not 0 < self.mem_fraction_static <= 1:
            raise UsageError(
                f"backend.mem_fraction_static is {self.mem_fraction_static} but must be above 0 and at most 1: "
                "set backend.mem_fraction_static=0.85"
            )

    def with_float32_head(self) -> Self:
        return dataclasses.replace(self, engine_kwargs={**self.engine_kwargs, "enable_fp32_lm_head": True})


@dataclass(kw_only=True, slots=True)
class FakeBackendConfig(EngineConfig):
    """A tiny deterministic language model in numpy, for tests and for trying the runner without an engine."""

    _target_: str = "rl_onoff.backends.fake.FakeBackend"
    noise: float = 0.0
    """Standard deviation of noise added to the logits, as a stand-in for another policy."""

    @property
    def gpus_per_replica(self) -> int:
        return 0


ENGINE_CONFIGS: dict[str, type[EngineConfig]] = {
    "huggingface": HuggingFaceBackendConfig,
    "vllm": VLLMBackendConfig,
    "sglang": SGLangBackendConfig,
    "fake": FakeBackendConfig,
}


@dataclass(kw_only=True, slots=True)
class BackendConfig:
    """The nested form of the public API: `backend_type`, `model_name`, and the engine's own options.

    Raises ValueError for an unknown backend or option, and for a config of another engine.
    """

    backend_type: str
    model_name: str
    backend_config: EngineConfig | None = None

    def __post_init__(self) -> None:
        from rl_onoff.backends.nested import schema_of

        schema = schema_of(self.backend_type)
        if self.backend_config is None:
            self.backend_config = schema()
        if not isinstance(self.backend_config, schema):
            raise UsageError(f"backend {self.backend_type!r} takes a {schema.__name__}, not a {type(self.backend_config).__name__}")
        if not self.model_name or not isinstance(self.model_name, str):
            raise UsageError("no model was named: set model_name to a hub id, a folder, a .gguf file or smollm2")
        self.backend_config = dataclasses.replace(self.backend_config, model_name=self.model_name)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BackendConfig:
        """Build from `{"backend_type": …, "model_name": …, "backend_specific": {…}}`."""
        from rl_onoff.backends.nested import engine_config

        backend_type = values.get("backend_type", "huggingface")
        return cls(backend_type=backend_type, model_name=values.get("model_name", ""), backend_config=engine_config(backend_type, values))

    @classmethod
    def from_file(cls, path: str | Path) -> BackendConfig:
        """Read a YAML file of the same shape; a relative path is looked for here, then beside the installed package."""
        import yaml

        file = Path(path)
        if not file.exists() and not file.is_absolute():
            file = Path(__file__).parents[2] / path
        if not file.exists():
            raise UsageError(f"there is no config file {path}")
        values = yaml.safe_load(file.read_text())
        if not isinstance(values, dict):
            raise UsageError(f"{path} does not hold a mapping with backend_type, model_name and backend_specific")
        return cls.from_dict(values)


def _check_dtype(what: str, value: Any) -> None:
    if value in (None, *DTYPES):
        return
    name = str(value).lower().removeprefix("torch.")
    meant = DTYPES_ELSEWHERE.get(name) or nearest(name, DTYPES) or "float32"
    raise UsageError(
        f"{what} is {value!r} but must be one of {', '.join(DTYPES)}: set model.dtype={meant}, or that of backend or target where it is set"
    )
