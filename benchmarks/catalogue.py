"""`best` on sparse data with many items: evaluation and building, as ratios in one run.

    python benchmarks/catalogue.py --json=catalogue.json
    python benchmarks/catalogue.py --dataset=ml-1m --data_path=FOLDER --json=catalogue-ml-1m.json
    python benchmarks/catalogue.py --whole --json=catalogue-whole.json
    python benchmarks/catalogue.py --large --json=catalogue-large.json
    python benchmarks/catalogue.py --loss=ml-1m --data_path=FOLDER --json=catalogue-loss.json

Synthetic data of 50,000 users, 17,000 items and 340,000 training interactions: items have degrees
of a power law, users a taste that is planted. The texts are random constants of the encoder's
shape, as in ``training.py``: what they say changes no second. A process a side, one thread.

- ``evaluation``: one full-sort evaluation of `best` against our model without the linear part
  (``linear_weight: 0``), and against RecBole's LightGCN as installed; ``unseen``: of `best` where
  nobody has met the rarest fifth of the items, against the first's. The first evaluation of a run,
  which computes each user's constants, is left out and told: ``first``.
- ``build``: the linear model with the choice of its L2 weight against one inverse of its size
  (``torch.linalg.inv``, float64).
- ``peak``: MiB of a process that builds and evaluates `best`.

``--dataset``: the same on RecBole's data set of that name, but for ``unseen``.
``--whole``: processor seconds to build and train with an evaluation each epoch until early
stopping, and one evaluation more, of `best` against RecBole's LightGCN as installed, which is
stopped after 2.1 times as many: the ratio is at most the one that is told then.
``--large``: `best` alone on 200,000 users, 100,000 items and 3,000,000 training interactions, which
is evaluated on the first 20,000 users. ``--loss``: NDCG@10 on validation of the linear part alone
with the exact weights, and with those of catalogues of more than 20,000 items, on RecBole's data
set of that name with its raw texts (``synthetic``: with random ones); ``--train_share`` keeps a
part of its training interactions.

The floor beside an evaluation is what ``training.py`` counts, and the rows of the histories' items.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before PyTorch is imported
sys.path.insert(0, str(Path(__file__).resolve().parent))
import training  # type: ignore[import-not-found]

GOALS = {
    "evaluation": 2.0,
    "unseen": 2.0,
    "evaluation_lightgcn": 1.0,
    "build": 3.0,
    "whole": 0.5,
    "peak_mib": 6144.0,
    "peak_mib_large": 12288.0,
    "loss": 0.005,
}
LARGE = {"n_users": 200_000, "n_items": 100_000, "n_edges": 3_750_000}
SIDES: dict[str, tuple[str, dict[str, Any]]] = {
    "best": ("GaCLLM_best", {}),
    "unseen": ("GaCLLM_best", {}),
    "plain": ("GaCLLM_best", {"linear_weight": 0.0}),
    "LightGCN": ("LightGCN", {}),
}


def write(folder: Path, n_users: int, n_items: int, n_edges: int, n_met: int) -> None:
    """``synthetic.inter``, with the first ``n_met`` items, and the texts of all items."""
    import numpy as np

    rng = np.random.default_rng(0)
    popularity = 1 / (10 + np.arange(n_met)) ** 0.8
    kind, taste = rng.integers(50, size=n_met), rng.integers(50, size=n_users)
    users = np.concatenate([np.arange(n_users), rng.integers(n_users, size=n_edges - n_users)])
    items = rng.choice(n_met, size=n_edges, p=popularity / popularity.sum())
    by_kind = [np.flatnonzero(kind == one) for one in range(50)]
    for place in np.flatnonzero(rng.random(n_edges) < 0.7):
        own = by_kind[taste[users[place]]]
        items[place] = own[int(len(own) * rng.random() ** 3)]
    pairs = np.unique(np.stack([users, items], axis=1), axis=0)
    target = folder / "synthetic"
    target.mkdir(parents=True)
    lines = "\n".join(f"u{user}\ti{item}" for user, item in pairs)
    (target / "synthetic.inter").write_text(f"user_id:token\titem_id:token\n{lines}\n")
    rows = "\n".join(f"i{item}\titem {item}" for item in range(n_items))
    (target / "synthetic.item").write_text(f"item_id:token\ttitle:token_seq\n{rows}\n")


def make(name: str, arguments: argparse.Namespace) -> Any:
    """A side, built."""
    from recbole_gacllm import model

    model.prepare = training.random_texts
    side, keys = SIDES[name]
    return training.Side(side, arguments, **{"linear_weight": 0.5, **keys})


def child(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds to build, of the first and of later evaluations, and the peak."""
    side = make(name, arguments)
    first, _ = side.evaluate()
    later = [side.evaluate()[0] for _ in range(arguments.repeats)]
    return {
        "build_seconds": side.build_seconds,
        "first_seconds": first,
        "seconds": statistics.median(later),
        "peak_mib": training.peak_of_this_process(),
        "floor_seconds": training.evaluation_floor(side, training.machine_rates())
        if name != "LightGCN"
        else None,
        "n_evaluated": len(side.valid.uid_list),
    }


def whole(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Processor seconds of a run."""
    begin, is_whole = time.process_time(), True
    side = make(name, arguments)

    def stop_late(_epoch: int, _score: float) -> None:
        if time.process_time() - begin > arguments.limit:
            raise TimeoutError

    try:
        side.trainer.fit(side.train, side.valid, saved=False, callback_fn=stop_late)
    except TimeoutError:
        is_whole = False
    side.evaluate()
    seconds, n_epochs = time.process_time() - begin, len(side.trainer.train_loss_dict)
    return {"seconds": seconds, "epochs": n_epochs, "is_whole": is_whole}


def build(arguments: argparse.Namespace) -> dict[str, float]:
    """The linear model with its choice against one inverse of the size."""
    import torch

    from recbole_gacllm.inputs import TrainingData
    from recbole_gacllm.objective.choice import choose_linear
    from recbole_gacllm.objective.linear import ItemItemModel, centred, matrix_of

    side = make("plain", arguments)
    n_users, n_items = side.model.n_users, side.model.n_items
    data = TrainingData.from_recbole(side.config, side.train._dataset)
    users, items = data.graph.users + 1, data.graph.items + 1
    rows = torch.randn(n_items, training.TEXT_WIDTH, dtype=torch.float64)

    def linear() -> None:
        interactions = matrix_of(users, items, n_users, n_items)
        chosen = choose_linear(interactions, {(0,): centred(rows.numpy())}, None, 0.25)
        ItemItemModel(users, items, n_users, n_items, chosen.reg_weight, rows, 0.25)

    seconds = training.timed(linear)
    matrix = torch.eye(n_items, dtype=torch.float64).mul_(float(n_items))
    matrix += torch.rand(n_items, n_items, dtype=torch.float64)
    inverse = training.timed(lambda: torch.linalg.inv(matrix))
    return {"ours_seconds": seconds, "inverse_seconds": inverse, "ratio": seconds / inverse}


def loss(arguments: argparse.Namespace) -> dict[str, float]:
    """NDCG@10 of the linear part alone on validation, exact and as of a large catalogue."""
    import torch

    from recbole_gacllm import model
    from recbole_gacllm.inputs import TrainingData
    from recbole_gacllm.objective import choice, linear

    if arguments.dataset == "synthetic":
        model.prepare = training.random_texts
    keys = {"text_source": "raw", "train_share": arguments.train_share, "linear_weight": 0.5}
    side = training.Side("GaCLLM_best", arguments, **keys)
    data = TrainingData.from_recbole(side.config, side.train._dataset)
    histories, held_out = (
        loader._dataset.inter_matrix("csr").astype("float32") for loader in (side.train, side.valid)
    )
    is_asked = (held_out.sum(1).A1 > 0) & (histories.sum(1).A1 > 0)
    users = torch.from_numpy(is_asked.nonzero()[0])

    def ndcg(made: linear.ItemItemModel) -> float:
        def blocks() -> Any:
            for block in users.split(512):
                is_known = torch.from_numpy(histories[block.numpy()].toarray()) > 0
                scores = made.scores(block).masked_fill(is_known, -torch.inf)
                yield scores, torch.from_numpy(held_out[block.numpy()].toarray())

        return choice._mean_ndcg(blocks())

    def local() -> None:
        edges = data.graph.users + 1, data.graph.items + 1
        side.model.linear = side.model._linear_model(*edges, None)

    figures = {"l2": side.model.choices["linear"].reg_weight, "exact": ndcg(side.model.linear)}
    linear.MAX_ITEMS = 0
    figures["local_seconds"] = training.timed(local)
    figures["local"] = ndcg(side.model.linear)
    return {**figures, "loss": 1 - figures["local"] / figures["exact"]}


def in_child(name: str, arguments: argparse.Namespace, data_path: str | None) -> Any:
    """Figures of a process of its own."""
    command = [sys.executable, __file__, f"--child={name}", f"--repeats={arguments.repeats}"]
    command += [f"--loss={arguments.loss}"] * bool(arguments.loss)
    command += [f"--dataset={arguments.dataset}"]
    command += ["--whole"] * arguments.whole + [f"--limit={arguments.limit}"]
    command += [f"--train_share={arguments.train_share}"]
    command += [f"--data_path={data_path}"] * bool(data_path)
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures = json.loads(run.stdout.splitlines()[-1])
    print(name, figures, flush=True)
    return figures


def main() -> None:
    """Measure and say."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--n_users", type=int, default=50_000)
    parser.add_argument("--n_items", type=int, default=17_000)
    parser.add_argument("--n_edges", type=int, default=425_000, help="of all three parts")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--dataset", default="synthetic")
    parser.add_argument("--loss", help="data set; nothing else is measured")
    parser.add_argument("--train_share", type=float, default=1.0)
    parser.add_argument("--data_path", help="where the data set lies")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, default=float("inf"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.dataset, arguments.steps = arguments.loss or arguments.dataset, 1
    if arguments.large:
        vars(arguments).update(LARGE)
    with tempfile.TemporaryDirectory() as scratch:
        arguments.scratch = scratch
        if arguments.child:
            alone = {"build": build, "loss": loss}.get(arguments.child)
            of_side = whole if arguments.whole else child
            print(json.dumps(alone(arguments) if alone else of_side(arguments.child, arguments)))
            return
        names = ["loss"] if arguments.loss else ["best"] if arguments.large else [*SIDES, "build"]
        if arguments.whole:
            names = ["best", "LightGCN"]
        elif arguments.dataset != "synthetic" and not arguments.loss:
            names.remove("unseen")
        paths = dict.fromkeys(names, arguments.data_path)
        if arguments.dataset == "synthetic":
            sizes = arguments.n_users, arguments.n_items, arguments.n_edges
            paths = dict.fromkeys(names, scratch)
            write(Path(scratch), *sizes, n_met=arguments.n_items)
            if "unseen" in names:
                paths["unseen"] = f"{scratch}/unseen"
                write(Path(paths["unseen"]), *sizes, n_met=arguments.n_items * 4 // 5)
        figures = {}
        for name in names:
            figures[name] = in_child(name, arguments, paths[name])
            arguments.limit = 2.1 * figures[name].get("seconds", 0)
    if arguments.loss:
        ratios = {"loss": figures["loss"]["loss"]}
    elif arguments.whole:
        ratios = {"whole": figures["best"]["seconds"] / figures["LightGCN"]["seconds"]}
    elif arguments.large:
        ratios = {"peak_mib_large": figures["best"]["peak_mib"]}
    else:
        ratios = {
            "evaluation": figures["best"]["seconds"] / figures["plain"]["seconds"],
            "evaluation_lightgcn": figures["best"]["seconds"] / figures["LightGCN"]["seconds"],
            "build": figures["build"]["ratio"],
            "peak_mib": figures["best"]["peak_mib"],
        }
        if "unseen" in figures:
            ratios["unseen"] = figures["unseen"]["seconds"] / figures["plain"]["seconds"]
    for name, value in ratios.items():
        print(f"{name:20} {value:8.3f}   goal {GOALS[name]:g}")
    if arguments.json:
        keys = ["dataset"] + ["train_share"] * bool(arguments.loss)
        keys += ["n_users", "n_items", "n_edges"] * (arguments.dataset == "synthetic")
        shown = {key: getattr(arguments, key) for key in keys}
        arguments.json.write_text(json.dumps({**shown, **figures, "ratios": ratios}, indent=1))


if __name__ == "__main__":
    main()
