"""A run that is asked to finish early ends as if fewer steps had been planned, and is finished; in every layout.

Before, each is asked to evaluate and to save, which it does after a step that no flag names.
"""

import json
from pathlib import Path

import pytest
from evaluated import LAYOUTS, eval_losses, flags, plain_loss, records, run_of, same, train, write_files
from finishing import asking_to_finish
from in_process import contents
from ranks import to_the_end
from results import weights
from test_evaluation import saved_weights

from lopt_pp.checkpoint.output_dir import STOPPED, complete_checkpoints, model_origin
from lopt_pp.errors import LoptError

STEPS = 20
CHOSEN = ("one process", "three stages on two", "frozen", "replicas", "sharded", "end to end")
AGAIN = "--resume_from_checkpoint latest"
MORE = f"--max_steps {STEPS} --eval_steps 0 --save_steps 1000 --lr_scheduler_type constant"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, rows, and a run of every layout that was asked for both, the first when its third step was reported."""
    folder = tmp_path_factory.mktemp("finishing")
    write_files(folder)
    cases = []
    for layout in CHOSEN:
        processes, own = LAYOUTS[layout]
        given = arguments(folder, run_of(folder, "finished", layout), own)
        if processes == 1:
            with asking_to_finish(3):
                train(given)
        else:
            cases.append({"name": layout, "flags": given, "finish": 3})
    (folder / "cases.json").write_text(json.dumps(cases))
    to_the_end(folder / "log", 2, [str(folder / "cases.json")], module="worker")
    return folder


def arguments(files: Path, out: Path, more: str = "") -> list[str]:
    return flags(files, out, f"{MORE} --eval_file {files / 'held_out.jsonl'} {more}")


@pytest.mark.parametrize("layout", CHOSEN)
def test_it_ends_as_with_fewer_steps(files: Path, layout: str) -> None:
    """With the evaluation that comes after a last step, its model and its checkpoint."""
    out = run_of(files, "finished", layout)
    besides, steps = eval_losses(out)
    assert 3 < besides < steps == records(out)[-1]["step"] < STEPS
    assert eval_losses(out)[steps] == pytest.approx(plain_loss(out, files / "held_out.jsonl"), rel=1e-5)
    assert [path.name for path in complete_checkpoints(out)] == [f"checkpoint-{steps}", f"checkpoint-{besides}"]
    assert not same(weights(out), saved_weights(out / f"checkpoint-{besides}"))
    assert same(weights(out), saved_weights(out / f"checkpoint-{steps}"))
    assert not (out / STOPPED).exists()


def test_the_weights_are_those_of_a_run_that_was_planned_so(files: Path, tmp_path: Path) -> None:
    out = run_of(files, "finished", "three stages on two")
    train(arguments(files, tmp_path / "out", f"--num_stages 3 --max_steps {records(out)[-1]['step']}"))
    assert same(weights(out), weights(tmp_path / "out"))


def test_it_says_how_many_steps_were_made_and_why(files: Path) -> None:
    out = run_of(files, "finished", "sharded")
    steps = records(out)[-1]["step"]
    assert f"Optimizer steps: {steps} of {STEPS}; finished early: that is enough\n" in (out / "README.md").read_text()
    about = json.loads((out / "run.json").read_text())
    assert about["finished_early"] == {"step": steps, "reason": "that is enough"}
    origin = model_origin(out)
    assert origin is not None and origin.how_far == f"{steps} of {STEPS} steps (that is enough)"


def test_started_again_it_is_finished(files: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="lopt_pp")
    out = run_of(files, "finished", "one process")
    before, steps = contents(out), records(out)[-1]["step"]
    train(arguments(files, out, f"--num_stages 2 {AGAIN}"))
    assert f"has its model, after {steps} of {STEPS} steps (that is enough); --overwrite_output_dir goes" in caplog.text
    assert contents(out) == before
    with pytest.raises(LoptError, match=rf"holds the run's model after {steps} of {STEPS} steps \(that is enough\), "):
        train(arguments(files, out, f"--num_stages 2 {AGAIN} --max_steps 19"))


def test_it_goes_on_where_it_is_told_to(files: Path) -> None:
    out = run_of(files, "finished", "replicas")
    before = list(eval_losses(out))
    train(arguments(files, out, f"--num_stages 2 {AGAIN} --max_steps {STEPS + 1} --per_device_train_batch_size 6"))
    assert [*eval_losses(out)] == [*before, STEPS + 1] and "finished_early" not in (out / "run.json").read_text()
    assert f"Optimizer steps: {STEPS + 1}\n" in (out / "README.md").read_text()
