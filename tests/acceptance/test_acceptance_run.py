"""experiment=acceptance from the command's config to its files, with faults planted in an engine and in a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rl_onoff.acceptance.measure import draw_in_full, head_mass, turn_end
from rl_onoff.analysis_config import Check
from rl_onoff.backends import create_backend
from rl_onoff.backends.engine import EngineInfo, Supply
from rl_onoff.backends.fake import backend as fake
from rl_onoff.backends.fake.backend import FakeBackend
from rl_onoff.errors import GateError, UsageError
from rl_onoff.rundir.table import RunDir, Table
from rl_onoff.types import Rollout, Sampling, TokenScores, Want, sample_requests
from tests.running import run_in

FAKE = ("experiment=acceptance", "backend=fake", "target=fake", "model.name=fake")
ALL = [check.value for check in Check]


def accepted(path: Path, *overrides: str) -> dict[str, Any]:
    """What acceptance.json says, its lines by check; the gate must have said the same."""
    try:
        run_in(path, *overrides)
        failed = ""
    except GateError as error:
        failed = str(error)
    found = RunDir(path).read_json("acceptance.json")
    assert ",".join(found["failed"]) in failed and found["accepted"] == (not failed)
    return {**found, "lines": {line["check"]: line for line in found["lines"]}}


def test_a_sound_engine_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = accepted(tmp_path, *FAKE)
    assert list(found["lines"]) == ALL and found["failed"] == [] and found["not_tried"] == ["cache"]
    assert found["engine"] == found["truth"] == "fake 1 (float32)" and found["model"] == "fake"
    told = RunDir(tmp_path).read_json("metrics.json")
    assert told["acceptance"]["lines"] == list(found["lines"].values())
    assert told["values"]["acceptance/failed"] == 0 and told["values"]["acceptance/truth"] == 0
    shown = capsys.readouterr().out
    assert shown.startswith("  acceptance of fake on fake 1 (float32); the truth is fake 1 (float32)\n")
    assert "10 passed, 0 failed, 1 not tried" in shown and "800 tokens" in shown and "64 tokens" in shown


def page_of(path: Path) -> dict[str, Any]:
    """The data of the run's page."""
    data = (path / "report.html").read_text().partition('<script type="application/json" id="summary">')[2]
    return json.loads(data.partition("</script>")[0])


def test_the_page_shows_the_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside the run's own responses where there are any, else beside those that acceptance drew."""
    found = accepted(tmp_path / "a", *FAKE, "target.noise=1")
    page, line = page_of(tmp_path / "a"), found["lines"]["truth"]
    assert page["acceptance"]["lines"] == list(found["lines"].values()) and line["fix"] and line["outcome"] == "fail"
    assert [(policy["name"], policy["role"]) for policy in page["policies"]] == [
        ("behaviour", "behaviour"), ("truth", "target"), ("fake", "target"),
    ]  # fmt: skip
    assert [comparison["counts"]["tokens"] for comparison in page["comparisons"]] == [800, 800]
    assert page["comparisons"][0]["overall"]["kl_k3"]["value"] > 0.1
    told = RunDir(tmp_path / "a").read_json("metrics.json")
    assert told["comparisons"] == {} and "verdict" not in told, "the responses of the run, which are none"
    assert f"; what to do: {line['fix']}" in capsys.readouterr().out

    own = ("experiment=onoff", *FAKE[1:], "target.noise=1", "data.limit=4", "sampling.max_new_tokens=8")
    run_in(tmp_path / "b", *own)
    accepted(tmp_path / "b", *FAKE, "target.noise=1")
    page = page_of(tmp_path / "b")
    assert page["acceptance"]["failed"] == ["greedy", "truth"]
    assert [comparison["counts"]["responses"] for comparison in page["comparisons"]] == [4, 4]


def test_what_was_measured_is_judged_again_without_an_engine(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = accepted(tmp_path, *FAKE, "target.noise=0.1")
    assert "truth" not in first["failed"]
    with caplog.at_level("INFO"):
        second = accepted(tmp_path, *FAKE, "target.noise=0.1", "acceptance.k3=1e-4")
    assert second["failed"] == ["truth"] and second["lines"]["truth"]["value"] == first["lines"]["truth"]["value"]
    assert not any("loading" in line for line in caplog.messages)


@pytest.mark.parametrize(
    "changed",
    ["backend.noise=0.1", "acceptance.prompts=2", "acceptance.tokens=20", "sampling.seed=1", "target.noise=0.1"],
)
def test_rows_of_another_engine_or_of_other_prompts_are_refused(changed: str, tmp_path: Path) -> None:
    accepted(tmp_path, *FAKE)
    with pytest.raises(UsageError, match="rows of another config"):
        run_in(tmp_path, *FAKE, changed)


def test_another_policy_than_the_truth_fails(tmp_path: Path) -> None:
    found = accepted(tmp_path, *FAKE, "backend.noise=1")
    assert found["failed"] == ["greedy", "truth"]
    assert found["lines"]["truth"]["value"] > 0.1 and found["lines"]["greedy"]["value"] > 0.5


def test_lines_that_do_not_apply_say_why(tmp_path: Path) -> None:
    long = ("acceptance.long_tokens=4080", "acceptance.tokens=2000", "acceptance.prompts=1", "data.chat_template=false")
    found = accepted(tmp_path / "a", *FAKE, "target=self", *long, "acceptance.skip=[batch,eos]")
    said = {check: found["lines"][check]["said"] for check in found["not_tried"]}
    assert said == {
        "eos": "it is in acceptance.skip",
        "decode_long": "the context holds 4,096 tokens",
        "batch": "it is in acceptance.skip",
        "cache": "the engine keeps no prompts",
        "greedy": "there is no truth: set target=truth",
        "truth": "there is no truth: set target=truth",
    }
    assert found["failed"] == [] and found["lines"]["template"]["said"].endswith("as the tokenizer says")
    found = accepted(tmp_path / "b", *FAKE, "acceptance.tokens=4096", "acceptance.prompts=1", "acceptance.skip=[truth]")
    assert "the context has room for" in found["lines"]["decode"]["said"]


def test_a_truth_that_cannot_be_loaded_leaves_the_other_lines(tmp_path: Path, tiny_llama: str) -> None:
    found = accepted(
        tmp_path, "experiment=acceptance", "backend=fake", f"model.name={tiny_llama}", "target.device=cuda:9"
    )
    assert found["not_tried"] == ["cache", "greedy", "truth"] and found["truth"] is None
    assert "the truth failed (" in found["lines"]["truth"]["said"]


def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = accepted(tmp_path / "whole", *FAKE)
    score, scored = FakeBackend._score, 0

    def stopped(self: FakeBackend, rollouts: Sequence[Rollout], want: Want) -> Iterator[TokenScores]:
        nonlocal scored
        for scores in score(self, rollouts, want):
            scored += 1
            if scored == 20:
                raise KeyboardInterrupt
            yield scores

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FakeBackend, "_score", stopped)
        run_in(tmp_path / "run", *FAKE)
    assert not (tmp_path / "run" / "acceptance.json").exists()
    assert len(Table(tmp_path / "run" / "acceptance" / "batch", {}).keys()) == 19
    assert accepted(tmp_path / "run", *FAKE) == whole


# -- faults of an engine -----------------------------------------------------------------------------------------------


def shifted(scores: TokenScores) -> TokenScores:
    """Logprobs that are 0.3 nats off, here and there."""
    return replace(scores, logprobs_T=scores.logprobs_T + np.where(scores.token_ids_T % 2, 0.3, 0).astype(np.float32))


def wrong_prefill(patch: pytest.MonkeyPatch) -> None:
    score = FakeBackend._score
    patch.setattr(FakeBackend, "_score", lambda *args: map(shifted, score(*args)))


def wrong_batches(patch: pytest.MonkeyPatch) -> None:
    score = FakeBackend._score

    def in_batches(self: FakeBackend, rollouts: Sequence[Rollout], want: Want) -> Iterator[TokenScores]:
        for scores in score(self, rollouts, want):
            yield shifted(scores) if len(rollouts) > 1 else scores

    patch.setattr(FakeBackend, "_score", in_batches)


def wrong_long_contexts(patch: pytest.MonkeyPatch) -> None:
    logits_of = FakeBackend._logits_of

    def beyond(self: FakeBackend, rollout: Rollout) -> Any:
        return logits_of(self, rollout) * (1.3 if rollout.num_tokens > 900 else 1)

    patch.setattr(FakeBackend, "_logits_of", beyond)


def top_3_whatever_is_asked(patch: pytest.MonkeyPatch) -> None:
    draw = fake.draw

    def cut(logits: Any, samplings: Sequence[Sampling], keys: np.ndarray, kind: Any) -> Any:
        return draw(logits, [sampling.replace(top_k=3) for sampling in samplings], keys, kind)

    patch.setattr(fake, "draw", cut)


def wrong_cache(patch: pytest.MonkeyPatch, off: float = 0.3) -> None:
    load, generate = FakeBackend._load, FakeBackend._generate
    seen: set[bytes] = set()

    def with_cache(self: FakeBackend) -> EngineInfo:
        return replace(load(self), caches_prompts=True)

    def cached(self: FakeBackend, supply: Supply) -> Iterator[Rollout]:
        requests = {request.key: request for request in supply.take(wait=True)}

        class Taken:
            def take(self, most: int | None = None, *, wait: bool) -> Any:
                return [requests.pop(key) for key in list(requests)]

        prompts = {key: request.prompt_ids.tobytes() for key, request in requests.items()}
        for rollout in generate(self, Taken()):
            assert rollout.logprobs_T is not None
            prompt = prompts[rollout.key]
            yield replace(rollout, logprobs_T=rollout.logprobs_T - np.float32(off if prompt in seen else 0))
            seen.add(prompt)

    patch.setattr(FakeBackend, "_load", with_cache)
    patch.setattr(FakeBackend, "_generate", cached)


FAULTS: dict[Callable[[pytest.MonkeyPatch], None], set[str]] = {
    wrong_prefill: {"decode", "decode_long"},
    wrong_batches: {"decode", "decode_long", "batch"},
    wrong_long_contexts: {"decode_long"},
    top_3_whatever_is_asked: {"sampling"},
    wrong_cache: {"cache"},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_engine_fails_its_line(
    fault: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    found = accepted(tmp_path, *FAKE, "target=self")
    assert set(found["failed"]) == FAULTS[fault]


def test_a_cache_that_keeps_its_word_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_cache(monkeypatch, off=0.0)
    line = accepted(tmp_path, *FAKE)["lines"]["cache"]
    assert (line["outcome"], line["value"]) == ("pass", 0) and "of 128 tokens" in line["said"]


# -- faults of a model's files -----------------------------------------------------------------------------------------

FILES = ("acceptance.skip=[sampling,decode,decode_long,batch,cache,head,greedy,truth]", "model.dtype=float32")


def copy_of(model: str, folder: Path, **changes: Any) -> str:
    """A model folder with settings of its JSON files changed; a name with dots goes to the file before the last dot."""
    shutil.copytree(model, folder)
    for file, settings in changes.items():
        path = folder / f"{file}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return str(folder)


def files_line(check: str, model: str, path: Path) -> dict[str, Any]:
    return accepted(path, "experiment=acceptance", f"model.name={model}", *FILES)["lines"][check]


def test_a_sound_models_files_pass(tiny_llama: str, tmp_path: Path) -> None:
    found = accepted(tmp_path, "experiment=acceptance", f"model.name={tiny_llama}", *FILES)
    assert [check for check, line in found["lines"].items() if line["outcome"] == "pass"] == [
        "template",
        "round_trip",
        "eos",
    ]
    assert found["lines"]["eos"]["said"] == "config 2; generation config 2; tokenizer 2; template 2; engine 2"


def test_a_generation_config_with_another_end(tiny_llama: str, tmp_path: Path) -> None:
    model = copy_of(tiny_llama, tmp_path / "model", generation_config={"eos_token_id": 5})
    line = files_line("eos", model, tmp_path / "run")
    assert line["outcome"] == "fail" and "not everywhere 2 '<|im_end|>'" in line["said"]
    assert "generation config 5" in line["said"] and "engine 2, 5" in line["said"]


def test_a_template_whose_end_of_turn_ends_nothing(tiny_llama: str, tmp_path: Path) -> None:
    ends = {"eos_token_id": 0}
    model = copy_of(
        tiny_llama,
        tmp_path / "model",
        config=ends,
        generation_config=ends,
        tokenizer_config={"eos_token": "<|endoftext|>"},
    )
    line = files_line("eos", model, tmp_path / "run")
    assert line["outcome"] == "fail" and line["said"].endswith("template 2; engine 0: not everywhere 2 '<|im_end|>'")


def test_a_template_that_adds_a_second_bos(tiny_llama: str, tmp_path: Path) -> None:
    model = copy_of(tiny_llama, tmp_path / "model")
    file = Path(model) / "chat_template.jinja"
    file.write_text("{{ bos_token }}" + file.read_text())
    line = files_line("template", model, tmp_path / "run")
    assert (line["outcome"], line["value"]) == ("fail", 8) and "2 BOS (id 1)" in line["said"]


def test_a_model_without_a_template(tiny_llama: str, tmp_path: Path) -> None:
    model = copy_of(tiny_llama, tmp_path / "model")
    (Path(model) / "chat_template.jinja").unlink()
    found = accepted(tmp_path / "run", "experiment=acceptance", f"model.name={model}", *FILES)
    assert found["failed"] == ["template"] and "no chat template" in found["lines"]["template"]["said"]
    assert found["lines"]["eos"]["outcome"] == "pass", "the other lines are tried, with plain prompts"


def test_rows_of_the_head_beyond_the_vocabulary(tiny_llama: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    size = model.config.vocab_size
    model.resize_token_embeddings(size + 64, mean_resizing=False)
    torch.manual_seed(0)
    with torch.no_grad():
        model.lm_head.weight[size:] = 20 * torch.randn(64, model.config.hidden_size) * model.lm_head.weight.std()
    shutil.copytree(tiny_llama, tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    skip = "acceptance.skip=[greedy,truth,cache]"
    found = accepted(
        tmp_path / "run", "experiment=acceptance", f"model.name={tmp_path / 'model'}", "model.dtype=float32", skip
    )
    line = found["lines"]["head"]
    assert (
        line["outcome"] == "fail" and line["value"] > 0.01 and f"64 rows of the LM head, from {size} on" in line["said"]
    )
    assert found["lines"]["decode_long"]["said"] == "the context holds 512 tokens"


# -- how it is measured ------------------------------------------------------------------------------------------------


def test_responses_go_on_until_they_are_whole() -> None:
    """A response that ends is followed by another behind it; scoring all of it at once gives the same logprobs."""
    sampling = Sampling(max_new_tokens=2000)
    requests = sample_requests(id="a", prompt_ids=np.array([72, 105]), sampling=sampling, samples=range(3))
    with create_backend({"backend_type": "fake", "model_name": "fake"}) as backend:
        drawn = {rollout.key: rollout for rollout in draw_in_full(backend, requests)}
        ends = [int((rollout.token_ids_T[:-1] == 256).sum()) for rollout in drawn.values()]
        assert min(ends) > 0, "the fake ends a response every 257 tokens or so"
        for scores in backend.score(drawn.values()):
            rollout = drawn[scores.key]
            assert len(rollout.token_ids_T) == 2000 and rollout.prompt_ids.tolist() == [72, 105]
            np.testing.assert_allclose(rollout.logprobs_T, scores.logprobs_T, atol=1e-6)


TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}END\n{% endfor %}"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (TURN.replace("END", "<|im_end|>") + ASK, 2),
        (TURN.replace("END", "<|endoftext|>") + ASK, 0),
        (TURN.replace("END", "") + ASK, None),  # the next turn's first token ends nothing
        ("{% if messages | length > 1 %}{{ raise_exception('one turn alone') }}{% endif %}", None),
        (None, None),
    ],
)
def test_the_token_that_ends_a_turn(template: str | None, end: int | None, smollm2: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokenizer.chat_template = template
    assert turn_end(tokenizer) == end


def test_the_mass_on_rows_of_the_head() -> None:
    rollout = Rollout(request_id="a", sample=0, prompt_ids=np.array([72, 105]), token_ids_T=np.array([33, 34]))
    with create_backend({"backend_type": "fake", "model_name": "fake"}) as backend:
        logits_TV = backend.get_logits([72, 105], [33, 34]).astype(np.float64)
        probs_TV = np.exp(logits_TV) / np.exp(logits_TV).sum(-1, keepdims=True)
        assert head_mass(backend, [rollout], [5, 250]) == pytest.approx(probs_TV[:, [5, 250]].sum(-1).max(), rel=1e-6)
        assert head_mass(backend, [rollout], list(range(257))) == pytest.approx(1)


def test_a_list_of_which_nothing_was_tried_is_no_pass(tmp_path: Path) -> None:
    found = accepted(tmp_path, *FAKE, f"acceptance.skip=[{','.join(ALL)}]")
    assert not found["accepted"] and found["failed"] == [] and found["not_tried"] == ALL
