"""The stage: what it refuses before it loads anything, what it does not do twice, and what it leaves behind."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from rl_onoff.errors import EngineError, UsageError
from rl_onoff.pipeline.engines import Slot
from rl_onoff.run import run_steps
from tests.running import config_of, run_in

Look = Callable[..., dict[str, Any]]
Make = Callable[..., str]

TARGET = ("target=huggingface", "target.dtype=float32")


def sides(model: str, ids_file: Path) -> tuple[str, ...]:
    return ("experiment=layers", "stages=[layers]", f"model.name={model}", *TARGET, f"score.responses={ids_file}")


def test_a_side_that_is_done_is_not_run_again(
    tmp_path: Path, made: Make, ids_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    options = (*sides(made("llama"), ids_file), "model.dtype=bfloat16", "target.dtype=float32")
    path = tmp_path / "run"
    path.mkdir()
    with Slot() as slot:
        steps = run_steps(config_of(*options, path=path), path, slot)
        for _ in range(3):  # checked; the target is wanted; the backend is
            next(steps)
        steps.close()
    (states,) = path.glob("layers/*/states")
    assert len(list(states.iterdir())) == 5 and not (path / "layers.json").exists()
    found = run_in(path, *options).read_json("layers.json")
    assert "the target is done already" in caplog.text and "the backend is done already" not in caplog.text
    assert not states.exists()
    whole = run_in(tmp_path / "whole", *options).read_json("layers.json")
    assert found == whole
    caplog.clear()
    assert run_in(path, *options).read_json("layers.json") == whole
    assert "the backend is done already" in caplog.text and "loading" not in caplog.text


def test_more_responses_add_to_those_that_are_done(tmp_path: Path, made: Make, ids_file: Path) -> None:
    options = (*sides(made("llama"), ids_file), "model.dtype=bfloat16", "target.dtype=float32")
    few = run_in(tmp_path, *options, "layers.limit=2", "layers.inside=1").read_json("layers.json")
    folder = run_in(tmp_path, *options)
    assert (few["responses"], folder.read_json("layers.json")["responses"]) == (2, 5)
    for who in ("backend", "target"):
        (table,) = tmp_path.glob(f"layers/*/{who}")
        rows = pd.read_parquet(table)
        assert len(rows) == 5 and not rows.duplicated(["request_id", "sample"]).any()


def test_the_rows_are_documented_norms_of_every_token(tmp_path: Path, made: Make, ids_file: Path) -> None:
    options = (*sides(made("llama"), ids_file), "model.dtype=bfloat16", "target.dtype=float32", "layers.inside=2")
    found = run_in(tmp_path, *options).read_json("layers.json")
    (table,) = tmp_path.glob("layers/*/backend")
    rows = pd.read_parquet(table).set_index("request_id")
    given = [json.loads(line) for line in ids_file.read_text().splitlines()]
    lengths = {row["id"]: len(row["prompt_ids"]) + len(row["token_ids"]) for row in given}
    longest = sorted(lengths, key=lambda name: -lengths[name])[:2]
    for name, length in lengths.items():
        row = rows.loc[name]
        assert len(row["norms"]) == len(row["differences"]) == (3 * 4 + 2 if name in longest else 4 + 2)
        assert {len(at) for at in row["norms"]} == {length - 1}
    assert found["tokens"] == sum(lengths.values()) - 5
    assert sum(position["tokens"] for position in found["positions"]) == found["tokens"]


def test_another_pair_has_another_folder(tmp_path: Path, made: Make, ids_file: Path) -> None:
    options = sides(made("llama"), ids_file)
    for dtype in ("bfloat16", "float32"):
        run_in(tmp_path, *options, f"model.dtype={dtype}", "target.dtype=float32")
    assert len(list(tmp_path.glob("layers/*"))) == 2
    assert json.loads((tmp_path / "layers.json").read_text())["sides"]["backend"]["dtype"] == "float32"


def test_the_page_has_the_layers_where_the_responses_have_logprobs(tmp_path: Path, made: Make) -> None:
    options = ("experiment=layers", "stages=[generate,score,layers]", f"model.name={made('llama')}", *TARGET)
    folder = run_in(tmp_path, *options, "model.dtype=bfloat16", "data.limit=2", "sampling.max_new_tokens=8")
    sentence = folder.read_json("layers.json")["sentence"]
    assert json.dumps(sentence)[1:-1] in (tmp_path / "report.html").read_text()
    metrics = folder.read_json("metrics.json")
    assert metrics["layers"]["sentence"] == sentence and metrics["values"]["layers/parts"] == 0


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ((), "there is no target: set target=huggingface target.dtype=float32"),
        (("target=fake",), "target=fake has no layers to look at: set target to another engine"),
        ((*TARGET, "backend.tp_size=2"), "set backend.tp_size=1"),
        ((*TARGET, "pool=ray"), "set pool=local"),
        ((*TARGET, "backend=vllm", "backend.in_engine_stats=false"), "set backend.in_engine_stats=true"),
    ],
)
def test_sides_that_cannot_be_looked_into(tmp_path: Path, overrides: tuple[str, ...], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        run_in(tmp_path, "experiment=layers", "stages=[layers]", "model.name=smollm2", *overrides)


def test_models_of_two_shapes_and_no_responses(tmp_path: Path, made: Make, ids_file: Path, smollm2: str) -> None:
    options = sides(made("llama"), ids_file)
    with pytest.raises(UsageError, match="target has 30 layers of 576 and backend has 4 layers of 64 numbers"):
        run_in(tmp_path / "shapes", *options, f"target.model_name={smollm2}")
    with pytest.raises(UsageError, match=r"no responses whose layers could be compared: set run_dir"):
        run_in(tmp_path / "empty", *options, "score.responses=null")


def test_a_disk_that_is_too_small(tmp_path: Path, made: Make, ids_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**30, 0, 2**30))
    with pytest.raises(UsageError, match=r"hidden states of 5 responses take .* GiB, and .* has 1.0 free: set layers"):
        run_in(tmp_path, *sides(made("llama"), ids_file))


def test_a_hook_that_fails_is_told(made: Make) -> None:
    """States of another size than the file's: the error reaches the caller, and the model is left without hooks."""
    import torch

    from rl_onoff.backends.layers import LayerSpan, LayerWatch, States, find_layers, first_of
    from rl_onoff.types import LayerWant
    from tests.layers.conftest import SIZES

    torch.manual_seed(0)
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **SIZES)).eval()
    ids = torch.arange(6)[None]
    spans: list[LayerSpan] = []
    with LayerWatch(model, model.config, lambda: spans, first_of) as watch, torch.no_grad():
        states = watch.states(LayerWant(folder="/nowhere", writes=False), "name", 6)
        spans.append(LayerSpan(states, 0, 6, 0))
        model(input_ids=ids)
        with pytest.raises(EngineError, match="hidden states could not be read"):
            watch.check([states])
        assert isinstance(states, States)
    _, layers = find_layers(model, 4)
    assert not any(module._forward_hooks or module._forward_pre_hooks for layer in layers for module in layer.modules())


def test_ids_of_another_tokenizer(tmp_path: Path, made: Make, ids_file: Path) -> None:
    small = made("llama", vocab_size=1000)
    with pytest.raises(UsageError, match=r"token ids up to 48\d\d\d, past the 1000 rows of the target's model"):
        run_in(tmp_path, *sides(small, ids_file))
