"""The knowledge step: layer 1 from each node's own text alone, the convolution above it."""

import contextlib
import shutil
from pathlib import Path

import pandas as pd
import pytest

from recbole_gacllm import model as model_module
from recbole_gacllm import pipeline
from recbole_gacllm.alignment.embeddings import TextLayers
from recbole_gacllm.artifacts import manifests
from recbole_gacllm.cli.main import main
from recbole_gacllm.compare.identity import concerns_of
from recbole_gacllm.config import shipped_path
from recbole_gacllm.convolution.cleaning import CLEANING_VERSION
from recbole_gacllm.convolution.layers import SIDES, Layer
from recbole_gacllm.convolution.prompts import PromptTemplates
from recbole_gacllm.convolution.requests import RETRY_TEMPERATURE, RequestMaker
from recbole_gacllm.convolution.setup import templates_of
from recbole_gacllm.inspection.quality import layer_qualities
from recbole_gacllm.inspection.reading import RunDescriptions
from recbole_gacllm.run_config import build_config, training_data

from .conftest import our_keys, run_stage, tiny_settings, write_dataset
from .random_texts import random_texts
from .recommender import Recommender
from .test_convolution import NOTHING, WordTokenizer, graph_of, raw_layer
from .test_pipeline import TINY

SHIPPED = shipped_path("properties", "prompts")
CHAT = ({"role": "user", "content": "Describe it."},)


def maker_of(n_tokens, **keys):
    options = our_keys(
        llm_knowledge_tokens=n_tokens,
        llm_max_new_tokens=30,
        text_user_noun="person",
        text_item_noun="film",
        **keys,
    )
    return RequestMaker(
        graph_of(), templates_of(options), WordTokenizer(), {"model": "fake"}, options, 2020
    )


def contents(maker, below, number):
    """Node -> the question that is asked of it."""
    prompts = maker.prompts(below, NOTHING, number)
    return {f"{side} {node}": chat[1]["content"] for side, node, chat in prompts if chat}


def test_the_knowledge_layer_reads_the_own_text_alone_and_all_nodes_alike():
    below, wordings = raw_layer(graph_of()), set()
    for name, question in contents(maker_of(80), below, 1).items():
        side, node = name.split()
        own = below.texts[side][int(node)]
        assert question.count(own) == 1
        assert not any(text in question for s in SIDES for text in below.texts[s] if text != own)
        wordings.add((side, question.replace(own, "")))
    assert len(wordings) == 2  # one a side, however many neighbours


def test_the_convolution_above_it_has_the_words_and_neighbours_that_it_has_without():
    below, plain, above = raw_layer(graph_of()), maker_of(0), maker_of(80)
    for number in (1, 2):
        assert contents(above, below, number + 1) == contents(plain, below, number)
    assert contents(above, below, 2) != contents(above, below, 3)


def test_its_texts_have_a_limit_of_their_own_in_both_attempts_and_in_the_address():
    maker = maker_of(80)
    limits = {number: maker.request(CHAT, number).sampling.max_new_tokens for number in (1, 2, 3)}
    assert limits == {1: 80, 2: 30, 3: 30}
    first = maker.request(CHAT, 1)
    assert maker.retry_of(first).sampling.max_new_tokens == 80
    assert maker.retry_of(first).sampling.temperature == RETRY_TEMPERATURE
    assert first.id != maker.request(CHAT, 2).id
    assert first.id != maker_of(81).request(CHAT, 1).id


def test_a_node_of_which_nothing_is_known_is_not_asked_about():
    below = raw_layer(graph_of())
    below.texts["item"][3] = NOTHING["item"]
    assert "item 3" not in contents(maker_of(80), below, 1)
    assert "item 3" in contents(maker_of(80), below, 2)  # it has neighbours


def test_without_the_step_every_address_is_what_it_was():
    maker = maker_of(0)
    templates = PromptTemplates.load(SHIPPED, "person", "film")
    assert not [name for name in templates.texts if "knowledge" in name]
    sampling = {"max_new_tokens": 30, "temperature": 0.0, "repetition_penalty": 1.05, "seed": 0}
    address = {
        "generator": {"model": "fake"},
        "prompts": templates.version(),
        "cleaning": CLEANING_VERSION,
        "sampling": sampling,
        "messages": CHAT,
    }
    assert maker.request(CHAT, 1).id == manifests.fingerprint(address)
    drawn = manifests.fingerprint({**address, "cleaning": 5})
    assert maker.request(CHAT, 1).sampling.seed == int(drawn[:8], 16)
    assert maker.retry_of(maker.request(CHAT, 1)).sampling.seed == int(drawn[8:16], 16)


def test_a_folder_of_own_prompts_needs_the_new_files_only_for_the_step(tmp_path):
    shutil.copytree(SHIPPED, tmp_path / "prompts")
    (tmp_path / "prompts" / "item_knowledge.txt").unlink()
    templates_of(our_keys(llm_prompts_dir=str(tmp_path / "prompts")))
    with pytest.raises(ValueError, match=r"prompt file .*item_knowledge.txt is missing"):
        templates_of(our_keys(llm_prompts_dir=str(tmp_path / "prompts"), llm_knowledge_tokens=9))


def test_knowledge_alone_is_described_and_counts_as_generated(settings):
    assert our_keys(llm_n_layers=0, llm_knowledge_tokens=9).n_text_layers == 1
    assert our_keys(llm_n_layers=2, llm_knowledge_tokens=9).n_text_layers == 3
    for tokens, is_generated in ((0, False), (9, True)):
        keys = {"llm_n_layers": 0, "llm_knowledge_tokens": tokens}
        assert our_keys(**keys).is_described == is_generated
        config = build_config("GaCLLM", "tiny", config_dict={**settings, **keys})
        assert ("llm" in concerns_of(config.final_config_dict)) == is_generated


@pytest.mark.parametrize("n_layers", [0, 1])
def test_a_run_may_have_more_layers_of_texts_than_hops(settings, monkeypatch, n_layers):
    def prepare(options, data):
        texts = random_texts(options, data)
        tables = [texts.tables[0]] * (options.n_text_layers + 1)
        return TextLayers(tables, texts.row_of_node, {})

    monkeypatch.setattr(model_module, "prepare", prepare)
    keys = {"n_layers": n_layers, "llm_n_layers": n_layers, "llm_knowledge_tokens": 9}
    made = Recommender("GaCLLM", settings, text_weight=1.0, align_weight=1.0, **keys)
    assert len(made.model.texts) == n_layers + 2
    assert made.model.calculate_loss(made.batch).isfinite()


def describe(keys):
    """The folder of a run's descriptions, made without a child process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recbole_gacllm.artifacts.children.run_child", run_stage)
        return pipeline.describe(*training_data("tiny", config_dict=dict(keys)))


@pytest.fixture(scope="module")
def described(tmp_path_factory, tiny_model):
    """A run with two layers of convolution above the knowledge step, and its knowledge alone."""
    root = tmp_path_factory.mktemp("knowledge")
    keys = {
        **tiny_settings(write_dataset(root / "data"), root),
        **{**TINY, "llm_model": str(tiny_model), "sft": False},
        **{"llm_n_layers": 2, "llm_knowledge_tokens": 16},
    }
    with contextlib.chdir(root):
        return keys, describe(keys), describe({**keys, "llm_n_layers": 0})


@pytest.mark.slow
def test_its_texts_are_asked_for_once_whatever_stands_above_them(described):
    _, whole, alone = described
    layers = manifests.read_manifest(whole)["layers"]
    assert [layer["kind"] for layer in layers] == ["knowledge", "convolution", "convolution"]
    (again,) = manifests.read_manifest(alone)["layers"]
    assert (again["kind"], again["n_generated"]) == ("knowledge", 0)
    assert again["n_from_store"] + again["n_duplicates"] == again["n_nodes"]
    files = (folder / "layer_1.parquet" for folder in (whole, alone))
    assert len({Layer.read(file).digest() for file in files}) == 1


@pytest.mark.slow
def test_it_is_told_by_name_in_export_describe_and_audit(described, tmp_path, capsys):
    keys, whole, _ = described
    dirs = ["--dataset=tiny", f"--artifact_dir={keys['artifact_dir']}"]
    # The newest one is the knowledge alone.
    main(["export-descriptions", *dirs, f"--output={tmp_path / 'texts.parquet'}"])
    kinds = pd.read_parquet(tmp_path / "texts.parquet").groupby("layer")["kind"].unique()
    assert kinds.map(list).to_dict() == {0: ["raw"], 1: ["knowledge"]}
    main(["describe", *dirs, "--item=i1"])
    main(["audit", str(whole)])
    told = capsys.readouterr().out
    assert "layer 1, knowledge (" in told
    assert "neighbours in its prompts" not in told.partition("layer 2")[0]
    assert "\nlayer 1, knowledge\n" in told
    assert "\nlayer 2\n" in told
    first, second, _ = layer_qualities(RunDescriptions(whole), 10, 0)
    for layer, shows_neighbors in ((first, False), (second, True)):
        samples = [sample for side in layer.sides.values() for sample in side.samples]
        assert any(sample.n_neighbors for sample in samples) == shows_neighbors


@pytest.mark.slow
def test_an_export_fills_the_same_layers_without_an_llm(described, tmp_path):
    keys, whole, _ = described
    file = tmp_path / "texts.parquet"
    RunDescriptions(whole).frame().to_parquet(file)
    filled = {**keys, "text_import_file": str(file), "llm_model": "/no/such/model"}
    folder = describe(filled)
    manifest = manifests.read_manifest(folder)
    assert [layer["kind"] for layer in manifest["layers"]] == [
        *("knowledge", "convolution", "convolution")
    ]
    assert all(layer["n_missing"] == 0 for layer in manifest["layers"])
    for number in (1, 2, 3):
        files = (Path(f) / f"layer_{number}.parquet" for f in (whole, folder))
        assert len({Layer.read(file).digest() for file in files}) == 1
