"""The hook and all stages on a tiny random model: what a run records, reuse, leakage, bad input.

Runs that are killed: :mod:`.test_kill_sweep`.
"""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path

import numpy as np
import pytest

from recbole_gacllm.artifacts import children
from recbole_gacllm.convolution.layers import SIDES, Layer
from recbole_gacllm.inspection.reading import RunDescriptions
from recbole_gacllm.run import run

from .conftest import add_rows, our_keys, run_stage, tiny_settings, write_dataset

pytestmark = pytest.mark.slow  # every test here runs the pipeline or a part of it for real

TINY = {
    "llm_backend": "transformers",
    "llm_dtype": "float32",
    "llm_n_layers": 1,
    "llm_max_new_tokens": 12,
    "llm_max_prompt_tokens": 480,
    "n_neighbors": 2,
    "sft_n_pairs": 32,
    "sft_n_heldout": 8,
    "sft_learning_rate": 0.003,
    "sft_checkpoint_steps": 1,
    "encoder_dtype": "float32",
}


@pytest.fixture
def keys(settings, tiny_model, in_process):
    return {**settings, **TINY, "llm_model": str(tiny_model)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model):
    """One run, shared by the tests that only look at what it left."""
    root = tmp_path_factory.mktemp("finished")
    settings = tiny_settings(write_dataset(root / "data"), root)
    keys = {**settings, **TINY, "llm_model": str(tiny_model)}
    with contextlib.chdir(root), pytest.MonkeyPatch.context() as patch:
        patch.setattr(children, "run_child", run_stage)
        return keys, run("GaCLLM", "tiny", config_dict=dict(keys))


def test_run_json_says_all_that_happened(finished):
    keys, done = finished
    record = json.loads(done.run_file.read_text())
    assert record["test"] == dict(done.result["test_result"])
    assert set(record["stages"]) == {"inputs", "sft", "merged", "descriptions", "embeddings"}
    layers = record["stages"]["descriptions"]["layers"]
    assert layers[0]["n_nodes"] == 54
    assert layers[0]["n_generated"] + layers[0]["n_from_store"] == 54
    assert layers[0]["n_prompt_tokens"] > 54 * 20
    assert layers[0]["n_output_tokens"] > 0
    assert (
        record["stages"]["sft"]["perplexity_before"] > record["stages"]["sft"]["perplexity_after"]
    )
    assert record["leakage_audit"]["edges_in_graph"] == 0
    assert record["leakage_audit"]["n_pairs"] > 0
    qualities = record["description_quality"]
    assert [layer["number"] for layer in qualities] == list(range(1, len(layers) + 1))
    assert [layer["report"] for layer in qualities] == layers
    for layer in qualities:
        assert sum(sum(side["statuses"].values()) for side in layer["sides"].values()) == 54
        assert sum(len(side["samples"]) for side in layer["sides"].values()) == 10
    for path in (*record["artifacts"].values(), record["checkpoint"]):
        assert Path(path).exists()
    assert record["versions"]["recbole"] == "1.2.1"
    assert record["config"]["llm_model"] == keys["llm_model"]
    assert len(record["config_fingerprint"]) == 64


def test_every_node_has_a_text_and_a_finite_embedding_at_every_layer(finished):
    _, done = finished
    folders = {stage: Path(path) for stage, path in done.record["artifacts"].items()}
    for number, folder in ((0, folders["inputs"]), (1, folders["descriptions"])):
        layer = Layer.read(folder / f"layer_{number}.parquet")
        assert [len(layer.texts[side]) for side in SIDES] == [24, 30]
        assert all(text for side in SIDES for text in layer.texts[side])
        vectors = np.load(folders["embeddings"] / f"layer_{number}.npy").astype(np.float32)
        assert vectors.shape == (54, 384)
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-2)


def test_started_again_it_reuses_every_stage_and_gives_the_same_numbers(
    finished, no_stage, monkeypatch
):
    keys, first = finished
    monkeypatch.chdir(Path(keys["artifact_dir"]).parent)
    again = run("GaCLLM", "tiny", config_dict=dict(keys))
    assert again.result["test_result"] == first.result["test_result"]
    assert all(stage["reused"] for stage in again.record["stages"].values())
    assert not any(stage["reused"] for stage in first.record["stages"].values())


def test_an_audit_that_fails_does_not_cost_the_metrics(finished, monkeypatch, tmp_path):
    def broken(*_, **__):
        raise RuntimeError("an audit that fails")

    monkeypatch.setattr("recbole_gacllm.run.audit_leakage", broken)
    keys, first = finished
    with pytest.raises(RuntimeError, match="an audit that fails"):
        run("GaCLLM", "tiny", config_dict=keys | {"checkpoint_dir": str(tmp_path)})
    (run_file,) = tmp_path.glob("runs/*/run.json")
    assert json.loads(run_file.read_text())["test"] == first.record["test"]


def test_shuffled_texts_use_the_same_artefacts_on_other_nodes(finished, no_stage, monkeypatch):
    keys, first = finished
    monkeypatch.chdir(Path(keys["artifact_dir"]).parent)
    shuffled = run("GaCLLM", "tiny", config_dict={**keys, "text_source": "shuffled"})
    assert shuffled.record["artifacts"] == first.record["artifacts"]
    assert shuffled.result["best_valid_score"] != first.result["best_valid_score"] or (
        shuffled.result["test_result"] != first.result["test_result"]
    )


def test_a_run_with_other_names_of_items_shares_the_texts_and_leaves_the_names_of_the_first(
    finished, no_stage, tmp_path
):
    keys, first = finished
    other = {"text_item_name_field": "class", "checkpoint_dir": str(tmp_path)}
    second = run("GaCLLM", "tiny", config_dict=keys | other)
    assert {k: v for k, v in second.record["artifacts"].items() if k != "item_names"} == {
        k: v for k, v in first.record["artifacts"].items() if k != "item_names"
    }
    names = [RunDescriptions.of_run(done.run_file).names["i1"] for done in (first, second)]
    assert names == ["The Great Film 1", "Comedy"]


def test_no_layers_are_the_raw_texts_and_can_be_shuffled(keys):
    done = {
        source: run(
            "GaCLLM", "tiny", config_dict={**keys, "text_source": source, "llm_n_layers": n}
        )
        for source, n in (("raw", 1), ("generated", 0), ("shuffled", 0))
    }
    stages = {"inputs", "item_names", "embeddings"}
    assert all(set(one.record["artifacts"]) == stages for one in done.values())
    scores = {source: one.result["best_valid_score"] for source, one in done.items()}
    assert scores["generated"] == scores["raw"]
    # Of the same initial weights; so small a data set may end with the same ranks.
    record = {source: one.record["valid"] for source, one in done.items()}
    assert record["shuffled"] != record["raw"] or (
        done["shuffled"].result["test_result"] != done["raw"].result["test_result"]
    )


def plant_split(root: Path) -> None:
    """Split ``tiny`` by files; marked items occur in the validation and test files alone."""
    folder = root / "tiny"
    header, *lines = (folder / "tiny.inter").read_text().splitlines()
    planted = {"train": lines, "valid": [], "test": []}
    for number in range(24):
        planted["valid"].append(f"u{number}\tv{number % 3}\t5\t1")
        planted["test"].append(f"u{number}\tt{number % 3}\t5\t2")
    for part, rows in planted.items():
        (folder / f"tiny.{part}.inter").write_text("\n".join([header, *rows]) + "\n")
    items = [f"{side}{n}\tZyzzyva {side.upper()}{n}\tDrama" for side in "vt" for n in range(3)]
    add_rows(root, *items, ending="item")


def test_planted_held_out_interactions_leave_no_trace_after_a_real_split(
    keys, dataset_root, monkeypatch
):
    """Marked films that only validation and test hold: none in graph, pairs, prompts or texts."""
    from recbole_gacllm.convolution.graph import TrainGraph
    from recbole_gacllm.convolution.requests import RequestMaker
    from recbole_gacllm.sft import pairs

    plant_split(dataset_root)
    planted = {**keys, "benchmark_filename": ["train", "valid", "test"]}
    learnt, prompts = [], []
    sample, request_of = pairs.sample_pairs, RequestMaker.request

    def sampling(*args):
        for part in sample(*args):
            learnt.extend(part)
        return sample(*args)

    def asking(self, messages, number):
        prompts.append("\n".join(message["content"] for message in messages))
        return request_of(self, messages, number)

    monkeypatch.setattr("recbole_gacllm.stage.sample_pairs", sampling)
    monkeypatch.setattr(RequestMaker, "request", asking)
    done = run("GaCLLM", "tiny", config_dict=planted)

    folders = {stage: Path(path) for stage, path in done.record["artifacts"].items()}
    graph = TrainGraph.load(folders["inputs"] / "graph.npz")
    assert graph.n_edges == 240
    touched = set(graph.item_tokens[graph.items].tolist())
    assert not touched & {"v0", "v1", "v2", "t0", "t1", "t2"}
    assert learnt
    assert not any("Zyzzyva" in repr(pair) for pair in learnt)
    about = [prompt for prompt in prompts if "Zyzzyva" in prompt]
    assert len(about) == 6  # their own, each from its own text alone
    assert all(prompt.count("Zyzzyva") == 1 and "\n- " not in prompt for prompt in about)
    layer = Layer.read(folders["descriptions"] / "layer_1.parquet")
    assert not any("Zyzzyva" in text for text in layer.texts["user"])
    audit = done.record["leakage_audit"]
    assert (audit["edges_in_graph"], audit["heldout_mentions"]) == (0, 0)
    assert audit["n_pairs"] == 48


@pytest.mark.engine
def test_the_real_llm_is_tuned_merged_and_run_by_the_real_vllm(settings, tmp_path):
    """SmolLM2, LoRA, vLLM and MiniLM on a small graph: two layers."""
    few = write_dataset(tmp_path / "few", n_users=9, n_items=10)
    done = run(
        "GaCLLM",
        "tiny",
        config_dict={
            **settings,
            "data_path": str(few),
            "llm_backend": "vllm",
            "llm_n_layers": 2,
            "text_item_noun": "movie",
            "text_user_noun": "person",
            "n_neighbors": 4,
            "llm_max_new_tokens": 16,
            "sft_n_pairs": 8,
            "sft_n_heldout": 3,
            "sft_batch_size": 4,
            "sft_accumulation_steps": 1,
        },
    )
    stages = done.record["stages"]
    assert stages["sft"]["perplexity_after"] < stages["sft"]["perplexity_before"]
    assert stages["descriptions"]["backend"] == "vllm"
    folder = Path(done.record["artifacts"]["descriptions"])
    for number in (1, 2):
        report = stages["descriptions"]["layers"][number - 1]
        answered = report["n_generated"] + report["n_from_store"] + report["n_duplicates"]
        assert answered == 19
        layer = Layer.read(folder / f"layer_{number}.parquet")
        failed = sum(layer.statuses[side].count("failed") for side in SIDES)
        assert report["n_failed"] == failed == sum(report["failures"].values())
        assert set(report["failures"]) <= {"echo", "loop"}
        assert failed < (2 if number == 1 else 5)
        begins = {
            "user": ("This person enjoys ", "This person likes movies that ")[number - 1],
            "item": (
                "This movie appeals to people who enjoy ",
                "This movie is liked by people who share a taste for ",
            )[number - 1],
        }
        for side in SIDES:
            made = [
                text
                for text, status in zip(layer.texts[side], layer.statuses[side], strict=True)
                if status == "generated"
            ]
            assert all(text.startswith(begins[side]) for text in made)
            assert len(made) > {"user": 5, "item": 5}[side]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_item_template": "{titel}"}, "titel.*movie_title"),
        ({"neighbor_rule": "oldest"}, "neighbor_rule: 'oldest' is not allowed"),
        ({"llm_modell": "x"}, "llm_modell.*did you mean llm_model"),
        ({"llm_model": "/no/such/folder"}, "/no/such/folder"),
        ({"llm_prompts_dir": "/no/such/folder"}, "/no/such/folder"),
        ({"text_item_name_field": "titel"}, "text_item_name_field: 'titel'"),
        ({"llm_max_prompt_tokens": 64}, "llm_max_prompt_tokens is 64"),
        ({"llm_adapter": "/no/such/adapter"}, "/no/such/adapter"),
        ({"llm_max_prompt_tokens": 600}, "model's window of 512"),
        ({"encoder_model": "/no/such/folder"}, "/no/such/folder"),
        ({"text_value_names": {"genre": {1: "one"}}}, "text_value_names: 'genre'"),
        ({"text_value_names": {"class": "one"}}, "text_value_names"),
        ({"sft_target_modules": "no_such_module"}, "no_such_module"),
    ],
)
def test_bad_input_ends_in_one_clear_error_before_any_long_stage(keys, change, message):
    from recbole_gacllm.errors import WeightsError

    with pytest.raises((ValueError, WeightsError), match=message):
        run("GaCLLM", "tiny", config_dict={**keys, **change})
    assert not list(Path(keys["artifact_dir"]).glob("*/*/adapter"))


def test_heads_that_gpus_cannot_share_are_refused_before_the_fine_tuning(keys, monkeypatch):
    from recbole_gacllm.llm import engines

    monkeypatch.setattr(engines, "choose_backend", lambda requested: ("vllm", "a stand-in"))
    with pytest.raises(ValueError, match=r"size: 3 cannot share the 4 attention heads.*: 1, 2, 4"):
        run("GaCLLM", "tiny", config_dict={**keys, "llm_tensor_parallel_size": 3})
    assert not list(Path(keys["artifact_dir"]).glob("*/sft-*"))


def test_recent_neighbours_without_times_are_refused_before_any_long_stage(keys):
    columns = {"inter": ["user_id", "item_id"]}
    with pytest.raises(ValueError, match="neighbor_rule is 'recent'"):
        run("GaCLLM", "tiny", config_dict={**keys, "load_col": columns, "neighbor_rule": "recent"})
    assert not Path(keys["artifact_dir"]).exists()


def test_coded_values_may_be_numbers_in_yaml(keys):
    names = {"age": {20: "aged twenty"}}
    template = "A person {age}."
    done = run(
        "GaCLLM",
        "tiny",
        config_dict={
            **keys,
            "text_source": "raw",
            "text_value_names": names,
            "text_user_template": template,
        },
    )
    layer = Layer.read(Path(done.record["artifacts"]["inputs"]) / "layer_0.parquet")
    assert layer.texts["user"][layer.tokens["user"].index("u0")] == "A person aged twenty."


def test_preparing_leaves_global_random_state_alone(monkeypatch):
    """Cached or not, the model that follows must start from the same weights."""
    import torch

    from recbole_gacllm import pipeline

    def draw(*_):
        raise RuntimeError(f"drew {random.random()}, {np.random.rand()}, {torch.rand(3)}")

    monkeypatch.setattr(pipeline, "_Hook", draw)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with pytest.raises(RuntimeError, match="drew"):
        pipeline.prepare(our_keys(), None)
    assert states == (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
    )


def test_a_folder_that_cannot_be_written_is_named(keys, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"artifact_dir.*file"):
        run("GaCLLM", "tiny", config_dict={**keys, "artifact_dir": str(tmp_path / "file")})


def test_an_empty_feature_file_is_named(keys, dataset_root):
    (dataset_root / "tiny" / "tiny.item").write_text("")
    with pytest.raises(ValueError, match=r"tiny\.item"):
        run("GaCLLM", "tiny", config_dict=keys)


def test_a_data_set_without_text_says_so_and_goes_on_with_ids_only_if_asked(keys, dataset_root):
    for side in SIDES:
        (dataset_root / "tiny" / f"tiny.{side}").unlink()
    with pytest.raises(ValueError, match="text_allow_ids"):
        run("GaCLLM", "tiny", config_dict=keys)
    done = run("GaCLLM", "tiny", config_dict={**keys, "text_allow_ids": True, "text_source": "raw"})
    layer = Layer.read(Path(done.record["artifacts"]["inputs"]) / "layer_0.parquet")
    assert layer.texts["item"][0].endswith(f"with id {layer.tokens['item'][0]}.")


def test_users_without_features_and_items_without_a_row_are_described_from_what_there_is(
    keys, dataset_root
):
    (dataset_root / "tiny" / "tiny.user").unlink()
    items = dataset_root / "tiny" / "tiny.item"
    items.write_text("\n".join(items.read_text().splitlines()[:10]) + "\n")
    done = run("GaCLLM", "tiny", config_dict={**keys, "text_source": "raw"})
    layer = Layer.read(Path(done.record["artifacts"]["inputs"]) / "layer_0.parquet")
    assert set(layer.texts["user"]) == {"A user of which nothing is known."}
    assert sum("nothing is known" in text for text in layer.texts["item"]) == 21


def test_two_users_and_few_items_are_enough(keys, tmp_path):
    root = write_dataset(tmp_path / "small", "tiny", n_users=2, n_items=20)
    done = run("GaCLLM", "tiny", config_dict={**keys, "data_path": str(root), "text_source": "raw"})
    assert done.record["test"]


def test_one_user_who_touched_every_item_ends_in_recboles_clear_error(keys, tmp_path):
    root = write_dataset(tmp_path / "small", "tiny", n_users=1, n_items=20)
    nearest = {"topk": [5], "valid_metric": "MRR@5"}
    with pytest.raises(ValueError, match="interacted with all items"):
        run("GaCLLM", "tiny", config_dict={**keys, **nearest, "data_path": str(root)})
