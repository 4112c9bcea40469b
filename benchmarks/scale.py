"""What the text stages cost besides the LLM: seconds and memory a node, from 10^4 to 10^6 users.

    python benchmarks/scale.py --n_users 10000 100000 1000000 --folder=/tmp/scale --json=scale.json

For each number of users, a fifth as many items and twenty times as many training edges, with
popular items. In a process of its own each: the graph is built, saved and loaded, neighbours are
chosen, two layers are convolved with an empty description store on disk and once more from the full
one, layers are written and read, and their texts handed to the encoder's file writer. Everything is
the product's own code, SmolLM2's tokenizer and the shipped prompt files included, but for two
stand-ins: a generator whose answers are words drawn by the prompt's hash, and an encoder whose
vectors are constants. A step's seconds are those of all its layers: two, or three for files and
hand-over.

Wall and processor seconds are kept; the wall's are those of a machine that others may use, too, so
cost ratios are of processor seconds, and waiting for the disk is in the wall's alone. Prompts are
not tokenised as a whole, which the engine does; ``chat_template_per_second`` says how many prompts
a second that takes. Nor are texts tokenised for the encoder. A size whose figures lie in
``--folder`` is not measured again.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # before PyTorch is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as in the stages

import numpy as np  # noqa: E402
import torch  # noqa: E402

from recbole_gacllm.alignment.encoder import TextEncoder  # noqa: E402
from recbole_gacllm.artifacts import disk  # noqa: E402
from recbole_gacllm.config import GaCLLMConfig, model_defaults, shipped_path  # noqa: E402
from recbole_gacllm.convolution import text  # noqa: E402
from recbole_gacllm.convolution.convolution import Convolution  # noqa: E402
from recbole_gacllm.convolution.graph import TrainGraph  # noqa: E402
from recbole_gacllm.convolution.layers import SIDES, Layer, Side  # noqa: E402
from recbole_gacllm.convolution.prompts import PromptTemplates  # noqa: E402
from recbole_gacllm.convolution.requests import RequestMaker  # noqa: E402
from recbole_gacllm.convolution.store import DescriptionStore  # noqa: E402
from recbole_gacllm.llm.chat import ChatTokenizer  # noqa: E402
from recbole_gacllm.llm.generator import Completion, Request  # noqa: E402
from recbole_gacllm.llm.weights import resolve_llm  # noqa: E402

N_LAYERS = 2
SEED = 2020
WINDOW = 256  # requests that the stand-in takes ahead, as vLLM's engine does on a CPU
TEXT_WIDTH = 384  # all-MiniLM-L6-v2
N_CHATS = 2000
TOTAL = "total"
NOUNS: dict[Side, str] = {"user": "person", "item": "movie"}
JOBS = ["teacher", "nurse", "driver", "farmer", "painter", "lawyer", "writer", "student", "baker"]
GENRES = ["drama", "comedy", "horror", "western", "romance", "thriller", "war", "crime", "fantasy"]
_WORDS = """quiet stories about people who leave home and come back late enjoys slow films with
strange endings old songs and bright colours often returns to tales of loss hope family work sea
city night trains dry humour long journeys clever crimes brave children distant stars warm summers
"""
WORDS = re.findall(r"\w+", _WORDS)


class Stopwatch:
    """Seconds of each step; a step inside another counts for the inner one only.

    Attributes:
        seconds: Wall seconds by step.
        cpu_seconds: Processor seconds of this process by step.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.cpu_seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = time.perf_counter(), time.process_time()

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """What happens inside counts for a step."""
        self._turn(name)
        try:
            yield
        finally:
            self._turn(None)

    def each(self, name: str, values: Iterable[Any]) -> Iterator[Any]:
        """The same values; the making of each counts for a step."""
        source, end = iter(values), object()
        while True:
            with self.step(name):
                value = next(source, end)
            if value is end:
                return
            yield value

    def _turn(self, name: str | None) -> None:
        now = time.perf_counter(), time.process_time()
        if self._open:
            self.seconds[self._open[-1]] += now[0] - self._since[0]
            self.cpu_seconds[self._open[-1]] += now[1] - self._since[1]
        self._since = now
        if name is None:
            self._open.pop()
        else:
            self._open.append(name)


class Timed:
    """Another object, some of whose methods count for a step."""

    def __init__(self, inner: Any, watch: Stopwatch, **steps: str) -> None:
        self._inner, self._watch, self._steps = inner, watch, steps

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if name not in self._steps:
            return value

        def timed(*arguments: Any, **keywords: Any) -> Any:
            with self._watch.step(self._steps[name]):
                return value(*arguments, **keywords)

        return timed


class StandIn:
    """A generator without a model: the same prompt, the same answer, at once."""

    def __init__(self, watch: Stopwatch) -> None:
        self._watch = watch

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Answer requests, taking some ahead."""
        source = iter(requests)
        while window := list(islice(source, WINDOW)):
            for request in window:
                with self._watch.step("stand-in generator"):
                    completion = self._complete(request)
                yield completion

    def close(self) -> None:
        """Nothing to free."""

    @staticmethod
    def _complete(request: Request) -> Completion:
        # The id is the SHA-256 of the prompt and of all else that makes a description.
        digest = bytes.fromhex(request.id)
        # Every fourth word has its place in it: four words in a row that recur would be a loop.
        chosen = [
            WORDS[byte % len(WORDS)] + str(place) * (place % 4 == 0)
            for place, byte in enumerate(digest[: 16 + digest[-1] % 16])
        ]
        n_prompt = sum(len(message["content"]) for message in request.messages) // 4
        answer = f"This one {' '.join(chosen)}."
        return Completion(request.id, answer, "stop", n_prompt, 0, len(chosen) + 3)


class StandInEncoder(TextEncoder):
    """The encoder's file writer without a model."""

    def __init__(self, folder: Path) -> None:
        self.model_dir, self.batch_size = folder, 64
        self.dtype, self.dim, self._prompt = torch.float32, TEXT_WIDTH, None
        self._vector = np.full((1, self.dim), self.dim**-0.5, dtype=np.float32)

    def _encode(self, texts: list[str], show_progress: bool = False) -> Any:
        return self._vector.repeat(len(texts), axis=0)


def synthetic(n_users: int) -> tuple[dict[str, Any], Layer]:
    """Arguments of a :class:`TrainGraph`, edges in no order, and layer 0."""
    rng = np.random.default_rng(SEED)
    n_items, n_edges = n_users // 5, n_users * 20
    # Item ranks of density 1 / sqrt: the most popular thousandth takes 3 % of the edges.
    n_drawn = n_edges + n_edges // 8
    items = (n_items * rng.random(n_drawn) ** 2).astype(np.int64)
    keys = np.unique(rng.integers(n_users, size=n_drawn) * n_items + items)
    del items
    assert len(keys) >= n_edges, "too many edges were drawn twice"
    rng.shuffle(keys)
    users, items = np.divmod(keys[:n_edges], n_items)
    tokens: dict[Side, Any] = {
        "user": np.char.add("u", np.arange(n_users).astype(str)),
        "item": np.char.add("i", np.arange(n_items).astype(str)),
    }
    arguments = {
        "user_tokens": tokens["user"],
        "item_tokens": tokens["item"],
        "users": users,
        "items": items,
        "timestamps": rng.integers(10**9, size=n_edges).astype(np.float64),
    }
    ages, jobs = rng.integers(18, 80, n_users).tolist(), rng.choice(JOBS, n_users).tolist()
    years, genres = rng.integers(1930, 2000, n_items).tolist(), rng.choice(GENRES, (2, n_items))
    first, second = genres.tolist()
    texts: dict[Side, list[str]] = {
        "user": [
            f"A person aged {age} who works as a {job}."
            for age, job in zip(ages, jobs, strict=True)
        ],
        "item": [
            f"The {a.title()} of Number {i} ({year}), a movie filed under {a} and {b}."
            for i, (year, a, b) in enumerate(zip(years, first, second, strict=True))
        ],
    }
    return arguments, Layer.raw({side: tokens[side].tolist() for side in SIDES}, texts)


def measure(n_users: int, folder: Path) -> dict[str, Any]:
    """All steps at one size, in this process."""
    watch = Stopwatch()
    model_dir = resolve_llm("embedded")
    tokenizer = ChatTokenizer(model_dir)
    arguments, raw = synthetic(n_users)
    memory_of_data = peak_gib()
    n_nodes = sum(len(raw.tokens[side]) for side in SIDES)

    with watch.step("graph building"):
        graph = TrainGraph(**arguments)
    arguments.clear()
    with watch.step("graph fingerprint, save, load"):
        graph.fingerprint()
        graph.save(folder / "graph.npz")
        graph = TrainGraph.load(folder / "graph.npz")

    layers = [raw]
    digests: list[list[str]] = []
    files = [folder / f"layer_{number}.parquet" for number in range(N_LAYERS + 1)]
    for part in ("first run", "second run"):
        with DescriptionStore(folder / "store.sqlite") as store:
            convolution = convolution_of(graph, tokenizer, store, watch, part)
            del layers[1:]
            for number in range(1, N_LAYERS + 1):
                with watch.step(f"{part}: keys, cleaning, settling"):
                    layer, report = convolution.next_layer(layers[-1], nothing_known(), number)
                layers.append(layer)
                log(n_users, f"{part}, layer {number}", watch)
                expected = n_nodes if part == "first run" else 0
                assert report.n_generated + report.n_duplicates * (expected > 0) == expected
                assert report.n_failed == 0, report.failures
            assert len(store) <= N_LAYERS * n_nodes
        digests.append([layer.digest() for layer in layers])
        del convolution
    assert digests[0] == digests[1], "the store gave other texts than the generator"
    per_second = chats_a_second(graph, tokenizer, layers[0], folder)

    for layer, file in zip(layers, files, strict=True):
        with watch.step("layer write"):
            layer.write(file)
    layers.clear()
    del layer, raw
    encoder = StandInEncoder(folder / "no-model")
    for number, file in enumerate(files):
        with watch.step("layer read"):
            layer = Layer.read(file)
        with watch.step("layer digest"):
            assert layer.digest() == digests[0][number]
        with watch.step("hand-over to encoding"):
            out = folder / f"layer_{number}.npy"
            encoder.encode_to_file(layer.texts["user"] + layer.texts["item"], out)
        out.unlink()
        log(n_users, f"hand-over of layer {number}", watch)
    return {
        "n_users": n_users,
        "n_nodes": n_nodes,
        "n_edges": graph.n_edges,
        "n_layers": N_LAYERS,
        "seconds": {**watch.seconds, TOTAL: sum(watch.seconds.values())},
        "cpu_seconds": {**watch.cpu_seconds, TOTAL: sum(watch.cpu_seconds.values())},
        "chat_template_per_second": per_second,
        "peak_gib_of_synthetic_data": memory_of_data,
        "peak_gib": peak_gib(),
        "store_bytes": (folder / "store.sqlite").stat().st_size,
        "load_average_5_minutes": os.getloadavg()[1],
    }


def nothing_known() -> dict[Side, str]:
    return {side: text.nothing_known(NOUNS[side]) for side in SIDES}


def convolution_of(
    graph: TrainGraph,
    tokenizer: ChatTokenizer,
    store: DescriptionStore,
    watch: Stopwatch,
    part: str,
) -> Convolution:
    """The stage's own convolution with a stopwatch on its parts."""

    class Watched(RequestMaker):
        def prompts(self, *args: Any) -> Iterator[Any]:
            return watch.each(f"{part}: rendering", super().prompts(*args))

    templates = PromptTemplates.load(
        shipped_path("properties", "prompts"), NOUNS["user"], NOUNS["item"]
    )
    keys = {
        "neighbor_rule": "rare_first",
        "n_neighbors": 8,
        "llm_max_prompt_tokens": 384,
        "llm_max_neighbor_tokens": 48,
        "llm_max_new_tokens": 64,
        "llm_temperature": 0.0,
        "llm_repetition_penalty": 1.05,
    }
    options = GaCLLMConfig.from_mapping({**model_defaults(), **keys})
    with watch.step(f"{part}: neighbour choice"):
        maker = Watched(
            graph,
            templates,
            Timed(  # type: ignore[arg-type]
                tokenizer,
                watch,
                count_tokens=f"{part}: tokenising",
                truncate=f"{part}: tokenising",
            ),
            {"model": "stand-in"},
            options,
            SEED,
        )
    timed = Timed(store, watch, get_many=f"{part}: store reads", put_many="store writes")
    return Convolution(maker, timed, lambda: StandIn(watch), False)  # type: ignore[arg-type]


def chats_a_second(
    graph: TrainGraph, tokenizer: ChatTokenizer, below: Layer, folder: Path
) -> float:
    """Prompts a second through chat template and tokenizer, which is the engine's work."""
    with DescriptionStore(folder / "unused.sqlite") as store:
        convolution = convolution_of(graph, tokenizer, store, Stopwatch(), "")
        chats = list(islice(convolution.maker.prompts(below, nothing_known(), 1), N_CHATS))
    started = time.perf_counter()
    for chat in chats:
        tokenizer.encode_chat(chat[2])
    return len(chats) / (time.perf_counter() - started)


def log(n_users: int, done: str, watch: Stopwatch) -> None:
    seconds = sum(watch.seconds.values())
    print(f"{n_users} users: {done}, {seconds:.0f} s, {peak_gib():.2f} GiB", file=sys.stderr)


def peak_gib() -> float:
    """Most memory that this process has had, files mapped into it included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def figures_of(sizes: list[dict[str, Any]]) -> dict[str, Any]:
    """Nodes a second of each step, and each step's cost a node against the smallest graph's."""
    first, last = sizes[0], sizes[-1]

    def ratio(clock: str, step: str) -> float:
        costs = [size[clock][step] / size["n_nodes"] for size in (last, first)]
        return costs[0] / costs[1]

    return {
        "sizes": [
            {
                **size,
                "nodes_per_second": {
                    step: size["n_nodes"] / seconds for step, seconds in size["seconds"].items()
                },
            }
            for size in sizes
        ],
        **{
            f"{clock}_per_node_last_to_first": {step: ratio(clock, step) for step in last[clock]}
            for clock in ("seconds", "cpu_seconds")
        },
        "peak_gib": max(size["peak_gib"] for size in sizes),
        "machine": {"processor": processor(), "n_cores": os.cpu_count()},
    }


def processor() -> str:
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text("utf-8").splitlines() if cpu.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def print_table(figures: dict[str, Any]) -> None:
    sizes = figures["sizes"]
    head = "".join(f"{size['n_users']:>12,}" for size in sizes)
    print(f"{'nodes a second; users:':<44}{head}{'cost ratio':>12}")
    for step, ratio in figures["cpu_seconds_per_node_last_to_first"].items():
        rates = "".join(f"{size['nodes_per_second'][step]:>12,.0f}" for size in sizes)
        print(f"{step:<44}{rates}{ratio:>12.2f}")
    for clock in ("seconds", "cpu_seconds"):
        totals = "".join(f"{size[clock][TOTAL]:>12,.1f}" for size in sizes)
        ratio = figures[f"{clock}_per_node_last_to_first"][TOTAL]
        print(f"{clock:<44}{totals}{ratio:>12.2f}")
    print(f"{'peak memory, GiB':<44}" + "".join(f"{size['peak_gib']:>12.2f}" for size in sizes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--n_users", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--folder", type=Path, required=True, help="store, layers and figures")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    known = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    known.folder.mkdir(parents=True, exist_ok=True)

    sizes = []
    for n_users in sorted(known.n_users):
        file = known.folder / f"{n_users}.json"
        if known.one:
            scratch = known.folder / f"{n_users}"
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            measured = measure(n_users, scratch)
            shutil.rmtree(scratch)
            disk.write_atomic(file, json.dumps(measured).encode())
            return
        if not file.exists():
            command = [sys.executable, __file__, "--one", f"--n_users={n_users}"]
            subprocess.run([*command, f"--folder={known.folder}"], check=True)
        sizes.append(json.loads(file.read_text()))
    figures = figures_of(sizes)
    print_table(figures)
    if known.json:
        known.json.parent.mkdir(parents=True, exist_ok=True)
        known.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
