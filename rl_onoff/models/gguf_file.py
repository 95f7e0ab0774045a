"""The config and the weights in a GGUF file. For the usual architectures they are read here, for transformers takes
three times as long to get the same."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

READ_HERE = {"llama", "qwen2", "qwen3"}  # their tensors need other names alone, or another order of rows
ROPE = "rope_freqs.weight"


def open_file(file: Path) -> Any:
    """The file's metadata and tensors. The metadata is sliced from a plain array, as a slice of the memory map that the
    gguf package keeps takes three times as long, and a vocabulary needs 400,000 of them."""
    import numpy as np
    from gguf import GGUFReader

    class Reader(GGUFReader):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, np.asarray(value) if name == "data" else value)

    return Reader(file)


def read_config(reader: Any, source: dict[str, Any]) -> Any:
    """The model's config, as transformers makes it."""
    import transformers
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    architecture, name = (reader.get_field(f"general.{key}") for key in ("architecture", "name"))
    group = architecture.contents() if architecture else ""
    if group not in READ_HERE or (name and name.contents() == "mistral"):  # transformers takes that name for a type
        return transformers.AutoConfig.from_pretrained(**source)  # reads the whole vocabulary again
    options: dict[str, Any] = {"vocab_size": len(tokenizer_field(reader, "ggml.tokens", ()))}
    for prefix in ("general", group, "tokenizer"):
        for key, option in GGUF_CONFIG_MAPPING[prefix].items():
            if option and (field := reader.get_field(f"{prefix}.{key}")):
                options[option] = field.contents()
    options["tie_word_embeddings"] = all(tensor.name != "output.weight" for tensor in reader.tensors)
    return transformers.AutoConfig.for_model(**options)


def tokenizer_field(reader: Any, key: str, default: Any = None) -> Any:
    """What the file's tokenizer metadata says under this key."""
    field = reader.get_field(f"tokenizer.{key}")
    return default if field is None else field.contents()


def read_model(reader: Any, config: Any, source: dict[str, Any]) -> Any:
    """The model with the file's weights, in the type that comes nearest to most of them."""
    import numpy as np
    import torch
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    sizes = Counter()
    for tensor in reader.tensors:
        sizes[tensor.tensor_type.name] += int(tensor.n_elements)
    dtype = {"F32": torch.float32, "F16": torch.float16}.get(sizes.most_common(1)[0][0], torch.bfloat16)
    in_file = {tensor.name: tensor for tensor in reader.tensors}
    if config.model_type == "llama" and ROPE in in_file:  # it holds the result of Llama 3's rotary scaling alone
        factors_D, theta = in_file.pop(ROPE).data, config.rope_parameters["rope_theta"]  # one for each of D frequencies
        config.rope_parameters = dict(
            rope_type="llama3", rope_theta=theta, factor=float(factors_D.max()), low_freq_factor=1.0,
            high_freq_factor=4.0, original_max_position_embeddings=8192,
        )  # fmt: skip
        plain_D = theta ** (-np.arange(len(factors_D)) / len(factors_D))
        scaled_D = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0].numpy()
        if not np.allclose(plain_D / scaled_D, factors_D, rtol=1e-3):
            raise ValueError("its rotary scaling is not Llama 3's")
    if config.model_type in READ_HERE:
        return _read_here(in_file, config, dtype)
    # Unless told, transformers keeps the weights packed where it can, and refuses to save a packed model.
    unpacked = {"quantization_config": transformers.GgufConfig(dequantize=True), "output_loading_info": True}
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    model, found = load(**source, **unpacked, config=config, dtype=dtype)
    if missing := sorted(found["missing_keys"]):  # which transformers fills with random numbers
        raise ValueError(f"it lacks {', '.join(missing[:3])}")
    return model


def _read_here(in_file: dict[str, Any], config: Any, dtype: Any) -> Any:
    """The model of an architecture whose tensors need new names alone, and for Llama an order of rows: the same bits as
    by transformers, which makes its table of names once for every part of the model."""
    import torch
    import transformers
    from gguf import MODEL_ARCH, dequantize, get_tensor_name_map

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    names = get_tensor_name_map(MODEL_ARCH[config.model_type.upper()], config.num_hidden_layers)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights, missing = {}, []
    for name in model.state_dict():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, _, end = name.rpartition(".")
        there = names.get_name(stem) or ""
        if (tensor := in_file.pop(f"{there}.{end}", None)) is None:
            missing.append(name)
            continue
        values = dequantize(tensor.data, tensor.tensor_type)
        if (count := heads.get(there.rpartition(".")[2])) and config.model_type == "llama":
            # llama.cpp has the two rows of a rotated pair side by side, transformers half a head apart
            values = values.reshape(count, -1, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        weights[name] = torch.tensor(values, dtype=dtype)
    if missing:
        raise ValueError(f"it lacks {', '.join(missing[:3])}")
    if in_file:
        raise ValueError(f"transformers' model has no place for {', '.join(sorted(in_file)[:3])}")
    model.load_state_dict(weights, assign=True, strict=False)
    model.tie_weights()
    return model
