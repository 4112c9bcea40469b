"""Results by degree: what a run stores, and the tables made of it."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
import torch

from recbole_gacllm import run as runner
from recbole_gacllm.compare.degrees import ItemHits, by_degree, section
from recbole_gacllm.compare.job import Recorder


def test_an_item_is_found_where_it_is_among_the_first_k():
    hits = ItemHits(5, k=2)
    scores = torch.tensor([[-9.0, 5.0, 4.0, 3.0, 2.0], [-9.0, 1.0, 2.0, 3.0, 4.0]])
    hits.add(scores, torch.tensor([0, 0, 1]), torch.tensor([2, 3, 3]))
    hits.add(scores[:1], torch.tensor([0]), torch.tensor([2]))
    assert hits.n_test.tolist() == [0, 0, 2, 2, 0]
    assert hits.n_found.tolist() == [0, 0, 2, 1, 0]


@pytest.mark.parametrize("model", ["EASE", "BPR"])
def test_hits_of_a_run_are_those_of_its_recall(settings, model):
    recorder = Recorder()
    done = runner.run(model, "tiny", [], {**settings, "epochs": 1}, observer=recorder)
    with np.load(io.BytesIO(recorder.by_degree())) as stored:
        arrays = dict(stored)
    assert arrays["item_n_test"].sum() == recorder.split["n_test"]
    assert arrays["user_degree"].sum() == recorder.split["n_train"]
    assert arrays["item_degree"].sum() == recorder.split["n_train"]
    # Each user of the data set has one test interaction, so recall is a share of interactions.
    share = arrays["item_n_found"].sum() / arrays["item_n_test"].sum()
    assert share == pytest.approx(done.record["test"]["recall@10"], abs=1e-4)


@dataclass
class FakeRun:
    """As much of ``results.FinishedRun`` as the tables ask for."""

    seed: int
    ndcg: list[float]
    n_found: list[int]

    @property
    def record(self):
        return {"seed": self.seed}

    def per_user(self, metric):
        return pd.Series(self.ndcg, index=["b", "a"]) if metric == "ndcg@10" else None

    def degrees(self):
        return {
            "users": np.array(["a", "b"]),
            "user_degree": np.array([1, 9]),
            "item_degree": np.array([0, 3, 3]),
            "item_n_test": np.array([0, 4, 1]),
            "item_n_found": np.array(self.n_found),
            "k": np.array(10),
        }


def test_tables_are_means_over_seeds_of_each_group():
    runs = {
        "A": [FakeRun(1, [0.2, 0.4], [0, 2, 0]), FakeRun(2, [0.4, 0.8], [0, 1, 0])],
        "B": [FakeRun(1, [0.1, 0.3], [0, 3, 1])],
    }
    tables = by_degree(runs)
    assert tables["user"]["buckets"] == ["1", "2–9"]
    low, high = tables["user"]["models"]["A"]["ndcg@10"]
    assert (low["n"], low["mean"], high["mean"]) == (1, pytest.approx(0.6), pytest.approx(0.3))
    assert low["std"] == pytest.approx(np.std([0.4, 0.8], ddof=1))
    assert [cell["mean"] for cell in tables["user"]["models"]["B"]["ndcg@10"]] == [0.3, 0.1]
    none, some = tables["item"]["models"]["A"]["found@10"]
    assert (none["n"], none["mean"]) == (0, None)
    assert (some["n"], some["mean"]) == (5, pytest.approx((2 / 5 + 1 / 5) / 2))
    assert tables["item"]["models"]["B"]["found@10"][1]["mean"] == pytest.approx(4 / 5)
    page = section(tables, 4)
    assert "| NDCG@10 by user degree | 1 " in page
    assert "0.3000 ± 0.1414" in page
