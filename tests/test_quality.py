"""The figures of a layer on texts whose figures are known, and the command that prints them."""

import json
import random

import numpy as np
import pytest

from recbole_gacllm.artifacts import manifests
from recbole_gacllm.cli.main import main
from recbole_gacllm.convolution.graph import TrainGraph
from recbole_gacllm.convolution.layers import Layer, layer_files
from recbole_gacllm.inspection import quality
from recbole_gacllm.inspection.quality import _languages, layer_qualities
from recbole_gacllm.inspection.reading import RunDescriptions

REPORT = {
    **{"n_nodes": 7, "n_generated": 6, "n_from_store": 1, "n_duplicates": 4, "n_retried": 2},
    **{"n_failed": 1, "n_truncated": 3, "n_prompt_tokens": 700, "n_cached_tokens": 80},
    **{"n_output_tokens": 90, "seconds": 12.0},
}
TOKENS = {"user": ["u1", "u2", "u3"], "item": ["i1", "i2", "i3", "i4"]}


@pytest.fixture
def folder(tmp_path):
    """Finished descriptions of three users and four items whose figures are easily counted."""
    inputs, folder = tmp_path / "tiny" / "inputs-1", tmp_path / "tiny" / "descriptions-1"
    inputs.mkdir(parents=True)
    folder.mkdir()
    users, items = (np.array(TOKENS[side]) for side in ("user", "item"))
    graph = TrainGraph(users, items, np.array([0, 0, 1, 2]), np.array([0, 1, 2, 3]))
    graph.save(inputs / "graph.npz")
    raw = {"user": ["A nurse.", "A cook.", "A pilot."], "item": ["Rain.", "Sun.", "Fog.", "Ice."]}
    Layer.raw(TOKENS, raw).write(inputs / "layer_0.parquet")
    texts = {
        "user": ["Likes Rain Man and more.", "Fog", "A pilot."],
        "item": ["Rain Man is wet.", "Дождь и снег.", "Wet and grey.", "wet and grey"],
    }
    above = Layer.raw(TOKENS, texts)
    above.statuses = {"user": ["generated", "generated", "failed"], "item": ["generated"] * 4}
    above.reasons["user"][2] = "echo"
    above.write(folder / "layer_1.parquet")
    names = {"i1": "Rain Man", "i2": "Sun Valley", "i3": "Fog Land", "i4": "Ice"}
    (inputs / "item_names.json").write_text(json.dumps(names))
    options = {"neighbor_rule": "rare_first", "n_neighbors": 2, "llm_n_layers": 2}
    job = {"inputs": str(inputs), "seed": 1, "options": options}
    (folder / "job.json").write_text(json.dumps(job))
    manifests.write_manifest(folder, {"stage": "descriptions", "layers": [REPORT]})
    return folder


def change_layer(folder, **sides):
    """Write layer 1 with other texts or statuses."""
    layer = Layer.read(folder / "layer_1.parquet")
    for name, values in sides.items():
        getattr(layer, name).update(values)
    layer.write(folder / "layer_1.parquet")


def write_run(folder, tmp_path, stage="descriptions", **record):
    """A run.json with the artefacts; returns the folder of it."""
    record = {"artifacts": {stage: str(folder)}, **record}
    (tmp_path / "run.json").write_text(json.dumps(record))
    return str(tmp_path)


def test_figures_of_a_layer_are_those_counted_by_hand(folder):
    [layer] = layer_qualities(RunDescriptions(folder), n_samples=10, seed=0)
    users, items = layer.sides["user"], layer.sides["item"]
    assert layer.report["n_retried"] == 2
    assert users.statuses == {"generated": 2, "failed": 1}
    assert users.failures == {"echo": 1}
    # "A pilot." is carried over, not a copy; "Fog" is what u2's neighbour said.
    assert (users.own_copies, users.neighbor_copies) == (0.0, 1 / 3)
    # One of two generated texts names a neighbour; "Ice" is too short a name to count.
    assert (users.neighbor_names, users.own_names) == (0.5, None)
    assert (items.own_names, items.neighbor_names) == (0.25, None)
    assert items.repeated == 0.5
    assert items.scripts == {"LATIN": 0.75, "CYRILLIC": 0.25}
    assert items.languages["ru"] == 0.25
    assert sum(items.languages.values()) == 1
    assert users.n_words == {"min": 1, "p10": 1, "median": 2, "p90": 5, "max": 5}
    # likes rain man and more / fog / a pilot: 8 words, all different; 5 pairs, all different.
    assert users.distinct == (1.0, 1.0)
    # rain man is wet / дождь и снег / wet and grey twice: 13 words, 9 different; 9 pairs, 7.
    assert items.distinct == (9 / 13, 7 / 9)


def test_samples_are_generated_texts_and_the_seed_draws_them(folder):
    found = RunDescriptions(folder)
    [layer] = layer_qualities(found, n_samples=10, seed=0)
    assert [sample.node for sample in layer.sides["user"].samples] == ["user u1", "user u2"]
    assert layer.sides["user"].samples[0].below == "A nurse."
    assert layer.sides["user"].samples[0].n_neighbors == 2
    draws = {
        next(layer_qualities(found, n_samples=1, seed=seed)).sides["item"].samples[0].node
        for seed in range(20)
    }
    assert len(draws) > 1


def test_every_figure_and_the_leakage_audit_of_the_run_are_printed(folder, tmp_path, capsys):
    run = write_run(folder, tmp_path, leakage_audit={"n_pairs": 5, "edges_in_graph": 0})
    main(["audit", run, "--json", str(tmp_path / "audit.json")])
    out = capsys.readouterr().out
    for words in (
        "6 prompts, 1 from the store, 4 nodes with the prompt of another",
        "2 retried, 1 nodes failed, 3 cut by the length limit",
        "700 in (80 from the prefix cache), 90 out, 12 s",
        "echo 1",
        "LATIN 75.0%, CYRILLIC 25.0%",
        "ru 25.0%",
        "0.0% of the own text below, 33.3% of a neighbour's",
        "user u1, 2 neighbours: A nurse.",
        "→ Likes Rain Man and more.",
        "leakage audit n_pairs 5, edges_in_graph 0",
    ):
        assert words in out
    written = json.loads((tmp_path / "audit.json").read_text())
    assert written["layers"][0]["sides"]["item"]["own_names"] == 0.25


def test_languages_are_told_apart_and_a_text_without_letters_has_none():
    texts = [
        "This person enjoys a mix of comedy and drama.",
        "Cette personne aime les comédies et les drames.",
        "Diese Person mag Komödien und Dramen.",
        "这个人喜欢喜剧和戏剧。",
        "1995 – 7!",
    ]
    languages = _languages(texts, random.Random(0))
    assert languages == dict.fromkeys(("en", "fr", "de", "zh", "none"), 0.2)


def test_the_five_most_frequent_languages_and_the_start_of_a_long_text_are_printed(folder, capsys):
    change_layer(folder, texts={"item": ["Repeat this forever. " * 5_000, "a", "b", "c"]})
    main(["audit", str(folder)])
    assert len(capsys.readouterr().out) < 5_000
    shares = dict.fromkeys(("en", "fr", "de", "it", "es", "nl", "sv", "da"), 0.125)
    shown = "en 12.5%, fr 12.5%, de 12.5%, it 12.5%, es 12.5%, others 37.5%"
    assert quality._shares(shares) == shown


def test_of_imported_layers_it_is_said_how_many_texts_come_from_where(folder, capsys):
    statuses = {"user": ["imported", "imported", "missing"], "item": ["imported"] * 4}
    change_layer(folder, statuses=statuses)
    report = {"imported": True, "n_imported": 6, "n_missing": 1, "n_unknown": 3}
    manifests.write_manifest(folder, {"stage": "descriptions", "layers": [report]})
    main(["audit", str(folder)])
    out = capsys.readouterr().out
    assert "imported        6 nodes, 1 missing, 3 rows about unknown nodes" in out
    assert "statuses      imported 2, missing 1" in out
    assert "→ Likes Rain Man and more." in out


def test_a_descriptions_folder_is_taken_and_anything_else_refused(folder, tmp_path, capsys, fails):
    main(["audit", str(folder)])
    assert "layer 1" in capsys.readouterr().out
    assert "none is not a file" in fails("audit", tmp_path / "none")
    assert "is not a file" in fails("audit", tmp_path)
    for content, why in (
        ("{", "is not the record of a run"),
        ("[]", "is not the record of a run"),
        ('{"model": "LightGCN"}', "had no texts"),
    ):
        (tmp_path / "run.json").write_text(content)
        assert why in fails("audit", tmp_path)
    embeddings = folder.parent / "embeddings-1"
    embeddings.mkdir()
    manifests.write_manifest(embeddings, {"stage": "embeddings"})
    assert "the folder of the stage embeddings" in fails("audit", embeddings)


def test_a_run_on_raw_texts_shows_layer_0(folder, tmp_path, capsys):
    inputs = folder.parent / "inputs-1"
    manifests.write_manifest(inputs, {"stage": "inputs"})
    run = write_run(inputs, tmp_path, "inputs")
    main(["describe", "--run", run, "--user", "u2"])
    out = capsys.readouterr().out
    assert "layer 0 (raw)\n  A cook.\n" in out
    assert "neighbours" not in out
    main(["export-descriptions", "--run", run, "--output", str(tmp_path / "x.csv")])
    assert "7 descriptions" in capsys.readouterr().out
    main(["audit", run])
    assert "no LLM wrote anything" in capsys.readouterr().out


def test_layer_0_of_a_data_set_is_shown_only_where_no_descriptions_were_begun(
    folder, capsys, fails
):
    manifests.write_manifest(folder.parent / "inputs-1", {"stage": "inputs"})
    (folder / manifests.MANIFEST_FILE).unlink()
    place = [f"--artifact_dir={folder.parent.parent}", "--dataset=tiny", "--item=i1"]
    assert "no finished descriptions" in fails("describe", *place)
    (folder / "job.json").unlink()
    (folder / "layer_1.parquet").unlink()
    folder.rmdir()
    main(["describe", *place])
    assert "item i1, Rain Man: 1 training interactions" in capsys.readouterr().out


def test_of_a_killed_run_its_finished_layers_are_shown_and_how_far_it_is(folder, tmp_path, capsys):
    (folder / manifests.MANIFEST_FILE).unlink()  # written last
    main(["audit", str(folder), "--json", str(tmp_path / "audit.json")])
    first, second = capsys.readouterr().out.split("layer 2 of 2 is not finished")
    assert "→ Likes Rain Man and more." in first
    assert "start the run again: it goes on with what is missing" in second
    written = json.loads((tmp_path / "audit.json").read_text())
    assert [layer["number"] for layer in written["layers"]] == [1]
    assert written["unfinished"] == {"number": 2, "n_layers": 2, "n_nodes": 7}


def test_of_a_run_that_was_killed_in_its_first_layer_this_is_said(folder, capsys):
    (folder / manifests.MANIFEST_FILE).unlink()
    (folder / "layer_1.parquet").rename(folder / "layer_2.parquet")  # the one below was lost
    main(["audit", str(folder)])
    out = capsys.readouterr().out
    assert "layer 1 of 2 is not finished" in out
    assert "samples" not in out
    assert not (folder.parent.parent / "store.sqlite").exists()


def test_what_needs_all_layers_says_that_a_killed_run_goes_on(folder, tmp_path, fails):
    (folder / manifests.MANIFEST_FILE).unlink()
    with pytest.raises(ValueError, match="are not finished yet: start the run, or start it again"):
        RunDescriptions.of_run(folder)
    (folder / manifests.JOB_FILE).unlink()
    assert "are not there" in fails("audit", write_run(folder, tmp_path))


def test_the_tenth_layer_comes_after_the_ninth(tmp_path):
    for number in (10, 2, 1, 9):
        (tmp_path / f"layer_{number}.parquet").touch()
    numbers = [file.stem for file in layer_files(tmp_path)]
    assert numbers == ["layer_1", "layer_2", "layer_9", "layer_10"]


def test_a_copy_counts_behind_the_opening_that_a_prompt_gives(folder):
    texts = ["a nurse.", "fog", "rain and more."]
    change_layer(
        folder,
        texts={"user": [f"This person enjoys {text}" for text in texts]},
        statuses={"user": ["generated"] * 3},
    )
    [figures] = layer_qualities(RunDescriptions(folder), n_samples=2, seed=0)
    users = figures.sides["user"]
    assert (users.own_copies, users.neighbor_copies) == (1 / 3, 1 / 3)
