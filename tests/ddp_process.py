"""One process of the runs that test_training.py compares: rank, number of processes, ports, data.

Three things that RecBole draws anew in each process are fixed here: the order of the edges (the key
``shuffle``), the negatives of BPR, and those of SSM, which takes all items.
"""

from __future__ import annotations

from typing import Any

import torch
from recbole.sampler import Sampler

from recbole_gacllm import model as model_module
from recbole_gacllm import run as runner
from tests.random_texts import random_texts

EXACT = {"shuffle": False, "text_dropout": 0.0, "require_pow": True, "reg_weight": 0.01}
CASES: dict[str, dict[str, Any]] = {
    "bpr": {"use_text": False, "loss_type": "BPR"},
    "ssm": {"use_text": False, "loss_type": "SSM", "ssm_n_negatives": 1000},
    "text": {"loss_type": "SSM", "ssm_n_negatives": 1000, "align_weight": 0.0},
}


def drawn_by_pair(self: Sampler, users: Any, items: Any, num: int) -> torch.Tensor:
    """A negative that depends on user and item alone."""
    assert num == 1
    drawn = []
    for user, item in zip(users, items, strict=True):
        while (item := item % (self.item_num - 1) + 1) in self.used_ids[user]:
            pass
        drawn.append(item)
    return torch.tensor(drawn)


class Watch:
    """Keeps the trainer of a run."""

    def on_split(self, *_: Any) -> None:
        pass

    def on_trainer(self, trainer: Any) -> None:
        self.trainer = trainer


def work(rank: int, size: int, ports: list[int], settings: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    Sampler.sample_by_user_ids = drawn_by_pair
    model_module.prepare = random_texts
    runner._text_record = lambda *_: {}  # no stages, no manifests
    results = {}
    for (name, keys), port in zip(CASES.items(), ports, strict=True):
        group = {"local_rank": rank, "world_size": size, "nproc": size, "offset": 0}
        group |= {"ip": "localhost", "port": str(port)}
        watch = Watch()
        done = runner.run(
            "GaCLLM",
            "tiny",
            config_dict={**settings, **EXACT, **keys, **(group if size > 1 else {})},
            observer=watch,
        )
        results[name] = {
            "losses": list(watch.trainer.train_loss_dict.values()),
            "test": dict(done.result["test_result"]),
            "valid": dict(done.result["best_valid_result"]),
            "state": watch.trainer.model.state_dict(),
        }
    torch.save(results, f"rank_{rank}_of_{size}.pt")
