import json
import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from recbole_gacllm.alignment import encoder as encoder_module
from recbole_gacllm.alignment.encoder import TextEncoder
from recbole_gacllm.errors import GaCLLMError, WeightsError
from recbole_gacllm.llm.weights import resolve_encoder

TEXTS = [
    "This person enjoys romantic comedies with happy endings.",
    "She loves light-hearted love stories that end well.",
    "A documentary about the construction of steel bridges.",
    " \n",
    "This person enjoys romantic comedies with happy endings.",
    "",
    "War.",
]
VISIBLE = [0, 1, 2, 4, 6]


@pytest.fixture(scope="module")
def model_dir():
    return resolve_encoder("embedded")


@pytest.fixture(scope="module")
def encoder(model_dir):
    return TextEncoder(model_dir, "float32", 4, "cpu")


@pytest.fixture
def out_file(tmp_path):
    return tmp_path / "layer_0.npy"


@pytest.fixture
def copied(model_dir, tmp_path):
    return Path(shutil.copytree(model_dir, tmp_path / "copied"))


@pytest.fixture
def tiny_encoder(copied):
    """A sentence-transformers folder of a random model, 16 wide, with mean pooling."""
    from transformers import BertConfig, BertModel

    save_random(copied, BertConfig, BertModel)
    edit(copied / "1_Pooling" / "config.json", remove="pooling_mode", word_embedding_dimension=16)
    return copied


def save_random(folder, config_class, model_class):
    torch.manual_seed(0)
    config = config_class(
        vocab_size=30522,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        initializer_range=0.5,
    )
    model_class(config).eval().save_pretrained(folder)


def edit(file, remove="\0", **changes):
    """Change keys of a JSON file; those that begin with ``remove`` go first."""
    values = json.loads(file.read_text())
    others = {key: value for key, value in values.items() if not key.startswith(remove)}
    file.write_text(json.dumps(others | changes))


def token_vectors(folder, text):
    """The transformer's output for one text: [n_tokens, width]."""
    from transformers import AutoModel, AutoTokenizer

    inputs = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    with torch.inference_mode():
        output = AutoModel.from_pretrained(folder).eval()(**inputs).last_hidden_state
    return output[0].numpy().copy()


def encode(encoder, file, texts=TEXTS):
    if isinstance(encoder, Path):
        encoder = TextEncoder(encoder, "float32", 4, "cpu")
    encoder.encode_to_file(texts, file)
    vectors = np.load(file)
    assert vectors.dtype == np.float16
    return vectors.astype(np.float32)


def test_vectors_are_those_of_sentence_transformers_at_unit_length(encoder, model_dir, out_file):
    # After recbole_gacllm, which hides what sentence-transformers cannot import here.
    from sentence_transformers import SentenceTransformer

    expected = SentenceTransformer(str(model_dir), device="cpu").encode(
        TEXTS, normalize_embeddings=True
    )
    expected[[3, 5]] = 0  # no text
    np.testing.assert_allclose(encode(encoder, out_file), expected, atol=1e-3)
    stats = encoder.encode_to_file(TEXTS, out_file)
    assert (stats.n_texts, stats.n_unique, stats.n_empty, stats.dim) == (7, 4, 2, 384)
    assert encoder.dim == 384
    assert encoder.encode_to_file(["", " "], out_file).n_empty == 2
    assert not np.load(out_file).any()


def test_bfloat16_agrees_with_float32(encoder, model_dir, out_file):
    exact = encode(encoder, out_file)
    rounded = encode(TextEncoder(model_dir, "bfloat16", 4, "cpu"), out_file)
    assert ((exact * rounded).sum(1)[VISIBLE] > 0.995).all()
    assert (exact != rounded).any()


def test_identical_texts_are_encoded_once(encoder, out_file, monkeypatch):
    encoded = []
    encode = TextEncoder._encode
    monkeypatch.setattr(
        TextEncoder, "_encode", lambda self, texts: encoded.extend(texts) or encode(self, texts)
    )
    encoder.encode_to_file(TEXTS, out_file)
    assert sorted(encoded) == sorted({text for text in TEXTS if text.strip()})
    vectors = np.load(out_file)
    np.testing.assert_array_equal(vectors[0], vectors[4])


def test_a_batch_holds_texts_of_like_numbers_of_tokens(encoder, out_file, monkeypatch):
    few = [f"{word} international understanding" for word in ("Yesterday", "Tomorrow", "Forever")]
    many = [f"{letter} b c d e f g h" for letter in "xyz"]
    assert min(map(len, few)) > max(map(len, many))
    batches = []
    encode = encoder._model.encode
    monkeypatch.setattr(
        encoder._model,
        "encode",
        lambda texts, **keys: batches.append(set(texts)) or encode(texts, **keys),
    )
    monkeypatch.setattr(encoder, "batch_size", 3)
    encoder.encode_to_file([*few, *many], out_file)
    assert batches == [set(many), set(few)]


@pytest.mark.parametrize("value", [np.nan, 0.0])
def test_a_bad_row_names_its_text_and_the_next_attempt_starts_anew(
    encoder, out_file, monkeypatch, value
):
    plain = TextEncoder._encode

    def spoiled(self, texts):
        vectors = plain(self, texts)
        vectors[texts.index(TEXTS[1])] = value
        return vectors

    with monkeypatch.context() as patch:
        patch.setattr(TextEncoder, "_encode", spoiled)
        with pytest.raises(GaCLLMError, match=r"NaN or zero for text 1 of .*dtype: float32"):
            encode(encoder, out_file)
    assert not out_file.exists()
    whole = encode(encoder, out_file)
    assert np.array_equal(whole, encode(encoder, out_file.with_name("whole.npy")))
    assert not list(out_file.parent.glob("*.partial"))


def test_a_folder_that_cannot_be_written_is_named(encoder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(GaCLLMError, match=r"cannot write \S+file.layer_0\.npy: .*artifact_dir"):
        encoder.encode_to_file(TEXTS, tmp_path / "file" / "layer_0.npy")


def test_a_full_disk_is_an_error_before_anything_is_encoded(encoder, out_file, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(encoder_module.os, "posix_fallocate", full)
    monkeypatch.setattr(TextEncoder, "_encode", None)
    with pytest.raises(GaCLLMError, match=r"cannot write \S+: .*No space left on device"):
        encoder.encode_to_file(TEXTS, out_file)


def test_a_plain_hugging_face_folder_gets_mean_pooling(encoder, copied, out_file):
    shutil.rmtree(copied / "1_Pooling")
    for file in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
        (copied / file).unlink()
    np.testing.assert_allclose(encode(encoder, out_file), encode(copied, out_file), atol=1e-3)


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
@pytest.mark.parametrize("kind", ["encoder", "decoder padded on the left"])
def test_pooling_is_what_the_folder_states(tiny_encoder, out_file, pooling, kind):
    edit(tiny_encoder / "1_Pooling" / "config.json", pooling_mode=pooling)
    if kind != "encoder":
        from transformers import LlamaConfig, LlamaModel

        save_random(tiny_encoder, LlamaConfig, LlamaModel)
        edit(tiny_encoder / "tokenizer_config.json", padding_side="left")
    vectors = encode(tiny_encoder, out_file)
    for row in VISIBLE:
        tokens = token_vectors(tiny_encoder, TEXTS[row])  # [n_tokens, 16], nothing is padded
        expected = {"mean": tokens.mean(0), "cls": tokens[0], "lasttoken": tokens[-1]}[pooling]
        np.testing.assert_allclose(vectors[row], expected / np.linalg.norm(expected), atol=2e-3)


@pytest.mark.parametrize(
    ("default", "asked", "before"),
    [
        (None, None, ""),
        (None, "query", "search this: "),
        (None, "Instruct: what is it? ", "Instruct: what is it? "),
        ("query", None, "search this: "),
        ("query", "passage", "found: "),
        ("query", "", ""),
    ],
)
def test_the_prompt_that_an_encoder_needs_goes_before_each_text_and_an_unused_one_is_told(
    tiny_encoder, out_file, caplog, default, asked, before
):
    texts = [TEXTS[row] for row in VISIBLE]
    bare = encode(tiny_encoder, out_file, [before + text for text in texts])
    edit(
        tiny_encoder / "config_sentence_transformers.json",
        prompts={"query": "search this: ", "passage": "found: ", "document": ""},
        default_prompt_name=default,
    )
    caplog.set_level(logging.INFO)
    encoder = TextEncoder(tiny_encoder, "float32", 4, "cpu", prompt=asked)
    np.testing.assert_allclose(encode(encoder, out_file, texts), bare, atol=2e-3)
    told = re.search(r"encoder_prompt: none is set; .* has the prompts query, passage", caplog.text)
    assert (told is not None) == (default is None and asked is None)


def test_a_folder_without_safetensors_is_refused(copied):
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"encoder_model: .*cannot be loaded"):
        TextEncoder(copied, "float32", 4, "cpu")


def test_code_of_a_model_folder_is_not_run(copied, tmp_path):
    modules = json.loads((copied / "modules.json").read_text())
    modules[0]["type"] = "evil.Transformer"
    (copied / "modules.json").write_text(json.dumps(modules))
    (copied / "evil.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nclass Transformer: ...")
    with pytest.raises(WeightsError, match="without code of its own"):
        TextEncoder(copied, "float32", 4, "cpu")
    assert not (tmp_path / "run").exists()


def test_progress_is_shown_only_on_request(encoder, out_file, capfd, caplog):
    caplog.set_level(logging.INFO)  # at which sentence-transformers shows a bar by itself
    encoder.encode_to_file(TEXTS, out_file)
    assert "Batches" not in capfd.readouterr().err
    encoder.encode_to_file(TEXTS, out_file, show_progress=True)
    assert "4/4" in capfd.readouterr().err
