"""Prompts and responses made elsewhere."""

import json
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rl_onoff.backends.fake.backend import ByteTokenizer
from rl_onoff.data.columns import COLUMNS
from rl_onoff.data.rollouts import load_responses, open_rollouts
from rl_onoff.errors import UsageError
from rl_onoff.rundir.table import RECORD, RunDir
from rl_onoff.types import LogprobKind
from tests.running import run_in


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture
def write(tmp_path):
    def write(*rows) -> str:
        (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / "r.jsonl")

    return write


def test_token_ids_need_no_tokenizer(write):
    path = write(
        {
            "request_id": "a",
            "sample": 3,
            "prompt_ids": [1, 2],
            "token_ids": [7, 8],
            "logprobs": [-1, -0.5],
            "logprob_kind": "scaled",
            "answer": 4,
            "reward": 0.5,
        },
        {"request_id": "b", "prompt_ids": [1], "token_ids": [9], "text": "nine"},
    )
    first, second = load_responses(path)
    assert first.key == ("a", 3) and first.num_tokens == 4
    assert first.prompt_ids.dtype == first.token_ids_T.dtype == np.int32
    assert first.logprobs_T.tolist() == [-1, -0.5] and first.kind is LogprobKind.scaled
    assert first.meta == {"question": "", "answer": "4"} and first.reward == 0.5
    assert second.key == ("b", 0) and second.logprobs_T is None and second.kind is None and second.text == "nine"


def test_parquet(tmp_path):
    import pandas

    pandas.DataFrame({"id": [5, 5], "prompt_ids": [[1, 2]] * 2, "token_ids": [[3], [4, 5]]}).to_parquet(
        tmp_path / "r.parquet"
    )
    assert [given.key for given in load_responses(str(tmp_path / "r.parquet"))] == [("5", 0), ("5", 1)]


def test_text_is_tokenised_once_and_equal_prompts_share_an_id(write, tokenizer):
    chat = [{"role": "user", "content": "Hi"}]
    path = write(
        {"prompt": "One two", "response": " three"},
        {"prompt": chat, "response": "Hello."},
        {"prompt": "One two", "response": " four"},
    )
    one, two, three = load_responses(path, tokenizer)
    assert [given.key for given in (one, two, three)] == [("0", 0), ("1", 0), ("0", 1)]
    assert tokenizer.decode(one.prompt_ids) == "One two" and tokenizer.decode(one.token_ids_T) == one.text == " three"
    assert tokenizer.decode(two.prompt_ids).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert two.meta["question"] == "Hi"


def test_text_of_token_ids_is_decoded_where_there_is_a_tokenizer(write, tokenizer):
    (given,) = load_responses(write({"prompt_ids": [1], "token_ids": [28120, 2]}), tokenizer)
    assert given.text == "hello"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt_ids": [], "token_ids": [3]}, "has an empty prompt"),
        ({"prompt_ids": None, "token_ids": [3]}, "has an empty prompt"),
        ({"token_ids": [3]}, "has an empty prompt"),
        ({"prompt_ids": [1]}, "has no response"),
        ({"prompt_ids": [1], "token_ids": None}, "has no response"),
        ({"prompt_ids": [1], "token_ids": [3.5]}, "token ids that are not all whole numbers"),
        ({"prompt_ids": [1], "token_ids": "text"}, "text as its response where token ids"),
        ({"prompt_ids": "text", "token_ids": [3]}, "text as its prompt where token ids"),
        (
            {"prompt_ids": [1], "token_ids": [3], "logprobs": [-1.0, -2.0], "logprob_kind": "raw"},
            "has 2 behaviour logprobs for 1 token ids",
        ),
        ({"prompt_ids": [1], "token_ids": [3], "logprobs": "x"}, "logprobs that are not a list of numbers"),
        ({"prompt_ids": [1], "token_ids": [3], "logprobs": [-1.0], "logprob_kind": "odd"}, "unknown kind 'odd'"),
        ({"prompt_ids": [1], "token_ids": [3], "sample": "x"}, "'x' as its sample"),
        ({"prompt_ids": [1], "token_ids": [3], "sample": 1.5}, "1.5 as its sample"),
        ({"prompt_ids": [1], "token_ids": [3], "sample": -1}, "-1 as its sample"),
        ({"prompt_ids": [1], "token_ids": [3], "sample": True}, "True as its sample"),
        ({"prompt_ids": [1], "token_ids": [True]}, "token ids that are not a list of numbers"),
        ({"prompt_ids": [1], "token_ids": [4, -1]}, "a negative token id in its response"),
        ({"prompt_ids": [1], "token_ids": [2**31]}, "token ids that are not all whole numbers below 2"),
        ({"prompt_ids": [1], "token_ids": [10**400]}, "token ids that are not a list of numbers"),
        ({"prompt_ids": [2**31], "token_ids": [3]}, "the token id 2147483648 in its prompt"),
        ({"prompt_ids": [1], "token_ids": [3], "logprobs": ["-1.0"]}, "logprobs that are not a list of numbers"),
        ({"prompt_ids": [1], "token_ids": [3], "logprobs": [True]}, "logprobs that are not a list of numbers"),
        ({"prompt_ids": [1, 2], "token_ids": [3], "id": "fine"}, "the id 'fine' of a row with another prompt"),
        (
            {"prompt_ids": [1], "token_ids": [3], "id": "fine", "sample": 0},
            "the id 'fine' and sample 0 of an earlier row",
        ),
    ],
)
def test_bad_rows_are_named_by_their_line(write, row, words):
    path = write({"id": "fine", "prompt_ids": [1], "token_ids": [2]}, row)
    with pytest.raises(UsageError, match=words) as caught:
        load_responses(path)
    assert str(caught.value).startswith("line 2 of r.jsonl") and "score.responses" in str(caught.value)


@pytest.mark.parametrize("kind", ["ids", "text"])
def test_rows_with_an_empty_response_are_left_out_with_one_warning(write, caplog, tokenizer, kind):
    prompt, response, empty, full = (
        ("prompt_ids", "token_ids", [], [2]) if kind == "ids" else ("prompt", "response", "", "b")
    )
    row = {prompt: [1] if kind == "ids" else "a", "logprob_kind": "raw"}
    path = write({**row, response: empty, "logprobs": []}, {**row, response: full}, {**row, response: empty})
    (given,) = load_responses(path, None if kind == "ids" else tokenizer)
    assert given.key == ("0", 1), "the sample's number is its place among the rows of its prompt, empty ones included"
    assert caplog.messages == ["r.jsonl: 2 of 3 rows left out, whose response is empty"]


def test_a_file_of_empty_responses_alone_is_refused(write):
    with pytest.raises(UsageError, match=r"r\.jsonl has empty responses only: .* score\.responses"):
        load_responses(write({"prompt_ids": [1], "token_ids": []}, {"prompt_ids": [2], "token_ids": []}))


def test_whole_numbers_may_be_written_as_floats(write):
    (given,) = load_responses(write({"prompt_ids": [1], "token_ids": [4.0, 7], "sample": 2.0, "id": 3.0}))
    assert given.key == ("3", 2) and given.token_ids_T.tolist() == [4, 7] and given.token_ids_T.dtype == np.int32


def test_the_layouts_of_trainers_can_be_scored_too(write):
    verl = {
        "uid": "a",
        "prompts": [0, 0, 7],
        "responses": [4, 5, 0],
        "response_mask": [1, 1, 0],
        "attention_mask": [0, 0, 1, 1, 1, 0],
        "rollout_log_probs": [-1.0, -2.0, 0.0],
    }
    (given,) = load_responses(write(verl))
    assert (given.key, given.prompt_ids.tolist(), given.token_ids_T.tolist()) == (("a", 0), [7], [4, 5])
    assert given.logprobs_T.tolist() == [-1, -2] and given.mask_T is None
    slime = {"prompt": "text", "tokens": [7, 8, 65, 66], "response": "AB", "response_length": 2, "loss_mask": [1, 1]}
    (given,) = load_responses(write(slime), ByteTokenizer())
    assert (given.prompt_ids.tolist(), given.token_ids_T.tolist(), given.text) == ([7, 8], [65, 66], "AB")
    packed = {"prompt_ids": [7, 8], "input_ids": [7, 8, 4, 5], "loss_mask": [False, False, True, True]}
    (given,) = load_responses(write(packed))
    assert (given.prompt_ids.tolist(), given.token_ids_T.tolist()) == ([7, 8], [4, 5])
    with pytest.raises(UsageError, match=r"line 1 of .* has neither response_length nor a mask to say where"):
        load_responses(write({"prompt_ids": [7, 8], "input_ids": [7, 8, 4, 5]}))


@pytest.mark.parametrize("nothing", [None, float("nan")])
def test_a_logprob_that_is_missing_stays_so_for_the_checks(write, nothing):
    (given,) = load_responses(write({"prompt_ids": [1], "token_ids": [3, 4], "logprobs": [-1.0, nothing]}))
    np.testing.assert_array_equal(given.logprobs_T, [-1, np.nan])


def test_tokens_that_a_mask_leaves_out_stay_as_context(write, caplog):
    caplog.set_level("INFO")
    row = {"prompt_ids": [1], "token_ids": [4, 5, 6, 7, 0], "completion_mask": [1, 0, 1, 1, 0], "id": "a"}
    (given,) = load_responses(write(row))
    assert given.token_ids_T.tolist() == [4, 5, 6, 7] and given.mask_T.tolist() == [True, False, True, True]
    assert "1 response, 4 tokens, 1 of them masked" in caplog.text
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_the_content_of_the_file_counts_and_not_its_time(tmp_path, write):
    def score() -> RunDir:
        return run_in(tmp_path / "run", "experiment=score", "backend=fake", "model.name=x", f"score.responses={path}")

    row = {"id": "a", "prompt_ids": [1], "token_ids": [7, 8], "logprobs": [-1.0, -2.0], "logprob_kind": "raw"}
    path = write(row)
    run = score()
    os.utime(path, (1, 1))
    score()
    for change in ({"token_ids": [7, 9]}, {"logprobs": [-1.0, -3.0]}):
        write({**row, **change})
        with pytest.raises(UsageError, match=r"run/completions holds rows of another config \(content: "):
            score()
    assert [row["token_ids"].tolist() for row in run.completions.rows()] == [[7, 8]]

    record = run.completions.record()  # of a version that kept no content
    del record["config"]["content"]
    (run.completions.path / RECORD).write_text(json.dumps(record))
    write({**row, "token_ids": [7, 9]})
    with pytest.raises(UsageError, match="holds other token ids of response 0 to 'a' than the file gives now"):
        score()


def test_another_system_message_is_not_taken_for_the_one_before(tmp_path, write):
    path = write({"prompt": [{"role": "user", "content": "a"}], "response": "b"})
    command = ("experiment=score", "backend=fake", "model.name=x", f"score.responses={path}")
    run_in(tmp_path / "run", *command)
    with pytest.raises(UsageError, match="holds other token ids of response 0 to '0'"):
        run_in(tmp_path / "run", *command, "data.system=short")


def test_a_filled_column_is_taken_before_an_empty_one(write, tokenizer):
    path = write({"prompt_ids": [1], "prompt": None, "response": None, "token_ids": None, "response_ids": [2]})
    (given,) = load_responses(path)
    assert given.token_ids_T.tolist() == [2]
    with pytest.raises(UsageError, match=r"line 1 of r\.jsonl has an empty prompt"):
        load_responses(write({"prompt": None, "response": "an answer to nothing"}), tokenizer)
    with pytest.raises(UsageError, match=r"line 1 of r\.jsonl has no response"):
        load_responses(write({"prompt_ids": [1], "response": None}), tokenizer)


def test_bad_files(write, tmp_path):
    with pytest.raises(UsageError, match=r"score\.responses=.*no\.jsonl does not exist"):
        load_responses(str(tmp_path / "no.jsonl"))
    with pytest.raises(UsageError, match=r"none of the columns prompt_ids, .* but token_ids"):
        load_responses(write({"token_ids": [1]}))
    with pytest.raises(UsageError, match=r"none of the columns token_ids, .* but prompt"):
        load_responses(write({"prompt": "a"}))
    with pytest.raises(UsageError, match="has text as its response where token ids are wanted"):
        load_responses(write({"prompt": "a", "response": "b"}))


NAMES = sorted(
    {name for names in COLUMNS.values() for name in names}
    | {"attention_mask", "response_length", "logprob_kind", "answer"}
)
NUMBERS = st.one_of(
    st.integers(-3, 9), st.integers(), st.floats(), st.floats(-9, 0), st.sampled_from([10**400, 2**31, True])
)
VALUES = st.one_of(
    st.none(),
    NUMBERS,
    st.text(max_size=3),
    st.lists(st.integers(0, 9), max_size=4),
    st.lists(NUMBERS, max_size=4),
    st.lists(st.floats(-9, 0), max_size=4),
    st.lists(st.dictionaries(st.sampled_from(["role", "content"]), st.text(max_size=2)), max_size=2),
    st.sampled_from(["raw", "scaled", {"target": 1.5}, {}]),
)
ROWS = st.lists(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=8), min_size=1, max_size=3)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=ROWS,
    base=st.sampled_from(
        [
            {},
            {"prompt_ids": [1], "token_ids": [2, 3]},
            {"token_ids": [2, 3], "logprobs": [-1, -2], "loss_mask": [1, 0]},
            {"tokens": [1, 2, 3], "prompt_ids": [1], "response_length": 2, "logprobs": [-1, -2]},
        ]
    ),
)
def test_any_row_is_an_answer_or_one_sentence(write, rows, base):
    path = write(*({**base, **row} for row in rows))
    for read in (
        lambda: load_responses(path),
        lambda: [row.rollout for row in open_rollouts(path, key="compare.behaviour", columns={}).rows()],
    ):
        try:
            found = read()
        except UsageError as error:
            assert len(str(error).splitlines()) == 1
            continue
        for rollout in found:
            assert rollout.token_ids_T.dtype == np.int32 and (rollout.token_ids_T >= 0).all()
            if rollout.logprobs_T is not None:
                assert len(rollout.logprobs_T) == len(rollout.token_ids_T)
                mask_T = np.ones(len(rollout.token_ids_T), bool) if rollout.mask_T is None else rollout.mask_T
                assert not np.isnan(rollout.logprobs_T[mask_T]).any()
