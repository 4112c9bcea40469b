"""Several engines in processes of their own: one stream of requests, deaths, ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from recbole_gacllm.errors import GenerationError, MemoryRanOutError
from recbole_gacllm.llm import engines
from recbole_gacllm.llm.fleet import Fleet

from .fake_engine import load, pids
from .fake_generator import FakeGenerator
from .test_generator_contract import MAX_MODEL_LEN, make_requests, running_children, texts_of


@pytest.fixture
def launch() -> Iterator[Callable[..., Fleet]]:
    fleets: list[Fleet] = []

    def make(*loads: Any, notes: tuple[str, ...] = (), successors: Any = ()) -> Fleet:
        environments = [{"NOTE": note} for note in notes] or [{}] * len(loads)
        fleets.append(Fleet(list(zip(environments, loads, strict=True)), successors))
        return fleets[-1]

    yield make
    for fleet in fleets:
        fleet.close()


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "zombie" not in Path(f"/proc/{pid}/status").read_text()


def expected_texts(n: int) -> dict[str, str]:
    return texts_of(FakeGenerator().generate(make_requests(n)))


def test_engines_share_one_stream_each_in_its_own_environment(launch):
    found = texts_of(launch(load, load, notes=("one", "two")).generate(make_requests(60)))
    notes = [text.split()[0] for text in found.values()]
    assert 20 <= notes.count("one") <= 40
    assert notes.count("one") + notes.count("two") == 60
    expected = expected_texts(60)
    assert all(expected[id].startswith(text.partition(" ")[2][:9]) for id, text in found.items())
    assert "NOTE" not in os.environ


def test_an_engine_killed_mid_layer_loses_nothing_and_its_share_moves_on(launch, caplog):
    fleet = launch(load, load, load)
    found: dict[str, str] = {}
    for completion in fleet.generate(make_requests(120)):
        assert completion.id not in found
        found[completion.id] = completion.text
        if len(found) == 20:
            assert all(member.in_flight for member in fleet._members)
            os.kill(pids(fleet)[1], signal.SIGKILL)
    assert found == expected_texts(120)
    assert "engine 1 has stopped: its process ended with exit code -9" in caplog.text
    assert texts_of(fleet.generate(make_requests(9))) == expected_texts(9)


def test_an_engine_that_fails_leaves_its_requests_to_the_others(launch):
    fleet = launch(partial(load, fail_after=7), load)
    assert texts_of(fleet.generate(make_requests(80))) == expected_texts(80)
    assert "fake failure after 7" in fleet._members[0].error


def test_where_none_is_left_one_error_names_each_and_what_came_before_is_good(launch):
    fleet = launch(partial(load, fail_after=7), load)
    found: dict[str, str] = {}

    def take_and_kill() -> None:
        for completion in fleet.generate(make_requests(200)):
            found[completion.id] = completion.text
            if len(found) == 40:
                os.kill(pids(fleet)[1], signal.SIGKILL)

    with pytest.raises(GenerationError, match="all engines have stopped") as caught:
        take_and_kill()
    assert "engine 0: fake failure after 7 completions" in str(caught.value)
    assert "engine 1: its process ended with exit code -9" in str(caught.value)
    assert found.items() <= expected_texts(200).items()
    assert len(found) >= 40
    with pytest.raises(GenerationError, match="all engines have stopped"):
        list(fleet.generate(make_requests(1)))


NO_ROOM = MemoryRanOutError("memory ran out")


def test_a_smaller_engine_goes_on_in_a_new_process_where_memory_ran_out(launch, caplog):
    starts = [partial(load, fail_after=9, failure=MemoryRanOutError), partial(load, error=NO_ROOM)]
    fleet = launch(starts[0], successors=[starts[1], load])
    found: dict[str, str] = {}
    for completion in fleet.generate(make_requests(80)):
        assert completion.id not in found
        found[completion.id] = completion.text
    assert found == expected_texts(80)
    assert len(set(pids(fleet))) == 3
    assert not any(map(is_running, pids(fleet)[:2]))
    assert "engine 1 has stopped: memory ran out" in caplog.text
    assert "engine 2 goes on, with" in caplog.text
    assert texts_of(fleet.generate(make_requests(9))) == expected_texts(9)


def test_vllm_on_a_cpu_has_a_process_of_its_own_and_smaller_successors(monkeypatch):
    made = []
    monkeypatch.setattr(engines, "_is_cpu_build", lambda: True)
    monkeypatch.setattr(
        "recbole_gacllm.llm.fleet.Fleet", lambda *args, **keys: made.append((args, keys))
    )
    engines.open_generator("vllm", model_dir=Path("model"))
    [(([(environment, first)],), keys)] = made
    assert environment == {}
    sizes = [load.args[0]["n_sequences"] for load in (first, *keys["successors"])]
    assert sizes == [32, 16, 8, 4]


def test_a_smaller_engine_goes_on_where_the_system_killed_the_last(launch):
    fleet = launch(load, successors=[load])
    found: dict[str, str] = {}
    for completion in fleet.generate(make_requests(60)):
        found[completion.id] = completion.text
        if len(found) == 20:
            os.kill(pids(fleet)[0], signal.SIGKILL)
    assert found == expected_texts(60)


@pytest.mark.parametrize(
    ("loads", "n_members"),
    [
        ([partial(load, error=NO_ROOM)] * 3, 3),
        ([partial(load, error=GenerationError("a broken model")), load], 1),
    ],
    ids=["none is small enough", "memory is not the reason"],
)
def test_no_smaller_engine_helps(launch, loads, n_members, caplog):
    with pytest.raises(GenerationError, match=r"all engines have stopped \(.*\)\.$"):
        launch(loads[0], successors=loads[1:])
    assert caplog.text.count("has stopped") == n_members


def test_an_engine_that_does_not_start_is_left_out(launch, caplog):
    fleet = launch(partial(load, error=GenerationError("no room on this card")), load)
    assert texts_of(fleet.generate(make_requests(20))) == expected_texts(20)
    assert "engine 0 has stopped: no room on this card" in caplog.text


def test_bad_input_of_an_engine_is_told_as_it_is_and_ends_the_others(launch):
    children = set(running_children())
    with pytest.raises(ValueError, match=r"^the adapter does not fit$"):
        launch(load, partial(load, error=ValueError("the adapter does not fit")))
    assert set(running_children()) <= children


def test_close_ends_every_process(launch):
    fleet = launch(load, load)
    list(fleet.generate(make_requests(3)))
    fleet.close()
    assert not any(map(is_running, [p for p in pids(fleet) if p is not None]))
    with pytest.raises(GenerationError, match="closed"):
        list(fleet.generate(make_requests(1)))


PARENT = """
import sys, time
sys.path[:0] = [{root!r}]
from recbole_gacllm.llm.fleet import Fleet
from recbole_gacllm.llm.generator import Request, Sampling
from tests.fake_engine import load, pids

if __name__ == "__main__":
    fleet = Fleet([({{}}, load), ({{}}, load)])
    messages = ({{"role": "user", "content": "Hello"}},)
    requests = (Request(str(i), messages, Sampling(8)) for i in range(10**5))
    running = fleet.generate(requests)
    next(running)
    print(*pids(fleet), flush=True)
    if {forgets}:
        sys.exit(0)
    for _ in running:
        pass
"""


@pytest.mark.parametrize("forgets", [False, True], ids=["killed", "ends without close"])
def test_the_processes_end_with_their_parent(tmp_path, forgets):
    script = tmp_path / "parent.py"
    root = str(Path(__file__).resolve().parent.parent)
    script.write_text(PARENT.format(root=root, forgets=forgets))
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    children = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(children) == 2
    if not forgets:
        parent.kill()
    parent.wait(60)
    end = time.monotonic() + 60
    while any(map(is_running, children)):
        assert time.monotonic() < end, "an engine outlives its parent"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("n_visible", "named", "size", "groups"),
    [
        (0, None, 1, None),
        (1, None, 1, None),
        (4, None, 1, ["0", "1", "2", "3"]),
        (4, None, 2, ["0,1", "2,3"]),
        (3, "5,6,7", 1, ["5", "6", "7"]),
        (5, "1,2,3,4,6", 2, ["1,2", "3,4"]),
        (2, "GPU-a,GPU-b", 1, ["GPU-a", "GPU-b"]),
        (4, None, 4, None),
        (2, None, 4, None),
    ],
)
def test_there_are_as_many_engines_as_the_visible_cards_do_for(
    monkeypatch, n_visible, named, size, groups
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_visible)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    found = engines.card_groups(size)
    assert found == ([{"CUDA_VISIBLE_DEVICES": cards} for cards in groups] if groups else [{}])


@pytest.mark.engine
@pytest.mark.slow
def test_two_real_engines_write_what_one_writes_even_if_one_is_killed(monkeypatch):
    """On CPU, where each "card" is a process with vLLM's CPU engine; in float32, to the token."""
    if engines.choose_backend("auto")[0] != "vllm":
        pytest.skip("vLLM cannot run here")
    from recbole_gacllm.llm.weights import resolve_llm

    options = {
        "model_dir": resolve_llm("embedded"),
        "dtype": "float32",
        "max_model_len": MAX_MODEL_LEN,
    }
    requests = make_requests(96, max_new_tokens=24)
    with closing(engines.open_generator("vllm", **options)) as one:
        expected = {c.id: (c.text, c.n_output_tokens) for c in one.generate(requests)}
    monkeypatch.setattr(engines, "card_groups", lambda n_cards: [{}, {}])
    monkeypatch.setattr(engines, "_is_cpu_build", lambda: False)
    with closing(engines.open_generator("vllm", **options)) as two:
        assert isinstance(two, Fleet)
        found = {}
        for completion in two.generate(requests):
            assert completion.id not in found
            found[completion.id] = (completion.text, completion.n_output_tokens)
            if len(found) == 16:
                assert all(member.in_flight for member in two._members)
                os.kill(pids(two)[0], signal.SIGKILL)
        assert found == expected
        assert two._members[0].error
        assert not two._members[1].error
