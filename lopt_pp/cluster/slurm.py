"""A training run as a Slurm job of one node or many.

The job's script is `job.sbatch` beside this file, filled in. Nothing but the script knows Slurm: the trainer only hears
signals, and goes on from the newest checkpoint of its output directory whenever it is started.
"""

import re
import shlex
import subprocess
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from lopt_pp.cluster.inputs import check_inputs
from lopt_pp.config.train_config import Config
from lopt_pp.errors import LoptError

_EARLY = 60
"""Seconds that Slurm may send its warning earlier than it is asked to."""

_LONGEST_WARNING = 65535
"""Seconds; Slurm holds them in 16 bits."""


@dataclass(frozen=True)
class Job:
    """What a job's script is filled in with.

    Attributes:
        config: YAML file with the run's flags.
        output_dir: of the run.
        name: of the job.
        nodes: number of machines.
        gpus_per_node: a process for each; 0 for processes on CPUs.
        processes_per_node: on CPUs; None with GPUs.
        cpus_per_task: CPU cores of each node; None for what the cluster gives.
        time: limit, as Slurm writes it; None for the partition's own.
        partition: where the job goes; None for the cluster's own choice.
        account: who pays; None for the user's own.
        venv: virtual environment to activate; None for none.
        modules: environment modules to load.
        signal_seconds: how long before the limit the run is told to save.
        iface: network interface for the traffic between nodes; None for the backend's choice.
        max_restarts: how often torchrun may start the run again within the job.
        sbatch_flags: further flags of `sbatch`, as they are.

    Raises:
        LoptError: a value is out of range, or no job could run with it.
    """

    config: Path
    output_dir: Path
    name: str
    nodes: int
    gpus_per_node: int
    processes_per_node: int | None = None
    cpus_per_task: int | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    venv: Path | None = None
    modules: tuple[str, ...] = ()
    signal_seconds: int = 300
    iface: str | None = None
    max_restarts: int = 0
    sbatch_flags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        least = {"nodes": 1, "gpus_per_node": 0, "processes_per_node": 1, "cpus_per_task": 1}
        least |= {"signal_seconds": 1, "max_restarts": 0}
        for name, bound in least.items():
            if (number := getattr(self, name)) is not None and number < bound:
                raise LoptError(f"{_flag(name)} {number}: at least {bound}")
        if self.signal_seconds > _LONGEST_WARNING:
            raise LoptError(f"--signal-seconds {self.signal_seconds}: at most {_LONGEST_WARNING}")
        if self.gpus_per_node and self.processes_per_node is not None:
            raise LoptError("--processes-per-node is for CPUs (--gpus-per-node 0); with GPUs each has one process")
        if not self.gpus_per_node and self.processes_per_node is None:
            raise LoptError("--gpus-per-node 0: give --processes-per-node, the number of processes on each node's CPUs")
        texts = [
            (_flag(name), getattr(self, name)) for name in ("config", "output_dir", "name", "partition", "account")
        ]
        texts += [("--venv", self.venv), ("--iface", self.iface), *(("after --", word) for word in self.sbatch_flags)]
        for flag, value in texts:
            # sbatch and the shell read a backslash or a line break in quotes each in their own way.
            if re.search(r"[\\\n]|^$", str(value)):
                raise LoptError(f"{flag} {str(value)!r}: may not be empty, nor hold a backslash or a line break")
        if "/" in self.name:
            raise LoptError(f"--job-name {self.name}: may not hold a slash; the log is named after it")
        if self.time is not None and _seconds(self.time) <= self.signal_seconds + _EARLY:
            raise LoptError(
                f"--time {self.time} is too short for --signal-seconds {self.signal_seconds}: Slurm may give its "
                f"warning another {_EARLY} seconds earlier, and the run is to have trained by then"
            )

    @property
    def processes(self) -> int:
        """Number of processes of each node."""
        return self.gpus_per_node or self.processes_per_node or 0

    def script(self) -> str:
        """The job's script, for `sbatch`."""
        directives: dict[str, str | int | None] = {"job-name": self.name, "partition": self.partition}
        directives |= {"account": self.account, "time": self.time, "nodes": self.nodes}
        directives |= {"gpus-per-node": self.gpus_per_node or None, "cpus-per-task": self.cpus_per_task}
        lines = [f"--{name}={value}" for name, value in directives.items() if value is not None]
        texts = ["#SBATCH " + shlex.quote(line) for line in lines]
        if self.sbatch_flags:
            texts.append("#SBATCH " + shlex.join(self.sbatch_flags))
        values = {
            "directives": "\n".join(texts),
            "signal_seconds": str(self.signal_seconds),
            "modules": f"({shlex.join(self.modules)})",
            "venv": _assigned(self.venv),
            "config": _assigned(self.config),
            "output_dir": _assigned(self.output_dir),
            "processes_per_node": _assigned(self.processes_per_node),
            "iface": _assigned(self.iface),
            "max_restarts": str(self.max_restarts),
        }
        template = resources.files("lopt_pp.cluster").joinpath("job.sbatch").read_text(encoding="utf-8")
        return re.sub(r"@(\w+)@", lambda place: values[place[1]], template)


def _flag(name: str) -> str:
    """A field of `Job` as the user gives it."""
    return {"config": "RUN_YAML", "name": "--job-name"}.get(name, "--" + name.replace("_", "-"))


def _assigned(value: object) -> str:
    """The right side of an assignment in the shell; nothing for None."""
    return "" if value is None else shlex.quote(str(value))


def _seconds(limit: str) -> int:
    """A time limit in seconds: `M`, `M:S`, `H:M:S`, `D-H`, `D-H:M` or `D-H:M:S`, as Slurm reads it.

    Raises:
        LoptError: it has another form.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if match is None:
        raise LoptError(f"--time {limit}: minutes, or hours:minutes:seconds, or days-hours:minutes:seconds")
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is None and len(numbers) < 3:
        numbers.insert(0, 0)  # They begin with the minutes.
    hours, minutes, seconds = (numbers + [0, 0])[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def places(nodes: int, processes: int) -> str:
    """Where a run's processes are, in messages."""
    return f"{nodes} node{'s' if nodes > 1 else ''} with {processes} process{'es' if processes > 1 else ''} each"


def check_run(config: Config, nodes: int, processes: int) -> None:
    """Sees at once what would end the job, or its return from the queue.

    Args:
        config: of the run.
        nodes: number of machines.
        processes: of each.

    Raises:
        LoptError: says what is wrong with it.
    """
    try:
        config.topology(nodes * processes)
    except LoptError as error:
        raise LoptError(f"{places(nodes, processes)}: {error}") from error
    if not config.checkpoint.saves:
        raise LoptError("--save_steps 0: a job that comes back would begin anew; give the steps between checkpoints")
    if config.checkpoint.resume_from_checkpoint not in (None, "latest"):
        raise LoptError(
            f"--resume_from_checkpoint {config.checkpoint.resume_from_checkpoint}: a job goes on from the newest "
            f"checkpoint of its own --output_dir, each time it comes from the queue; leave it out"
        )
    check_inputs(config, nodes * processes)


def submit(script: str) -> str:
    """Hands a script to `sbatch`; returns the job's id.

    Raises:
        LoptError: there is no `sbatch`, or it refuses the job.
    """
    try:
        result = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise LoptError("there is no sbatch here; submit from the cluster, or look at the job by --dry-run") from error
    if result.returncode != 0:
        raise LoptError(" ".join(result.stderr.split()) or f"sbatch failed with status {result.returncode}")
    return result.stdout.strip().split(";")[0]
