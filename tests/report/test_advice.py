"""What a run's figures are made into, in words."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from synthetic_runs import about, record, write_run

from lopt_pp.report.advice import advise, better_cuts
from lopt_pp.report.run_data import read_run

TWO = [(0, 15), (15, 30)]


def texts(
    folder: Path,
    seconds: Sequence[dict[str, float]],
    layers: Sequence[tuple[int, int]] = TWO,
    processes: Sequence[Sequence[int]] | None = None,
    values: Any = lambda stage, step: {},
    **flags: Any,
) -> list[tuple[str, str]]:
    """(kind, text) of all advice on a run of 40 steps in which each stage spends these seconds of each."""
    records = [
        record(stage, step, own, **values(stage, step)) for step in range(1, 41) for stage, own in enumerate(seconds)
    ]
    processes = [[stage] for stage in range(len(seconds))] if processes is None else processes
    run = read_run(write_run(folder, records, about(layers, processes, **flags)))
    return [(advice.kind, advice.text) for advice in advise(run)]


def test_the_bottleneck_and_the_split_that_balances(tmp_path: Path) -> None:
    """15 layers at 40 ms each; the last stage also has a head of 300 ms. 19 + 11 layers would be 760 and 740 ms."""
    found = texts(
        tmp_path,
        [
            {"forward": 0.2, "backward": 0.3, "optimizer": 0.1, "wait_send": 0.3},
            {"forward": 0.3, "backward": 0.5, "optimizer": 0.1, "wait_receive": 0.01},
        ],
    )
    assert found == [
        (
            "look",
            "Stage 1 is the bottleneck: it computes for 900 ms in each step, 90% of the time, and the other for 67% of "
            "that. The run is as fast as stage 1.",
        ),
        (
            "do",
            "Try --split 19 instead of 15 to balance the stages: by the measured time of a layer, the busiest stage "
            "would compute for 760 ms in a step instead of 900 ms, which is up to 18% more tokens per second. Each "
            "stage then learns other layers by its own loss, so compare the held-out losses, too.",
        ),
        (
            "good",
            "The queue between the stages is deep enough (--queue_depth 2): the busiest stage waits 1.0% of the time "
            "to receive hidden states.",
        ),
    ]


def test_balanced_stages_need_nothing(tmp_path: Path) -> None:
    found = texts(tmp_path, [{"forward": 0.95}, {"forward": 0.97}])
    assert [kind for kind, _ in found] == ["good"] * 3
    assert found[0][1] == (
        "The stages are balanced: all compute for about as long in a step, the busiest (stage 1) 97% of the time. "
        "There is nothing to change."
    )
    assert "cuts lie where they should" in found[1][1]


def test_a_queue_that_is_too_shallow(tmp_path: Path) -> None:
    found = texts(
        tmp_path,
        [{"forward": 0.6, "wait_send": 0.3}, {"forward": 0.65, "wait_receive": 0.3}],
        queue_depth=3,
    )
    assert any(kind == "do" and "waits 30% of the time to receive" in text for kind, text in found)
    assert any(text.endswith("Try --queue_depth 6.") for _, text in found)


def test_a_link_that_is_too_slow(tmp_path: Path) -> None:
    found = texts(tmp_path, [{"forward": 0.6}, {"forward": 0.65, "wait_receive": 0.3}])
    assert any(kind == "look" and "a deeper queue would not help" in text for kind, text in found)


def test_stages_of_one_process_take_turns(tmp_path: Path) -> None:
    found = texts(tmp_path, [{"forward": 0.3}, {"forward": 0.65}], processes=[[0, 1]])
    assert "take turns" in found[0][1] and len(found) == 1


def test_stages_that_share_processes_are_added_up(tmp_path: Path) -> None:
    seconds = [{"forward": 0.5}, {"forward": 0.45}, {"forward": 0.3}, {"forward": 0.3}]
    layers = [(0, 1), (1, 2), (2, 3), (3, 4)]
    found = texts(tmp_path, seconds, layers=layers, processes=[[0, 1], [2, 3]])
    assert found[0][1].startswith(
        "The process of stages 0, 1 is the bottleneck: it computes for 950 ms in each step, 95%"
    )
    assert not any("--split" in text for _, text in found)


def test_a_loss_that_rises(tmp_path: Path) -> None:
    def values(stage: int, step: int) -> dict[str, float]:
        if stage == 0:
            return {"reconstruction_loss": 1.0 / step if step < 20 else step / 40}
        return {"loss": 3.0 / step}

    found = texts(tmp_path, [{"forward": 0.9}, {"forward": 0.9}], values=values)
    rising = [text for kind, text in found if "rises" in text]
    assert len(rising) == 1 and rising[0].startswith("The reconstruction loss of stage 0 rises: it was 0.0")
    assert rising[0].endswith("A lower --local_learning_rate may help.")


def test_warnings_come_first(tmp_path: Path) -> None:
    """Here of the rate, whatever there is to say of the speed."""
    found = texts(tmp_path, [{"forward": 0.7}, {"forward": 0.9}], learning_rate=1e-4, local_learning_rate=1e-4)
    kinds = [kind for kind, _ in found]
    assert kinds[0] == "warn" and "safe range" in found[0][1] and kinds.count("warn") == 1 and len(kinds) > 2


def test_clipping_and_overhead(tmp_path: Path) -> None:
    found = texts(
        tmp_path,
        [{"forward": 0.7}, {"forward": 0.7}],
        values=lambda stage, step: {"grad_norm": 3.0 if stage == 1 else 0.5},
    )
    assert any(
        "The gradient of stage 1 is clipped in 100% of the steps (--max_grad_norm 1)" in text for _, text in found
    )
    assert not any("gradient of stage 0" in text for _, text in found)
    assert any("At least 30% of the time goes to what is neither" in text for _, text in found)


def test_end_to_end_runs_are_told_as_such(tmp_path: Path) -> None:
    found = texts(tmp_path, [{"schedule": 0.9}, {"schedule": 0.9}])
    assert "1F1B" in found[0][1] and not any("queue" in text for _, text in found)


def test_cuts_of_several_stages() -> None:
    """Layers of 1 s on the first stage, 2 s on the second; the last has layers of 2 s and a head of 6 s."""
    # 4 x 1 + 2 x 2 = 8; 4 x 2 = 8; 2 x 2 + 6 = 10. Of 26 s in all, in parts of whole layers, 8 s each would be too few.
    assert better_cuts([4.0, 8.0, 14.0], [(0, 4), (4, 8), (8, 12)]) == ([6, 10], 10.0)
    assert better_cuts([3.0, 3.0], [(0, 1), (1, 2)]) == ([1], 3.0)
