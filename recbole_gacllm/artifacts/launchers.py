"""Launchers: what torchrun, ``accelerate launch`` and mpirun tell the processes they start; a port.

That is meant for these alone: a child that inherits it takes itself for one of the launcher's own,
and waits for the others. Standard library only, as ``artifacts``.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

#: OpenMP threads that wait for one another sleep. Spinning ones cost five times the speed on a
#: machine that does anything else. libgomp reads it when it is loaded, with PyTorch.
WAITING = ("OMP_WAIT_POLICY", "PASSIVE")
_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_NAMES = frozenset(
    {
        *(*_SIZES, "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "CROSS_RANK"),
        *("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_NAME", "ROLE_RANK", "ROLE_WORLD_SIZE"),
        *("MASTER_ADDR", "MASTER_PORT"),
    }
)
_PREFIXES = (
    *("TORCHELASTIC_", "ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "MEGATRON_LM_"),
    *("OMPI_COMM_WORLD_", "PMI_", "PMIX_", "MV2_COMM_WORLD_"),
)


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """A copy of an environment without what a launcher set."""
    return {
        name: value
        for name, value in environment.items()
        if name not in _NAMES and not name.startswith(_PREFIXES)
    }


def leave_launcher() -> None:
    """Be a process of our own, and so all that this one starts."""
    for name in os.environ.keys() - without_launcher(os.environ).keys():
        del os.environ[name]


def free_port() -> int:
    """A port of loopback where nobody listens now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def require_one_process() -> None:
    """Refuse to do the same in each of several processes; then :func:`leave_launcher`.

    Raises:
        ValueError: Names how many there are.
    """
    sizes = {name: os.environ[name] for name in _SIZES if os.environ.get(name, "1") != "1"}
    if sizes:
        name, size = next(iter(sizes.items()))
        raise ValueError(
            f"{name}={size}: a launcher (torchrun, accelerate, mpirun) started {size} processes, "
            "and each would make the same run. Start one: --nproc=2 trains in two processes, and "
            "the LLM stages take every visible GPU by themselves."
        )
    leave_launcher()
