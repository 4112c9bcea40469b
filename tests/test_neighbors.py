import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recbole_gacllm.convolution.graph import RULES, TrainGraph, select_neighbors

# Ana took all, Ben two, Cy one, Dan none; "tent" has one taker, "lamp" two, "book" three.
ANA, BEN, CY, DAN = range(4)
LAMP, BOOK, TENT = range(3)
EDGES = [(ANA, LAMP, 1.0), (ANA, BOOK, 3.0), (ANA, TENT, 2.0), (BEN, LAMP, 5.0), (BEN, BOOK, 4.0)]
EDGES += [(CY, BOOK, 6.0)]


def graph(edges=EDGES, times=True):
    users, items, timestamps = (np.array(column) for column in zip(*edges, strict=True))
    return TrainGraph(
        np.array(["ana", "ben", "cy", "dan"]),
        np.array(["lamp", "book", "tent"]),
        users,
        items,
        timestamps if times else None,
    )


def by_token(graph, lists, side):
    other = graph.tokens("item" if side == "user" else "user")
    return {
        str(token): [str(other[neighbor]) for neighbor in lists.of(node)]
        for node, token in enumerate(graph.tokens(side))
    }


@st.composite
def graphs(draw):
    n_users, n_items = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    pairs = draw(
        st.lists(st.tuples(st.integers(0, n_users - 1), st.integers(0, n_items - 1)), max_size=30)
    )
    times = draw(st.lists(st.integers(0, 3), min_size=len(pairs), max_size=len(pairs)))
    return TrainGraph(
        np.array([f"u{n}" for n in range(n_users)]),
        np.array([f"i{n}" for n in range(n_items)]),
        np.array([user for user, _ in pairs], dtype=np.int64),
        np.array([item for _, item in pairs], dtype=np.int64),
        np.array(times, dtype=np.float64),
    )


def renumbered(graph, seed):
    """The same graph with other internal ids and another edge order."""
    rng = np.random.default_rng(seed)
    new_user, new_item = (
        rng.permutation(len(graph.user_tokens)),
        rng.permutation(len(graph.item_tokens)),
    )
    edges = rng.permutation(graph.n_edges)
    assert graph.timestamps is not None
    return TrainGraph(
        graph.user_tokens[np.argsort(new_user)],
        graph.item_tokens[np.argsort(new_item)],
        new_user[graph.users][edges],
        new_item[graph.items][edges],
        graph.timestamps[edges],
    )


def test_recent_takes_the_latest_and_rare_first_the_least_taken():
    recent = select_neighbors(graph(), "user", "recent", 2, seed=0)
    assert by_token(graph(), recent, "user") == {
        "ana": ["book", "tent"],
        "ben": ["lamp", "book"],
        "cy": ["book"],
        "dan": [],
    }
    rare = select_neighbors(graph(), "user", "rare_first", 2, seed=0)
    assert by_token(graph(), rare, "user") == {
        "ana": ["tent", "lamp"],
        "ben": ["lamp", "book"],
        "cy": ["book"],
        "dan": [],
    }
    takers = select_neighbors(graph(), "item", "rare_first", 8, seed=0)
    assert by_token(graph(), takers, "item") == {
        "lamp": ["ben", "ana"],
        "book": ["cy", "ben", "ana"],
        "tent": ["ana"],
    }


def test_random_lists_change_with_the_seed_and_only_with_it():
    tokens = np.array([f"t{n}" for n in range(50)])
    zeros = np.zeros(50, dtype=np.int64)
    one_user = TrainGraph(np.array(["u"]), tokens, zeros, np.arange(50))
    lists = [list(select_neighbors(one_user, "user", "random", 8, s).of(0)) for s in (0, 0, 1)]
    assert lists[0] == lists[1]
    assert lists[0] != lists[2]


def test_random_gives_every_neighbor_the_same_chance():
    tokens = np.array([f"t{n}" for n in range(10)])
    n_users = 2_000
    full = TrainGraph(
        np.array([f"u{n}" for n in range(n_users)]),
        tokens,
        np.repeat(np.arange(n_users), 10),
        np.tile(np.arange(10), n_users),
    )
    chosen = np.bincount(select_neighbors(full, "user", "random", 3, seed=7).indices, minlength=10)
    # Binomial(2000, .3): mean 600, standard deviation 20.5.
    assert chosen.min() > 500
    assert chosen.max() < 700


@given(graphs(), st.sampled_from(RULES), st.integers(0, 4), st.integers(0, 2**32))
def test_lists_do_not_depend_on_internal_ids_or_edge_order(graph, rule, n_neighbors, seed):
    other = renumbered(graph, seed)
    assert other.fingerprint() == graph.fingerprint()
    for side in ("user", "item"):
        lists = select_neighbors(graph, side, rule, n_neighbors, seed)
        again = select_neighbors(other, side, rule, n_neighbors, seed)
        assert by_token(graph, lists, side) == by_token(other, again, side)


@given(graphs(), st.sampled_from(RULES), st.integers(0, 4))
def test_lists_hold_distinct_training_neighbors_and_as_many_as_there_are_up_to_n(graph, rule, n):
    for side, other in (("user", "item"), ("item", "user")):
        lists = select_neighbors(graph, side, rule, n, seed=0)
        assert len(lists.indptr) == len(graph.tokens(side)) + 1
        for node, degree in enumerate(graph.degrees(side)):
            chosen = list(lists.of(node))
            assert len(chosen) == len(set(chosen)) == min(degree, n)
            assert set(chosen) <= set(graph.ends(other)[graph.ends(side) == node])


@given(graphs(), st.sampled_from(RULES), st.integers(1, 5))
def test_lists_do_not_depend_on_how_many_edges_are_sorted_at_once(graph, rule, n_edges):
    for side in ("user", "item"):
        whole = select_neighbors(graph, side, rule, 2, seed=0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("recbole_gacllm.convolution.graph._EDGES_A_BLOCK", n_edges)
            parts = select_neighbors(graph, side, rule, 2, seed=0)
        assert parts.indptr.tolist() == whole.indptr.tolist()
        assert parts.indices.tolist() == whole.indices.tolist()


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.floats(0, 9)), max_size=30))
def test_each_of_many_repeated_interactions_is_one_edge_at_its_latest_time(interactions):
    latest = {}
    for user, item, time in interactions:
        latest[user, item] = max(time, latest.get((user, item), time))
    users, items, times = (
        (np.array(column) for column in zip(*interactions, strict=True))
        if (interactions)
        else (np.array([], dtype=int),) * 3
    )
    tokens = np.array(["a", "b", "c"])
    made = TrainGraph(tokens, tokens, users, items, times)
    edges = zip(made.users.tolist(), made.items.tolist(), made.timestamps.tolist(), strict=True)
    assert list(edges) == [(*pair, time) for pair, time in sorted(latest.items())]
    assert TrainGraph(tokens, tokens, users, items).n_edges == len(latest)
    assert made.degrees("user").tolist() == [sum(u == n for u, _ in latest) for n in range(3)]


def test_a_list_does_not_depend_on_other_nodes():
    whole = graph(times=False)
    users = whole.users == ANA
    alone = TrainGraph(np.array(["ana"]), whole.item_tokens, whole.users[users], whole.items[users])
    lists = [select_neighbors(g, "user", "random", 2, seed=3).of(ANA) for g in (whole, alone)]
    assert list(lists[0]) == list(lists[1])


def test_the_fingerprint_tells_edges_times_and_isolated_nodes_apart():
    later = [*EDGES[:-1], (CY, BOOK, 7.0)]
    elsewhere = [*EDGES[:-1], (CY, TENT, 6.0)]
    whole = graph()
    without_dan = TrainGraph(
        whole.user_tokens[:3], whole.item_tokens, whole.users, whole.items, whole.timestamps
    )
    swapped = TrainGraph(
        whole.item_tokens, whole.user_tokens, whole.items, whole.users, whole.timestamps
    )
    prints = {g.fingerprint() for g in (graph(later), graph(elsewhere), graph(times=False))}
    prints |= {g.fingerprint() for g in (whole, without_dan, swapped)}
    assert len(prints) == 6


@pytest.mark.parametrize("times", [True, False])
def test_a_saved_graph_comes_back_and_no_part_file_stays(tmp_path, times):
    graph(times=times).save(tmp_path / "graph.npz")
    loaded = TrainGraph.load(tmp_path / "graph.npz")
    assert loaded.fingerprint() == graph(times=times).fingerprint()
    assert (loaded.timestamps is None) is not times
    assert [path.name for path in tmp_path.iterdir()] == ["graph.npz"]


def test_a_graph_without_edges_has_empty_lists(tmp_path):
    none = np.array([], dtype=np.int64)
    empty = TrainGraph(np.array(["u"]), np.array([], dtype=str), none, none)
    empty.save(tmp_path / "g.npz")
    loaded = TrainGraph.load(tmp_path / "g.npz")
    assert loaded.fingerprint() == empty.fingerprint()
    assert by_token(loaded, select_neighbors(loaded, "user", "random", 8, 0), "user") == {"u": []}


def test_recent_without_timestamps_names_the_next_step():
    with pytest.raises(ValueError, match="load_col"):
        select_neighbors(graph(times=False), "user", "recent", 8, seed=0)


def test_an_unknown_rule_or_a_negative_count_is_refused():
    with pytest.raises(ValueError, match="random, recent, rare_first"):
        select_neighbors(graph(), "user", "popular", 8, seed=0)
    with pytest.raises(ValueError, match="n_neighbors is -1"):
        select_neighbors(graph(), "user", "random", -1, seed=0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"user_tokens": np.array(["a", "a"])}, "repeats"),
        ({"items": np.array([0])}, "give pairs"),
        ({"items": np.array([0, 2])}, r"0\.\.2, but there are 2"),
        ({"users": np.array([-1, 0])}, "count from 0"),
        ({"users": np.array([0.0, 1.0])}, "ints"),
        ({"timestamps": np.array([1.0, np.nan])}, "NaN"),
        ({"timestamps": np.array([1.0])}, "give one each"),
    ],
)
def test_an_impossible_graph_is_refused(changed, message):
    good = {
        "user_tokens": np.array(["a", "b"]),
        "item_tokens": np.array(["x", "y"]),
        "users": np.array([0, 1]),
        "items": np.array([1, 0]),
        "timestamps": np.array([1.0, 2.0]),
    }
    TrainGraph(**good)
    with pytest.raises(ValueError, match=message):
        TrainGraph(**(good | changed))
