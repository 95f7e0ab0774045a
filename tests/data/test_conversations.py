"""Conversations with tool calls, reasoning and content parts: the chat template gets them as the data has them."""

import json
import logging
from dataclasses import asdict
from pathlib import Path

import pytest

from rl_onoff.config import DataConfig
from rl_onoff.data.prompts import load_rows
from rl_onoff.data.requests import encode_rows
from rl_onoff.data.rollouts import load_responses
from rl_onoff.errors import UsageError
from tests.running import config_of, run_in

CALL = {"type": "function", "id": "call_1", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
CHAT = [
    {"role": "user", "name": "Ann", "content": [{"type": "text", "text": "Warm"}, {"type": "text", "text": " today?"}]},
    {"role": "assistant", "content": None, "reasoning_content": "Ask the tool.", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "name": "weather", "content": "21 degrees"},
]
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}}}
]
EVERYTHING = (
    "{% if tools is defined and tools is not none %}<tools>{{ tools | tojson }}{% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %}<no_think>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m | tojson }}"
    "{% if 'tool_calls' in m %}{{ m.tool_calls | length }} calls{% endif %}{% endfor %}"
    "{% for d in documents or [] %}<doc>{{ d.text }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(smollm2)
    found.chat_template = EVERYTHING
    return found


@pytest.fixture
def data(tmp_path):
    def made(*rows: object, **options) -> DataConfig:
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return DataConfig(path=str(path), **options)

    return made


def check(config: DataConfig, tokenizer, messages: list, **options) -> None:
    """The one row's prompt is the template's output for `messages` and `options`, byte for byte and id for id."""
    (prompt,) = encode_rows(load_rows(config), config, tokenizer)
    assert prompt.text == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    assert prompt.ids.tolist() == tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False, **options
    )


@pytest.mark.parametrize("column", ["prompt", "messages"])
def test_every_field_reaches_the_template(data, tokenizer, column):
    config = data({column: CHAT})
    check(config, tokenizer, CHAT)
    (prompt,) = encode_rows(load_rows(config), config, tokenizer)
    for word in ("Ann", "Ask the tool.", "call_1", '"Paris"', "tool_call_id", "1 calls"):
        assert word in prompt.text
    assert prompt.meta["question"] == "Warm today?"


def test_a_real_template_gets_content_parts_as_they_are(data, smollm2):
    from transformers import AutoTokenizer

    real = AutoTokenizer.from_pretrained(smollm2)
    chat = [{"role": "user", "content": "Hi", "name": "Ann"}, {"role": "tool", "content": "21", "tool_call_id": "1"}]
    check(data({"prompt": chat}), real, chat)
    with pytest.raises(UsageError, match=r"refuses the roles user, assistant, tool of line 1 of a\.jsonl \(.+\): fix"):
        config = data({"prompt": CHAT})
        encode_rows(load_rows(config), config, real)


def test_parquet_adds_no_fields_that_a_message_lacks(tmp_path, tokenizer):
    import pyarrow
    import pyarrow.parquet

    words = {"content": {"type": "string"}, "role": {"type": "string", "description": "whose"}}
    second = {"type": "function", "function": {"name": "say", "parameters": {"properties": words}}}
    call = {"type": "function", "function": {"name": "say", "arguments": {"content": "Hi"}}}
    other = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "tool_calls": [call]}, CHAT[2]]
    rows = [
        {"prompt": [{**CHAT[0], "content": "Warm?"}, *CHAT[1:]], "tools": TOOLS},
        {"prompt": other, "tools": [second]},
    ]
    config = DataConfig(path=str(tmp_path / "a.parquet"))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), config.path)
    assert pyarrow.parquet.read_table(config.path).to_pylist() != rows
    found = load_rows(config)
    assert [{"prompt": row.prompt, "tools": row.tools} for row in found] == rows
    one = {**asdict(config), "limit": 1}
    check(DataConfig(**one), tokenizer, found[0].prompt, tools=TOOLS)  # Arrow has fields in another order


def test_template_kwargs_and_a_rows_tools(data, tokenizer):
    row, given = {"prompt": CHAT, "tools": TOOLS}, [{"type": "function", "function": {"name": "other"}}]
    check(data(row), tokenizer, CHAT, tools=TOOLS)
    check(data({**row, "tools": json.dumps(TOOLS)}), tokenizer, CHAT, tools=TOOLS)
    check(data({**row, "tools": []}), tokenizer, CHAT)
    check(data(row, template_kwargs={"tools": given}), tokenizer, CHAT, tools=given)
    check(data(row, template_kwargs={"tools": []}), tokenizer, CHAT)
    kwargs = {"enable_thinking": False, "documents": [{"title": "t", "text": "a document"}]}
    check(data(row, template_kwargs=kwargs), tokenizer, CHAT, tools=TOOLS, **kwargs)
    text = [{"role": "user", "content": "Hi"}]
    check(data({"prompt": "Hi"}, template_kwargs=kwargs), tokenizer, text, **kwargs)
    system = [{"role": "system", "content": "Be brief."}, *text]
    check(data({"prompt": text}, template_kwargs=kwargs, system="Be brief."), tokenizer, system, **kwargs)
    ids = data({"prompt_ids": [5, 6], "tools": TOOLS}, template_kwargs=kwargs)
    assert encode_rows(load_rows(ids), ids, tokenizer)[0].ids.tolist() == [5, 6]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"enable_thinkin": False}, "chat template reads no enable_thinkin: leave data.template_kwargs.enable_thinkin"),
        ({"tokenize": True}, "chat template reads no tokenize"),
        ({"add_generation_prompt": False}, "data.template_kwargs.add_generation_prompt is set by rl_onoff itself"),
        ({"messages": []}, "data.template_kwargs.messages is set by rl_onoff itself"),
        ({"enable_thinking": None}, "data.template_kwargs.enable_thinking is null: leave it out"),
        ({"documents": 5}, "refuses the roles user of line 1 of a.jsonl"),
    ],
)
def test_template_kwargs_that_would_do_nothing_or_harm(data, tokenizer, kwargs, message):
    config = data({"prompt": "Hi"}, template_kwargs=kwargs)
    with pytest.raises(UsageError, match=message.replace(".", r"\.")):
        encode_rows(load_rows(config), config, tokenizer)


def test_tools_that_are_none_or_that_nothing_reads(data, smollm2, caplog):
    from transformers import AutoTokenizer

    with pytest.raises(
        UsageError, match=r"line 1 of a\.jsonl has text as its tools .*set \+data\.template_kwargs\.tools=\[\]"
    ):
        load_rows(data({"prompt": "Hi", "tools": "a hammer"}))
    assert load_rows(data({"prompt": "Hi", "tools": "a hammer"}, template_kwargs={"tools": []}))[0].tools is None
    real, config = AutoTokenizer.from_pretrained(smollm2), data({"prompt": "Hi", "tools": TOOLS})
    with caplog.at_level(logging.WARNING):
        check(config, real, [{"role": "user", "content": "Hi"}], tools=TOOLS)
    assert "reads no tools: those of 1 row are in no prompt" in caplog.text


@pytest.mark.parametrize(
    "row",
    [
        *({"prompt": [{"role": "user", "content": [{"type": "text", "text": "?"}, {"type": kind, kind: "x"}]}]}
          for kind in ("image", "image_url", "input_image")),
        {"prompt": [{"role": "user", "content": [{"type": "image"}]}]},
        {"prompt": "What is it?", "images": ["a.png"]}, {"prompt": "What is it?", "image": {"bytes": "x"}},
    ],
)  # fmt: skip
def test_images_are_refused(data, row):
    with pytest.raises(UsageError, match=r"^line 2 of a\.jsonl .*holds images .*text alone: remove the row"):
        load_rows(data({"prompt": "Hi", "images": []}, row))


def rollouts(path: Path, *rows: dict) -> str:
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rendered(tokenizer, messages: list, **options) -> list[int]:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **options)


@pytest.mark.parametrize(
    ("column", "answer"),
    [("response", "21."), ("completion", [{"role": "assistant", "content": "21."}])],  # a table's row; TRL's data set
)
def test_a_trainers_row_gives_its_tools_to_the_template(tmp_path, tokenizer, column, answer):
    row = {"prompt": CHAT, column: answer}
    for name, told in (("list", TOOLS), ("json", json.dumps(TOOLS))):
        path = rollouts(tmp_path / f"{name}.jsonl", {**row, "tools": told}, row)
        with_tools, without = load_responses(path, tokenizer)
        assert with_tools.prompt_ids.tolist() == rendered(tokenizer, CHAT, tools=TOOLS)
        assert without.prompt_ids.tolist() == rendered(tokenizer, CHAT)
        assert load_responses(path, tokenizer, tools=False).kept[0].prompt_ids.tolist() == without.prompt_ids.tolist()
    with pytest.raises(UsageError, match=r"line 1 of x\.jsonl has text as its tools .*template_kwargs\.tools=\[\]"):
        load_responses(rollouts(tmp_path / "x.jsonl", {**row, "tools": "a hammer"}), tokenizer)


def test_options_come_before_a_trainers_tools(tmp_path):
    path = rollouts(tmp_path / "a.jsonl", {"prompt": CHAT, "response": "21.", "tools": TOOLS})
    command = ("experiment=score", "backend=fake", "model.name=x", f"score.responses={path}")
    for name, options, start in (
        ("own", (), f"tools: {TOOLS}\n"), ("none", ("+data.template_kwargs.tools=[]",), "user: "),
        ("other", ("+data.template_kwargs.tools=[{a: b}]",), "tools: [{'a': 'b'}]\n"),
    ):  # fmt: skip
        (row,) = run_in(tmp_path / name, *command, *options).completions.rows()
        assert row["prompt"].startswith(start)


def test_a_trainers_tools_that_nothing_reads_are_said_once(tmp_path, smollm2, caplog):
    from transformers import AutoTokenizer

    row = {"prompt": [{"role": "user", "content": "Hi"}], "response": "21.", "tools": TOOLS}
    load_responses(rollouts(tmp_path / "a.jsonl", row, row), AutoTokenizer.from_pretrained(smollm2))
    assert caplog.text.count("reads no tools: those of the file's rows are in no prompt") == 1


def test_a_trainers_parquet_adds_no_fields_that_a_message_lacks(tmp_path, tokenizer):
    other = [{"role": "user", "content": "x", "name": "Bo"}, {"role": "tool", "content": "y", "tool_call_id": "1"}]
    calls = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    rows = [{"prompt": messages, "response": "21."} for messages in (calls, other)]
    for rollout, messages in zip(load_responses(rollouts(tmp_path / "a.parquet", *rows), tokenizer),
                                 (calls, other), strict=True):  # fmt: skip
        assert "null" not in tokenizer.decode(rollout.prompt_ids[-20:])
        text = tokenizer.decode(rollout.prompt_ids)
        assert ("name" in text, "1 calls" in text) == (True, messages is calls)
        assert text.count("null") == (1 if messages is calls else 0), "content: null is the message's own"


ASKED = [{"role": "user", "content": "Hi"}]
SHOWN = [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]
REPLY = [{"role": "assistant", "content": "21."}]


@pytest.mark.parametrize(
    ("row", "image"),
    [
        ({"prompt": "Hi", "response": "21."}, {"images": ["a.png"]}),
        ({"prompt": ASKED, "response": "21."}, {"prompt": SHOWN}),
        ({"prompt_ids": [1], "token_ids": [34]}, {"image": {"bytes": "x"}}),
        ({"prompt_ids": [1], "prompt": ASKED, "response": "21."}, {"prompt": SHOWN}),
        ({"prompt": ASKED, "completion": REPLY}, {"prompt": SHOWN}),  # TRL's data set
        ({"prompt": ASKED, "completion": REPLY}, {"images": ["a.png"]}),
    ],
)
def test_images_in_a_trainers_file_are_refused(tmp_path, tokenizer, row, image):
    path = rollouts(tmp_path / "a.jsonl", {**row, "images": [], "image": None}, {**row, **image})
    words = r"^line 2 of a\.jsonl .*holds images .*text alone: remove the row,? or set score\.responses to another file"
    with pytest.raises(UsageError, match=words):
        load_responses(path, tokenizer)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None}, {"role": "user", "name": "Ann"}, {"role": "user", "content": ["Hi"]},
        {"role": "user", "content": [{"text": "Hi"}]}, {"role": "user", "content": [{"type": "text", "text": 3}]},
    ],
)  # fmt: skip
def test_messages_that_are_none(data, message):
    with pytest.raises(UsageError, match=r"line 1 of a\.jsonl has a list as its prompt where text, a list of chat"):
        load_rows(data({"prompt": [message, {"role": "user", "content": "Hi"}]}))


def test_layouts_of_trl(data, tokenizer, caplog):
    asked, answer = [{"role": "user", "content": "Hi"}], [{"role": "assistant", "content": "Hello"}]
    check(data({"prompt": asked, "completion": answer}), tokenizer, asked)
    check(data({"prompt": asked, "chosen": answer, "rejected": answer}), tokenizer, asked)
    with caplog.at_level(logging.WARNING):
        check(data({"messages": asked + answer}), tokenizer, asked)
    assert "a.jsonl: the assistant's last turn is left out of the prompts of 1 row" in caplog.text
    with pytest.raises(UsageError, match="ends with the assistant's turn"):
        load_rows(data({"messages": answer}))


def test_a_run_gives_the_template_what_the_row_and_the_options_hold(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": CHAT, "tools": TOOLS}) + "\n")
    command = ("experiment=generate", "backend=fake", "model.name=x", f"data.path={path}", "sampling.max_new_tokens=4")
    thinks = "+data.template_kwargs.enable_thinking=false"
    run = run_in(tmp_path / "run", *command, thinks)
    (row,) = run.completions.rows()
    assert (
        row["prompt"].startswith(f"tools: {TOOLS}\nthink: False\nuser: ") and f"None {CALL}\ntool: 21" in row["prompt"]
    )
    assert bytes(row["prompt_ids"].tolist()).decode() == row["prompt"]
    run_in(tmp_path / "run", *command, "+data.template_kwargs={enable_thinking:false}")
    for changed in ((), ("+data.template_kwargs.enable_thinking=true",)):
        with pytest.raises(UsageError, match=r"another config \(data\.template_kwargs\.enable_thinking: false -> "):
            run_in(tmp_path / "run", *command, *changed)
    plain = run_in(tmp_path / "plain", *command)
    forget_template_kwargs(plain.completions.path)
    run_in(tmp_path / "plain", *command)
    forget_template_kwargs(plain.completions.path)
    with pytest.raises(UsageError, match=r"template_kwargs\.enable_thinking: null -> false"):
        run_in(tmp_path / "plain", *command, thinks)


def forget_template_kwargs(table: Path) -> None:
    """Make the record one of a version that did not have the option."""
    from rl_onoff.rundir.table import RECORD

    record = json.loads((table / RECORD).read_text())
    assert record["config"]["data"].pop("template_kwargs") == {}
    (table / RECORD).write_text(json.dumps(record))


def test_text_prompts_of_given_responses_get_the_options_too(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps({"prompt": [{"role": "user", "content": "a"}], "response": "b"}) + "\n")
    command = ("experiment=score", "backend=fake", "model.name=x", f"score.responses={path}")
    run = run_in(tmp_path / "run", *command, "+data.template_kwargs.enable_thinking=true")
    assert [row["prompt"] for row in run.completions.rows()] == ["think: True\nuser: a\nassistant: "]
    with pytest.raises(UsageError, match="holds other token ids of response 0 to '0'"):
        run_in(tmp_path / "run", *command)


def test_the_options_need_a_template(tmp_path):
    with pytest.raises(UsageError, match=r"data\.template_kwargs needs a chat template: set data\.chat_template=true"):
        config_of("backend=fake", "+data.template_kwargs.a=1", "data.chat_template=false", path=tmp_path)
