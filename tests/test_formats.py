"""Which folders and files are read as models, and what is said of the others."""

import json

import pytest
import torch
from safetensors.torch import save_file

from recbole_gacllm.errors import WeightsError
from recbole_gacllm.llm import weights
from recbole_gacllm.llm.formats import weight_files
from recbole_gacllm.llm.weights import resolve_encoder, resolve_llm, resolve_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(folder, files):
    """A folder of files: JSON, or safetensors where the content is None."""
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            save_file({"a.weight": torch.zeros(4, 3)}, file)
        else:
            file.write_text(json.dumps(content))
    return folder


MODEL = {"config.json": {"model_type": "llama"}, "model.safetensors": None}
ENCODER = {
    "config.json": {"model_type": "bert", "activation_function": "gelu"},
    "model.safetensors": None,
    "modules.json": [
        {"path": "", "type": "sentence_transformers.models.Transformer"},
        {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    ],
    "1_Pooling/config.json": {},
    "2_Dense/config.json": {"activation_function": "torch.nn.modules.activation.Tanh"},
    "2_Dense/model.safetensors": None,
}
SHARDS = {"a.weight": "model-00001-of-00001.safetensors"}
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    "files",
    [
        MODEL,
        {**MODEL, "pytorch_model.bin": {}, "training_args.bin": {}, "original/x.pth": {}},
        {"config.json": {}, INDEX: {"weight_map": SHARDS}, SHARDS["a.weight"]: None},
        {**MODEL, "config.json": {"model_type": "llama", "auto_map": {"AutoConfig": "x.Y"}}},
    ],
    ids=["plain", "beside pickles", "sharded", "code that is not needed"],
)
def test_a_model_whose_weights_are_safetensors_is_taken(files, tmp_path):
    folder = write(tmp_path / "model", files)
    assert resolve_llm(str(folder)) == folder
    assert resolve_tokenizer(str(folder)) == folder


PICKLE = {"config.json": {}, "pytorch_model.bin": {}}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (PICKLE, r"llm_model='.*' cannot be used: its weights are pickles \(pytorch_model\.bin\)"),
        ({"config.json": {}, "model.pt": {}}, r"pickles \(model\.pt\), which can run code"),
        ({**PICKLE, "sub/model.safetensors": None}, r"pickles \(pytorch_model\.bin\)"),
        ({**PICKLE, "other.safetensors": None}, r"pickles \(pytorch_model\.bin\)"),
        ({"config.json": {}, "sub/model.safetensors": None}, "it holds no model.safetensors"),
        ({"model.safetensors": None}, "config.json is missing"),
        (
            {"config.json": {}, INDEX: {"weight_map": {"a": "pytorch_model.bin"}}},
            r"names 'pytorch_model\.bin'; allowed are safetensors files of the same folder",
        ),
        (
            {"config.json": {}, INDEX: {"weight_map": {"a": "../x.safetensors"}}},
            r"names '\.\./x\.safetensors'; allowed are",
        ),
        (
            {"config.json": {}, INDEX: {"weight_map": {"a": "b.safetensors"}}},
            r"b\.safetensors is missing, but .*index\.json names it",
        ),
        ({**MODEL, INDEX: {}, "config.json": []}, "config.json holds no JSON object"),
        ({"config.json": {}, INDEX: {"weight_map": [1]}}, "weight_map is no JSON object"),
        (
            {**MODEL, "config.json": {"model_type": "mine", "auto_map": {"AutoConfig": "x.Y"}}},
            r"type 'mine', which only its own code can load .*x\.Y.* is never run",
        ),
    ],
)
def test_a_model_that_may_not_be_read_is_refused(files, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        resolve_llm(str(write(tmp_path / "model", files)))


def test_an_adapter_as_the_model_is_told_where_it_belongs(tmp_path):
    files = {"adapter_config.json": {"base_model_name_or_path": "a/base"}}
    folder = write(tmp_path / "lora", {**files, "adapter_model.safetensors": None})
    for resolve in (resolve_llm, resolve_tokenizer):
        with pytest.raises(ValueError, match="is a LoRA adapter, not a model") as error:
            resolve(str(folder))
        assert (
            f"Set llm_adapter: {folder} and llm_model to the model it was trained on (a/base)"
            in (str(error.value))
        )


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_gguf_file_is_taken_by_its_name_or_its_folders(as_folder, tmp_path, monkeypatch):
    dequantised = []

    def dequantise(gguf, target, template):
        dequantised.append(gguf)
        write(target, MODEL)

    monkeypatch.setattr(weights, "dequantise", dequantise)
    file = write(tmp_path / "model", {"a.Q4_K_M.gguf": "GGUF"}) / "a.Q4_K_M.gguf"
    folder = resolve_llm(str(file.parent if as_folder else file))
    assert (folder / "model.safetensors").is_file()
    assert resolve_tokenizer(str(file)) == folder
    assert dequantised == [file]


@pytest.mark.parametrize(
    ("files", "chosen", "message"),
    [
        (["a.gguf", "b.gguf"], "", r"holds 2 \.gguf files \(a\.gguf, b\.gguf\); set llm_model to"),
        (
            ["a-00001-of-00002.gguf", "a-00002-of-00002.gguf"],
            "",
            r"split into parts .*llama-gguf-split --merge a-00001-of-00002\.gguf whole\.gguf",
        ),
        (["a-00001-of-00002.gguf"], "a-00001-of-00002.gguf", "split into parts"),
        (["model.safetensors"], "model.safetensors", r"is a file; allowed are .*Set llm_model: /"),
        (["pytorch_model.bin"], "pytorch_model.bin", "is a file; allowed are a folder with"),
    ],
)
def test_a_file_that_is_no_whole_model_is_told_what_to_do(files, chosen, message, tmp_path):
    folder = write(tmp_path / "model", dict.fromkeys(files, "GGUF"))
    with pytest.raises(ValueError, match=message):
        resolve_llm(str(folder / chosen))
    if chosen:
        with pytest.raises(ValueError, match=r"encoder_model='.*' cannot be used: it is a file"):
            resolve_encoder(str(folder / chosen))


ROUTER = {
    **ENCODER,
    "modules.json": [{"path": "r", "type": "sentence_transformers.models.Router"}],
    "r/query_0/model.safetensors": None,
}


@pytest.mark.parametrize(
    "files",
    [
        ENCODER,
        {name: content for name, content in ENCODER.items() if name != "modules.json"},
        {**ENCODER, "training_args.bin": {}, "checkpoint-5/pytorch_model.bin": {}},
        {
            **ROUTER,
            "r/router_config.json": {"types": {"query_0": "sentence_transformers.models.X"}},
        },
    ],
    ids=["modules", "plain", "beside pickles", "router"],
)
def test_an_encoder_of_sentence_transformers_own_parts_is_taken(files, tmp_path):
    folder = write(tmp_path / "encoder", files)
    assert resolve_encoder(str(folder)) == folder


def modules(*parts):
    return {**ENCODER, "modules.json": list(parts)}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            modules({"path": "", "type": "evil.Transformer"}),
            "modules.json names the class 'evil.Tr",
        ),
        (modules({"path": "", "type": "os.abort"}), "names the class 'os.abort'"),
        (modules({"path": ""}), "names the class None"),
        (modules("evil.Transformer"), "modules.json holds no list of modules"),
        (
            modules({"path": "../x", "type": "sentence_transformers.models.Dense"}),
            "lies outside its folder",
        ),
        (
            {**ENCODER, "2_Dense/config.json": {"activation_function": "evil.Act"}},
            "class 'evil.Act'",
        ),
        ({**ENCODER, "1_Pooling/config.json": {"tokenizer_class": "a.b.C"}}, "class 'a.b.C'"),
        (
            {**ROUTER, "r/router_config.json": {"types": {"q": "evil.X"}}},
            "names the class 'evil.X'",
        ),
        (
            {
                **ROUTER,
                "r/router_config.json": {"types": {"q": "sentence_transformers.models.Dense"}},
                "r/q/pytorch_model.bin": {},
            },
            r"its weights are pickles \(pytorch_model\.bin\)",
        ),
        (
            {
                **{name: c for name, c in ENCODER.items() if name != "2_Dense/model.safetensors"},
                "2_Dense/pytorch_model.bin": {},
                "2_Dense/other.safetensors": None,
            },
            r"its weights are pickles \(pytorch_model\.bin\)",
        ),
        ({**ENCODER, "adapter_config.json": {}}, "is an adapter; merge it beforehand"),
        (
            {**ENCODER, "config.json": {"model_type": "mine", "auto_map": {"AutoModel": "x.Y"}}},
            "which only its own code can load",
        ),
        ({"config.json": {}, "pytorch_model.bin": {}}, "its weights are pickles"),
        ({"model.safetensors": None}, "config.json is missing"),
    ],
)
def test_an_encoder_that_could_run_code_or_read_a_pickle_is_refused(files, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        resolve_encoder(str(write(tmp_path / "encoder", files)))


@pytest.mark.parametrize("size", [-1, 20, 0])
def test_a_truncated_part_of_an_encoder_is_found_by_its_header_and_named(tmp_path, size):
    file = write(tmp_path / "encoder", ENCODER) / "2_Dense" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(WeightsError, match=r"2_Dense/model\.safetensors is truncated or damaged"):
        resolve_encoder(str(tmp_path / "encoder"))


def test_the_single_file_is_taken_before_an_index(tmp_path):
    folder = write(tmp_path, {**MODEL, INDEX: {"weight_map": SHARDS}})
    assert weight_files(folder) == [folder / "model.safetensors"]
