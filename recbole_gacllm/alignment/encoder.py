"""Descriptions to vectors: ``x_v^(l) = Enc(T_v^(l))``, with sentence-transformers.

Enc is the folder's own: its pooling (mean, CLS, last token, …), its default prompt, its length
limit; a plain Hugging Face folder gets mean pooling. Rows are normalised to unit length.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sentence_transformers import SentenceTransformer
from tqdm import tqdm

from recbole_gacllm.artifacts.disk import sync_folder, write_atomic
from recbole_gacllm.artifacts.manifests import fingerprint
from recbole_gacllm.errors import GaCLLMError, WeightsError
from recbole_gacllm.llm.hardware import resolve_dtype

logger = logging.getLogger(__name__)

_BATCHES_A_CHUNK = 8  # what a kill costs at most
_TOKENIZED_AT_ONCE = 4096


@dataclass(frozen=True)
class EncodeStats:
    """What one file took.

    Attributes:
        n_texts: Rows of the file.
        n_unique: Different texts among them that are not empty; each is encoded once.
        n_empty: Texts without a visible character; their rows are zero.
        n_resumed: Of ``n_unique``, those an earlier process had encoded.
        dim: Columns of the file.
        seconds: Wall time, that of killed processes until their last durable chunk included.
        earlier_seconds: Of it, that of earlier processes.
    """

    n_texts: int
    n_unique: int
    n_empty: int
    n_resumed: int
    dim: int
    seconds: float
    earlier_seconds: float


class TextEncoder:
    """A loaded sentence encoder.

    Args:
        model_dir: A sentence-transformers folder, or a plain Hugging Face folder of an encoder.
        dtype: ``bfloat16``, ``float16``, ``float32``, or ``auto``; see
            :func:`~recbole_gacllm.llm.hardware.resolve_dtype`. Only the transformer runs in it;
            pooling and normalisation are in float32.
        batch_size: Texts a batch.
        device: ``cpu``, ``cuda`` (or ``cuda:1`` …), or ``auto``: a GPU if there is one.
        prompt: Name of one of the folder's prompts, or a text, that goes before each text; None is
            the folder's default prompt, if it names one.

    Attributes:
        dim: Width of an embedding.

    Raises:
        ValueError: If ``model_dir`` is no folder, or ``dtype`` is none of the four.
        WeightsError: If the folder holds no encoder that can be loaded from safetensors.
    """

    def __init__(
        self,
        model_dir: Path,
        dtype: str,
        batch_size: int,
        device: str = "auto",
        prompt: str | None = None,
    ) -> None:
        if not model_dir.is_dir():
            raise ValueError(f"encoder_model: {model_dir} is not a folder")
        _refuse_pickles(model_dir)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model_dir, self.batch_size = model_dir, batch_size
        self.dtype: torch.dtype = getattr(torch, resolve_dtype(dtype, "encoder_dtype", device))
        try:
            self._model = SentenceTransformer(
                str(model_dir),
                device=device,
                local_files_only=True,
                trust_remote_code=False,
                model_kwargs={"dtype": self.dtype, "use_safetensors": True},
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise WeightsError(
                f"encoder_model: {model_dir} cannot be loaded: {error}. Allowed is a folder of a "
                "sentence-transformers or Hugging Face encoder with safetensors weights and "
                "without code of its own."
            ) from error
        self._model[0].register_forward_hook(_to_float32)
        named = {name: text for name, text in self._model.prompts.items() if text}
        if prompt is None and named and not self._model.default_prompt_name:
            logger.info(
                "encoder_prompt: none is set; %s has the prompts %s", model_dir, ", ".join(named)
            )
        self._prompt = None if prompt is None else named.get(prompt, prompt)
        self.dim = self._encode(["dim"]).shape[1]
        logger.info("encoder %s: %s on %s, %d wide", model_dir, self.dtype, device, self.dim)

    def encode_to_file(
        self, texts: Sequence[str], out_file: Path, *, show_progress: bool = False
    ) -> EncodeStats:
        """Write the embeddings of texts as a float16 ``.npy`` file, resuming a killed attempt.

        Different texts are sorted by their number of tokens, so that batches are padded little, and
        encoded in chunks. After each chunk, rows and then
        ``<out_file>.journal`` are made durable; batches are cut the same way wherever an attempt
        stopped, so the file does not depend on it. Called again when all is done, it does nothing.

        Shapes:
            out_file: [len(texts), dim], rows of unit length, or zero for an empty text.

        Raises:
            ValueError: If there are no texts.
            GaCLLMError: If the model gives NaN or zero for a text, or the file cannot be written.
        """
        if not texts:
            raise ValueError(f"{out_file}: there are no texts to encode")
        started = time.perf_counter()
        ranks, unique = self._rank_by_length(texts)  # [len(texts)]
        with _explaining(out_file):
            attempt = _Attempt(out_file, self._key(texts), started)
            if attempt.is_finished(len(unique)):
                n_resumed = len(unique)
            else:
                n_resumed, vectors = attempt.open((len(texts), self.dim))
                self._fill(vectors, ranks, unique, n_resumed, attempt, show_progress)
                attempt.finish()
        return EncodeStats(
            n_texts=len(texts),
            n_unique=len(unique),
            n_empty=int((ranks < 0).sum()),
            n_resumed=n_resumed,
            dim=self.dim,
            seconds=round(attempt.seconds, 2),
            earlier_seconds=round(attempt.earlier_seconds, 2),
        )

    def _fill(
        self,
        vectors: npt.NDArray[np.float16],  # [n_texts, dim], a memory map
        ranks: npt.NDArray[np.int64],  # [n_texts]
        unique: list[str],
        n_done: int,
        attempt: _Attempt,
        show_progress: bool,
    ) -> None:
        rows = np.argsort(ranks, kind="stable")  # rows in the order of their texts in `unique`
        sorted_ranks = ranks[rows]
        size = self.batch_size * _BATCHES_A_CHUNK
        with tqdm(
            desc=f"encode {attempt.out_file.stem}",
            total=len(unique),
            initial=n_done,
            unit="text",
            disable=not show_progress,
        ) as bar:
            for start in range(n_done, len(unique), size):
                chunk = unique[start : start + size]
                encoded = self._encode(chunk)  # [len(chunk), dim]
                first, last = np.searchsorted(sorted_ranks, [start, start + len(chunk)])
                here = rows[first:last]
                bad = ~(np.linalg.norm(encoded, axis=1) > 0.5)  # NaN too
                if bad.any():
                    row = here[bad[ranks[here] - start]].min()
                    raise GaCLLMError(
                        f"encoder_model: {self.model_dir} in {self.dtype} gives NaN or zero for "
                        f"text {row} of {attempt.out_file}. Set encoder_dtype: float32, or take "
                        "another encoder."
                    )
                vectors[here] = encoded[ranks[here] - start]
                attempt.advance(vectors, start + len(chunk))
                bar.update(len(chunk))

    def _rank_by_length(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.int64], list[str]]:
        """Different texts that are not empty, longest first; each row's place in them, or -1."""
        different = list({text for text in texts if text.strip()})
        lengths = dict(zip(different, self._lengths(different), strict=True))
        unique = sorted(different, key=lambda text: (-lengths[text], text))
        place = {text: rank for rank, text in enumerate(unique)}
        return np.array([place.get(text, -1) for text in texts], dtype=np.int64), unique

    def _lengths(self, texts: list[str]) -> list[int]:
        """Tokens of each text; characters where the encoder has no tokenizer of the usual kind."""
        tokenizer = self._model.tokenizer
        if not callable(tokenizer):
            return list(map(len, texts))
        lengths: list[int] = []
        for start in range(0, len(texts), _TOKENIZED_AT_ONCE):
            some = texts[start : start + _TOKENIZED_AT_ONCE]
            lengths += map(len, tokenizer(some, verbose=False)["input_ids"])
        return lengths

    def _encode(self, texts: list[str]) -> npt.NDArray[np.float32]:
        batches = [
            # One by one: given several, it would cut them anew, by characters.
            self._model.encode(
                texts[start : start + self.batch_size],
                prompt=self._prompt,
                batch_size=self.batch_size,
                show_progress_bar=False,
                convert_to_numpy=True,
                normalize_embeddings=True,
            )
            for start in range(0, len(texts), self.batch_size)
        ]
        encoded: npt.NDArray[np.float32] = np.concatenate(batches)
        return encoded

    def _key(self, texts: Sequence[str]) -> str:
        """What a half-written file must agree in to be resumed."""
        digest = hashlib.sha256()
        for text in texts:
            data = text.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "big") + data)
        files = [
            (str(file.relative_to(self.model_dir)), file.stat().st_size, file.stat().st_mtime_ns)
            for file in sorted(self.model_dir.rglob("*"))
            if file.is_file()
        ]
        return fingerprint(
            {
                "texts": digest.hexdigest(),
                "model": files,
                "dtype": str(self.dtype),
                "batch_size": self.batch_size,
                "prompt": self._prompt,
            }
        )


class _Attempt:
    """A half-written file, and the journal that says how far it is and what it took.

    Attributes:
        earlier_seconds: What earlier processes took until their last durable chunk.
    """

    def __init__(self, out_file: Path, key: str, started: float) -> None:
        self.out_file = out_file
        self.earlier_seconds = 0.0
        self._started = started  # by time.perf_counter()
        self._key = key
        self._partial = out_file.with_name(out_file.name + ".partial")
        self._journal = out_file.with_name(out_file.name + ".journal")
        self._n_done: int | None = None  # None: this file was never begun
        if self._journal.exists():
            try:
                entry = json.loads(self._journal.read_bytes())
                if entry["key"] == key:
                    self._n_done = int(entry["n_done"])
                    self.earlier_seconds = float(entry.get("seconds", 0.0))
            except (ValueError, KeyError, TypeError) as error:
                logger.warning("%s is damaged (%s): encoding starts anew", self._journal, error)

    @property
    def seconds(self) -> float:
        """What all processes took until now."""
        return self.earlier_seconds + time.perf_counter() - self._started

    def is_finished(self, n_unique: int) -> bool:
        renamed = self.out_file.exists() and not self._partial.exists()
        return renamed and self._n_done == n_unique

    def open(self, shape: tuple[int, int]) -> tuple[int, npt.NDArray[np.float16]]:
        """How many texts are durable, and the file they are in, made of zeros if need be."""
        if self._n_done is not None and self._partial.exists():
            try:
                np.load(
                    self._partial, mmap_mode="r"
                )  # "r+" would fill up a file that was cut short
                vectors = np.load(self._partial, mmap_mode="r+")
            except ValueError as error:
                logger.warning("%s is damaged (%s): encoding starts anew", self._partial, error)
            else:
                logger.info("%s: goes on after %d texts", self.out_file, self._n_done)
                return self._n_done, vectors
        self._journal.unlink(missing_ok=True)  # before the file it speaks of is replaced
        vectors = np.lib.format.open_memmap(  # type: ignore[no-untyped-call]
            self._partial, "w+", np.float16, shape
        )
        with open(self._partial, "r+b") as file:
            if hasattr(os, "posix_fallocate"):  # a full disk is an error here, SIGBUS later
                os.posix_fallocate(file.fileno(), 0, self._partial.stat().st_size)
            os.fsync(file.fileno())
        self.advance(vectors, 0)
        return 0, vectors

    def advance(self, vectors: npt.NDArray[np.float16], n_done: int) -> None:
        """Make rows durable, then the word that they are."""
        assert isinstance(vectors, np.memmap)
        vectors.flush()
        entry = {"key": self._key, "n_done": n_done, "seconds": self.seconds}
        write_atomic(self._journal, json.dumps(entry).encode())

    def finish(self) -> None:
        with open(self._partial, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(self._partial, self.out_file)
        sync_folder(self.out_file.parent)


def _to_float32(_module: object, _inputs: object, features: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.float() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in features.items()
    }


def _refuse_pickles(model_dir: Path) -> None:
    """sentence-transformers would read a module's pickle where there is no safetensors file."""
    for pickle in model_dir.rglob("pytorch_model*.bin"):
        if not list(pickle.parent.glob("*.safetensors")):
            raise WeightsError(
                f"encoder_model: {pickle} is a pickle; only safetensors are read. Take a release "
                "of this encoder with model.safetensors."
            )


@contextmanager
def _explaining(out_file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise GaCLLMError(
            f"{out_file} cannot be written: {error}. Free space or rights there, or set "
            "artifact_dir to another folder, and start again: what was finished is kept."
        ) from error
