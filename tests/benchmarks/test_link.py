"""benchmarks/network/slow_link.py runs, or says why it cannot, and writes what it promises."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from forked import run
from launching import environment

pytestmark = pytest.mark.slow

PING = """
import os, socket, sys, time
from benchmarks.network import emulated_link
if (reason := emulated_link.reason_not_possible()) is not None:
    sys.exit(f"skipped: {reason}")
from multiprocessing import Pipe
from multiprocessing.reduction import recv_handle, send_handle

def end(number, pipe):
    send_handle(pipe, emulated_link.enter_namespace(number), os.getppid())
    plug = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    plug.bind((emulated_link.ADDRESSES[number], 7000))
    other = (emulated_link.ADDRESSES[1 - number], 7000)
    pipe.send("ready")
    if number == 1:
        for _ in range(2):
            plug.sendto(plug.recv(65536), other)
    else:
        for size in (100, 1000):
            pipe.recv()
            start = time.monotonic()
            plug.sendto(bytes(size), other)
            plug.recv(65536)
            pipe.send(time.monotonic() - start)
    pipe.recv()

pipes = []
for number in range(2):
    near, far = Pipe()
    if os.fork() == 0:
        try:
            end(number, far)
        finally:
            os._exit(0)
    pipes.append(near)
with emulated_link.EmulatedLink(tuple(recv_handle(pipe) for pipe in pipes)) as link:
    assert [pipe.recv() for pipe in pipes] == ["ready", "ready"]
    for delay, rate in ((0.05, float("inf")), (0.0, 10_280.0)):
        link.set(delay, rate)
        pipes[0].send("go")
        print(pipes[0].recv())
    for pipe in pipes:
        pipe.send("over")
"""


def test_quick_run_measures_each_link_or_says_why_not(tmp_path: Path) -> None:
    output = tmp_path / "link.json"
    result = run([sys.executable, "-m", "benchmarks.network.slow_link", "--quick", "--output", str(output)])
    assert result.returncode == 0, result.stderr
    written = json.loads(output.read_text())
    assert {"torch", "cpu", "cores", "date"} <= written["machine"].keys()
    if "skipped" in written:
        assert f"skipped: {written['skipped']}" in result.stdout
        pytest.skip(written["skipped"])
    runs = written["runs"]
    assert {run["delay"] for run in runs} == {0, 0.025}
    assert {run["method"] for run in runs} == {"ours", "1F1B"}
    assert {run["rate"] is None for run in runs} == {True, False}
    assert {run["raised_buffers"] for run in runs} == {True, False}
    for figures in runs:
        # No link makes a stage faster than its own sleeps.
        assert 0 < figures["microbatches_per_second"] <= 16
    assert written["link"]["bytes_per_second"] > 0


def test_link_delays_and_limits_what_crosses_it() -> None:
    command = [sys.executable, "-c", PING]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    if "skipped" in result.stderr:
        pytest.skip(result.stderr)
    assert result.returncode == 0, result.stderr
    delayed, limited = map(float, result.stdout.split())
    # There and back at 50 ms one way; 1,028 bytes there and back at 10,280 bytes per second. Never sooner.
    assert delayed >= 0.1
    assert limited >= 0.2


def test_no_link_where_there_is_no_ip_program(tmp_path: Path) -> None:
    output = tmp_path / "link.json"
    command = [sys.executable, "-m", "benchmarks.network.slow_link", "--quick", "--output", str(output)]
    hidden = environment() | {"PATH": str(tmp_path)}
    result = run(command, env=hidden)
    assert result.returncode == 0, result.stderr
    assert "skipped" in json.loads(output.read_text())
