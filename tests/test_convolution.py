"""The convolution of descriptions, with a fake generator: order, store, retries, leakage."""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

import numpy as np
import pytest

from recbole_gacllm.config import shipped_path
from recbole_gacllm.convolution.convolution import Convolution, record_of
from recbole_gacllm.convolution.graph import TrainGraph
from recbole_gacllm.convolution.layers import SIDES, Layer
from recbole_gacllm.convolution.prompts import PromptTemplates
from recbole_gacllm.convolution.requests import RETRY_TEMPERATURE, RequestMaker
from recbole_gacllm.convolution.store import DescriptionStore
from recbole_gacllm.convolution.text import nothing_known
from recbole_gacllm.errors import GenerationError
from recbole_gacllm.llm.generator import Sampling
from recbole_gacllm.sft.pairs import sample_pairs, told_edges

from .conftest import our_keys
from .fake_generator import FakeGenerator

NOTHING = {"user": nothing_known("person"), "item": nothing_known("film")}
GREEDY = Sampling(64, 0.0, 1.05)


class WordTokenizer:
    """A token is a word between blanks."""

    special_tokens = frozenset({"<|end|>"})

    def encode_chat(self, messages):
        return [0] * sum(len(message["content"].split()) for message in messages)

    def count_tokens(self, texts):
        return [len(text.split()) for text in texts]

    def truncate(self, texts, max_tokens):
        return [" ".join(text.split()[:max_tokens]) for text in texts]


def graph_of(n_users=6, n_items=8):
    users, items = np.nonzero((np.arange(n_users)[:, None] + np.arange(n_items)) % 3 == 0)
    return TrainGraph(
        np.array([f"u{i}" for i in range(n_users)]),
        np.array([f"i{i}" for i in range(n_items)]),
        users,
        items,
    )


def raw_layer(graph):
    return Layer.raw(
        {side: graph.tokens(side).tolist() for side in SIDES},
        {
            "user": [
                f"Reader of kind {i} and nothing else." for i in range(len(graph.user_tokens))
            ],
            "item": [f"Film of number {i} in a row." for i in range(len(graph.item_tokens))],
        },
    )


@pytest.fixture
def templates():
    return PromptTemplates.load(shipped_path("properties", "prompts"), "person", "film")


def options_of(n_tokens=64, temperature=0.0, repetition_penalty=1.0, **keys):
    return our_keys(
        n_neighbors=keys.pop("n_neighbors", 3),
        llm_max_prompt_tokens=300,
        llm_max_neighbor_tokens=32,
        llm_max_new_tokens=n_tokens,
        llm_temperature=temperature,
        llm_repetition_penalty=repetition_penalty,
        **keys,
    )


@pytest.fixture
def convolve(tmp_path, templates):
    """Runs one layer; returns the layer above, its report and the generator."""

    def run(graph, below, generator=None, n_neighbors=3, key=None, temperature=0.0, words=64):
        generator = generator or FakeGenerator()
        options = options_of(words, temperature, n_neighbors=n_neighbors)
        key = key or {"model": "fake"}
        maker = RequestMaker(graph, templates, WordTokenizer(), key, options, 2020)
        with DescriptionStore(tmp_path / "store.sqlite") as store:
            convolution = Convolution(maker, store, lambda: generator, False)
            try:
                return (*convolution.next_layer(below, NOTHING, 1), generator)
            finally:
                convolution.close()

    return run


def prompt_of(request):
    return "\n".join(message["content"] for message in request.messages)


def test_both_sides_read_layer_l_and_only_their_training_neighbours(convolve):
    graph = graph_of()
    below = raw_layer(graph)
    above, report, generator = convolve(graph, below, n_neighbors=8)
    assert report.n_generated == report.n_nodes == 14
    for side, other in (("user", "item"), ("item", "user")):
        assert all(status == "generated" for status in above.statuses[side])
        for node, text in enumerate(below.texts[side]):
            prompt = next(prompt_of(r) for r in generator.requests if f": {text}" in prompt_of(r))
            ends, others = graph.ends(side), graph.ends(other)
            expected = set(others[ends == node].tolist())
            shown = {n for n, t in enumerate(below.texts[other]) if f"- {t}" in prompt}
            assert shown == expected
    assert not set(above.texts["user"]) & set(below.texts["user"])


def test_a_second_run_generates_nothing_and_gives_the_same_texts(convolve):
    graph = graph_of()
    first, _, _ = convolve(graph, raw_layer(graph))
    second, report, generator = convolve(graph, raw_layer(graph))
    assert generator.requests == []
    assert (report.n_generated, report.n_from_store) == (0, 14)
    assert second.texts == first.texts


TOKENS = ("n_prompt_tokens", "n_cached_tokens", "n_output_tokens", "n_retried")


def test_the_tokens_of_a_layer_are_those_of_its_descriptions_whoever_made_them(convolve):
    """Once with two processes that end before their time, and again with all in the store."""
    graph = graph_of(40, 60)
    below = raw_layer(graph)

    def answer(request):
        is_bad = "number 7 " in prompt_of(request) and request.sampling.temperature == 0
        return "" if is_bad else f"A description of {len(prompt_of(request))} letters."

    _, whole, _ = convolve(graph, below, FakeGenerator(answer=answer), key={"model": "whole"})
    assert whole.n_retried > 0
    for fail_after in (50, 20):
        with pytest.raises(GenerationError):
            convolve(graph, below, FakeGenerator(answer=answer, fail_after=fail_after))
    _, report, _ = convolve(graph, below, FakeGenerator(answer=answer))
    assert report.n_generated + report.n_from_store == whole.n_generated
    _, again, generator = convolve(graph, below)
    assert generator.requests == []
    for other in (report, again):
        assert [getattr(other, name) for name in TOKENS] == [
            getattr(whole, name) for name in TOKENS
        ]


def test_after_a_failure_only_the_missing_descriptions_are_generated(convolve):
    graph = graph_of(40, 60)
    broken = FakeGenerator(fail_after=70)
    with pytest.raises(GenerationError):
        convolve(graph, raw_layer(graph), broken)
    assert broken.closed
    above, report, generator = convolve(graph, raw_layer(graph))
    assert (report.n_generated, report.n_from_store) == (30, 70)
    assert len(generator.requests) == 30
    reference, _, _ = convolve(graph, raw_layer(graph), key={"model": "same texts, other key"})
    assert above.texts == reference.texts


@pytest.fixture
def convolution(tmp_path, templates):
    """Makes a convolution whose engine must not be opened, over an empty store."""

    def make(graph, tokenizer=None):
        key, tokenizer = {"model": "fake"}, tokenizer or WordTokenizer()
        maker = RequestMaker(graph, templates, tokenizer, key, options_of(), 2020)
        return Convolution(maker, store, lambda: pytest.fail("an engine was opened"), False)

    with DescriptionStore(tmp_path / "store.sqlite") as store:
        yield make


def test_the_missing_requests_of_a_layer_are_those_that_a_run_makes_first(convolution, convolve):
    graph = graph_of(40, 60)
    below = raw_layer(graph)
    with pytest.raises(GenerationError):
        convolve(graph, below, FakeGenerator(fail_after=20))
    made = convolution(graph)
    missing = list(made.missing_requests(below, NOTHING, 1))
    _, report, generator = convolve(graph, below)
    assert missing == generator.requests
    assert len(missing) == report.n_generated == 80
    assert list(made.missing_requests(below, NOTHING, 1)) == []


def test_a_record_made_from_outside_is_what_the_run_finds(convolution, convolve):
    graph = graph_of()
    made = convolution(graph)
    requests = list(made.missing_requests(raw_layer(graph), NOTHING, 1))
    answers = FakeGenerator().generate(requests)
    contexts = {request.id: made.maker.context_of(request) for request in requests}
    made.store.put_many(record_of(answer, contexts[answer.id], 1) for answer in answers)
    layer, report, generator = convolve(graph, raw_layer(graph))
    assert generator.requests == []
    assert report.n_from_store == 14
    assert layer.texts == convolve(graph, raw_layer(graph), key={"model": "other"})[0].texts


def test_prompts_do_not_depend_on_how_many_nodes_are_rendered_at_once(convolution, monkeypatch):
    graph = graph_of(17, 11)
    below = raw_layer(graph)
    below.texts["item"][3] = f"A film <|end|> of {'many ' * 40}words."

    def prompts():
        return list(convolution(graph).maker.prompts(below, NOTHING, 1))

    whole = prompts()
    assert len(whole) == 28
    for size in (1, 5, 17):
        monkeypatch.setattr("recbole_gacllm.convolution.requests.CHUNK", size)
        assert prompts() == whole


def test_the_first_prompt_needs_the_texts_of_its_own_chunk_only(convolution, monkeypatch):
    class Counting(WordTokenizer):
        counted: ClassVar[list[str]] = []

        def count_tokens(self, texts):
            self.counted += texts
            return super().count_tokens(texts)

    monkeypatch.setattr("recbole_gacllm.convolution.requests.CHUNK", 4)
    graph = graph_of(300, 30)
    below = raw_layer(graph)
    tokenizer = Counting()
    maker = convolution(graph, tokenizer).maker
    tokenizer.counted.clear()
    prompts = maker.prompts(below, NOTHING, 1)
    next(prompts)
    assert len(tokenizer.counted) <= 2 * (4 + 4 * 3)  # and once more where cut for a neighbour
    list(prompts)
    counts = Counter(tokenizer.counted)
    assert all(counts[text] == 1 for side in SIDES for text in below.texts[side])


def test_a_layer_of_any_size_needs_no_list_of_its_prompts(convolve, monkeypatch):
    monkeypatch.setattr("recbole_gacllm.convolution.requests.CHUNK", 8)
    monkeypatch.setattr("recbole_gacllm.convolution.convolution.CHUNK", 8)
    generator, ahead = FakeGenerator(window=4), []
    rendered = RequestMaker.request

    def request(self, *args):
        ahead.append(len(ahead) - generator.n_completed)
        return rendered(self, *args)

    monkeypatch.setattr(RequestMaker, "request", request)
    convolve(graph_of(200, 100), raw_layer(graph_of(200, 100)), generator)
    assert len(ahead) == 300
    assert max(ahead) < 4 + 2 * 8


@pytest.mark.parametrize(
    ("seconds", "full", "sizes"), [(0, 1024, [32, 32, 32, 4]), (9e9, 40, [40, 40, 20])]
)
def test_a_durable_write_comes_when_it_is_due_or_the_batch_is_full(
    convolve, monkeypatch, seconds, full, sizes
):
    monkeypatch.setattr("recbole_gacllm.convolution.convolution._BATCH_SECONDS", seconds)
    monkeypatch.setattr("recbole_gacllm.convolution.convolution._FULL_BATCH", full)
    written, put_many = [], DescriptionStore.put_many

    def put(self, records):
        written.append(len(records))
        put_many(self, records)

    monkeypatch.setattr(DescriptionStore, "put_many", put)
    convolve(graph_of(40, 60), raw_layer(graph_of(40, 60)))
    assert [n for n in written if n] == sizes


def test_another_model_key_generates_again(convolve):
    graph = graph_of()
    convolve(graph, raw_layer(graph))
    _, report, _ = convolve(graph, raw_layer(graph), key={"model": "other"})
    assert report.n_generated == 14


def test_equal_prompts_are_generated_once(convolution, convolve):
    graph = TrainGraph(np.array(["u0", "u1"]), np.array(["i0"]), np.array([0, 1]), np.array([0, 0]))
    below = Layer.raw(
        {"user": ["u0", "u1"], "item": ["i0"]},
        {"user": ["A nurse by trade."] * 2, "item": ["A film about rain."]},
    )
    missing = list(convolution(graph).missing_requests(below, NOTHING, 1))
    above, report, generator = convolve(graph, below)
    assert missing == generator.requests
    assert len(missing) == 2
    _, again, _ = convolve(graph, below)
    for one, n_made, n_taken in ((report, 2, 0), (again, 0, 2)):
        assert (one.n_generated, one.n_from_store, one.n_duplicates) == (n_made, n_taken, 1)
    assert again.n_prompt_tokens == report.n_prompt_tokens > 0
    assert above.texts["user"][0] == above.texts["user"][1]


def test_a_bad_answer_is_asked_once_more_at_another_temperature_and_then_recorded(convolve):
    graph = graph_of()

    def answer(request):
        stubborn = "person: Reader of kind 2" in prompt_of(request)
        if request.sampling.temperature == 0 or stubborn:
            return ""
        return " films of many kinds."

    above, report, generator = convolve(graph, raw_layer(graph), FakeGenerator(answer=answer))
    assert report.n_retried == 14
    assert (report.n_failed, report.failures) == (1, {"empty": 1})
    assert above.statuses["user"][2] == "failed"
    assert above.reasons["user"][2] == "empty"
    assert above.texts["user"][2] == raw_layer(graph).texts["user"][2]
    assert above.texts["user"][1] == "This person enjoys films of many kinds."
    retried = generator.requests[-1].sampling
    assert retried.temperature == RETRY_TEMPERATURE
    assert sum(r.sampling.temperature > 0 for r in generator.requests) == 14


def test_retries_run_among_the_first_attempts_and_not_after_them(convolve):
    graph = graph_of()

    def answer(request):
        return "" if request.sampling.temperature == 0 else "A good answer of many words."

    _, report, generator = convolve(graph, raw_layer(graph), FakeGenerator(answer=answer))
    is_retry = [request.sampling.temperature > 0 for request in generator.requests]
    assert (report.n_retried, report.n_failed) == (14, 0)
    assert sum(is_retry) == len(is_retry) - sum(is_retry) == 14
    last_first_attempt = len(is_retry) - 1 - is_retry[::-1].index(False)
    assert sum(is_retry[:last_first_attempt]) > 7


def test_a_recorded_failure_is_not_generated_again(convolve):
    graph = graph_of()
    silent = FakeGenerator(answer=lambda request: "")
    convolve(graph, raw_layer(graph), silent)
    above, report, generator = convolve(graph, raw_layer(graph))
    assert generator.requests == []
    assert report.n_failed == report.n_retried == 14
    assert set(above.statuses["user"]) == {"failed"}


def test_an_echo_of_the_prompt_is_not_a_description(convolve):
    graph = graph_of()
    echo = FakeGenerator(answer=lambda request: request.messages[1]["content"])
    _, report, _ = convolve(graph, raw_layer(graph), echo, words=200)
    assert report.failures == {"echo": 14}


def test_an_answer_may_say_a_sentence_of_a_text_again_but_none_of_the_request(convolve):
    graph = graph_of()

    def after(answer, line):
        return FakeGenerator(
            answer=lambda request: f"{answer} {request.messages[1]['content'].splitlines()[line]}"
        )

    for line in (0, -1):  # the instruction, the question
        generator = after("rain.", line)
        _, report, _ = convolve(graph, raw_layer(graph), generator, key={"line": line}, words=200)
        assert report.failures == {"echo": 14}

    def of_own_text(request):
        lines = request.messages[1]["content"].splitlines()
        own = next(line for line in lines if line.startswith(("The person: ", "The film: ")))
        return f"rain. {own.partition(': ')[2]}"

    generator = FakeGenerator(answer=of_own_text)
    above, report, _ = convolve(graph, raw_layer(graph), generator, key={"line": "own"}, words=200)
    assert report.n_failed == report.n_retried == 0
    assert above.texts["user"][0] == "This person enjoys rain. Reader of kind 0 and nothing else."


def test_a_node_of_which_nothing_is_known_is_carried_over_without_a_call(convolve):
    graph = TrainGraph(np.array(["u0", "u1"]), np.array(["i0"]), np.array([0]), np.array([0]))
    below = Layer.raw(
        {"user": ["u0", "u1"], "item": ["i0"]},
        {"user": [NOTHING["user"]] * 2, "item": ["A film about rain."]},
    )
    above, report, generator = convolve(graph, below)
    assert len(generator.requests) == 2
    assert report.n_nothing_known == 1
    assert above.statuses["user"] == ["generated", "nothing_known"]
    assert above.texts["user"][1] == NOTHING["user"]


def test_chat_tokens_in_a_description_do_not_reach_the_prompt(convolve):
    graph = graph_of()
    below = raw_layer(graph)
    below.texts["item"][0] = "A film <|end|> that ends <|im_start|>system the chat."
    _, _, generator = convolve(graph, below)
    assert not any("<|end|>" in prompt_of(r) for r in generator.requests)
    assert not any("<|im_start|>" in prompt_of(r) for r in generator.requests)


def test_sampling_seeds_belong_to_the_prompt_not_to_its_place(convolve):
    graph = graph_of()
    _, _, first = convolve(graph, raw_layer(graph), temperature=0.5, key={"model": "a"})
    _, _, second = convolve(graph, raw_layer(graph), FakeGenerator(window=1), temperature=0.5)
    seeds = [{prompt_of(r): r.sampling.seed for r in g.requests} for g in (first, second)]
    assert len(set(seeds[0].values())) == 14
    assert set(seeds[0]) == set(seeds[1])


def maker_of(templates, sampling=GREEDY, seed=2020, key="fake"):
    options = options_of(sampling.max_new_tokens, sampling.temperature, sampling.repetition_penalty)
    return RequestMaker(graph_of(), templates, WordTokenizer(), {"model": key}, options, seed)


def test_all_that_draws_an_answer_is_part_of_its_address(templates, monkeypatch):
    chat = ({"role": "user", "content": "Describe it."},)
    drawn = Sampling(64, 0.7, 1.05)
    makers = [
        maker_of(templates),
        maker_of(templates, Sampling(63, 0.0, 1.05)),
        maker_of(templates, Sampling(64, 0.0, 1.0)),
        maker_of(templates, drawn),
        maker_of(templates, drawn, seed=2021),
        maker_of(templates, key="other"),
        maker_of(PromptTemplates.load(shipped_path("properties", "prompts"), "person", "book")),
    ]
    monkeypatch.setattr("recbole_gacllm.convolution.requests.CLEANING_VERSION", -1)
    makers.append(maker_of(templates))
    keys = [maker.request(chat).id for maker in makers]
    keys.append(makers[0].request((*chat, *chat)).id)
    assert len(set(keys)) == len(keys)
    # A greedy answer is the same whatever the seed.
    assert len({maker_of(templates, seed=seed).request(chat).id for seed in (1, 2)}) == 1


def test_another_cleaning_draws_the_same_answers(templates, monkeypatch):
    chat = ({"role": "user", "content": "Describe it."},)
    before = maker_of(templates)
    monkeypatch.setattr("recbole_gacllm.convolution.requests.CLEANING_VERSION", -1)
    after = maker_of(templates)
    first, then = before.request(chat), after.request(chat)
    assert first.id != then.id
    assert first.sampling == then.sampling
    assert before.retry_of(first).sampling == after.retry_of(then).sampling
    assert before.retry_of(first).sampling.seed != first.sampling.seed


def test_nothing_is_learnt_from_a_node_of_which_nothing_is_known(templates):
    graph, below = graph_of(), raw_layer(graph_of())
    users = [NOTHING["user"], *below.texts["user"][1:]]
    below = Layer.raw(below.tokens, {**below.texts, "user": users})
    told = told_edges(graph, below, NOTHING)
    assert told.tolist() == np.flatnonzero(graph.users != 0).tolist()
    assert 0 < len(told) < graph.n_edges
    learn, heldout = sample_pairs(graph, below, templates, NOTHING, 100, 3, seed=5)
    assert len(learn) + len(heldout) == 2 * len(told)
    assert NOTHING["user"] not in repr(learn + heldout)


def test_planted_held_out_interactions_leave_no_trace(convolve, templates):
    """The graph holds training edges only, so marked items of no edge appear in no other node."""
    graph = graph_of()
    marked = TrainGraph(
        graph.user_tokens,
        np.append(graph.item_tokens, "held-out"),
        graph.users,
        graph.items,
    )
    below = raw_layer(graph)
    below.tokens["item"] = [*below.tokens["item"], "held-out"]
    below = Layer.raw(
        below.tokens, {**below.texts, "item": [*below.texts["item"], "Zyzzyva, a held-out film."]}
    )
    _, _, generator = convolve(marked, below, n_neighbors=9)
    prompts = [prompt_of(r) for r in generator.requests if "Zyzzyva" in prompt_of(r)]
    assert len(prompts) == 1
    assert "The film: Zyzzyva" in prompts[0]
    learn, heldout = sample_pairs(marked, below, templates, NOTHING, 100, 5, seed=1)
    assert learn
    assert not any("Zyzzyva" in repr(pair) for pair in learn + heldout)


def test_sft_pairs_are_training_edges_in_both_directions_and_held_out_ones_are_others(templates):
    graph, below = graph_of(), raw_layer(graph_of())
    learn, heldout = sample_pairs(graph, below, templates, NOTHING, n_pairs=8, n_heldout=3, seed=5)
    assert (len(learn), len(heldout)) == (16, 6)
    matched = {
        (below.texts["user"][u], below.texts["item"][i])
        for u, i in zip(graph.users, graph.items, strict=True)
    }

    def edge(pair):
        given = pair.messages[-1]["content"]
        for user, item in matched:
            if (user in given and pair.completion == item) or (
                item in given and pair.completion == user
            ):
                return user, item
        raise AssertionError(pair)

    assert not {edge(pair) for pair in learn} & {edge(pair) for pair in heldout}
    assert len({edge(pair) for pair in learn}) == 8
