"""Prompts and responses made elsewhere."""

import json

import numpy as np
import pytest

from rl_onoff.data.rollouts import load_responses
from rl_onoff.errors import UsageError
from rl_onoff.types import LogprobKind


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
    assert caplog.messages == ["r.jsonl: 2 of 3 rows left out: their response is empty, nothing to score"]


def test_a_file_of_empty_responses_alone_is_refused(write):
    with pytest.raises(UsageError, match=r"r\.jsonl has empty responses only: .* score\.responses"):
        load_responses(write({"prompt_ids": [1], "token_ids": []}, {"prompt_ids": [2], "token_ids": []}))


def test_bad_files(write, tmp_path):
    with pytest.raises(UsageError, match=r"score\.responses=.*no\.jsonl does not exist"):
        load_responses(str(tmp_path / "no.jsonl"))
    with pytest.raises(UsageError, match=r"none of the columns prompt_ids, .* but token_ids"):
        load_responses(write({"token_ids": [1]}))
    with pytest.raises(UsageError, match=r"none of the columns token_ids, .* but prompt"):
        load_responses(write({"prompt": "a"}))
    with pytest.raises(UsageError, match="has text where token ids are wanted"):
        load_responses(write({"prompt": "a", "response": "b"}))
