"""The scripts of ``examples/``, on small data."""

import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from recbole_gacllm.artifacts import children
from recbole_gacllm.compare import job
from tests.conftest import ROOT, run_stage


def child(name, folder, module="recbole_gacllm.stage"):
    """Runs and stages in this process: no interpreter for each."""
    job._work(folder) if module == "recbole_gacllm.compare.job" else run_stage(name, folder)


@pytest.fixture
def start(monkeypatch, capsys):
    """Runs a script in an empty folder; what it printed."""
    monkeypatch.setattr(children, "run_child", child)

    def started(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        return capsys.readouterr().out

    return started


@pytest.fixture
def tiny(settings):
    """The arguments of a leaderboard's script."""
    names = ("data_path", "artifact_dir", "use_gpu", "epochs", "embedding_size")
    return ["dataset=tiny", *(f"{name}={settings[name]}" for name in names)]


def test_own_csv(start, tmp_path):
    rng = np.random.default_rng(1)
    bought = [
        {"customer": f"c{user}", "sku": f"p{item}"}
        for user in range(30)
        for item in rng.choice(20, size=10, replace=False)
    ]
    pd.DataFrame(bought).to_csv(tmp_path / "purchases.csv", index=False)
    names = [f"Lamp number {item} in {['red', 'blue'][item % 2]}" for item in range(20)]
    products = pd.DataFrame({"sku": [f"p{item}" for item in range(20)], "name": names})
    products.to_csv(tmp_path / "products.csv", index=False)
    printed = start("own_csv.py", tmp_path / "purchases.csv", tmp_path / "products.csv")
    assert "ndcg@10" in printed
    assert printed.count("somebody new") == 5
    assert "from_linear" in printed
    lists = pd.read_csv(tmp_path / "lists.csv")
    assert set(lists["user"]) == {row["customer"] for row in bought}
    assert (lists.groupby("user").size() == 5).all()
    assert lists["title"].str.startswith("Lamp number").all()


def test_leaderboard(start, tiny, tmp_path):
    printed = start("leaderboard.py", *tiny)
    assert printed.count("NDCG@10") == 3
    assert printed.count("to Pop, p = ") == 2
    for kind in ("md", "tex", "svg", "png"):
        assert (tmp_path / "saved" / "leaderboard" / "results" / f"tiny.{kind}").is_file()


@pytest.mark.parametrize(
    ("script", "rows"),
    [
        (
            "ablation.py",
            ["no text", "texts of wrong nodes", "no alignment", "no linear model"],
        ),
        ("sasrec_from_texts.py", ["begins as texts", "texts stay frozen", "begins as wrong texts"]),
    ],
)
def test_a_comparison_tells_what_each_row_differs_by(start, tiny, tmp_path, script, rows):
    printed = start(script, *tiny)
    assert all(re.search(rf"{row} +0\.\d+ +-?0\.\d+ ", printed) for row in rows)
    results = pd.read_csv(tmp_path / "saved" / script[:-3] / "results.csv")
    assert results.query("metric == 'ndcg@10'")["mean"].is_unique


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_texts_of_an_api_are_layer_1(start, tiny, tmp_path, ending):
    with pytest.raises(SystemExit, match=r"^$"):  # exit code 0
        start("api_texts.py", *tiny)
    questions = [json.loads(line) for line in Path("questions.jsonl").read_text().splitlines()]
    assert all(f"The Great Film {row['id'][1:]};" in row["question"] for row in questions)
    answers = [{"id": row["id"], "text": f"A film, no. {row['id']}."} for row in questions[1:]]
    answers.append({"id": "007", "text": "Nobody knows it."})
    frame = pd.DataFrame(answers)
    file = tmp_path / f"answers.{ending}"
    if ending == "csv":
        frame.to_csv(file, index=False)
    else:
        frame.to_json(file, orient="records", lines=True)
    printed = start("api_texts.py", file, *tiny)
    assert "texts of 29 of 30 items; 1 unknown ids" in printed
    rows = ["raw texts", "both at wrong nodes", "no text"]
    assert all(re.search(rf"(?m)^ *{row} +0\.\d+ +-?0\.\d+ ", printed) for row in rows)
    made = pd.concat(map(pd.read_parquet, tmp_path.glob("artifacts/tiny/desc*/layer_1.parquet")))
    assert made.query("status == 'imported'")["text"].tolist() == [
        row["text"] for row in answers[:-1]
    ]
