"""Several engines in processes of their own: one stream of requests, deaths, ends."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import torch

from recbole_gacllm.errors import GenerationError, MemoryRanOutError
from recbole_gacllm.llm import engines
from recbole_gacllm.llm.fleet import Fleet

from .fake_engine import load, pids
from .fake_generator import FakeGenerator
from .test_generator_contract import make_requests, running_children, texts_of

NO_ROOM = MemoryRanOutError("no room for it")


@pytest.fixture
def launch():
    fleets = []

    def make(*loads, notes=()):
        environments = [{"NOTE": note} for note in notes] or [{}] * len(loads)
        fleets.append(Fleet(list(zip(environments, loads, strict=True))))
        return fleets[-1]

    yield make
    for fleet in fleets:
        fleet.close()


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "zombie" not in Path(f"/proc/{pid}/status").read_text()


def check_whole(fleet, n, kill=None):
    """Every request is answered once, also if an engine is killed after 20 of them."""
    texts = {}
    for completion in fleet.generate(make_requests(n)):
        assert completion.id not in texts
        texts[completion.id] = completion.text
        if len(texts) == 20 and kill is not None:
            assert all(member.in_flight for member in fleet._members)
            os.kill(pids(fleet)[kill], signal.SIGKILL)
    assert texts == texts_of(FakeGenerator().generate(make_requests(n)))


def test_engines_share_one_stream_each_in_its_own_environment(launch):
    texts = texts_of(launch(load, load, notes=("one", "two")).generate(make_requests(60)))
    notes = [text.split()[0] for text in texts.values()]
    assert 20 <= notes.count("one") <= 40
    assert notes.count("one") + notes.count("two") == 60
    expected = texts_of(FakeGenerator().generate(make_requests(60)))
    assert all(expected[id].startswith(text.partition(" ")[2][:9]) for id, text in texts.items())
    assert "NOTE" not in os.environ


@pytest.mark.parametrize("n_engines", [3, 1])
def test_an_engine_killed_mid_layer_loses_nothing_and_a_smaller_one_succeeds_it(
    launch, n_engines, caplog
):
    fleet = launch(*[load] * n_engines)
    before = pids(fleet)
    check_whole(fleet, 120, kill=n_engines - 1)
    name = f"engine {n_engines - 1}"
    assert f"{name} has stopped: its process ended with exit code -9" in caplog.text
    assert f"{name} starts again with at most 2 requests at once" in caplog.text
    assert not is_running(before[-1])
    assert len({*before, *pids(fleet)}) == n_engines + 1
    check_whole(fleet, 9)


def test_an_engine_that_fails_hands_its_share_to_the_others_for_good(launch, caplog):
    fleet = launch(load, partial(load, failure=GenerationError))
    before = pids(fleet)
    check_whole(fleet, 60)
    assert "engine 1 has stopped: fake failure after 9" in caplog.text
    assert (pids(fleet), fleet._members[1].error) == (before, "fake failure after 9 completions")


def test_when_all_have_failed_the_error_names_each_and_says_what_to_do(launch):
    running = launch(*[partial(load, failure=GenerationError)] * 2).generate(make_requests(60))
    completions = []
    with pytest.raises(GenerationError, match=r"all engines have stopped \(.*\). C.*start again"):
        completions.extend(running)
    assert len(completions) == 18


def test_where_memory_runs_out_it_is_halved_until_it_does(launch, caplog):
    check_whole(launch(partial(load, failure=MemoryRanOutError, room=1)), 60)
    for size in (2, 1):
        assert f"engine 0 starts again with at most {size} requests at once" in caplog.text


def test_an_engine_whose_size_is_named_is_halved_from_there(caplog):
    with closing(Fleet([({}, partial(load, error=NO_ROOM, room=8))], 32)) as fleet:
        assert fleet._members[0].window == 8
        check_whole(fleet, 20)
    assert caplog.text.count("starts again") == 2


@pytest.mark.parametrize(
    ("error", "n_starts"),
    [(NO_ROOM, 4), (GenerationError("a broken model"), 1)],
    ids=["none is small enough", "memory is not the reason"],
)
def test_no_smaller_engine_helps(launch, error, n_starts, caplog):
    with pytest.raises(GenerationError, match=r"all engines have stopped \(engine 0: .*\)\.$"):
        launch(partial(load, error=error))
    assert caplog.text.count("has stopped") == n_starts
    # What it would have taken by its own choice is not known: vLLM's choice on most cards.
    assert re.findall(r"most (\d+)", caplog.text) == ["256", "128", "64"][: n_starts - 1]


def test_an_engine_that_does_not_start_is_left_out(launch, caplog):
    check_whole(launch(partial(load, error=GenerationError("no card")), load), 20)
    assert "engine 0 has stopped: no card" in caplog.text


def test_bad_input_of_an_engine_is_told_as_it_is_and_ends_the_others(launch):
    children = set(running_children())
    with pytest.raises(ValueError, match=r"^the adapter does not fit$"):
        launch(load, partial(load, error=ValueError("the adapter does not fit")))
    assert set(running_children()) <= children


def test_close_ends_every_process(launch):
    fleet = launch(load, load)
    list(fleet.generate(make_requests(3)))
    fleet.close()
    assert not any(map(is_running, pids(fleet)))
    with pytest.raises(GenerationError, match="closed"):
        list(fleet.generate(make_requests(1)))


@pytest.mark.parametrize("is_cpu_build", [True, False])
def test_vllm_has_a_process_of_its_own_for_each_group_of_cards(monkeypatch, is_cpu_build):
    started = []
    monkeypatch.setattr(engines, "_is_cpu_build", lambda: is_cpu_build)
    monkeypatch.setattr(engines, "card_groups", lambda n: [{"CUDA_VISIBLE_DEVICES": str(n)}] * 2)
    monkeypatch.setattr(
        "recbole_gacllm.llm.fleet.Fleet", lambda *arguments: started.append(arguments)
    )
    engines.open_generator("vllm", model_dir=Path("model"), tensor_parallel_size=2)
    [(members, *window)] = started
    assert window == ([32] if is_cpu_build else [])
    cards = [environment for environment, _ in members]
    assert cards == ([{}] if is_cpu_build else [{"CUDA_VISIBLE_DEVICES": "2"}] * 2)
    assert all(start.args[0]["model_dir"] == Path("model") for _, start in members)


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
    environments = engines.card_groups(size)
    assert environments == (
        [{"CUDA_VISIBLE_DEVICES": cards} for cards in groups] if groups else [{}]
    )
