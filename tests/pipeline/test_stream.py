"""The stream by itself: between two processes, and within one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import ranks
from stream_errors import DISAGREEMENTS

from lopt_pp.pipeline.messages import Header
from lopt_pp.pipeline.stream import LocalStream


def play(case: str, folder: Path) -> tuple[Any, Any]:
    """Plays a case of the worker in two processes; what each of them found (None where it ended early)."""
    with ranks(folder, [case, folder], [case, folder], module="stream_worker") as started:
        for rank in started:
            assert rank.status(60) == 0, "".join(rank.text for rank in started)
    files = [folder / f"{case}-{rank}.json" for rank in (0, 1)]
    first, second = (json.loads(file.read_text()) if file.exists() else None for file in files)
    return first, second


def test_messages_arrive_in_order_and_bit_for_bit(tmp_path: Path) -> None:
    """Of different shapes and dtypes, whatever the queue's depth; and both ends close."""
    assert play("sent_and_received", tmp_path) == ([], [])


def test_the_sender_runs_ahead_as_far_as_the_queue_is_deep(tmp_path: Path) -> None:
    """A queue's depth at its own end, and, once the receiver has begun, another one at the receiver's."""
    counts, _ = play("run_ahead", tmp_path)
    assert counts == [[1, 0, 1], [1, 2, 3], [3, 0, 3], [3, 2, 7]]


def test_shapes_may_be_known_only_when_their_phase_begins(tmp_path: Path) -> None:
    """Neither end waits for headers of messages whose shapes depend on what it has still to do itself."""
    assert play("shapes_known_late", tmp_path) == ([], [])


def test_ends_that_come_to_know_other_shapes_disagree(tmp_path: Path) -> None:
    _, said = play("disagree_late", tmp_path)
    sent, expected = (f"step 1, microbatch 2, [1, {tokens}, 6] float32" for tokens in (4, 5))
    start = f"stages 0 and 1 disagree: stage 0 (rank 0) sends {sent}, stage 1 (rank 1) expects {expected}; "
    assert said.startswith(start), said


def test_memory_is_used_again(tmp_path: Path) -> None:
    """As many buffers as messages can be there at once: those of the queue, and the one that the stage works on."""
    assert play("buffers", tmp_path)[1] == [4, 4]


def test_what_the_ends_disagree_about_is_an_error(tmp_path: Path) -> None:
    _, said = play("disagreement", tmp_path)
    assert said.keys() == DISAGREEMENTS.keys()
    sides = {
        "step": ("step 6, microbatch 1, [2, 5, 6] float32", "step 2, microbatch 1, [2, 5, 6] float32"),
        "microbatch": ("step 1, microbatch 4, [2, 4, 6] float32", "step 1, microbatch 2, [2, 4, 6] float32"),
        "sequences": ("step 2, microbatch 2, [9, 6, 6] float32", "step 2, microbatch 2, [2, 6, 6] float32"),
        "tokens": ("step 1, microbatch 1, [2, 99, 6] float32", "step 1, microbatch 1, [2, 3, 6] float32"),
        "hidden": ("step 1, microbatch 1, [2, 3, 8] float32", "step 1, microbatch 1, [2, 3, 6] float32"),
        "dtype": ("step 2, microbatch 2, [2, 6, 6] bfloat16", "step 2, microbatch 2, [2, 6, 6] float32"),
        "fewer": ("the end after step 2", "step 2, microbatch 2, [2, 6, 6] float32"),
        "more": ("step 10, microbatch 1, [1, 1, 6] float32", "the end after step 2"),
    }
    for kind, (sent, expected) in sides.items():
        start = f"stages 0 and 1 disagree: stage 0 (rank 0) sends {sent}, stage 1 (rank 1) expects {expected}; "
        assert said[kind].startswith(start), kind


def test_a_tensor_that_was_not_announced_is_not_sent(tmp_path: Path) -> None:
    said, _ = play("wrong_tensor", tmp_path)
    assert len(said) == 3
    for text in said:
        assert text.startswith("stage 0 was to send step 1, microbatch 1, [2, 3, 6] float32 but has ")


def test_a_run_that_is_stopped_ends_at_the_same_place_at_both_ends(tmp_path: Path) -> None:
    """Wherever the sender stops, for several depths; the receiver hears of it before it waits for a message."""
    sent, received = play("stopped", tmp_path)
    ends = {(0, 0): 0, (1, 0): 3, (1, 1): 6, (1, 2): 7, (2, 0): 8, (4, 0): 14}
    assert sent == received == [[depth, list(end), number] for depth in (1, 2, 5) for end, number in ends.items()]


def test_a_middle_stage_announces_no_step_that_it_does_not_know_to_be_made(tmp_path: Path) -> None:
    assert play("unknown", tmp_path) == ([[0, 0], [1, 1], [2, 3], [3, 3]], [0, 1, 2, 3])


def test_a_sender_that_has_died_is_named(tmp_path: Path) -> None:
    _, said = play("peer_gone", tmp_path)
    assert said.startswith("stage 0 (rank 0) has died or left: receiving")


def test_a_header_survives_the_wire() -> None:
    header = Header(step=3, microbatch=1, sequences=2, tokens=5, hidden=7, dtype=1)
    assert Header.unpack(header.pack()) == header
    end = Header.end(7)
    assert Header.unpack(end.pack()) == end and end.is_end and str(end) == "the end after step 7"
    end = Header.end(7, 2)
    assert Header.unpack(end.pack()) == end and str(end) == "the end in the evaluation after step 8"
    assert not any(Header(7, microbatch, 0, 0, 0).is_end for microbatch in range(3))


def test_the_stream_within_a_process() -> None:
    stream = LocalStream()
    first, second = torch.ones(1), torch.zeros(2)
    stream.send(first)
    stream.send(second)
    with pytest.raises(AssertionError, match="no stage received"):
        stream.close()
    assert stream.receive() is first
    assert stream.receive() is second
    stream.close()
