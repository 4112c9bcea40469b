"""The report: what stands in the page of a run and of a leaderboard, and what it never does."""

import base64
import contextlib
import gzip
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import recbole_gacllm.model
from recbole_gacllm import run as runner
from recbole_gacllm.alignment.embeddings import TextLayers
from recbole_gacllm.artifacts import children, manifests
from recbole_gacllm.cli.main import main
from recbole_gacllm.compare import job, leaderboard, plan
from recbole_gacllm.compare.degrees import edges
from recbole_gacllm.convolution.layers import SIDES, Layer
from recbole_gacllm.inputs import raw_descriptions
from recbole_gacllm.report import browser, charts, degrees
from recbole_gacllm.report.page import write_report
from recbole_gacllm.report.source import Source
from tests.conftest import tiny_settings, write_dataset

SCRIPT = "<script>window.harmed = true</script> & a person of </textarea> taste."
SECTIONS = [
    *("results", "curves", "degrees", "browser", "map", "cost", "quality", "sft", "leakage"),
    "setup",
]


def prepare(options, data):
    """In the place of the stages: real layer 0, a made-up layer 1, random embeddings."""
    root = Path(options.artifact_dir).resolve() / data.dataset
    folders = {name: root / f"{name}-1" for name in ("inputs", "sft", "descriptions", "embeddings")}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    raw, names = raw_descriptions(options, data)
    data.graph.save(folders["inputs"] / "graph.npz")
    raw.write(folders["inputs"] / "layer_0.parquet")
    (folders["inputs"] / "item_names.json").write_text(json.dumps(names))
    texts = {side: [f"{text} Loved by many." for text in raw.texts[side]] for side in SIDES}
    texts["user"][raw.tokens["user"].index("u0")] = SCRIPT
    above = Layer.raw(raw.tokens, texts)
    above.statuses = {side: ["generated"] * len(texts[side]) for side in SIDES}
    above.statuses["user"][1], above.reasons["user"][1] = "failed", "echo"
    above.write(folders["descriptions"] / "layer_1.parquet")
    keys = {"neighbor_rule": "random", "n_neighbors": 4}
    told = {"inputs": str(folders["inputs"]), "seed": data.seed, "options": keys}
    (folders["descriptions"] / "job.json").write_text(json.dumps(told))
    rng = np.random.default_rng(1)
    n_nodes = sum(len(raw.tokens[side]) for side in SIDES)
    for layer in range(2):
        table = rng.normal(size=(n_nodes, 6)).astype(np.float16)
        np.save(folders["embeddings"] / f"layer_{layer}.npy", table)
    figures = dict.fromkeys(("n_nodes", "n_generated", "n_output_tokens", "n_prompt_tokens"), 54)
    figures |= dict.fromkeys(("n_retried", "n_truncated", "n_cached_tokens"), 0)
    figures |= {"n_failed": 1, "failures": {"echo": 1}, "n_from_store": 0, "seconds": 2.0}
    sft = {"n_pairs": 8, "n_heldout": 2, "n_steps": 3, "n_tokens": 99, "train_losses": [3, 2, 1]}
    for stage, manifest in {
        "inputs": {"n_edges": data.graph.n_edges},
        "sft": {**sft, "perplexity_before": 20.0, "perplexity_after": 10.0, "seconds": 3.0},
        "descriptions": {"layers": [figures], "seconds": 2.5},
        "embeddings": {"seconds": 1.0},
    }.items():
        manifests.write_manifest(folders[stage], {"stage": stage, **manifest})
    return TextLayers.load(folders, 2, options.text_source, data.graph, data.seed)


def run_with_texts(root, replaced=None):
    """A finished run of our model in a folder, whose texts were made up; returns its run.json."""
    settings = tiny_settings(write_dataset(root / "data"), root)
    for old, new in (replaced or {}).items():
        for file in (root / "data" / "tiny").iterdir():
            file.write_text(file.read_text("utf-8").replace(old, new), "utf-8")
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(root):
        patch.setattr(recbole_gacllm.model, "prepare", prepare)
        keys = {**settings, "topk": [5], "valid_metric": "NDCG@5"}
        return runner.run("GaCLLM", "tiny", config_dict=keys).run_file


def make_board(root, models, n_seeds, **keys):
    """A finished leaderboard whose runs were made in this process; returns its folder."""
    settings = tiny_settings(write_dataset(root / "data"), root) | keys
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(root):
        patch.setattr(children, "run_child", lambda stage, folder, **_: job._work(folder))
        made = plan.make_plan(models, ["tiny"], n_seeds, config_dict=settings)
        leaderboard.run_leaderboard(made, root / "board", show_progress=False)
    return root / "board"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a run and all that it made, moved since; and its run.json in there."""
    root = tmp_path_factory.mktemp("made") / "written"
    root.mkdir()
    file = run_with_texts(root).relative_to(root)
    return root.rename(root.parent / "moved"), file


@pytest.fixture
def text_run(made, tmp_path, no_stage):
    """A copy of the run; from here on a stage that starts is an error."""
    root, file = made
    return shutil.copytree(root, tmp_path / "copy") / file


def page_of(path, tmp_path):
    return write_report(path, tmp_path / "page.html").read_text("utf-8")


def data_of(page):
    packed = re.search(r'<script id="data" type="text/plain">(.*?)</script>', page).group(1)
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def section_of(page, anchor):
    return re.search(rf'<section id="{anchor}">.*?</section>', page, re.DOTALL).group()


def edit(file, **changes):
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | changes))
    return record


class Parsed(HTMLParser):
    """Elements with their attributes, comments, and all that is shown."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.comments, self.shown = [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.shown += [value or "" for _, value in attrs]

    def handle_data(self, data):
        self.shown.append(data)

    def handle_comment(self, data):
        self.comments.append(data)


def test_the_page_of_a_run_has_every_section_and_loads_nothing_from_elsewhere(text_run, tmp_path):
    page = page_of(text_run, tmp_path)
    assert re.findall(r'<section id="([\w-]+)">', page) == SECTIONS
    assert "Left out" not in page
    assert "GaCLLM on tiny" in page
    assert "echo 1" in section_of(page, "cost")
    for words in (
        "Layer 1, users",
        "<td>generated 23, failed 1</td><td>generated 30</td>",
        "<td>en 100.0%</td>",
    ):
        assert words in section_of(page, "quality")
    assert "20.00" in section_of(page, "sft")
    assert "No sign of leakage" in section_of(page, "leakage")
    for tag, attributes in Parsed(page).elements:
        assert tag not in ("iframe", "img", "object", "embed")
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
    assert not re.search(r"url\(|@import", page)


def test_the_page_says_what_the_run_chose(text_run, tmp_path):
    choice = {"layers": [0, 2], "reg_weight": 3.0, "text_weight": 0.25, "ndcg": {"L2 3": 0.12345}}
    edit(text_run, choices={"linear": choice, "keys": {"loss_type": "BPR"}})
    words = " ".join(section_of(page_of(text_run, tmp_path), "setup").split())
    assert "text layers 0+2, L2 3.0, text weight 0.25: L2 3 0.1235" in words
    assert "BPR" in words


def test_metrics_carry_the_interval_over_users(text_run, tmp_path):
    source = Source.read(text_run)
    values = source.test["recall@5"]
    half = 2.0686576104190406 * values.std(ddof=1) / np.sqrt(24)  # t quantile of 23 degrees
    page = section_of(page_of(text_run, tmp_path), "results")
    low, high = values.mean() - half, values.mean() + half
    assert f"<b>{source.record['test']['recall@5']:.4f}</b>" in page
    assert f"<small>{low:.4f} – {high:.4f}</small>" in page


def test_recommendations_are_new_to_the_user_and_give_the_runs_recall(text_run, made):
    source = Source.read(text_run)
    scored = source.scored
    recalls = [
        len(set(scored.top[user][:5]) & set(held)) / len(held)
        for user, held in scored.heldout.items()
    ]
    assert np.mean(recalls) == pytest.approx(source.record["test"]["recall@5"], abs=1e-4)
    tiny = pd.read_csv(made[0] / "data" / "tiny" / "tiny.inter", sep="\t")
    touched = set(zip(tiny["user_id:token"], tiny["item_id:token"], strict=True))
    for user, items in scored.top.items():
        assert {item for item in items if (user, item) in touched} <= set(scored.heldout[user])


def test_the_browser_holds_texts_neighbours_and_what_was_held_out(text_run, tmp_path):
    scored = Source.read(text_run).scored
    data = data_of(page_of(text_run, tmp_path))["browser"]
    user, item = data["user"], data["item"]
    at = user["t"].index("u0")
    assert data["layers"] == 2
    assert "20" in user["x"][0][at]
    assert user["x"][1][at] == SCRIPT
    assert user["s"][1] == {"1": "failed: echo"}
    assert item["c"][item["t"].index("i3")] == "The Great Film 3"
    assert item["g"][item["t"].index("i3")] == "Horror"
    assert [item["t"][place] for place in user["h"][at]] == scored.heldout["u0"]
    assert [item["t"][place] for place in user["r"][at]] == scored.top["u0"]
    assert all(len(places) <= 4 for places in user["n"])
    for place in user["n"][at]:
        assert at in {edge for edge, near in enumerate(user["n"]) if place in near}


def test_a_data_set_larger_than_the_page_is_sampled(text_run, tmp_path, monkeypatch):
    monkeypatch.setattr(browser, "MAX_NODES", {"user": 10, "item": 12})
    data = data_of(page_of(text_run, tmp_path))
    assert len(data["browser"]["user"]["t"]) == 10
    assert len(data["browser"]["item"]["x"][1]) == 12
    assert data["browser"]["total"] == {"user": 24, "item": 30}
    outside = [one for row in data["browser"]["user"]["r"] for one in row if isinstance(one, str)]
    assert set(outside).isdisjoint(data["browser"]["item"]["t"])
    assert outside
    assert len(data["map"]["items"]) == 12


def test_a_run_without_texts_says_so_and_shows_the_rest(settings, tmp_path):
    file = runner.run("BPR", "tiny", config_dict=settings).run_file
    page = page_of(file.parent, tmp_path)
    for anchor in ("browser", "map", "cost", "quality", "leakage"):
        assert "Left out: the run of BPR used no texts." in section_of(page, anchor)
    for anchor in ("results", "curves", "degrees"):
        assert "Left out" not in section_of(page, anchor)


def test_artefacts_apart_from_the_run_are_found_by_the_flag(text_run, tmp_path, capsys):
    (tmp_path / "copy" / "artifacts").rename(tmp_path / "disk")
    assert "the artefacts are gone" in page_of(text_run, tmp_path)
    main(["report", str(text_run.parent), f"--artifact_dir={tmp_path / 'disk'}"])
    assert "report.html (0." in capsys.readouterr().out
    assert "Left out" not in (text_run.parent / "report.html").read_text("utf-8")


def test_a_copy_of_a_run_is_reported_on_though_what_it_was_made_of_has_changed(
    text_run, made, tmp_path
):
    record = json.loads(text_run.read_text())
    written = shutil.copytree(made[0], Path(record["checkpoint"]).parent.parent)
    for file in (
        Path(record["checkpoint"]),
        *written.rglob("*.parquet"),
        *written.rglob("*.inter"),
    ):
        file.write_text("changed since")
    page = page_of(text_run, tmp_path)
    shutil.rmtree(written)
    assert "Left out" not in page


@pytest.mark.parametrize(
    "content",
    [
        None,
        *("", "[]", "{}", "[" * 99999),
        *('{"test": {"a": 1}, "config": {}}', '{"test": 1, "config": 2}'),
    ],
)
def test_what_no_run_wrote_is_refused(tmp_path, content, fails):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    why = "neither a run" if content is None else "run.json is not the record of a run"
    assert why in fails("report", tmp_path)


@pytest.mark.parametrize(
    ("key", "value"), [("versions", [1]), ("stages", "x"), ("description_quality", [1])]
)
def test_a_part_of_another_form_ends_in_one_line(text_run, key, value, fails):
    edit(text_run, **{key: value})
    assert "a part of another form than this version writes" in fails("report", text_run)


def test_lost_artefacts_and_checkpoints_are_named(text_run, tmp_path):
    for pattern in ("saved/*.pth", "artifacts/tiny/inputs-1/graph.npz"):
        next((tmp_path / "copy").glob(pattern)).unlink()
    page = page_of(text_run, tmp_path)
    assert "the checkpoint is gone" in section_of(page, "results")
    assert "Left out: the checkpoint is gone" in section_of(page, "degrees")
    assert "Left out: the artefacts are gone" in section_of(page, "browser")
    assert "<polyline" in section_of(page, "curves")


def test_a_checkpoint_that_no_longer_gives_the_metrics_is_not_believed(text_run, tmp_path):
    test = json.loads(text_run.read_text())["test"]
    edit(text_run, test=test | {"recall@5": test["recall@5"] + 0.1})
    page = page_of(text_run, tmp_path)
    assert "the checkpoint gives recall@5" in section_of(page, "degrees")
    assert "–" not in re.sub(r"<h2>.*?</h2>", "", section_of(page, "results"))


def test_a_run_older_than_a_key_is_scored_with_the_keys_default(text_run):
    config = json.loads(text_run.read_text())["config"]
    del config["align_n_nodes"]
    edit(text_run, config=config)
    assert not isinstance(Source.read(text_run).scored, str)


def test_the_runner_records_each_epoch(text_run):
    record = json.loads(text_run.read_text())
    assert [entry["epoch"] for entry in record["history"]] == [0, 1]
    assert record["valid"] in [entry["valid"] for entry in record["history"]]
    assert all(entry["train_loss"] > 0 for entry in record["history"])


def test_the_page_of_a_leaderboard_compares_its_models(tmp_path):
    board = make_board(tmp_path, ["BPR", "Pop"], 2, use_text=False)
    page = page_of(board, tmp_path)
    results = section_of(page, "results")
    assert results.count("± 0.") == 10
    for words in ("against BPR", "<b>", "<u>"):
        assert words in results
    assert "Validation NDCG@10, BPR" in section_of(page, "curves")
    assert "for want of a curve: Pop" in section_of(page, "curves")
    assert section_of(page, "bars").count("<rect") == 10
    assert set(re.findall("<title>(.*?), ", section_of(page, "degrees"))) == {"BPR", "Pop"}
    assert "used texts" in section_of(page, "texts")
    assert "Ablation" not in page
    # The same board, as if it were one of variants.
    for file in (board / "leaderboard.json", *board.glob("runs/*/run.json")):
        text = file.read_text().replace('"Pop"', '"GaCLLM:sft=False"').replace('"BPR"', '"GaCLLM"')
        file.write_text(text.replace("tiny/BPR", "tiny/GaCLLM"))
    page = page_of(board, tmp_path)
    assert "<h2>Ablation</h2>" in page
    assert "GaCLLM:sft=False" in section_of(page, "bars")


def test_degrees_fall_into_five_groups_of_equal_size():
    ranges = edges(np.arange(1, 101))
    assert ranges == [(1, 20), (21, 40), (41, 60), (61, 80), (81, 100)]
    assert edges(np.full(9, 4)) == [(4, 4)]
    assert edges(np.array([1, 1, 1, 1, 1, 1, 1, 2, 9]))[0] == (1, 1)


def test_the_metric_of_a_group_is_the_mean_of_its_users():
    values = pd.Series([0.0, 1.0, 0.5, 0.5], index=["a", "b", "c", "d"])
    low, high = degrees.metric_by_degree(values, {"a": 1, "b": 2, "c": 7, "d": 8}, [(1, 2), (3, 9)])
    assert (low.value, low.n, high.value, high.n) == (0.5, 2, 0.5, 2)
    assert high.interval == (0.5, 0.5)


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.31), (220, 285.3), (0.001, 0.002), (3.0, 3.0)])
def test_ticks_are_round_and_span_the_values(low, high):
    marks = charts.ticks(low, high)
    assert marks[0] <= low
    assert marks[-1] >= high
    assert 2 <= len(marks) <= 8
    assert np.allclose(np.diff(marks), marks[1] - marks[0])
