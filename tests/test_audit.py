"""The leakage audit finds a planted leak and stays silent without one."""

import json

import numpy as np
import pytest

from recbole_gacllm.descriptions.audit import audit_leakage
from recbole_gacllm.descriptions.layers import Layer
from recbole_gacllm.descriptions.neighbors import TrainGraph

N_USERS, N_ITEMS = 40, 60


@pytest.fixture
def folders(tmp_path):
    """Inputs of a random graph; users' descriptions are filled by the test."""
    rng = np.random.default_rng(0)
    users, items = np.nonzero(rng.random((N_USERS, N_ITEMS)) < 0.2)
    graph = TrainGraph(
        np.array([f"u{i}" for i in range(N_USERS)]),
        np.array([f"i{i}" for i in range(N_ITEMS)]),
        users,
        items,
    )
    (tmp_path / "inputs").mkdir()
    (tmp_path / "descriptions").mkdir()
    graph.save(tmp_path / "inputs" / "graph.npz")
    names = {f"i{i}": f"Great Film {chr(65 + i % 26)}{i}" for i in range(N_ITEMS)}
    train = set(zip(users.tolist(), items.tolist(), strict=True))
    heldout = [
        (f"u{u}", f"i{i}")
        for u in range(N_USERS)
        for i in rng.permutation(N_ITEMS).tolist()[:6]
        if (u, i) not in train
    ]

    def audit(mention, **renamed):
        names.update(renamed)
        (tmp_path / "inputs" / "item_names.json").write_text(json.dumps(names))
        texts = [f"This person enjoys {mention(u, heldout, names)}." for u in range(N_USERS)]
        layer = Layer.raw(
            {"user": [f"u{u}" for u in range(N_USERS)], "item": list(names)},
            {"user": texts, "item": [""] * N_ITEMS},
        )
        layer.write(tmp_path / "descriptions" / "layer_1.parquet")
        return audit_leakage(tmp_path / "inputs", tmp_path / "descriptions", heldout, seed=1)

    return audit


def test_held_out_titles_in_descriptions_are_found(folders):
    def leak(user, heldout, names):
        return ", ".join(names[item].upper() + "!" for u, item in heldout if u == f"u{user}")

    report = folders(leak)
    assert report["heldout_mentions"] == report["n_pairs"] > 100
    assert report["p_value"] < 1e-6
    assert report["edges_in_graph"] == 0


def test_random_titles_are_no_leak(folders):
    rng = np.random.default_rng(9)

    def chance(user, heldout, names):
        return ", ".join(rng.permutation(list(names.values()))[:20])

    report = folders(chance)
    assert report["heldout_mentions"] > 20
    assert report["p_value"] > 0.01


def test_no_mention_at_all_gives_no_p_value(folders):
    report = folders(lambda user, heldout, names: "comedies")
    assert report["heldout_mentions"] == report["matched_mentions"] == 0
    assert report["p_value"] is None


def test_names_of_training_items_are_no_leak(folders, tmp_path):
    def trained(user, heldout, names):
        graph = TrainGraph.load(tmp_path / "inputs" / "graph.npz")
        return ", ".join(names[f"i{item}"] for item in graph.items[graph.users == user])

    # Half of the films stand in the data twice, as some of ml-100k do; three are part of one name.
    twins = {f"i{i}": f"Great Film {chr(65 + i % 26)}{i} of {i}" for i in range(30)}
    twins |= {f"i{30 + i}": name for i, name in enumerate(twins.values())}
    twins |= {"i57": "Great Film", "i58": "Film A0", "i59": "Great Film A0"}
    report = folders(trained, **twins)
    assert report["n_known_names"] > 20
    assert report["n_pairs"] > 50
    assert report["heldout_mentions"] == report["matched_mentions"] == 0
