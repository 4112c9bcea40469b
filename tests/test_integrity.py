"""Finished folders: a check changes nothing, and only what a stage makes is ever removed."""

import json

import pytest

from recbole_gacllm.artifacts import manifests
from recbole_gacllm.errors import GaCLLMError

KEY = {"n": 1}
OUTPUTS = ["layer_1.parquet", "adapter"]


@pytest.fixture
def folder(tmp_path):
    """A finished stage folder among other artefacts."""
    (tmp_path / "inputs-1").mkdir()
    (tmp_path / "inputs-1" / "graph.npz").write_text("graph")
    folder = tmp_path / "stage-1"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "weights").write_text("weights")
    (folder / "layer_1.parquet").write_text("texts")
    (folder / "own.txt").write_text("of the user")
    write_manifest(folder, manifests.digests(folder, OUTPUTS))
    return folder


def write_manifest(folder, files):
    manifests.write_manifest(folder, {"stage": "x", "key": KEY, "files": files})


def names(root):
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def test_a_whole_folder_is_finished(folder):
    assert manifests.finished(folder, KEY, OUTPUTS)


@pytest.mark.parametrize(
    "name",
    ["../inputs-1/graph.npz", "..", ".", "/", "own.txt", "adapter/../../inputs-1", "../x/y", ""],
)
def test_a_manifest_that_names_other_files_deletes_none_of_them(folder, name):
    files = manifests.digests(folder, OUTPUTS) | {name: "0" * 64}
    write_manifest(folder, files)
    before = names(folder.parent)
    assert not manifests.finished(folder, KEY, OUTPUTS)
    assert names(folder.parent) == before
    manifests.discard_damaged(folder, OUTPUTS)
    gone = before - names(folder.parent)
    assert gone <= {"stage-1/manifest.json", "stage-1/adapter", "stage-1/adapter/weights"}
    assert "stage-1/manifest.json" in gone


def test_what_is_damaged_is_removed_when_it_is_made_again_and_not_before(folder):
    (folder / "adapter" / "weights").write_text("other")
    before = names(folder)
    assert not manifests.finished(folder, KEY, OUTPUTS)
    assert names(folder) == before
    manifests.discard_damaged(folder, OUTPUTS)
    assert names(folder) == {"layer_1.parquet", "own.txt"}


def test_a_half_written_folder_loses_nothing(folder):
    (folder / "manifest.json").unlink()
    before = names(folder)
    manifests.discard_damaged(folder, OUTPUTS)
    assert names(folder) == before


@pytest.mark.parametrize("files", [["../x"], "x", 3, None])
def test_a_manifest_whose_digests_are_none_is_not_finished(folder, files):
    write_manifest(folder, files)
    assert not manifests.finished(folder, KEY, OUTPUTS)
    manifests.discard_damaged(folder, OUTPUTS)
    assert (folder / "layer_1.parquet").is_file()


@pytest.mark.parametrize("key", [[1], "x", 7])
def test_a_key_that_is_no_mapping_does_not_end_in_a_traceback(folder, key):
    manifest = json.loads((folder / "manifest.json").read_text()) | {"key": key}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert manifests.finished(folder, KEY, OUTPUTS)


def test_a_folder_of_other_settings_is_refused(folder):
    with pytest.raises(GaCLLMError, match="n is 1, not 2"):
        manifests.finished(folder, {"n": 2}, OUTPUTS)
