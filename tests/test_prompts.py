import hashlib
from pathlib import Path

import pytest

from recbole_gacllm.convolution.prompts import PromptRenderer, PromptTemplates

SHIPPED = Path(__file__).parents[1] / "properties" / "prompts"


def count_words(texts):
    return [len(text.split()) for text in texts]


class Tokenizer:
    """A token is a word between blanks; a chat has ten more."""

    def __init__(self):
        self.counted = []

    def count_tokens(self, texts):
        self.counted += texts
        return count_words(texts)

    def encode_chat(self, messages):
        return [0] * (10 + words(messages))


@pytest.fixture
def folder(tmp_path):
    """Prompt files short enough to count by hand."""
    for name, text in {
        "system": "Be brief.",
        "user": "Liked ${item_noun}s:\n$neighbors\nWho: $text\nGo.",
        "item": "Liked by ${user_noun}s:\n$neighbors\nWhat: $text\nGo.",
        "user_isolated": "Who: $text\nGo.",
        "item_isolated": "What: $text\nGo.",
        "user_deeper": "Who: $text\nMore ${item_noun}s:\n$neighbors\nOn.",
        "item_deeper": "What: $text\nMore of ${user_noun}s:\n$neighbors\nOn.",
        "sft_user_to_item": "For $text",
        "sft_item_to_user": "Of $text",
    }.items():
        (tmp_path / f"{name}.txt").write_text(f"{text}\n", encoding="utf-8")
    return tmp_path


def load(folder, user_noun="person", item_noun="movie"):
    return PromptTemplates.load(folder, user_noun, item_noun)


def renderer(folder, max_prompt_tokens):
    return PromptRenderer(load(folder), Tokenizer(), max_prompt_tokens)


def words(messages):
    return sum(count_words([message["content"] for message in messages]))


@pytest.mark.parametrize(
    ("side", "text", "neighbors", "layer", "request_"),
    [
        ("user", "a man", ["Heat", "Speed"], 1, "Liked movies:\n- Heat\n- Speed\nWho: a man\nGo."),
        ("user", "a man", ["Heat"], 2, "Who: a man\nMore movies:\n- Heat\nOn."),
        ("user", "a man", ["Heat"], 3, "Who: a man\nMore movies:\n- Heat\nOn."),
        ("item", "Heat", [], 1, "What: Heat\nGo."),
        ("item", "Heat", [], 2, "What: Heat\nGo."),
    ],
)
def test_a_node_without_neighbors_and_deeper_layers_have_wordings_of_their_own(
    folder, side, text, neighbors, layer, request_
):
    system, request = load(folder).messages(side, text, neighbors, layer)
    assert system == {"role": "system", "content": "Be brief."}
    assert request == {"role": "user", "content": request_}
    (folder / "system.txt").write_text("\n")  # for models without system messages
    assert load(folder).messages(side, text, neighbors, layer) == (request,)


def test_inserted_text_is_never_read_as_a_template(folder):
    odd = "$neighbors $text ${item_noun} $$ $5 $"
    content = load(folder).messages("user", odd, [odd, "last"])[1]["content"]
    assert content == f"Liked movies:\n- {odd}\n- last\nWho: {odd}\nGo."
    assert load(folder).sft_messages("user_to_item", odd)[-1]["content"] == f"For {odd}"
    assert load(folder).sft_messages("item_to_user", "Heat")[-1]["content"] == "Of Heat"


def test_a_dollar_sign_in_a_noun_or_doubled_in_a_file_is_a_dollar_sign(folder):
    (folder / "user_isolated.txt").write_text("$$5 $item_noun: ${text}s $$text")
    content = load(folder, item_noun="$text").messages("user", "x", [])[1]["content"]
    assert content == "$5 $text: xs $text"


@pytest.mark.parametrize(
    "name", ["system", "user", "item_isolated", "user_deeper", "sft_item_to_user"]
)
def test_a_version_changes_with_the_words_that_it_is_of(folder, name):
    def versions(**nouns):
        templates = load(folder, **nouns)
        return templates.version(1), templates.version(2), templates.sft_version()

    before, of_books = versions(), versions(item_noun="book")
    assert before == versions()
    assert before[0] != of_books[0]
    file = folder / f"{name}.txt"
    file.write_text(f"{file.read_text()} Other words.")
    changed = [new != old for new, old in zip(versions(), before, strict=True)]
    is_deeper, is_sft = name.endswith("_deeper"), name == "system" or name.startswith("sft_")
    assert changed == [not is_deeper, True, is_sft]


def test_the_version_that_addresses_stored_descriptions_stays():
    """Another hash would make every description of every user again."""
    templates = PromptTemplates({"user": "a", "user_deeper": "b", "sft_user_to_item": "c"})
    texts = "sft_user_to_item\0c\0user\0a"
    assert templates.version() == hashlib.sha256(texts.encode()).hexdigest()


def test_neighbors_are_taken_in_order_while_they_fit_and_own_text_is_kept_whole(folder):
    # 10 chat + 2 system + 4 of the instruction + 1 bullet: 17 fixed, 23 for texts.
    tokenizer = Tokenizer()
    render = PromptRenderer(load(folder), tokenizer, 40)
    tokenizer.counted.clear()
    assert render.own_text_limit("user") == 23
    neighbors = ["a b c d", "e f g h", "i j k l"]
    # Each takes 4 and a bullet: three are 15, beside 8 words of own text.
    for n_own, n_fit in ((8, 3), (9, 2), (23, 0)):
        own = " ".join(["own"] * n_own)
        prompt = render.render("user", own, n_own, neighbors, count_words(neighbors))
        content = prompt[1]["content"]
        assert [text in content for text in neighbors] == [n < n_fit for n in range(3)]
        assert own in content
        assert words(prompt) + 10 <= 40
    # One that does not fit ends the list.
    prompt = render.render("user", "own", 1, ["a " * 40, "b"], [40, 1])
    assert prompt[1]["content"] == "Who: own\nGo."
    assert tokenizer.counted == []


def test_a_budget_below_the_instruction_is_refused_with_the_least_that_works(folder):
    with pytest.raises(ValueError, match=r"llm_max_prompt_tokens is 20.* need 26.*raise it to 26"):
        renderer(folder, 20)
    renderer(folder, 26)


def test_a_missing_prompt_file_is_named(folder):
    (folder / "item.txt").unlink()
    with pytest.raises(ValueError, match=r"item\.txt is missing.*user_isolated\.txt"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("user", "$text", r"holds \$neighbors 0 times"),
        ("user", "$neighbors $text $text", r"holds \$text 2 times"),
        (
            "user",
            "$neighbors $text $rating",
            r"\$rating; allowed are \$item_noun, \$neighbors, \$t",
        ),
        ("user", "$neighbors $text for 5$", r"has a stray '\$'"),
        ("user", "$neighbors\n---\nThis $text", r"has a node's text after the line ---"),
        ("user", "$neighbors $text\n---\n", "one line --- at most, and the beginning"),
        ("user", "$neighbors $text\n--- \nThis\n---\nthat", "one line --- at most"),
        ("sft_user_to_item", "$text\n---\nA film", "only files that ask for descriptions"),
        ("system", "Be brief.\n---\nYes", "only files that ask for descriptions"),
    ],
)
def test_a_wrong_prompt_file_is_refused(folder, name, text, message):
    (folder / f"{name}.txt").write_text(text)
    with pytest.raises(ValueError, match=rf"{name}\.txt .*{message}"):
        load(folder)


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("neighbors", [[], ["NEIGHBOR"]])
@pytest.mark.parametrize("side", ["user", "item"])
def test_shipped_prompts_share_their_request_and_begin_the_answer(side, neighbors, layer):
    """The engine's prefix cache serves what all nodes of a side have in front."""
    system, request, answer = load(SHIPPED).messages(side, "OWN", neighbors, layer)
    assert [message["role"] for message in (system, request, answer)] == [
        "system",
        "user",
        "assistant",
    ]
    assert system["content"].split()
    content = request["content"]
    shared = content[: min(content.index(text) for text in ["OWN", *neighbors])]
    instruction = shared.splitlines()[0]
    assert instruction.startswith("Describe in two sentences ")
    assert "Do not " in instruction
    question = content.splitlines()[-1]
    assert question.endswith("?")
    assert "OWN" not in question
    assert 0 < len(question.split()) <= 15 < len(instruction.split())
    assert words([system, request]) < 83
    assert answer["content"].startswith("This person " if side == "user" else "This movie ")


def test_what_stands_after_three_hyphens_begins_the_answer(folder):
    (folder / "user.txt").write_text(
        "Liked:\n$neighbors\nWho: $text\n--- \nThis $user_noun likes ${item_noun}s that \n"
    )
    chat = load(folder).messages("user", "--- a man", ["---"])
    assert chat[1:] == (
        {"role": "user", "content": "Liked:\n- ---\nWho: --- a man"},
        {"role": "assistant", "content": "This person likes movies that"},
    )
    # The beginning takes from the budget, and is no line of the request.
    assert renderer(folder, 60).own_text_limit("user") == 60 - 10 - (2 + 3 + 5)
    assert not any("likes" in line for line in load(folder).own_lines())


def test_the_words_of_request_are_told_from_inserted_texts(folder):
    templates = load(folder)
    (system, request) = templates.messages("user", "a man", ["Heat", "Go."])
    lines = [*system["content"].splitlines(), *request["content"].splitlines()]
    own = [line for line in lines if line in templates.own_lines()]
    assert own == ["Be brief.", "Liked movies:", "Go."]


def test_the_shipped_prompts_read_well_with_any_noun():
    for file in SHIPPED.glob("*.txt"):
        text = " " + file.read_text(encoding="utf-8").lower()
        # "a item" and "persons" would not: an article fits one noun and not another.
        for bad in (" a $item_noun", " a ${item_noun", "${user_noun}s", " a $user_noun"):
            assert bad not in text, file.name
