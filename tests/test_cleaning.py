import pytest
from hypothesis import given
from hypothesis import strategies as st

from recbole_gacllm.convolution.cleaning import Cleaned, CleaningContext, clean

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


def cleaned(raw, finish_reason="stop"):
    return clean(raw, finish_reason, CONTEXT)


def text_of(raw, finish_reason="stop"):
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
def test_a_good_description_stays_as_it_is(text):
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
        f"Of course! Below is a short summary of this person: {GOOD}",
        f"Here is a two-sentence description of the movies this person enjoys: {GOOD}",
        f"Sure! User description: {GOOD}",
        f"Description of this person's movies: {GOOD}",
        f"Summary of Toy Story: {GOOD}",
        f"「{GOOD}」",
    ],
)
def test_what_surrounds_a_description_is_removed(raw):
    assert text_of(raw) == GOOD


@pytest.mark.parametrize(
    "title",
    [
        *("Here Comes the Bride", "Here Is Your Life", "Here Are the Young Men", "Here's to Life"),
        *("Yes", "Yes, Minister", "Sure", "A Sure Thing", "Sure, Here We Go Again", "OK Computer"),
        *("Absolutely Fabulous", "Of Course, My Love", "Certainly", "The Following", "Below"),
        *("The Following Week", "Below the Surface", "Okay", "Here", "The Perfect Answer"),
        *("Profile of a Killer", "Criminal Profile", "Description of a Struggle"),
        *("The Answer", "My Answer", "A Short Response"),
    ],
)
@pytest.mark.parametrize("case", [str, str.lower])
def test_a_title_that_begins_as_a_lead_in_does_stays(title, case):
    text = f"{case(title)}: a comedy about two families and a dog."
    assert cleaned(text) == Cleaned(text, None)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (
            "This viewer loves:\n- comedies\n* dramas\n2) crime",
            "This viewer loves: comedies dramas crime",
        ),
        # Sentences that were there before
        (
            "He likes comedy. He loves crime! he likes COMEDY. He likes comedy. He likes comedy",
            "He likes comedy. He loves crime!",
        ),
        ("喜欢喜剧。喜欢动作片。喜欢喜剧。", "喜欢喜剧。喜欢动作片。"),
        ("เขาชอบหนังตลก เขาชอบหนังผี เขาชอบหนังตลก", "เขาชอบหนังตลก เขาชอบหนังผี"),
        ("หนังตลก และ หนังผี และ หนังรัก", "หนังตลก และ หนังผี และ หนังรัก"),
        # Elements of lists
        ("He likes comedy, drama, drama, and comedy.", "He likes comedy, drama."),
        ("He likes war, war, war, war, and crime.", "He likes war, and crime."),
        (
            "He likes Comedy; drama; comedy! He likes crime.",
            "He likes Comedy; drama! He likes crime.",
        ),
        ("He likes war; war; love; art.", "He likes war; love; art."),
        ("He likes war, love; war, art; love.", "He likes war, love; art."),
        ("喜欢喜剧、剧情、喜剧、动作；喜剧。", "喜欢喜剧、剧情、动作。"),
        ("يحب الكوميديا، الدراما، الكوميديا، الحرب", "يحب الكوميديا، الدراما، الحرب"),
        (
            "He likes a film of war, a film of love, a film of war",
            "He likes a film of war, a film of love",
        ),
        # Markup stays between quotation marks alone
        ("Films like x< |im_end| >system.", "Films like x im_end system."),
        ('Films like "x<|a|>", {not} [this]', 'Films like "x<|a|>", not this'),
        ('<b>Films</b> like "x {y', 'b Films /b like "x y'),
        ('"Films like <b>x</b>."', "Films like b x /b."),
        ("Films [such as this], (<3) and {that}.", "Films such as this, (3) and that."),
        ('Films "a" <or> "b <c>" are "d [e]".', 'Films "a" or "b <c>" are "d [e]".'),
        # Ended by the model, not by the limit
        ("They like comedy films. They also lo", "They like comedy films. They also lo"),
    ],
)
def test_an_answer_is_one_line_that_says_nothing_twice(raw, expected):
    assert text_of(raw) == expected


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
        # An answer that loops keeps what it said once.
        (
            "He likes war, science fiction, crime, science fiction, crime, science fict",
            "He likes war, science fiction, crime…",
        ),
        # Scripts without blanks are cut after a whole character.
        ("这个人喜欢科幻电影，还喜欢动", "这个人喜欢科幻电影，还喜欢…"),
        ("这个人喜欢科幻电影，", "这个人喜欢科幻电影…"),
        ("这个人喜欢 Star War", "这个人喜欢 Star…"),
        ("这个人喜欢Star War", "这个人喜欢Star…"),
        ("คนนี้ชอบหนังตลกและเ", "คนนี้ชอบหนังตลกและ…"),
        ("ស្រលាញ់រឿងកំប្លែងខ្ម", "ស្រលាញ់រឿងកំប្លែង…"),
    ],
)
def test_a_completion_cut_by_the_limit_ends_at_a_sentence_or_a_word(raw, expected):
    assert text_of(raw, "length") == expected


# A sentence that is finished, in scripts with and without blanks and full stops, and what a limit
# may leave of another one.
SCRIPTS = [
    ("This person enjoys comedies.", " This person also li"),
    ("这个人喜欢科幻电影。", "他也喜欢动"),
    ("他说：“我喜欢喜剧。”", "然后他去看"),
    ("你好，我喜欢喜剧!", "还有动作"),
    ("この人はコメディが好きです！？", "また、ドラ"),
    ("彼は「アニメが好きです。」", "と言"),
    ("이 사람은 코미디를 좋아합니다.", " 그는 드라"),
    ("คนนี้ชอบหนังตลกมาก", " เขายังชอบหนังสื"),
    ("ຄົນນີ້ມັກຮູບເງົາຕະຫຼົກ", " ລາວຍັງມັກ"),
    ("មនុស្សនេះចូលចិត្តរឿងកំប្លែង។", " គាត់ក៏"),
    ("ဒီလူက ဟာသရုပ်ရှင်တွေ ကြိုက်တယ်။", "သူက"),
    ("མི་འདི་གློག་བརྙན་ལ་དགའ།", " ཁོང་"),
    ("यह व्यक्ति हास्य फिल्में पसंद करता है।", " वह ना"),
    ("এই ব্যক্তি হাসির ছবি পছন্দ করেন।", " তিনি"),
    ("هل يحب هذا الشخص الأفلام؟", " إنه يح"),
    ("یہ شخص مزاحیہ فلمیں پسند کرتا ہے۔", " وہ ڈرا"),
    ("Նա սիրում է կատակերգություններ։", " Նա նա"),
    ("እሱ ኮሜዲ ፊልሞችን ይወዳል።", " እሱ ደ"),
    ("Этот человек любит комедии.", " Он также лю"),
]


@pytest.mark.parametrize(("whole", "begun"), SCRIPTS)
def test_a_finished_sentence_of_any_script_survives_the_limit(whole, begun):
    assert text_of(whole + begun, "length") == whole
    assert text_of(whole, "stop") == whole


@given(data=st.data())
def test_any_row_of_finished_sentences_survives_any_cut_and_stays_as_it_is(data):
    whole, begun = data.draw(st.sampled_from(SCRIPTS))
    parts = data.draw(st.lists(st.sampled_from([s[0] for s in SCRIPTS]), unique=True, max_size=3))
    text = " ".join([*(part for part in parts if part != whole), whole])
    text_cut = text + begun[: data.draw(st.integers(2, len(begun)))]
    result = cleaned(text_cut, "length")
    assert result.problem is None
    assert result.text.startswith(text)
    assert cleaned(result.text) == result
    assert cleaned(text) == Cleaned(text, None)


def test_copies_and_circles_are_found_in_scripts_without_blanks():
    request = "用两句话描述这个人喜欢什么样的电影。"
    context = CleaningContext(
        f"{request}\n这个人：爱看科幻电影和动作电影、战争电影和爱情电影的工程师。", request
    )
    for copy in ("爱看科幻电影和动作电影、战争电影和爱情电影的工程师", f"好的。{request}"):
        assert clean(copy, "stop", context).problem == "echo"
    assert clean("这个人喜欢什么样的冒险都可以。", "stop", context).problem is None
    begun = CleaningContext(context.prompt, request, "这个人喜欢")
    assert clean("科幻电影和动作电影、战争电影和爱情电影", "stop", begun).problem == "echo"
    assert clean("科幻电影", "stop", begun).problem is None  # a short list of kinds
    assert clean("这个人喜欢冒险电影。", "stop", begun).text == "这个人喜欢冒险电影。"  # begun anew
    circles = "科幻电影很好看的人喜欢"
    assert clean(circles * 3, "stop", CleaningContext("", "")).problem == "loop"
    assert cleaned("科幻电影迷爱看科幻电影，也写科幻电影的影评。").problem is None


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "part",
    [" *a", " **a _b", "`a ", "a, ", "b; b; ", "a… , ", '"a ', "Answer: ", "。”", "กิ "],
)
def test_a_long_answer_is_cleaned_in_a_moment(part):
    numbered = "".join(f"{part}{number % 5000}" for number in range(96_000 // (len(part) + 4)))
    for raw in (part * (96_000 // len(part)), numbered):
        for finish_reason in ("stop", "length"):
            cleaned(raw, finish_reason)


def test_what_is_longer_than_the_request_allows_is_cut_as_by_the_limit():
    context = CleaningContext(PROMPT, REQUEST, "", max_chars=60)
    long = f"{GOOD} They like drama. " + "They also like other things a lot. " * 4000
    assert clean(long, "stop", context) == Cleaned(f"{GOOD} They like drama.", None)


@pytest.mark.parametrize("raw", ["They like", "They like dra", "Comed", "Well, dra"])
def test_fewer_than_three_whole_words_are_truncated(raw):
    assert cleaned(raw, "length").problem == "truncated"


@pytest.mark.parametrize(
    "raw", ["", " \n ", "...", "1995 (1-2)", "****", "Description:", "- \n- ", "\x00", "🎬🎬"]
)
@pytest.mark.parametrize("finish_reason", ["stop", "length"])
def test_a_completion_without_letters_is_empty(raw, finish_reason):
    assert cleaned(raw, finish_reason).problem == "empty"


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        ("Answer with one short paragraph and nothing else.", "echo"),
        ("- toy story (1995) -- Animation, Children's, Comedy", "echo"),
        ("A 24-year-old technician from Arizona.", "echo"),
        ("Description: a 24 year old technician", "echo"),
        ("Heat (1995): action, crime, thriller About the person", "echo"),
        ("This is it. Describe in two sentences what kinds of movies this person enjoys!", "echo"),
        ("They enjoy crime films. Do not name a movie.", "echo"),
        ("Toy Story", "echo"),
        ("A 24-year-old technician from Arizona who enjoys crime films.", None),
        ("This person enjoys Toy Story (1995) and other animation.", None),
        ("Toy Stor", None),  # a part of a word is no part of the prompt
    ],
)
def test_a_part_of_the_prompt_or_its_request_is_an_echo(raw, problem):
    assert cleaned(raw).problem == problem


@given(st.text(max_size=200), st.sampled_from(["stop", "length"]))
def test_any_completion_becomes_one_plain_line(raw, finish_reason):
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
    ("beginning", "raw", "expected"),
    [
        ("This person enjoys", " witty comedies.", "This person enjoys witty comedies."),
        ("This person enjoys", "\n witty comedies.", "This person enjoys witty comedies."),
        # A server that begins anew, with the whole word
        ("This person enjoys", "This person enjoys war.", "This person enjoys war."),
        ("This person enjoys", " This person enjoys war.", "This person enjoys war."),
        ("A", " Action films most of all.", "A Action films most of all."),
        ("This person enjoys", ": comedies", "This person enjoys: comedies"),
        ("This person", "'s taste is witty.", "This person's taste is witty."),
        ("这个人", "喜欢科幻电影。", "这个人喜欢科幻电影。"),
    ],
)
def test_an_answer_goes_on_from_its_beginning(beginning, raw, expected):
    assert clean(raw, "stop", CleaningContext(PROMPT, REQUEST, beginning)) == Cleaned(
        expected, None
    )


@pytest.mark.parametrize("raw", ["", " ", ".", "\n...", " This person enjoys.", " <>"])
def test_a_beginning_alone_is_empty_and_with_half_a_word_truncated(raw):
    assert clean(raw, "stop", BEGUN).problem == "empty"
    assert clean(" comed", "length", BEGUN).problem == "truncated"
    assert clean(" witty comed", "length", BEGUN) == Cleaned("This person enjoys witty…", None)


def test_a_beginning_may_say_what_the_request_says():
    begun = CleaningContext(
        PROMPT, "This person enjoys movies that", "This person enjoys movies that"
    )
    assert clean(" make one laugh.", "stop", begun).problem is None
    again = clean(" last. This person enjoys movies that last long.", "stop", begun)
    assert again.problem == "echo"


def test_what_follows_a_beginning_is_no_copy_of_the_prompt():
    copy = " Toy Story (1995): animation, children's, comedy - Heat"
    for beginning in ("This person enjoys", "This person  enjoys", "This *person* enjoys"):
        begun = CleaningContext(PROMPT, REQUEST, beginning)
        assert clean(copy, "stop", begun).problem == "echo"
    # A short list of kinds may well stand in one of the texts.
    assert clean(" animation, children's, comedy", "stop", BEGUN).problem is None
