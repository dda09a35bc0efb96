"""`lopt-pp submit RUN_YAML FLAGS`: a training run as a Slurm job of one node or many.

The job's script is `job.sbatch` beside this file, filled in. Nothing but the script knows Slurm: the trainer only hears
signals, and goes on from the newest checkpoint of its output directory whenever it is started.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from lopt_pp.checkpoint.queued import check_before_queue
from lopt_pp.cluster.slurm import Job, check_run, places, submit
from lopt_pp.commands.common import CommandParser, home_path
from lopt_pp.config.objective import LOCAL_RATES
from lopt_pp.config.parser import parse_config
from lopt_pp.config.presets import PRESETS
from lopt_pp.config.train_config import Config
from lopt_pp.errors import as_usage_errors
from lopt_pp.util.console import print_warning


def _parser() -> CommandParser:
    parser = CommandParser(
        "lopt-pp submit",
        description="Submits a training run as a Slurm job: torchrun on each node, one process for each GPU. At the "
        "time limit, or when it is preempted, the run saves where it is, and the job goes on from there when its turn "
        "comes again.",
        usage="lopt-pp submit RUN_YAML [--nodes N] [--gpus-per-node N] FLAGS [-- FLAGS_OF_SBATCH]",
        allow_abbrev=False,
        elsewhere="flags of the run belong into RUN_YAML, and those of sbatch come after --",
    )
    parser.add_argument(
        "config", type=home_path, metavar="RUN_YAML", help="the run's flags, as `lopt-pp train --config` reads them"
    )
    parser.add_argument("--nodes", type=int, default=1, help="number of machines (default 1)")
    parser.add_argument(
        "--gpus-per-node", type=int, default=1, help="each has one process (default 1); 0 for processes on CPUs"
    )
    parser.add_argument("--processes-per-node", type=int, help="number of processes where there are no GPUs")
    parser.add_argument(
        "--cpus-per-task",
        type=int,
        help="CPU cores of each node, for all of its processes (default: the cluster's, and without GPUs one for each "
        "process)",
    )
    parser.add_argument("--time", help="limit, as Slurm writes it, such as 12:00:00 (default: the partition's)")
    parser.add_argument("--partition", help="partition (default: the cluster's)")
    parser.add_argument("--account", help="account that pays (default: the user's)")
    parser.add_argument("--job-name", help="name of the job (default: that of RUN_YAML without its ending)")
    parser.add_argument(
        "--venv",
        type=home_path,
        help="virtual environment to activate on the nodes (default: the one that runs this command; without one, "
        "what the shell has that submits)",
    )
    parser.add_argument("--modules", default="", help="environment modules to load first, such as cuda/13.0,gcc/14")
    parser.add_argument(
        "--signal-seconds",
        type=int,
        default=Job.signal_seconds,
        help="how long before the time limit the run is told to save (default %(default)s): more than a step and the "
        "writing of a checkpoint take",
    )
    parser.add_argument("--iface", help="network interface for the traffic between nodes, such as ib0")
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=Job.max_restarts,
        help="how often torchrun may start the run again from its latest checkpoint, within the job, after a process "
        "has failed (default %(default)s)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything and show the job's script, but submit nothing"
    )
    return parser


def _check_own_code(config: Config) -> None:
    """Sees that there are a local objective and a mapping of rows of the names that the run is given.

    Raises:
        LoptError: there is none.
    """
    # Late: to import what blocks learn from, and what reads rows, takes seconds.
    if config.objective.local not in ("none", *LOCAL_RATES):
        from lopt_pp.objectives import local_objective_class

        local_objective_class(config.objective)
    if config.data.dataset_mapping is not None and config.data.dataset_mapping not in PRESETS:
        from lopt_pp.data.presets import find_reader

        find_reader(config.data.dataset_mapping, config.data.dataset_text_field)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status: 0 done, 1 not submitted, 2 unusable flags."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    given = _parser().read(arguments[:end])
    venv = given.venv or (Path(sys.prefix) if sys.prefix != sys.base_prefix else None)
    cpus = given.cpus_per_task
    if cpus is None and given.gpus_per_node == 0:
        cpus = given.processes_per_node
    with as_usage_errors():
        config = parse_config(["--config", str(given.config)], warn=print_warning)
        _check_own_code(config)
        job = Job(
            config=given.config.absolute(),
            output_dir=Path(config.run.output_dir).absolute(),
            name=given.job_name if given.job_name is not None else given.config.stem,
            nodes=given.nodes,
            gpus_per_node=given.gpus_per_node,
            processes_per_node=given.processes_per_node,
            cpus_per_task=cpus,
            time=given.time,
            partition=given.partition,
            account=given.account,
            venv=venv.absolute() if venv is not None else None,
            modules=tuple(re.split(r"[,\s]+", given.modules.strip())) if given.modules.strip() else (),
            signal_seconds=given.signal_seconds,
            iface=given.iface,
            max_restarts=given.max_restarts,
            sbatch_flags=tuple(arguments[end + 1 :]),
        )
        check_run(config, job.nodes, job.processes)
    num_replicas = config.topology(job.nodes * job.processes).num_replicas
    check_before_queue(config, job.output_dir, num_replicas, writes=not given.dry_run)
    if given.dry_run:
        print(job.script(), end="")
        return 0
    number = submit(job.script())
    print(f"job {number} is in the queue: {places(job.nodes, job.processes)}")
    print(f"its log: {Path.cwd() / job.name}-{number}.log")
    print(f"the nodes' logs: {job.output_dir / 'logs'}/{number}-NODE.log")
    return 0
