"""`lopt-pp train RUN_YAML FLAGS`: starts the processes of a training run, or is one of them.

One process trains here; several are started by `lopt_pp.distributed.launch`. Where torchrun, `accelerate launch` or
`srun` has started several, this is one of them and starts nothing.
"""

import os
import sys
from collections.abc import Sequence

import lopt_pp.train
from lopt_pp.commands.common import LOADING
from lopt_pp.config.launch import LaunchConfig
from lopt_pp.config.parser import parse_run
from lopt_pp.distributed.fork_server import start_server
from lopt_pp.distributed.process_count import count_processes, gpus_seen
from lopt_pp.distributed.slurm import has_other_tasks
from lopt_pp.errors import as_usage_errors
from lopt_pp.training.first_checks import check_before_loading
from lopt_pp.util.console import print_error, print_note, print_warning
from lopt_pp.util.process import ends_at_ctrl_c


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
        The exit status. 0: the model is there. 1: the run failed. 2: not begun: flags are unusable, or what they name
        is not there, or in use. 75: a signal has stopped the run, which can go on from its checkpoint. 130: Ctrl-C
        before the first step, or a second one.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if is_started_by_another():
        return lopt_pp.train.main(given)
    with as_usage_errors(), ends_at_ctrl_c():
        config, flags = parse_run(given, warn=print_warning)
        check_before_loading(config)
        count = count_processes(config, flags.nproc, gpus_seen)
        config.topology(count.number)
        print_note(f"{count}; {LOADING}")
        if count.number == 1 and flags.max_restarts == 0:
            return lopt_pp.train.train(config)
        return _launch(given, count.number, flags, config.run.output_dir)


def is_started_by_another() -> bool:
    """Whether a launcher has started this process as one of a run's."""
    return any(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")) or has_other_tasks()


def _launch(arguments: Sequence[str], processes: int, flags: LaunchConfig, output_dir: str) -> int:
    """Runs the processes of a run; returns the exit status."""
    start_server(processes)
    # Late, since it imports PyTorch, which the server does at the same time.
    from lopt_pp.distributed.launch import Launchers, launch

    entry = f"{lopt_pp.train.__name__}:{lopt_pp.train.main_of_launched.__name__}"
    outcome = launch(entry, arguments, Launchers(processes), max_restarts=flags.max_restarts)
    if outcome.stopped_by is None and (death := outcome.silent_death()):
        print_error(f"{death}; what the run has recorded is in {output_dir}")
    return outcome.status
