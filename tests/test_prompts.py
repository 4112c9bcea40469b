import hashlib
from pathlib import Path

import pytest

from recbole_gacllm.convolution.prompts import PromptRenderer, PromptTemplates

SHIPPED = Path(__file__).parents[1] / "properties" / "prompts"


def count_words(texts: list[str]) -> list[int]:
    return [len(text.split()) for text in texts]


@pytest.fixture
def folder(tmp_path) -> Path:
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


def load(folder: Path, user_noun: str = "person", item_noun: str = "movie") -> PromptTemplates:
    return PromptTemplates.load(folder, user_noun, item_noun)


def renderer(folder: Path, max_prompt_tokens: int, chat_tokens: int = 10) -> PromptRenderer:
    return PromptRenderer(load(folder), count_words, chat_tokens, max_prompt_tokens)


def words(messages) -> int:
    return sum(count_words([message["content"] for message in messages]))


def test_neighbors_come_first_and_the_nodes_own_text_last(folder):
    assert load(folder).messages("user", "a man", ["Heat", "Speed"]) == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Liked movies:\n- Heat\n- Speed\nWho: a man\nGo."},
    )


def test_a_node_without_neighbors_has_a_wording_of_its_own(folder):
    assert load(folder).messages("item", "Heat", [])[1]["content"] == "What: Heat\nGo."


def test_an_empty_system_file_means_no_system_message(folder):
    (folder / "system.txt").write_text("\n")
    assert [message["role"] for message in load(folder).messages("user", "x", [])] == ["user"]


def test_an_sft_prompt_holds_the_given_text(folder):
    templates = load(folder)
    assert templates.sft_messages("user_to_item", "a man")[-1]["content"] == "For a man"
    assert templates.sft_messages("item_to_user", "Heat")[-1]["content"] == "Of Heat"


def test_inserted_text_is_never_read_as_a_template(folder):
    odd = "$neighbors $text ${item_noun} $$ $5 $"
    content = load(folder).messages("user", odd, [odd, "last"])[1]["content"]
    assert content == f"Liked movies:\n- {odd}\n- last\nWho: {odd}\nGo."
    assert load(folder).sft_messages("user_to_item", odd)[-1]["content"] == f"For {odd}"


def test_a_dollar_sign_in_a_noun_or_doubled_in_a_file_is_a_dollar_sign(folder):
    (folder / "user_isolated.txt").write_text("$$5 $item_noun: ${text}s $$text")
    content = load(folder, item_noun="$text").messages("user", "x", [])[1]["content"]
    assert content == "$5 $text: xs $text"


def test_the_version_changes_with_any_word_and_with_the_nouns(folder):
    versions = {load(folder).version(), load(folder, item_noun="book").version()}
    (folder / "system.txt").write_text("Be brief!")
    versions.add(load(folder).version())
    assert len(versions) == 3
    assert load(folder).version() == load(folder).version()


def test_fine_tuning_has_a_version_of_its_own_words_alone(folder):
    before = load(folder).sft_version()
    for name in ("user", "item", "user_deeper", "item_deeper"):
        (folder / f"{name}.txt").write_text("Other words. $text $neighbors")
    for name in ("user_isolated", "item_isolated"):
        (folder / f"{name}.txt").write_text("Other words. $text")
    assert load(folder).sft_version() == before
    versions = {before}
    for name in ("system", "sft_user_to_item", "sft_item_to_user"):
        (folder / f"{name}.txt").write_text("" if name == "system" else "Other words. $text")
        versions.add(load(folder).sft_version())
    assert len(versions) == 4


def test_the_version_that_addresses_stored_descriptions_stays(tmp_path):
    """Another hash would make every description of every user again."""
    templates = PromptTemplates({"user": "a", "user_deeper": "b", "sft_user_to_item": "c"})
    texts = "sft_user_to_item\0c\0user\0a"
    assert templates.version() == hashlib.sha256(texts.encode()).hexdigest()


def test_the_wording_of_deeper_layers_counts_only_where_there_are_some(folder):
    shallow, deep = load(folder).version(1), load(folder).version(2)
    (folder / "user_deeper.txt").write_text("$text $neighbors")
    assert load(folder).version(1) == shallow
    assert load(folder).version(2) != deep


def test_deeper_layers_have_a_wording_of_their_own(folder):
    templates = load(folder)
    first = templates.messages("user", "a man", ["Heat"], layer=1)[1]["content"]
    second = templates.messages("user", "a man", ["Heat"], layer=2)[1]["content"]
    third = templates.messages("user", "a man", ["Heat"], layer=3)[1]["content"]
    assert first == "Liked movies:\n- Heat\nWho: a man\nGo."
    assert second == third == "Who: a man\nMore movies:\n- Heat\nOn."
    assert templates.messages("item", "Heat", [], layer=2)[1]["content"] == "What: Heat\nGo."


def test_neighbors_are_taken_in_order_while_they_fit(folder):
    # 10 chat + 2 system + 4 of the instruction + 1 bullet: 17 fixed, 23 for texts.
    render = renderer(folder, 40)
    assert render.own_text_limit("user") == 23
    neighbors = ["a b c d", "e f g h", "i j k l"]
    counts = count_words(neighbors)
    # Each takes 4 and a bullet: three are 15, beside 8 words of own text.
    full = render.render("user", "own " * 8, 8, neighbors, counts)
    assert all(text in full[1]["content"] for text in neighbors)
    less = render.render("user", "own " * 9, 9, neighbors, counts)
    assert "e f g h" in less[1]["content"]
    assert "i j k l" not in less[1]["content"]
    assert words(less) + 10 <= 40


def test_a_neighbor_that_does_not_fit_ends_the_list(folder):
    prompt = renderer(folder, 40).render("user", "own", 1, ["a " * 40, "b"], [40, 1])
    assert prompt[1]["content"] == "Who: own\nGo."


def test_own_text_is_kept_whole_even_where_no_neighbor_fits(folder):
    render = renderer(folder, 40)
    own = " ".join(["own"] * render.own_text_limit("item"))
    prompt = render.render("item", own, render.own_text_limit("item"), ["a"], [1])
    assert own in prompt[1]["content"]
    assert "- a" not in prompt[1]["content"]
    assert words(prompt) + 10 <= 40


def test_rendering_counts_no_tokens(folder):
    calls = []

    def count(texts: list[str]) -> list[int]:
        calls.append(texts)
        return count_words(texts)

    render = PromptRenderer(load(folder), count, 10, 60)
    at_start = len(calls)
    for side in ("user", "item"):
        render.render(side, "own", 1, ["a", "b"], [1, 1])
    assert len(calls) == at_start


def test_a_budget_below_the_instruction_is_refused_with_the_least_that_works(folder):
    with pytest.raises(ValueError, match=r"llm_max_prompt_tokens is 20.* need 26") as error:
        renderer(folder, 20)
    assert "raise it to 26" in str(error.value)
    renderer(folder, 26)


def test_a_missing_prompt_file_is_named(folder):
    (folder / "item.txt").unlink()
    with pytest.raises(ValueError, match=r"item\.txt is missing.*user_isolated\.txt"):
        load(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("$text", r"user\.txt holds \$neighbors 0 times"),
        ("$neighbors $text $text", r"user\.txt holds \$text 2 times"),
        ("$neighbors $text $rating", r"\$rating; allowed are \$item_noun, \$neighbors, \$text"),
        ("$neighbors $text for 5$", r"user\.txt has a stray '\$'"),
        ("$neighbors\n---\nThis $text", r"user\.txt has a node's text after the line ---"),
    ],
)
def test_a_wrong_prompt_file_is_refused(folder, text, message):
    (folder / "user.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_the_shipped_prompts_load_and_their_instructions_stay_short():
    templates = load(SHIPPED)
    assert words(templates.messages("user", "", [])) < 80
    assert words(templates.messages("item", "", [])) < 80
    assert words(templates.messages("user", "", ["a"], layer=2)) < 80
    assert words(templates.messages("item", "", ["a"], layer=2)) < 80


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("user", "$neighbors $text\n---\n", "one line --- at most, and the beginning"),
        ("user", "$neighbors $text\n--- \nThis\n---\nthat", "one line --- at most"),
        ("sft_user_to_item", "$text\n---\nA film", "only files that ask for descriptions"),
        ("system", "Be brief.\n---\nYes", "only files that ask for descriptions"),
    ],
)
def test_a_beginning_where_it_cannot_be_is_refused(folder, name, text, message):
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
