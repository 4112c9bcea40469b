"""The scripts of ``examples/``, on small data; ``recommend.py`` has its test in test_recommend."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def start(tmp_path, monkeypatch, capsys):
    """Runs a script in an empty folder; what it printed."""
    monkeypatch.chdir(tmp_path)

    def started(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return started


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
    lists = pd.read_csv(tmp_path / "lists.csv")
    assert set(lists["user"]) == {row["customer"] for row in bought}
    assert (lists.groupby("user").size() == 5).all()
    assert lists["title"].str.startswith("Lamp number").all()


def test_leaderboard(start, settings, tmp_path):
    names = ("data_path", "artifact_dir", "use_gpu", "epochs", "embedding_size")
    keys = [f"{name}={settings[name]}" for name in names]
    printed = start("leaderboard.py", "tiny", *keys)
    assert printed.count("NDCG@10") == 3
    assert printed.count("to Pop, p = ") == 2
    for kind in ("md", "tex", "svg", "png"):
        assert (tmp_path / "saved" / "leaderboard" / "results" / f"tiny.{kind}").is_file()
