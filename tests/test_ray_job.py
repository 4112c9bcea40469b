"""The Ray job: what it does without Ray, and, where there is a Ray, workers and drivers that die.

RecBole's environment cannot hold the Ray that the job needs. The tests on a Ray cluster take the
interpreter that GACLLM_RAY_PYTHON names, of an environment with convolution/ray_requirements.txt.
"""

import asyncio
import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recbole_gacllm.convolution import ray_describe as job
from recbole_gacllm.convolution.batch import Answers, answer_files, request_line, write_shards

from .fake_server import FakeServer
from .test_batch import bad, good, refused, write_lines

BODY = {
    "model": "fake",
    "messages": [{"role": "user", "content": "Describe it."}],
    "max_tokens": 20,
    "temperature": 0.0,
    "seed": 1,
    "repetition_penalty": 1.0,
    "stop_token_ids": [2],
    "chat_template_kwargs": {"enable_thinking": False},
}
FOLDER = Path(job.__file__).parent


def test_the_job_needs_nothing_of_this_package_nor_of_its_environment():
    code = (
        f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import ray_describe\n"
        "loaded = {name.split('.')[0] for name in sys.modules}\n"
        "assert not loaded & {'recbole_gacllm', 'recbole', 'torch', 'ray', 'aiohttp', 'numpy'}"
    )
    subprocess.run([sys.executable, "-S", "-I", "-c", code], check=True)


@given(
    answers=st.lists(st.tuples(st.sampled_from([good, bad, refused]), st.integers(0, 5))),
    cut=st.integers(1, 60),
)
def test_only_answers_count_as_answered(tmp_path_factory, answers, cut):
    folder = tmp_path_factory.mktemp("out")
    rows = [make(str(number)) for make, number in answers]
    file = write_lines(folder / "answers-1.jsonl", rows)
    file.write_text(file.read_text() + json.dumps(good("last"))[:-cut])
    assert job.answered_in(folder) == {str(n) for make, n in answers if make is good}


def test_what_is_written_is_what_the_import_reads_and_a_batch_done_twice_is_one_file(tmp_path):
    rows = [{"custom_id": name, "line": job.answer_line(name, {"n": name})} for name in "abc"]
    rows.append({"custom_id": "d", "__inference_error__": "out of memory"})
    rows.append({"custom_id": "e", "line": job.answer_line("e", error="status 400")})
    assert job.write_answers(rows, tmp_path) == job.write_answers(rows[::-1], tmp_path) == (3, 2)
    assert len(list(tmp_path.iterdir())) == 1
    answers = Answers.read(answer_files([tmp_path]))
    assert {name: answers.body(name)["n"] for name in answers} == {"a": "a", "b": "b", "c": "c"}
    assert set(answers.errors) == {"d", "e"}
    assert "out of memory" in answers.errors["d"]
    assert job.answered_in(tmp_path) == set("abc")


def test_an_engine_s_answer_says_why_it_ended():
    def finish(ids):
        row = {"custom_id": "a", "body": json.dumps(BODY), "generated_text": "x"}
        row |= {"generated_tokens": ids, "num_input_tokens": 9}
        line = json.loads(job.engine_answer(row)["line"])
        assert line["response"]["body"]["usage"]["completion_tokens"] == len(ids)
        return line["response"]["body"]["choices"][0]["finish_reason"]

    assert finish([5] * 20) == "length"
    assert finish([5] * 19 + [2]) == "stop"
    assert finish([5, 2]) == finish([5]) == finish([]) == "stop"


def test_an_engine_gets_the_sampling_and_an_endpoint_the_model_that_was_named():
    row = job.parse_request(request_line("a", BODY))
    taken = job.engine_row(row)
    assert taken["messages"] == BODY["messages"]
    assert taken["sampling_params"] == {
        name: BODY[name]
        for name in ("max_tokens", "temperature", "seed", "repetition_penalty", "stop_token_ids")
    }
    sent = job.http_row(row, "other")["payload"]
    assert json.loads(sent["body"]) == {**BODY, "model": "other"}
    assert job.http_row(row, None)["payload"]["body"] == json.dumps(BODY)


def test_a_folder_without_shards_says_where_they_come_from(tmp_path):
    with pytest.raises(ValueError, match=r"no layer-….jsonl lies there.*--export-batch"):
        job.request_files(tmp_path)


# Endpoints: Ray's HTTP stage in miniature


@pytest.fixture(autouse=True)
def _no_long_pauses(monkeypatch):
    monkeypatch.setattr(job, "_FIRST_PAUSE", 0.01)


def ask(servers, n, in_flight=4):
    pytest.importorskip("aiohttp")
    endpoints = job.Endpoints([server.url for server in servers], in_flight)

    async def stage():
        async with endpoints() as session:
            sent = [
                session.post(servers[0].url, headers={}, data=json.dumps(payload(number)))
                for number in range(n)
            ]
            lines = []
            for request in sent:
                async with await request as response:
                    assert response.status == 200
                    lines.append((await response.json())["line"])
            return lines

    return [json.loads(line) for line in asyncio.run(stage())]


def number_of(body):
    return int(body["messages"][-1]["content"].removeprefix("node "))


def payload(number):
    body = {**BODY, "messages": [{"role": "user", "content": f"node {number}"}]}
    return {"custom_id": str(number), "body": json.dumps(body)}


def test_requests_are_shared_among_endpoints_and_answered_in_order():
    def slow(body):
        time.sleep(0.01)

    with FakeServer(slow) as one, FakeServer(slow) as two:
        lines = ask([one, two], 40)
        assert [line["custom_id"] for line in lines] == [str(number) for number in range(40)]
        assert all(line["error"] is None for line in lines)
        assert len(one.answered) + len(two.answered) == 40
        assert min(len(one.answered), len(two.answered)) > 10
        assert one.most_open + two.most_open <= 5


def test_an_endpoint_that_dies_hands_its_requests_to_the_other():
    with FakeServer() as one, FakeServer() as two:
        one.behaviour = lambda body: 503 if len(one.answered) >= 5 else None
        lines = ask([one, two], 40)
        assert all(line["error"] is None for line in lines)
        assert len(two.answered) >= 30


def test_a_refused_request_is_an_error_line_and_not_asked_again():
    with FakeServer(lambda body: 400 if number_of(body) == 3 else None) as server:
        lines = ask([server], 8)
        assert [line["error"] is None for line in lines] == [n != 3 for n in range(8)]
        assert "status 400" in lines[3]["error"]["message"]
        assert len(server.bodies) == 8


def test_odd_answers_are_error_lines_of_their_requests(monkeypatch):
    monkeypatch.setattr(job, "_TRIES", 2)
    monkeypatch.setattr(job, "_MAX_BYTES", 20_000)
    odd = [b"[" * 10_000, b"", b"[]", {"choices": None}, b"x" * 30_000, "garble", *[None] * 4]
    with FakeServer(lambda body: odd[number_of(body)]) as server:
        lines = ask([server], 10)
    assert [line["error"] is None for line in lines] == [answer is None for answer in odd]


def test_a_key_goes_to_the_endpoint_alone_and_into_no_answer(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-123\r\n")
    with FakeServer() as elsewhere, FakeServer(lambda body: 307) as server:
        server.location = f"{elsewhere.url}/chat/completions"
        [line] = ask([server], 1)
        assert server.bodies
        assert not elsewhere.bodies
    assert "status 307" in line["error"]["message"]
    assert "sk-secret-123" not in json.dumps(line)  # the server says it
    for broken in ("sk-a\rsecret", "sk-\u00fcsecret"):
        monkeypatch.setenv("OPENAI_API_KEY", broken)
        with pytest.raises(ValueError, match="OPENAI_API_KEY holds no key") as caught:
            job.api_key()
        assert "secret" not in str(caught.value)
    with pytest.raises(ValueError, match="no endpoint answers") as caught:
        job.check_endpoints(["http://me:hunter22@127.0.0.1:9/v1"])
    assert "hunter22" not in str(caught.value)


def test_without_any_endpoint_the_job_does_not_start():
    with FakeServer() as server:
        job.check_endpoints(["http://127.0.0.1:9/v1", server.url])
    with pytest.raises(ValueError, match=r"no endpoint answers: http://127.0.0.1:9/v1"):
        job.check_endpoints(["http://127.0.0.1:9/v1"])


# A real Ray cluster on this machine

RAY_PYTHON = os.environ.get("GACLLM_RAY_PYTHON", sys.executable)


@pytest.fixture(scope="module")
def _ray():
    check = "import ray, ray.data.llm as llm; assert llm.build_processor"
    if subprocess.run([RAY_PYTHON, "-c", check], capture_output=True).returncode:
        pytest.skip("no ray[llm]: set GACLLM_RAY_PYTHON to an interpreter that has it")


@contextmanager
def started(root, servers):
    command = [RAY_PYTHON, str(FOLDER / "ray_describe.py"), "--input", "batch", "--output", "out"]
    for server in servers:
        command += ["--endpoint", server.url]
    command += ["--batch-size", "8", "--in-flight", "2", "--workers", "1", "2"]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    environment.pop("PYTHONPATH", None)
    with open(root / "ray.log", "a") as log:
        process = subprocess.Popen(
            command, cwd=root, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield process
    finally:
        end(process)


def end(job):
    """Kill a job, and what Ray leaves of its cluster: nobody asks or writes anything after this."""
    cluster = psutil.Process(job.pid).children(recursive=True) if job.poll() is None else []
    job.kill()
    job.wait()
    for process in cluster:
        with suppress(psutil.NoSuchProcess):
            if "ray" in " ".join(process.cmdline()):
                process.kill()
    psutil.wait_procs(cluster, timeout=60)


def wait_for_answers(root, n_files, process):
    while len(list((root / "out").glob("*.jsonl"))) < n_files:
        assert process.poll() is None, (root / "ray.log").read_text()[-3000:]
        time.sleep(0.05)


@pytest.fixture
def exported(tmp_path):
    names = [f"{number:064x}" for number in range(96)]
    lines = [request_line(name, json.loads(payload(n)["body"])) for n, name in enumerate(names)]
    write_shards(tmp_path / "batch", 1, lines, 40)
    return names


def all_answers(root):
    lines = [json.loads(line) for file in (root / "out").glob("*.jsonl") for line in file.open()]
    return [line["custom_id"] for line in lines if line["error"] is None]


def slow(body):
    time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.usefixtures("_ray")
def test_a_killed_worker_loses_no_request_and_doubles_no_answer(exported, tmp_path):
    with FakeServer(slow) as one, FakeServer(slow) as two, started(tmp_path, [one, two]) as ray:
        wait_for_answers(tmp_path, 2, ray)
        processes = psutil.Process(ray.pid).children(recursive=True)
        next(p for p in processes if "HttpRequestUDF" in " ".join(p.cmdline())).kill()
        assert ray.wait() == 0, (tmp_path / "ray.log").read_text()[-3000:]
    assert sorted(all_answers(tmp_path)) == exported


@pytest.mark.slow
@pytest.mark.usefixtures("_ray")
def test_a_job_killed_and_started_again_asks_only_what_has_no_answer(exported, tmp_path):
    with FakeServer(slow) as one, FakeServer(slow) as two:
        with started(tmp_path, [one, two]) as ray:
            wait_for_answers(tmp_path, 3, ray)
            end(ray)
        before = all_answers(tmp_path)
        assert 24 <= len(before) < 96
        n_asked = len(one.bodies) + len(two.bodies)
        with started(tmp_path, [one, two]) as ray:
            assert ray.wait() == 0, (tmp_path / "ray.log").read_text()[-3000:]
        assert len(one.bodies) + len(two.bodies) - n_asked == 96 - len(before)
    assert sorted(all_answers(tmp_path)) == exported
    assert f"{len(before)} answered before" in (tmp_path / "ray.log").read_text()
