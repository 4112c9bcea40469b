"""The stages that run in child processes: ``python -m recbole_gacllm.stage NAME FOLDER child``.

Started by :func:`.children.run_child`. A stage reads ``FOLDER/job.json``, goes on where an earlier
process stopped, and writes its manifest last. By hand only ``torchrun … -m recbole_gacllm.stage sft
FOLDER`` makes sense, for a fine-tuning on several machines whose run was interrupted after it had
written the job.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

from recbole_gacllm import console
from recbole_gacllm.artifacts import children, manifests
from recbole_gacllm.convolution import setup
from recbole_gacllm.convolution.imported import in_words
from recbole_gacllm.convolution.layers import Layer, kind_of, layer_name
from recbole_gacllm.convolution.neutralize import neutralize
from recbole_gacllm.convolution.store import DescriptionStore
from recbole_gacllm.job import Job
from recbole_gacllm.llm.engines import choose_backend
from recbole_gacllm.sft.pairs import sample_pairs

logger = logging.getLogger("recbole_gacllm.stage")


def sft(folder: Path, job: Job) -> dict[str, Any]:
    """LoRA fine-tuning on matched pairs: ``adapter/``."""
    from recbole_gacllm.sft.finetune import PROGRESS_FILE
    from recbole_gacllm.sft.processes import finetune_on_all_cards

    if _is_first_process() and not (folder / "adapter").is_dir():
        _forget_report(folder / PROGRESS_FILE)
    options = job.options
    graph, raw = setup.inputs_of(job)
    special = setup.tokenizer_of(job).special_tokens
    for side, texts in raw.texts.items():
        raw.texts[side] = [neutralize(text, special) for text in texts]
    learn, heldout = sample_pairs(
        graph,
        raw,
        setup.templates_of(options),
        setup.nothing_known_of(options),
        options.sft_n_pairs,
        options.sft_n_heldout,
        job.seed,
    )
    assert job.model_dir is not None
    report = finetune_on_all_cards(
        job.model_dir,
        learn,
        heldout,
        folder,
        options,
        seed=job.seed,
        show_progress=job.show_progress,
        model_name=job.model_name,
    )
    return dataclasses.asdict(report)


def _is_first_process() -> bool:
    """Of those that ``torchrun`` started; a child of a run is one process, without a rank."""
    return os.environ.get("RANK", "0") == "0"


def _forget_report(progress: Path) -> None:
    """An adapter that was finished and is lost must be trained again."""
    if progress.is_file() and "report" in json.loads(progress.read_bytes()):
        progress.unlink()


def merged(folder: Path, job: Job) -> dict[str, Any]:
    """The base model with the adapter merged into its weights: ``model/``."""
    from recbole_gacllm.sft.merge import merge

    assert job.model_dir is not None
    assert job.adapter_dir is not None
    merge(job.model_dir, job.adapter_dir, folder / "model")
    return {}


def descriptions(folder: Path, job: Job) -> dict[str, Any]:
    """Description convolution, or import: ``layer_1.parquet`` to ``layer_L.parquet``."""
    graph, layer = setup.inputs_of(job)
    imported = setup.imported_of(job)
    nothing_known = setup.nothing_known_of(job.options)
    manifest: dict[str, Any] = {"layers": []}
    with ExitStack() as stack:
        convolution = None
        if job.generator_key is not None:
            backend, reason = choose_backend(job.options.llm_backend)
            logger.info("llm_backend: %s (%s)", backend, reason)
            manifest |= {"backend": backend, "backend_reason": reason}
            store = stack.enter_context(DescriptionStore(job.store))
            convolution = setup.convolution_of(job, graph, store, backend)
            stack.callback(convolution.close)
        for number in range(1, job.options.n_text_layers + 1):
            kind = kind_of(number, job.options.has_knowledge)
            if imported is not None and number in imported.layers:
                layer = imported.fill(number, layer)
                coverage = imported.report(number, layer.tokens)
                made = {"imported": True, **dataclasses.asdict(coverage)}
                logger.info("imported %s", in_words(coverage))
            else:
                assert convolution is not None
                layer, report = convolution.next_layer(layer, nothing_known, number)
                made = dataclasses.asdict(report)
                logger.info(
                    "%s: %d of %d nodes generated, %d from the store, %d failed %s, "
                    "%d prompt and %d output tokens, %.0f s",
                    layer_name(number, kind),
                    report.n_generated,
                    report.n_nodes,
                    report.n_from_store,
                    report.n_failed,
                    report.failures or "",
                    report.n_prompt_tokens,
                    report.n_output_tokens,
                    report.seconds,
                )
            manifest["layers"].append({"kind": kind, **made})
            layer.write(folder / f"layer_{number}.parquet")
    return manifest


def embeddings(folder: Path, job: Job) -> dict[str, Any]:
    """Encoding: ``layer_0.npy`` to ``layer_L.npy``, users first, in the order of the inputs."""
    from recbole_gacllm.alignment.encoder import TextEncoder

    options = job.options
    assert job.encoder_dir is not None
    encoder = TextEncoder(
        job.encoder_dir,
        options.encoder_dtype,
        options.encoder_batch_size,
        prompt=options.encoder_prompt,
    )
    reports = []
    for number, file in enumerate(job.layer_files):
        layer = Layer.read(file)
        stats = encoder.encode_to_file(
            layer.texts["user"] + layer.texts["item"],
            folder / f"layer_{number}.npy",
            show_progress=job.show_progress,
        )
        reports.append(dataclasses.asdict(stats))
    return {"dim": encoder.dim, "layers": reports}


STAGES: dict[str, Callable[[Path, Job], dict[str, Any]]] = {
    "sft": sft,
    "merged": merged,
    "descriptions": descriptions,
    "embeddings": embeddings,
}


def main(name: str, folder: Path, *role: str) -> None:
    """Run one stage of one folder, as a child of a run or as one of torchrun's processes."""
    is_child = role == (children.CHILD,)
    if is_child:
        children.die_with_parent()
    elif "RANK" not in os.environ:
        sys.exit("a stage is started by a run, or by torchrun to go on with one; not by hand")
    console.prepare()
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs every request
    # Models are local folders by now; no library asks a hub about them.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    guard = children.reporting_errors if is_child else manifests.stage_lock
    with guard(folder) if _is_first_process() else nullcontext():
        job = Job.read(folder)
        started = time.perf_counter()
        report = STAGES[name](folder, job)
        if _is_first_process():
            manifest = {
                **report,
                "stage": name,
                "key": job.key,
                "files": manifests.digests(folder, job.outputs),
                "seconds": round(time.perf_counter() - started, 2),
            }
            manifests.write_manifest(folder, manifest)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
