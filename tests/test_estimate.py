"""What a run says it will take, against what it takes, on three sizes each."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from recbole_gacllm import estimate, pipeline
from recbole_gacllm.convolution import setup
from recbole_gacllm.convolution.requests import RequestMaker
from recbole_gacllm.inputs import raw_descriptions
from recbole_gacllm.llm.chat import ChatTokenizer
from recbole_gacllm.llm.weights import resolve_llm
from recbole_gacllm.objective.linear import matrix_of
from recbole_gacllm.run_config import training_data

from .conftest import our_keys, run_python
from .recommender import Recommender

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
SIZES = [(500, None, 20_000), (1000, None, 20_000), (2000, 400.0, 20_000), (1500, 400.0, 1000)]
EARLY_SIZES = [20_000, 40_000, 80_000]
USERS = [15_000, 30_000, 60_000]  # of 1,000 items
#: What each of these takes, in a fork of its own of a process that has only loaded what it needs.
TAKEN = """
import json, os, sys
import numpy as np
from recbole_gacllm.alignment.embeddings import TextLayers
from recbole_gacllm.alignment.propagation import Adjacency
from recbole_gacllm.objective import linear
from recbole_gacllm.objective.choice import choose
from recbole_gacllm.objective.linear import ItemItemModel, matrix_of
import torch

def memory(name):
    (line,) = (x for x in open("/proc/self/status") if x.startswith(name))
    return int(line.split()[1]) * 1024

def begin():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    return memory("VmRSS")

def of_linear(n_items, reg_weight, max_items):
    linear.MAX_ITEMS = max_items
    rng = np.random.default_rng(0)
    users, items = rng.integers(1, 500, 20_000), rng.integers(1, n_items, 20_000)
    table = rng.standard_normal((n_items, 384)).astype(np.float32)
    rows = lambda side, layers: np.concatenate([table] * len(layers), axis=1)
    torch.linalg.inv(torch.eye(50, dtype=torch.float64))
    before = begin()
    chosen = choose(matrix_of(users, items, 500, n_items), 2, rows, text_layers="auto",
                    reg_weight=reg_weight, text_weight=None)["linear"]
    texts = torch.from_numpy(rows("item", chosen.layers))
    ItemItemModel(users, items, 500, n_items, chosen.reg_weight, texts, chosen.text_weight)
    return memory("VmHWM") - before

def of_evaluation(n_users):
    edges = (np.random.default_rng(0).integers(1, n, 5 * n_users) for n in (n_users, 1000))
    model = ItemItemModel(*edges, n_users, 1000, 400.0)
    before = begin()
    for users in torch.arange(n_users).split(1000):
        model.standardized(users, slice(None))
    return memory("VmHWM") - before

def carried(n_users, adjacency):
    texts = TextLayers([torch.ones(2 * n_users, 384).half()], torch.arange(2 * n_users), {})
    return texts, texts.carried([(0,)], adjacency, 3)

def of_early_fusion(n_users):
    edges = np.random.default_rng(0).integers(n_users, size=(2, 5 * n_users))
    adjacency = Adjacency.from_edges(*edges, n_users, n_users)
    carried(1000, Adjacency.from_edges(*edges % 1000, 1000, 1000))  # brings PyTorch's pages in
    before = begin()
    kept = carried(n_users, adjacency)
    return memory("VmHWM") - before

linear_sizes, early_sizes, users = map(json.loads, sys.argv[1:])
jobs = [(of_linear, *size) for size in linear_sizes]
jobs += [(of_early_fusion, size) for size in early_sizes] + [(of_evaluation, n) for n in users]
for what, *size in jobs:
    sys.stdout.flush()
    if os.fork() == 0:
        print(what(*size), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


def near(told: float, taken: float) -> bool:
    return taken / 1.5 < told < taken * 1.5


@pytest.fixture(scope="module")
def taken() -> dict[object, int]:
    sizes = SIZES, EARLY_SIZES, USERS
    printed = run_python("-c", TAKEN, *map(json.dumps, sizes)).split()
    return dict(zip(SIZES + EARLY_SIZES + USERS, map(int, printed), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_memory_of_the_linear_part(size, taken, monkeypatch):
    n_items, _, max_items = size
    monkeypatch.setattr(estimate.linear, "MAX_ITEMS", max_items)
    options = our_keys(linear_weight=0.5, linear_text_weight=None, text_layers="auto")
    rng = np.random.default_rng(0)
    edges = rng.integers(1, 500, 20_000), rng.integers(1, n_items, 20_000)
    graph = SimpleNamespace(degrees=lambda side: np.bincount(edges[side == "item"]))
    told = estimate.linear_bytes(options, n_items, 384, 2, estimate.n_pairs(graph))
    assert near(told, taken[size]), (told, taken[size])


@pytest.mark.slow
@pytest.mark.parametrize("n_users", USERS)
def test_memory_of_scores_that_evaluations_keep(n_users, taken):
    told = estimate.linear_bytes(our_keys(linear_weight=0.5), 1000, 0, 0, n_users=n_users)
    assert near(told, taken[n_users]), (told, taken[n_users])


@pytest.fixture(scope="module")
def tokenizer():
    return ChatTokenizer(resolve_llm("embedded"))


@pytest.mark.parametrize(
    "keys",
    [
        {"user_inter_num_interval": "[300,inf)"},
        {"train_share": 0.02, "n_neighbors": 3},
        {"llm_knowledge_tokens": 40},
    ],
    ids=["few users", "few neighbors", "knowledge"],
)
def test_tokens_of_prompts(keys, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys = {**keys, "artifact_dir": str(tmp_path), "llm_n_layers": 1, "text_source": "generated"}
    options, data = training_data("ml-100k", (), {**keys, "use_gpu": False})
    raw, _ = raw_descriptions(options, data)
    templates = setup.templates_of(options)
    maker = RequestMaker(data.graph, templates, tokenizer, {}, options, 1)
    layer, taken = raw, 0
    for number in range(1, options.n_text_layers + 1):
        prompts = [p for *_, p in maker.prompts(layer, setup.nothing_known_of(options), number)]
        sample = prompts[::10]
        taken += (
            sum(len(tokenizer.encode_chat(p)) for p in sample if p) / len(sample) * len(prompts)
        )
    told, _ = estimate.tokens_of(options, data.graph, raw, templates)
    assert near(told, taken), (told, taken)


@pytest.mark.parametrize("dataset", ["ml-100k", "ml-1m"])
def test_tokens_of_descriptions(dataset):
    measured = json.loads((RESULTS / f"descriptions-{dataset}.json").read_text())
    graph = SimpleNamespace(degrees=lambda side: [1])
    raw = SimpleNamespace(texts={"user": ["a"], "item": ["b"]})
    options = our_keys(llm_n_layers=1, llm_knowledge_tokens=0)
    _, told = estimate.tokens_of(options, graph, raw, setup.templates_of(options))
    assert near(told / 2, measured["output_tokens_per_description"])


def test_size_of_text_embeddings(settings, in_process, tmp_path, monkeypatch):
    told = {}
    monkeypatch.setattr(estimate.logger, "info", lambda text, *of: told.update(dict(enumerate(of))))
    Recommender("GaCLLM", settings, text_source="raw", linear_weight=0.0)
    (file,) = tmp_path.rglob("layer_0.npy")
    value, unit = told[1].split()
    assert near(float(value) * {"kB": 1e3, "MB": 1e6}[unit], file.stat().st_size)


@pytest.mark.slow
@pytest.mark.parametrize("n_users", EARLY_SIZES)
def test_memory_of_early_fusion(n_users, taken, monkeypatch):
    told = {}
    monkeypatch.setattr(estimate.logger, "info", lambda text, *of: told.update(dict(enumerate(of))))
    monkeypatch.setattr(estimate, "_require_room", lambda *_: None)
    graph = SimpleNamespace(item_tokens=range(n_users), user_tokens=range(n_users))
    keys = {"text_source": "raw", "text_fusion": "early", "linear_weight": 0.0}
    estimate.announce(our_keys(**keys), SimpleNamespace(graph=graph, dataset="x"))
    value, unit = told[1].split()
    assert near(float(value) * {"MB": 1e6}[unit], taken[n_users]), (told, taken[n_users])


def test_pairs_of_items_with_a_common_user():
    users, items = np.random.default_rng(0).integers((0, 0), (300, 900), (6000, 2)).T
    interactions = matrix_of(users, items, 300, 900)
    degrees = {"user": np.diff(interactions.indptr), "item": np.bincount(interactions.indices)}
    taken = ((interactions.T @ interactions).nnz - 900) / 2
    told = estimate.n_pairs(SimpleNamespace(degrees=degrees.get))
    assert told == pytest.approx(taken, rel=0.05)


@pytest.mark.parametrize("use_text", [True, False])
def test_too_little_memory_ends_a_run_before_any_stage(settings, monkeypatch, use_text):
    monkeypatch.setattr(estimate, "free_memory", lambda: 5e6)
    monkeypatch.setattr(pipeline, "_run", None)
    with pytest.raises(ValueError, match=r"linear_weight: 0\.5 takes .* of 31 items, and 5 MB"):
        Recommender("GaCLLM", settings, linear_weight=0.5, use_text=use_text)


def test_too_little_disk_ends_a_run_unless_its_files_are_there(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=100))
    keys = {"use_text": False, "linear_weight": 0.0}
    with pytest.raises(ValueError, match=r"artifact_dir: '.*' will take about 5\.\d+ kB more"):
        Recommender("GaCLLM", settings, **keys)
    folder = tmp_path / "artifacts" / "tiny"
    folder.mkdir(parents=True)
    (folder / "made").write_bytes(bytes(10_000))
    Recommender("GaCLLM", settings, **keys)


def test_tokens_are_told_before_the_first_stage_of_the_llm(settings, monkeypatch):
    messages = []
    monkeypatch.setattr(estimate.logger, "info", lambda text, *of: messages.append(text % of))

    def stop(job):
        raise InterruptedError

    monkeypatch.setattr(pipeline, "_run", stop)
    with pytest.raises(InterruptedError):
        Recommender("GaCLLM", settings, text_source="generated", sft=True)
    assert [message.partition(" about")[0] for message in messages] == [
        "this run takes",
        "the LLM reads",
    ]
