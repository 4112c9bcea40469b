"""The repairs of RecBole's choice of cards and of its distributed training (``nproc=2``)."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from recbole_gacllm.llm.hardware import check_cards
from recbole_gacllm.plugin.import_hooks import replaces

_VARIABLE = "CUDA_VISIBLE_DEVICES"
_last_group: list[Any] = []


def cards_as_asked(configurator: Any) -> None:
    """Give a run the cards that its user asked for, or say why it cannot have them.

    Causes: ``Config._init_device`` writes ``gpu_id`` into CUDA_VISIBLE_DEVICES, and its default is
    "0", on a shared node the first card of all: here the user's variable is the default, and what a
    ``Config`` wrote into it is not. ``use_gpu: False`` alone leaves the model on the GPU:
    here it means an empty ``gpu_id``, for training and for the stages, which inherit the variable.
    And where torch cannot use the driver, RecBole takes the CPU without a word.
    """
    of_user, of_config = os.environ.get(_VARIABLE), os.environ.get(_VARIABLE)

    @replaces(configurator.Config, "_init_device")
    def _init_device(original: Any, self: Any) -> None:
        nonlocal of_user, of_config
        now, final = os.environ.get(_VARIABLE), self.final_config_dict
        if now != of_config:
            of_user = now
        if not final["use_gpu"]:
            final["gpu_id"] = ""
        elif "gpu_id" not in self.external_config_dict and of_user is not None:
            final["gpu_id"] = of_user
        elif isinstance(final["gpu_id"], list):
            final["gpu_id"] = tuple(final["gpu_id"])
        original(self)
        of_config = os.environ.get(_VARIABLE)
        check_cards(final["gpu_id"])


def gloo_on_cpu(configurator: ModuleType) -> None:
    """Let ``nproc=2`` run on a machine without GPU, over gloo.

    Cause: ``Config._init_device`` knows only NCCL and CUDA devices, and wants as many ``gpu_id``
    as processes. Where RecBole would choose the CPU for one process (no CUDA, or an empty
    ``gpu_id``), the group is gloo's; everywhere else its own method runs, unchanged.
    """

    @replaces(configurator.Config, "_init_device")
    def _init_device(original: Any, self: Any) -> None:
        final = self.final_config_dict
        if "local_rank" in final:
            gpu_id = final["gpu_id"]
            gpu_id = ",".join(map(str, gpu_id)) if isinstance(gpu_id, tuple) else str(gpu_id)
            os.environ[_VARIABLE] = gpu_id  # as RecBole does, before CUDA is asked
            import torch

            if not gpu_id or not torch.cuda.is_available():
                final["gpu_id"] = gpu_id
                _join_gloo_group(final)
                return
        original(self)


def _join_gloo_group(final: dict[str, Any]) -> None:
    """The second half of ``Config._init_device``, for the CPU.

    A group lives until the next: the end of one waits for its threads with Python's lock in hand,
    which a thread that still lets a tensor go waits for (pytorch/pytorch#56297).
    """
    import torch

    torch.distributed.init_process_group(
        backend="gloo",
        rank=final["local_rank"] + final["offset"],
        world_size=final["world_size"],
        init_method=f"tcp://{final['ip']}:{final['port']}",
    )
    _last_group[:] = [torch.distributed.group.WORLD]
    final["device"] = torch.device("cpu")
    final["single_spec"] = False
    if final["local_rank"] != 0:
        final.update(state="error", show_progress=False, verbose=False)


def config_outside_its_group(configurator: ModuleType) -> None:
    """Let a checkpoint of a distributed run be loaded by one process.

    Cause: the ``Config`` in the checkpoint says that it is one of several processes, and the data
    loaders of ``load_data_and_model`` then ask for a process group that is not there.
    """

    def __setstate__(self: Any, state: dict[str, Any]) -> None:  # noqa: N807
        import torch

        vars(self).update(state)
        final = self.final_config_dict
        if final["single_spec"] or torch.distributed.is_initialized():
            return
        cuda = final["device"].type == "cuda" and torch.cuda.is_available()
        final.update(single_spec=True, local_rank=0, device=torch.device("cuda" if cuda else "cpu"))

    configurator.Config.__setstate__ = __setstate__


def ddp_trainer(trainer: ModuleType) -> None:
    """Let RecBole's trainer run in several processes on CPU, and share one checkpoint.

    Causes: it passes GPU ids to ``DistributedDataParallel`` and turns batch norm into
    ``SyncBatchNorm``, which exists for GPUs only (on CPU, batch norm stays per process). And each
    process names its checkpoint by its own clock and loads it while rank 0 may still be writing.
    """
    import torch

    @replaces(trainer.AbstractTrainer, "__init__")
    def init_base(original: Any, self: Any, config: Any, model: Any) -> None:
        if config["single_spec"] or config["device"].type != "cpu":
            original(self, config, model)
            return
        self.config, self.model = config, model
        self.distributed_model = trainer.DistributedDataParallel(model)

    @replaces(trainer.Trainer, "__init__")
    def init_general(original: Any, self: Any, config: Any, model: Any) -> None:
        original(self, config, model)
        if not config["single_spec"]:
            name = [self.saved_model_file]
            torch.distributed.broadcast_object_list(name, src=0)
            self.saved_model_file = name[0]

    @replaces(trainer.Trainer, "evaluate")
    def evaluate_together(
        original: Any,
        self: Any,
        eval_data: Any,
        load_best_model: bool = True,
        *args: Any,
        **keys: Any,
    ) -> Any:
        if load_best_model and not self.config["single_spec"]:
            torch.distributed.barrier()
        return original(self, eval_data, load_best_model, *args, **keys)


def ensure_dir(utils: ModuleType) -> None:
    """Let several processes make the same folder at once.

    Cause: ``ensure_dir`` looks first and makes then; of two processes that look together
    (``nproc=2`` in a fresh folder: ``log/``, ``saved/``) the second fails.
    """
    _replace_everywhere(utils, "ensure_dir", functools.partial(os.makedirs, exist_ok=True))


def repaired_children(quick_start: Any) -> None:
    """Let the processes that ``nproc=2`` spawns have these repairs and know GaCLLM.

    Cause: ``run`` spawns ``recbole.quick_start.run_recboles``; a fresh interpreter that unpickles
    it imports RecBole alone. Ours is pickled by the name of this module, so the child imports this
    package.
    """
    if quick_start.run_recboles is not run_recboles:
        quick_start._run_recboles_of_recbole = quick_start.run_recboles
        _replace_everywhere(quick_start, "run_recboles", run_recboles)


def run_recboles(rank: int, *args: Any) -> None:
    """RecBole's entry of a spawned process, run where ``recbole_gacllm`` is imported.

    Args:
        rank: Local rank of the process.
        args: As in ``recbole.quick_start.run_recboles``.
    """
    module = importlib.import_module("recbole.quick_start.quick_start")
    module._run_recboles_of_recbole(rank, *args)


def _replace_everywhere(module: ModuleType, name: str, new: Callable[..., Any]) -> None:
    """Replace a function in its module and in every RecBole module that already took it over."""
    old = getattr(module, name)
    for other_name, other in list(sys.modules.items()):
        if other_name.split(".")[0] == "recbole" and getattr(other, name, None) is old:
            setattr(other, name, new)
    setattr(module, name, new)
