"""Tables, the submission folder, and text embeddings in RecBole's files."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from recbole.data import create_dataset
from recbole.data.utils import data_preparation
from recbole.utils import get_model

from recbole_gacllm.artifacts import manifests
from recbole_gacllm.cli.main import main
from recbole_gacllm.compare.degrees import ItemHits, to_npz
from recbole_gacllm.compare.results import Board, summarize
from recbole_gacllm.compare.submission import write_submission
from recbole_gacllm.compare.tables import export, to_latex, to_markdown
from recbole_gacllm.convolution.layers import Layer
from recbole_gacllm.errors import GaCLLMError
from recbole_gacllm.inspection.embeddings import export_embeddings, find_embeddings
from recbole_gacllm.run_config import build_config

USERS = [f"u{n}" for n in range(30)]
CONFIG = {
    "eval_args": {
        "split": {"RS": [0.8, 0.1, 0.1]},
        "order": "RO",
        "group_by": "user",
        "mode": {"valid": "full", "test": "full"},
    },
    "val_interval": {"rating": "[3,inf)"},
    "epochs": 1,
    "user_inter_num_interval": "[0,inf)",
    "valid_metric": "NDCG@10",
}
DEGREES = to_npz({"user": {}, "item": {}}, USERS, ["i1"], ItemHits(2, 1))
PARTS = ("train", "valid", "test")
MEANS = {"GaCLLM": 0.31, "Pop_2": 0.11, "EASE": 0.33}


@pytest.fixture
def board(tmp_path):
    """Three models, two seeds, two metrics; a fourth model failed. No run is needed for tables."""
    rng = np.random.default_rng(1)
    folder = tmp_path / "board"
    names = [f"tiny-{model}-{seed}-0" for seed in (2020, 2021) for model in MEANS]
    for run in (folder / "runs" / name for name in [*names, "tiny-NCL-2020-0"]):
        run.mkdir(parents=True)
    for name in names:
        _, model, seed, _ = name.split("-")
        values = {
            "ndcg@10": (MEANS[model] + rng.normal(0, 0.02, 30)).clip(0, 1),
            "averagepopularity@10": 10 * MEANS[model] + rng.random(30),
        }
        hashes = [hashlib.sha256(f"{part}{seed}".encode()).hexdigest() for part in PARTS]
        record = {
            "model": model,
            "dataset": "tiny",
            "seed": int(seed),
            "test": {metric: round(float(v.mean()), 4) for metric, v in values.items()},
            "valid": {},
            "seconds": {"total": 1.0 + int(seed) % 2, "train": 0.5},
            "device": "cpu",
            "versions": {"recbole": "1.2.1"},
            "config": CONFIG,
            "code": {"version": "0", "commit": None},
            "split": dict(zip(PARTS, hashes, strict=True))
            | {"n_train": 80, "n_valid": 10, "n_test": 10},
            "statistics": {"n_users": 30, "n_items": 20, "n_interactions": 100},
        }
        if model == "GaCLLM":
            layers = [{"n_prompt_tokens": 100, "n_output_tokens": 7}] * 2
            record["stages"] = {"descriptions": {"layers": layers}}
            record["leakage_audit"] = {"leaks": 0}
        run = folder / "runs" / name
        (run / "run.json").write_text(json.dumps(record))
        np.savez(run / "per_user.npz", users=np.array(USERS), **values)
        (run / "degrees.npz").write_bytes(DEGREES)
    error = {"model": "NCL", "dataset": "tiny", "seed": 2020, "error": "no\nfaiss", "log": "l.txt"}
    (folder / "runs" / "tiny-NCL-2020-0" / "failed.json").write_text(json.dumps(error))
    models, untuned = [*MEANS, "NCL"], {"files": {}, "values": {}, "given": {"epochs": "1"}}
    tuned = {
        "files": {"properties/baselines/EASE.yaml": "Tried: 1 and 7."},
        "values": {"reg_weight": 7.0},
        "given": {"epochs": "1"},
    }
    plan = {
        "models": models,
        "n_seeds": dict.fromkeys(models, 2),
        "datasets": ["tiny"],
        "seeds": [2020, 2021],
        "protocol": "general",
        "given": {"epochs": "1", "worker": "1"},
        "config_files": [],
        "nproc": 1,
        "tuned": {f"tiny/{model}": untuned for model in models} | {"tiny/EASE": tuned},
        "properties": {"tiny": CONFIG},
        "smaller_is_better": ["averagepopularity"],
        "runs": [*names, "tiny-NCL-2020-0"],
        "code": {"version": "0", "digest": "d", "commit": None},
    }
    (folder / "leaderboard.json").write_text(json.dumps(plan))
    return folder


def edit(file, **changes):
    """Change keys of a JSON file by functions of their values."""
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {key: f(content[key]) for key, f in changes.items()}))


def page_of(board):
    read = Board.read(board)
    return to_markdown(summarize(read), read, "tiny")


def cells(markdown, model):
    line = next(line for line in markdown.splitlines() if line.startswith(f"| **{model}**"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_page_has_the_sections_of_a_recbole_gnn_page(board):
    page = page_of(board)
    heads = [line[2:] for line in page.splitlines() if line.startswith("# ")]
    assert heads[:3] == ["Experimental Setting", "Dataset Statistics", "Evaluation Results"]
    assert heads[3:5] == ["Results by Degree", "Hyper-parameters"]
    assert "**Filtering:** val_interval: {'rating': '[3,inf)'}\n" in page
    assert "ratio-based 0.8:0.1:0.1, random order, full sort; grouped by user" in page
    assert "| tiny    | 30     | 20     | 100           | 83.33%   |" in page
    assert "NDCG@10" in page
    assert "reg_weight=7.0<br/>epochs=1" in page
    assert "- `properties/baselines/EASE.yaml`: Tried: 1 and 7.\n" in page
    assert "worker" not in page.partition("# Cost")[0]
    assert "- NCL, seed 2020: `no faiss`" in page


def test_best_is_bold_and_second_underlined_in_the_direction_of_the_metric(board):
    page = page_of(board)
    assert cells(page, "EASE")[1].startswith("**0.3")
    assert cells(page, "GaCLLM")[1].startswith("<u>0.3")
    assert cells(page, "Pop_2")[2].startswith("**1.")  # less popular is better
    assert " ± 0.00" in cells(page, "EASE")[1]


def test_every_model_is_tested_against_the_chosen_baseline(board):
    first = summarize(Board.read(board))["datasets"]["tiny"]
    assert first["baseline"] == "GaCLLM"
    assert first["models"]["GaCLLM"]["metrics"]["ndcg@10"]["test"] is None
    chosen = summarize(Board.read(board), "EASE")["datasets"]["tiny"]
    test = chosen["models"]["Pop_2"]["metrics"]["ndcg@10"]["test"]
    assert test["difference"] == pytest.approx(-0.22, abs=0.02)
    assert test["t_p_holm"] < 0.001
    with pytest.raises(ValueError, match="baseline: 'BPR' is not one of the models"):
        summarize(Board.read(board), "BPR")


def test_latex_is_a_booktabs_table_with_escaped_names(board):
    text = to_latex(summarize(Board.read(board), "EASE"), "tiny")
    for piece in ("\\toprule", "\\midrule", "\\bottomrule", "\\textbf{0.3", "\\underline{0.3"):
        assert piece in text
    assert "Pop\\_2 & " in text
    assert "$^\\dagger$" in text
    assert text.count(" \\\\\n") == 4


def rows_of(file):
    with file.open() as lines:
        return list(csv.DictReader(lines))


def test_csv_and_json_hold_the_same_numbers(board):
    export(board)
    tables = json.loads((board / "results.json").read_text())["datasets"]["tiny"]["models"]
    rows = rows_of(board / "results.csv")
    assert len(rows) == 6
    for row in rows:
        cell = tables[row["model"]]["metrics"][row["metric"]]
        assert float(row["mean"]) == pytest.approx(cell["mean"], abs=1e-6)
        assert row["n_seeds"] == "2"
        if cell["test"]:
            assert float(row["t_p"]) == pytest.approx(cell["test"]["t_p"])
    rows = rows_of(board / "runs.csv")
    assert [f"tiny-{row['model']}-{row['seed']}-0" for row in rows] == [
        run.name for run in Board.read(board).runs
    ]
    for row in rows:
        run = board / "runs" / f"tiny-{row['model']}-{row['seed']}-0" / "run.json"
        record = json.loads(run.read_text())
        assert float(row["test_ndcg@10"]) == record["test"]["ndcg@10"]
        assert float(row["seconds_total"]) == record["seconds"]["total"]


def test_the_figure_lies_beside_the_page(board):
    files = [file.relative_to(board).as_posix() for file in export(board)]
    assert files[-4:] == [f"results/tiny.{kind}" for kind in ("md", "tex", "svg", "png")]
    text = (board / "results" / "tiny.svg").read_text("utf-8")
    for part in ("Pop_2", "EASE", "NDCG@10, mean and 95", "Test results on tiny, general protocol"):
        assert part in text


def test_costs_are_means_over_runs(board):
    page = page_of(board).partition("# Cost")[2]
    assert cells(page, "GaCLLM") == ["**GaCLLM**", "2", "1.5", "0.5", "200", "14"]
    assert cells(page, "EASE")[4:] == ["0", "0"]
    assert "leaderboard --models=GaCLLM,Pop_2,EASE,NCL --datasets=tiny --seeds=2" in page


def test_a_row_with_fewer_seeds_is_named_and_the_command_keeps_its_number(board):
    edit(
        board / "leaderboard.json",
        runs=lambda runs: [run for run in runs if run != "tiny-EASE-2021-0"],
        n_seeds=lambda numbers: {**numbers, "EASE": 1},
    )
    page = page_of(board)
    note = "(EASE 1: the first ones, not ranked; each test is on the seeds that both have)."
    assert f"of 2 seeds {note}" in page
    assert "EASE:seeds=1," in page
    assert not any("**" in cell or "<u>" in cell for cell in cells(page, "EASE")[1:])
    assert any("**" in cell for cell in cells(page, "GaCLLM")[1:])
    assert "GaCLLM:seeds" not in page


def test_a_board_without_results_says_where_to_look(board):
    edit(board / "leaderboard.json", runs=lambda runs: runs[-1:])
    with pytest.raises(ValueError, match=r"no run has finished. Logs: l\.txt"):
        export(board)


def test_the_submission_holds_what_a_maintainer_needs_and_its_checksums_hold(board):
    folder = write_submission(board)
    sums = dict(reversed(line.split("  ")) for line in (folder / "SHA256SUMS").open())
    files = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}
    assert {name.strip() for name in sums} == files - {"SHA256SUMS"}
    for name, digest in sums.items():
        assert hashlib.sha256((folder / name.strip()).read_bytes()).hexdigest() == digest
    read = {file.stem: json.loads(file.read_text()) for file in folder.glob("*.json")}
    assert read["costs"]["tiny-GaCLLM-2020-0"]["tokens"] == {
        "descriptions.n_prompt_tokens": 200,
        "descriptions.n_output_tokens": 14,
    }
    assert read["leakage_audit"]["tiny-GaCLLM-2021-0"] == {"leaks": 0}
    assert read["environment"]["packages"]["recbole"] == "1.2.1"
    assert (folder / "runs" / "tiny-EASE-2020-0" / "config.yaml").is_file()
    assert "--models=GaCLLM,Pop_2,EASE,NCL" in (folder / "README.md").read_text()


def test_nothing_is_exported_when_splits_differ(board):
    run_file = board / "runs" / "tiny-EASE-2020-0" / "run.json"
    edit(run_file, split=lambda split: {**split, "train": "0"})
    with pytest.raises(GaCLLMError, match=r"tiny-GaCLLM-2020-0 and tiny-EASE-2020-0 differ"):
        write_submission(board)
    assert not (board / "submission").exists()


@pytest.fixture
def embeddings(tmp_path):
    """Finished embeddings of the data set ``tiny`` as the stage leaves them: two layers."""
    root = tmp_path / "saved" / "gacllm" / "tiny"
    inputs, folder = root / "inputs-1", root / "embeddings-1"
    inputs.mkdir(parents=True)
    folder.mkdir()
    tokens = {"user": [f"u{n}" for n in range(24)], "item": [f"i{n}" for n in range(30)]}
    texts = {side: ["text"] * len(names) for side, names in tokens.items()}
    Layer.raw(tokens, texts).write(inputs / "layer_0.parquet")
    for layer in (0, 1):
        vectors = np.random.default_rng(layer).normal(size=(54, 8)).astype(np.float16)
        np.save(folder / f"layer_{layer}.npy", vectors)
    files = [str(inputs / "layer_0.parquet"), str(root / "descriptions-1" / "layer_1.parquet")]
    (folder / "job.json").write_text(json.dumps({"layer_files": files}))
    manifests.write_manifest(folder, {"stage": "embeddings"})
    return folder


def test_recbole_loads_exported_embeddings_and_another_model_trains_on_them(
    embeddings, settings, dataset_root
):
    main(["export-embeddings", "--dataset=tiny", "--layer=1", f"--output={dataset_root / 'tiny'}"])
    settings["load_col"] = {
        **settings["load_col"],
        "useremb": ["uid", "user_emb"],
        "itememb": ["iid", "item_emb"],
    }
    config = build_config("BPR", "tiny", [dataset_root / "tiny" / "tiny-emb.yaml"], settings)
    dataset = create_dataset(config)
    vectors = np.load(embeddings / "layer_1.npy").astype(np.float32)
    items = dataset.get_preload_weight("iid")
    assert items.shape == (dataset.item_num, 8)
    for token in ("i0", "i17", "i29"):
        row = items[dataset.token2id("item_id", token)]
        np.testing.assert_allclose(row, vectors[24 + int(token[1:])], rtol=1e-5)
    users = dataset.get_preload_weight("uid")
    np.testing.assert_allclose(users[dataset.token2id("user_id", "u3")], vectors[3], rtol=1e-5)

    train, _, _ = data_preparation(config, dataset)
    model = get_model("BPR")(config, train.dataset)
    model.item_embedding.weight.data.copy_(
        model.item_embedding.weight.new_tensor(train.dataset.get_preload_weight("iid"))
    )
    loss = model.calculate_loss(next(iter(train)))
    loss.backward()
    assert model.item_embedding.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("layer", [-1, 2])
def test_a_layer_that_is_not_there_is_refused(embeddings, tmp_path, layer):
    with pytest.raises(ValueError, match="is not one of 0 to 1"):
        export_embeddings(embeddings, layer, tmp_path)


def test_embeddings_of_a_data_set_without_any_say_what_to_do(tmp_path, fails):
    flags = ["--dataset=none", "--layer=0", f"--output={tmp_path}"]
    assert "Run GaCLLM on it first" in fails("export-embeddings", *flags)
    assert not list(Path(tmp_path).glob("*.useremb"))


def test_the_newest_embeddings_that_have_the_layer_are_exported(embeddings):
    """A later run with raw texts, such as an ablation's, has layer 0 alone."""
    raw = embeddings.parent / "embeddings-raw"
    raw.mkdir()
    (raw / "layer_0.npy").write_bytes((embeddings / "layer_0.npy").read_bytes())
    manifests.write_manifest(raw, {"stage": "embeddings"})
    artifact_dir = embeddings.parent.parent
    assert find_embeddings(artifact_dir, "tiny", None, 0) == raw
    assert find_embeddings(artifact_dir, "tiny", None, 1) == embeddings
    with pytest.raises(ValueError, match="layer: 2 is in none of 2 text embeddings of 'tiny'"):
        find_embeddings(artifact_dir, "tiny", None, 2)
