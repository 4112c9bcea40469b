"""What was read is said in a few lines; what cannot serve is refused before any stage."""

from __future__ import annotations

import numpy as np
import pytest
from recbole.data import create_dataset, data_preparation

from recbole_gacllm.cli.main import main
from recbole_gacllm.compare.job import Recorder
from recbole_gacllm.compare.tables import evaluation
from recbole_gacllm.data.checks import match_ids
from recbole_gacllm.inspection.data_door import read_and_inspect
from recbole_gacllm.run_config import build_config

HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
LOAD = {"inter": ["user_id", "item_id", "rating", "timestamp"]}


def shop(root, rows: list[tuple[object, ...]], items: str | None = None) -> dict:
    folder = root / "shop"
    folder.mkdir()
    lines = "".join("\t".join(map(str, row)) + "\n" for row in rows)
    (folder / "shop.inter").write_text(HEADER + lines)
    if items is not None:
        (folder / "shop.item").write_text(f"item_id:token\ttitle:token\n{items}")
    return {"data_path": str(root), "load_col": LOAD, "checkpoint_dir": str(root / "saved")}


def clicks(n_users: int = 12, n_items: int = 15, each: int = 5) -> list[tuple[object, ...]]:
    rng = np.random.default_rng(1)
    return [
        (f"u{user}", f"i{item}", 1 + item % 5, 1_600_000_000 + 86_400 * item)
        for user in range(n_users)
        for item in rng.permutation(n_items)[:each]
    ]


def look(keys: dict, model: str = "BPR", **more):
    return read_and_inspect(model, "shop", [], {**keys, **more})[2]


def test_a_run_says_what_it_read(tmp_path):
    keys = shop(tmp_path, [*clicks(), ("", "i1", 3, 1_600_000_000)])
    report = look(keys, val_interval={"rating": "[2,inf)"}, rm_dup_inter="first")
    assert (report.n_users, report.n_repeats, report.warnings) == (12, 0, [])
    assert sum(report.parts) == report.n_interactions < 60
    text = "\n".join(report.lines())
    assert "times from 2020-09-13 to 2020-09-27" in text
    assert "without a user or an item: 61 -> 60 interactions" in text
    assert f"val_interval: {{'rating': '[2,inf)'}}: 60 -> {report.n_interactions}" in text
    assert "rm_dup_inter" not in text  # it took nothing


@pytest.mark.parametrize("model", ["BPR", "SASRec"])
def test_repeats_are_counted_and_warned_of(tmp_path, model):
    rows = clicks()
    again = [(user, item, rating, time + 10**6) for user, item, rating, time in rows[:15]]
    keys = shop(tmp_path, rows + again)
    keys |= {"eval_args": {"order": "TO", "split": {"LS": "valid_and_test"}}}
    report = look(keys, model)
    assert (report.n_interactions, report.n_repeats) == (75, 15)
    (warning,) = report.warnings
    assert "15 of 75 interactions (20%)" in warning
    assert "rm_dup_inter: first" in warning
    assert ("repeatable is on" in warning) == (model == "SASRec")
    assert look(keys, model, rm_dup_inter="first").warnings == []


def test_labels_that_a_model_does_not_read_are_warned_of(tmp_path):
    keys = shop(tmp_path, clicks())
    (warning,) = look(keys, threshold={"rating": 4}).warnings
    assert "threshold" in warning
    assert "val_interval" in warning
    assert look(keys, "FM", threshold={"rating": 4}).warnings == []
    (warning,) = look(keys, LABEL_FIELD="rating").warnings
    assert "every interaction counts as liked" in warning


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"val_interval": {"rating": "[9,inf)"}}, "rating.*leaves none of 60 interactions of shop"),
        ({"user_inter_num_interval": "[50,inf)"}, "user_inter_num_interval.*leaves none of 60"),
        ({"topk": [20], "valid_metric": "MRR@20"}, "topk: 20 is more than the 15 items"),
    ],
)
def test_what_leaves_nothing_to_rank_is_refused(tmp_path, keys, message):
    keys_of_shop = shop(tmp_path, clicks())
    with pytest.raises(ValueError, match=message):
        look(keys_of_shop, **keys)
    (tmp_path / "shop/shop.inter").write_text(HEADER)
    with pytest.raises(ValueError, match="a header and no rows"):
        look(keys_of_shop)


def test_times_are_told_though_they_are_not_loaded_and_of_all_files_of_a_ready_split(tmp_path):
    keys = shop(tmp_path, clicks()) | {"load_col": {"inter": ["user_id", "item_id"]}}
    file = tmp_path / "shop/shop.inter"
    header, *rows = file.read_text().splitlines(keepends=True)
    assert "times from 2020-09-13 to 2020-09-27" in look(keys).lines()
    rows.sort(key=lambda row: float(row.split("\t")[3]))
    for part, of_part in {"a": rows[:40], "b": rows[40:50], "c": rows[50:]}.items():
        (tmp_path / f"shop/shop.{part}.inter").write_text(header + "".join(of_part))
    report = look(keys, benchmark_filename=["a", "b", "c"])
    assert "times from 2020-09-13 to 2020-09-27" in report.lines()
    file.write_text(file.read_text() + "u99\ti1\t3\tyesterday\n")
    (warning,) = look(keys).warnings
    assert "'yesterday' is neither a number nor a date" in warning
    with pytest.raises(ValueError, match=r"line 62.*yesterday"):
        look(keys, load_col=LOAD)


def test_a_column_of_labels_is_warned_of_though_it_is_not_loaded(tmp_path):
    keys = shop(
        tmp_path, [(user, item, n % 2, at) for n, (user, item, _, at) in enumerate(clicks())]
    )
    (warning,) = look(keys, load_col={"inter": ["user_id", "item_id"]}).warnings
    assert "val_interval: {rating: '[1,1]'}" in warning
    assert look(keys, val_interval={"rating": "[1,1]"}).warnings == []
    assert look(keys, "FM", LABEL_FIELD="rating").warnings == []


def test_a_model_of_labels_needs_a_column_of_them(tmp_path):
    keys = shop(tmp_path, clicks())
    with pytest.raises(ValueError, match=r"LABEL_FIELD: 'label' is not a column .*threshold"):
        look(keys, "FM")
    look(keys, "FM", threshold={"rating": 3})


def test_rows_of_a_feature_file_that_count_for_nothing_are_counted(tmp_path):
    items = "".join(f"i{n}\tLamp {n}\n" for n in range(15)) + 'i3\tLamp\ni99\t"Two\nlines"\n'
    keys = shop(tmp_path, clicks(), items)
    lines = look(keys, "GaCLLM").lines()
    assert "shop.item: 1 rows have the id of an earlier one, which counts" in lines
    assert "shop.item: 1 rows stand over several lines, by quotes" in lines


@pytest.mark.parametrize(
    ("command", "more", "found"),
    [
        (
            "leaderboard --models=BPR,EASE --datasets=shop",
            "--topk=20 --valid_metric=MRR@20",
            "topk",
        ),
        ("tune --model=EASE --dataset=shop", "--user_inter_num_interval=[50,inf)", "leaves none"),
    ],
)
def test_commands_of_many_runs_check_data_before_the_first(tmp_path, fails, command, more, found):
    where = f"--data_path={shop(tmp_path, clicks())['data_path']}"
    assert found in fails(*command.split(), where, *more.split())
    assert not list(tmp_path.rglob("job.json"))


def test_a_data_set_without_texts_passes_only_for_a_model_that_reads_none(tmp_path, capsys, fails):
    where = f"--data_path={shop(tmp_path, clicks())['data_path']}"
    main(["check", "--dataset=shop", where, "--model=LightGCN"])
    assert "no texts, which LightGCN does not read" in capsys.readouterr().out
    main(["check", "--dataset=shop", where, "--use_text=False"])
    items = "".join(f"i{n}\tNA\n" for n in range(15))
    for text in ("", f"item_id:token\ttitle:token\n{items}"):
        if text:
            (tmp_path / "shop/shop.item").write_text(text)
        for more in ((), ("--text_max_chars=16",)):
            error = fails("check", "--dataset=shop", where, *more)
            assert "the data set has no text" in error
            assert "nothing is known of any user or item of shop" in error


def test_users_with_one_interaction_each_have_no_test(tmp_path):
    keys = shop(tmp_path, [(f"u{n}", f"i{n % 12}", 1, n) for n in range(40)])
    with pytest.raises(ValueError, match="the test part has no interactions"):
        look(keys, eval_args={"order": "TO", "split": {"LS": "valid_and_test"}})


def test_a_user_of_all_items_has_no_negative_ones(tmp_path):
    keys = shop(tmp_path, clicks() + clicks(n_users=1, each=15))
    with pytest.raises(ValueError, match=r"1 users \('u0'\) have interacted with all 15 items"):
        look(keys, rm_dup_inter="first")
    look(keys, "EASE", rm_dup_inter="first", train_neg_sample_args=None)


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        (lambda n: f"{n:06d}", "leading zeros"),
        (lambda n: f"{n}.0", "without '.0'"),
        (lambda n: f" {n} ", "blanks"),
        (lambda n: f"b{n}", "alike"),
    ],
)
def test_ids_that_do_not_meet_end_the_run_with_ids_of_both_sides(tmp_path, change, hint):
    ids = [str(n) for n in range(1, 20)]
    with pytest.raises(ValueError, match=hint) as error:
        match_ids("item", tmp_path / "shop.item", ids, [change(n) for n in range(1, 20)])
    assert "'1'" in str(error.value)
    assert repr(change(1)) in str(error.value)


def test_half_of_the_ids_meeting_is_a_warning_with_the_share(tmp_path):
    share, warning = match_ids("item", tmp_path / "x.item", ["a", "b", "c", "d"], ["a", "b", "z"])
    assert share == 0.5
    assert "2 of 4 items" in warning
    assert match_ids("item", tmp_path / "x.item", ["a"], ["a"]) == (1.0, None)


def test_check_prints_what_was_read_and_texts_and_writes_nothing(tmp_path, capsys):
    items = "".join(f"i{n}\tRed Lamp {n}\n" for n in range(15))
    shop(tmp_path, clicks(), items)
    before = sorted(tmp_path.rglob("*"))
    main(["check", "--dataset=shop", f"--data_path={tmp_path}"])
    printed = capsys.readouterr().out
    assert "12 users, 15 items, 60 interactions" in printed
    assert "100% of the items have a row in the .item file" in printed
    assert "title: Red Lamp" in printed
    assert "nothing is known of 12 of 12 user nodes" in printed
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("model", ["BPR", "SASRec"])
def test_a_leaderboard_counts_interactions_whatever_the_columns_are_called(tmp_path, model):
    folder = tmp_path / "biz"
    folder.mkdir()
    rows = [*clicks(), ("u0", "i0", 1, 2_000_000_000), ("u0", "i0", 1, 2_000_000_001)]
    lines = "".join("\t".join(map(str, row)) + "\n" for row in rows)
    header = "person:token\tbusiness_id:token\tstars:float\twhen:float\n"
    (folder / "biz.inter").write_text(header + lines)
    keys = {
        "data_path": str(tmp_path),
        "USER_ID_FIELD": "person",
        "ITEM_ID_FIELD": "business_id",
        "TIME_FIELD": "when",
        "load_col": {"inter": "*"},
        "eval_args": {"order": "TO", "split": {"LS": "valid_and_test"}},
        **({"train_neg_sample_args": None} if model == "SASRec" else {}),
    }
    config = build_config(model, "biz", config_dict=keys)
    recorder = Recorder()
    recorder.on_split(*data_preparation(config, create_dataset(config)))
    n_repeats = len(rows) - len({row[:2] for row in rows})
    assert recorder.statistics["n_interactions"] == len(rows)
    assert recorder.statistics["n_repeats"] == n_repeats > 0


def test_a_page_on_ready_split_files_says_so():
    config = {
        "benchmark_filename": ["train", "valid", "test"],
        "eval_args": {"order": "RO", "split": {"RS": [0.8, 0.1, 0.1]}, "mode": {"test": "full"}},
    }
    assert evaluation(config) == "ready split files (train, valid, test), full sort"
