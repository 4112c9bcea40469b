"""A run's prompts, for ``descriptions.py``."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recbole_gacllm.config import GaCLLMConfig, shipped_path
from recbole_gacllm.convolution import text
from recbole_gacllm.convolution.convolution import Convolution
from recbole_gacllm.convolution.graph import TrainGraph
from recbole_gacllm.convolution.layers import SIDES, Layer, Side
from recbole_gacllm.convolution.prompts import PromptTemplates
from recbole_gacllm.convolution.requests import RequestMaker
from recbole_gacllm.convolution.store import DescriptionStore
from recbole_gacllm.inputs import TrainingData, raw_descriptions
from recbole_gacllm.llm import weights
from recbole_gacllm.llm.chat import ChatTokenizer
from recbole_gacllm.llm.generator import Completion, Request, Sampling


class Clock:
    """Wall and processor seconds while it runs."""

    def __init__(self, running: bool = True) -> None:
        self.seconds = self.cpu_seconds = 0.0
        if running:
            self.__enter__()

    def __enter__(self) -> None:
        self._started = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._started[0]
        self.cpu_seconds += time.process_time() - self._started[1]

    def stop(self) -> None:
        """Count no further."""
        self.__exit__()

    def less(self, other: Clock, share: float) -> Clock:
        """Without a share of what another one counted."""
        rest = Clock(running=False)
        rest.seconds = self.seconds - share * other.seconds
        rest.cpu_seconds = self.cpu_seconds - share * other.cpu_seconds
        return rest

    def read(self) -> dict[str, float]:
        """What was counted."""
        return {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds}


@dataclass(frozen=True)
class Work:
    """The prompts of layer 1, and what a convolution over some of its nodes needs.

    Attributes:
        graph: Training edges.
        below: Layer 0.
        options: Keys of ``GaCLLM.yaml``.
        seed: RecBole's.
        model_dir: Weights that generate.
        weights: Which those are, in words.
        adapter: The base weights and the adapter, where ``model_dir`` holds both, merged.
        chosen: Nodes to describe, users first.
    """

    graph: TrainGraph
    below: Layer
    options: GaCLLMConfig
    seed: int
    model_dir: Path
    weights: str
    chosen: frozenset[int]
    adapter: tuple[Path, Path] | None = None

    @classmethod
    def of_run(cls, artifact_dir: Path, dataset: str, n_nodes: int) -> Work | None:
        """The work of the newest run of a data set that has come as far as its descriptions."""
        jobs = (artifact_dir / dataset).glob("descriptions-*/job.json")
        newest = max(jobs, key=lambda file: file.stat().st_mtime, default=None)
        if newest is None:
            return None
        job, root = json.loads(newest.read_text("utf-8")), newest.parent.parent
        inputs, model_dir = Path(job["inputs"]), Path(job["model_dir"])
        if not inputs.is_dir():  # the artefacts were moved together
            inputs, model_dir = root / inputs.name, root / model_dir.parent.name / model_dir.name
        below = Layer.read(inputs / "layer_0.parquet")
        return cls(
            TrainGraph.load(inputs / "graph.npz"),
            below,
            GaCLLMConfig.from_mapping(job["options"]),
            job["seed"],
            model_dir,
            f"of the run {newest.parent.name}",
            _evenly(below, n_nodes),
            cls._adapter(root, job),
        )

    @staticmethod
    def _adapter(root: Path, job: dict[str, Any]) -> tuple[Path, Path] | None:
        """The base model and the adapter of a run that merged them, if both are still there."""
        merged = Path(job["model_dir"]).parent.name
        if not (root / merged / "job.json").is_file():
            return None
        made = json.loads((root / merged / "job.json").read_text("utf-8"))
        base, adapter = Path(made["model_dir"]), Path(made["adapter_dir"])
        return (base, adapter) if base.is_dir() and adapter.is_dir() else None

    @classmethod
    def of_dataset(cls, dataset: str, data_path: str | None, n_nodes: int) -> Work:
        """The work of a run of the default keys that was not made, with the LLM as it comes."""
        from recbole.data import create_dataset, data_preparation
        from recbole.utils import init_seed

        from recbole_gacllm.run_config import build_config

        # Neither RecBole's default split nor the default rule asks for ratings or times.
        keys: dict[str, Any] = {"load_col": {"inter": ["user_id", "item_id"]}, "state": "ERROR"}
        if data_path:
            keys["data_path"] = data_path
        config = build_config("GaCLLM", dataset, config_dict=keys)
        init_seed(config["seed"], True)
        train, _, _ = data_preparation(config, create_dataset(config))
        data = TrainingData.from_recbole(config, train._dataset)
        options = GaCLLMConfig.from_mapping(config.final_config_dict)
        below, _ = raw_descriptions(options, data)
        model_dir = weights.resolve_llm(options.llm_model)
        name = f"{options.llm_model}, not fine-tuned"
        chosen = _evenly(below, n_nodes)
        return cls(data.graph, below, options, data.seed, model_dir, name, chosen)

    @property
    def sampling(self) -> Sampling:
        """How a run draws its answers."""
        options = self.options
        return Sampling(
            options.llm_max_new_tokens, options.llm_temperature, options.llm_repetition_penalty
        )

    def convolve(self, generator: Any) -> tuple[Any, Clock]:
        """``Convolution.next_layer`` over the chosen nodes, with an empty store on disk.

        Prompts of all nodes are rendered, a chunk at a time; the chosen nodes' share of that
        counts.

        Returns:
            Its report, and what it took.
        """
        chosen, n_users, options = self.chosen, len(self.below.tokens["user"]), self.options
        share = len(chosen) / sum(len(self.below.tokens[side]) for side in SIDES)
        rendering = Clock(running=False)

        class Part(RequestMaker):
            def prompts(self, *arguments: Any) -> Iterator[Any]:
                prompts = super().prompts(*arguments)
                while True:
                    with rendering:
                        prompt = next(prompts, None)
                    if prompt is None:
                        return
                    side, node, *_ = prompt
                    if node + (n_users if side == "item" else 0) in chosen:
                        yield prompt

        nothing_known: dict[Side, str] = {
            "user": text.nothing_known(options.text_user_noun),
            "item": text.nothing_known(options.text_item_noun),
        }
        prompts_dir = options.llm_prompts_dir
        clock = Clock()
        with (
            tempfile.TemporaryDirectory() as folder,
            DescriptionStore(Path(folder) / "store.sqlite") as store,
        ):
            maker = Part(
                self.graph,
                PromptTemplates.load(
                    Path(prompts_dir) if prompts_dir else shipped_path("properties", "prompts"),
                    options.text_user_noun,
                    options.text_item_noun,
                ),
                ChatTokenizer(self.model_dir),
                {"model": "benchmark"},
                options,
                self.seed,
            )
            convolution = Convolution(maker, store, lambda: generator, show_progress=True)
            _, report = convolution.next_layer(self.below, nothing_known, 1)
        clock.stop()
        return report, clock.less(rendering, 1 - share)

    def prompts(self) -> list[list[int]]:
        """Token ids of every prompt, each once, in the order in which the stage asks."""
        listener = _Listener()
        self.convolve(listener)
        tokenizer = ChatTokenizer(self.model_dir)
        return [tokenizer.encode_chat(request.messages) for request in listener.requests]


def _evenly(layer: Layer, n_nodes: int) -> frozenset[int]:
    """So many nodes, evenly spaced over users and items; 0 is all."""
    total = sum(len(layer.tokens[side]) for side in SIDES)
    n_chosen = min(n_nodes or total, total)
    return frozenset(i * total // n_chosen for i in range(n_chosen))


class _Listener:
    """A generator that notes what it is asked."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        for request in requests:
            self.requests.append(request)
            yield Completion(request.id, "Something that is no echo.", "stop", 1, 0, 1)
