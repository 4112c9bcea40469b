"""The leakage audit finds planted leaks of every kind and stays silent without one."""

import json

import numpy as np
import pytest

from recbole_gacllm.artifacts import manifests
from recbole_gacllm.convolution.graph import TrainGraph
from recbole_gacllm.convolution.layers import Layer
from recbole_gacllm.inspection import leakage
from recbole_gacllm.inspection.leakage import audit_leakage, verdict
from recbole_gacllm.inspection.mentions import Marks

N_USERS, N_ITEMS = 40, 60


class Data:
    """A random graph with held-out pairs; texts are given by each test."""

    def __init__(self, folder, user_ids=None, item_ids=None):
        rng = np.random.default_rng(0)
        users, items = np.nonzero(rng.random((N_USERS, N_ITEMS)) < 0.2)
        self.users = user_ids or [f"u{i}" for i in range(N_USERS)]
        self.items = item_ids or [f"i{i}" for i in range(N_ITEMS)]
        self.graph = TrainGraph(np.array(self.users), np.array(self.items), users, items)
        self.inputs, self.descriptions = folder / "inputs", folder / "descriptions"
        self.inputs.mkdir()
        self.descriptions.mkdir()
        self.graph.save(self.inputs / "graph.npz")
        self.layer().write(self.inputs / "layer_0.parquet")
        self.names = {id_: f"Great Film {chr(65 + i % 26)}{i}" for i, id_ in enumerate(self.items)}
        self.train = set(zip(users.tolist(), items.tolist(), strict=True))
        self.pairs = [
            (u, i)
            for u in range(N_USERS)
            for i in rng.permutation(N_ITEMS).tolist()[:6]
            if (u, i) not in self.train
        ]
        self.heldout = [(self.users[u], self.items[i]) for u, i in self.pairs]

    def of_user(self, user):
        """Held-out items of a user."""
        return [self.items[i] for u, i in self.pairs if u == user]

    def of_item(self, item):
        """Held-out users of an item."""
        return [self.users[u] for u, i in self.pairs if i == item]

    def layer(self, user=lambda user: "", item=lambda item: ""):
        return Layer.raw(
            {"user": self.users, "item": self.items},
            {"user": list(map(user, range(N_USERS))), "item": list(map(item, range(N_ITEMS)))},
        )

    def audit(self, user=lambda user: "", item=lambda item: "", **options):
        (self.inputs / "item_names.json").write_text(json.dumps(self.names))
        self.layer(user, item).write(self.descriptions / "layer_1.parquet")
        return audit_leakage(self.inputs, self.descriptions, self.heldout, seed=1, **options)

    def audit_items(self, written, **names):
        """The audit of texts that say ``written(item)`` of every held-out item of their user."""
        self.names.update(names)

        def leak(user):
            said = [written(item) for item in self.of_user(user)]
            return f"This person enjoys {', '.join(said)}, and comedies."

        return self.audit(leak)


@pytest.fixture
def data(tmp_path):
    return Data(tmp_path)


def syllables(index, alphabet):
    """A word of four letters that no other index has."""
    return "".join(alphabet[index // len(alphabet) ** k % len(alphabet)] for k in range(4))


def test_held_out_titles_in_descriptions_are_found(data):
    report = data.audit_items(lambda item: data.names[item].upper() + "!")
    assert report["heldout_mentions"] == report["n_pairs"] == report["n_heldout"] > 100
    assert report["n_checkable"] == report["n_pairs"]
    assert report["p_value"] < 1e-6
    assert report["edges_in_graph"] == 0
    assert verdict(report) == "suspicious"


def test_random_titles_are_no_leak(data):
    rng = np.random.default_rng(9)
    report = data.audit(lambda _: ", ".join(rng.permutation(list(data.names.values()))[:20]))
    assert report["heldout_mentions"] > 20
    assert report["p_value"] > 0.01


def test_naming_matched_items_more_often_is_no_leak(data):
    def others(user):
        known = {*data.of_user(user), *(data.items[i] for u, i in data.train if u == user)}
        return ", ".join(name for item, name in data.names.items() if item not in known)

    report = data.audit(others)
    assert report["heldout_mentions"] == 0
    assert report["matched_mentions"] == report["n_pairs"] > 100
    assert report["p_value"] == 1
    assert verdict(report) == "clean"


def test_no_mention_at_all_gives_no_p_value(data):
    report = data.audit(lambda _: "This person enjoys comedies.")
    assert report["heldout_mentions"] == report["matched_mentions"] == 0
    assert report["p_value"] is None
    assert verdict(report) == "clean"


def test_names_of_training_items_are_no_leak(data):
    def trained(user):
        return ", ".join(data.names[data.items[i]] for u, i in sorted(data.train) if u == user)

    # Half of the films stand in the data twice, as some of ml-100k do; three are part of one name.
    twins = {f"i{i}": f"Great Film {chr(65 + i % 26)}{i} of {i}" for i in range(30)}
    twins |= {f"i{30 + i}": name for i, name in enumerate(twins.values())}
    data.names |= twins | {"i57": "Great Film", "i58": "Film A0", "i59": "Great Film A0"}
    report = data.audit(trained)
    assert report["n_known_names"] > 20
    assert report["n_pairs"] > 50
    assert report["heldout_mentions"] == report["matched_mentions"] == 0


def test_short_names_of_training_items_are_no_leak(data):
    shorts = [f"{chr(65 + i // 8)}{chr(97 + i % 8)}" for i in range(30)]
    data.names = dict(zip(data.items, shorts + shorts, strict=True))
    report = data.audit(
        lambda user: " ".join(f'"{data.names[data.items[i]]}"' for u, i in data.train if u == user)
    )
    assert report["n_pairs"] == report["n_heldout"]
    assert report["heldout_mentions"] == report["matched_mentions"] == 0


def test_what_raw_texts_of_training_items_name_is_no_leak(data):
    def sequels(item):
        return f"As funny as {data.names[data.items[(item + 1) % N_ITEMS]]}."

    data.layer(item=sequels).write(data.inputs / "layer_0.parquet")
    report = data.audit(
        lambda user: " ".join(sequels(i) for u, i in sorted(data.train) if u == user)
    )
    assert report["n_known_texts"] > 10
    assert report["heldout_mentions"] == report["matched_mentions"] == 0
    assert report["n_heldout"] == report["n_pairs"] + report["n_known_texts"]


def test_only_texts_that_a_prompt_shows_are_known(data):
    def sequels(item):
        return f"As funny as {data.names[data.items[(item + 1) % N_ITEMS]]}."

    data.layer(item=sequels).write(data.inputs / "layer_0.parquet")
    key = {"neighbor_rule": "random", "n_neighbors": 1, "seed": 1}
    counts = []
    for made in (key, {**key, "n_neighbors": 99}, {**key, "imported": "digest"}, {}):
        manifest = {"stage": "descriptions", "key": made}
        manifests.write_manifest(data.descriptions, manifest)
        counts.append(data.audit()["n_known_texts"])
    assert 0 < counts[0] < counts[1] / 3
    assert counts[1] == counts[2] == counts[3]


def test_the_result_does_not_depend_on_how_many_nodes_are_looked_at_at_once(data, monkeypatch):
    data.layer(item=lambda item: data.names[data.items[item - 1]]).write(
        data.inputs / "layer_0.parquet"
    )
    texts = [", ".join(list(data.names.values())[user : user + 15]) for user in range(N_USERS)]
    whole = data.audit(lambda user: texts[user])
    monkeypatch.setattr(leakage, "_ROWS_AT_ONCE", 7)
    assert data.audit(lambda user: texts[user]) == whole
    assert whole["n_known_texts"] > 10
    assert whole["heldout_mentions"] > 5


def test_what_features_of_a_node_name_is_no_leak(data):
    def bio(user):
        return f"Favourites: {', '.join(data.names[item] for item in data.of_user(user))}."

    data.layer(user=bio).write(data.inputs / "layer_0.parquet")
    report = data.audit(bio)
    assert report["n_pairs"] == report["n_heldout"]
    assert report["heldout_mentions"] == report["matched_mentions"] == 0


def test_the_p_value_is_the_least_of_the_kinds_times_their_number():
    def kind(heldout, matched):
        pairs = [(True, False)] * heldout + [(False, True)] * matched + [(True, True)] * 5
        return dict(zip(("heldout", "matched"), np.array(pairs).T, strict=True))

    kinds = {"names": kind(6, 0), "parts": kind(3, 3), "ids": kind(0, 0)}
    assert leakage._p_value(kinds) == pytest.approx(2 * 0.5**6)
    assert leakage._p_value({"ids": kind(0, 0)}) is None


def test_a_held_out_pair_in_the_training_graph_is_counted(data):
    data.heldout += [(data.users[u], data.items[i]) for u, i in sorted(data.train)[:3]]
    report = data.audit()
    assert report["edges_in_graph"] == 3
    assert report["n_known_names"] == 3
    assert verdict(report) == "suspicious"


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("{chinese}", "{chinese}"),
        ("{thai}", "{thai}"),
        ("{korean}", "{korean}을"),
        ("{hindi}", "{hindi}"),
        ("Go{number}", "go{number}"),
        ("{word} (1995)", "{word}"),
        ("{word}", "{word} (1995)"),
        ("{word}, The", "the {word}"),
        ("The {word}", "{word}, The"),
        ("Les {word}", "Les {word}"),
        ("Amélie de {word}", "Amelie de {word}"),
        ("Amelie de {word}", "Amélie de {word}"),
        ("Łódź {word}", "Lodz {word}"),
        ("{word} & Sons", "{word} and Sons"),
        ("Mü{word}", "Mue{word}"),
        ("Spider-{word}", "Spider{word}"),
        ("S*P*{word}'s", "SP{word}s"),
        ("Dr. {word} or: How I Learned to Stop Worrying", "{word}"),
        ("The Long Road to {word} Lake", "Road to {word}"),
        ("长长的路{chinese}和他的朋友们", "他喜欢{chinese}和他"),
    ],
)
def test_names_are_found_in_any_script_and_spelling(data, name, written):
    def filled(wording, item):
        index = data.items.index(item)
        return wording.format(
            chinese=syllables(index, "山水火木"),
            thai=syllables(index, "กขคง") + "้า",
            korean=syllables(index, "가나다라"),
            hindi="कखगघचछजझ"[index // 8] + "ो" + "टठडतथदधन"[index % 8] + "े",
            number=100 + index,
            word=syllables(index, "abcd").title() + "ov",
        )

    data.names = {item: filled(name, item) for item in data.items}
    text = "他喜欢{}和喜剧" if "chinese" in name else "This person enjoys {} and comedies."

    report = data.audit_items(lambda item: text.format(filled(written, item)))
    assert report["heldout_mentions"] == report["n_pairs"] > 100
    assert report["p_value"] < 1e-6
    clean = data.audit(lambda _: text.format("films of any kind"))
    assert clean["heldout_mentions"] == clean["matched_mentions"] == 0


@pytest.mark.parametrize("written", ['films such as "{}"', "films such as {}", "《{}》"])
def test_short_names_are_found_where_they_stand_out(data, written):
    data.names = {id_: chr(65 + i // 8) + chr(97 + i % 8) for i, id_ in enumerate(data.items)}
    report = data.audit_items(lambda item: written.format(data.names[item]))
    assert report["heldout_mentions"] == report["n_pairs"] > 100
    assert report["p_value"] < 1e-6
    assert report["not_checked"]["item_names"] == report["n_heldout"]


def test_short_names_are_no_words_of_a_sentence(data):
    data.names |= {"i1": "It", "i2": "Up", "i3": "Her", "i4": "M", "i5": "The Game"}
    marks = Marks.of("item", data.items, [data.names[item] for item in data.items])
    found = marks.in_texts([["It is up to her. Up, and I'm in a game. Her taste: it's a game."]])
    assert found.nnz == 0


@pytest.mark.parametrize(
    ("id_", "written"),
    [
        ("B00{:05}X", "{}"),
        ("i{}", "{}"),
        ("{:08}", "{}"),
        ("item_{}", "item_{}"),
        ("9f3c-{}", "9F3C-{}"),
        ("{}", "item {}"),
        ("{}", "#{}"),
    ],
)
def test_ids_of_items_are_found(tmp_path, id_, written):
    data = Data(tmp_path, item_ids=[id_.format(i) for i in range(N_ITEMS)])
    number = {item: i for i, item in enumerate(data.items)}
    shown = written if id_ == "{}" or written == "item_{}" else "{}"

    def as_written(item):
        return written.format(number[item]) if shown != "{}" else item

    report = data.audit_items(as_written)
    assert report["heldout_mentions"] == report["n_pairs"] > 100
    assert report["kinds"]["item_ids"]["heldout_mentions"] == report["n_pairs"]
    assert report["p_value"] < 1e-6


def test_ids_in_a_list_are_found(tmp_path):
    data = Data(tmp_path, item_ids=[str(i) for i in range(N_ITEMS)])
    report = data.audit(lambda user: f"Likes movies {', '.join(data.of_user(user))} and 99.")
    assert report["heldout_mentions"] == report["n_pairs"]


def test_bare_numbers_are_no_ids_and_counted(tmp_path):
    data = Data(tmp_path, item_ids=[str(i) for i in range(N_ITEMS)])
    data.names = dict(zip(data.items, data.items, strict=True))
    report = data.audit(lambda user: f"A viewer aged {' or '.join(data.of_user(user))}, in 1995.")
    assert report["heldout_mentions"] == 0
    assert report["not_checked"]["item_ids"] == report["n_heldout"]
    assert report["not_checked"]["item_names"] == report["n_heldout"]


@pytest.mark.parametrize(
    ("id_", "name", "written"),
    [
        ("u{}", None, "{id}"),
        ("{}", None, "user {id}"),
        ("A1B{}Q", None, "{id}"),
        ("{}", "Anna {word}", "anna {word}"),
        ("{}", "Anna {word}", "{word}"),
        ("{}", "张{chinese}", "观众张{chinese}喜欢"),
    ],
)
def test_users_in_the_texts_of_items_are_found(tmp_path, id_, name, written):
    data = Data(tmp_path, user_ids=[id_.format(i) for i in range(N_USERS)])
    filled = {
        user: {"id": user, "word": syllables(i, "abcd").title() + "ov"}
        | {"chinese": syllables(i, "山水火木")}
        for i, user in enumerate(data.users)
    }
    names = {user: name.format(**filled[user]) for user in data.users} if name else None

    def leak(item):
        users = [written.format(**filled[user]) for user in data.of_item(item)]
        return f"A film for {', '.join(users)}."

    report = data.audit(item=leak, user_names=names)
    assert report["heldout_mentions"] == report["n_pairs"] > 100
    assert report["p_value"] < 1e-6
    assert all(not of["heldout_mentions"] for k, of in report["kinds"].items() if "item" in k)


def test_users_of_training_edges_in_the_texts_of_items_are_no_leak(data):
    data.names = {item: f"Great {item}" for item in data.items}
    report = data.audit(
        item=lambda item: " ".join(data.users[u] for u, i in sorted(data.train) if i == item)
    )
    assert report["heldout_mentions"] == report["matched_mentions"] == 0


@pytest.mark.parametrize("with_layer_1", [True, False])
def test_imported_texts_of_layer_0_are_audited(data, with_layer_1):
    layer = data.layer(user=lambda user: ", ".join(data.names[i] for i in data.of_user(user)))
    (data.inputs / "item_names.json").write_text(json.dumps(data.names))
    descriptions = None
    if with_layer_1:
        data.audit(lambda _: "comedies")
        descriptions = data.descriptions
    for status, p_is_small in (("imported", True), ("raw", False)):
        layer.statuses["user"] = [status] * N_USERS
        layer.write(data.inputs / "layer_0.parquet")
        report = audit_leakage(data.inputs, descriptions, data.heldout, seed=1)
        assert (report["heldout_mentions"] == report["n_pairs"] > 100) == p_is_small
        assert (verdict(report) == "suspicious") == p_is_small
    assert verdict(report) == ("clean" if with_layer_1 else "unseen")
    n_without = 0 if with_layer_1 else report["n_heldout"]
    assert report["not_checked"]["user_texts"] == n_without


def test_little_that_could_be_checked_is_not_called_clean(tmp_path):
    ids = {"user_ids": [str(i) for i in range(N_USERS)], "item_ids": [str(i) for i in range(60)]}
    data = Data(tmp_path, **ids)
    data.names = dict.fromkeys(data.items, "Up")
    report = data.audit(lambda _: "This person enjoys comedies.", lambda _: "A comedy.")
    assert report["n_checkable"] == 0
    assert report["p_value"] is None
    assert verdict(report) == "unseen"
    data.names |= {item: f"Great Film {item}" for item in data.items[:50]}
    assert verdict(data.audit(lambda _: "comedies")) == "clean"


def test_verdict_of_a_record_of_an_older_version():
    record = {"n_pairs": 9, "heldout_mentions": 0, "matched_mentions": 0, "edges_in_graph": 0}
    assert verdict({**record, "p_value": None}) == "clean"
    assert verdict({**record, "p_value": 0.04}) == "suspicious"


def test_matches_are_of_nearly_the_same_popularity(data, monkeypatch):
    drawn = []
    matched = leakage._matched

    def recording(users, items, *others):
        drawn.append((users, items, matched(users, items, *others)))
        return drawn[-1][2]

    monkeypatch.setattr(leakage, "_matched", recording)
    # Those without a name have nothing but the graph to tell that they were touched; twins are
    # known by name, sequels by the raw texts of what came before.
    data.names |= {item: item for item in data.items[:20]}
    data.names |= {data.items[30 + i]: data.names[data.items[20 + i]] for i in range(10)}
    sequel = {50 + i: data.names[data.items[40 + i]] for i in range(10)}
    data.layer(item=lambda item: sequel.get(item, "")).write(data.inputs / "layer_0.parquet")
    data.audit()
    users, items, match = drawn[0]
    for user, item in zip(users.tolist(), match.tolist(), strict=True):
        trained = [i for u, i in data.train if u == user]
        assert data.names[data.items[item]] not in [data.names[data.items[i]] for i in trained]
        assert data.names[data.items[item]] not in [sequel.get(i) for i in trained]
    touched = data.train | set(data.pairs)
    assert not touched & set(zip(users.tolist(), match.tolist(), strict=True))
    degree = data.graph.degrees("item")
    assert np.abs(degree[items] - degree[match]).mean() < 1
    assert abs((degree[items] - degree[match]).mean()) < 0.3
