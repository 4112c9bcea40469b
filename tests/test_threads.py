"""With how many threads a recommender is trained: the rule, the key, the environment, the log."""

import os

import pytest
import torch
from torch import nn

from recbole_gacllm import run as runner
from recbole_gacllm.plugin import threads

from .conftest import run_python
from .recommender import Recommender


@pytest.fixture(autouse=True)
def four_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def within(config, model=None, n_interactions=0):
    """Threads inside of the choice, and after it."""
    with threads.chosen(config, model or nn.Linear(1, 1), n_interactions):
        inside = torch.get_num_threads()
    assert torch.get_num_threads() == 4
    return inside


@pytest.fixture
def config(settings):
    return Recommender("BPR", settings).config


@pytest.mark.parametrize(
    ("n_edges", "n_threads"), [(80_000, 1), (340_000, 4), (800_000, 4), (10_000_000, 4)]
)
def test_small_graphs_take_one_thread_and_large_ones_all(config, n_edges, n_threads):
    """64 wide, as ml-100k, the sparse one, ml-1m and more."""
    assert within(config, nn.Embedding(10, 64), n_edges) == n_threads


def test_wide_layers_and_long_histories_take_all_threads(config, settings):
    config["train_batch_size"] = 2048
    layers = nn.Sequential(nn.Embedding(2000, 64), nn.Linear(384, 128), nn.Linear(128, 64))
    assert within(config, layers, 80_000) == 1  # GaCLLM's on ml-100k
    assert within(config, nn.Linear(1682, 600), 80_000) == 4  # MultiVAE's
    config["MODEL_TYPE"] = type("Type", (), {"name": "SEQUENTIAL"})
    config["MAX_ITEM_LIST_LENGTH"] = 50
    assert within(config, layers, 80_000) == 4  # SASRec's


def test_what_is_given_wins(config, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert within(config) == 4
    config["n_threads"] = 3
    assert within(config) == 3


def test_processes_share_the_cores_and_a_gpus_host_keeps_its_own(config):
    config["nproc"] = 2
    assert within(config, nn.Embedding(10, 64), 10_000_000) == 2
    config["device"] = torch.device("meta")
    assert within(config) == 4


@pytest.mark.parametrize("model", ["GaCLLM", "BPR"])
def test_a_bad_number_is_refused_for_any_model(settings, model):
    with pytest.raises(ValueError, match="n_threads: 0 is not allowed"):
        Recommender(model, settings, n_threads=0)


@pytest.mark.parametrize("model", ["GaCLLM", "BPR"])
def test_a_run_trains_with_them_and_says_so(model, settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []

    class Observer:
        def on_split(self, *parts):
            seen.append(torch.get_num_threads())

        def on_trainer(self, trainer):
            for name in ("_train_epoch", "evaluate"):
                setattr(trainer, name, self.noting(getattr(trainer, name)))

        def noting(self, function):
            def noted(*args, **keys):
                seen.append(torch.get_num_threads())
                return function(*args, **keys)

            return noted

    keys = {**settings, **({"use_text": False} if model == "GaCLLM" else {})}
    messages = []
    monkeypatch.setattr(threads.logger, "info", lambda text, *of: messages.append(text % of))
    runner.run(model, "tiny", config_dict=keys, observer=Observer())
    assert seen[0] == 4
    assert set(seen[1:]) == {1}
    (message,) = messages
    assert message.startswith("threads of training and evaluation: 1 (a batch takes one thread")
    assert torch.get_num_threads() == 4


def test_a_program_lets_threads_sleep_before_pytorch_is_loaded():
    code = (
        "import sys, os\n"
        "from recbole_gacllm.cli.main import main\n"
        "assert 'torch' not in sys.modules\n"
        "try: main(['--help'])\n"
        "finally: assert os.environ['OMP_WAIT_POLICY'] == sys.argv[1], os.environ\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    for given, policy in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        run_python("-c", code, policy, env=environment | given)
