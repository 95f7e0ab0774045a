"""Adapters in a run: what the options make of them, and merging into bfloat16 found as the cause of a gap."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.attribute.test_attribute import climb, main_cause
from tests.backends.test_adapter import make_adapter
from tests.running import config_of, run_in


@pytest.fixture(scope="module")
def adapter(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_adapter(tmp_path_factory.mktemp("adapters") / "tiny_lora", tiny_llama)


def test_merging_into_bfloat16_is_found(
    tiny_llama: str, adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = [f"model.name={tiny_llama}", "model.dtype=bfloat16", f"model.adapter={adapter}"]
    options += ["backend.merge_adapter=true", "target=huggingface", "data.limit=6", "sampling.max_new_tokens=48"]
    folder = run_in(tmp_path / "run", "experiment=onoff", *options)
    model = Path(tiny_llama).name
    sampler, scorer = (f"huggingface-{model}+tiny_lora{how}-bfloat16" for how in ("-merged", ""))
    assert set(folder.score_names()) == {sampler, scorer}
    assert f"{adapter}, merged" in (folder.path / "report.html").read_text()
    found = climb(folder, *options, f"attribute.target={scorer}")
    row = found["rows"]["merge"]
    assert main_cause(found) == "merge" and row["share"] > 0.9 and row["verdict"].startswith("the main cause: merging")
    assert found["gap"] > 100 * found["floor"] and found["left"] < found["floor"]
    assert "the adapter beside the weights in the behaviour" in found["sentence"]
    assert found["whose_error"]["truth"] == f"huggingface-{model}+tiny_lora-float32"  # the adapter beside the weights
    errors = found["whose_error"]["overall"]["metrics"]
    assert errors["error_behaviour"]["value"] > errors["error_target"]["value"]  # merging is the sampler's error


def test_an_adapter_on_one_side_alone_is_a_difference_of_weights(tiny_llama: str, adapter: str, tmp_path: Path) -> None:
    options = [f"model.name={tiny_llama}", "model.dtype=float32", f"backend.adapter={adapter}", "target=huggingface"]
    folder = run_in(tmp_path / "run", "experiment=onoff", *options, "data.limit=6", "sampling.max_new_tokens=24")
    found = climb(folder, *options, f"attribute.target=huggingface-{Path(tiny_llama).name}-float32")
    assert main_cause(found) == "weights"
    assert f"different models (the adapter {adapter} on the behaviour)" in found["sentence"]
    assert found["whose_error"] is None and "the sides have different weights" in found["truth"]
    assert "no side has an adapter merged into weights of low precision" in found["rows"]["merge"]["verdict"]
    target = folder.scores(f"huggingface-{Path(tiny_llama).name}+tiny_lora-float32").record()
    assert target["config"]["backend"]["adapter"] == adapter and target["config"]["backend"]["merge_adapter"] is False


def test_options_follow_the_group_model() -> None:
    config = config_of("model.adapter=a", "model.merge_adapter=true", "target=vllm", "target.merge_adapter=false")
    assert (config.backend.adapter, config.backend.merge_adapter) == ("a", True)
    assert (config.target.adapter, config.target.merge_adapter) == ("a", False)
