"""Rows -> prompt tokens: the chat template once, BOS once, whatever the tokenizer and the template do by themselves."""

import numpy as np
import pytest

from rl_onoff.config import DataConfig
from rl_onoff.data.prompts import Row, load_rows
from rl_onoff.data.requests import check_lengths, encode_prompt, encode_rows
from rl_onoff.errors import UsageError
from rl_onoff.types import Sampling, sample_requests


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


def word_tokenizer(*, adds_bos: bool, template: str | None):
    """A real tokenizer over a few words, which may add a BOS by itself; a base model's has no chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {
        word: index
        for index, word in enumerate(["<s>", "</s>", "<unk>", "user", "system", "hello", "be", "short", ":"])
    }
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template
    )


PLAIN = "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}"
WITH_BOS = "{{ bos_token }}" + PLAIN
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + PLAIN


def test_the_bundled_set_as_prompts(tokenizer):
    prompts = encode_rows(load_rows(DataConfig(limit=3)), DataConfig(limit=3), tokenizer)
    assert [prompt.id for prompt in prompts] == ["money-01", "money-02", "money-03"]
    first = prompts[0]
    assert first.ids.dtype == np.int32
    assert first.meta["answer"] == "22" and first.meta["question"] in first.text
    assert first.text.count("<|im_start|>assistant") == 1 and first.text.endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(first.ids) == first.text
    wanted = tokenizer.apply_chat_template(
        [{"role": "user", "content": first.meta["question"]}], add_generation_prompt=True, return_dict=False
    )
    assert first.ids.tolist() == wanted


def test_a_system_message_is_put_before_conversations_without_one(tokenizer):
    for prompt in ("Hi", [{"role": "user", "content": "Hi"}]):
        text = encode_prompt(prompt, tokenizer, chat_template=True, system="Be brief.").text
        assert (
            text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>")
            and text.count("system") == 1
        )
    own = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "Hi"}]
    assert "Be brief" not in encode_prompt(own, tokenizer, chat_template=True, system="Be brief.").text
    assert len(own) == 2


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("template", [PLAIN, WITH_BOS])
def test_chats_have_exactly_one_bos_if_tokenizer_or_template_want_one(adds_bos, template):
    words = word_tokenizer(adds_bos=adds_bos, template=template)
    ids = encode_prompt("hello", words, chat_template=True).ids.tolist()
    wants = adds_bos or template == WITH_BOS
    assert ids == ([0] if wants else []) + words.convert_tokens_to_ids(["user", ":", "hello"])


@pytest.mark.parametrize(
    ("adds_bos", "text", "words"),
    [(True, "hello", ["<s>", "hello"]), (True, "<s> hello", ["<s>", "hello"]), (False, "hello", ["hello"])],
)
def test_raw_text_has_the_tokenizers_own_special_tokens_once(adds_bos, text, words):
    tokenizer = word_tokenizer(adds_bos=adds_bos, template=None)
    prompt = encode_prompt(text, tokenizer, chat_template=False)
    assert tokenizer.convert_ids_to_tokens(prompt.ids.tolist()) == words and prompt.text == text


def test_raw_text_on_the_built_in_model_has_no_template(tokenizer):
    prompt = encode_prompt("2 + 2 =", tokenizer, chat_template=False)
    assert tokenizer.decode(prompt.ids) == prompt.text == "2 + 2 ="


def test_token_ids_are_taken_as_they_are(tokenizer):
    for chat_template in (True, False):
        prompt = encode_prompt([1, 1, 42], tokenizer, chat_template=chat_template)
        assert prompt.ids.tolist() == [1, 1, 42] and prompt.text == tokenizer.decode([1, 1, 42])


def test_a_single_message_can_go_without_a_template_but_a_conversation_cannot():
    words = word_tokenizer(adds_bos=True, template=None)
    assert encode_prompt([{"role": "user", "content": "hello"}], words, chat_template=False).ids.tolist() == [0, 5]
    chat = [{"role": "system", "content": "be short"}, {"role": "user", "content": "hello"}]
    with pytest.raises(UsageError, match=r"row 3 has 2 chat messages.*set data\.chat_template=true"):
        encode_prompt(chat, words, chat_template=False, where="row 3")


@pytest.mark.parametrize("prompt", ["hello", [{"role": "user", "content": "hello"}]])
def test_a_base_models_tokenizer_has_no_chat_template(prompt):
    row = Row(id="0", prompt=prompt, where="row 1 of a")
    with pytest.raises(UsageError, match=r"has no chat template.*set data\.chat_template=false"):
        encode_rows([row], DataConfig(), word_tokenizer(adds_bos=True, template=None))


def test_a_template_that_refuses_a_system_message():
    words = word_tokenizer(adds_bos=False, template=NO_SYSTEM)
    with pytest.raises(
        UsageError, match=r"refuses the roles system, user of row 1 of a \(no system role\): set data\.system=null"
    ):
        encode_rows([Row(id="0", prompt="hello", where="row 1 of a")], DataConfig(system="be short"), words)


def test_lengths_against_the_context():
    def requests(length: int) -> list:
        return sample_requests(id="long", prompt_ids=np.full(length, 5), sampling=Sampling(max_new_tokens=20))

    check_lengths(requests(94), 95)  # room for one token
    with pytest.raises(UsageError, match=r"row 'long' has 95 tokens and the model's context only 95: .*model\.name"):
        check_lengths([*requests(10), *requests(95)], 95)
