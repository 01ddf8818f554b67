"""What the processes of ranks find in their environment, and on their machine. Imports nothing that is heavy."""

from __future__ import annotations

import os

from crossdock.runtime.config.threads import compute_threads
from crossdock.runtime.errors import LaunchError

RENDEZVOUS_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "ROLE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
"""Of whoever started the launcher: ranks get their place as arguments."""


def forked_environment(world_size: int, device: str) -> dict[str, str]:
    """Of the process that imports what ranks need, and so of the ranks. `device`: auto, cpu or cuda."""
    environment = {name: value for name, value in os.environ.items() if name not in RENDEZVOUS_VARIABLES}
    if device != "cuda":  # OpenMP reads it when a thread starts; torch.set_num_threads comes too late
        environment["OMP_NUM_THREADS"] = str(compute_threads(world_size))
    environment.setdefault("OPENBLAS_NUM_THREADS", "1")  # a fork must find no thread, and numpy computes nothing here
    environment["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # whether there is a GPU is asked without a CUDA context
    return environment


def check_gpus(world_size: int) -> None:
    """
    Raises:
        LaunchError: this machine has fewer GPUs than ranks.
    """
    import torch

    gpus = torch.cuda.device_count()
    if gpus < world_size:
        raise LaunchError(
            f"{world_size} ranks need {world_size} GPUs, but this machine has {gpus}; "
            "lower the degrees, or use device: cpu",
            "launch.device",
        )
