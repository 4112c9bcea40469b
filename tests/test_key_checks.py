"""Keys of RecBole that it would misread, or fail on hours later, are refused at the door."""

from __future__ import annotations

import pytest

from recbole_gacllm.plugin.key_checks import check_given, known_keys
from recbole_gacllm.run_config import build_config

BY_TIME = {"order": "TO", "split": {"LS": "valid_and_test"}}


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("epoch", 5, "did you mean epochs"),
        ("learningrate", 0.1, "did you mean learning_rate"),
        ("nonsense_here", 1, "no near match"),
        ("eval_setting", "RO_RS,full", "set eval_args, such as {split"),
        ("min_user_inter_num", 5, "set user_inter_num_interval"),
        ("seed", "abc", "seed: 'abc' is not allowed; it must be a whole number"),
        ("epochs", 2.5, "epochs: 2.5"),
        ("epochs", -1, "0 or more"),
        ("train_batch_size", 0, "1 or more"),
        ("use_gpu", "yes", "True or False"),
        ("learning_rate", "fast", "must be a number"),
        ("learning_rate", -1, "0 or more"),
        ("weight_decay", -0.1, "0 or more"),
        ("learner", "adamm", "'adamm' is not one of adam, adamw, sgd"),
        ("user_inter_num_interval", "[5,inf", "'\\[5,inf' is no interval"),
        ("item_inter_num_interval", "[9,2]", "is no interval"),
        ("val_interval", "rating>3", "must be a field and its interval"),
        ("val_interval", {"rating": "3-5"}, "'3-5'} must be a field and its interval"),
        ("rm_dup_inter", "yes", "rm_dup_inter: 'yes' is not allowed"),
        ("load_col", "{inter: '*'}", "words in quotes"),
        ("load_col", {"inter": "item_id"}, "must be the columns of each file"),
        ("threshold", 4, "threshold: 4 must be a field"),
    ],
)
def test_a_key_that_would_be_misread_is_refused(key, value, found):
    with pytest.raises(ValueError, match=found) as error:
        check_given({key: value})
    assert key in str(error.value)


@pytest.mark.parametrize(
    "given",
    [
        {"learner": "AdamW", "learning_rate": 1, "epochs": 0, "eval_step": 0, "gpu_id": "0,1"},
        {"user_inter_num_interval": "[5,inf)", "item_inter_num_interval": "(2,4];[7,8]"},
        {"val_interval": {"rating": "[3.5,inf)", "genre": ["a"]}},
        {
            "alias_of_item_id": ["last"],
            "mlp_hidden_size": [8],
            "train_share": 0.5,
            "preset": "best",
        },
    ],
)
def test_what_recbole_reads_passes(given):
    check_given(given)


def test_every_key_of_recboles_own_yaml_files_is_known():
    assert {"lambda_coeff", "ssl_temp", "MAX_ITEM_LIST_LENGTH", "kg_reverse_r"} <= known_keys()


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        ({"topk": (5, 10)}, r"topk: \(5, 10\).*--topk="),
        ({"topk": [0]}, "topk"),
        ({"metrics": ["HR", "NDCG"]}, "did you mean Hit"),
        ({"metrics": ["Recal"]}, "did you mean Recall"),
        ({"metrics": "Recall,NDCG"}, "one name; a list is"),
        ({"metrics": ["AUC"]}, "does not go with full ranking"),
        ({"metrics": ["AUC", "NDCG"]}, "mixes metrics of rankings"),
        ({"valid_metric": "NDCG@20"}, "valid_metric: 'NDCG@20' is not computed"),
        ({"valid_metric": "MAP@10"}, "valid_metric"),
        ({"valid_metric": "NDCG"}, "such as NDCG@10"),
        ({"eval_args": "RO_RS,full"}, "of an earlier RecBole"),
        ({"eval_args": {"split": {"RS": [0.8, 0.2]}}}, "three shares"),
        ({"eval_args": {"split": {"LS": "last"}}}, "valid_and_test"),
        ({"eval_args": {"order": "time"}}, "RO .random. or TO"),
        ({"eval_args": {"mode": "uni"}}, "uni100"),
        ({"eval_args": {"mode": "labeled"}}, "labeled scores the labelled rows alone"),
        ({"eval_args": {"splits": {}}}, "splits is not one of"),
        ({"benchmark_filename": ["train", "test"]}, "must name three files"),
        ({"ITEM_ID_FIELD": "business_id"}, "ITEM_ID_FIELD: 'business_id' is not a column of"),
        ({"val_interval": {"rating": "[3,inf)"}, "load_col": {"inter": ["user_id", "item_id"]}},
         r"load_col: \['user_id', 'item_id'\].*without 'rating'"),
        ({"val_interval": {"stars": "[3,inf)"}}, "val_interval: 'stars' is not a column"),
        ({"normalize_field": ["stars"]}, "normalize_field: 'stars' is not a column"),
        ({"eval_args": BY_TIME, "TIME_FIELD": "when"}, "TIME_FIELD: 'when' is not a col"),
        ({"eval_args": BY_TIME, "load_col": {"inter": ["user_id", "item_id"]}},
         r"load_col: \{inter: \[user_id, item_id, timestamp\]\}"),
        ({"ITEM_ID_FIELD": "user_id"}, "USER_ID_FIELD and ITEM_ID_FIELD: both are 'user_id'"),
    ],
)  # fmt: skip
def test_an_evaluation_that_cannot_be_is_refused_before_data_is_read(settings, keys, found):
    with pytest.raises(ValueError, match=found):
        build_config("BPR", "tiny", config_dict={**settings, **keys})


def test_columns_follow_the_fields_and_what_filters_need_and_a_star_loads_all(settings, tmp_path):
    folder = tmp_path / "biz"
    folder.mkdir()
    (folder / "biz.inter").write_text(
        "user_id:token\tbusiness_id:token\tstars:float\tdate:token\nu\ti\t5\t2020-01-01\n"
    )
    keys = {
        "data_path": str(tmp_path),
        "ITEM_ID_FIELD": "business_id",
        "TIME_FIELD": "date",
        "val_interval": {"stars": "[4,inf)"},
        "eval_args": BY_TIME,
    }
    config = build_config("BPR", "biz", config_dict=keys)
    assert config["load_col"] == {"inter": ["user_id", "business_id", "date", "stars"]}
    config = build_config("BPR", "tiny", config_dict={**settings, "load_col": {"inter": "*"}})
    assert config["load_col"] == {"inter": "*"}


def test_the_folder_of_the_data_set_itself_is_told(settings, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "mine.inter").write_text("user_id:token\titem_id:token\nu\ti\n")
    with pytest.raises(ValueError, match=rf"--data_path={tmp_path}"):
        build_config("BPR", "mine", config_dict={"data_path": str(folder)})


def test_a_sequential_model_needs_histories_in_ready_split_files(settings, tmp_path):
    folder = tmp_path / "ready"
    folder.mkdir()
    for part in ("train", "valid", "test"):
        file = folder / f"ready.{part}.inter"
        file.write_text("user_id:token\titem_id:token\ttimestamp:float\nu\ti\t1\n")
    parts = ["train", "valid", "test"]
    keys = {"data_path": str(tmp_path), "benchmark_filename": parts, "load_col": {"inter": "*"}}
    build_config("BPR", "ready", config_dict=keys)
    with pytest.raises(ValueError, match="no column 'item_id_list'"):
        build_config("SASRec", "ready", config_dict=keys)
