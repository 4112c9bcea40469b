"""The yaml files, their merging and the checks at the door."""

import dataclasses
import re

import pytest
import yaml

from recbole_gacllm.config import (
    GaCLLMConfig,
    check_keys,
    dataset_defaults,
    literal,
    model_defaults,
    preset_names,
    shipped_path,
)

YAML = shipped_path("properties", "model", "GaCLLM.yaml")


def test_yaml_keys_and_config_fields_are_equal():
    keys = set(yaml.safe_load(YAML.read_text()))
    assert keys == {field.name for field in dataclasses.fields(GaCLLMConfig)}


def test_every_key_of_the_yaml_has_a_comment_with_its_type():
    lines = [line for line in YAML.read_text().splitlines() if re.match(r"\w", line)]
    assert lines
    for line in lines:
        assert re.search(r"# \((int|float|bool|str|dict|str or list)\) .+\.$", line), line


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_valid_and_overrides_keys_of_ours_or_recboles(name):
    preset = yaml.safe_load(shipped_path("properties", "presets", f"{name}.yaml").read_text())
    defaults = yaml.safe_load(YAML.read_text())
    assert set(preset) <= {*defaults, "valid_metric", "learning_rate", "train_batch_size", "epochs"}
    assert GaCLLMConfig.from_mapping(model_defaults(name)).preset == name


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match=r"preset: 'qick' is not one of best, paper, quick"):
        model_defaults("qick")


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("llm_modle", "llm_model"),
        ("sft_lr", "no near match|did you mean"),
        ("align_wieght", "align_weight"),
    ],
)
def test_an_unknown_key_with_our_prefix_is_refused_with_a_hint(key, hint):
    with pytest.raises(ValueError, match=hint):
        check_keys({key: 1})


def test_keys_of_recbole_pass_however_near_they_are():
    with pytest.raises(ValueError, match="did you mean n_layers"):
        check_keys({"n_layer": 2})
    check_keys({"n_layer": 2}, others=["n_layer"])


def test_keys_of_others_pass():
    check_keys({"learning_rate": 1, "my_own_key": 2, "llm_model": "embedded"})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("loss_type", "CE", "loss_type: 'CE' is not allowed; allowed: BPR, SSM"),
        ("embedding_size", 0, "embedding_size: 0 is not allowed; allowed: 1 or more"),
        ("embedding_size", 6.5, "embedding_size: 6.5 is a float; it must be int"),
        ("embedding_size", True, "embedding_size: True is a bool; it must be int"),
        ("text_dropout", 1.0, "text_dropout: 1.0 is not allowed; allowed: from 0 to below 1"),
        ("ssm_temperature", 0, "ssm_temperature: 0.0 is not allowed; allowed: 0.025 or more"),
        ("sft", "maybe", "sft: 'maybe' is a str; it must be bool"),
        ("text_value_names", [1], "text_value_names: \\[1\\] is a list; it must be dict or null"),
        ("llm_n_layers", 3, "llm_n_layers: 3 is above n_layers: 2"),
    ],
)
def test_a_bad_value_is_refused_with_key_value_and_what_is_allowed(key, value, message):
    with pytest.raises(ValueError, match=message):
        GaCLLMConfig.from_mapping({**model_defaults(), key: value})


def test_an_int_passes_as_float():
    assert GaCLLMConfig.from_mapping({**model_defaults(), "align_weight": 1}).align_weight == 1.0


@pytest.mark.parametrize("dataset", ["ml-100k", "ml-1m"])
def test_dataset_configs_do_not_change_the_evaluation(dataset):
    config = dataset_defaults(dataset)
    assert config["load_col"]["inter"][:2] == ["user_id", "item_id"]
    assert not {"eval_args", "metrics", "topk", "valid_metric"} & set(config)


def test_a_dataset_without_a_config_has_no_defaults():
    assert dataset_defaults("no-such-dataset") == {}


@pytest.mark.parametrize(
    "value", [1, -2.5e-3, "a 'word'", None, True, [1, ["x"]], (1, 2), {"k": {"n": [None]}}]
)
def test_a_literal_is_read_as_what_it_stands_for(value):
    assert literal(repr(value)) == value


@pytest.mark.parametrize("text", ["", "key", "1/0", "open('x')", "[i for i in 'a']", "[" * 9999])
def test_what_is_no_literal_is_refused(text):
    with pytest.raises(ValueError, match="is not a literal value"):
        literal(text)
