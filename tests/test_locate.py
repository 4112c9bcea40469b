"""Names that files give stay in their folder, moved artefacts are found, readers only read."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from recbole_gacllm.artifacts import locate, manifests
from recbole_gacllm.artifacts.locate import RunFiles
from recbole_gacllm.cli.main import main
from recbole_gacllm.compare.results import Board
from recbole_gacllm.convolution import names
from recbole_gacllm.errors import GaCLLMError
from recbole_gacllm.inspection.embeddings import export_embeddings
from recbole_gacllm.inspection.reading import RunDescriptions

from .test_cli import described  # noqa: F401
from .test_export import embeddings  # noqa: F401


def snapshot(root):
    """All files below a folder: when they were changed, and their content."""
    return {
        str(path.relative_to(root)): (path.lstat().st_mtime_ns, path.read_bytes())
        for path in root.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "", ".", "..", "a/../../x", "a/../b", "link", "link/x", "\0", 3]
)
def test_a_name_that_leaves_its_folder_is_refused(tmp_path, name):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="is not a plain path in this folder"):
        locate.inside(tmp_path / "in", name)


def test_a_name_in_a_folder_is_taken_though_the_folder_is_reached_by_a_link(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "way").symlink_to(tmp_path / "in")
    assert locate.inside(tmp_path / "way", "a/b.npy") == tmp_path / "way" / "a" / "b.npy"


@pytest.mark.parametrize("place", ["layer_1.parquet", "adapter", "adapter/deep.bin", ""])
def test_links_in_an_artefact_folder_are_refused_by_name(tmp_path, place):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    link = tmp_path / "stage-1" / place
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(victim)
    with pytest.raises(GaCLLMError, match=f"{link} is a symbolic link to {victim}"):
        locate.require_no_links(tmp_path / "stage-1")
    with (
        pytest.raises(GaCLLMError, match="is a symbolic link"),
        manifests.stage_lock(tmp_path / "stage-1"),
    ):
        raise AssertionError("a stage was started in a folder with links")
    assert victim.read_text() == "mine"


@pytest.fixture
def run(described, tmp_path):  # noqa: F811
    """A run.json as the runner writes it, with the artefacts of ``described``."""
    file = tmp_path / "saved" / "runs" / "one" / "run.json"
    file.parent.mkdir(parents=True)
    artifacts = {"inputs": described.parent / "inputs-1", "descriptions": described}
    record = {
        "artifacts": {stage: str(path) for stage, path in artifacts.items()},
        "checkpoint": str(tmp_path / "saved" / "one.pth"),
    }
    file.write_text(json.dumps(record))
    return file


def commands(run, out):
    """Those that show the descriptions of a run, but for ``report``: see test_report.py."""
    return [
        ["audit", str(run)],
        ["describe", f"--run={run}", "--user=u1"],
        ["export-descriptions", f"--run={run}", f"--output={out}"],
    ]


@pytest.mark.parametrize("place", ["elsewhere/deeper/saved", "saved-copy", "another"])
@pytest.mark.parametrize("copied", [False, True])
def test_a_run_that_was_moved_or_copied_with_all_it_made_has_its_own_artefacts(
    run, tmp_path, capsys, place, copied
):
    if copied:
        shutil.copytree(tmp_path / "saved", tmp_path / place)
        for file in (tmp_path / "saved").rglob("*.parquet"):
            file.write_text("what the copy was made of has changed since")
    else:
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "saved").rename(tmp_path / place)
    out = tmp_path / "texts.csv"
    for command in commands(tmp_path / place / "runs" / "one", out):
        main(command)
    assert capsys.readouterr().out.count(str(tmp_path / place / "gacllm" / "tiny")) == 2
    assert "Likes rain." in out.read_text()


def test_a_copy_without_its_artefacts_takes_those_it_was_made_of(run, tmp_path, capsys):
    shutil.copytree(run.parent, tmp_path / "copy" / "runs" / "one")
    main(["audit", str(tmp_path / "copy" / "runs" / "one")])
    assert str(tmp_path / "saved" / "gacllm") in capsys.readouterr().out


def test_artefacts_that_were_moved_away_from_the_run_are_found_where_the_flag_says(
    run, tmp_path, capsys
):
    (tmp_path / "saved" / "gacllm").rename(tmp_path / "disk")
    for command in commands(run, tmp_path / "texts.csv"):
        with pytest.raises(SystemExit):
            main(command)
        assert "there is no" in capsys.readouterr().err
        main([*command, f"--artifact_dir={tmp_path / 'disk'}"])
    assert "Likes rain." in (tmp_path / "texts.csv").read_text()


def test_artefacts_beside_the_run_are_found_and_lost_ones_keep_their_name(tmp_path):
    run_folder = tmp_path / "received"
    (run_folder / "tiny" / "inputs-1").mkdir(parents=True)
    recorded = "/home/somebody/saved/gacllm/tiny/inputs-1"
    recorded = {"inputs": recorded, "sft": "/home/somebody/sft-1", "up": "x/../../secret"}
    (tmp_path / "secret").mkdir()
    assert RunFiles({"artifacts": recorded}, run_folder).artifacts() == {
        "inputs": run_folder / "tiny" / "inputs-1",
        "sft": Path("/home/somebody/sft-1"),
        "up": Path("../secret"),
    }


def write_job(folder, **entries):
    file = folder / "job.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def test_of_an_unfinished_folder_no_file_is_opened_that_its_job_names(
    described,  # noqa: F811
    tmp_path,
    capsys,
):
    (described / "manifest.json").unlink()
    for content in (b"my thesis", b"SQLite format 3\0" + bytes(5000)):
        document = tmp_path / "thesis.txt"
        document.write_bytes(content)
        write_job(
            described,
            store=str(document),
            options={"neighbor_rule": "rare_first", "n_neighbors": 2, "llm_n_layers": 2},
        )
        before = snapshot(tmp_path)
        main(["audit", str(described)])
        assert "layer 2 of 2 is not finished" in capsys.readouterr().out
        assert snapshot(tmp_path) == before


@pytest.mark.parametrize("inputs", ["/etc", "../../../../etc", "/x/..", "", 7, None])
def test_inputs_that_a_job_names_lie_beside_it(described, tmp_path, capsys, inputs):  # noqa: F811
    write_job(described, inputs=inputs)
    with pytest.raises(SystemExit):
        main(["audit", str(described)])
    assert capsys.readouterr().err.startswith("error: ")


def test_commands_that_read_change_nothing(run, described, tmp_path):  # noqa: F811
    folder = tmp_path / "saved" / "gacllm"
    before = snapshot(folder)
    main(["describe", "--dataset=tiny", "--item=i1"])
    main(["audit", str(described)])
    for command in commands(run, tmp_path / "texts.csv"):
        main(command)
    assert snapshot(folder) == before


def test_embeddings_of_a_moved_or_strange_folder(embeddings, tmp_path):  # noqa: F811
    root = embeddings.parent.rename(tmp_path / "tiny")
    before = snapshot(root)
    folder = root / embeddings.name
    assert len(export_embeddings(folder, 1, tmp_path / "out")) == 3
    assert snapshot(root) == before
    write_job(folder, layer_files=["/etc/../passwd", "x"])
    with pytest.raises(ValueError, match="is not a plain path"):
        export_embeddings(folder, 1, tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"text", pickle.dumps([1])])
def test_arrays_that_are_pickles_are_not_read(described, content, capsys):  # noqa: F811
    (described.parent / "inputs-1" / "graph.npz").write_bytes(content)
    with pytest.raises(SystemExit) as end:
        main(["describe", "--dataset=tiny", "--user=u1"])
    assert end.value.code == 1
    assert "graph.npz is damaged" in capsys.readouterr().err


def test_embeddings_that_are_pickles_are_not_read(embeddings, tmp_path):  # noqa: F811
    np.save(embeddings / "layer_1.npy", np.array([{}], dtype=object))
    with pytest.raises(GaCLLMError, match=r"embeddings of layer 1 .* are damaged"):
        export_embeddings(embeddings, 1, tmp_path / "out")


def test_names_of_items_are_of_the_run(run, described, capsys):  # noqa: F811
    """Two runs share the inputs; the second calls its items by another field."""
    inputs = described.parent / "inputs-1"
    old = json.loads((inputs / "item_names.json").read_text())
    files = {name: names.write_names(inputs, {**old, "i1": name}) for name in ("Drama", "Fiction")}
    record = json.loads(run.read_text())
    for name, file in files.items():
        record["artifacts"]["item_names"] = str(file)
        run.write_text(json.dumps(record))
        main(["describe", f"--run={run}", "--item=i1"])
        assert f"item i1, {name}" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "[]", '{"i1": 3}'])
def test_a_damaged_file_of_names_is_named(described, content):  # noqa: F811
    (described.parent / "inputs-1" / "item_names.json").write_text(content)
    with pytest.raises(ValueError, match=r"item_names\.json"):
        RunDescriptions(described)


def test_a_leaderboard_whose_runs_lie_elsewhere_is_refused(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "leaderboard.json").write_text(json.dumps({"runs": ["../"]}))
    with pytest.raises(ValueError, match="is not a plain path"):
        Board.read(tmp_path)
