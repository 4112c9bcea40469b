"""SIGKILL at many moments of the preprocessing hook: nothing finished is lost, changed or repeated.

Most are exact (the n-th rename, write, sync or SQL statement of a stage): between two of these
nothing on the disk changes. Some are random times, within a write, too; some kill the run
alone, some its stage alone, some all at once. transformers in float32 is deterministic, so every
interrupted run must end with the bytes of one that was not.
"""

import json
import logging
import random
import re
import shutil
import sqlite3
import sys
import time
from collections import Counter

import psutil
import pytest

from recbole_gacllm.artifacts import manifests
from recbole_gacllm.artifacts.manifests import read_manifest
from recbole_gacllm.convolution.layers import Layer

from .conftest import fresh_process
from .crash_lab import prepare

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

N_EXACT = 25
N_RANDOM = 20
KILLS_A_RUN = 8
STAGES = ("inputs", "sft", "merged", "descriptions", "embeddings")
OUTPUTS = {
    "inputs": ["graph.npz", "layer_0.parquet"],
    "sft": ["adapter"],
    "merged": ["model"],
    "descriptions": ["layer_1.parquet", "layer_2.parquet"],
    "embeddings": ["layer_0.npy", "layer_1.npy", "layer_2.npy"],
}
TINY = {
    "llm_backend": "transformers",
    "llm_dtype": "float32",
    "llm_n_layers": 2,
    "llm_max_new_tokens": 8,
    "llm_max_prompt_tokens": 480,
    "n_neighbors": 2,
    "sft_n_pairs": 24,
    "sft_n_heldout": 4,
    "sft_learning_rate": 0.003,
    "sft_checkpoint_steps": 1,
    "encoder_dtype": "float32",
    "encoder_batch_size": 1,
}


class Folder:
    """An artefact folder under test, and what may never change in it."""

    def __init__(self, place, name):
        self.place, self.path = place, place / name
        self.keys = TINY | {
            "llm_model": str(place / "model"),
            "encoder_model": str(place / "encoder"),
            "artifact_dir": str(self.path),
        }
        self.rows = {}
        self.manifests = {}
        self.may_train_again = False

    def run(self, lab, **how):
        """Run the hook once; hold it to what was finished before."""
        record = self.place / "record.jsonl"
        checkpoint = self._checkpoint()
        trained = list(self.path.glob("tiny/sft-*/adapter")) and not self.may_train_again
        answer = lab.run(self.keys, self.place / "data", record, **how)
        lines = [json.loads(line) for line in record.read_text().splitlines()]
        asked = {value for _, kind, value in lines if kind == "request"}
        assert not asked & self.rows.keys(), "a finished description was generated again"
        steps = [value for _, kind, value in lines if kind == "update"]
        assert not steps or (min(steps) == checkpoint + 1 and not trained), "an update was repeated"
        self._check()
        return answer, lines

    def _checkpoint(self):
        """Updates of the last complete checkpoint."""
        steps = [0]
        for state in self.path.glob("tiny/sft-*/checkpoints/checkpoint-*/trainer_state.json"):
            try:
                steps.append(json.loads(state.read_text())["global_step"])
            except ValueError:
                continue
        return max(steps)

    def _check(self):
        rows = stored(self.path, self.place / "scratch")
        assert rows.items() >= self.rows.items(), "a finished description was lost or changed"
        self.rows = rows
        written = {file: file.read_bytes() for file in self.path.glob("tiny/*/manifest.json")}
        assert written.items() >= self.manifests.items(), "a manifest was lost or changed"
        self.manifests = written
        for file, content in written.items():
            manifest = read_manifest(file.parent)
            assert manifest == json.loads(content)
            digests = manifests.digests(file.parent, OUTPUTS[manifest["stage"]])
            assert digests == manifest["files"], "a finished stage is not what its manifest says"

    def results(self):
        """All that the stages made, by name: bytes, or what a layer says."""
        results = {}
        for stage, outputs in OUTPUTS.items():
            (folder,) = self.path.glob(f"tiny/{stage}-*")
            for name in manifests.digests(folder, outputs):
                file = folder / name
                if file.suffix == ".parquet":
                    layer = Layer.read(file)
                    content = (layer.tokens, layer.texts, layer.statuses, layer.reasons)
                else:
                    content = file.read_bytes()
                results[f"{folder.name}/{name}"] = content
        # Nodes and tokens are counted alike however often a run is killed.
        (folder,) = self.path.glob("tiny/descriptions-*")
        manifest = read_manifest(folder)
        assert manifest is not None
        counts = ("n_duplicates", "n_retried", "n_failed", "n_prompt_tokens", "n_output_tokens")
        results["counts"] = [
            [layer["n_generated"] + layer["n_from_store"], *(layer[name] for name in counts)]
            for layer in manifest["layers"]
        ]
        results["store"] = {key: row[:3] for key, row in self.rows.items()}
        return results


def stored(artifact_dir, scratch):
    """The rows of the store, read from a copy: looking must not repair what a kill left."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    for file in artifact_dir.glob("store.sqlite*"):
        shutil.copy(file, scratch)
    if not (scratch / "store.sqlite").exists():
        return {}
    with sqlite3.connect(scratch / "store.sqlite") as db:
        if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'descriptions'").fetchone():
            return {}
        columns = "key, text, status, reason, n_prompt_tokens, n_output_tokens, created, checksum"
        rows = {row[0]: row[1:] for row in db.execute(f"SELECT {columns} FROM descriptions")}
    db.close()
    return rows


def plan(answer, lines, draw):
    """Kills for each of several runs, in the order in which they can happen.

    First exact moments, of kinds drawn from all that the whole run had, then random times.
    """
    times = Counter(f"{stage}: {what}" for stage, kind, what in lines if kind == "event")
    names = [name for name in times if not name.startswith("between")]
    must = {
        name
        for name in names
        if re.search("rename manifest.json|sql COMMIT|rename layer_.*npy", name)
    }
    others = [name for name in names if name not in must]
    must.update(draw.sample(others, N_EXACT - len(must)))
    chosen = [name for name in names if name in must]
    n_runs = -(-len(chosen) // KILLS_A_RUN)
    runs = []
    for number in range(n_runs):
        here = chosen[number::n_runs]
        stages = [name.split(":")[0] for name in here]
        runs.append(
            [
                # Later times of a moment may be over when the stage was killed before.
                {
                    "event": name,
                    "nth": 1 if stages.count(stage) > 1 else draw.randint(1, times[name]),
                }
                for name, stage in zip(here, stages, strict=True)
            ]
        )
    for _ in range(N_RANDOM):  # more than are needed: a run may end before its kill
        stages = sorted(
            draw.choices(("sft", "merged", "descriptions", "embeddings"), (2, 1, 4, 3), k=4),
            key=STAGES.index,
        )
        runs.append(
            [
                {
                    "stage": stage,
                    "after": draw.uniform(0, 0.9 * answer["seconds"][stage]),
                    "whom": draw.choice(("all", "all", "leader", "stage")),
                }
                for stage in stages
            ]
        )
    return runs


def test_kills_at_exact_and_at_random_moments_lose_change_and_repeat_nothing(place, lab, whole):
    results, answer, lines = whole
    hits = Counter()

    def enough():
        at_random = {name: n for name, n in hits.items() if name.endswith("at a random time")}
        of_long = (hits[f"{s} at a random time"] for s in ("sft", "descriptions", "embeddings"))
        n_random = sum(at_random.values())
        return n_random >= N_RANDOM and hits.total() >= N_RANDOM + N_EXACT and min(of_long) >= 3

    for number, kills in enumerate(plan(answer, lines, random.Random(17))):
        folder = Folder(place, f"killed-{number}")
        for kill in kills:
            if enough():
                break
            ended, _ = folder.run(lab, kill=kill)
            assert ended["status"] in ("killed", "done"), ended
            if ended["status"] == "done":
                break
            hits[ended["event"] or f"{ended['stage']} at a random time"] += 1
        ended, _ = folder.run(lab)
        assert ended["status"] == "done", ended
        assert folder.results() == results
        shutil.rmtree(folder.path)
        if enough():
            break
    print(*sorted(f"{n} x {where}" for where, n in hits.items()), sep="\n")
    assert enough(), hits
    for stage in STAGES:
        assert hits[f"{stage}: rename manifest.json"] == 1
    assert any("sql COMMIT" in where for where in hits)
    assert any("rename layer_" in where for where in hits)


def _run_hook(keys, data):
    """A process of the hook; each of its stages is an interpreter with a guard of its own."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    prepare(keys, data)


def _is_there(folder, pattern):
    try:
        return any(folder.glob(pattern))
    except FileNotFoundError:  # a folder that the run removed while it was searched
        return False


def test_real_processes_killed_in_a_stage_leave_nothing_behind_and_end_the_same(place, lab, whole):
    """Only the run is killed: its stage and all that this started must die with it."""
    folder = Folder(place, "real")
    for sign in ("sft-*/checkpoints/*", "descriptions-*/job.json"):
        process = fresh_process(_run_hook, folder.keys, place / "data")
        while not _is_there(folder.path, f"tiny/**/{sign}"):
            assert process.is_alive(), f"it ended before {sign}"
            time.sleep(0.01)
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.join()
        finished = set(folder.path.glob("tiny/*/manifest.json"))
        _, alive = psutil.wait_procs(family, timeout=5)
        assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]
        assert set(folder.path.glob("tiny/*/manifest.json")) == finished, "the stage went on"
        folder._check()
    assert folder.run(lab)[0]["status"] == "done"
    assert folder.results() == whole[0]
