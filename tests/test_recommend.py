"""Top-k lists: those of RecBole's evaluation, of users outside of training, and why."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from recbole.data.interaction import Interaction

import recbole_gacllm
import recbole_gacllm.model
import recbole_gacllm.text_knn
from recbole_gacllm import run as runner
from recbole_gacllm.artifacts import children
from recbole_gacllm.artifacts.locate import RunFiles
from recbole_gacllm.cli.main import main
from recbole_gacllm.inspection import audience
from recbole_gacllm.inspection.audience import interactions
from recbole_gacllm.inspection.histories import Histories
from recbole_gacllm.inspection.opened import open_run, trainer_of
from recbole_gacllm.inspection.parts import ScoreParts
from recbole_gacllm.inspection.recommend import recommend
from tests.conftest import run_stage, tiny_settings, write_dataset
from tests.test_report import prepare

BY_TIME = {"eval_args": {"order": "TO", "split": {"LS": "valid_and_test"}}}
SEQUENCES = {**BY_TIME, "loss_type": "CE"}
BEST = {"linear_weight": 0.5, "linear_text_weight": 0.25, "text_weight": 1.0}
RANKED = {  # RecBole's own evaluation of FM counts labels
    "metrics": ["NDCG"],
    "eval_args": {"mode": "full"},
    "train_neg_sample_args": {"distribution": "uniform", "sample_num": 1, "dynamic": False},
}
BPR = {"text_weight": 1.0, "loss_type": "BPR"}
RUNS = {
    "GaCLLM": ("GaCLLM", BEST),
    "GaCLLM by time": ("GaCLLM", {**BEST, "linear_recency": 1.0, **BY_TIME}),
    "GaCLLM, cold items": ("GaCLLM", {**BEST, "cold_item_share": 0.2}),
    "GaCLLM without linear": ("GaCLLM", BPR),
    "GaCLLM early": ("GaCLLM", {**BPR, "text_fusion": "early", "text_users": "item_mean"}),
    "GaCLLM without text": ("GaCLLM", {"use_text": False, "loss_type": "BPR"}),
    "TextKNN": ("TextKNN", {}),
    "BPR": ("BPR", {}),
    "LightGCN": ("LightGCN", {"fast_paths": True}),
    "Pop": ("Pop", {}),  # which has many ties
    "EASE": ("EASE", {}),
    "ItemKNN": ("ItemKNN", {}),
    "UserKNN": ("ItemKNN", {"knn_method": "user"}),
    "SLIMElastic": ("SLIMElastic", {}),
    "MultiVAE": ("MultiVAE", {}),
    "FM": ("FM", RANKED),
    "SASRec": ("SASRec", SEQUENCES),
    "GRU4Rec": ("GRU4Rec", SEQUENCES),
    "HGN": ("HGN", {**BY_TIME, "loss_type": "BPR"}),
}
# Nothing of the linear part is chosen.
GIVEN = {"preset": "best", "use_text": False, "epochs": 1, "linear_reg_weight": 400.0}
# RecBole's MultiVAE
pytestmark = pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning")


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """Makes each run once; gives its run.json."""

    @functools.cache
    def make(name):
        root = tmp_path_factory.mktemp("run")
        model, keys = RUNS[name]
        settings = tiny_settings(write_dataset(root / "data"), root) | {
            "topk": [5],
            "valid_metric": "NDCG@5",
            "eval_batch_size": 150,  # several blocks
            **keys,
        }
        with pytest.MonkeyPatch.context() as patch, contextlib.chdir(root):
            for module in (recbole_gacllm.model, recbole_gacllm.text_knn):
                patch.setattr(module, "prepare", prepare)
            return runner.run(model, "tiny", config_dict=settings).run_file

    return make


@functools.cache
def opened(file):
    run = open_run(RunFiles.read(file))
    run.model.eval()
    return run


def evaluated(run, k):
    """User -> the items that RecBole's test evaluation ranks first."""
    trainer, found = trainer_of(run), []
    collect = trainer.eval_collector.eval_batch_collect

    def collecting(scores, interaction, *others):
        found.append((interaction[run.test._dataset.uid_field].tolist(), scores.topk(k).indices))
        collect(scores, interaction, *others)

    trainer.eval_collector.eval_batch_collect = collecting
    trainer.eval_collector.data_collect(run.train)
    trainer.evaluate(run.test, load_best_model=False)
    dataset = run.test._dataset
    users, items = (dataset.field2id_token[name] for name in (dataset.uid_field, dataset.iid_field))
    return {
        users[user]: items[row].tolist()
        for block, rows in found
        for user, row in zip(block, rows.cpu().numpy(), strict=True)
    }


def lists_of(frame):
    assert (frame["rank"] == frame.groupby("user").cumcount() + 1).all()
    return frame.groupby("user", sort=False)["item"].agg(list).to_dict()


def trained_table(run):
    """The training interactions as a file of histories would have them."""
    dataset = run.train._dataset
    rows = interactions(dataset, lists=True).tocoo()
    return pd.DataFrame(
        {
            "user": dataset.field2id_token[dataset.uid_field][rows.row],
            "item": dataset.field2id_token[dataset.iid_field][rows.col],
        }
    )


def left_out_of(run):
    """User -> items of training and validation, as tokens."""
    dataset, left_out = run.test._dataset, {}
    users, items = (dataset.field2id_token[name] for name in (dataset.uid_field, dataset.iid_field))
    inter = dataset.inter_feat
    if "item_id_list" in inter:  # all that came before the test item
        for user, row in zip(inter["user_id"], inter["item_id_list"], strict=True):
            left_out[users[user]] = set(items[row[row > 0].numpy()])
        return left_out
    for part in (run.train, run.valid):
        inter = part._dataset.inter_feat
        for user, item in zip(inter["user_id"], inter["item_id"], strict=True):
            left_out.setdefault(users[user], set()).add(items[item])
    return left_out


# The ranking


@pytest.mark.parametrize("name", [name for name in RUNS if "cold" not in name])
def test_lists_are_those_of_the_test_evaluation(run_of, name):
    run = open_run(RunFiles.read(run_of(name)))
    frame = recommend(run_of(name), k=3, keep_history=run.config["repeatable"])
    expected = {user: items[:3] for user, items in evaluated(run, 5).items()}
    lists = lists_of(frame)
    assert len(lists) == 24
    assert {user: lists[user] for user in expected} == expected
    assert (frame["title"] == "The Great Film " + frame["item"].str[1:]).all()
    assert frame.groupby("user")["score"].agg(lambda s: s.is_monotonic_decreasing).all()


@pytest.mark.slow
@pytest.mark.parametrize(("model", "keys"), [("EASE", {}), ("Pop", {}), ("GaCLLM", GIVEN)])
def test_lists_of_ml_100ks_943_users_are_the_evaluators_and_give_its_recall(tmp_path, model, keys):
    settings = {"use_gpu": False, "show_progress": False, "checkpoint_dir": str(tmp_path / "saved")}
    done = runner.run(model, "ml-100k", config_dict={**settings, **keys})
    run = open_run(RunFiles.read(done.run_file))
    lists = lists_of(recommend(done.run_file, k=10))
    assert len(lists) == 943
    assert lists == evaluated(run, 10)
    dataset = run.test._dataset
    users, items = (dataset.field2id_token[name] for name in ("user_id", "item_id"))
    table = pd.DataFrame(
        {"user": users[dataset.inter_feat["user_id"]], "item": items[dataset.inter_feat["item_id"]]}
    )
    found = [item in lists[user] for user, item in zip(table["user"], table["item"], strict=True)]
    recall = pd.Series(found).groupby(table["user"]).mean().mean()
    assert round(recall, 4) == done.record["test"]["recall@10"] > 0.05


@pytest.mark.parametrize("name", ["EASE", "SASRec"])
def test_items_of_the_history_are_left_out_unless_kept(run_of, name):
    history = left_out_of(opened(run_of(name)))
    lists = lists_of(recommend(run_of(name), k=40))
    assert all(
        set(items) == {f"i{n}" for n in range(30)} - history[u] for u, items in lists.items()
    )
    lists = lists_of(recommend(run_of(name), k=40, keep_history=True))
    assert all(len(items) == 30 for items in lists.values())


def test_an_item_of_the_history_stays_where_it_is_in_the_test_too(tmp_path):
    root = write_dataset(tmp_path / "data")
    header, *lines = (root / "tiny" / "tiny.inter").read_text().splitlines()
    (root / "tiny" / "tiny.inter").write_text("\n".join([header, *lines, *lines]) + "\n")
    keys = {"topk": [20], "valid_metric": "NDCG@20"}
    file = runner.run("BPR", "tiny", config_dict=tiny_settings(root, tmp_path) | keys).run_file
    lists = lists_of(recommend(file, k=20))
    expected = evaluated(open_run(RunFiles.read(file)), 20)
    assert {user: lists[user] for user in expected} == {
        user: items[: len(lists[user])] for user, items in expected.items()
    }


def test_users_come_as_asked_and_blocks_change_nothing(run_of, monkeypatch):
    everybody = lists_of(recommend(run_of("BPR"), k=5))
    monkeypatch.setattr(audience, "MAX_SCORES", 31)
    assert lists_of(recommend(run_of("BPR"), k=5)) == everybody
    lists = lists_of(recommend(run_of("BPR"), ["u7", "u2"], 3))
    assert lists == {user: everybody[user][:3] for user in ("u7", "u2")}
    assert list(lists) == ["u7", "u2"]


def test_a_sequential_model_is_asked_after_the_last_interaction_of_users_without_a_test_row(
    tmp_path,
):
    root = write_dataset(tmp_path / "data")
    with open(root / "tiny" / "tiny.inter", "a") as file:
        file.write("short\ti1\t5\t1\nshort\ti2\t5\t2\nalone\ti1\t5\t1\n")
    settings = tiny_settings(root, tmp_path) | SEQUENCES
    file = runner.run("SASRec", "tiny", config_dict=settings).run_file
    frame = recommend(file, k=3)
    assert frame["user"].nunique() == 25
    assert "alone" not in set(frame["user"])
    table = pd.DataFrame({"user": "x", "item": ["i1", "i2"], "time": [1, 2]})
    as_new = recommend(file, history=table, k=3)
    assert lists_of(frame)["short"] == lists_of(as_new)["x"]


def test_a_run_whose_temperature_was_a_rule_is_opened(run_of):
    files = RunFiles.read(run_of("GaCLLM"))
    config = files.record["config"] | {"ssm_temperature": None}
    open_run(dataclasses.replace(files, record=files.record | {"config": config}))


# What a score is the sum of


@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith("GaCLLM")])
def test_parts_sum_to_the_models_score(run_of, name):
    model = opened(run_of(name)).model
    users = torch.arange(model.n_users)
    parts = ScoreParts(model).of_users(users)
    assert ("linear" in parts) == (model.linear is not None)
    expected = model.full_sort_predict(Interaction({model.USER_ID: users}))
    torch.testing.assert_close(
        sum(parts.values()), expected.view(len(users), -1), atol=2e-5, rtol=1e-4
    )


def test_explanations_name_history_and_sum_to_the_score(run_of):
    run = opened(run_of("GaCLLM by time"))
    frame = recommend(run_of("GaCLLM by time"), k=4, explain=True)
    parts = frame.filter(like="from_")
    assert list(parts) == ["from_graph", "from_text", "from_linear"]
    np.testing.assert_allclose(parts.sum(axis=1), frame["score"], atol=2e-5)
    table = trained_table(run)
    names = "The Great Film " + table["item"].str[1:]
    history = names.groupby(table["user"]).agg(set)
    because = frame["because"].str.split("; ")
    assert all(0 < len(names) <= 3 for names in because)
    assert all(
        set(near) <= history[user] for user, near in zip(frame["user"], because, strict=True)
    )
    assert frame["description"].str.endswith("Loved by many.").mean() > 0.9
    kinds = [
        set(recommend(run_of(name), k=2, explain=True))
        for name in ("TextKNN", "GaCLLM without text")
    ]
    assert {"from_text", "because", "description"} <= kinds[0]
    assert {"from_graph", "because"} <= kinds[1]


# Users who were not in training


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("GaCLLM without text", {"atol": 1e-6, "rtol": 1e-4}),
        # A user's mean text is in half precision.
        ("GaCLLM early", {"atol": 5e-5, "rtol": 1e-3}),
    ],
)
def test_a_newcomer_has_all_of_a_user_but_its_own_embedding(run_of, name, tolerance):
    run = opened(run_of(name))
    model, parts = run.model, ScoreParts(run.model)
    users, items = model.forward()
    known = users - model.user_embedding.weight / (model.options.n_layers + 1)
    of_histories = parts.of_histories(interactions(run.train._dataset, lists=False))
    torch.testing.assert_close(sum(of_histories.values()), known @ items.T, **tolerance)
    assert (of_histories["text"].abs().max() > 1e-6) == (name == "GaCLLM early")


@pytest.mark.parametrize("name", ["GaCLLM", "GaCLLM by time"])
def test_the_linear_part_needs_the_items_only(run_of, name):
    run = opened(run_of(name))
    dataset = run.train._dataset
    inter = dataset.inter_feat
    frame = pd.DataFrame(
        {name: inter[name].numpy() for name in ("user_id", "item_id", "timestamp")}
    )
    frame = frame.sort_values("user_id").set_axis(["user", "item", "time"], axis=1).astype(str)
    ids = {str(item): item for item in range(run.model.n_items)}
    histories = Histories.of(frame.assign(time=frame["time"].astype(float)), ids)
    newcomers = audience.NewUsers(run, histories, None)
    users = torch.tensor([int(token) for token in newcomers.tokens])
    for block in newcomers.blocks():
        expected = run.model.linear.scores(users[block.rows])
        deviation = expected.std(1, keepdim=True)
        expected = 0.5 * (expected - expected.mean(1, keepdim=True)) / deviation
        torch.testing.assert_close(block.parts["linear"], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["EASE", "ItemKNN", "SLIMElastic", "MultiVAE", "TextKNN"])
def test_models_of_items_treat_a_newcomer_as_the_user_with_the_same_items(run_of, name):
    table = trained_table(opened(run_of(name)))
    new = recommend(run_of(name), history=table, k=5, keep_history=True)
    old = recommend(run_of(name), k=5, keep_history=True).astype({"user": str})
    pd.testing.assert_frame_equal(
        new.sort_values(["user", "rank"], ignore_index=True),
        old.sort_values(["user", "rank"], ignore_index=True),
        rtol=1e-4,
    )


@pytest.mark.parametrize("name", ["SASRec", "GRU4Rec"])
def test_a_sequential_model_takes_the_history_as_the_sequence(run_of, name):
    run = opened(run_of(name))
    dataset = run.test._dataset
    rows = []
    for row in range(len(dataset)):
        user = dataset.field2id_token["user_id"][dataset.inter_feat["user_id"][row]]
        items = dataset.inter_feat["item_id_list"][row]
        rows += [(user, dataset.field2id_token["item_id"][item]) for item in items if item]
    table = pd.DataFrame(rows, columns=["user", "item"])
    shuffled = table.assign(time=range(len(table))).sample(frac=1, random_state=1)
    expected = lists_of(recommend(run_of(name), k=5))
    assert lists_of(recommend(run_of(name), history=table, k=5)) == expected
    assert lists_of(recommend(run_of(name), history=shuffled, k=5)) == expected


@pytest.mark.parametrize("name", ["BPR", "LightGCN", "UserKNN", "FM", "HGN"])
def test_models_that_know_users_by_name_only_refuse_histories(run_of, name):
    table = pd.DataFrame({"user": ["x"], "item": ["i1"]})
    with pytest.raises(ValueError, match=r"--history: .* Models that know a user by the his"):
        recommend(run_of(name), history=table)


WRITERS = {
    "csv": lambda frame, file: frame.to_csv(file, index=False, encoding="utf-8-sig"),
    "tsv": lambda frame, file: frame.to_csv(file, index=False, sep="\t"),
    "inter": lambda frame, file: frame.rename(
        columns={"user": "user_id:token", "item": "item_id:token", "time": "timestamp:float"}
    ).to_csv(file, index=False, sep="\t"),
    "parquet": lambda frame, file: frame.to_parquet(file),
    "jsonl": lambda frame, file: frame.to_json(file, orient="records", lines=True),
}


@pytest.mark.parametrize("ending", WRITERS)
def test_files_of_histories_are_read_and_what_is_unknown_is_named(run_of, tmp_path, ending, caplog):
    frame = pd.DataFrame(
        {
            "user": ["007", "NA", "007", "late"],
            "item": ["i1", "gone", "i5", "i9"],
            "time": ["2024-01-02", "2024-01-01", "2024-01-01", "2024-01-01"],
        }
    )
    file = tmp_path / f"new.{ending}"
    WRITERS[ending](frame, file)
    lists = lists_of(recommend(run_of("SASRec"), history=file, k=3))
    assert list(lists) == ["007", "late"]
    assert "1 of 4 items are not in the run's data and are left out: gone" in caplog.text
    assert "1 of 3 users have no item that the run knows, and get no list: NA" in caplog.text
    order = pd.DataFrame({"user": "x", "item": ["i5", "i1"]})
    assert lists_of(recommend(run_of("SASRec"), history=order, k=3))["x"] == lists["007"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("user,thing\nx,i1\n", "has no column 'item' or 'item_id'; it has user, thing"),
        ("user,item\n", "has no rows"),
        ("user,item\nx,i1\ny,\n", "1 of 2 rows have an empty cell, the first is row 2"),
        ("user,item\nx,zzz\n", r"none of its 1 items is in the run's data \(zzz\)"),
        ("user,item,time\nx,i1,soon\n", "neither a number nor a date"),
        ("user,item\nx,i1,i2\n", "'rows of another width than the header': 1"),
        ("", "is empty"),
    ],
)
def test_bad_files_of_histories_end_in_one_line(run_of, tmp_path, text, message):
    (tmp_path / "new.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        recommend(run_of("EASE"), history=tmp_path / "new.csv")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"users": ["u1", "nobody"]}, "1 of 2 are no users of the run's data: nobody"),
        ({"k": 0}, "--k: 0 is not allowed"),
        ({"explain": True}, "--explain: EASE has scores only"),
        ({"intent": "slow"}, "--intent: this run of EASE has no texts"),
    ],
)
def test_wishes_that_do_not_fit_end_in_one_line(run_of, keys, message):
    with pytest.raises(ValueError, match=message):
        recommend(run_of("EASE"), **keys)


# A sentence


@pytest.fixture(scope="module")
def with_encoder(tmp_path_factory):
    """A run with the embedded encoder, on texts of four genres."""
    root = tmp_path_factory.mktemp("encoder")
    settings = tiny_settings(write_dataset(root / "data"), root)
    with contextlib.chdir(root), pytest.MonkeyPatch.context() as patch:
        patch.setattr(children, "run_child", run_stage)
        return runner.run("TextKNN", "tiny", config_dict=settings).run_file


def test_an_intent_moves_lists_towards_its_texts(with_encoder):
    plain = recommend(with_encoder, k=3)
    frame = recommend(with_encoder, k=3, intent="scary horror film", intent_weight=9, explain=True)
    is_horror = frame["item"].str[1:].astype(int) % 4 == 3
    assert is_horror.mean() > 0.9
    assert (plain["item"].str[1:].astype(int) % 4 == 3).mean() < 0.6
    np.testing.assert_allclose(frame["from_text"] + frame["from_intent"], frame["score"], atol=1e-4)


def test_an_intent_needs_the_runs_encoder(with_encoder, tmp_path):
    record = json.loads(with_encoder.read_text())
    folder = RunFiles.read(with_encoder).artifacts()["embeddings"]
    manifest = json.loads((folder / "manifest.json").read_text())
    changed = manifest | {"key": manifest["key"] | {"encoder": "another"}}
    (folder / "manifest.json").write_text(json.dumps(changed))
    try:
        with pytest.raises(
            recbole_gacllm.errors.GaCLLMError, match="is not, or no longer, the enc"
        ):
            recommend(with_encoder, intent="slow")
    finally:
        (folder / "manifest.json").write_text(json.dumps(manifest))
    assert record["model"] == "TextKNN"


# The command


def test_the_command_writes_each_format_and_no_formula(run_of, tmp_path, capsys):
    (tmp_path / "users.txt").write_text("u3\nu1\n")
    file, frames = str(run_of("GaCLLM")), []
    for name in ("a.parquet", "a.jsonl", "a.csv"):
        main(["recommend", file, "--users=users.txt", "--k=4", "--explain", f"--output={name}"])
        assert capsys.readouterr().out == f"2 lists, 8 rows, written to {name}\n"
    frames = [
        pd.read_parquet("a.parquet"),
        pd.read_json("a.jsonl", lines=True),
        pd.read_csv("a.csv"),
    ]
    for frame in frames[1:]:
        pd.testing.assert_frame_equal(frame, frames[0], check_dtype=False, rtol=1e-4)
    assert frames[0]["user"].unique().tolist() == ["u3", "u1"]
    pd.DataFrame({"user": ["=1+1"], "item": ["i1"]}).to_csv("new.csv", index=False)
    main(["recommend", file, "--history", "new.csv", "--k", "1", "--output", "b.csv", "--quiet"])
    assert (tmp_path / "b.csv").read_text().splitlines()[1].startswith("'=1+1,1,i")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output=a.txt"], "must end in .parquet, .csv, .jsonl"),
        (["--output=no/a.csv"], "there is no folder no"),
        (["--output=a.csv", "--users=,"], "names no user"),
    ],
)
def test_the_command_refuses_in_one_line(run_of, flags, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(["recommend", str(run_of("EASE")), *flags])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_the_function_is_the_packages_and_is_loaded_when_asked_for():
    code = "import recbole_gacllm as p, sys; assert 'torch' not in sys.modules; print(p.recommend)"
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "function recommend" in printed.stdout
    assert recbole_gacllm.recommend is recommend


def test_nothing_is_run_or_left_behind(run_of, tmp_path, monkeypatch):
    file = run_of("GaCLLM")
    before = sorted(file.parents[3].rglob("*"))
    monkeypatch.setattr(children, "run_child", lambda *_, **__: pytest.fail("a stage started"))
    recommend(file, k=2)
    assert sorted(file.parents[3].rglob("*")) == before
    assert list(tmp_path.iterdir()) == []
