"""A planted fault is named by layer and module, and nothing is named where there is none: HuggingFace on both sides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Look = Callable[..., dict[str, Any]]
Make = Callable[..., str]


def noise_on(name: str, size: float = 0.1) -> Callable[[dict[str, Any]], None]:
    def change(weights: dict[str, Any]) -> None:
        import torch

        generator = torch.Generator().manual_seed(1)
        weights[name].add_(size * weights[name].std() * torch.randn(weights[name].shape, generator=generator))

    return change


def parting(found: dict[str, Any]) -> tuple[str, int | None]:
    assert found["parting"] is not None, found["sentence"]
    return found["parting"]["where"], found["parting"]["layer"]


ATTENTION, PERCEPTRON = ("self_attn.v_proj", "attention"), ("mlp.down_proj", "mlp")


@pytest.mark.parametrize(
    ("family", "weights", "where"),
    [("llama", *ATTENTION), ("qwen2", *PERCEPTRON), ("gemma2", *ATTENTION), ("mistral", *PERCEPTRON)],
)
def test_a_perturbed_layer(look: Look, made: Make, family: str, weights: str, where: str) -> None:
    found = look(made(family, noise_on(f"model.layers.2.{weights}.weight")), made(family))
    assert parting(found) == (where, 2)
    before = [row["max"] for row in found["points"][:3]]
    assert before == [0, 0, 0]  # the same arithmetic on the same weights
    assert found["points"][3]["median"] > 1e-3
    assert (
        "part in layer 2" in found["sentence"] and {"attention": "attention", "mlp": "MLP"}[where] in found["sentence"]
    )


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_wrong_rope_base(look: Look, made: Make, family: str) -> None:
    rope = {"rope_type": "default", "rope_theta": 20000.0}
    found = look(made(family, rope_parameters=rope), made(family, rope_parameters=rope | {"rope_theta": 10000.0}))
    assert parting(found) == ("attention", 0)
    by_position = found["points"][1]["by_position"]
    assert by_position[0] == 0 and by_position[2] < by_position[6]  # position 0 is not turned


def test_a_missing_soft_cap_of_the_attention(look: Look, made: Make) -> None:
    eager = ("backend.attn_implementation=eager", "target.attn_implementation=eager")
    found = look(made("gemma2", attn_logit_softcapping=None), made("gemma2"), *eager)
    assert parting(found) == ("attention", 0)


def test_a_missing_soft_cap_of_the_logits(look: Look, made: Make) -> None:
    found = look(made("gemma2", final_logit_softcapping=None), made("gemma2"))
    assert parting(found) == ("lm_head", None) and "part in the LM head" in found["sentence"]
    assert all(row["max"] == 0 for row in found["points"])


def test_a_sliding_window_off_by_one(look: Look, made: Make) -> None:
    found = look(made("mistral", sliding_window=17), made("mistral"))
    assert parting(found) == ("attention", 0) and found["parting"]["start"] == 16
    assert found["points"][1]["by_position"][:5] == [0] * 5 and found["points"][1]["by_position"][5] > 1e-3


def test_a_sliding_window_off_by_one_from_the_third_layer_on(look: Look, made: Make) -> None:
    found = look(made("qwen2", sliding_window=15), made("qwen2"))
    assert parting(found) == ("attention", 2)


def test_an_untied_head(look: Look, made: Make) -> None:
    found = look(made("qwen2", tie_word_embeddings=False), made("qwen2"))
    assert parting(found) == ("lm_head", None)
    assert found["nats"]["mean"] > 0.1 and found["points"][-1]["max"] == 0


def test_other_embeddings_and_another_last_norm(look: Look, made: Make) -> None:
    assert parting(look(made("llama", noise_on("model.embed_tokens.weight")), made("llama"))) == ("embeddings", None)
    found = look(made("llama", lambda weights: weights["model.norm.weight"].mul_(1.5)), made("llama"), run="norm")
    assert parting(found) == ("norm", None)


def test_a_norm_between_the_modules_is_neither(look: Look, made: Make) -> None:
    norm = "model.layers.1.post_feedforward_layernorm.weight"
    found = look(made("gemma2", lambda weights: weights[norm].add_(0.5)), made("gemma2"))
    assert parting(found) == ("layer", 1) and "around its attention and MLP" in found["sentence"]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "mistral"])
def test_the_same_weights_do_not_part(look: Look, made: Make, family: str) -> None:
    """Batches of another width and another attention: float32 rounds otherwise, and no more."""
    model = made(family, attn_logit_softcapping=None) if family == "gemma2" else made(family)  # sdpa has no soft cap
    other = ("backend.attn_implementation=eager", "target.attn_implementation=sdpa")
    found = look(model, model, "backend.batch_size=1", *other)
    assert found["parting"] is None and "do not part" in found["sentence"]
    assert 0 < found["points"][-1]["median"] < 5e-6 and found["nats"]["max"] < 1e-3


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "mistral"])
def test_bfloat16_grows_smoothly(look: Look, made: Make, family: str) -> None:
    model = made(family)
    found = look(model, model, "model.dtype=bfloat16")
    assert found["parting"] is None and "rounding in bfloat16" in found["sentence"]
    assert 1e-3 < found["points"][1]["median"] < found["points"][-1]["median"] < 0.2


def test_a_fault_is_named_beside_bfloat16_too(look: Look, made: Make) -> None:
    found = look(
        made("llama", noise_on("model.layers.2.mlp.down_proj.weight", 1.0)), made("llama"), "model.dtype=bfloat16"
    )
    assert parting(found) == ("mlp", 2)
