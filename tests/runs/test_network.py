"""What a run opens to the network, and that nothing which comes from there, or from a file, is unpickled."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import psutil
import pytest
from launching import TESTS, environment, torchrun
from ranks import ranks, until
from tiny import write_inputs
from watched import WATCH

LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
STEPS = 100
PATIENCE = 240


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, rows, and what watches every Python process that has `watch` on its path."""
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    (folder / "watch").mkdir()
    (folder / "watch" / "sitecustomize.py").write_text(WATCH)
    return folder


def flags(inputs: Path, out: Path, more: str = "") -> list[str]:
    common = f"--model_name_or_path {inputs / 'model'} --train_file {inputs / 'rows.jsonl'} --output_dir {out}"
    return f"{common} --max_steps {STEPS} --per_device_train_batch_size 2 --save_steps 0 {more}".split()


def watched(inputs: Path) -> dict[str, str]:
    outer = environment()
    return outer | {"PYTHONPATH": f"{inputs / 'watch'}:{outer['PYTHONPATH']}"}


def is_training(out: Path) -> bool:
    return (out / "metrics.jsonl").exists() and len((out / "metrics.jsonl").read_text().splitlines()) > 4


def listening(pids: Iterable[int]) -> dict[int, set[str]]:
    """The addresses that each process listens at."""
    return {
        pid: {
            connection.laddr.ip
            for connection in psutil.Process(pid).net_connections("inet")
            if connection.status == psutil.CONN_LISTEN or connection.type == socket.SOCK_DGRAM
        }
        for pid in pids
    }


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux' loopback interface is known by name")
@pytest.mark.parametrize("method", ["--method e2e", "--num_stages 1 --sharding full"])
def test_ranks_on_one_machine(method: str, inputs: Path, tmp_path: Path) -> None:
    """They listen on the loopback interface only, the store of rank 0 included, and load no pickle."""
    out = tmp_path / "out"
    given = flags(inputs, out, method)
    with ranks(tmp_path, given, given, module="watched") as started:
        until(lambda: is_training(out) or any(rank.process.exitcode is not None for rank in started), PATIENCE)
        assert is_training(out), started[0].text + started[1].text
        addresses = listening([rank.process.pid or 0 for rank in started])
        assert [rank.status(PATIENCE) for rank in started] == [0, 0], started[0].text + started[1].text
    assert all(own and own <= LOOPBACK for own in addresses.values()), addresses


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux' loopback interface is known by name")
def test_torchrun_on_one_machine(inputs: Path, tmp_path: Path) -> None:
    """The launcher does no more than its ranks do."""
    out = tmp_path / "out"
    command = torchrun(2, "-m", "lopt_pp.train", *flags(inputs, out))
    with subprocess.Popen(command, env=watched(inputs), stderr=subprocess.PIPE, text=True) as launcher:
        until(lambda: is_training(out) or launcher.poll() is not None, PATIENCE)
        children = psutil.Process(launcher.pid).children(recursive=True) if launcher.poll() is None else []
        addresses = listening([launcher.pid, *(child.pid for child in children)]) if children else {}
        _, log = launcher.communicate(timeout=PATIENCE)
    assert launcher.returncode == 0 and (out / "config.json").exists(), log
    assert len(addresses) >= 3 and all(own and own <= LOOPBACK for own in addresses.values()), addresses


def test_the_watch_sees_pickles(inputs: Path, tmp_path: Path) -> None:
    """torchrun's own rendezvous loads them, which is why there is another."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    result = subprocess.run(
        [*command, "-m", "lopt_pp.train", *flags(inputs, tmp_path)],
        env=watched(inputs),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert result.returncode == 70
    assert "a pickle was loaded: ('torch.distributed.elastic.rendezvous" in result.stderr


def test_two_machines(inputs: Path, tmp_path: Path) -> None:
    """Played by two launchers on this one: they meet at the one address that they are given."""
    out = tmp_path / "out"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = watched(inputs) | {"HEAD_HOST": "127.0.0.1", "PORT": str(port), "IFACE": "lo"}
    own["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{own['PATH']}"
    command = ["bash", str(TESTS.parent / "launch" / "torchrun" / "several_machines.sh"), *flags(inputs, out)]
    machines = [
        subprocess.Popen(command, env=own, stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL)
        for _ in range(2)
    ]
    try:
        until(lambda: is_training(out) or any(machine.poll() is not None for machine in machines), PATIENCE)
        running = [machine.pid for machine in machines if machine.poll() is None]
        children = [child.pid for pid in running for child in psutil.Process(pid).children(recursive=True)]
        launchers, processes = listening(running), listening(children)
        logs = [machine.communicate(timeout=PATIENCE)[1] for machine in machines]
    finally:
        for machine in machines:
            machine.terminate()  # It ends what it has started.
    assert [machine.returncode for machine in machines] == [0, 0], "\n".join(logs)
    assert sorted(map(sorted, launchers.values())) == [[], ["127.0.0.1"]], launchers
    assert len(processes) >= 2 and all(own and own <= LOOPBACK for own in processes.values()), processes
