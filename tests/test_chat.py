"""Prompts, counts and cuts of the chat tokenizer."""

import json
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recbole_gacllm.llm.chat import ChatTokenizer
from recbole_gacllm.llm.generator import Request, Sampling

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Hello"}


@pytest.fixture(scope="module")
def chat(tiny_model):
    return ChatTokenizer(tiny_model)


def rendered(chat, *messages):
    return str(chat._tokenizer.decode(chat.encode_chat(messages)))


NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
)
THINKING = (
    "{{ messages[1]['content'] }}"
    "{% if enable_thinking is defined and enable_thinking is false %} no_think{% endif %}"
)


def test_a_chat_ends_where_the_answer_begins(chat):
    assert rendered(chat, SYSTEM, USER) == "system:Be brief.<|end|>user:Hello<|end|>assistant:"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, "System: Be brief.\n\nUser: Hello\n\nAssistant:"),
        (NO_SYSTEM, "[user]Be brief.\n\nHello"),
        (THINKING, "Hello no_think"),
    ],
    ids=["none", "no system role", "a model that thinks"],
)
def test_every_template_gets_what_it_takes(tiny_model, tmp_path, template, expected):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    file = folder / "chat_template.jinja"
    file.unlink()
    if template is not None:
        file.write_text(template, encoding="utf-8")
    chat = ChatTokenizer(folder)
    assert rendered(chat, SYSTEM, USER) == expected
    if template == NO_SYSTEM:
        with pytest.raises(ValueError, match="refuses messages of roles system: System role not"):
            chat.encode_chat([SYSTEM])


def test_counts_are_of_the_text_alone(chat):
    assert chat.count_tokens(["", "abc", "é"]) == [0, 3, 2]
    assert chat.count_tokens([]) == []


def test_truncation_keeps_or_drops_a_character_whole(chat):
    # One token a byte: é is two, 🎬 is four.
    assert chat.truncate(["aé🎬b"] * 1, 3) == ["aé"]
    assert [chat.truncate(["aé🎬b"], n)[0] for n in range(9)] == [
        *["", "a", "a", "aé", "aé", "aé", "aé", "aé🎬", "aé🎬b"]
    ]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), max_size=5),
    max_tokens=st.integers(0, 30),
)
def test_truncated_texts_are_beginnings_that_fit(chat, texts, max_tokens):
    cut = chat.truncate(texts, max_tokens)
    assert all(text.startswith(short) for text, short in zip(texts, cut, strict=True))
    assert all(n <= max_tokens for n in chat.count_tokens(cut))
    for text, short, n in zip(texts, cut, chat.count_tokens(texts), strict=True):
        assert (short == text) == (n <= max_tokens)


def test_special_tokens_are_known_and_left_out_of_decoded_text(chat):
    assert chat.special_tokens == {"<|end|>", "<|pad|>"}
    ids = chat.encode_chat([USER])
    assert chat.decode(ids, []) == "user:Helloassistant:"


def test_the_blank_after_a_prompt_is_kept_whatever_the_tokenizer_makes_of_a_first_one():
    """A decoder as SentencePiece's drops the blank of the first token that it is given."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = ["▁people", "▁enjoy", "▁witty", "ing", "▁films"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "ing"))
    core.decoder = decoders.Metaspace()
    chat = ChatTokenizer.__new__(ChatTokenizer)
    chat._tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    assert chat._tokenizer.decode([2, 4]) == "witty films"
    assert chat.decode([2, 4], [0, 1]) == " witty films"
    assert chat.decode([3, 4], [0, 1]) == "ing films"


def test_every_end_token_the_model_names_stops_a_completion(chat):
    assert chat.stop_token_ids == {*range(0, 256, 8), 256}


def test_the_window_is_the_configs_and_prompts_are_held_to_it(chat):
    assert chat.max_length == 512
    n_prompt = len(chat.encode_chat([USER]))
    request = Request("u7", (USER,), Sampling(10))
    assert len(chat.encode_request(request, n_prompt + 10)) == n_prompt
    with pytest.raises(ValueError, match=rf"'u7'.*{n_prompt} prompt tokens \+ 10 new tokens > 29"):
        chat.encode_request(request, 29)


def test_a_folder_without_tokenizer_or_window_is_refused(tiny_model, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(ValueError, match="no config or tokenizer that transformers can read"):
        ChatTokenizer(folder)
    shutil.copytree(tiny_model, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config.update(model_type="mamba", architectures=["MambaForCausalLM"])
    del config["max_position_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="does not say how long its context window is"):
        ChatTokenizer(folder)


@pytest.mark.engine
def test_the_embedded_model_gets_no_system_prompt_of_its_own():
    from recbole_gacllm.llm.weights import resolve_llm

    chat = ChatTokenizer(resolve_llm("embedded"))
    text = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert rendered(chat, USER) == text
    assert {"<|im_start|>", "<|im_end|>", "<|endoftext|>"} <= chat.special_tokens
    assert chat.max_length == 8192
    words = "A science-fiction film of 1977, by George Lucas, with Mark Hamill 🎬 and others"
    for n in (1, 5, 17, 18, 19):
        [cut] = chat.truncate([words], n)
        assert words.startswith(cut)
        assert n - 3 <= chat.count_tokens([cut])[0] <= n
