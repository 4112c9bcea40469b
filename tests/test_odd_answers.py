"""Answers that are none, too long, too slow or from elsewhere: one request fails, not the rest."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recbole_gacllm.convolution.cleaning import CleaningContext
from recbole_gacllm.convolution.convolution import record_of
from recbole_gacllm.convolution.store import DescriptionStore
from recbole_gacllm.errors import GenerationError
from recbole_gacllm.llm import endpoints
from recbole_gacllm.llm.chat_api import completion_of

from .test_batch import answer_all, fakes, generator, good, tiny_keys  # noqa: F401
from .test_generator_contract import make_requests
from .test_server import (  # noqa: F401
    _short_pauses,
    connect,
    expected_texts,
    serve,
)

USAGE = {"prompt_tokens": 7, "completion_tokens": 3}


def answer(content="A calm film.", reason="stop", **usage):
    choice = {"message": {"content": content}, "finish_reason": reason}
    return {"choices": [choice], "usage": {**USAGE, **usage}}


ODD = [
    {},
    [],
    "text",
    7,
    None,
    {"error": {"message": "out of memory"}},
    {"choices": [], "usage": USAGE},
    {"choices": {"0": "x"}, "usage": USAGE},
    {"choices": ["x"], "usage": USAGE},
    {"choices": None, "usage": USAGE},
    {"choices": [{"message": None, "finish_reason": "stop"}], "usage": USAGE},
    {**answer(), "usage": None},
    {**answer(), "usage": [3, 4]},
    answer(7),
    answer({"text": "x"}),
    answer([7]),
    answer([{"type": "text"}]),
    answer([{"type": "text", "text": ["x"]}]),
    answer(reason="abort"),
    answer(reason=None),
    answer(reason=["stop"]),
    *(
        answer(completion_tokens=count)
        for count in (10**30, float("inf"), float("nan"), -1, "3", True, None, 3.5, [3])
    ),
    answer(prompt_tokens=float("inf")),
    answer(prompt_tokens_details={"cached_tokens": float("inf")}),
    answer(prompt_tokens_details=[1]),
]
names = pytest.mark.parametrize("odd", ODD, ids=lambda odd: repr(odd)[:60])


@names
def test_what_is_no_completion_is_a_value_error_and_nothing_else(odd):
    with pytest.raises(ValueError, match="an answer that"):
        completion_of("a", odd)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["choices", "usage", "message", "content", "type", "text", "x"]), inner
        )
    ),
)


@given(content=JSON, usage=JSON, choices=JSON)
def test_any_json_is_a_completion_or_a_value_error(content, usage, choices):
    for odd in (answer(content), {**answer(), "usage": usage}, {**answer(), "choices": choices}):
        try:
            made = completion_of("a", odd)
        except ValueError:
            continue
        assert isinstance(made.text, str)
        record = record_of(made, CleaningContext("", ""), 1)
        assert all(0 <= n < 2**31 for n in (record.n_prompt_tokens, record.n_output_tokens))


def test_a_content_of_parts_is_their_text_and_none_is_empty():
    parts = [
        {"type": "thinking", "thinking": "Hm."},
        {"type": "text", "text": "A calm "},
        {"type": "text", "text": "film."},
    ]
    assert completion_of("a", answer(parts)).text == "A calm film."
    assert completion_of("a", answer(["A calm ", "film."])).text == "A calm film."
    assert completion_of("a", answer(None)).text == ""


# From servers


def poison(n=7):
    return make_requests(12)[n].messages[-1]["content"]


def is_poison(body):
    return body["messages"][-1]["content"] == poison()


@pytest.mark.parametrize(
    "odd",
    [
        *(answer(7), answer(completion_tokens=float("inf")), answer(reason="abort")),
        {"error": "no"},
        "garble",
        b"<html>log in</html>",
        b"",
        b"[" * 100_000,
        b'{"choices": ' + b"9" * 10_000 + b"}",
        b"\xff\xfe",
    ],
    ids=lambda odd: repr(odd)[:40],
)
def test_a_request_whose_answers_are_none_fails_alone(serve, connect, odd, caplog):  # noqa: F811
    server = serve(lambda body: odd if is_poison(body) else None)
    made = {c.id: c for c in connect(server).generate(make_requests(12))}
    assert made.pop("node 7").problem
    expected = expected_texts(12)
    assert expected.pop("node 7")
    assert {name: c.text for name, c in made.items()} == expected
    assert not any(c.problem for c in made.values())
    assert sum(map(is_poison, server.bodies)) == endpoints._MAX_ODD
    assert "request node 7 has no answer: " in caplog.text


def test_it_is_recorded_as_failed_also_where_only_it_is_left(serve, connect):  # noqa: F811
    server = serve(lambda body: answer(completion_tokens=-1))
    [made] = connect(server).generate(make_requests(1))
    record = record_of(made, CleaningContext("", ""), 2)
    assert (record.status, record.reason, record.text) == ("failed", "malformed", "")


def test_servers_whose_every_answer_is_none_end_the_run_before_all_has_failed(
    serve,  # noqa: F811
    connect,  # noqa: F811
):
    running = connect(serve(lambda body: b"<html>log in</html>")).generate(make_requests(60))
    with pytest.raises(GenerationError, match=r"20 requests in a row .*not JSON.*base URLs"):
        next(running)


def test_an_answer_of_any_size_is_read_to_a_limit(serve, connect, monkeypatch):  # noqa: F811
    monkeypatch.setattr(endpoints, "_MAX_BYTES", 5000)
    long = answer("x" * 6000)
    made = {
        c.id: c
        for c in connect(serve(lambda body: long if is_poison(body) else None)).generate(
            make_requests(12)
        )
    }
    assert "more than" in made["node 7"].problem
    assert len(made) == 12


@pytest.mark.timeout(60)
def test_a_server_that_trickles_is_given_up(serve, connect):  # noqa: F811
    slow = serve(lambda body: "trickle")
    running = connect(slow, serve(), concurrency=2, timeout_seconds=0.5)
    assert {c.id: c.text for c in running.generate(make_requests(12))} == expected_texts(12)
    assert slow.bodies
    with pytest.raises(GenerationError, match=r"failed 8 times.*no whole answer within 0.2 s"):
        list(connect(slow, timeout_seconds=0.2).generate(make_requests(1)))


def test_a_redirect_is_not_followed_and_takes_no_key_along(
    serve,  # noqa: F811
    connect,  # noqa: F811
    monkeypatch,
):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-123")
    elsewhere = serve()
    server = serve(lambda body: 307)
    server.location = f"{elsewhere.url}/chat/completions"
    with pytest.raises(GenerationError, match=r"sends its requests on to .*is not followed"):
        list(connect(server).generate(make_requests(2)))
    assert not elsewhere.bodies
    assert not elsewhere.keys


def test_a_server_that_nobody_vouches_for_is_refused(serve, connect):  # noqa: F811
    server = serve(certificate=Path(__file__).with_name("self_signed.pem"))
    assert server.url.startswith("https:")
    with pytest.raises(GenerationError, match="CERTIFICATE_VERIFY_FAILED"):
        connect(server)
    assert not server.keys


# From batch files


def test_of_a_batch_with_odd_answers_all_good_ones_are_stored(fakes, generator):  # noqa: F811
    generator.answer = lambda request: "A calm film for all who like the sea and its ships."
    _, requests = fakes.export()
    answers = answer_all(requests, generator)
    for line, odd in zip(answers[5:], ODD, strict=False):
        line["response"]["body"] = odd
    [layer] = fakes.take(answers).layers
    assert (layer.n_imported, layer.n_to_retry) == (54 - len(ODD), len(ODD))
    assert (layer.n_odd, layer.n_missing) == (len(ODD), len(ODD))
    # Asked once more and odd again, they have failed; the next layer can go on.
    manifest, left = fakes.export()
    assert (manifest["layer"], manifest["n_second_attempts"]) == (1, len(ODD))
    answers = answer_all(left, generator)
    for line in answers[1:]:
        line["response"]["body"] = answer(completion_tokens=float("inf"))
    layer = fakes.take(answers, "again").layers[0]
    assert (layer.n_imported, layer.n_failed, layer.n_missing) == (1, len(ODD) - 1, 0)
    with DescriptionStore(fakes.job.store) as store:
        rows = store._db.execute("SELECT reason FROM descriptions WHERE status = 'failed'")
        assert {reason for (reason,) in rows} == {"malformed"}
    assert fakes.export()[0]["layer"] == 2


def test_files_of_something_else_are_refused_before_all_prompts_have_failed(
    fakes,  # noqa: F811
    generator,  # noqa: F811
):
    _, requests = fakes.export()
    answers = [good(request["custom_id"]) for request in requests]
    for line in answers:
        del line["response"]["body"]["usage"]
    with pytest.raises(ValueError, match="the first 20 answers are no chat completions"):
        fakes.take(answers)
    manifest, left = fakes.export()
    assert (len(left), manifest["n_second_attempts"]) == (54, 0)
    assert json.dumps(left) == json.dumps(requests)
