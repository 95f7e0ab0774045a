"""Every layout a data file may have, and every way it may be wrong."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rl_onoff.config import DataConfig, Format
from rl_onoff.data.prompts import PROBLEMS, load_rows
from rl_onoff.errors import UsageError

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def write_lines(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_parquet(path: Path, rows: list[dict]) -> str:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def verl_row(index: int, question: str, ground_truth: object) -> dict:
    return {
        "data_source": "made/here",
        "prompt": [{"role": "user", "content": question}],
        "ability": "math",
        "reward_model": {"ground_truth": ground_truth, "style": "rule"},
        "extra_info": {"index": index, "split": "test"},
    }


def refusal(*args, **kwargs) -> str:
    with pytest.raises(UsageError) as caught:
        load_rows(DataConfig(*args, **kwargs))
    message = str(caught.value)
    assert "\n" not in message
    return message


# Layouts


def test_the_bundled_problems_are_many_different_and_numeric():
    rows = load_rows(DataConfig())
    assert len(rows) >= 120
    assert len({row.prompt for row in rows}) == len(rows)
    assert all(float(row.meta["answer"]) >= 0 and row.meta["level"] in (1, 2, 3) for row in rows)
    topics = Counter(row.meta["topic"] for row in load_rows(DataConfig(groups=["topic", "level"])))
    assert len(topics) >= 8 and min(topics.values()) >= 5
    assert PROBLEMS.name == "problems.jsonl"


def test_jsonl_with_default_columns(tmp_path):
    path = write_lines(
        tmp_path / "a.jsonl",
        {"id": 7, "question": "1+1?", "answer": 2, "level": 3},
        {"id": "b", "question": "2+2?", "answer": 4.5, "level": 1},
    )
    first, second = load_rows(DataConfig(path=path))
    assert (first.id, first.prompt, first.meta) == ("7", "1+1?", {"question": "1+1?", "answer": "2", "level": 3})
    assert (second.id, second.meta["answer"], second.where) == ("b", "4.5", "line 2 of a.jsonl")


def test_jsonl_blank_lines_and_a_byte_order_mark(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('\ufeff{"prompt": "é"}\n\n{"prompt": "b"}\n'.encode())
    rows = load_rows(DataConfig(path=str(tmp_path / "a.jsonl")))
    assert [(row.id, row.prompt, row.where) for row in rows] == [
        ("0", "é", "line 1 of a.jsonl"),
        ("1", "b", "line 3 of a.jsonl"),
    ]
    assert "answer" not in rows[0].meta


def test_csv_with_line_breaks_in_a_field_and_named_columns(tmp_path):
    (tmp_path / "a.csv").write_text('key,ask,want,kind\n007,"one,\ntwo",3,x\n008,four,,y\n')
    rows = load_rows(DataConfig(path=str(tmp_path / "a.csv"), prompt="ask", answer="want", id="key", groups=["kind"]))
    assert [row.id for row in rows] == ["007", "008"]
    assert rows[0].meta == {"question": "one,\ntwo", "answer": "3", "kind": "x"}
    assert rows[1].meta == {"question": "four", "kind": "y"}


def test_a_very_long_csv_field(tmp_path):
    (tmp_path / "a.csv").write_text("prompt\n" + "word " * 60_000 + "\n")
    assert len(load_rows(DataConfig(path=str(tmp_path / "a.csv")))[0].prompt) == 300_000


def test_plain_parquet(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [{"problem": "p", "answer": 3, "subject": "s", "score": 1.0}])
    (row,) = load_rows(DataConfig(path=path, groups=["subject", "score"]))
    assert row.meta == {"question": "p", "answer": "3", "subject": "s", "score": 1.0} and row.id == "0"


def test_verl_layout_with_both_kinds_of_ground_truth(tmp_path):
    plain = write_parquet(tmp_path / "a.parquet", [verl_row(4, "q?", "17"), verl_row(9, "r?", "18")])
    (first, second) = load_rows(DataConfig(path=plain))
    assert (first.id, second.id, first.prompt) == ("4", "9", [{"role": "user", "content": "q?"}])
    assert first.meta == {"question": "q?", "answer": "17", "data_source": "made/here"}
    target = write_parquet(tmp_path / "b.parquet", [verl_row(0, "q?", {"question": "q?", "target": "70"})])
    assert load_rows(DataConfig(path=target))[0].meta["answer"] == "70"


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data beside this checkout")
@pytest.mark.parametrize(
    ("name", "num_rows", "last_id"), [("math500", 500, "499"), ("aime2025", 30, "29"), ("amc23", 40, "49")]
)
def test_real_verl_files(name, num_rows, last_id):
    rows = load_rows(DataConfig(path=str(SHARED / f"{name}.parquet")))
    assert len(rows) == num_rows and rows[-1].id == last_id
    assert all(row.meta["answer"] and row.meta["question"] and row.meta["data_source"] for row in rows)


def test_fields_of_columns(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [verl_row(4, "q?", "17")])
    (row,) = load_rows(DataConfig(path=path, answer="extra_info.index", id="reward_model.style"))
    assert (row.id, row.meta["answer"]) == ("rule", "4")


def test_prompts_as_token_ids(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"prompt_ids": [5, 6], "prompt": "hi", "answer": "1"})
    (row,) = load_rows(DataConfig(path=path))
    assert row.prompt == [5, 6] and row.meta == {"question": "hi", "answer": "1"}


def test_a_saved_datasets_folder_with_and_without_splits(tmp_path):
    import datasets

    plain = datasets.Dataset.from_list([{"question": "a?", "answer": "1"}, {"question": "b?", "answer": "2"}])
    plain.save_to_disk(str(tmp_path / "plain"))
    datasets.DatasetDict({"test": plain}).save_to_disk(str(tmp_path / "splits"))
    assert [row.prompt for row in load_rows(DataConfig(path=str(tmp_path / "plain"), limit=1))] == ["a?"]
    rows = load_rows(DataConfig(path=str(tmp_path / "splits"), split="test", format=Format.datasets))
    assert [row.meta["answer"] for row in rows] == ["1", "2"]
    assert "no split 'train' but test: set data.split" in refusal(path=str(tmp_path / "splits"))


def test_the_limit_is_taken_after_shuffling_and_ids_stay(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", *({"prompt": f"p{i}"} for i in range(50)))

    def ids(**more) -> list[str]:
        rows = load_rows(DataConfig(path=path, **more))
        assert all(row.prompt == f"p{row.id}" for row in rows)
        return [row.id for row in rows]

    assert ids(limit=3) == ["0", "1", "2"]
    shuffled = ids(shuffle=True, seed=1)
    assert sorted(shuffled, key=int) == ids() and shuffled != ids()
    assert ids(shuffle=True, seed=1, limit=5) == shuffled[:5]
    assert ids(shuffle=True, seed=2) != shuffled
    assert len(ids(limit=500)) == 50


# Bad input


def test_a_missing_file(tmp_path):
    for name in ("no.jsonl", "no.csv", "no.parquet", "no.txt", "folder/no.jsonl"):
        message = refusal(path=str(tmp_path / name))
        assert "does not exist" in message and "data.path" in message
    assert "does not exist" in refusal(path="data/no.txt")


def test_a_folder_that_is_no_dataset(tmp_path):
    assert "a folder written by save_to_disk" in refusal(path=str(tmp_path))


def test_an_unknown_ending_unless_the_format_is_given(tmp_path):
    path = write_lines(tmp_path / "a.txt", {"prompt": "p"})
    assert "none of .jsonl, .csv, .parquet" in refusal(path=path) and "data.format=jsonl" in refusal(path=path)
    assert len(load_rows(DataConfig(path=path, format=Format.jsonl))) == 1


def test_bad_json_is_named_by_its_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n\n{"prompt": \n')
    assert "line 3 of a.jsonl is not valid JSON" in refusal(path=str(tmp_path / "a.jsonl"))
    (tmp_path / "b.jsonl").write_text('{"prompt": "a"}\n["no object"]\n')
    assert "line 2 of b.jsonl is not valid JSON (a list where every line is an object" in refusal(
        path=str(tmp_path / "b.jsonl")
    )
    (tmp_path / "c.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    assert "line 1 of c.jsonl is not valid JSON" in refusal(path=str(tmp_path / "c.jsonl"))


def test_bad_csv_and_bad_parquet(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,answer\na,1\nb,2,3\n")
    assert "line 3 of a.csv is not valid CSV (3 fields where the first line has 2)" in refusal(
        path=str(tmp_path / "a.csv")
    )
    (tmp_path / "b.csv").write_text('prompt,answer\n"a,1\n')
    assert "line 2 of b.csv is not valid CSV" in refusal(path=str(tmp_path / "b.csv"))
    (tmp_path / "a.parquet").write_text("no parquet at all")
    assert "row 1 of a.parquet is not valid Parquet" in refusal(path=str(tmp_path / "a.parquet"))


def test_no_such_column_lists_those_there_are(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"text": "a", "label": 1})
    assert "no column for the prompt but text, label: set data.prompt" in refusal(path=path)
    for key in ("prompt", "answer", "id"):
        more = {"prompt": "text", key: "nope"}
        assert f"no column 'nope' but text, label: set data.{key}" in refusal(path=path, **more)
    assert "set data.groups" in refusal(path=path, prompt="text", groups=["nope"])


def test_empty_files(tmp_path):
    for name in ("a.jsonl", "a.csv"):
        (tmp_path / name).write_text("")
        assert f"{name} has no rows: set data.path" in refusal(path=str(tmp_path / name))


@pytest.mark.parametrize(
    "prompt", [5, True, {"a": 1}, [1, "a"], [{"role": "user"}], [{"role": "user", "content": 3}], [True]]
)
def test_prompts_of_a_wrong_type(tmp_path, prompt):
    path = write_lines(tmp_path / "a.jsonl", {"prompt": "fine"}, {"prompt": prompt})
    message = refusal(path=path)
    assert message.startswith("line 2 of a.jsonl has ") and "data.prompt" in message


@pytest.mark.parametrize("prompt", ["", "  \n", None, [], [{"role": "user", "content": " "}]])
def test_empty_prompts(tmp_path, prompt):
    path = write_lines(tmp_path / "a.jsonl", {"prompt": "fine"}, {"prompt": prompt})
    assert "line 2 of a.jsonl has an empty prompt" in refusal(path=path)


def test_other_wrong_values(tmp_path):
    def message(**row) -> str:
        return refusal(path=write_lines(tmp_path / "a.jsonl", {"prompt": "p", **row}))

    assert "an object as its reference answer" in message(answer={"value": 3})
    assert "a list as its reference answer" in message(answer=[1])
    for number in (float("inf"), float("-inf")):  # 1e999 in JSON
        assert "line 1 of a.jsonl has infinity as its reference answer" in message(answer=number)
        assert "infinity as its reference answer" in message(answer={"target": number})
    assert "the token id 2147483648 in its prompt, which no model has" in message(prompt=[2**31])
    assert "as its id in column id" in message(id=None) and "as its id in column id" in message(id=1.5)
    assert "the token id -1 in its prompt, which no model has" in message(prompt=[-1, 4])
    assert "ends with the assistant's turn" in message(
        prompt=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    )


def test_numbers_as_answers_and_groups(tmp_path):
    path = write_lines(
        tmp_path / "a.jsonl", {"prompt": "p", "answer": 10**400, "level": float("inf")}, {"prompt": "q", "level": 1.5}
    )
    first, second = load_rows(DataConfig(path=path))
    assert first.meta == {"question": "p", "answer": str(10**400), "level": None}
    assert second.meta == {"question": "q", "level": 1.5}


VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=3),
        st.sampled_from([10**400, 1e999, -1, "text", "image", "assistant"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["role", "content", "type", "text", "tool_calls", "target", "index"]), inner),
    ),
    max_leaves=6,
)
NAMES = [
    "id",
    "prompt",
    "prompt_ids",
    "messages",
    "tools",
    "images",
    "answer",
    "reward_model",
    "extra_info",
    "level",
    "subject",
]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.dictionaries(st.sampled_from(NAMES), VALUES), min_size=1, max_size=3))
def test_any_row_is_a_prompt_or_one_sentence(tmp_path, rows):
    path = write_lines(tmp_path / "a.jsonl", *rows)
    try:
        found = load_rows(DataConfig(path=path))
    except UsageError as error:
        assert len(str(error).splitlines()) == 1
        return
    assert len({row.id for row in found}) == len(rows)
    for row in found:
        assert row.prompt
        json.dumps(dict(row.meta), allow_nan=False)


def test_repeated_ids_and_the_way_out(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"id": 1, "prompt": "a"}, {"id": "1", "prompt": "b"})
    assert "line 2 of a.jsonl and line 1 of a.jsonl share the id '1'" in refusal(path=path)
    assert [row.id for row in load_rows(DataConfig(path=path, id="row_number"))] == ["0", "1"]


def test_a_datasets_id_that_cannot_be_reached():
    script = (
        "from rl_onoff.data.prompts import load_rows; from rl_onoff.config import DataConfig\n"
        "from rl_onoff.errors import UsageError\n"
        "try: load_rows(DataConfig(path='rl-onoff/no-such-dataset:main'))\n"
        "except UsageError as error: print(error)"
    )
    import os

    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        cwd=PROBLEMS.parents[2],
    )
    assert done.stdout.startswith(
        "data.path=rl-onoff/no-such-dataset is not in the local cache and the hub cannot be reached"
    ), done.stderr


def test_importing_these_modules_brings_nothing_heavy():
    script = (
        "import sys, rl_onoff.models.resolve, rl_onoff.data.prompts, rl_onoff.data.rollouts, rl_onoff.rewards\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pandas', 'pyarrow', 'math_verify', 'sympy', 'jinja2'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=PROBLEMS.parents[2])
    assert done.stdout.strip() == "[]", done.stderr
