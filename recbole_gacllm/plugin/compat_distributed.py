"""The repairs of RecBole's distributed training (``nproc=2``); ``compat.py`` says when they act."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def gloo_on_cpu(configurator: ModuleType) -> None:
    """Let ``nproc=2`` run on a machine without GPU, over gloo.

    Cause: ``Config._init_device`` knows only NCCL and CUDA devices, and wants as many ``gpu_id``
    as processes. Where RecBole would choose the CPU for one process (no CUDA, or an empty
    ``gpu_id``), the group is gloo's; everywhere else its own method runs, unchanged.
    Upstream: none reported. End: a RecBole release with distributed training on CPU.
    """
    config_class = configurator.Config
    original = config_class._init_device

    @functools.wraps(original)
    def _init_device(self: Any) -> None:
        final = self.final_config_dict
        if "local_rank" in final:
            gpu_id = final["gpu_id"]
            gpu_id = ",".join(map(str, gpu_id)) if isinstance(gpu_id, tuple) else str(gpu_id)
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu_id  # as RecBole does, before CUDA is asked
            import torch

            if not gpu_id or not torch.cuda.is_available():
                final["gpu_id"] = gpu_id
                _join_gloo_group(final)
                return
        original(self)

    config_class._init_device = _init_device


def _join_gloo_group(final: dict[str, Any]) -> None:
    """The second half of ``Config._init_device``, for the CPU."""
    import torch

    torch.distributed.init_process_group(
        backend="gloo",
        rank=final["local_rank"] + final["offset"],
        world_size=final["world_size"],
        init_method=f"tcp://{final['ip']}:{final['port']}",
    )
    final["device"] = torch.device("cpu")
    final["single_spec"] = False
    if final["local_rank"] != 0:
        final.update(state="error", show_progress=False, verbose=False)


def config_outside_its_group(configurator: ModuleType) -> None:
    """Let a checkpoint of a distributed run be loaded by one process.

    Cause: the ``Config`` in the checkpoint says that it is one of several processes, and the data
    loaders of ``load_data_and_model`` then ask for a process group that is not there.
    Upstream: issue 2063. End: a RecBole release that closes it.
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
    ``SyncBatchNorm``, which exists for GPUs only (on CPU, batch norm stays per process). And, on
    every device, each process names its checkpoint by its own clock and loads it while rank 0 may
    still be writing: a run whose processes start in different seconds ends with a missing file.
    Upstream: none reported. End: a RecBole release with both.
    """
    import torch

    base, general = trainer.AbstractTrainer, trainer.Trainer
    base_init, general_init, evaluate = base.__init__, general.__init__, general.evaluate

    @functools.wraps(base_init)
    def init_base(self: Any, config: Any, model: Any) -> None:
        if config["single_spec"] or config["device"].type != "cpu":
            base_init(self, config, model)
            return
        self.config, self.model = config, model
        self.distributed_model = trainer.DistributedDataParallel(model)

    @functools.wraps(general_init)
    def init_general(self: Any, config: Any, model: Any) -> None:
        general_init(self, config, model)
        if not config["single_spec"]:
            name = [self.saved_model_file]
            torch.distributed.broadcast_object_list(name, src=0)
            self.saved_model_file = name[0]

    @functools.wraps(evaluate)
    def evaluate_together(
        self: Any, eval_data: Any, load_best_model: bool = True, *args: Any, **kwargs: Any
    ) -> Any:
        if load_best_model and not self.config["single_spec"]:
            torch.distributed.barrier()
        return evaluate(self, eval_data, load_best_model, *args, **kwargs)

    base.__init__, general.__init__, general.evaluate = init_base, init_general, evaluate_together


def ensure_dir(utils: ModuleType) -> None:
    """Let several processes make the same folder at once.

    Cause: ``ensure_dir`` looks first and makes then; of two processes that look together
    (``nproc=2`` in a fresh folder: ``log/``, ``saved/``) the second fails.
    Upstream: none reported. End: a RecBole release with ``os.makedirs(..., exist_ok=True)``.
    """
    _replace_everywhere(utils, "ensure_dir", _ensure_dir)


def _ensure_dir(dir_path: str) -> None:
    os.makedirs(dir_path, exist_ok=True)


def repaired_children(quick_start: Any) -> None:
    """Let the processes that ``nproc=2`` spawns have these repairs and know GaCLLM.

    Cause: ``run`` spawns ``recbole.quick_start.run_recboles``; a fresh interpreter that unpickles
    it imports RecBole alone. Ours is pickled by the name of this module, so the child imports this
    package.
    Upstream: none, it is how plugins work. End: with the last repair, if RecBole finds plugins
    itself.
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
