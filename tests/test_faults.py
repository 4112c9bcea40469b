"""Full and read-only disks, damaged and foreign files, two runs at once: a correct continuation or
one clear error, and nothing lost.

The engine is deterministic, so a run that goes on must end with the results of an untouched one.
"""

import json
import logging
import os
import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from recbole_gacllm.artifacts import children
from recbole_gacllm.convolution.layers import SIDES, Layer
from recbole_gacllm.convolution.store import DescriptionStore, Record
from recbole_gacllm.errors import GaCLLMError, StoreError

from .conftest import fresh_process, run_stage
from .crash_lab import prepare
from .fake_generator import FakeGenerator
from .test_convolution import convolve, graph_of, raw_layer, templates  # noqa: F401  (fixtures)
from .test_kill_sweep import Folder
from .test_store import damage_page_of, fill, key_of

Whole = tuple[dict[str, Any], dict[str, Any], list[list[Any]]]


@pytest.fixture
def folder(place, whole):
    """A copy of the finished artefacts, in the same place, as paths are part of a job."""
    kept = place / "kept"
    if not kept.exists():
        shutil.copytree(place / "whole", kept)
    shutil.rmtree(place / "whole", ignore_errors=True)
    shutil.copytree(kept, place / "whole")
    folder = Folder(place, "whole")
    folder._check()
    yield folder
    shutil.rmtree(place / "whole")
    shutil.copytree(kept, place / "whole")


def only(folder, pattern):
    (file,) = folder.path.glob(pattern)
    return file


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file):
    os.truncate(file, file.stat().st_size * 2 // 3)


def forget(folder, stage):
    """Drop what a test changes from what may never change."""
    folder.manifests = {
        file: text for file, text in folder.manifests.items() if f"/{stage}-" not in str(file)
    }
    folder.may_train_again = stage == "sft"


@pytest.mark.parametrize(
    ("stage", "output", "damage"),
    [
        ("inputs", "graph.npz", flip_a_bit),
        ("inputs", "layer_0.parquet", flip_a_bit),
        ("sft", "adapter/adapter_model.safetensors", flip_a_bit),
        ("sft", "adapter/adapter_model.safetensors", truncate),
        ("sft", "adapter/adapter_config.json", Path.unlink),
        ("merged", "model/model.safetensors", truncate),
        ("merged", "model/config.json", flip_a_bit),
        ("descriptions", "layer_1.parquet", flip_a_bit),
        ("descriptions", "layer_2.parquet", Path.unlink),
        ("embeddings", "layer_1.npy", flip_a_bit),
        ("embeddings", "layer_2.npy", truncate),
    ],
)
@pytest.mark.slow
def test_a_damaged_output_is_found_told_and_made_again_and_no_text_is_generated_again(
    lab, folder, whole, stage, output, damage
):
    file = only(folder, f"tiny/{stage}-*/{output}")
    damage(file)
    forget(folder, stage)
    log = folder.place / "lab.log"
    start = log.stat().st_size
    ended, lines = folder.run(lab)
    assert ended["status"] == "done", ended
    assert not any(kind == "request" for _, kind, _ in lines)
    told = log.read_bytes()[start:].decode()
    assert re.search(rf"{re.escape(output)}.* in {re.escape(str(folder.path))}.*made again", told)
    assert folder.results() == whole[0]


@pytest.mark.slow
@pytest.mark.parametrize("which", ["llm_model", "encoder_model", "llm_adapter"])
def test_truncated_weights_of_the_user_are_named_before_any_stage(lab, folder, which):
    source = {
        "llm_model": folder.place / "model",
        "encoder_model": folder.place / "encoder",
        "llm_adapter": only(folder, "tiny/sft-*/adapter"),
    }[which]
    copy = folder.place / f"truncated-{which}"
    shutil.copytree(source, copy)
    truncate(next(copy.glob("*.safetensors")))
    folder.keys |= {which: str(copy)}
    ended, _ = folder.run(lab)
    assert (ended["status"], ended["type"]) == ("error", "WeightsError")
    assert re.match(rf"{re.escape(str(copy))}/\S+ is truncated or damaged: .*again", ended["error"])
    assert ended["stage"] == ""


@pytest.mark.slow
@pytest.mark.parametrize("unfinished", [False, True], ids=["manifest", "half-written folder"])
def test_a_folder_of_another_configuration_is_refused_by_what_differs(
    lab, folder, whole, unfinished
):
    other = only(folder, "tiny/descriptions-*")
    name = "job.json" if unfinished else "manifest.json"
    content = json.loads((other / name).read_text())
    content["key"] |= {"n_neighbors": 7, "llm_max_new_tokens": 9}
    (other / name).write_text(json.dumps(content))
    forget(folder, "descriptions")
    if unfinished:
        (other / "manifest.json").unlink()
    ended, lines = folder.run(lab)
    assert (ended["status"], ended["type"]) == ("error", "GaCLLMError")
    assert ended["error"].startswith(f"{other / name} is of another configuration (")
    assert "llm_max_new_tokens is 9, not 8; n_neighbors is 7, not 2" in ended["error"]
    assert f"Move {other} away or delete it" in ended["error"]
    other.rename(other.with_name("away"))
    forget(folder, "away")
    folder.manifests.clear()
    ended, lines = folder.run(lab)
    assert ended["status"] == "done"
    assert not any(kind == "request" for _, kind, _ in lines)
    shutil.rmtree(other.with_name("away"))
    assert folder.results() == whole[0]


@pytest.mark.slow
def test_a_damaged_page_of_the_store_costs_its_own_rows_and_the_next_start_makes_them_again(
    lab, folder, whole
):
    (only(folder, "tiny/descriptions-*") / "manifest.json").unlink()
    longest = max((row[0] for row in folder.rows.values()), key=len)  # a short one stands anywhere
    damage_page_of(folder.path / "store.sqlite", longest)
    before, folder.rows = folder.rows, {}
    folder.manifests.clear()
    ended, _ = folder.run(lab)
    assert (ended["status"], ended["type"]) == ("error", "StoreError")
    assert re.search(r"store\.sqlite was damaged .* Start again", ended["error"])
    kept = folder.rows
    assert 0 < len(kept) < len(before)
    assert kept.items() <= before.items()
    ended, lines = folder.run(lab)
    assert ended["status"] == "done", ended
    asked = {value for _, kind, value in lines if kind == "request"}
    assert asked == before.keys() - kept.keys()
    assert folder.results() == whole[0]


# Of each stage's writers one, and the file that a full disk is told with.
WRITERS = (
    "inputs: write .item_names",
    "inputs: write .graph.npz",
    "inputs: rename layer_0.parquet",
    "inputs: write .manifest.json",
    "inputs: write .job.json",
    "sft: write .sft.json",
    "sft: mkdir checkpoint",
    "sft: write optimizer.pt|sft: write trainer_state.json",
    "sft: rename adapter",
    "sft: write .manifest.json",
    "merged: write config.json",
    "merged: rename model",
    "descriptions: rename layer_1.parquet",
    "descriptions: write .manifest.json",
    "embeddings: write layer_0.npy.partial",
    "embeddings: write layer_1.npy.partial",
    "embeddings: rename layer_2.npy",
    "embeddings: write .manifest.json",
)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_disk_that_is_full_at_any_writer_is_one_clear_error_and_loses_nothing(place, lab, whole):
    folder = Folder(place, "full")
    hit = []
    for writer in WRITERS:
        ended, _ = folder.run(lab, full_at=writer)
        if ended["status"] == "done":
            break
        assert ended["status"] == "error", (writer, ended)
        assert ended["known"], (writer, ended)
        assert re.search(
            rf"{re.escape(str(folder.path))}.*No space left on device.*Free space.*start again",
            ended["error"],
        ), (writer, ended["error"])
        hit.append(writer)
    assert hit == list(WRITERS)
    assert folder.run(lab)[0]["status"] == "done"
    assert folder.results() == whole[0]


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of a few pages."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if not mount("-t", "tmpfs", "-o", "size=8k", "tmpfs", str(disk)):
        pytest.skip("needs the right to mount a small tmpfs")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def mount(*arguments):
    if shutil.which("mount") is None:
        return False
    return subprocess.run(["mount", *arguments], capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_on_a_real_disk_that_grows_too_slowly_every_start_is_a_clear_error_or_a_step_on(
    place, lab, whole, small_disk
):
    folder = Folder(place, "unused")
    folder.path = small_disk / "artifacts"
    folder.keys["artifact_dir"] = str(folder.path)
    kilobytes, stages = 8, set()
    while (ended := folder.run(lab)[0])["status"] != "done":
        assert ended["status"] == "error", ended
        assert ended["known"], ended
        assert re.search(
            rf"{re.escape(str(folder.path))}.*"
            "(No space left|unexpected pos|iostream error|disk is full|disk I/O error).*"
            "(ree space|Check that this user).*start again",
            ended["error"],
        ), ended
        named = re.search(r"/tiny/(\w+)-", ended["error"])
        stages.add(named[1] if named else "store")
        kilobytes = kilobytes * 3 // 2 + 8
        assert kilobytes < 64_000
        assert mount("-o", f"remount,size={kilobytes}k", str(small_disk))
    assert {"inputs", "sft"} <= stages  # what SFT frees in the end is enough for the other stages
    assert folder.results() == whole[0]

    (only(folder, "tiny/embeddings-*") / "manifest.json").unlink()
    folder.manifests.clear()
    assert mount("-o", "remount,ro", str(small_disk))
    ended, _ = folder.run(lab)
    assert (ended["status"], ended["type"]) == ("error", "ValueError")
    assert re.match("artifact_dir: .*Read-only file system.*Set artifact_dir", ended["error"])
    assert mount("-o", "remount,rw", str(small_disk))
    assert folder.run(lab)[0]["status"] == "done"
    assert folder.results() == whole[0]


def prepare_here(keys, data, log):
    logging.basicConfig(level=logging.INFO, filename=log, force=True)
    children.run_child = run_stage
    prepare(keys, data)


@pytest.mark.slow
def test_two_processes_started_on_one_folder_at_once_share_the_work(place, whole, tmp_path):
    folder = Folder(place, "shared")
    files = [tmp_path / "1.log", tmp_path / "2.log"]
    runs = [fresh_process(prepare_here, folder.keys, place / "data", log) for log in files]
    for run in runs:
        run.join()
    logs = [log.read_text() for log in files]
    assert [run.exitcode for run in runs] == [0, 0], logs
    for stage in ("sft", "merged", "descriptions", "embeddings"):
        assert sum(log.count(f"stage {stage} starts in") for log in logs) == 1, stage
        assert sum(log.count(f"stage {stage} was done before") for log in logs) == 1, stage
    assert any("waiting for another process" in log for log in logs)
    report = json.loads((only(folder, "tiny/descriptions-*") / "manifest.json").read_text())
    folder._check()
    n_answered = sum(layer["n_generated"] for layer in report["layers"])
    assert n_answered == len(folder.rows) > 0
    assert folder.results() == whole[0]


# Without a run:


@pytest.fixture
def layer():
    tokens = {"user": [f"u{n}" for n in range(9)], "item": [f"i{n}" for n in range(9)]}
    texts = {
        side: [f"{token} enjoys {random.Random(token).random()} films" for token in tokens[side]]
        for side in SIDES
    }
    return Layer.raw(tokens, texts)


def test_no_changed_byte_of_a_layer_file_is_read_as_another_text(layer, tmp_path):
    file = tmp_path / "layer_1.parquet"
    layer.write(file)
    content = file.read_bytes()
    n_found = 0
    for position in random.Random(3).sample(range(len(content)), 300):
        changed = bytearray(content)
        changed[position] ^= 1 << random.Random(position).randrange(8)
        file.write_bytes(changed)
        try:
            found = Layer.read(file)
        except GaCLLMError:
            n_found += 1
        else:
            assert found.digest() == layer.digest(), position
    assert n_found > 100


def test_the_text_that_another_run_stored_first_is_the_one_that_counts(convolve, tmp_path):  # noqa: F811
    def answer(request):
        first = Record(request.id, "Another run was first.", "ok", "", "stop", 1, 0, 4, 1)
        with DescriptionStore(tmp_path / "store.sqlite") as store:
            store.put_many([first])
        return "This answer came a moment later, from another batch."

    graph = graph_of()
    layer, _, _ = convolve(graph, raw_layer(graph), FakeGenerator(answer=answer))
    assert {text for side in SIDES for text in layer.texts[side]} == {"Another run was first."}


def test_a_damaged_store_is_told_by_its_damage_also_to_a_caller_that_writes_once_more(tmp_path):
    file = tmp_path / "store.sqlite"
    fill(file, 200)
    damage_page_of(file, "description 100 ")
    store = DescriptionStore(file)
    for _ in range(2):
        with pytest.raises(StoreError, match=r"was damaged .* Start again"):
            store.get_many([key_of(n) for n in range(200)])
