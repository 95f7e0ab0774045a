"""LoRA adapters in PEFT's format: what their files say, checked before weights load; a model that computes one beside
its weights; and a copy of a model that one is merged into, which every engine loads.

A trainer computes W x + s B (A x). An engine that is given merged weights computes (W + s B A) x, and in bfloat16 the
sum of weights loses what is small beside W. So the two are different policies.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import re
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rl_onoff.errors import MissingDependencyError, UsageError, one_line
from rl_onoff.models.convert import made_once
from rl_onoff.models.resolve import ModelFiles, hub_errors, is_hub_id, load_errors

log = logging.getLogger(__name__)

FILES = ("adapter_config.json", "adapter_model.safetensors")
# a pair of matrices beside a linear layer of the decoder: no embedding, no LM head, no DoRA, no bias, and no expert,
# which vLLM 0.32 passes over where lora_target_modules names only its projections
PLAIN = re.compile(r"base_model\.model\.(?!.*\.experts\b)(.+\.\d+\..+)\.lora_[AB]\.weight")
# options under which PEFT computes something else than s B (A x), or changes the weights as it loads an adapter
SPECIAL = ("layer_replication", "alora_invocation_tokens", "use_bdlora", "use_qalora", "use_dora", "lora_bias")
CHANGES_WEIGHTS = ("pissa", "olora", "corda", "loftq")  # beginnings of init_lora_weights
BESIDE = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".py")  # endings of a model's files that are no weights


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """What an adapter's files say."""

    name: str  # as the user wrote it
    folder: Path
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]  # of its tensors

    @property
    def rank(self) -> int:
        """The largest rank of its matrices."""
        return max([self.config["r"], *(self.config.get("rank_pattern") or {}).values()])

    @property
    def modules(self) -> list[str]:
        """The last names of the layers it changes, such as q_proj."""
        found = map(PLAIN.fullmatch, self.shapes)
        return sorted({match[1].rpartition(".")[2] for match in found if match})

    def beyond(self, options: Collection[str]) -> list[str]:
        """What it has that is no plain pair of matrices beside a linear layer of the decoder; `options` of its config
        count too."""
        wanted = [name for name in (*SPECIAL, *options) if self.config.get(name)]
        if str(self.config.get("init_lora_weights")).lower().startswith(CHANGES_WEIGHTS):
            wanted.append(f"init_lora_weights={self.config['init_lora_weights']}")
        return wanted + [name for name in self.shapes if not PLAIN.fullmatch(name)]


def open_adapter(name: str) -> Adapter:
    """Read `model.adapter`, a folder or a hub id, without its weights; UsageError for what is no LoRA adapter."""
    from safetensors import SafetensorError, safe_open

    folder = Path(name).expanduser().resolve()
    if not folder.is_dir():
        if folder.exists() or not is_hub_id(name):
            why = f"model.adapter={name} is neither a folder here nor a hub id (owner/name)"
            raise UsageError(f"{why}: set model.adapter to a folder with {FILES[0]}, or to null")
        from huggingface_hub import snapshot_download

        with hub_errors(name, "model.adapter"):
            folder = Path(snapshot_download(name, allow_patterns=list(FILES)))
    for file in FILES:
        if not (folder / file).is_file():
            fix = "set model.adapter to a folder that PEFT's save_pretrained wrote"
            raise UsageError(f"model.adapter={name} has no {file}, so it is no adapter: {fix}")
    try:
        config = json.loads((folder / FILES[0]).read_text(encoding="utf-8"))
        with safe_open(folder / FILES[1], "np") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (ValueError, SafetensorError) as error:
        why = f"the files of model.adapter={name} cannot be read ({one_line(error)})"
        raise UsageError(f"{why}: save the adapter again, or set another model.adapter") from error
    if config.get("peft_type") != "LORA" or not isinstance(config.get("r"), int):
        why = f"model.adapter={name} is an adapter of the type {config.get('peft_type')}, not LORA"
        raise UsageError(f"{why}: merge it yourself and set model.name to the result, or set another model.adapter")
    return Adapter(name=name, folder=folder, config=config, shapes=shapes)


def check_base(adapter: Adapter, model: str, path: str) -> None:
    """Refuse an adapter of another model than `model`, whose files lie at `path` where it is a folder."""
    base = adapter.config.get("base_model_name_or_path") or ""
    names = {Path(name).name.lower() for name in (model, path)}
    trained = f"model.adapter={adapter.name} was trained on {base}, and model.name is {model}"
    if base and Path(base).name.lower() not in names:
        if all("/" in name and is_hub_id(name) and not Path(name).is_dir() for name in (base, model)):
            raise UsageError(f"{trained}: set model.name={base}, or to a folder if its weights are the same")
        _warn(f"{trained}: this is right only if the two are the same weights")
    if Path(path).is_dir():
        _check_shapes(adapter, model, Path(path))


@cache
def _warn(message: str) -> None:  # once, for several engines may have the adapter
    log.warning("%s", message)


def _check_shapes(adapter: Adapter, model: str, folder: Path) -> None:
    """Compare the shapes of matrices and weights, as far as the files of both have the same names."""
    from safetensors import safe_open

    weights: dict[str, Sequence[int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "np") as tensors:
            weights |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    names = {match[1] for match in map(PLAIN.fullmatch, adapter.shapes) if match}
    kinds = {name.rpartition(".")[2] for name in names if f"{name}.weight" in weights}
    for name in sorted(names):
        a, b = (adapter.shapes.get(f"base_model.model.{name}.lora_{which}.weight", ()) for which in "AB")
        weight, has = weights.get(f"{name}.weight", []), ""
        if not weight and name.rpartition(".")[2] in kinds:  # else the two only name their layers differently
            has = f"there is no {name}"
        # sorted, for a layer like GPT-2's holds its weight transposed
        elif len(weight) == len(a) == len(b) == 2 and sorted(weight) != sorted((b[0], a[1])):
            has = f"{name} is {weight[0]} by {weight[1]} there, and {b[0]} by {a[1]} in the adapter"
        if has:
            base = adapter.config.get("base_model_name_or_path") or "the model it was trained on"
            why = f"model.adapter={adapter.name} does not fit model.name={model} ({has})"
            raise UsageError(f"{why}: set model.name to {base}")


def need_peft() -> None:
    """Refuse an adapter where PEFT, which computes or merges it, is not installed."""
    if importlib.util.find_spec("peft") is None:
        why = "model.adapter needs the package peft, to compute it in HuggingFace and to merge it for any engine"
        raise MissingDependencyError(f"{why}: pip install 'rl-onoff[lora]', or set model.adapter=null")


def with_adapter(model: Any, adapter: Adapter) -> Any:
    """PEFT's model around a model of transformers, whose layers compute the adapter from now on."""
    import peft

    try:
        wrapped = peft.PeftModel(model, peft.PeftConfig.from_pretrained(str(adapter.folder)))
        found = wrapped.load_adapter(str(adapter.folder), "default", torch_device="cpu")
    except (ValueError, RuntimeError, TypeError, KeyError, ImportError, OSError) as error:
        why = f"model.adapter={adapter.name} cannot be put on the model ({one_line(error)[:300]})"
        raise UsageError(f"{why}: set model.name to the model it was trained on") from error
    if lost := [*found.missing_keys, *found.unexpected_keys]:  # of which PEFT only warns, or says nothing
        why = f"model.adapter={adapter.name} and the model do not have the same layers ({lost[0]})"
        raise UsageError(f"{why}: set model.name to the model it was trained on")
    return wrapped


def merged(files: ModelFiles, adapter: Adapter, *, dtype: str, trust_remote_code: bool) -> ModelFiles:
    """A copy of the model with the adapter in its weights, made once: s B A is computed in float32, and its sum with a
    weight is rounded once to `dtype`."""
    from huggingface_hub import snapshot_download

    source = Path(files.path)
    if not source.is_dir():
        with hub_errors(files.name):
            kept = [f"*{ending}" for ending in BESIDE]
            source = Path(snapshot_download(files.path, revision=files.revision, allow_patterns=kept))  # of one commit
    parts = sorted(file for folder in (source, adapter.folder) for file in folder.iterdir() if file.is_file())
    stats = [(str(file), stat.st_size, stat.st_mtime_ns) for file in parts for stat in [file.stat()]]
    digest = hashlib.blake2b(repr((stats, dtype)).encode(), digest_size=8).hexdigest()

    def make(folder: Path) -> None:
        import torch
        import transformers

        need_peft()
        log.info("merging the adapter %s into %s, once", adapter.name, files.name)
        options = {"revision": files.revision or "main", "trust_remote_code": trust_remote_code}
        with load_errors(files.name):
            load: Any = transformers.AutoModelForCausalLM.from_pretrained
            model = load(files.path, dtype=dtype if dtype == "auto" else getattr(torch, dtype), **options)
        config, why = model.config, ""
        if getattr(config, "quantization_config", None) is not None:
            why = f"the weights of model.name={files.name} are quantised"
        elif config.get_text_config().tie_word_embeddings and not all(re.search(r"\.\d+\.", x) for x in adapter.shapes):
            why = "the adapter changes the embeddings or the LM head, which are one tensor in this model"
        if why:
            raise UsageError(f"model.adapter={adapter.name} cannot be merged, for {why}: set model.merge_adapter=false")
        with_adapter(model, adapter).merge_and_unload().save_pretrained(folder)
        for file in source.iterdir():
            if file.suffix in BESIDE and not file.name.endswith(".index.json") and not (folder / file.name).exists():
                shutil.copy(file, folder)

    stem = f"{Path(files.name).name}+{Path(adapter.name).name}-{dtype}-{digest}"
    return ModelFiles(name=files.name, path=str(made_once(stem, make)))
