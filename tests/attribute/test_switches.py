"""What can be turned on an engine is tried one at a time, and the one that was planted is found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rl_onoff.backends import engine_configs
from rl_onoff.backends.engine_config import WHEN
from rl_onoff.errors import UsageError
from rl_onoff.rundir.table import RunDir
from tests.running import rewrite, run_in

FAKE = ("experiment=onoff", "backend=fake", "target=fake", "score.name=target", "data.limit=8",
        "sampling.max_new_tokens=24")  # fmt: skip


def switches(folder: RunDir, *overrides: str) -> dict[str, dict]:
    """The ladder's rows of switches, by name, and of other rungs."""
    run_in(folder.path, "experiment=attribute", "attribute.target=target", "attribute.truth_check=0", *overrides)
    return {row["switch"] or row["rung"]: row for row in folder.read_json("attribution.json")["rows"]}


@pytest.mark.parametrize("engine", ["huggingface", "vllm", "sglang", "fake"])
def test_every_switch_can_be_turned(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    schema = engine_configs()[engine]
    names = [switch.name for switch in schema.switches]
    assert len(names) == len(set(names)) and all(switch.when in WHEN and switch.change for switch in schema.switches)
    for switch in schema.switches:
        turned = schema().turned(switch)
        assert turned is not None if switch.when in ("", "low") else turned is None, switch.name  # no GPU, nothing set
        other = {name: {"a": "b"} if isinstance(x, dict) else "other" for name, x in switch.options.items()}
        fields = schema.__dataclass_fields__
        if any(name in fields for name in other):
            continue  # an option that is checked: other values of it are refused
        turned = schema(engine_kwargs=other).turned(switch)
        assert turned is not None, switch.name
        kept = {name: value for name, value in switch.options.items() if value is not None}
        if "hf_overrides" not in kept:
            assert turned.engine_kwargs == kept
        assert turned.turned(switch) is None


def test_a_switch_leaves_the_other_options_of_its_dict() -> None:
    schema = engine_configs()["vllm"]
    head = next(switch for switch in schema.switches if switch.name == "lm_head")
    turned = schema(engine_kwargs={"hf_overrides": {"rope_theta": 1e4}, "max_num_seqs": 4}).turned(head)
    assert turned is not None
    expected = {"hf_overrides": {"rope_theta": 1e4, "head_dtype": "float32"}, "max_num_seqs": 4}
    assert turned.engine_kwargs == expected


@pytest.mark.parametrize("side", ["target", "backend"])
def test_a_planted_switch_is_found_on_either_side(side: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = run_in(tmp_path / "run", *FAKE, f"{side}.rounding=0.3")
    rows = switches(folder)
    row = rows["rounding"]
    assert row["share"] > 0.99 and row["verdict"] == "the main cause: rounding (logits that are not rounded)"
    assert row["changed"] == f"logits that are not rounded in the {'behaviour' if side == 'backend' else 'target'}"
    assert rows["engine"]["share"] is None  # nothing is left to explain
    values = folder.read_json("metrics.json")["values"]
    assert values["attribute/rounding/share"] == row["share"] and "attribute/switches/share" not in values
    with caplog.at_level("INFO"):
        assert switches(folder) == rows
    assert not any("loading" in line for line in caplog.messages)


def test_a_switch_that_changes_nothing(tmp_path: Path) -> None:
    folder = run_in(tmp_path / "run", *FAKE, "target.noise=0.3")
    rows = switches(folder)
    assert rows["seed"]["verdict"] == "changes nothing" and rows["seed"]["share"] == 0
    assert "rounding" not in rows  # no side has it on
    assert rows["engine"]["share"] > 0.99


def test_what_sampling_reports_is_no_switchs_doing(tmp_path: Path) -> None:
    """The gap is all in the reported logprobs: the behaviour's own prefill agrees with the target."""
    folder = run_in(tmp_path / "run", *FAKE)
    noise = np.random.default_rng(0)

    def off(row: dict) -> dict:
        return row | {"logprobs": (row["logprobs"] + 0.1 * noise.standard_normal(len(row["logprobs"]))).astype("f4")}

    rewrite(folder.completions, off)
    rows = switches(folder, "attribute.rungs=[switches]")
    assert rows["seed"]["share"] == 0 and rows["seed"]["verdict"] == "changes nothing"
    rows = switches(folder, "attribute.rungs=[decode,switches]")
    assert rows["decode"]["share"] > 0.99


def test_nothing_is_blamed_where_nothing_was_tried(tmp_path: Path) -> None:
    folder = run_in(tmp_path / "run", *FAKE, "target.noise=0.3")
    switches(folder, "attribute.switches=[kv_cache]", "attribute.rungs=[switches]")
    sentence = folder.read_json("attribution.json")["sentence"]
    assert sentence.startswith("Not explained since nothing could be tried: ") and "weights" not in sentence


def test_which_switches_are_tried(tmp_path: Path) -> None:
    folder = run_in(tmp_path / "run", *FAKE, "target.rounding=0.3")
    rows = switches(folder, "attribute.switches=[seed]", "attribute.rungs=[noise,switches]")
    assert list(rows) == ["noise", "seed"]
    rows = switches(folder, "attribute.switches=[kv_cache]", "attribute.rungs=[switches]")
    assert rows["switches"]["verdict"] == "not tried: there is no switch of these engines that applies here"
    with pytest.raises(
        UsageError, match=r"'kvcache', which is no engine's switch: set attribute.switches=\[kv_cache\]"
    ):
        switches(folder, "attribute.switches=[kvcache]")


@pytest.mark.parametrize(
    ("planted", "found", "least"),
    [("attn_implementation=eager", "attention_sdpa", 0.6), ("logprob_dtype=weights", "log_softmax", 0.9)],
)
def test_planted_in_huggingface_in_bfloat16(
    planted: str, found: str, least: float, tiny_llama: str, tmp_path: Path
) -> None:
    small = ("data.limit=6", "sampling.max_new_tokens=24", "attribute.rungs=[noise,decode,switches]")
    engines = (f"model.name={tiny_llama}", "model.dtype=bfloat16", "target=huggingface", f"target.{planted}")
    folder = run_in(tmp_path / "run", "experiment=onoff", *engines, *small, "score.name=target")
    rows = switches(folder, *small, f"attribute.switches=[{found},batch]")
    before = rows[found]["before"]
    assert rows[found]["verdict"].startswith(("the main cause", "part of the cause")), rows
    assert rows[found]["after"] <= (1 - least) * before, rows
    assert found in rows[found]["verdict"]


def test_log_softmax_in_the_weights_type(tiny_llama: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from rl_onoff.backends import create_backend
    from rl_onoff.types import Rollout

    prompt, ids = np.array([5, 6, 7], np.int32), np.array([8, 9, 10], np.int32)
    options = {"dtype": "bfloat16", "logprob_dtype": "weights", "device": "cpu"}
    config = {"backend_type": "huggingface", "model_name": tiny_llama, "backend_specific": options}
    with create_backend(config) as backend:
        (scores,) = backend.score([Rollout(request_id="a", sample=0, prompt_ids=prompt, token_ids_T=ids)])
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    with torch.no_grad():
        logprobs = model(torch.tensor([[*prompt, *ids]])).logits[0, 2:-1].log_softmax(-1)
    assert logprobs.dtype is torch.bfloat16
    assert scores.logprobs_T.tolist() == logprobs[range(3), ids.tolist()].float().tolist()
    with pytest.raises(UsageError, match="logprob_dtype is 'float16' but must be weights or null"):
        create_backend({**config, "backend_specific": {"logprob_dtype": "float16"}})
