"""A Slurm cluster of two nodes on this machine, with its own munge, its own ports and its own folder."""

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

NODES = ("n1", "n2")

_DAEMONS = ("munged", "slurmctld", "slurmd")
_PATH = f"{os.environ['PATH']}:/usr/sbin"

# Both nodes are this machine. A requeued job waits until the credentials of its last start have expired, which are two
# minutes by default. The numbers of jobs, from which their ports follow, begin somewhere else on each cluster.
_CONF = """\
ClusterName=two-nodes
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1
FirstJobId={first_job}
ReturnToService=2
SlurmdParameters=config_overrides
MpiDefault=none
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why no cluster can be started here; empty where one can."""
    lacking = [name for name in (*_DAEMONS, "sbatch") if shutil.which(name, path=_PATH) is None]
    if lacking:
        return f"needs Slurm and munge (tests/runs/slurm/install.sh); {', '.join(lacking)} not found"
    return "" if os.geteuid() == 0 else "needs root, to start Slurm's daemons"


def until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Waits for a condition.

    Args:
        condition: true when it has come.
        seconds: far more than it takes.
        what: the condition in words.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not after {seconds} s"
        time.sleep(0.02)


class Cluster:
    """The cluster, running for as long as the context lasts.

    Args:
        root: an empty folder for state and logs, with a short path.

    Attributes:
        environment: with which Slurm's commands find it.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self.environment = os.environ | {"SLURM_CONF": str(root / "slurm.conf"), "PATH": _PATH}

    def __enter__(self) -> "Cluster":
        with ExitStack() as stack:
            self._start(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self, stack: ExitStack) -> None:
        root = self._root
        for folder in ("state", *(f"spool.{node}" for node in NODES)):
            (root / folder).mkdir()
        with ExitStack() as free:
            sockets = [free.enter_context(socket.socket()) for _ in range(3)]
            for each in sockets:
                each.bind(("127.0.0.1", 0))
            ports = [each.getsockname()[1] for each in sockets]
        first_job = 1 + secrets.randbelow(1_000_000)
        conf = _CONF.format(root=root, host=socket.gethostname().split(".")[0], ports=ports, first_job=first_job)
        (root / "slurm.conf").write_text(conf)
        key = root / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))

        files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munged.pid", "log-file": "munged.log"}
        flags = [f"--{flag}={root / name}" for flag, name in (files | {"seed-file": "munged.seed"}).items()]
        self._daemon(stack, "munged", "--foreground", *flags)
        until((root / "munge.socket").exists, 30, "munged listens")
        self._daemon(stack, "slurmctld", "-D")
        for node in NODES:
            self._daemon(stack, "slurmd", "-D", "-N", node)
        # Before the daemons end: a job that runs has processes that are not theirs.
        stack.callback(self._end_jobs)
        idle = ["idle"] * len(NODES)
        until(lambda: self._ask("sinfo", "--noheader", "--Node", "--format=%t").split() == idle, 60, "both nodes idle")

    def _daemon(self, stack: ExitStack, *command: str) -> None:
        with (self._root / "daemons.log").open("ab") as log:
            process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)

        def end() -> None:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

        stack.callback(end)

    def _end_jobs(self) -> None:
        self._ask("scancel", "--user=root")
        # Of a job that failed a test, what is left may not listen to anything gentler for KillWait seconds.
        until(lambda: not self._ask("squeue", "--noheader"), 90, "all jobs ended")

    def _ask(self, *command: str) -> str:
        """What a command says; nothing where it fails, as it does while the controller starts."""
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60).stdout

    def run(self, *command: str) -> str:
        """What a command of Slurm says, which must succeed."""
        result = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, f"{' '.join(command)}: {result.stderr}"
        return result.stdout

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job, by the names of `scontrol show job`."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)
