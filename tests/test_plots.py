"""The figure of a leaderboard: what is drawn are the table's numbers, under every method's name."""

import io
import math
import xml.etree.ElementTree

import pytest
from matplotlib.colors import to_rgba
from PIL import Image

from recbole_gacllm.compare.plots import draw, figure

ODD = "GaCLLM:text_source=<raw>&$x_1$"


def cell(mean, interval=None):
    return {"mean": mean, "interval": interval}


@pytest.fixture
def table():
    """Three methods, one without an interval; two groups of users, one empty, and two of items."""
    metrics = {
        "EASE": {"recall@10": cell(0.2, (0.1, 0.3)), "ndcg@10": cell(0.31, (0.29, 0.33))},
        ODD: {"recall@10": cell(0.4, (0.3, 0.5)), "ndcg@10": cell(0.35, (0.34, 0.361))},
        "_Pop": {"recall@10": cell(0.1), "ndcg@10": cell(0.05)},
    }
    of_users = {"EASE": [0.1, None], ODD: [0.2, 0.3], "_Pop": [0.01, 0.02]}
    return {
        "metrics": ["recall@10", "ndcg@10"],
        "models": {model: {"metrics": of_model} for model, of_model in metrics.items()},
        "by_degree": {
            "user": {
                "buckets": ["1–9", "10–99"],
                "models": {
                    model: {"ndcg@10": [cell(mean) for mean in means]}
                    for model, means in of_users.items()
                },
            },
            "item": {
                "buckets": ["0", "1–9"],
                "models": {"EASE": {"found@10": [cell(0.5), cell(0.6)]}},
            },
        },
    }


def lines(panel):
    """What each line of a panel goes through, and its colour."""
    return [
        (*(list(map(float, data)) for data in line.get_data()), to_rgba(line.get_color()))
        for line in panel.lines
    ]


@pytest.mark.parametrize("metric", ["ndcg@10", "recall@10"])
def test_means_and_intervals_are_those_of_the_table(table, metric):
    panel = figure(table, "T", metric).axes[0]
    expected = []
    for place, (model, row) in enumerate(table["models"].items()):
        drawn = row["metrics"][metric]
        if drawn["interval"]:
            expected.append((list(drawn["interval"]), [place, place]))
        expected.append(([drawn["mean"]], [place]))
        assert panel.get_yticklabels()[place].get_text() == model
    assert [line[:2] for line in lines(panel)] == expected
    assert panel.get_xlabel().lower().startswith(metric)


def test_by_degree_a_method_keeps_its_colour_and_an_empty_group_is_a_gap(table):
    intervals, users, items = figure(table, "T", "ndcg@10").axes
    (_, ease, ease_colour), (_, odd, odd_colour), (_, pop, _) = lines(users)
    assert ease[0] == 0.1
    assert math.isnan(ease[1])
    assert (odd, pop) == ([0.2, 0.3], [0.01, 0.02])
    assert [label.get_text() for label in users.get_xticklabels()] == ["1–9", "10–99"]
    colours = [to_rgba(label.get_color()) for label in intervals.get_yticklabels()]
    assert colours[:2] == [ease_colour, odd_colour]
    assert lines(items) == [([0, 1], [0.5, 0.6], ease_colour)]
    assert items.get_ylabel() == "found@10"


def test_no_two_methods_look_alike(table):
    models = [f"M{number}" for number in range(30)]
    table["models"] = dict.fromkeys(models, table["models"]["_Pop"])
    table["by_degree"] = {}
    panel = figure(table, "T", "ndcg@10").axes[0]
    assert len({(line.get_color(), line.get_marker()) for line in panel.lines}) == 30


def test_without_groups_there_is_one_panel_and_an_unknown_metric_gives_the_first(table):
    for side in table["by_degree"].values():
        side["models"] = {}
    (panel,) = figure(table, "T", "mrr@10").axes
    assert panel.get_xlabel().startswith("Recall@10")


def test_files_hold_every_name_and_have_the_same_bytes_again(table):
    files = draw(table, "Results on a_b$ <x>", "ndcg@10")
    assert files == draw(table, "Results on a_b$ <x>", "ndcg@10")
    texts = {"".join(e.itertext()) for e in xml.etree.ElementTree.fromstring(files["svg"]).iter()}
    assert {*table["models"], "Results on a_b$ <x>"} <= texts
    assert b"<dc:date>" not in files["svg"]
    image = Image.open(io.BytesIO(files["png"]))
    assert image.width > 1000
    assert not {"Software", "Creation Time"} & set(image.info)
