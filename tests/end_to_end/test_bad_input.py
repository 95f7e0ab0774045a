"""Every mistake a user can make is one sentence with the cause and the override that mends it; a test per line of the list."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.end_to_end.conftest import COMMAND, FAKE, SMALL, environment, refused, rl_onoff, token_ids

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
    ("arguments", "cause", "mend"),
    [
        # unknown backend, group, option or type
        (["backend=nope"], "backend=nope is not one of the choices", "set backend to one of fake huggingface"),
        (["experiment=nope"], "experiment=nope is not one of the choices", "set experiment to one of analyse"),
        (["grop=x"], "there is no option grop", "--help shows the groups"),
        (["sampling.temprature=1"], "there is no option sampling.temprature", "did you mean sampling.temperature"),
        (["backend.tp_sise=1"], "there is no option backend.tp_sise", "did you mean backend.tp_size"),
        (["model.temperature=0"], "there is no option model.temperature", "did you mean sampling.temperature"),
        (["backend.attn=eager"], "there is no option backend.attn", "+backend.engine_kwargs.NAME=VALUE"),
        (["+backend.attn=eager"], "no attribute 'attn'", "+backend.engine_kwargs.NAME=VALUE"),
        (["sampling.n=many"], "sampling.n=many is refused", "set sampling.n to a value of its type"),
        (["sampling.stop=x"], "sampling.stop=x is refused", "set sampling.stop to a value of its type"),
        (["data.format=xml"], "data.format=xml is refused", "set data.format to one of auto, jsonl"),
        (["sampling.seed=null"], "sampling.seed=null is refused", "set it to a value"),
        (["words"], "'words' is not an override", "write NAME=VALUE"),
        (["sampling.stop=[a"], "an override cannot be read", "quote a value"),
        (["backend=fake,vllm"], "backend=fake,vllm has several values", "add -m"),
        (["backend.tp_size=0"], "backend.tp_size is 0", "set backend.tp_size=1"),
        (["backend=huggingface", "model.dtype=float8"], "'float8' but must be one of auto, float32", "dtype=float32"),
        (["backend._target_=os.system"], "may only name a class of rl_onoff.backends", "set backend=huggingface"),
        (["tracking.mode=x"], "tracking.mode=x is refused", "set tracking.mode to one of auto, online"),
        (["reward.function=nope"], "reward.function=nope names no function", "set reward.function="),
        (["reward.function=mine.py:f"], "the file mine.py of reward.function=mine.py:f does not exist", "set reward.function="),
        (["score.name=../x"], "score.name is '../x'", "set score.name=mine"),
        # a model that does not exist
        (["backend=huggingface", "model=./no-model"], "model.name=./no-model does not exist", "set model.name to an existing folder"),
        (["backend=huggingface", "model=no-one/no-model"], "model.name=no-one/no-model is not in the local cache", "set model.name"),
        (["backend=huggingface", "model=/proc"], "the folder model.name=/proc has no config.json", "set model.name"),
        # a missing or malformed data file
        (["data.path=nowhere.jsonl"], "the file data.path=nowhere.jsonl does not exist", "set data.path"),
        (["data.path=bad.jsonl"], "line 2 of bad.jsonl is not valid JSON", "set data.path"),
        (["data.path=list.jsonl"], "line 1 of list.jsonl is no JSON object but a list", "data.path"),
        (["data.path=columns.jsonl"], "columns.jsonl has no column for the prompt but text, label", "set data.prompt to one of them"),
        (["data.path=columns.jsonl", "data.prompt=question"], "columns.jsonl has no column 'question' but text, label", "set data.prompt"),
        (["data.path=empty.jsonl"], "empty.jsonl has no rows", "set data.path"),
        (["data.path=types.jsonl"], "line 1 of types.jsonl has a number as its prompt", "set data.prompt"),
        (["data.path=twice.jsonl"], "line 2 of twice.jsonl and line 1 of twice.jsonl share the id '1'", "set data.id"),
        (["data.path=short.csv"], "line 2 of short.csv has not 2 fields", "set data.path"),
        (["data.path=not.parquet"], "not.parquet is not a Parquet file", "set data.path"),
        (["data.limit=0"], "data.limit is 0", "set data.limit=20"),
        # an empty prompt, a prompt longer than the context
        (["data.path=blank.jsonl"], "line 2 of blank.jsonl has an empty prompt", "data.prompt"),
        (["data.path=long.jsonl"], "the prompt of row '0' has 5018 tokens and the model's context only 4096", "set model.name"),
        # sampling
        (["sampling.top_p=0"], "sampling.top_p is 0.0 but must be above 0 and at most 1", "set sampling.top_p=1"),
        (["sampling.temperature=-0.5"], "sampling.temperature is -0.5", "set sampling.temperature=1"),
        (["sampling.temperature=nan"], "sampling.temperature is nan", "set sampling.temperature=1"),
        (["sampling.n=0"], "sampling.n is 0 but must be at least 1", "set sampling.n=1"),
        (["sampling.stop=[a,'']"], "sampling.stop is ['a', '']", "set sampling.stop=[]"),
        (["sampling.max_new_tokens=0"], "sampling.max_new_tokens is 0", "set sampling.max_new_tokens=512"),
        # responses for a prompt that is not there
        (["experiment=score", "score.responses=no_prompt.jsonl"], "no_prompt.jsonl has none of the columns prompt_ids", "score.responses"),
        (["experiment=score", "score.responses=null_prompt.jsonl"], "line 1 of null_prompt.jsonl has an empty prompt", "score.responses"),
        (["experiment=score", "score.responses=no_response.jsonl"], "no_response.jsonl has none of the columns", "score.responses"),
        (["experiment=score", "score.responses=other_prompt.jsonl"], "line 2 of other_prompt.jsonl has the id '1'", "score.responses"),
        (["experiment=score", "score.responses=nowhere.jsonl"], "the file score.responses=nowhere.jsonl does not exist", "score.responses"),
        (["experiment=score", "run_dir=no-run"], "no-run has no responses to score", "set run_dir to an earlier run's folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_one_sentence(arguments, cause, mend, folder, refused_here):
    sentence = refused_here(*FAKE, *arguments, cwd=folder)
    assert cause in sentence and mend in sentence, sentence


def test_one_sentence_is_all_a_process_prints(folder):
    for arguments in (["backend=nope"], ["sampling.n=0"], ["data.path=bad.jsonl"], ["experiment=score", "run_dir=no-run"]):
        refused(*FAKE, *arguments, cwd=folder)


def test_a_traceback_when_it_is_asked_for(folder):
    for arguments in (["backend=nope"], ["sampling.n=0"]):
        done = rl_onoff(*FAKE, *arguments, cwd=folder, code=1, HYDRA_FULL_ERROR="1")
        assert "Traceback" in done.stderr


def test_help_is_not_an_error_when_the_reader_goes_away(folder):
    command = f"{' '.join(COMMAND)} --cfg job | true"
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=environment(), capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr


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
    command = ["bash", "-c", f"ulimit -f 200; exec {' '.join([*COMMAND, *few])}"]  # 200 KiB a file; the logits need 1.2 MB
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("rl-onoff: the disk that holds"), done.stderr
    assert "go on with the same run_dir" in done.stderr
    assert token_ids(tmp_path / "run") == before
    assert not list((tmp_path / "run").rglob(".part-*"))
    rl_onoff(*few, cwd=tmp_path)
    assert token_ids(tmp_path / "run") == before
