"""What the machine has: NVIDIA driver, cards, their memory, a compiler; its number types.

Cards are asked about through ``nvidia-smi``: asking CUDA would take half a gigabyte of the first
card for as long as the asking process lives.
"""

from __future__ import annotations

import csv
import errno
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from recbole_gacllm.errors import GenerationError

DType = Literal["bfloat16", "float16", "float32"]

# PyPI's builds of PyTorch are for CUDA 13, which begins with this driver.
OLDEST_DRIVER: Final = 580
# vLLM's kernels and CUDA 13 begin with Turing.
OLDEST_CAPABILITY: Final = (7, 5)
_DRIVER_FILE: Final = Path("/proc/driver/nvidia/version")
_DEVICE_FILE: Final = Path("/dev/nvidiactl")
_FIELDS: Final = "index,uuid,name,compute_cap,memory.total,memory.free"
# Largest share of a card that is taken, and the share left free of what others leave.
_MAX_SHARE: Final = 0.9
_MARGIN: Final = 0.02
_MIN_SHARE: Final = 0.05


@dataclass(frozen=True)
class Card:
    """An NVIDIA GPU as ``nvidia-smi`` shows it; memory in MiB."""

    index: str
    uuid: str
    name: str
    capability: tuple[int, int]
    total: float
    free: float

    def __str__(self) -> str:
        memory = f"{self.free / 1024:.1f} of {self.total / 1024:.1f} GiB free"
        major, minor = self.capability
        return f"card {self.index} ({self.name}, compute capability {major}.{minor}, {memory})"


def cards() -> list[Card]:
    """All cards of the machine; none where ``nvidia-smi`` is missing or cannot tell."""
    here = []
    for row in csv.reader(_nvidia_smi(f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits")):
        try:
            index, uuid, name, capability, total, free = (part.strip() for part in row)
            major, minor = capability.split(".")
            card = Card(index, uuid, name, (int(major), int(minor)), float(total), float(free))
        except ValueError:  # "[N/A]" of a card split by MIG, or a message in the place of rows
            continue
        here.append(card)
    return here


def visible_cards() -> list[Card]:
    """Those that CUDA_VISIBLE_DEVICES names, by number or UUID, in its order.

    None where it gives numbers of unlike cards: unless CUDA_DEVICE_ORDER is PCI_BUS_ID, CUDA
    numbers the fastest first, and ``nvidia-smi`` does not say which that is.
    """
    variable = os.environ.get("CUDA_VISIBLE_DEVICES")
    every, visible = cards(), []
    if variable is None:
        return every
    by_bus = os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    numbered = by_bus or len({card.name for card in every}) == 1
    for name in filter(None, (part.strip() for part in variable.split(","))):
        namesakes = (c for c in every if c.uuid.startswith(name) or (numbered and c.index == name))
        card = next(namesakes, None)
        if card is None:  # as CUDA does, which stops at the first that it does not know
            break
        visible.append(card)
    return visible


def driver_version() -> str | None:
    """Version of the NVIDIA driver, ``of unknown version`` if only its presence shows; or None."""
    if _DRIVER_FILE.is_file() and _DEVICE_FILE.exists():
        number = re.search(r"\s(\d+\.\d[\d.]*)\s", _DRIVER_FILE.read_text("utf-8", "replace"))
        return number[1] if number else "of unknown version"
    if shutil.which("nvidia-smi") is None:
        return "of unknown version" if _DEVICE_FILE.exists() else None
    answer = "\n".join(_nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader"))
    number = re.search(r"\b\d{3,}\.\d[\d.]*", answer)
    return number[0] if number else "of unknown version"


def check_cards(gpu_id: str) -> None:
    """Refuse to go on where cards are asked for, a driver is there, and torch sees no card.

    ``gpu_id`` is RecBole's key, as ``CUDA_VISIBLE_DEVICES`` takes it: empty or ``-1`` is none.

    Raises:
        ValueError: With torch's reason, the driver's version and the ways out.
    """
    import torch

    if gpu_id.strip() in ("", "-1") or torch.cuda.is_available():
        return
    driver = driver_version()
    if driver is None:
        return
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        reason = "no reason given"
    except (RuntimeError, AssertionError, AttributeError) as error:
        reason = str(error).split("\n")[0].strip()
    numbers = [card.index for card in cards()]
    here = f"cards here: {', '.join(numbers)}; " if numbers else ""
    with_cuda = "" if torch.version.cuda else ", and a torch built with CUDA (the extra `vllm`)"
    raise ValueError(
        f"gpu_id: {gpu_id!r} asks for a GPU and an NVIDIA driver ({driver}) is here, but torch "
        f"{torch.__version__} sees no card: {reason} ({here}in a container they must be passed "
        f"through). Install driver {OLDEST_DRIVER} or newer{with_cuda}; or compute on the CPU on "
        "purpose with --use_gpu=False."
    )


def check_cuda_tools() -> None:
    """What vLLM needs on GPUs beside its wheel, found before any stage.

    Raises:
        ValueError: If a card is too old, or Triton, which compiles its kernels at run time, has no
            C compiler or no ``Python.h``.
    """
    old = [card for card in visible_cards() if card.capability < OLDEST_CAPABILITY]
    if old:
        raise ValueError(
            f"gpu_id: {old[0]} is older than vLLM's oldest, compute capability 7.5. Name other "
            "cards, or set llm_backend: transformers."
        )
    if not (os.environ.get("CC") or shutil.which("clang") or shutil.which("gcc")):
        raise ValueError(
            "llm_backend: vllm needs a C compiler on GPUs and none is on PATH (Triton compiles at "
            "run time). Install one (`apt-get install gcc`), name it in CC, or set llm_backend: "
            "transformers."
        )
    header = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h")
    if not header.is_file():
        raise ValueError(
            f"llm_backend: vllm needs {header} on GPUs and it is missing (Triton compiles at run "
            "time). Install Python's headers (`apt-get install python3-dev`; Pythons of uv and "
            "conda have them), or set llm_backend: transformers."
        )


def resolve_dtype(requested: str, device: str | None = None) -> DType:
    """What a key for a number type asks for; ``auto`` is the best that the hardware computes in.

    That is bfloat16; float16 on GPUs before compute capability 8.0, which only emulate bfloat16;
    float32 on other processors. ``device`` is ``cpu`` or ``cuda``; None is a GPU if there is one.
    """
    match requested:
        case "bfloat16" | "float16" | "float32":
            return requested
    import torch

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda"):
        capabilities = [card.capability for card in visible_cards()]
        lowest = min(capabilities, default=None) or torch.cuda.get_device_capability()
        return "bfloat16" if lowest >= (8, 0) or torch.version.hip else "float16"
    cpu = Path("/proc/cpuinfo")
    flags = cpu.read_text(encoding="utf-8") if platform.system() == "Linux" else ""
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


def training_dtype(requested: str) -> DType:
    """Number type of the fine-tuning: float32 where :func:`resolve_dtype` is float16.

    Gradients of float16 weights vanish or overflow without a scaled loss.
    """
    dtype = resolve_dtype(requested)
    return "float32" if dtype == "float16" else dtype


def memory_share(asked: float | None) -> float:
    """Share of each visible card for an engine: as asked, else what its smallest card has free.

    ``min(.9, free / total - .02)``.

    Raises:
        GenerationError: If next to nothing is free.
    """
    if asked is not None:
        return asked
    shares = {card.free / card.total - _MARGIN: card for card in visible_cards()}
    share = min([_MAX_SHARE, *shares])
    if share < _MIN_SHARE:
        raise GenerationError(
            f"{shares[share]}: too little for an engine. End what holds its memory, name other "
            "cards (gpu_id), or set llm_gpu_memory_utilization, the share of a card to take."
        )
    return share


def card_groups(n_cards: int) -> list[dict[str, str]]:
    """The environments of as many engines of ``n_cards`` GPUs as there are GPUs for.

    A list of one empty environment, that of this process, where there is one engine or no GPU.
    """
    import torch

    n_visible = torch.cuda.device_count()
    variable = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = (variable.split(",") if variable else list(map(str, range(n_visible))))[:n_visible]
    groups = [names[n : n + n_cards] for n in range(0, len(names) - n_cards + 1, n_cards)]
    if len(groups) < 2:
        return [{}]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(group)} for group in groups]


def out_of_memory(error: BaseException) -> bool:
    """Whether something failed because memory of the GPU or of the machine ran out."""
    import torch
    from accelerate.utils.memory import should_reduce_batch_size

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    # The second: of memory-mapped weights.
    return bool(should_reduce_batch_size(error)) or "Cannot allocate memory" in str(error)


def _nvidia_smi(*arguments: str) -> list[str]:
    """Lines of its output; none where it is missing or fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        output = subprocess.check_output(
            [program, *arguments], stderr=subprocess.DEVNULL, text=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return output.splitlines()
