"""Every mistake a user can make is one sentence with the cause and the override that fixes it; a test per line of the
list."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from rl_onoff.errors import UsageError
from rl_onoff.rundir.provenance import changes
from rl_onoff.rundir.table import RunDir
from tests.conftest import ROOT
from tests.end_to_end.conftest import COMMAND, FAKE, SMALL, environment, refused, rl_onoff, token_ids
from tests.running import run_in

FILES = {
    "bad.jsonl": '{"prompt": "fine"}\n{"prompt": \n',
    "list.jsonl": "[1, 2]\n",
    "columns.jsonl": '{"text": "a", "label": 1}\n',
    "empty.jsonl": "",
    "types.jsonl": '{"prompt": 3}\n',
    "blank.jsonl": '{"prompt": "fine"}\n{"prompt": "  "}\n',
    "twice.jsonl": '{"prompt": "a", "id": 1}\n{"prompt": "b", "id": 1}\n',
    "long.jsonl": json.dumps({"prompt": "x" * 5000}) + "\n",
    "short.csv": "prompt,answer\na\n",
    "not.parquet": "this is text",
    "no_prompt.jsonl": '{"response": "an answer to nothing"}\n',
    "null_prompt.jsonl": '{"prompt": null, "response": "an answer to nothing"}\n',
    "judge.py": "def f(text):\n    return 1.0\n",
    "no_response.jsonl": '{"prompt": "a"}\n',
    "other_prompt.jsonl": '{"prompt": "a", "id": 1, "response": "x"}\n{"prompt": "b", "id": 1, "response": "y"}\n',
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A working directory with files that are wrong in one way each."""
    path = tmp_path_factory.mktemp("bad")
    for name, text in FILES.items():
        (path / name).write_text(text)
    return path


@pytest.mark.parametrize(
    ("arguments", "cause", "fix"),
    [
        # unknown backend, group, option or type
        (["backend=nope"], "backend=nope is not one of the choices", "set backend to one of fake huggingface"),
        (["experiment=nope"], "experiment=nope is not one of the choices", "set experiment to one of acceptance"),
        (["grop=x"], "there is no option grop", "--help shows the groups"),
        (["--data.limit=3"], "--data.limit is not an option", "write data.limit=3"),
        (
            ["backend=vllm", "model=smollm2", "sampling.temperature=3"],
            "vLLM takes 0 (greedy) or 0.01 to 2.0",
            "set sampling.temperature=1",
        ),
        (["sampling.temprature=1"], "there is no option sampling.temprature", "did you mean sampling.temperature"),
        (["backend.tp_sise=1"], "there is no option backend.tp_sise", "did you mean backend.tp_size"),
        (["model.temperature=0"], "there is no option model.temperature", "did you mean sampling.temperature"),
        (["backend.attn=eager"], "there is no option backend.attn", "+backend.engine_kwargs.NAME=VALUE"),
        (["+backend.attn=eager"], "no attribute 'attn'", "+backend.engine_kwargs.NAME=VALUE"),
        (["sampling.n=many"], "sampling.n=many is refused", "set sampling.n to a whole number"),
        (["sampling.temperature=hot"], "sampling.temperature=hot is refused", "set sampling.temperature to a number"),
        (["data.shuffle=maybe"], "data.shuffle=maybe is refused", "set data.shuffle to true or false"),
        (["sampling.stop=x"], "sampling.stop=x is refused", "set sampling.stop=[x]"),
        (["stages=generate"], "stages=generate is refused", "set stages=[generate]"),
        (["stages=[]"], "stages is empty", "set experiment=analyse"),
        (["run_dir="], "run_dir is empty", "set run_dir"),
        (["~nothing"], "'nothing' does not exist", "--help shows the groups"),
        # what another program calls it, or this one in another place
        (["sampling.max_length=3"], "there is no option sampling.max_length", "did you mean sampling.max_new_tokens"),
        (["backend.tp=2"], "there is no option backend.tp", "did you mean backend.tp_size"),
        (["num_samples=2"], "there is no option num_samples", "did you mean sampling.n"),
        (["backend=hf"], "backend=hf is not one of the choices", "did you mean backend=huggingface"),
        (["target=vLLM"], "target=vLLM is not one of the choices", "did you mean target=vllm"),
        (["tracking=off"], "tracking=off is not one of the choices", "did you mean tracking=none"),
        (["experiment=analyze"], "experiment=analyze is not one of the choices", "did you mean experiment=analyse"),
        (
            ["hydra/launcher=nope"],
            "hydra/launcher=nope is not one of the choices",
            "set hydra/launcher to one of basic",
        ),
        (["data=my.jsonl"], "data=my.jsonl is not one of the choices", "set data.path=my.jsonl"),
        (["data=./to/my.parquet"], "data=./to/my.parquet is not one of the choices", "set data.path=./to/my.parquet"),
        (["generate"], "'generate' is not an override", "write experiment=generate"),
        (["onof"], "'onof' is not an override", "write experiment=onoff"),
        (["greedy"], "'greedy' is not an override", "write sampling=greedy"),
        (["smollm2"], "'smollm2' is not an override", "write model=smollm2"),
        (["+sampling=greedy"], "Multiple values for sampling", "--help shows the groups"),
        (["data.path=~/no/my.jsonl"], "/no/my.jsonl does not exist", "set data.path"),
        (["score.responses=columns.jsonl"], "score.responses names responses made elsewhere", "set experiment=score"),
        (["backend"], "'backend' is not an override", "write backend=NAME, one of fake huggingface sglang vllm"),
        (["my.jsonl"], "'my.jsonl' is not an override", "write data.path=my.jsonl"),
        (["data.limit", "=3"], "'data.limit' is not an override", "write data.limit=VALUE, without blanks"),
        (["compare.columns.behaviour=y"], "compare.columns.behaviour yet", "with a plus, +compare.columns.behaviour=y"),
        (["backend.engine_kwargs.foo=1"], "backend.engine_kwargs.foo yet", "with a plus, +backend.engine_kwargs.foo=1"),
        (
            ["backend.engine_kwargs.api_key=abc"],
            "backend.engine_kwargs.api_key is a literal secret",
            "api_key=${oc.env:API_KEY}'",
        ),
        (["+compare.columns.behavior=y"], "compare.columns has 'behavior'", "set +compare.columns.behaviour=y"),
        (["data.format=xml"], "data.format=xml is refused", "set data.format to one of auto, jsonl"),
        (["sampling.seed=null"], "sampling.seed=null is refused", "set it to a value"),
        (["words"], "'words' is not an override", "write NAME=VALUE"),
        (["sampling.stop=[a"], "an override cannot be read", "quote a value"),
        (["backend=fake,vllm"], "backend=fake,vllm has several values", "add -m"),
        (["backend.tp_size=0"], "backend.tp_size is 0", "set backend.tp_size=1"),
        (["backend=huggingface", "model.dtype=float8"], "'float8' but must be one of auto, float32", "dtype=float32"),
        (["model.dtype=fp16"], "'fp16' but must be one of auto, float32", "set model.dtype=float16"),
        (["backend.dtype=bf16"], "'bf16' but must be one of auto, float32", "dtype=bfloat16"),
        (["target=huggingface", "target.dtype=FP32"], "'FP32' but must be one of auto, float32", "dtype=float32"),
        (["target.dtype=float32"], "target.dtype=float32 needs an engine that scores", "add target=huggingface"),
        (
            ["-m", "target.dtype=float32,bfloat16"],
            "target.dtype=float32,bfloat16 needs an engine that scores",
            "add target=huggingface",
        ),
        (
            ["targets.f32.dtype=float32"],
            "targets.f32.dtype=float32 needs an engine",
            "add '+target@targets.f32=huggingface'",
        ),
        (
            ["+policies.a.dtype=float32"],
            "+policies.a.dtype=float32 needs an engine",
            "add '+backend@policies.a=huggingface'",
        ),
        (["sampling.temp=0.7"], "there is no option sampling.temp:", "did you mean sampling.temperature?"),
        (
            ["Qwen/Qwen2.5-0.5B-Instruct"],
            "'Qwen/Qwen2.5-0.5B-Instruct' is not an override",
            "write model=Qwen/Qwen2.5-0.5B-Instruct",
        ),
        (["backend=huggingface", "backend.torch_dtype=half"], "backend.torch_dtype is 'half'", "dtype=float16"),
        (["backend=vllm", "backend.max_model_len=-1"], "backend.max_model_len is -1", "set backend.max_model_len=4096"),
        (
            ["backend=sglang", "backend.context_length=0"],
            "backend.context_length is 0",
            "set backend.context_length=4096",
        ),
        (["target=huggingface", "target.batch_size=0"], "target.batch_size is 0", "set target.batch_size=auto"),
        (
            ["+backend@policies.a=vllm", "policies.a.gpu_memory_utilization=2"],
            "policies.a.gpu_memory_utilization is 2.0",
            "set policies.a.gpu_memory_utilization=0.9",
        ),
        # a truth that is none, an adapter that is not there
        (
            ["target=truth", "target.dtype=bfloat16"],
            "target is the truth, HuggingFace in float32, and target.dtype is bfloat16",
            "leave target.dtype out, or choose target=huggingface",
        ),
        (
            ["experiment=acceptance", "target.tf32=true"],
            "target is the truth, HuggingFace in float32, and target.tf32 is True",
            "leave target.tf32 out",
        ),
        (
            ["+target@targets.exact=truth", "targets.exact.dtype=float16"],
            "targets.exact is the truth, HuggingFace in float32, and targets.exact.dtype is float16",
            "leave targets.exact.dtype out",
        ),
        (["model.merge_adapter=true"], "merge_adapter=true has no adapter to merge", "set model.adapter, or"),
        (["tracking.table_rows=-1"], "tracking.table_rows is -1", "set tracking.table_rows=200"),
        (["backend._target_=os.system"], "which is no registered engine", "set backend to one of fake, huggingface"),
        (["tracking.mode=x"], "tracking.mode=x is refused", "set tracking.mode to one of auto, online"),
        (["reward.function=nope"], "reward.function=nope names no function", "set reward.function="),
        (
            ["reward.function=mine.py:f"],
            "the file mine.py of reward.function=mine.py:f does not exist",
            "set reward.function=",
        ),
        (
            ["reward.function=judge:f"],
            "reward.function=judge:f names a file without its ending",
            "set reward.function=judge.py:f",
        ),
        (
            ["reward.function=./judge:f"],
            "reward.function=./judge:f names a file without its ending",
            "set reward.function=./judge.py:f",
        ),
        (
            ["reward.function=judge.py"],
            "reward.function=judge.py names no function",
            "set reward.function=judge.py:NAME",
        ),
        (["reward.function=judge.f"], "reward.function=judge.f names no function", "set reward.function=judge.py:f"),
        (
            ["reward.function=judge.py:f"],
            "cannot be called with (text, answer, meta): too many positional",
            "these three parameters",
        ),
        (["score.name=../x"], "score.name is '../x'", "set score.name=mine"),
        # a model that does not exist
        (
            ["backend=huggingface", "model=./no-model"],
            "model.name=./no-model does not exist",
            "set model.name to an existing folder",
        ),
        (
            ["backend=huggingface", "model=no-one/no-model"],
            "model.name=no-one/no-model is not in the local cache",
            "set model.name",
        ),
        (
            ["backend=huggingface", "model=smollm"],
            "model.name=smollm is neither a folder nor a hub id",
            "did you mean model.name=smollm2",
        ),
        (
            ["backend=huggingface", "model=SmolLM2-135M"],
            "model.name=SmolLM2-135M is neither",
            "did you mean model.name=smollm2",
        ),
        (
            ["backend=huggingface", "model=smollm2", "model.tokenizer=./no"],
            "model.tokenizer=./no does not exist",
            "set model.tokenizer to",
        ),
        (["backend=huggingface", "model=/proc"], "the folder model.name=/proc has no config.json", "set model.name"),
        # a missing or malformed data file
        (["data.path=nowhere.jsonl"], "the file data.path=nowhere.jsonl does not exist", "set data.path"),
        (["data.path="], "data.path is empty", "set data.path to a file"),
        (["data.path=bad"], "the file data.path=bad does not exist", "did you mean data.path=bad.jsonl"),
        (["data.path=bad.jsonl"], "line 2 of bad.jsonl is not valid JSON", "set data.path"),
        (
            ["data.path=list.jsonl"],
            "line 1 of list.jsonl is not valid JSON (a list where every line is an object",
            "data.path",
        ),
        (
            ["data.path=columns.jsonl"],
            "columns.jsonl has no column for the prompt but text, label",
            "set data.prompt to one of them",
        ),
        (
            ["data.path=columns.jsonl", "data.prompt=question"],
            "columns.jsonl has no column 'question' but text, label",
            "set data.prompt",
        ),
        (["data.path=empty.jsonl"], "empty.jsonl has no rows", "set data.path"),
        (["data.path=types.jsonl"], "line 1 of types.jsonl has a number as its prompt", "set data.prompt"),
        (["data.path=twice.jsonl"], "line 2 of twice.jsonl and line 1 of twice.jsonl share the id '1'", "set data.id"),
        (
            ["data.path=short.csv"],
            "line 2 of short.csv is not valid CSV (1 fields where the first line has 2)",
            "set data.path",
        ),
        (["data.path=not.parquet"], "row 1 of not.parquet is not valid Parquet", "set data.path"),
        (["data.limit=0"], "data.limit is 0", "set data.limit=20"),
        # an empty prompt, a prompt longer than the context
        (["data.path=blank.jsonl"], "line 2 of blank.jsonl has an empty prompt", "data.prompt"),
        (
            ["data.path=long.jsonl"],
            "the prompt of row '0' has 5018 tokens and the model's context only 4096",
            "set model.name",
        ),
        # sampling
        (["sampling.top_p=0"], "sampling.top_p is 0.0 but must be above 0 and at most 1", "set sampling.top_p=1"),
        (["sampling.temperature=-0.5"], "sampling.temperature is -0.5", "set sampling.temperature=1"),
        (["sampling.temperature=nan"], "sampling.temperature is nan", "set sampling.temperature=1"),
        (["sampling.n=0"], "sampling.n is 0 but must be a whole number from 1 on", "set sampling.n=1"),
        (["sampling.stop=[a,'']"], "sampling.stop is ['a', '']", "set sampling.stop=[]"),
        (["sampling.max_new_tokens=0"], "sampling.max_new_tokens is 0", "set sampling.max_new_tokens=512"),
        # responses for a prompt that is not there
        (
            ["experiment=score", "score.responses=no_prompt.jsonl"],
            "no_prompt.jsonl has none of the columns prompt_ids",
            "score.responses",
        ),
        (
            ["experiment=score", "score.responses=null_prompt.jsonl"],
            "line 1 of null_prompt.jsonl has an empty prompt",
            "score.responses",
        ),
        (
            ["experiment=score", "score.responses=no_response.jsonl"],
            "no_response.jsonl has none of the columns",
            "score.responses",
        ),
        (
            ["experiment=score", "score.responses=other_prompt.jsonl"],
            "line 2 of other_prompt.jsonl has the id '1'",
            "score.responses",
        ),
        (
            ["experiment=score", "score.responses=nowhere.jsonl"],
            "the file score.responses=nowhere.jsonl does not exist",
            "score.responses",
        ),
        (
            ["experiment=score", "score.responses=judge.py"],
            "the ending of score.responses=judge.py is none of .jsonl",
            "rename the file",
        ),
        (
            ["experiment=compare", "compare.behaviour=no"],
            "compare.behaviour=no does not exist",
            "set compare.behaviour to a run folder",
        ),
        (
            ["experiment=score", "run_dir=no-run"],
            "no-run has no responses to score",
            "set run_dir to an earlier run's folder",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_one_sentence(arguments, cause, fix, folder, refused_here):
    sentence = refused_here(*FAKE, *arguments, cwd=folder)
    assert cause in sentence and fix in sentence, sentence


def test_one_sentence_is_all_a_process_prints(folder):
    for arguments in (
        ["backend=nope"],
        ["sampling.n=0"],
        ["data.path=bad.jsonl"],
        ["experiment=score", "run_dir=no-run"],
    ):
        refused(*FAKE, *arguments, cwd=folder)


def test_a_traceback_when_it_is_asked_for(folder):
    for arguments in (["backend=nope"], ["sampling.n=0"]):
        done = rl_onoff(*FAKE, *arguments, cwd=folder, code=1, HYDRA_FULL_ERROR="1")
        assert "Traceback" in done.stderr


def test_help_is_not_an_error_when_the_reader_goes_away(folder):
    command = f"{' '.join(COMMAND)} --cfg job | true"
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert "Traceback" not in done.stderr


def test_a_reward_that_fails_loses_nothing_and_shows_in_the_numbers(tmp_path, monkeypatch, capsys):
    (tmp_path / "judge.py").write_text("def f(text, answer, meta):\n    return 1 / (len(meta['question']) % 2)\n")
    monkeypatch.chdir(tmp_path)
    few = ("backend=fake", "model.name=fake", "sampling.max_new_tokens=8")
    for _ in range(2):  # the second time reads the disk alone
        folder = run_in(tmp_path / "run", *few, "data.limit=20", "reward.function=judge.py:f")
        rows = list(folder.completions.rows())
        failed = sum(row["reward"] is None for row in rows)
        assert len(rows) == 20 and 0 < failed < 20
        assert all("ZeroDivisionError" in row["meta"] for row in rows if row["reward"] is None)
        assert folder.read_json("metrics.json")["values"]["reward/failed"] == failed
        assert re.search(rf"reward failed +{failed}\n", capsys.readouterr().out)
    assert (
        "reward/failed"
        not in run_in(tmp_path / "fine", *few, "data.limit=4", "reward=math").read_json("metrics.json")["values"]
    )


def test_a_changed_option_is_told_once_under_its_first_name(tmp_path):
    claimed = RunDir(tmp_path).completions
    before = {"backend": {"dtype": "float32", "torch_dtype": "float32", "tp_size": None, "tensor_parallel_size": None}}
    claimed.claim(before)
    with claimed.writer() as writer:
        writer.append({"request_id": "a", "sample": 0})
    with pytest.raises(
        UsageError, match=r'config \(backend\.dtype: "float32" -> "bfloat16"; backend\.tp_size: null -> 2\): undo'
    ) as caught:
        claimed.claim(
            {"backend": {"dtype": "bfloat16", "torch_dtype": "bfloat16", "tp_size": 2, "tensor_parallel_size": 2}},
            changes,
        )
    assert "torch_dtype" not in str(caught.value)
    with pytest.raises(UsageError, match=r'config \(backend\.dtype: "float32" -> "bfloat16"\)'):
        claimed.claim({"backend": {**before["backend"], "torch_dtype": "bfloat16"}}, changes)


def test_a_sweeps_run_folder_and_other_odd_paths_are_given_back(tmp_path):
    shutil.copy(ROOT / "rl_onoff/data/problems.jsonl", rows := tmp_path / "größe=1#2.jsonl")
    sweep = ("-m", *SMALL, f"data.path={rows}", "experiment=generate", "sampling.temperature=0.6,1.0", "sampling.n=1,2")
    rl_onoff(*sweep, "sweep_dir=out/第1=次", cwd=tmp_path)
    folder = "out/第1=次/sampling.n=1,sampling.temperature=0.6"
    again = (*SMALL, f"data.path={rows}", "sampling.temperature=0.6", f"run_dir={folder}")
    before = token_ids(tmp_path / folder)
    assert "4 of 4 responses found on disk" in rl_onoff(*again, cwd=tmp_path).stdout
    assert token_ids(tmp_path / folder) == before and len(before) == 4
    rl_onoff(*SMALL, "experiment=compare", f"compare.behaviour={folder}", "run_dir=out/it's %(mine)!", cwd=tmp_path)
    assert (tmp_path / "out" / "it's %(mine)!" / "metrics.json").exists()


# -- the disk ----------------------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written(folder):
    (folder / "file").write_text("")
    for run_dir in ("/proc/run", "file", "file/run"):
        sentence = refused(*SMALL, f"run_dir={run_dir}", cwd=folder, code=1)
        assert f"cannot write to {run_dir} (" in sentence and "set run_dir to a folder you can write to" in sentence
    sentence = refused("-m", *SMALL, "sampling.n=1,2", "sweep_dir=/proc/sweep", cwd=folder, code=1)
    assert "cannot write to /proc/sweep" in sentence


def test_a_read_only_folder(folder, tmp_path):
    (tmp_path / "run").mkdir(mode=0o555)
    as_anyone = ["setpriv", "--bounding-set=-dac_override"] if os.getuid() == 0 else []  # root may write anywhere
    command = [*as_anyone, *COMMAND, *SMALL, f"run_dir={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "cannot write to" in done.stderr and "Permission denied" in done.stderr and "set run_dir" in done.stderr


def test_a_full_disk_loses_nothing_that_was_written(tmp_path):
    """A limit on the size of a file is a full disk that needs no root: EFBIG where a disk says ENOSPC."""
    few = (*FAKE, "data.limit=6", "sampling.max_new_tokens=200", "run_dir=run")
    rl_onoff(*few, "experiment=generate", cwd=tmp_path)
    few = (*few, "experiment=score", "score.full_logits=true")
    before = token_ids(tmp_path / "run")
    command = [
        "bash",
        "-c",
        f"ulimit -f 200; exec {' '.join([*COMMAND, *few])}",
    ]  # 200 KiB a file; the logits need 1.2 MB
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("rl-onoff: the disk that holds"), done.stderr
    assert "go on with the same run_dir" in done.stderr
    assert token_ids(tmp_path / "run") == before
    assert not list((tmp_path / "run").rglob(".part-*"))
    rl_onoff(*few, cwd=tmp_path)
    assert token_ids(tmp_path / "run") == before
