"""Endpoints that fail, die, refuse and come back; the contract itself is tested with the others."""

import logging
import re
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from recbole_gacllm.artifacts import manifests
from recbole_gacllm.errors import GenerationError
from recbole_gacllm.llm import endpoints
from recbole_gacllm.llm.server import ServerGenerator

from .fake_generator import FakeGenerator
from .fake_server import FakeServer
from .test_generator_contract import (
    make_requests,
    texts_of,
)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(endpoints, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(endpoints, "_LONGEST_PAUSE", 0.05)


@pytest.fixture
def serve():
    with ExitStack() as stack:
        yield lambda *arguments, **options: stack.enter_context(FakeServer(*arguments, **options))


@pytest.fixture
def connect(tiny_model):
    def make(*servers, **options):
        urls = [server.url for server in servers]
        return ServerGenerator(tiny_model, urls, "fake", **{"concurrency": 4, **options})

    return make


def expected_texts(n):
    return texts_of(FakeGenerator().generate(make_requests(n)))


def test_all_endpoints_share_the_work_within_their_bounds(serve, connect):
    def slow(body):
        time.sleep(0.05)

    servers = [serve(slow), serve(slow), serve(slow)]
    assert texts_of(connect(*servers).generate(make_requests(60))) == expected_texts(60)
    for server in servers:
        assert len(server.answered) > 5
        assert 1 < server.most_open <= 4


def test_an_endpoint_that_dies_loses_nothing_and_its_share_moves_on(serve, connect):
    dying, other = serve(), serve()
    dying.behaviour = lambda body: "drop" if len(dying.answered) >= 8 else None
    texts = {}
    for completion in connect(dying, other).generate(make_requests(80)):
        assert completion.id not in texts
        texts[completion.id] = completion.text
        if len(dying.answered) >= 8:
            dying.stop()
    assert texts == expected_texts(80)
    assert len(other.answered) >= 80 - 8 - 4


def test_an_endpoint_that_comes_back_joins_in_again(serve, connect):
    state = {"sick": True}
    sick = serve(lambda body: 503 if state["sick"] else None)

    def slow(body):
        time.sleep(0.01)
        if len(healthy.answered) > 20:
            state["sick"] = False

    healthy = serve(slow)
    assert texts_of(connect(sick, healthy).generate(make_requests(200))) == expected_texts(200)
    assert len(sick.answered) > 5


@pytest.mark.parametrize(
    "failure",
    [
        500,
        503,
        429,
        408,
        "drop",
        "garble",
        {"choices": []},
        {"choices": [{"message": {"content": "x"}, "finish_reason": "abort"}], "usage": {}},
    ],
)
def test_a_request_that_fails_once_is_asked_again(serve, connect, failure):
    failed = set()

    def once(body):
        name = body["messages"][-1]["content"]
        if name in failed or len(failed) == 3:
            return None
        failed.add(name)
        return failure

    assert texts_of(connect(serve(once)).generate(make_requests(12))) == expected_texts(12)
    assert len(failed) == 3


def test_a_request_that_every_endpoint_fails_on_ends_the_layer_by_name(serve, connect):
    poison = make_requests(12)[7].messages[-1]["content"]
    servers = [serve(lambda b: 500 if b["messages"][-1]["content"] == poison else None)]
    with pytest.raises(GenerationError, match=r"'node 7' failed 8 times.*status 500"):
        list(connect(*servers).generate(make_requests(12)))


def test_an_endpoint_that_limits_its_load_gets_what_it_takes(serve, connect):
    def limited(body):
        if server.n_open > 2:
            return 429
        time.sleep(0.1)
        return None

    server = serve(limited)
    generator = connect(server, concurrency=32)
    assert texts_of(generator.generate(make_requests(30))) == expected_texts(30)
    assert len(server.bodies) < 85


def test_a_limit_grows_again_with_what_is_answered(serve, connect):
    def slow(body):
        if len(server.bodies) <= 16:
            return 503
        time.sleep(0.3)  # longer than it takes to send the next ones on a busy machine
        return None

    server = serve(slow)
    running = connect(server, concurrency=16).generate(make_requests(120))
    texts = texts_of(next(running) for _ in range(20))
    server.most_open = 0
    texts |= texts_of(running)
    assert texts == expected_texts(120)
    assert server.most_open > 10


def test_endpoints_that_take_nothing_or_are_dead_end_the_layer_with_each_ones_error(serve, connect):
    busy, gone = serve(), serve()
    running = connect(busy, gone, patience_seconds=0.3).generate(make_requests(200))
    next(running)
    busy.behaviour = lambda body: 429
    gone.behaviour = lambda body: "drop"
    gone.stop()
    with pytest.raises(
        GenerationError, match=r"no endpoint .*has answered a request for 0 s: .*start again"
    ) as caught:
        list(running)
    assert f"{busy.url}: status 429" in str(caught.value)
    assert f"{gone.url}: All connection attempts failed" in str(caught.value)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("wish", "limit", "seconds"), [("1", 60.0, 1.0), ("86400", 0.3, 0.3), ("9" * 400, 0.3, 0.3)]
)
def test_an_endpoint_gets_the_pause_it_asks_for_up_to_a_limit(
    serve, connect, monkeypatch, wish, limit, seconds
):
    monkeypatch.setattr(endpoints, "_LONGEST_WISH", limit)
    came = []

    def once(body):
        came.append(time.monotonic())
        return 429 if len(came) == 1 else None

    server = serve(once)
    server.retry_after = wish
    list(connect(server, concurrency=1).generate(make_requests(3)))
    assert came[1] - came[0] >= seconds


def test_one_endpoint_of_two_is_enough_to_start_and_none_is_one_clear_error(serve, connect):
    gone, there = serve(), serve()
    gone.stop()
    assert texts_of(connect(gone, there).generate(make_requests(20))) == expected_texts(20)
    with pytest.raises(GenerationError, match=r"no endpoint of llm_endpoints.*vllm serve fake"):
        connect(gone)


def test_an_endpoint_that_serves_another_model_is_refused(serve, connect):
    server = serve(models=("llama", "adapter-1"))
    with pytest.raises(ValueError, match=r"serves llama, adapter-1, not 'fake'.*llm_served_model"):
        connect(server)


def test_a_refused_request_is_no_reason_to_try_again(serve, connect):
    server = serve(lambda body: 400)
    with pytest.raises(GenerationError, match=r"refuses a request \(status 400"):
        list(connect(server).generate(make_requests(4)))
    assert len(server.bodies) <= 4


def test_the_key_comes_from_the_environment_and_stays_out_of_errors_and_logs(
    serve, connect, monkeypatch, caplog
):
    monkeypatch.setenv("MY_KEY", "sk-secret-123")
    caplog.set_level(logging.DEBUG)
    server = serve(lambda body: 401)
    generator = connect(server, key_variable="MY_KEY")
    with pytest.raises(GenerationError, match=r"refuses the API key.*MY_KEY was sent") as caught:
        list(generator.generate(make_requests(4)))
    server.behaviour = lambda body: 500
    with pytest.raises(GenerationError) as again:
        list(generator.generate(make_requests(4)))
    assert server.keys == {"Bearer sk-secret-123"}
    for text in (str(caught.value), str(again.value), caplog.text, repr(generator)):
        assert "sk-secret-123" not in text


def test_a_server_with_another_tokenizer_is_reported_once(serve, connect, caplog):
    list(connect(serve()).generate(make_requests(6)))
    assert caplog.text.count("they serve another model or chat template") == 1


def test_requests_carry_the_sampling_and_the_name_of_model_or_adapter(serve, tiny_model):
    """As `vllm serve BASE --enable-lora --lora-modules adapter-1=FOLDER` lists them."""
    servers = [serve(models=("base", "adapter-1")), serve(models=("base", "adapter-1"))]
    generator = ServerGenerator(tiny_model, [server.url for server in servers], "adapter-1")
    requests = make_requests(12, temperature=0.7, seed=11, max_new_tokens=9)
    assert texts_of(generator.generate(requests)) == texts_of(FakeGenerator().generate(requests))
    bodies = [body for server in servers for body in server.bodies]
    assert {body["model"] for body in bodies} == {"adapter-1"}
    assert sorted(body["seed"] for body in bodies) == list(range(11, 23))
    assert {(body["max_tokens"], body["temperature"]) for body in bodies} == {(9, 0.7)}
    assert {body["repetition_penalty"] for body in bodies} == {1.05}
    assert {body["messages"][0]["role"] for body in bodies} == {"system"}


def test_an_endpoint_that_fails_is_tried_less_and_less_often(serve, connect, monkeypatch):
    pauses = []
    sleep = endpoints.asyncio.sleep

    async def recording(seconds):
        pauses.append(seconds)
        await sleep(0)

    monkeypatch.setattr(endpoints.asyncio, "sleep", recording)
    monkeypatch.setattr(endpoints, "_FIRST_PAUSE", 1.0)
    monkeypatch.setattr(endpoints, "_LONGEST_PAUSE", 8.0)
    sick = serve(lambda body: 503)
    generator = connect(sick, patience_seconds=2.0)
    sick.stop()
    with pytest.raises(GenerationError, match="no endpoint of llm_endpoints has answered"):
        next(generator.generate(make_requests(1)))
    assert len(pauses) > 4
    for number, pause in enumerate(pauses):
        longest = min(2.0 ** min(number, 3), 8.0)
        assert 0.7 * longest <= pause <= longest


def test_a_run_takes_its_texts_from_servers_and_writes_the_key_nowhere(
    serve, settings, tiny_model, tmp_path, monkeypatch, in_process
):
    from recbole_gacllm.convolution.layers import SIDES, Layer
    from recbole_gacllm.run import run

    from .fake_generator import WORDS
    from .test_pipeline import TINY

    monkeypatch.setenv("MY_KEY", "sk-secret-123\r\n")  # from a file with the line ends of Windows
    failed = []

    def fail_at_first(body):
        failed.append(1)
        return 503 if len(failed) <= 3 else None

    servers = [serve(fail_at_first), serve()]
    keys = {
        **settings,
        **TINY,
        "sft": False,
        "llm_model": str(tiny_model),
        "llm_backend": "server",
        "llm_endpoints": [server.url for server in servers],
        "llm_endpoint_concurrency": 4,
        "llm_served_model": "fake",
        "llm_api_key_variable": "MY_KEY",
    }
    done = run("GaCLLM", "tiny", config_dict=keys)
    assert done.record["stages"]["descriptions"]["backend"] == "server"
    folder = Path(done.record["artifacts"]["descriptions"])
    assert manifests.read_manifest(folder)["key"]["served_model"] == "fake"
    layer = Layer.read(folder / "layer_1.parquet")
    texts = [text for side in SIDES for text in layer.texts[side]]
    assert len(texts) == 54
    beginning = r"This (?:person (?:may enjoy|enjoys)|\w+ appeals to people who enjoy) "
    assert all(re.match(beginning, text) for text in texts)
    answers = [re.sub(beginning, "", text, count=1).rstrip("…") for text in texts]
    assert all(set(answer.split()) <= set(WORDS) for answer in answers)
    assert all(server.keys == {"Bearer sk-secret-123"} for server in servers)
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or b"sk-secret-123" not in file.read_bytes(), file


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"llm_backend": "server"}, "llm_endpoints: None does not go with llm_backend: 'server'"),
        ({"llm_endpoints": "http://a:8000/v1"}, "does not go with llm_backend: 'auto'"),
        ({"llm_endpoints": ["a:8000"]}, "llm_endpoints: .*'a:8000'.* is not allowed"),
        ({"llm_endpoints": "http://me:pw@a/v1"}, "llm_endpoints: .* is not allowed"),
        ({"llm_endpoints": []}, "llm_endpoints: .* is not allowed"),
        ({"llm_api_key_variable": "sk-abc"}, "the name of an environment variable"),
        (
            {
                "llm_backend": "server",
                "llm_endpoints": "http://a/v1",
                "llm_merge_adapter": False,
            },
            "llm_served_model: null does not go with",
        ),
    ],
)
def test_keys_that_do_not_go_together_are_refused(keys, message):
    from recbole_gacllm.config import GaCLLMConfig, model_defaults

    with pytest.raises(ValueError, match=message):
        GaCLLMConfig.from_mapping({**model_defaults(), **keys})
