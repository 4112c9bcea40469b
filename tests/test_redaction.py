"""Keys and passwords: checked at the door, shown nowhere, whoever writes the message."""

from __future__ import annotations

import json
import logging
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recbole_gacllm import redaction
from recbole_gacllm.config import GaCLLMConfig, model_defaults
from recbole_gacllm.errors import GaCLLMError, GenerationError, StoreError, WeightsError
from recbole_gacllm.llm import endpoints, server
from recbole_gacllm.redaction import api_key, redact, redacted, remember

from .conftest import run_python
from .test_generator_contract import make_requests
from .test_server import _short_pauses, connect, serve  # noqa: F401

KEY = 'sk-proj-Ab12/+=\\"x_y'  # with what JSON, Python and URLs write in other ways


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
    monkeypatch.setattr(redaction, "_secrets", {})


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n", " ", "\t\n\r\n"])
def test_the_line_end_of_a_key_file_is_no_part_of_the_key(serve, connect, monkeypatch, end):  # noqa: F811
    monkeypatch.setenv("OPENAI_API_KEY", f"sk-secret-123{end}")
    answers = serve()
    assert len(list(connect(answers).generate(make_requests(3)))) == 3
    assert answers.keys == {"Bearer sk-secret-123"}


@pytest.mark.parametrize(
    "bad",
    [
        *("sk-a\rsecret", "sk-a\nsecret", "sk-a secret", "sk-a\x7fsecret", "sk-ü-secret"),
        *("\ufeffsk-asecret", "sk-a\u2028secret"),
    ],
)
def test_what_cannot_be_a_key_is_refused_without_showing_it(monkeypatch, bad, serve, connect):  # noqa: F811
    monkeypatch.setenv("MY_KEY", bad)
    keys = {"llm_backend": "server", "llm_endpoints": "http://a/v1"}
    for attempt in (
        lambda: GaCLLMConfig.from_mapping(
            {**model_defaults(), **keys, "llm_api_key_variable": "MY_KEY"}
        ),
        lambda: connect(serve(), key_variable="MY_KEY"),
    ):
        with pytest.raises(ValueError, match=r"MY_KEY .*holds no key.*set the variable") as caught:
            attempt()
        assert "secret" not in str(caught.value)
        assert "sk-" not in str(caught.value)


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=6, max_size=60))
def test_a_key_that_was_read_is_in_no_message_whatever_writes_it(key) -> None:
    os.environ["GACLLM_TEST_KEY"] = key
    try:
        assert api_key("GACLLM_TEST_KEY") == key
    finally:
        del os.environ["GACLLM_TEST_KEY"]
    for shown in (key, repr(key), repr(key.encode()), json.dumps({"error": f"bad key {key}"})):
        for error in (GaCLLMError, GenerationError, StoreError, WeightsError):
            assert key not in str(error(f"refused: {shown}."))
        assert key not in str(endpoints.EndpointError(shown))
        assert key not in str(endpoints.BusyError(shown))


@pytest.mark.parametrize(
    "text",
    [
        "cannot connect to http://me:hunter22@proxy:8080/v1",
        "cannot connect to https://hunter22@host/v1",
        "http://host/v1?api_key=hunter22&x=1",
        "http://host/v1?x=1&key=hunter22",
        "--llm_api_key=hunter22",
        "Illegal header value b'Bearer hunter22\\r'",
        "your token sk-hunter22 is unknown",
        "HF_TOKEN=hunter22",
    ],
)
def test_what_looks_like_a_secret_is_one(text) -> None:
    for shown in (redact(text), str(GenerationError(text)), *redacted([text, {"a": [text]}])[:1]):
        assert "hunter22" not in shown
        assert "***" in shown
    assert "hunter22" not in json.dumps(redacted({"a": [text], "wandb_api_key": "hunter22"}))


@pytest.mark.parametrize(
    "text",
    [
        "http://host:8000/v1/chat/completions refuses a request (status 400: n_tokens=12)",
        "--sft_max_tokens=32 --llm_api_key_variable=MY_KEY Model:key=value",
        "/home/me@host/saved/x.pth",
        "a token is missing; a secret garden",
    ],
)
def test_all_else_is_shown_as_it_is(text) -> None:
    assert redact(text) == text
    assert redacted({"command": [text, 3], "x": None}) == {"command": [text, 3], "x": None}


@pytest.mark.parametrize(
    "keys",
    [
        {"llm_endpoints": "http://me:hunter22@a/v1"},
        {"llm_endpoints": ["http://a/v1?api_key=hunter22"]},
        {"llm_api_key_variable": "sk-hunter22"},
        {"llm_api_key_variable": "hunter22 "},
        {"llm_api_key_variable": ["hunter22"]},
    ],
)
def test_a_key_that_holds_a_secret_by_mistake_is_refused_without_it(keys) -> None:
    with pytest.raises(ValueError, match=next(iter(keys))) as caught:
        GaCLLMConfig.from_mapping({**model_defaults(), "llm_backend": "server", **keys})
    assert "hunter22" not in str(caught.value)


def test_the_log_of_the_libraries_shows_no_key_at_any_level(
    serve,  # noqa: F811
    connect,  # noqa: F811
    monkeypatch,
    caplog,
):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    sick = serve(lambda body: 503 if len(sick.bodies) < 3 else None)
    sick.location = f"http://elsewhere/?key={KEY}"  # a header that httpcore logs
    assert len(list(connect(sick).generate(make_requests(4)))) == 4
    assert "http11" in caplog.text
    for shown in (KEY, json.dumps(KEY)[1:-1], repr(KEY)[1:-1]):
        assert shown not in caplog.text


def test_a_defect_of_the_client_is_told_without_the_key(serve, connect, monkeypatch, caplog):  # noqa: F811
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    made = connect(serve())

    def broken(*_):
        raise RuntimeError(f"Illegal header value b'Bearer {KEY}'")

    monkeypatch.setattr(endpoints, "completion_of", broken)
    with pytest.raises(GenerationError, match="the client of llm_endpoints failed") as caught:
        list(made.generate(make_requests(1)))
    assert KEY not in str(caught.value)
    assert KEY not in caplog.text
    assert "broken" in caplog.text  # the traceback
    assert caught.value.__cause__ is None


CHILD = """
import sys
from recbole_gacllm.artifacts import children
from recbole_gacllm.redaction import api_key
children.die_with_parent()
with children.reporting_errors(__import__("pathlib").Path(".")):
    key = api_key("MY_KEY")
    try:
        raise KeyError(key)
    except KeyError as error:
        raise {kind}(f"refused: {{key}}") from error
"""


@pytest.mark.parametrize("kind", ["ValueError", "RuntimeError", "ZeroDivisionError"])
def test_a_child_tells_its_error_and_its_traceback_without_the_key(
    tmp_path, monkeypatch, capfd, kind
):
    from recbole_gacllm.artifacts import children

    (tmp_path / "leaky.py").write_text(CHILD.format(kind=kind))
    monkeypatch.setenv("MY_KEY", "secret-123456")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}")
    with pytest.raises((ValueError, GaCLLMError), match=r"refused: \*\*\*") as caught:
        children.run_child("x", tmp_path, module="leaky")
    shown = capfd.readouterr().err
    assert "secret-123456" not in f"{caught.value}{shown}"
    assert ("Traceback" in shown) == (kind != "ValueError")


def test_short_words_are_no_keys(monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")  # as vLLM's examples set it
    assert api_key("OPENAI_API_KEY") == "EMPTY"
    remember("")
    assert redact("EMPTY answers") == "EMPTY answers"


def test_the_loggers_that_are_filtered_are_those_of_the_libraries(tiny_model, serve, connect):  # noqa: F811
    """httpcore names a logger a module; a new one would log unfiltered."""
    code = (
        "import httpx, httpcore, logging; "
        "print(*[n for n in logging.root.manager.loggerDict if n.split('.')[0] in "
        "('httpx', 'httpcore')])"
    )
    found = {name for name in run_python("-c", code).split() if name != "httpcore"}
    assert found <= set(server._HTTP_LOGGERS)
