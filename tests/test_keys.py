"""Every key of ours, set to an odd value, is found where it acts."""

from __future__ import annotations

import dataclasses
import inspect
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recbole_gacllm import inputs, pipeline, stage
from recbole_gacllm import model as model_module
from recbole_gacllm.config import GaCLLMConfig, model_defaults, shipped_path
from recbole_gacllm.convolution import requests, setup
from recbole_gacllm.convolution.graph import TrainGraph
from recbole_gacllm.convolution.layers import Layer
from recbole_gacllm.sft import finetune, processes, trainer

from .conftest import job_of, our_keys
from .random_texts import random_texts
from .recommender import Recommender
from .test_sft import make_model

# No two alike, so that none can stand in another's place.
ODD: dict[str, Any] = {
    "sft_n_pairs": 3,
    "sft_n_heldout": 2,
    "sft_epochs": 5,
    "sft_batch_size": 6,
    "sft_accumulation_steps": 7,
    "sft_learning_rate": 0.0123,
    "sft_lora_rank": 8,
    "sft_lora_alpha": 9,
    "sft_lora_dropout": 0.21,
    "sft_target_modules": ["q_proj"],
    "sft_checkpoint_steps": 34,
    "sft_max_tokens": 111,
    "llm_dtype": "float32",
    "neighbor_rule": "random",
    "n_neighbors": 12,
    "llm_knowledge_tokens": 10,
    "llm_n_layers": 2,
    "n_layers": 4,
    "llm_max_prompt_tokens": 1313,
    "llm_max_neighbor_tokens": 14,
    "llm_max_new_tokens": 15,
    "llm_temperature": 0.31,
    "llm_repetition_penalty": 1.17,
    "llm_tensor_parallel_size": 16,
    "llm_pipeline_parallel_size": 17,
    "llm_gpu_memory_utilization": 0.41,
    "llm_endpoint_concurrency": 18,
    "llm_api_key_variable": "ODD_KEY",
    "encoder_dtype": "float16",
    "encoder_batch_size": 19,
    "encoder_prompt": "odd: ",
    "text_user_template": "Odd user {age}.",
    "text_item_template": "Odd item {class}.",
    "text_user_noun": "oddling",
    "text_item_noun": "oddity",
    "text_value_names": {"class": {"Drama": "odd drama"}},
    "text_max_chars": 201,
    "text_allow_ids": True,
    "text_item_name_field": "class",
    "embedding_size": 20,
    "text_hidden_size": 21,
    "text_dropout": 0.22,
    "text_weight": 0.23,
    "align_weight": 0.24,
    "align_n_nodes": 11,
    "align_temperature": 0.26,
    "reg_weight": 0.027,
    "require_pow": True,
    "ssm_n_negatives": 13,
    "ssm_temperature": 0.28,
    "linear_weight": 0.29,
    "linear_reg_weight": 30.0,
    "linear_text_weight": 0.32,
    "linear_recency": 0.33,
    "propagate_every": 3,
}
#: Keys that choose a way rather than a number: other tests take each way.
WAYS = {
    *("preset", "use_text", "loss_type", "text_source", "text_layers", "text_fusion"),
    "few_interactions",
    *("text_import_file", "llm_model", "llm_backend", "llm_endpoints"),
    *("llm_served_model", "llm_adapter", "llm_merge_adapter", "llm_prompts_dir"),
    *("sft", "encoder_model", "train_share", "cold_item_share", "known_users_only"),
    "mask_history",
    *("cold_user_share", "text_users"),
    *("text_init", "text_init_frozen", "text_init_reduction"),
    *("fast_paths", "n_threads", "artifact_dir"),
}


class HeardError(Exception):
    """Enough was heard."""


@pytest.fixture
def hear(monkeypatch):
    """Replaces a function by one that notes its arguments by name, and goes on or stops."""

    def put(place: Any, name: str, goes_on: bool = True) -> dict[str, Any]:
        function, arguments = getattr(place, name), {}
        signature = inspect.signature(function)

        def noting(*args: Any, **keys: Any) -> Any:
            bound = signature.bind(*args, **keys)
            bound.apply_defaults()
            for one, value in bound.arguments.items():
                is_rest = signature.parameters[one].kind is inspect.Parameter.VAR_KEYWORD
                arguments.update(value if is_rest else {one: value})
            if not goes_on:
                raise HeardError
            return function(*args, **keys)

        monkeypatch.setattr(place, name, noting)
        return arguments

    return put


def odd(*names: str) -> dict[str, Any]:
    return {name: ODD[name] for name in names}


def check_odd(**values: Any) -> None:
    """What acts is the odd value of each of these keys."""
    assert values == odd(*values)


@pytest.fixture
def job(tmp_path):
    """A job of odd keys on four users and items, with a tiny model."""
    tokens = {side: ["1", "2", "3", "4"] for side in ("user", "item")}
    Layer.raw(tokens, {side: ["odd"] * 4 for side in tokens}).write(tmp_path / "layer_0.parquet")
    names, ends = np.array(["1", "2", "3", "4"]), np.arange(4)
    users, items = np.repeat(ends, 4), np.tile(ends, 4)
    TrainGraph(names, names, users, items, None).save(tmp_path / "graph.npz")
    keys = {"model_dir": make_model(tmp_path / "model"), "options": our_keys(**ODD)}
    return job_of("odd", tmp_path, seed=77, generator_key={}, model_name="odd one", **keys)


def test_fine_tuning(job, hear, tmp_path):
    called = hear(processes, "finetune_on_all_cards", goes_on=False)
    with pytest.raises(HeardError):
        stage.sft(tmp_path, job)
    # Each edge in both directions.
    check_odd(sft_n_pairs=len(called["pairs"]) / 2, sft_n_heldout=len(called["heldout"]) / 2)
    assert (called["options"], called["seed"]) == (job.options, 77)
    assert called["model_name"] == "odd one"
    arguments = trainer.training_arguments(tmp_path, job.options, 77)
    lora = finetune._lora_config(job.model_dir, job.options)
    length, loaded = hear(finetune, "encode_pairs"), hear(finetune, "_load", goes_on=False)
    with pytest.raises(HeardError):
        finetune.finetune(
            *(job.model_dir, called["pairs"], [], tmp_path / "out"),
            dataclasses.replace(job.options, sft_max_tokens=4000),
            seed=77,
        )
    assert length["max_tokens"] == 4000
    check_odd(
        sft_epochs=arguments.num_train_epochs,
        sft_batch_size=arguments.per_device_train_batch_size,
        sft_accumulation_steps=arguments.gradient_accumulation_steps,
        sft_learning_rate=arguments.learning_rate,
        sft_checkpoint_steps=arguments.save_steps,
        sft_lora_rank=lora.r,
        sft_lora_alpha=lora.lora_alpha,
        sft_lora_dropout=lora.lora_dropout,
        sft_target_modules=sorted({name.rpartition(".")[2] for name in lora.target_modules}),
        llm_dtype=loaded["dtype"],
    )
    assert arguments.seed == 77


def test_generation(job, hear):
    chosen, opened = hear(requests, "select_neighbors"), hear(setup, "open_generator", False)
    graph, _ = setup.inputs_of(job)
    convolution = setup.convolution_of(job, graph, None, "vllm")
    with pytest.raises(HeardError):
        convolution.open_generator()
    maker = convolution.maker
    chat = ({"role": "user", "content": "x"},)
    knowledge, sampling = (maker.request(chat, number).sampling for number in (1, 2))
    pieces = requests._Pieces(["a"], maker.tokenizer, maker._max_neighbor_tokens)
    check_odd(
        neighbor_rule=chosen["rule"],
        n_neighbors=chosen["n_neighbors"],
        llm_max_prompt_tokens=opened["max_model_len"] - 15 - 64,
        llm_max_neighbor_tokens=pieces._max_tokens,
        llm_knowledge_tokens=knowledge.max_new_tokens,
        llm_max_new_tokens=sampling.max_new_tokens,
        llm_temperature=sampling.temperature,
        llm_repetition_penalty=sampling.repetition_penalty,
        llm_dtype=opened["dtype"],
        llm_tensor_parallel_size=opened["tensor_parallel_size"],
        llm_pipeline_parallel_size=opened["pipeline_parallel_size"],
        llm_gpu_memory_utilization=opened["gpu_memory_utilization"],
    )
    assert (opened["seed"], chosen["seed"]) == (77, 77)


def test_servers(job, hear):
    opened = hear(setup, "open_generator", goes_on=False)
    graph, _ = setup.inputs_of(job)
    server = dataclasses.replace(job, served_model="odd-model")
    with pytest.raises(HeardError):
        setup.convolution_of(server, graph, None, "server").open_generator()
    check_odd(
        llm_endpoint_concurrency=opened["concurrency"],
        llm_api_key_variable=opened["key_variable"],
    )
    assert opened["served_model"] == "odd-model"


def test_the_layers_and_the_number_of_prompts_files(tmp_path):
    shutil.copytree(shipped_path("properties", "prompts"), tmp_path / "prompts")
    hook = object.__new__(pipeline._Hook)
    options = our_keys(**ODD, text_import_file="odd.csv")
    hook._options = options
    hook._data = type("Data", (), {"seed": 77, "show_progress": False})
    hook.inputs = tmp_path
    imported = type(
        "Imported", (), {"layers": {1: {}, 2: {}, 3: {}}, "digest": lambda self: "odd"}
    )()
    made = hook._descriptions(None, imported)
    assert made.outputs == ("layer_1.parquet", "layer_2.parquet", "layer_3.parquet")
    assert made.key["n_layers"] == ODD["llm_n_layers"]
    assert made.key["knowledge_tokens"] == ODD["llm_knowledge_tokens"]
    hook._options = dataclasses.replace(options, llm_knowledge_tokens=0)
    without = hook._descriptions(None, imported)
    assert without.outputs == ("layer_1.parquet", "layer_2.parquet")
    assert without.key == {k: v for k, v in made.key.items() if k != "knowledge_tokens"}


def test_encoding(job, hear, tmp_path):
    from recbole_gacllm.alignment import encoder

    called = hear(encoder, "TextEncoder", goes_on=False)
    with pytest.raises(HeardError):
        stage.embeddings(tmp_path, dataclasses.replace(job, encoder_dir=tmp_path / "odd"))
    check_odd(
        encoder_dtype=called["dtype"],
        encoder_batch_size=called["batch_size"],
        encoder_prompt=called["prompt"],
    )


def test_texts_of_layer_0(settings, hear, monkeypatch):
    from recbole_gacllm.run_config import training_data

    texts = {key: value for key, value in ODD.items() if key.startswith("text_")}
    model_keys = ("text_hidden_size", "text_dropout", "text_weight")
    keys = {key: value for key, value in texts.items() if key not in model_keys}
    options, data = training_data("tiny", config_dict={**settings, **keys})
    calls = []
    render = inputs.text.render_descriptions
    names = inspect.signature(render).parameters

    def noting(*args, **more):
        calls.append(dict(zip(names, args, strict=False)) | more)
        return render(*args, **more)

    monkeypatch.setattr(inputs.text, "render_descriptions", noting)
    named = hear(inputs, "item_names")
    inputs.raw_descriptions(options, data)
    user, item = calls
    assert {
        "text_user_template": user["template"],
        "text_item_template": item["template"],
        "text_user_noun": user["noun"],
        "text_item_noun": item["noun"],
        "text_value_names": item["value_names"],
        "text_max_chars": user["max_chars"],
        "text_allow_ids": item["allow_ids"],
        "text_item_name_field": named["field"],
    } == keys


def test_the_model(settings, hear, monkeypatch):
    monkeypatch.setattr(model_module, "prepare", random_texts)
    names = (
        *("embedding_size", "text_hidden_size", "text_dropout", "text_weight", "n_layers"),
        *("align_weight", "align_n_nodes", "align_temperature", "reg_weight", "require_pow"),
        *("ssm_n_negatives", "ssm_temperature", "linear_weight", "linear_reg_weight"),
        *("linear_text_weight", "linear_recency", "propagate_every"),
    )
    projection = hear(model_module, "text_projection")
    linear, recency = hear(model_module, "ItemItemModel"), hear(model_module, "recency_weights")
    fused, periodic = hear(model_module, "fuse"), hear(model_module, "PeriodicPropagation")
    softmax, aligned = (hear(model_module.losses, n) for n in ("sampled_softmax", "alignment"))
    norms = hear(model_module.losses, "embedding_l2")
    eval_args = {"order": "TO", "split": {"LS": "valid_and_test"}, "group_by": "user"}
    keys = {**odd(*names), "loss_type": "SSM", "eval_args": eval_args}
    made = Recommender("GaCLLM", settings, **keys)
    model = made.model
    model.calculate_loss(made.batch)
    weights = ("align_weight", "reg_weight", "linear_weight")
    assert {
        **{name: getattr(model.options, name) for name in weights},
        "embedding_size": model.user_embedding.weight.shape[1],
        "text_hidden_size": projection["hidden"],
        "text_dropout": projection["dropout"],
        "text_weight": fused["text_weight"],
        "n_layers": periodic["n_layers"],
        "propagate_every": periodic["every"],
        "align_n_nodes": len(aligned["ids"]),
        "align_temperature": aligned["temperature"],
        "require_pow": norms["squared"],
        "ssm_n_negatives": len(softmax["negatives"]),
        "ssm_temperature": softmax["temperature"],
        "linear_reg_weight": linear["reg_weight"],
        "linear_text_weight": linear["text_weight"],
        "linear_recency": recency["power"],
    } == odd(*names)


def test_every_key_is_set_here_or_chooses_a_way_that_a_test_takes():
    assert set(ODD) | WAYS == {field.name for field in dataclasses.fields(GaCLLMConfig)}
    assert not set(ODD) & WAYS
    defaults = model_defaults()
    assert not [key for key, value in ODD.items() if defaults[key] == value]
    tests = [file for file in Path(__file__).parent.glob("test_*.py") if file != Path(__file__)]
    words = set(re.findall(r"\w+", "".join(file.read_text("utf-8") for file in tests)))
    assert words >= WAYS
