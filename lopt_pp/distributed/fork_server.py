"""The process that those of a run are forked from, which has imported the trainer once for all of them.

It can be started before this process has imported PyTorch itself, so that both import at the same time.
"""

import multiprocessing
import os
from collections.abc import Sequence
from multiprocessing import forkserver

TRAINER = ("lopt_pp.train", "lopt_pp.training.trainer")
"""What a process imports that trains. (The first imports the second once its flags are read.)"""


def prepare_server(processes: int, preload: Sequence[str] = TRAINER) -> None:
    """Says what the server imports and has in its environment, if it is not there yet.

    Args:
        processes: of this machine, which share its cores.
        preload: modules.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    # Importing a library may ask whether there is a GPU. Asked through the driver's API, no process that is forked
    # afterwards could use one; this way it is asked through NVML.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    # What PyTorch's sockets warn of, with the frames of its C++, when a process has gone: the run says it in a line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(preload))


def start_server(processes: int) -> None:
    """Has the server import the trainer while this process does something else."""
    prepare_server(processes)
    forkserver.ensure_running()
