"""Two machines whose network fails: no packet arrives any more, and nobody says so."""

import socket
from pathlib import Path

import pytest
from ranks import ranks, until

from benchmarks.network.emulated_link import EmulatedLink, reason_not_possible

TIMEOUT = 3
"""--stream_timeout, in seconds."""


def test_both_stages_stop_and_name_the_other(inputs: Path, tmp_path: Path) -> None:
    if reason := reason_not_possible():
        pytest.skip(reason)
    out, data = tmp_path / "out", f"--model_name_or_path {inputs / 'model'} --train_file {inputs / 'rows.jsonl'}"
    flags = f"{data} --output_dir {out} --stream_timeout {TIMEOUT}"
    flags += " --max_steps 100000 --save_steps 5 --per_device_train_batch_size 2"
    place = str(tmp_path / "devices")
    with socket.socket(socket.AF_UNIX) as meeting:
        meeting.bind(place)
        meeting.listen()
        own = [[str(end), place, *flags.split()] for end in (0, 1)]
        with ranks(tmp_path, *own, module="namespace_worker") as started:
            devices: dict[int, int] = {}
            while len(devices) < 2:
                with meeting.accept()[0] as worker:
                    end, (device,), *_ = socket.recv_fds(worker, 1, 1)
                    devices[int(end)] = device
            with EmulatedLink((devices[0], devices[1])) as link:
                link.set(delay=0.0)
                until((out / "checkpoint-5").is_dir)
                assert all(rank.process.is_alive() for rank in started)
                link.set(delay=float("inf"))
                assert [rank.status(10 * TIMEOUT) for rank in started] == [1, 1]
    for stage, rank in enumerate(started):
        other = 1 - stage
        assert f"stage {other} (rank {other}) does not answer for {TIMEOUT} s (--stream_timeout): " in rank.text
        assert " at step " in rank.text and "Traceback" not in rank.text
