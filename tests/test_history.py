"""``mask_history``: sequential models rank what general models rank."""

from __future__ import annotations

import pytest
import torch

from recbole_gacllm.run_config import build_config
from tests.recommender import Recommender, without

LEAVE_ONE_OUT = {
    "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"},
    "train_neg_sample_args": None,
    "loss_type": "CE",
    "MAX_ITEM_LIST_LENGTH": 3,
}
#: Items of each user in order of time; the last is the test, the one before it validation.
SEQUENCES = {"ann": "abcdef", "bob": "cabd", "eve": "fedcb"}
#: What everybody is given, best first.
ORDER = "bacfde"


def write(root, sequences):
    (root / "letters").mkdir(parents=True)
    lines = [
        f"{user}\t{item}\t{time}\n"
        for user, items in sequences.items()
        for time, item in enumerate(items)
    ]
    head = "user_id:token\titem_id:token\ttimestamp:float\n"
    (root / "letters" / "letters.inter").write_text(head + "".join(lines))
    return {"data_path": str(root), "load_col": {"inter": ["user_id", "item_id", "timestamp"]}}


@pytest.fixture
def letters(settings, tmp_path):
    keys = write(tmp_path / "letters", SEQUENCES)
    return {**settings, **LEAVE_ONE_OUT, **keys, "metrics": ["MRR"], "topk": [6]} | {
        "valid_metric": "MRR@6",
        "metric_decimal_place": 12,
    }


@pytest.mark.parametrize("fast_paths", [True, False])
@pytest.mark.parametrize("eval_batch_size", [1, 4096])
@pytest.mark.parametrize(
    ("mask_history", "valid", "test"),
    [
        # The place of each user's item in ORDER: e, b, c of all; d, d, b with a and f f e c before.
        (None, [6, 1, 3], [4, 5, 1]),
        (False, [6, 1, 3], [4, 5, 1]),
        # Without what came before: of ann's abcd is left fe, of bob's ca bfde, of eve's fed bac.
        (True, [2, 1, 3], [1, 2, 1]),
    ],
)
def test_the_ranking_is_as_counted_by_hand(
    letters, fast_paths, eval_batch_size, mask_history, valid, test
):
    letters |= {"fast_paths": fast_paths, "eval_batch_size": eval_batch_size}
    if mask_history is not None:
        letters["mask_history"] = mask_history
    one = Recommender("GRU4Rec", letters, dataset="letters")
    scores = torch.zeros(one.dataset.item_num)
    scores[one.dataset.token2id("item_id", list(ORDER))] = torch.arange(6.0, 0.0, -1)
    one.model.full_sort_predict = lambda batch: scores.repeat(len(batch), 1)
    for part, places in ((one.valid, valid), (one.test, test)):
        result = one.trainer.evaluate(part, load_best_model=False)
        assert result["mrr@6"] == pytest.approx(sum(1 / place for place in places) / 3)


@pytest.mark.parametrize("model", ["SASRec", "BERT4Rec"])
def test_the_items_left_out_are_those_of_general_models(settings, model):
    keys = {**LEAVE_ONE_OUT, "mask_history": True, "MAX_ITEM_LIST_LENGTH": 5}
    general = Recommender("BPR", without(settings | keys, "train_neg_sample_args"))
    ours = Recommender(model, settings, **keys)
    theirs = Recommender(model, settings, **keys | {"mask_history": False})
    for name in ("valid", "test"):
        left_out = []
        for one in (ours, general):
            found = {}
            for batch in getattr(one, name):
                users = batch[0]["user_id"]
                items = one.dataset.id2token("item_id", batch[1][1])
                for row, item in zip(batch[1][0].tolist(), items, strict=True):
                    user = one.dataset.id2token("user_id", users[row].item())
                    found.setdefault(user, set()).add(item)
            left_out.append(found)
        assert left_out[0] == left_out[1]
        assert len(left_out[0]) == 24
        assert max(map(len, left_out[0].values())) > 5
        assert all(batch[1] is None for batch in getattr(theirs, name))


@pytest.mark.parametrize(
    ("model", "keys", "message"),
    [
        ("BPR", {"mask_history": "perhaps"}, "mask_history: 'perhaps' is not allowed"),
        ("SASRec", {"repeatable": True}, "mask_history: True does not go with repeatable: True"),
        ("BPR", {"repeatable": True}, "mask_history: True does not go with repeatable: True"),
        (
            "SASRec",
            {"eval_args": LEAVE_ONE_OUT["eval_args"] | {"mode": "uni5"}},
            r"mode .*sequential model SASRec.* Set mode: full",
        ),
        ("SASRec", {"benchmark_filename": ["a", "b", "c"]}, "does not go with benchmark_filename"),
    ],
)
def test_a_history_that_cannot_be_left_out_is_refused(settings, model, keys, message):
    keys = {**settings, **LEAVE_ONE_OUT, "mask_history": True, **keys}
    with pytest.raises(ValueError, match=message):
        build_config(model, "tiny", config_dict=keys)


def test_data_with_repeats_are_refused_and_said_how_many(letters, tmp_path):
    keys = write(tmp_path / "repeats", {"ann": "abcde", "bob": "cabd", "eve": "fedcf"})
    keys = letters | keys | {"mask_history": True}
    with pytest.raises(ValueError, match=r"1 of 6 held-out interactions .* rm_dup_inter: first"):
        Recommender("SASRec", keys, dataset="letters")
    Recommender("SASRec", keys, dataset="letters", rm_dup_inter="first")
    Recommender("EASE", keys, dataset="letters")
