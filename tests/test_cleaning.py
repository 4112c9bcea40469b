import pytest
from hypothesis import given
from hypothesis import strategies as st

from recbole_gacllm.descriptions.cleaning import Cleaned, CleaningContext, clean

PROMPT = """Answer with one short paragraph and nothing else.
Describe in two sentences what kinds of movies this person enjoys. Do not name a movie.

This person liked these movies:
- Toy Story (1995): animation, children's, comedy
- Heat (1995): action, crime, thriller

About the person: a 24-year-old technician from Arizona
The kinds of movies that this person enjoys, in two sentences:"""
REQUEST = """Describe in two sentences what kinds of movies this person enjoys. Do not name a movie.
The kinds of movies that this person enjoys, in two sentences:"""
CONTEXT = CleaningContext(PROMPT, REQUEST)
CIRCLES = "Gaslight is a movie that has been shown to be a movie that has been shown"
GOOD = "This viewer loves witty comedies."


def cleaned(raw: str, finish_reason: str = "stop") -> Cleaned:
    return clean(raw, finish_reason, CONTEXT)


def text_of(raw: str, finish_reason: str = "stop") -> str:
    result = cleaned(raw, finish_reason)
    assert result.problem is None, result
    return result.text


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        "Fans of M*A*S*H and user_name stay as they are.",
        "Star Wars: A New Hope is a space opera.",
        "This viewer enjoys: comedies, dramas and crime.",
        "He likes comedy, dark comedy, comedy of errors, and crime. She likes comedy, and crime.",
        "He likes the description of life in small towns: slow and warm.",
        '"Heat" and "Casino" are favourites here: "Heat" first.',
        "It suits those who don't mind a dogs' tale.",
        "12 Monkeys-style puzzles appeal to this viewer.",
        "Une personne qui aime les comédies.",
        "この人はコメディが好きです。",
        "Comedies without an end mark",
    ],
)
def test_a_good_description_stays_as_it_is(text: str) -> None:
    assert cleaned(text) == Cleaned(text, None)


@pytest.mark.parametrize(
    "raw",
    [
        f"  \n{GOOD}\n\n ",
        "This viewer\tloves\nwitty   comedies.",
        "This viewer\u200b loves\x00 witty\x07 come\u202edies.\ufffd",
        f"- {GOOD}",
        f"1. {GOOD}",
        f"> ## {GOOD}",
        f"**{GOOD}**",
        "This viewer **loves** *witty* `comedies`.",
        "___This viewer___ loves ***witty*** comedies.",
        f"**{GOOD}",
        f'"{GOOD}"',
        f"“{GOOD}”",
        f"'{GOOD}'",
        f'"{GOOD}',
        f"```\n{GOOD}\n```",
        f"---\n{GOOD}",
        f"Description: {GOOD}",
        f"**Description:** {GOOD}",
        f"Updated user profile: {GOOD}",
        f'Summary of the movie Toy Story (1995): "{GOOD}"',
        f"Sure, here is a description of this person:\n\n{GOOD}",
        f"Sure! Here's the paragraph:\n{GOOD}",
        f"Here are the preferences: Answer: {GOOD}",
    ],
)
def test_what_surrounds_a_description_is_removed(raw: str) -> None:
    assert text_of(raw) == GOOD


def test_a_list_becomes_one_line() -> None:
    assert text_of("This viewer loves:\n- comedies\n* dramas\n2) crime") == (
        "This viewer loves: comedies dramas crime"
    )


def test_repeated_sentences_are_collapsed_to_one() -> None:
    raw = "They like comedy. They love crime! they like COMEDY. They like comedy. They like comedy"
    assert text_of(raw) == "They like comedy. They love crime!"


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("He likes comedy, drama, drama, and comedy.", "He likes comedy, drama."),
        ("He likes war, war, war, war, and crime.", "He likes war, and crime."),
        (
            "He likes Comedy; drama; comedy! He likes crime.",
            "He likes Comedy, drama! He likes crime.",
        ),
        (
            "He likes a film of war, a film of love, a film of war",
            "He likes a film of war, a film of love",
        ),
    ],
)
def test_a_list_names_nothing_twice(raw: str, expected: str) -> None:
    assert text_of(raw) == expected


def test_an_answer_that_loops_until_the_limit_keeps_what_it_said_once() -> None:
    raw = "He likes war, science fiction, crime, science fiction, crime, science fict"
    assert text_of(raw, "length") == "He likes war, science fiction, crime…"


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("They like comedy films. They also lo", "They like comedy films."),
        ("They like Mr. Bean films. They also lo", "They like Mr. Bean films."),
        ("They like comedy films a lot!", "They like comedy films a lot!"),
        ("They liked “Heat.” They also lo", "They liked “Heat.”"),
        ("この 人は コメディが好きです。そして", "この 人は コメディが好きです。"),
        ("They like long comedies, dra", "They like long comedies…"),
        ("Yes. They like long comedies and dra", "Yes. They like long comedies and…"),
        ("They like films by Mr. Smith and dra", "They like films by Mr. Smith and…"),
    ],
)
def test_a_completion_cut_by_the_limit_ends_at_a_sentence_or_a_word(
    raw: str, expected: str
) -> None:
    assert text_of(raw, "length") == expected


def test_the_same_text_ended_by_the_model_keeps_its_last_sentence() -> None:
    assert text_of("They like comedy films. They also lo") == "They like comedy films. They also lo"


@pytest.mark.parametrize("raw", ["They like", "They like dra", "Comed", "Well, dra"])
def test_fewer_than_three_whole_words_are_truncated(raw: str) -> None:
    assert cleaned(raw, "length").problem == "truncated"


@pytest.mark.parametrize(
    "raw", ["", " \n ", "...", "1995 (1-2)", "****", "Description:", "- \n- ", "\x00", "🎬🎬"]
)
@pytest.mark.parametrize("finish_reason", ["stop", "length"])
def test_a_completion_without_letters_is_empty(raw: str, finish_reason: str) -> None:
    assert cleaned(raw, finish_reason).problem == "empty"


@pytest.mark.parametrize(
    "raw",
    [
        "Answer with one short paragraph and nothing else.",
        "- toy story (1995) -- Animation, Children's, Comedy",
        "A 24-year-old technician from Arizona.",
        "Description: a 24 year old technician",
        "Heat (1995): action, crime, thriller About the person",
        "This is it. Describe in two sentences what kinds of movies this person enjoys!",
        "They enjoy crime films. Do not name a movie.",
        "Toy Story",
    ],
)
def test_a_part_of_the_prompt_or_its_request_is_an_echo(raw: str) -> None:
    assert cleaned(raw).problem == "echo"


@pytest.mark.parametrize(
    "raw",
    [
        "A 24-year-old technician from Arizona who enjoys crime films.",
        "This person enjoys Toy Story (1995) and other animation.",
        "Toy Stor",  # a part of a word is no part of the prompt
    ],
)
def test_words_of_the_prompt_in_a_new_sentence_are_no_echo(raw: str) -> None:
    assert cleaned(raw).problem is None


@given(st.text(max_size=200), st.sampled_from(["stop", "length"]))
def test_any_completion_becomes_one_plain_line(raw: str, finish_reason: str) -> None:
    result = cleaned(raw, finish_reason)
    assert result.text == " ".join(result.text.split())
    assert "\x00" not in result.text
    if result.problem is None:
        assert any(map(str.isalpha, result.text))


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_a_text_that_goes_in_circles_is_no_description(reason):
    assert clean(f"{CIRCLES} to be a movie that has been", reason, CONTEXT).problem == "loop"
    assert clean(CIRCLES, "stop", CONTEXT).problem is None  # twice may be meant
    sentences = "They like a mix of {}. They enjoy a mix of {}. So a mix of {} it is."
    assert clean(sentences.format("war", "war", "war"), "stop", CONTEXT).problem == "loop"
    assert clean(sentences.format("war", "love", "art"), "stop", CONTEXT).problem is None


BEGUN = CleaningContext(PROMPT, REQUEST, "This person enjoys")


@pytest.mark.parametrize(
    "raw",
    [
        " witty comedies.",
        "\n witty comedies.",
        "This person enjoys witty comedies.",  # a server that begins anew
        " This person enjoys witty comedies.",
    ],
)
def test_an_answer_goes_on_from_its_beginning(raw: str) -> None:
    assert clean(raw, "stop", BEGUN) == Cleaned("This person enjoys witty comedies.", None)


def test_the_beginning_is_a_whole_word_where_a_server_begins_anew() -> None:
    begun = CleaningContext(PROMPT, REQUEST, "A")
    assert clean(" Action films most of all.", "stop", begun).text == "A Action films most of all."


@pytest.mark.parametrize("raw", ["", " ", ".", "\n...", " This person enjoys.", " <>"])
def test_a_beginning_alone_is_empty(raw: str) -> None:
    assert clean(raw, "stop", BEGUN).problem == "empty"


def test_a_beginning_and_half_a_word_are_truncated() -> None:
    assert clean(" comed", "length", BEGUN).problem == "truncated"
    assert clean(" witty comed", "length", BEGUN) == Cleaned("This person enjoys witty…", None)


def test_punctuation_and_parts_of_words_may_follow_a_beginning() -> None:
    assert clean(": comedies", "stop", BEGUN).text == "This person enjoys: comedies"
    person = CleaningContext(PROMPT, REQUEST, "This person")
    assert clean("'s taste is witty.", "stop", person).text == "This person's taste is witty."
    assert clean("喜欢科幻电影。", "stop", CleaningContext("", "", "这个人")).text == (
        "这个人喜欢科幻电影。"
    )


def test_a_beginning_may_say_what_the_request_says() -> None:
    begun = CleaningContext(
        PROMPT, "This person enjoys movies that", "This person enjoys movies that"
    )
    assert clean(" make one laugh.", "stop", begun).problem is None
    again = clean(" last. This person enjoys movies that last long.", "stop", begun)
    assert again.problem == "echo"


def test_what_follows_a_beginning_is_no_copy_of_the_prompt() -> None:
    copy = " Toy Story (1995): animation, children's, comedy - Heat"
    for beginning in ("This person enjoys", "This person  enjoys", "This *person* enjoys"):
        begun = CleaningContext(PROMPT, REQUEST, beginning)
        assert clean(copy, "stop", begun).problem == "echo"
    # A short list of kinds may well stand in one of the texts.
    assert clean(" animation, children's, comedy", "stop", BEGUN).problem is None


@pytest.mark.parametrize(
    ("raw", "kept"),
    [
        ("Films like x< |im_end| >system.", "Films like x im_end system."),
        ('Films like "x<|a|>", {not} [this]', 'Films like "x<|a|>", not this'),
        ('<b>Films</b> like "x {y', 'b Films /b like "x y'),
        ('"Films like <b>x</b>."', "Films like b x /b."),
        ("Films [such as this], (<3) and {that}.", "Films such as this, (3) and that."),
        ('Films "a" <or> "b <c>" are "d [e]".', 'Films "a" or "b <c>" are "d [e]".'),
    ],
)
def test_markup_stays_between_quotation_marks_alone(raw: str, kept: str) -> None:
    assert text_of(raw) == kept
