"""Routers of mixtures of experts: their agreement by hand, and a policy that is made to choose another's experts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rl_onoff.backends import create_backend
from rl_onoff.backends.huggingface.config import HuggingFaceBackendConfig
from rl_onoff.backends.routers import Experts
from rl_onoff.errors import EngineError
from rl_onoff.types import LayerWant, Rollout, Want
from tests.attribute.test_attribute import climb, main_cause
from tests.conftest import SGLANG_PYTHON
from tests.layers.made_errors import LENGTH, NUM_LAYERS
from tests.layers.made_errors import made as made_layers
from tests.layers.test_layer_engines import NO_DENSE_LAYER
from tests.running import run_in

Look = Callable[..., dict[str, Any]]
Make = Callable[..., str]

GATE = "model.layers.2.mlp.gate.weight"
ONE = {"num_experts_per_tok": 1}  # of weight 1: what is left of a router is its choice


def swap(weights: dict[str, Any]) -> None:
    """Experts 0 to 3 are taken for one another in layer 2."""
    weights[GATE][:4] = weights[GATE][[1, 0, 3, 2]].clone()


def rollouts(ids_file: Path) -> list[Rollout]:
    """Responses of several lengths, some to one prompt."""
    rows = [json.loads(line) for line in ids_file.read_text().splitlines()]
    prompts, texts = ([np.array(row[name], np.int32) for row in rows] for name in ("prompt_ids", "token_ids"))
    pairs = [(prompts[0], text) for text in texts] + list(zip(prompts[1:], texts[1:], strict=True))
    return [Rollout(request_id=str(i), sample=0, prompt_ids=p, token_ids_T=t) for i, (p, t) in enumerate(pairs)]


def by_hand(model: str, rollout: Rollout, given: list[Any] | None = None) -> tuple[list[Any], np.ndarray]:
    """Experts (positions, K) of every layer with a router, and the response's logprobs, of one unpadded sequence; with
    the experts that are `given`, if any."""
    import torch
    from transformers import AutoModelForCausalLM

    network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    routers, chosen = [layer.mlp.gate for layer in network.model.layers[1:]], []

    def route(router: Any, i: int, hidden: Any) -> Any:
        logits = torch.nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]), router.weight)
        probs = logits.softmax(-1)
        ids = probs.topk(router.top_k)[1] if given is None else given[i]
        weights = probs.gather(-1, ids)
        chosen.append(ids)
        return logits, weights / weights.sum(-1, keepdim=True), ids

    for i, router in enumerate(routers):
        router.forward = lambda hidden, router=router, i=i: route(router, i, hidden)
    ids = torch.from_numpy(np.concatenate([rollout.prompt_ids, rollout.token_ids_T[:-1]]).astype(np.int64))
    with torch.no_grad():
        logits = network(input_ids=ids[None]).logits[0, len(rollout.prompt_ids) - 1 :]
    rows = torch.arange(len(logits)), torch.from_numpy(rollout.token_ids_T.astype(np.int64))
    return chosen, logits.log_softmax(-1)[rows].numpy()


def differing_layers(ours: list[Any], theirs: list[Any], first: int) -> np.ndarray:
    """(layers, T): share of our experts that are theirs."""
    sets = [[[set(row) for row in side[first:].tolist()] for side in pair] for pair in zip(ours, theirs, strict=True)]
    return np.array([[len(a & b) / len(a) for a, b in zip(*pair, strict=True)] for pair in sets])


def test_the_same_weights_choose_the_same_experts(look: Look, made: Make) -> None:
    model = made("qwen3_moe")
    found = look(model, model, "backend.batch_size=1", "backend.attn_implementation=eager")
    routers = found["routers"]
    assert (routers["same"], routers["overlap"], routers["tokens"]) == (1, 1, 212)
    assert [row["layer"] for row in routers["layers"]] == [1, 2, 3]  # the first layer is dense
    assert [row["tokens"] for row in routers["by_layers"]] == [212] and list(routers["nats"]) == ["same"]
    assert found["parting"] is None
    assert "The routers choose the same experts for every token in each of their 3 layers." in found["sentence"]


def test_swapped_rows_of_a_gate_are_counted(look: Look, made: Make, ids_file: Path) -> None:
    model, other = made("qwen3_moe"), made("qwen3_moe", swap)
    found = look(other, model)
    routers = found["routers"]
    overlaps, apart = [], []
    for line in ids_file.read_text().splitlines():
        row = json.loads(line)
        ids = {name: np.array(row[name], np.int32) for name in ("prompt_ids", "token_ids")}
        rollout = Rollout(request_id="", sample=0, prompt_ids=ids["prompt_ids"], token_ids_T=ids["token_ids"])
        (ours, q_T), (theirs, p_T) = by_hand(other, rollout), by_hand(model, rollout)
        overlaps.append(differing_layers(ours, theirs, len(rollout.prompt_ids) - 1))
        apart.append(np.abs(q_T.astype(np.float64) - p_T))
    overlap_MN, l_N = np.concatenate(overlaps, 1), np.concatenate(apart)
    num_N = (overlap_MN < 1).sum(0)
    assert routers["same"] == (num_N == 0).mean() and 0 < routers["same"] < 1
    assert [row["overlap"] for row in routers["layers"]] == pytest.approx(overlap_MN.mean(1), rel=1e-6)
    assert [row["same"] for row in routers["layers"]] == pytest.approx((overlap_MN == 1).mean(1), rel=1e-6)
    assert routers["layers"][0]["same"] == 1 and routers["layers"][1]["overlap"] < 0.9
    for name, mask_N in (("same", num_N == 0), ("other", num_N > 0)):
        told = routers["nats"][name]
        assert told["value"] == pytest.approx(l_N[mask_N].mean(), rel=1e-3) and told["lo"] < told["value"] < told["hi"]
    assert {(row["start"], row["tokens"]) for row in routers["by_layers"]} == {
        (0, (num_N == 0).sum()), (1, (num_N == 1).sum()), (2, (num_N > 1).sum())
    }  # fmt: skip
    assert sum(row["nats"] * row["tokens"] for row in routers["by_layers"]) / 212 == pytest.approx(
        found["nats"]["mean"]
    )
    assert (found["parting"]["where"], found["parting"]["layer"]) == ("mlp", 2)
    least = min(routers["layers"], key=lambda row: row["overlap"])["layer"]
    assert (
        f"for {routers['same']:.1%} of the tokens" in found["sentence"]
        and f"least in layer {least}" in found["sentence"]
    )


def test_numbers_for_the_run_and_a_dense_model_that_has_none(tmp_path: Path, made: Make) -> None:
    target = ("target=huggingface", "target.dtype=float32", "data.limit=2", "sampling.max_new_tokens=16")
    stages = ("experiment=layers", "stages=[generate,score,layers]", "model.dtype=bfloat16", *target)
    for family in ("qwen3_moe", "llama"):
        folder = run_in(tmp_path / family, *stages, f"model.name={made(family)}")
        metrics, found = folder.read_json("metrics.json"), folder.read_json("layers.json")
        names = {name for name in metrics["values"] if "experts" in name}
        if family == "llama":
            assert not names and found["routers"] is None and "expert" not in found["sentence"]
        else:
            assert names >= {"layers/experts_same", "layers/experts_overlap"}
            assert metrics["values"]["layers/experts_overlap"] == found["routers"]["overlap"] > 0.8


def test_rows_by_layer_for_wandb() -> None:
    assert all("experts_same" not in row for row in made_layers().rows())
    overlap_ML = np.full((NUM_LAYERS, LENGTH), np.nan, np.float32)
    overlap_ML[3], overlap_ML[5] = 1, np.arange(LENGTH) % 2  # layers 3 and 5 have routers
    found = made_layers(overlap_ML=overlap_ML)
    rows = {
        row["layer"]: (row["experts_same"], row["experts_overlap"]) for row in found.rows() if row["layer"] is not None
    }
    assert rows == {k: {3: (1, 1), 5: (26 / 51, 26 / 51)}.get(k, (None, None)) for k in range(NUM_LAYERS)}
    assert found.routers is not None and found.routers.same == 26 / 51  # positions 29 to 79 tell of the response
    assert {row["start"]: row["tokens"] for row in found.routers.by_layers} == {0: 52, 1: 50}


def scores(backend: Any, asked: list[Rollout], folder: Path | None = None, *, writes: bool = False) -> dict[str, Any]:
    layers = None if folder is None else LayerWant(folder=str(folder), writes=writes, states=False)
    return {row.request_id: row.logprobs_T for row in backend.score(asked, Want(layers=layers))}


def huggingface(model: str) -> Any:
    return create_backend(HuggingFaceBackendConfig(model_name=model, dtype="float32"))


def close(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    assert max(np.abs(ours[name] - theirs[name]).max() for name in ours) <= tolerance


def test_replaying_its_own_experts_changes_nothing(made: Make, ids_file: Path, tmp_path: Path) -> None:
    asked = rollouts(ids_file)
    with huggingface(made("qwen3_moe")) as backend:
        assert backend._split.packs
        packed = scores(backend, asked)  # prompts once, no padding
        padded = scores(backend, asked, tmp_path, writes=True)
        close(scores(backend, asked, tmp_path), padded, 0)
        close(scores(backend, asked[::-1], tmp_path), packed, 2e-5)  # other batches
        close(scores(backend, asked), packed, 0)  # the routers are as they were


def test_replayed_experts_are_those_of_each_token(made: Make, ids_file: Path, tmp_path: Path) -> None:
    """Against a forward pass by hand, one response at a time, whose routers are told the other model's experts."""
    model, other, asked = made("qwen3_moe"), made("qwen3_moe", swap), rollouts(ids_file)
    with huggingface(model) as backend:
        own = scores(backend, asked, tmp_path, writes=True)
    with huggingface(other) as backend:
        free, told = scores(backend, asked), scores(backend, asked, tmp_path)
    for rollout in asked:
        chosen, logprobs_T = by_hand(model, rollout)
        np.testing.assert_allclose(own[rollout.request_id], logprobs_T, atol=1e-4)
        expected_T = by_hand(other, rollout, chosen)[1]
        np.testing.assert_allclose(told[rollout.request_id], expected_T, atol=1e-4)
        assert np.abs(free[rollout.request_id] - expected_T).max() > 0.01


def test_experts_that_were_chosen_otherwise_are_found_as_the_cause(made: Make, tmp_path: Path) -> None:
    model, other = made("qwen3_moe", **ONE), made("qwen3_moe", swap, **ONE)
    options = (f"model.name={model}", "model.dtype=float32", "target=huggingface", f"target.model_name={other}")
    small = ("data.limit=4", "sampling.max_new_tokens=24", "score.name=target")
    folder = run_in(tmp_path / "run", "experiment=onoff", *options, *small)
    found = climb(folder, *options, "attribute.target=target", "attribute.truth_check=0")
    row = found["rows"]["experts"]
    assert main_cause(found) == "experts" and row["share"] > 0.999 and found["left"] < 1e-6 * found["gap"]
    assert row["verdict"].startswith("the main cause: the experts") and "with other weights" in row["verdict"]
    assert "nothing is left" in found["rows"]["weights"]["verdict"]
    assert not list(folder.path.glob(".experts-*"))
    again = climb(folder, *options, "attribute.target=target", "attribute.truth_check=0")  # from the tables
    assert again["rows"]["experts"] == row


def test_a_later_rung_keeps_the_replayed_experts(made: Make, tmp_path: Path) -> None:
    """A gate that parts and an MLP that does too: the rest of the gap is left to the weights, experts and all."""

    def both(weights: dict[str, Any]) -> None:
        swap(weights)
        weights["model.layers.0.mlp.down_proj.weight"].mul_(3)

    model, other = made("qwen3_moe", **ONE), made("qwen3_moe", both, **ONE)
    options = (f"model.name={model}", "model.dtype=float32", "target=huggingface", f"target.model_name={other}")
    small = ("data.limit=4", "sampling.max_new_tokens=24", "score.name=target")
    folder = run_in(tmp_path / "run", "experiment=onoff", *options, *small)
    found = climb(folder, *options, "attribute.target=target", "attribute.truth_check=0")
    experts, weights = found["rows"]["experts"], found["rows"]["weights"]
    assert 0.1 < experts["share"] < 0.98 and weights["before"] == pytest.approx(experts["after"])
    assert experts["share"] + weights["share"] == pytest.approx(1, abs=1e-3) and found["left"] < 1e-6 * found["gap"]


def test_a_choice_that_cannot_be_told(made: Make, ids_file: Path, tmp_path: Path) -> None:
    """A router that asks no torch.topk: the rows would be another policy's, so nothing is scored."""
    import torch

    asked = rollouts(ids_file)[:2]
    with huggingface(made("qwen3_moe")) as backend:
        scores(backend, asked, tmp_path, writes=True)
        router = backend._split.whole.model.layers[1].mlp.gate

        def kernel(hidden: Any) -> Any:
            probs = torch.nn.functional.linear(hidden, router.weight).softmax(-1)
            values, ids = probs.sort(descending=True)
            return probs, values[:, :2], ids[:, 2:4]

        router.forward = kernel
        with pytest.raises(EngineError, match="choose other experts than they are told"):
            scores(backend, asked, tmp_path)


def engine_config(engine: str, model: str) -> Any:
    if engine == "vllm":
        from rl_onoff.backends.vllm.config import VLLMBackendConfig

        chunks = {"enable_chunked_prefill": True, "max_num_batched_tokens": 48, "max_num_seqs": 4}
        return VLLMBackendConfig(model_name=model, dtype="float32", enforce_eager=True, engine_kwargs=chunks)
    from rl_onoff.backends.sglang.config import SGLangBackendConfig

    config = SGLangBackendConfig(model_name=model, dtype="float32", python=SGLANG_PYTHON)
    return config.with_all_layers_run()


@pytest.mark.parametrize("backend", ["vllm", "sglang"])
def test_experts_go_from_engine_to_engine(backend: str, made: Make, ids_file: Path, tmp_path: Path) -> None:
    """The engine in chunks of several responses: its experts in HuggingFace, and HuggingFace's in it."""
    options = ONE | NO_DENSE_LAYER
    model, other, asked = made("qwen3_moe", **options), made("qwen3_moe", swap, **options), rollouts(ids_file)
    for name in ("ours", "theirs", "two"):
        (tmp_path / name).mkdir()
    with huggingface(made("qwen3_moe", **NO_DENSE_LAYER)) as ours:  # two experts a token
        scores(ours, asked, tmp_path / "two", writes=True)
    with huggingface(model) as ours:
        expected = scores(ours, asked, tmp_path / "ours", writes=True)
    with create_backend(engine_config(backend, other)) as engine:
        free = scores(engine, asked, tmp_path / "theirs", writes=True)
        import torch

        if backend == "vllm" and torch.cuda.is_available():  # where a kernel chooses
            with pytest.raises(EngineError, match="choose other experts than they are told"):
                scores(engine, asked, tmp_path / "ours")
            return
        close(scores(engine, asked, tmp_path / "ours"), expected, 2e-3)
        with pytest.raises(EngineError, match="choose other experts than they are told"):
            scores(engine, asked, tmp_path / "two")
    with huggingface(model) as ours:
        close(scores(ours, asked, tmp_path / "theirs"), free, 2e-3)
    assert max(np.abs(free[name] - expected[name]).max() for name in free) > 0.1


def test_experts_of_another_number_are_not_compared(tmp_path: Path) -> None:
    for writes, num in ((True, 3), (False, 2)):
        experts = Experts(tmp_path / "experts.npy", 4, 1, writes=writes, needed=False)
        experts.put(0, 0, np.tile(np.arange(num), (4, 1)))
        assert experts.finish()
    assert np.isnan(experts.overlap_ML).all()
