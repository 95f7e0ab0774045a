"""HuggingFace's hybrid parallelism: what it says of itself, and which models and settings it refuses."""

from __future__ import annotations

import logging

from rl_onoff.backends.engine_config import PoolKind
from rl_onoff.backends.huggingface.config import HuggingFaceBackendConfig
from rl_onoff.errors import UsageError

log = logging.getLogger(__name__)


def announce(num_replicas: int, tp_size: int) -> None:
    """Say how the devices are used, once: as a log line where those are shown, else on the terminal."""
    from accelerate import ParallelismConfig

    mesh = ParallelismConfig(dp_shard_size=num_replicas, tp_size=tp_size)
    text = (
        "Setting up hybrid (data + tensor) using Accelerate\n"
        f"  Data parallel shards: {mesh.dp_shard_size}\n"
        f"  Tensor parallel size: {mesh.tp_size}\n"
        f"  Total GPUs: {mesh.total_size}"
    )
    if log.isEnabledFor(logging.INFO):
        log.info(text)
    else:
        print(text, flush=True)


def check(config: HuggingFaceBackendConfig) -> None:
    """Raise UsageError for a model that cannot be split, before any process is started."""
    import torch
    from transformers import AutoConfig

    from rl_onoff.models.resolve import hub_errors, resolve

    size = config.tp_size or 1
    if config.device_map is not None:
        raise UsageError(
            f"backend.device_map={config.device_map} and backend.tp_size={size} both split the model: set one of them to null"
        )
    if config.device is not None and config.device.startswith("cpu") and torch.cuda.is_available():
        raise UsageError(
            "backend.device=cpu with backend.tp_size above 1 needs the GPUs hidden: set CUDA_VISIBLE_DEVICES to nothing"
        )
    if config.pool.kind is PoolKind.local and 0 < torch.cuda.device_count() < size:
        raise UsageError(
            f"backend.tp_size is {size} but {torch.cuda.device_count()} GPUs are visible: set backend.tp_size to that or less"
        )
    files = resolve(config.model_name, revision=config.revision)
    with hub_errors(config.model_name):
        model = AutoConfig.from_pretrained(
            files.path, revision=files.revision or "main", trust_remote_code=config.trust_remote_code
        )
    model = model.get_text_config()
    if not getattr(model, "base_model_tp_plan", None):
        raise UsageError(
            f"Transformers cannot split a {model.model_type} model this way: set backend.device_map=auto, not tp_size"
        )
    for name in ("num_attention_heads", "num_key_value_heads", "vocab_size"):
        value = getattr(model, name, None)
        if value is not None and value % size:
            raise UsageError(
                f"the model's {name} is {value}, which backend.tp_size={size} does not divide: change backend.tp_size"
            )
