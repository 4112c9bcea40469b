"""The yaml files, their merging and the checks at the door."""

import dataclasses
import re

import pytest
import yaml

from recbole_gacllm.config import (
    GaCLLMConfig,
    check_keys,
    dataset_defaults,
    load_yaml,
    model_defaults,
    preset_names,
    shipped_path,
)
from recbole_gacllm.literals import literal

YAML = shipped_path("properties", "model", "GaCLLM.yaml")


def test_a_file_is_read_as_it_is_and_what_a_reader_changes_is_his_own(tmp_path):
    file = tmp_path / "keys.yaml"
    for value in (1, 2):
        file.write_text(f"a: {{b: [{value}]}}\n")
        for _ in range(2):
            keys = load_yaml(file)
            assert keys == {"a": {"b": [value]}}
            keys["a"]["b"].append("changed")


def test_yaml_keys_and_config_fields_are_equal():
    keys = set(yaml.safe_load(YAML.read_text()))
    assert keys == {field.name for field in dataclasses.fields(GaCLLMConfig)}


def test_every_key_of_the_yaml_has_a_comment_with_its_type():
    lines = [line for line in YAML.read_text().splitlines() if re.match(r"\w", line)]
    assert lines
    for line in lines:
        assert re.search(r"# \((int|float|bool|str|dict|str or list|str or int)\) .+\.$", line), (
            line
        )


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_valid_and_overrides_keys_of_ours_or_recboles(name):
    preset = yaml.safe_load(shipped_path("properties", "presets", f"{name}.yaml").read_text())
    defaults = yaml.safe_load(YAML.read_text())
    assert set(preset) <= {*defaults, "valid_metric", "learning_rate", "train_batch_size", "epochs"}
    assert GaCLLMConfig.from_mapping(model_defaults(name)).preset == name


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match=r"preset: 'qick' is not one of best, paper"):
        model_defaults("qick")


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("llm_modle", "did you mean .*llm_model"),
        ("sft_qqqqqq", "no near match"),
        ("align_wieght", "align_weight"),
        ("n_layer", "did you mean n_layers"),
    ],
)
def test_an_unknown_key_that_is_nearly_ours_is_refused_with_a_hint(key, hint):
    with pytest.raises(ValueError, match=f"unknown key '{key}': .*{hint}"):
        check_keys({key: 1})
    check_keys({key: 1}, others=[key])  # one of RecBole passes however near it is
    check_keys({"learning_rate": 1, "my_own_key": 2, "llm_model": "embedded"})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("loss_type", "CE", "'CE' is not allowed; it should be 'BPR' or 'SSM'"),
        ("embedding_size", 0, "0 is not allowed; it should be greater than or equal to 1"),
        ("embedding_size", 6.5, "6.5 is not allowed; it should be a valid integer"),
        ("embedding_size", True, "True is not allowed; it should be a valid integer"),
        ("text_dropout", 1.0, "1.0 is not allowed; it should be less than 1"),
        ("ssm_temperature", 0, "0 is not allowed; it should be .*or equal to 0.025"),
        ("align_weight", True, "True is not allowed; it should be a valid number"),
        ("sft", "maybe", "'maybe' is not allowed; it should be a valid boolean"),
        ("text_value_names", {"a": 1}, "{'a': 1} is not allowed; .* a valid dictionary or null"),
        ("text_import_file", "", "'' is not allowed; it should have at least 1 character or null"),
        ("sft_target_modules", 5, "5 is not .* a valid string or should be a valid list"),
        ("llm_api_key_variable", "sk-1", "what it holds is not .* the name of an environment"),
        ("llm_n_layers", 3, "3 is above n_layers: 2"),
    ],
)
def test_a_bad_value_is_refused_with_key_value_and_what_is_allowed(key, value, message):
    with pytest.raises(ValueError, match=f"^{key}: {message}") as error:
        GaCLLMConfig.from_mapping({**model_defaults(), key: value})
    assert "sk-1" not in str(error.value)


def test_an_int_passes_as_float_and_nothing_else_passes_as_another_type_or_is_missing():
    options = GaCLLMConfig.from_mapping({**model_defaults(), "align_weight": 1})
    assert type(options.align_weight) is float
    with pytest.raises(ValueError, match="key 'preset' is missing"):
        GaCLLMConfig.from_mapping({})
    with pytest.raises(ValueError, match="unknown_key"):
        GaCLLMConfig(**model_defaults(), unknown_key=1)


@pytest.mark.parametrize("dataset", ["ml-100k", "ml-1m"])
def test_dataset_configs_do_not_change_the_evaluation(dataset):
    config = dataset_defaults(dataset)
    assert config["load_col"]["inter"][:2] == ["user_id", "item_id"]
    assert not {"eval_args", "metrics", "topk", "valid_metric"} & set(config)
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
