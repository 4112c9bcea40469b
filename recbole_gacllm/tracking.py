"""What the text stages did, where RecBole tracks a run: TensorBoard always, W&B with ``log_wandb``.

Every number of a stage's manifest gets one value, such as ``sft/perplexity_after`` or
``descriptions/layer_1/n_failed``; the loss of the fine-tuning gets a curve, ``sft/loss``. A stage
that was done before is tracked with the figures of the run that did it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def track_stages(trainer: Any, manifests: Mapping[str, Mapping[str, Any]]) -> None:
    """Hand the figures of the stages to the writers of RecBole's trainer.

    Args:
        trainer: RecBole's; has ``tensorboard`` and ``wandblogger``.
        manifests: Stage -> its manifest.
    """
    figures = dict(stage_figures(manifests))
    losses = manifests.get("sft", {}).get("train_losses", [])
    for name, value in figures.items():
        trainer.tensorboard.add_scalar(name, value, 0)
    for step, loss in enumerate(losses):
        trainer.tensorboard.add_scalar("sft/loss", loss, step)
    wandb = trainer.wandblogger
    if wandb.log_wandb:
        # RecBole's logger leaves names with "_step" as they are, and logs the rest as "sft/…".
        wandb._wandb.define_metric("sft/*", step_metric="sft_step")
        for step, loss in enumerate(losses):
            wandb.log_metrics({"loss": loss, "sft_step": step}, head="sft")
        wandb.log_eval_metrics(figures, head="stages")


def stage_figures(manifests: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    """Every number in the manifests, with its path as its name."""
    for stage, manifest in manifests.items():
        # The layers of the embeddings start with the raw texts, those of the descriptions above.
        first = 0 if stage == "embeddings" else 1
        layers = {
            f"layer_{number}": layer
            for number, layer in enumerate(manifest.get("layers", []), first)
        }
        kept = {key: value for key, value in manifest.items() if key not in ("key", "layers")}
        yield from _numbers(stage, {**kept, **layers})


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(f"{name}/{key}", item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield name, value
