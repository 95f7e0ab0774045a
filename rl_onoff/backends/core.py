"""The core of every backend: token ids in and out, and everything about it that is not an engine call.

`complete(requests)` streams Rollouts as they finish, `score(rollouts, want)` streams TokenScores. An engine's folder
implements the four calls of `Core` and a pure `sampling_args`. Where the engine runs (here, in a worker process, in a
pool of workers) is decided by placement.py and is not the engine's business.
"""

from __future__ import annotations

import atexit
import gc
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from types import ModuleType
from typing import Any, ClassVar, Self

import numpy as np

from rl_onoff.backends.config import BackendConfig
from rl_onoff.backends.engine import Core, EngineInfo, Given
from rl_onoff.backends.engine_config import EngineConfig
from rl_onoff.backends.placement import place
from rl_onoff.errors import EngineError, MissingDependencyError, UsageError, plural
from rl_onoff.types import Key, LogprobKind, Rollout, SampleRequest, Sampling, TokenScores, Want

log = logging.getLogger(__name__)

atexit.register(gc.unfreeze)  # else Triton, imported while `no_collection` held, tells of leaks as the process ends


class CoreBackend(Core):
    """One language model behind one inference engine, token ids in and out. An engine adds the four calls of `Core`."""

    name: ClassVar[str]  # the config group's name
    package: ClassVar[str]  # what must be importable, and the extra that brings it
    config_class: ClassVar[type[EngineConfig]]
    logprob_kinds: ClassVar[frozenset[LogprobKind]]  # what it can report while sampling
    supports_gradients: ClassVar[bool] = False
    sees_layers: ClassVar[bool] = False  # whether it can do what Want.layers asks for
    worker_by_default: ClassVar[bool] = False
    adapters: ClassVar[bool] = False  # whether it loads what `config.model_files` and `config.adapter_beside` name
    plain_adapters: ClassVar[bool] = False  # whether all it computes beside the weights is a plain LoRA
    unknown_adapter_options: ClassVar[tuple[str, ...]] = ()  # of PEFT's config, which it would pass over

    def __init__(self, config: EngineConfig | BackendConfig):
        config = config.backend_config if isinstance(config, BackendConfig) else config
        if not isinstance(config, self.config_class):
            want, got = self.config_class.__name__, type(config).__name__
            raise UsageError(f"{type(self).__name__} takes a {want}, not a {got}")
        if not config.model_name or not isinstance(config.model_name, str):
            names = "model_name to (on the command line, model.name=) a hub id, a folder, a .gguf file or smollm2"
            raise UsageError(f"no model was named: set {names}")
        if config.logprob_kind not in self.logprob_kinds:
            kinds = ", ".join(kind.value for kind in LogprobKind if kind in self.logprob_kinds)
            what = f"{self.name} cannot report {config.logprob_kind.value} logprobs"
            raise UsageError(f"{what}: set backend.logprob_kind to one of {kinds}")
        self.config = config
        self._core: Core | None = None
        self._begun: Core | None = None  # the same, while it loads
        self._info: EngineInfo | None = None
        self._tokenizer: Any = None

    @staticmethod
    def sampling_args(sampling: Sampling, eos_ids: Sequence[int], seed: int) -> dict[str, Any]:
        """The engine's own sampling arguments, every one explicit: nothing comes from the model's generation config.
        Refuses a sampler that the engine does not have. None where the draw is ours and reads the sampling itself."""
        return {}

    def check_model(self) -> None:
        """Refuse a model that cannot be there."""
        from rl_onoff.models.resolve import check_name

        check_name(self.config.model_name, revision=self.config.revision)
        if self.config.adapter is not None:
            from rl_onoff.models.adapter import need_peft

            self._check_adapter(self.config.adapter, self.config.model_name)
            if self.config.merge_adapter or (not self.plain_adapters and self.config.python is None):
                need_peft()

    def _check_adapter(self, name: str, path: str) -> None:
        """Refuse an adapter that does not fit the model, whose files lie at `path`, or that the engine cannot
        compute."""
        from rl_onoff.models.adapter import check_base, open_adapter

        if not self.adapters:
            raise UsageError(f"{self.name} takes no adapters: set model.adapter=null, or that of the engine")
        adapter, config = open_adapter(name), self.config
        check_base(adapter, config.model_name, path)
        if config.adapter_beside and self.plain_adapters and (beyond := adapter.beyond(self.unknown_adapter_options)):
            why = f"{self.name} computes plain LoRA on the decoder's linear layers alone"
            raise UsageError(f"{why}, and model.adapter={name} has {beyond[0]}: set model.merge_adapter=true")

    def model_json(self, file: str) -> dict[str, Any]:
        """One of the model's JSON files; empty where it has none."""
        from rl_onoff.models.resolve import read_json_of

        return read_json_of(self.config.model_name, file, self.config.revision)

    def check_sampling(self, sampling: Sampling) -> None:
        """Refuse a sampler this engine does not have."""
        self.sampling_args(sampling, (), sampling.seed)

    def begin(self) -> None:
        """Let an engine that has a process of its own load while the caller does other things; `load` waits for it."""
        if self._core is None and self._begun is None:
            from rl_onoff.models.resolve import resolve

            # what has to be made is made here, and told; a merged copy also because PEFT is here
            files = resolve(self.config.model_name, revision=self.config.revision)
            if self.config.adapter is not None:
                self._check_adapter(self.config.adapter, files.path)
                self.config.model_files()
            core = self._place()
            core._begin()
            self._begun = core

    def load(self) -> None:
        """Load the model and tokenizer; loading twice is loading once. ImportError when the engine is not installed,
        ValueError for a model that is not there."""
        if self._core is not None:
            return
        self.begin()
        core, self._begun = self._begun, None
        assert core is not None
        try:
            with no_collection():
                self.get_tokenizer()
                self._info = core._load()
        except BaseException:
            core._close()
            raise
        self._core = core

    def _place(self) -> Core:
        """Where the engine runs: this object itself, a worker process, or a pool of them."""
        return place(self, self.config, in_worker=self.worker_by_default)

    def close(self) -> None:
        """Free the model, and every process, file and port the engine took."""
        cores, self._core, self._begun, self._info = (self._core, self._begun), None, None, None
        for core in cores:
            if core is not None:
                gc.unfreeze()
                core._close()

    def __enter__(self) -> Self:
        self.load()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def is_loaded(self) -> bool:
        """True between `load` and `close`."""
        return self._core is not None

    @property
    def info(self) -> EngineInfo:
        """What the engine says about itself; only once loaded."""
        if self._info is None:
            raise EngineError("the backend is not loaded: call backend.load() first")
        return self._info

    def complete(self, requests: Iterable[SampleRequest | Sequence[SampleRequest]]) -> Iterator[Rollout]:
        """Sample one response to every request, or to all of a list in its place (as `sample_requests` gives); yields
        each as it finishes, in any order."""
        asked = [one for request in requests for one in ([request] if isinstance(request, SampleRequest) else request)]
        by_key = self._by_key(asked)
        assert self._core is not None
        for rollout in self._core._generate(Given(asked)) if asked else ():
            request = by_key[rollout.key]
            # the text is the same for every engine: no special tokens, cut before the first stop string
            text = self.get_tokenizer().decode(rollout.token_ids_T.tolist(), skip_special_tokens=True)
            cut = cut_at_stop(text, request.sampling.stop)
            yield replace(rollout, prompt_ids=request.prompt_ids, text=text if cut is None else cut)

    def score(self, rollouts: Iterable[Rollout], want: Want | None = None) -> Iterator[TokenScores]:
        """Score given responses by prefill; yields each as it is done, in any order. Row t describes response token t,
        whose distribution is that of a plain forward pass over the unpadded sequence."""
        bare = []
        for rollout in rollouts:  # engines read the ids alone
            ids: Any = {name: np.asarray(getattr(rollout, name), np.int32) for name in ("prompt_ids", "token_ids_T")}
            bare.append(Rollout(request_id=rollout.request_id, sample=rollout.sample, **ids))
        self._by_key(bare)
        assert self._core is not None
        yield from self._core._score(bare, want or Want()) if bare else ()

    def _by_key(self, items: Iterable[Any]) -> dict[Key, Any]:
        """Requests or rollouts by (request id, sample), which is all that tells their results apart; each must fit."""
        found: dict[Key, Any] = {}
        max_len = self.info.max_len
        for item in items:
            request, num_prompt = f"request {item.request_id!r}", len(item.prompt_ids)
            room = len(item.token_ids_T) if isinstance(item, Rollout) else 1
            if item.key in found:
                raise UsageError(f"{request} (sample {item.sample}) is there twice: give every request its own id")
            if num_prompt == 0:
                raise UsageError(f"the prompt of {request} is empty: give it at least one token")
            if room == 0:
                raise UsageError(f"response {item.sample} to {request} has no tokens to score")
            if num_prompt + room > max_len:
                what = f"the prompt of {request} has {plural(num_prompt, 'token')} and needs {room} more"
                fix = "shorten it, leave the row out, or raise the engine's context length"
                raise UsageError(f"{what}, but the context holds {max_len}: {fix}")
            found[item.key] = item
        return found

    def get_tokenizer(self) -> Any:
        """The transformers tokenizer of the model; pads on the left."""
        if self._tokenizer is None:
            with no_collection():
                self._tokenizer = self._load_tokenizer()
        return self._tokenizer

    def _import_engine(self) -> ModuleType:
        """The engine's package, which may be missing or broken."""
        try:
            return import_module(self.package)
        except ImportError as error:
            if error.name != self.package:
                why = f"{self.package} is installed but cannot be imported ({error}): run `rl-onoff doctor`"
                raise EngineError(why) from error
            fix = "set backend.python to the interpreter of an environment that has it, or pip install"
            why = f"the {self.name} backend needs the {self.package} package: {fix} 'rl-onoff[{self.package}]'"
            raise MissingDependencyError(why) from error

    def _load_tokenizer(self) -> Any:
        from rl_onoff.models.resolve import load_tokenizer

        options = {name: getattr(self.config, name) for name in ("tokenizer", "revision", "trust_remote_code")}
        return load_tokenizer(self.config.model_name, **options)


@contextmanager
def no_collection() -> Iterator[None]:
    """A block of imports and loading, without Python's collector of cyclic garbage: it would go through the million
    objects that come to stay over and over, for a fifth of the time. They are left out of it until something closes."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
        if collects:
            gc.freeze()
    finally:
        if collects:
            gc.enable()


def disagreement(
    vocab_size: int,
    allowed: float,
    score: Callable[[Sequence[Rollout], Want], Iterable[TokenScores]],
    public: Callable[[Rollout], np.ndarray],
) -> str:
    """Why statistics computed inside an engine cannot be used, empty where they can: the logprobs of a short response
    from inside the engine and from its public API may be `allowed` nats apart."""
    ids = np.arange(1, 13, dtype=np.int32) * 7919 % vocab_size
    rollout = Rollout(request_id="check", sample=0, prompt_ids=ids[:4], token_ids_T=ids[4:])
    try:
        (inside,) = score([rollout], Want())
    except Exception as error:  # whatever moved inside the engine, its public API is still there
        log.debug("in-engine statistics failed", exc_info=True)
        return f"{type(error).__name__}: {error}"
    worst = float(np.abs(inside.logprobs_T - public(rollout)).max())
    return "" if worst <= allowed else f"its logprobs are off by up to {worst:.2g} nats"


def cut_at_stop(text: str, stop: Sequence[str]) -> str | None:
    """`text` before the first stop string in it; None when there is none."""
    hits = [text.index(string) for string in stop if string in text]
    return text[: min(hits)] if hits else None
