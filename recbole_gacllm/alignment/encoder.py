"""Descriptions to vectors: ``x_v^(l) = Enc(T_v^(l))``, with sentence-transformers.

Enc is the folder's own: its pooling (mean, CLS, last token, …), its default prompt, its length
limit; a plain Hugging Face folder gets mean pooling. Rows are normalised to unit length.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sentence_transformers import SentenceTransformer
from tqdm import tqdm

from recbole_gacllm.artifacts import disk
from recbole_gacllm.errors import GaCLLMError, WeightsError
from recbole_gacllm.llm.hardware import resolve_dtype

logger = logging.getLogger(__name__)

_TOKENIZED_AT_ONCE = 4096  # texts whose tokens are in memory at once


@dataclass(frozen=True)
class EncodeStats:
    """What one file took."""

    n_texts: int  # rows of the file
    n_unique: int  # different texts among them that are not empty; each is encoded once
    n_empty: int  # texts without a visible character; their rows are zero
    dim: int  # columns of the file
    seconds: float  # wall time


class TextEncoder:
    """A loaded sentence encoder.

    Args:
        model_dir: A folder of :func:`.weights.resolve_encoder`, which refuses pickles and code.
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
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model_dir, self.batch_size = model_dir, batch_size
        self.dtype: torch.dtype = getattr(torch, resolve_dtype(dtype, device))
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
        prompts = {name: text for name, text in self._model.prompts.items() if text}
        if prompt is None and prompts and not self._model.default_prompt_name:
            logger.info(
                "encoder_prompt: none is set; %s has the prompts %s", model_dir, ", ".join(prompts)
            )
        self._prompt = None if prompt is None else prompts.get(prompt, prompt)
        self.dim = self._encode(["dim"]).shape[1]
        logger.info("encoder %s: %s on %s, %d wide", model_dir, self.dtype, device, self.dim)

    def encode_to_file(
        self, texts: Sequence[str], out_file: Path, *, show_progress: bool = False
    ) -> EncodeStats:
        """Write the embeddings of texts as a float16 ``.npy`` file, whole or not at all.

        Shapes:
            out_file: [len(texts), dim], rows of unit length, or zero for an empty text.

        Raises:
            GaCLLMError: If the model gives NaN or zero for a text, or the file cannot be written.
        """
        started = time.perf_counter()
        unique = self._longest_first(texts)
        place = {text: number for number, text in enumerate(unique)}
        places = np.array([place.get(text, -1) for text in texts])  # [n_texts]
        rows = np.argsort(places, kind="stable")  # in the order of their texts in `unique`
        sorted_places = places[rows]
        partial = out_file.with_name(out_file.name + ".partial")
        try:
            vectors = np.lib.format.open_memmap(  # type: ignore[no-untyped-call]
                partial, "w+", np.float16, (len(texts), self.dim)
            )
            bar = tqdm(
                desc=f"encode {out_file.stem}",
                total=len(unique),
                unit="text",
                disable=not show_progress,
            )
            with open(partial, "r+b") as file, bar:
                if hasattr(os, "posix_fallocate"):  # a full disk is an error here, SIGBUS later
                    os.posix_fallocate(file.fileno(), 0, partial.stat().st_size)
                for start in range(0, len(unique), self.batch_size):
                    encoded = self._encode(unique[start : start + self.batch_size])
                    first, last = np.searchsorted(sorted_places, [start, start + len(encoded)])
                    here = rows[first:last]
                    bad = ~(np.linalg.norm(encoded, axis=1) > 0.5)  # NaN too
                    if bad.any():
                        row = here[bad[places[here] - start]].min()
                        raise GaCLLMError(
                            f"encoder_model: {self.model_dir} in {self.dtype} gives NaN or zero "
                            f"for text {row} of {out_file}. Set encoder_dtype: float32, or take "
                            "another encoder."
                        )
                    vectors[here] = encoded[places[here] - start]
                    bar.update(len(encoded))
                vectors.flush()
                os.fsync(file.fileno())
            os.replace(partial, out_file)
            disk.sync_folder(out_file.parent)
        except OSError as error:
            raise disk.cannot_write(out_file, error) from error
        return EncodeStats(
            n_texts=len(texts),
            n_unique=len(unique),
            n_empty=int((places < 0).sum()),
            dim=self.dim,
            seconds=round(time.perf_counter() - started, 2),
        )

    def _longest_first(self, texts: Sequence[str]) -> list[str]:
        """Different texts that are not empty, by their number of tokens: little padding a batch."""
        different = list({text for text in texts if text.strip()})
        lengths = dict(zip(different, self._lengths(different), strict=True))
        return sorted(different, key=lambda text: (-lengths[text], text))

    def _lengths(self, texts: list[str]) -> list[int]:
        """Tokens of each text; characters where the encoder has no tokenizer of the usual kind."""
        tokenizer = self._model.tokenizer
        if not callable(tokenizer):
            return list(map(len, texts))
        lengths: list[int] = []
        for start in range(0, len(texts), _TOKENIZED_AT_ONCE):
            part = texts[start : start + _TOKENIZED_AT_ONCE]
            lengths += map(len, tokenizer(part, verbose=False)["input_ids"])
        return lengths

    def _encode(self, batch: list[str]) -> npt.NDArray[np.float32]:
        encoded: npt.NDArray[np.float32] = self._model.encode(
            batch,
            prompt=self._prompt,
            batch_size=self.batch_size,
            show_progress_bar=False,
            convert_to_numpy=True,
            normalize_embeddings=True,
        )
        return encoded


def _to_float32(_module: object, _inputs: object, features: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.float() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in features.items()
    }
