"""How far a run is, how fast, and how long it still takes."""

import pytest
from synthetic_runs import record

from lopt_pp.metrics.progress import Evaluating, Progress, Speed


def of_step(step: int, wall: float = 2.0, evaluating: float = 0.0) -> list[dict[str, float]]:
    """100 tokens in two seconds."""
    values = {"learning_rate": 2e-5, "grad_norm": 1.25}
    return [
        record(0, step, {}, wall, reconstruction_loss=0.5, **values),
        record(1, step, {"eval": evaluating}, wall, loss=step / 1, **values),
    ]


def speed_of(walls: list[float], evaluating: dict[int, float] | None = None, save_steps: int = 1000) -> Speed:
    speed = Speed(lambda step: step % save_steps == 0)
    for step, wall in enumerate(walls, 1):
        speed.add(step, of_step(step, wall, (evaluating or {}).get(step, 0.0))[-1])
    return speed


@pytest.mark.parametrize(
    ("walls", "evaluating", "save_steps", "seconds"),
    [
        ([30, 2, 2], {}, 1000, 2),  # Much is done before the first.
        ([30, *[8] * 10, *[2] * 20], {}, 1000, 2),  # The last 20.
        ([30, 2, 12, 5, 2], {3: 10}, 1000, 2),  # An evaluation, and the step that waits for another stage's.
        ([30, 2, 2, 9, 2], {}, 3, 2),  # A checkpoint is copied after step 3.
        ([30, 12, 13], {1: 10, 2: 10, 3: 10}, 1000, 3),  # There is none without: the last one, without its evaluation.
        ([30], {}, 1000, 30),
    ],
)
def test_speed_is_of_the_last_steps_without_anything_else(
    walls: list[float], evaluating: dict[int, float], save_steps: int, seconds: float
) -> None:
    speed = speed_of(walls, evaluating, save_steps)
    assert speed.seconds_per_step == seconds and speed.tokens_per_second == pytest.approx(100 / seconds)


def test_before_the_first_step_there_is_no_speed() -> None:
    progress = Progress(["reconstruction_loss", "loss"], 100)
    progress.add(0, of_step(0, 9.0, 9.0))
    assert progress.speed.seconds_per_step is None and progress.speed.tokens_per_second == 0
    assert progress.seconds_left is None and "0/100 [00:00<?]" in progress.bar(79)


def test_lines_and_bar_say_all_there_is() -> None:
    progress = Progress(["reconstruction_loss", "loss"], 3663)
    for step in (1, 2, 3):
        progress.add(step, of_step(step))
    assert progress.line() == (
        "stage 0 reconstruction_loss 0.5 (lr 2e-05, grad_norm 1.25), stage 1 loss 2 (lr 2e-05, grad_norm 1.25), "
        "50 tokens/s, 2:02:00 left"
    )
    bar = progress.bar(79)
    assert len(bar) == 79 and bar.endswith("| 3/3663 [00:00<2:02:00, loss 3, reconstruction 0.5, 50 tokens/s]")
    assert len(progress.bar(30)) <= 30
    progress.add(3663, of_step(3663))
    assert progress.line().endswith("50 tokens/s") and progress.seconds_left == 0


def test_a_stage_without_a_loss_is_left_out() -> None:
    progress = Progress([None, "loss"], 10)
    progress.add(1, [record(0, 1, {}), record(1, 1, {}, loss=1.0)])
    assert progress.line() == "stage 1 loss 1, 100 tokens/s, 00:09 left"
    assert ", loss 1, 100 tokens/s]" in progress.bar(79)


def test_an_evaluation_has_a_bar_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluating = Evaluating()
    monkeypatch.setattr("lopt_pp.metrics.progress.EVALUATING", evaluating)
    progress = Progress(["loss"], 10)
    assert "0/10 [" in progress.bar(79)
    with pytest.raises(KeyError), evaluating:
        assert "0/10 [" in progress.bar(79)  # Nothing is known yet.
        evaluating.done(12, 40)
        assert progress.bar(79).startswith("evaluating |") and "| 12/40 [00:00<" in progress.bar(79)
        raise KeyError
    assert "0/10 [" in progress.bar(79) and evaluating.state() is None
