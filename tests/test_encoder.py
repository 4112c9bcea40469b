import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
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

MANY_TEXTS = [f"text {n % 20} " * (1 + n % 7) for n in range(30)] + [""]

# Encodes the texts of sys.argv[3] in chunks of 4 and dies with 2 of them
# in the journal and 3 in the file.
WORKER = """
import json, os, signal, sys
from pathlib import Path
from recbole_gacllm.alignment import encoder

encoder._BATCHES_A_CHUNK = 2
advance = encoder._Attempt.advance

def advance_or_die(self, vectors, n_done):
    if n_done > 8:
        vectors.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    advance(self, vectors, n_done)

encoder._Attempt.advance = advance_or_die
encoder.TextEncoder(Path(sys.argv[1]), "float32", 2, "cpu").encode_to_file(
    json.loads(sys.argv[3]), Path(sys.argv[2])
)
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model_dir() -> Path:
    return resolve_encoder("embedded")


@pytest.fixture(scope="module")
def encoder(model_dir: Path) -> TextEncoder:
    return TextEncoder(model_dir, "float32", 4, "cpu")


@pytest.fixture
def out_file(tmp_path: Path) -> Path:
    return tmp_path / "layer_0.npy"


@pytest.fixture
def tiny_encoder(model_dir: Path, tmp_path: Path) -> Path:
    """A sentence-transformers folder of a random model, 16 wide, with mean pooling."""
    from transformers import BertConfig, BertModel

    folder = tmp_path / "tiny"
    shutil.copytree(model_dir, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        initializer_range=0.5,
    )
    BertModel(config).eval().save_pretrained(folder)
    edit(folder / "1_Pooling" / "config.json", remove="pooling_mode", word_embedding_dimension=16)
    return folder


def replace_by_decoder(folder: Path) -> None:
    """Random weights of a decoder in the place of an encoder's."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30522,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        initializer_range=0.5,
    )
    LlamaModel(config).eval().save_pretrained(folder)
    edit(folder / "tokenizer_config.json", padding_side="left")


def edit(file: Path, remove: str = "\0", **changes: object) -> None:
    """Change keys of a JSON file; those that begin with ``remove`` go first."""
    old = json.loads(file.read_text())
    kept = {key: value for key, value in old.items() if not key.startswith(remove)}
    file.write_text(json.dumps(kept | changes))


def token_vectors(folder: Path, text: str) -> npt.NDArray[np.float32]:
    """The transformer's output for one text: [n_tokens, width]."""
    from transformers import AutoModel, AutoTokenizer

    inputs = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    with torch.inference_mode():
        output = AutoModel.from_pretrained(folder).eval()(**inputs).last_hidden_state
    return output[0].numpy().copy()


def load(file: Path) -> npt.NDArray[np.float32]:
    vectors = np.load(file)
    assert vectors.dtype == np.float16
    return vectors.astype(np.float32)


def test_vectors_are_those_of_sentence_transformers(
    encoder: TextEncoder, model_dir: Path, out_file: Path
) -> None:
    stats = encoder.encode_to_file(TEXTS, out_file)
    vectors = load(out_file)
    assert vectors.shape == (len(TEXTS), encoder.dim) == (7, 384)
    assert (stats.n_texts, stats.n_unique, stats.n_empty, stats.n_resumed) == (7, 4, 2, 0)
    # After recbole_gacllm, which hides what sentence-transformers cannot import here.
    from sentence_transformers import SentenceTransformer

    expected = SentenceTransformer(str(model_dir), device="cpu").encode(
        TEXTS, normalize_embeddings=True
    )
    for row, text in enumerate(TEXTS):
        if text.strip():
            assert vectors[row] @ expected[row] > 0.999
        else:
            assert not vectors[row].any()


def test_rows_have_unit_length_and_close_sentences_are_close(
    encoder: TextEncoder, out_file: Path
) -> None:
    encoder.encode_to_file(TEXTS, out_file)
    vectors = load(out_file)
    norms = np.linalg.norm(vectors, axis=1)
    np.testing.assert_allclose(norms[[0, 1, 2, 4, 6]], 1, atol=1e-3)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.3


def test_bfloat16_agrees_with_float32(
    encoder: TextEncoder, model_dir: Path, out_file: Path, tmp_path: Path
) -> None:
    encoder.encode_to_file(TEXTS, out_file)
    other = tmp_path / "bfloat16.npy"
    TextEncoder(model_dir, "bfloat16", 4, "cpu").encode_to_file(TEXTS, other)
    cosines = (load(out_file) * load(other)).sum(1)[[0, 1, 2, 4, 6]]
    assert (cosines > 0.995).all()
    assert (cosines < 1 - 1e-7).any() or (np.load(out_file) != np.load(other)).any()


def test_identical_texts_are_encoded_once(
    encoder: TextEncoder, out_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    encode = TextEncoder._encode
    monkeypatch.setattr(
        TextEncoder, "_encode", lambda self, texts: encoded.extend(texts) or encode(self, texts)
    )
    encoder.encode_to_file(TEXTS, out_file)
    assert sorted(encoded) == sorted({text for text in TEXTS if text.strip()})
    vectors = np.load(out_file)
    np.testing.assert_array_equal(vectors[0], vectors[4])


def test_a_batch_holds_texts_of_like_numbers_of_tokens(
    encoder: TextEncoder, out_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = [f"{word} international understanding" for word in ("Yesterday", "Tomorrow", "Forever")]
    many = [f"{letter} b c d e f g h" for letter in "xyz"]
    assert min(map(len, few)) > max(map(len, many))
    batches: list[set[str]] = []
    encode = encoder._model.encode
    monkeypatch.setattr(
        encoder._model,
        "encode",
        lambda texts, **keys: batches.append(set(texts)) or encode(texts, **keys),
    )
    monkeypatch.setattr(encoder, "batch_size", 3)
    encoder.encode_to_file([*few, *many], out_file)
    assert batches == [set(many), set(few)]


def test_a_killed_encoding_resumes_to_the_same_bytes(
    model_dir: Path, out_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", WORKER, str(model_dir), str(out_file), json.dumps(MANY_TEXTS)],
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert killed.returncode == -signal.SIGKILL
    assert not out_file.exists()
    journal = json.loads((tmp_path / "layer_0.npy.journal").read_text())
    assert journal["n_done"] == 8
    assert journal["seconds"] > 0
    journal["seconds"] += 100  # it was a long one
    (tmp_path / "layer_0.npy.journal").write_text(json.dumps(journal))

    monkeypatch.setattr(encoder_module, "_BATCHES_A_CHUNK", 2)
    encoder = TextEncoder(model_dir, "float32", 2, "cpu")
    stats = encoder.encode_to_file(MANY_TEXTS, out_file)
    assert (stats.n_resumed, stats.n_unique) == (8, 30)
    assert stats.seconds >= stats.earlier_seconds == round(journal["seconds"], 2) > 100
    whole = tmp_path / "whole.npy"
    assert encoder.encode_to_file(MANY_TEXTS, whole).n_resumed == 0
    assert out_file.read_bytes() == whole.read_bytes()
    assert not (tmp_path / "layer_0.npy.partial").exists()


def test_a_finished_file_is_not_encoded_again(
    encoder: TextEncoder, out_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder.encode_to_file(TEXTS, out_file)
    monkeypatch.setattr(TextEncoder, "_encode", None)
    assert encoder.encode_to_file(TEXTS, out_file).n_resumed == 4


def test_other_texts_are_not_resumed_from_an_older_attempt(
    encoder: TextEncoder, out_file: Path
) -> None:
    encoder.encode_to_file(TEXTS, out_file)
    changed = [*TEXTS[:-1], "Peace."]
    assert encoder.encode_to_file(changed, out_file).n_resumed == 0
    fresh = out_file.with_name("fresh.npy")
    encoder.encode_to_file(changed, fresh)
    assert out_file.read_bytes() == fresh.read_bytes()


@pytest.mark.parametrize("change", ["dtype", "batch_size", "model"])
def test_an_attempt_of_another_encoder_is_not_resumed(
    tiny_encoder: Path, out_file: Path, change: str
) -> None:
    TextEncoder(tiny_encoder, "float32", 4, "cpu").encode_to_file(TEXTS, out_file)
    if change == "model":
        os.utime(tiny_encoder / "model.safetensors", (1, 1))
    dtype = "bfloat16" if change == "dtype" else "float32"
    encoder = TextEncoder(tiny_encoder, dtype, 2 if change == "batch_size" else 4, "cpu")
    assert encoder.encode_to_file(TEXTS, out_file).n_resumed == 0


def test_a_damaged_journal_starts_anew_and_says_so(
    encoder: TextEncoder, out_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder.encode_to_file(TEXTS, out_file)
    before = out_file.read_bytes()
    out_file.with_name("layer_0.npy.journal").write_text("{")
    assert encoder.encode_to_file(TEXTS, out_file).n_resumed == 0
    assert "layer_0.npy.journal is damaged" in caplog.text
    assert out_file.read_bytes() == before


@pytest.mark.parametrize("value", [np.nan, 0.0])
def test_a_bad_row_names_its_text(
    encoder: TextEncoder, out_file: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    encode = TextEncoder._encode

    def spoiled(self: TextEncoder, texts: list[str]) -> npt.NDArray[np.float32]:
        vectors = encode(self, texts)
        vectors[texts.index(TEXTS[1])] = value
        return vectors

    monkeypatch.setattr(TextEncoder, "_encode", spoiled)
    with pytest.raises(GaCLLMError, match=r"NaN or zero for text 1 of .*encoder_dtype: float32"):
        encoder.encode_to_file(TEXTS, out_file)
    assert not out_file.exists()


def test_texts_that_are_all_empty_give_zero_rows(encoder: TextEncoder, out_file: Path) -> None:
    assert encoder.encode_to_file(["", " "], out_file).n_empty == 2
    assert not load(out_file).any()


def test_no_texts_are_refused(encoder: TextEncoder, out_file: Path) -> None:
    with pytest.raises(ValueError, match="no texts"):
        encoder.encode_to_file([], out_file)


def test_a_folder_that_cannot_be_written_is_named(encoder: TextEncoder, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(GaCLLMError, match=r"file.layer_0\.npy cannot be written.*artifact_dir"):
        encoder.encode_to_file(TEXTS, tmp_path / "file" / "layer_0.npy")


def test_a_full_disk_is_an_error_before_anything_is_encoded(
    encoder: TextEncoder, out_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(encoder_module.os, "posix_fallocate", full)
    with pytest.raises(GaCLLMError, match="No space left on device"):
        encoder.encode_to_file(TEXTS, out_file)


def test_a_plain_hugging_face_folder_gets_mean_pooling(
    encoder: TextEncoder, model_dir: Path, tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(model_dir, plain)
    shutil.rmtree(plain / "1_Pooling")
    for file in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
        (plain / file).unlink()
    encoder.encode_to_file(TEXTS, tmp_path / "a.npy")
    TextEncoder(plain, "float32", 4, "cpu").encode_to_file(TEXTS, tmp_path / "b.npy")
    np.testing.assert_allclose(load(tmp_path / "a.npy"), load(tmp_path / "b.npy"), atol=1e-3)


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
@pytest.mark.parametrize("kind", ["encoder", "decoder padded on the left"])
def test_pooling_is_what_the_folder_states(
    tiny_encoder: Path, out_file: Path, pooling: str, kind: str
) -> None:
    edit(tiny_encoder / "1_Pooling" / "config.json", pooling_mode=pooling)
    if kind != "encoder":
        replace_by_decoder(tiny_encoder)
    TextEncoder(tiny_encoder, "float32", 4, "cpu").encode_to_file(TEXTS, out_file)
    vectors = load(out_file)
    for row, text in enumerate(TEXTS):
        if text.strip():
            tokens = token_vectors(tiny_encoder, text)  # [n_tokens, 16], nothing is padded
            expected = {"mean": tokens.mean(0), "cls": tokens[0], "lasttoken": tokens[-1]}[pooling]
            expected /= np.linalg.norm(expected)
            np.testing.assert_allclose(vectors[row], expected, atol=2e-3)


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
def test_the_prompt_that_an_encoder_needs_goes_before_each_text(
    tiny_encoder: Path, tmp_path: Path, default: str | None, asked: str | None, before: str
) -> None:
    bare = tmp_path / "bare.npy"
    texts = [text for text in TEXTS if text.strip()]
    TextEncoder(tiny_encoder, "float32", 4, "cpu").encode_to_file(
        [before + text for text in texts], bare
    )
    edit(
        tiny_encoder / "config_sentence_transformers.json",
        prompts={"query": "search this: ", "passage": "found: "},
        default_prompt_name=default,
    )
    prompted = tmp_path / "prompted.npy"
    encoder = TextEncoder(tiny_encoder, "float32", 4, "cpu", prompt=asked)
    encoder.encode_to_file(texts, prompted)
    np.testing.assert_allclose(load(prompted), load(bare), atol=2e-3)


def test_a_folder_whose_prompts_are_not_used_is_reported(
    tiny_encoder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    prompts = {"query": "search this: ", "document": ""}
    edit(
        tiny_encoder / "config_sentence_transformers.json",
        prompts=prompts,
        default_prompt_name=None,
    )
    TextEncoder(tiny_encoder, "float32", 4, "cpu", prompt="query")
    assert "encoder_prompt" not in caplog.text
    TextEncoder(tiny_encoder, "float32", 4, "cpu")
    assert re.search(r"encoder_prompt: none is set; .* has the prompts query\n", caplog.text)


def test_another_prompt_encodes_anew(tiny_encoder: Path, out_file: Path) -> None:
    TextEncoder(tiny_encoder, "float32", 4, "cpu").encode_to_file(TEXTS, out_file)
    before = load(out_file)
    encoder = TextEncoder(tiny_encoder, "float32", 4, "cpu", prompt="query: ")
    assert encoder.encode_to_file(TEXTS, out_file).n_resumed == 0
    assert np.abs(load(out_file) - before).max() > 0.01


def test_a_folder_without_safetensors_is_refused(model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin is a pickle.*safetensors"):
        TextEncoder(folder, "float32", 4, "cpu")
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(WeightsError, match=r"encoder_model: .*cannot be loaded"):
        TextEncoder(folder, "float32", 4, "cpu")


def test_code_of_a_model_folder_is_not_run(model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["type"] = "evil.Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nclass Transformer: ...")
    with pytest.raises(WeightsError, match="without code of its own"):
        TextEncoder(folder, "float32", 4, "cpu")
    assert not (tmp_path / "run").exists()


def test_a_missing_folder_and_an_unknown_dtype_are_refused(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"encoder_model: .*absent is not a folder"):
        TextEncoder(tmp_path / "absent", "auto", 4)
    with pytest.raises(ValueError, match=r"^encoder_dtype='fp8' is unknown; allowed: auto"):
        TextEncoder(model_dir, "fp8", 4)


def test_progress_is_shown_only_on_request(
    encoder: TextEncoder,
    out_file: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    encoder.encode_to_file(TEXTS, out_file)
    assert "text/s" not in capfd.readouterr().err
    encoder.encode_to_file(TEXTS, out_file.with_name("other.npy"), show_progress=True)
    assert "4/4" in capfd.readouterr().err
