"""What goes to the hub, from runs and by `lopt-pp push`; a stand-in of the hub in `hub_server.py` takes it."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml
from hub_server import Hub
from huggingface_hub import ModelCard, constants
from in_process import contents, train
from launching import environment, torchrun
from tiny import write_inputs
from transformers import AutoModelForCausalLM, AutoTokenizer

import lopt_pp.cli
from lopt_pp import Trainer
from lopt_pp.config.parser import parse_config
from lopt_pp.errors import LoptError
from lopt_pp.hub.published import model_files
from lopt_pp.hub.repository import PushError

DESCRIPTION = {"README.md", "chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json"}
MODEL = DESCRIPTION | {
    "tokenizer_config.json",
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
}
CHECKPOINT = DESCRIPTION - {"README.md"} | {
    "tokenizer_config.json",
    "manifest.json",
    "stage-00000-of-00002.safetensors",
    "stage-00001-of-00002.safetensors",
}
PLACE = "a-secret-place"
"""In the path of everything that the runs here read and write."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says itself where it was, with rows, at a place with a name of its own."""
    folder = write_inputs(tmp_path_factory.mktemp(PLACE))
    for name, key in (("config.json", "_name_or_path"), ("tokenizer_config.json", "name_or_path")):
        path = folder / "model" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: str(folder / "model")}))
    card = "---\nlicense: other\nlicense_name: a-license\nbase_model: an-org/a-model\n---\n# A model\n"
    (folder / "model" / "README.md").write_text(card)
    return folder


@pytest.fixture(scope="module")
def out(inputs: Path) -> Path:
    """The output directory of a run that was pushed nowhere, with two checkpoints and a report."""
    train(inputs, inputs / "out", "--max_steps 4 --save_steps 2 --eval_split_size 5 --report_to none")
    (inputs / "out" / "report.html").write_text("A report.")
    return inputs / "out"


def files(hub: Hub, name: str, branch: str = "main") -> set[str]:
    return hub.files(name, branch).keys() - {".gitattributes"}


def test_the_model_is_pushed_and_nothing_else(
    out: Path, hub: Hub, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    before = contents(out)
    assert lopt_pp.cli.main(["push", str(out), "--hub_model_id", "name", "--hub_private_repo", "true"]) == 0
    assert capsys.readouterr().out == f"the model is at {hub.address}/someone/name\n"
    assert {name: (out / name).read_bytes() for name in MODEL} == {
        name: hub.files("someone/name")[name] for name in files(hub, "someone/name")
    }
    assert hub.private == {"someone/name"} and hub.commits == [("someone/name", "Upload model")]
    assert any(request.startswith("PUT /blobs/") for request in hub.requests), "no large file went its own way"
    assert "public" not in caplog.text
    assert contents(out) == before


def test_the_same_again_makes_no_commit_and_other_shards_leave_none_of_these(
    out: Path, hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor does it make private what is public, and says so."""
    again = ["push", str(out), "--hub_model_id", "a-team/name"]
    assert lopt_pp.cli.main(again) == lopt_pp.cli.main([*again, "--hub_private_repo", "true"]) == 0
    assert len(hub.commits) == 1 and not hub.private
    said = [record.getMessage() for record in caplog.records if record.name.startswith("lopt_pp")]
    assert len(said) == 1 and said[0].startswith("a-team/name was there before, and is public: --hub_private_repo")
    AutoModelForCausalLM.from_pretrained(out).save_pretrained(tmp_path)
    hub.files("a-team/name")["notes.md"] = b"The owner's own."
    assert lopt_pp.cli.main(["push", str(tmp_path), "--hub_model_id", "a-team/name"]) == 0
    weights = {name for name in files(hub, "a-team/name") if "safetensors" in name}
    assert weights == {"model.safetensors"} and "notes.md" in files(hub, "a-team/name")


def test_checkpoints_go_where_they_are_asked_for(out: Path, hub: Hub) -> None:
    command = ["push", str(out), "--hub_model_id", "name", "--hub_strategy"]
    assert lopt_pp.cli.main([*command, "checkpoint"]) == 0
    last = {f"last-checkpoint/{name}" for name in CHECKPOINT}
    assert files(hub, "someone/name") == MODEL | last
    assert json.loads(hub.files("someone/name")["last-checkpoint/manifest.json"])["step"] == 4
    assert lopt_pp.cli.main([*command, "all_checkpoints", "--hub_revision", "all"]) == 0
    folders = ("last-checkpoint", "checkpoint-2", "checkpoint-4")
    assert files(hub, "someone/name", "all") == MODEL | {f"{f}/{name}" for f in folders for name in CHECKPOINT}
    assert files(hub, "someone/name") == MODEL | last


def test_the_model_of_a_checkpoint_is_pushed(out: Path, hub: Hub, tmp_path: Path) -> None:
    assert lopt_pp.cli.main(["push", str(out / "checkpoint-2"), "--hub_model_id", "half"]) == 0
    assert files(hub, "someone/half") == MODEL
    for name, content in hub.files("someone/half").items():
        (tmp_path / name).write_bytes(content)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters() > 0
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template


@pytest.mark.slow
def test_a_run_pushes_its_model_at_the_end_and_names_no_place(
    inputs: Path, hub: Hub, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token of the flag is used, and is in no file; nothing that is published knows the machine."""
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("socket.gethostname", lambda: "a-secret-host")
    caplog.set_level("INFO", logger="lopt_pp")
    more = "--max_steps 4 --save_steps 2 --eval_split_size 5 --push_to_hub --hub_token hf_writes"
    train(inputs, inputs / "pushed", f"{more} --hub_strategy all_checkpoints --hub_always_push")
    assert caplog.messages[-1] == f"the model is at {hub.address}/someone/pushed"
    folders = [f"checkpoint-{step}" for step in (2, 4)]
    published = hub.files("someone/pushed")
    assert files(hub, "someone/pushed") == MODEL | {f"{folder}/{name}" for folder in folders for name in CHECKPOINT}
    assert [message for _, message in hub.commits] == [
        "Training in progress, step 2, checkpoint after step 2",
        "Training in progress, step 2",
        "Checkpoint after step 4",
        "End of training",
    ]
    written = contents(inputs / "pushed")
    assert "a-secret-host" in written["run.json"].decode(), "the name is not that of this machine"
    for name, content in published.items():
        for word in (PLACE, "a-secret-host", os.uname().nodename if len(os.uname().nodename) > 4 else PLACE):
            assert word.encode() not in content, (name, word)
    for name, content in [*written.items(), *published.items(), ("the log", caplog.text.encode())]:
        assert b"hf_writes" not in content, name
    assert not list((inputs / "pushed").glob(".*")), "something unfinished is left"


def test_the_head_of_the_card(out: Path) -> None:
    card = ModelCard.load(out / "README.md")
    assert card.data.to_dict() == {
        "base_model": "an-org/a-model",
        "library_name": "transformers",
        "license": "other",
        "license_name": "a-license",
        "pipeline_tag": "text-generation",
        "tags": ["lopt-pp", "sft", "lopt"],
    }
    assert "Trained: 352 tokens in 0 min " in card.text and " on 1 x CPU, 1 thread\n" in card.text


def test_a_push_that_fails_loses_nothing(inputs: Path, hub: Hub) -> None:
    """The run says so, and how to push later; when it is started again, it pushes."""
    hub.failing = "/commit/"
    more, out = (
        "--max_steps 2 --save_steps 0 --push_to_hub --hub_model_id a-team/it --hub_revision new",
        inputs / "fails",
    )
    with pytest.raises(PushError) as error:
        train(inputs, out, more)
    begin = f"the model is in {out}, but it could not be pushed to a-team/it: "
    end = f"; to push it later: lopt-pp push {out} --hub_model_id a-team/it --hub_revision new"
    assert str(error.value).startswith(begin) and str(error.value).endswith(end) and "\n" not in str(error.value)
    assert AutoModelForCausalLM.from_pretrained(out).num_parameters() > 0
    assert files(hub, "a-team/it", "new") == set()
    hub.failing = None
    assert train(inputs, out, f"{more} --resume_from_checkpoint latest")
    assert files(hub, "a-team/it", "new") == MODEL


def test_large_files_that_cannot_be_stored(out: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.failing = "/objects/batch"
    assert lopt_pp.cli.main(["push", str(out), "--hub_model_id", "name"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("lopt-pp: error: someone/name: ") and said.count("\n") == 1
    assert files(hub, "someone/name") == set(), "half a model is there"


@pytest.mark.parametrize(
    ("flags", "token", "error"),
    [
        ("", None, "--push_to_hub: you are not logged in to the hub: `hf auth login`, or set HF_TOKEN"),
        ("", "hf_unknown", "--push_to_hub: the hub does not accept the token (401); log in anew: `hf auth login`"),
        ("", "hf_reads", "--push_to_hub: the token of someone may only read; make one that may write: https://"),
        ("--hub_token hf_unknown", "hf_writes", "--push_to_hub: the hub does not accept the token (401)"),
        ("--hub_model_id others/name", "hf_writes", "--push_to_hub: others/name: the token may not write there (403)"),
        (
            "--hub_model_id a-team/shown",
            "hf_writes",
            "--push_to_hub: a-team/shown: the token may not write there (403)",
        ),
        ("--hub_model_id=-name", "hf_writes", "--hub_model_id -name: "),
    ],
)
def test_who_may_not_push_hears_so_before_the_first_step(
    flags: str, token: str | None, error: str, inputs: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["a-team/shown"] = {"main": {}}
    hub.forbidden.add("a-team/shown")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(LoptError) as refused:
        train(inputs, tmp_path / "out", f"--max_steps 2 --push_to_hub {flags}")
    assert str(refused.value).startswith(error) and "\n" not in str(refused.value)
    assert hub.commits == [] and not list((tmp_path / "out").glob("*"))


def test_without_the_hub(
    inputs: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(LoptError, match=r"^--push_to_hub: http://127.0.0.1:9 cannot be reached: .*[Rr]efused"):
        train(inputs, tmp_path / "out", "--max_steps 2 --push_to_hub")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(LoptError, match=r"^--push_to_hub: HF_HUB_OFFLINE is set, so the hub is not asked: unset it;"):
        train(inputs, tmp_path / "out", "--max_steps 2 --push_to_hub")
    assert lopt_pp.cli.main(["push", str(tmp_path), "--hub_model_id", "name"]) == 1
    assert capsys.readouterr().err.startswith(f"lopt-pp: error: {tmp_path} has no model to push; give the output dir")
    assert lopt_pp.cli.main(["push", str(inputs / "model"), "--hub_model_id", "name"]) == 1
    assert capsys.readouterr().err == "lopt-pp: error: HF_HUB_OFFLINE is set, so the hub is not asked: unset it\n"
    assert hub.requests == []


def test_all_files_of_a_model_are_published(out: Path) -> None:
    """What a run writes of a model, and none of what else it leaves."""
    assert set(model_files(out)) == MODEL
    others = {path.name for path in out.iterdir()} - MODEL
    assert others == {"checkpoint-2", "checkpoint-4", "metrics.jsonl", "report.html", "run.json", "state.json"}


def test_the_token_is_not_among_the_flags() -> None:
    line = "--model_name_or_path m --train_file r --output_dir o --hub_token hf_writes"
    config = parse_config(line.split())
    assert config.hub.hub_token == "hf_writes" and "hub_token" not in config.flags()
    assert "hf_writes" not in yaml.safe_dump(config.flags())


@pytest.mark.slow
def test_processes_end_with_a_status_that_says_that_nothing_was_pushed(inputs: Path, tmp_path: Path, hub: Hub) -> None:
    """As a user starts them, by the real environment variables; what fails is the last of the hub's answers."""
    hub.failing = "/commit/"
    flags = ["--model_name_or_path", str(inputs / "model"), "--train_file", str(inputs / "rows.jsonl")]
    flags += ["--output_dir", str(tmp_path / "out"), "--max_steps", "2", "--save_steps", "0", "--push_to_hub"]
    command = torchrun(2, "-m", "lopt_pp.train", *flags)
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)
    errors = [line for line in ended.stderr.splitlines() if line.startswith("lopt-pp: error: ")]
    assert ended.returncode != 0 and len(errors) == 1, ended.stderr
    assert "HTTP Request" not in ended.stderr, "a library tells of its requests"
    assert f"the model is in {tmp_path / 'out'}, but it could not be pushed to someone/out: " in errors[0]
    hub.failing = None
    assert lopt_pp.cli.main(errors[0].partition("later: lopt-pp ")[2].split()) == 0
    assert files(hub, "someone/out") == MODEL


def test_a_trainer_pushes_its_model(inputs: Path, hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    """With the arguments that scripts for TRL give."""
    args = {"output_dir": inputs / "by-trainer", "hub_model_id": "a-team/it", "max_steps": 1, "save_steps": 0}
    trainer = Trainer(inputs / "model", args | {"train_file": inputs / "rows.jsonl"})
    with pytest.raises(LoptError, match=r"--output_dir .*/by-trainer has no trained model to push; train\(\) puts it"):
        trainer.push_to_hub()
    assert trainer.train() and not hub.requests
    assert trainer.push_to_hub(dataset_name="a-data-set") == f"{hub.address}/a-team/it"
    assert files(hub, "a-team/it") == MODEL and hub.commits == [("a-team/it", "End of training")]
    assert "push_to_hub: of no effect here: dataset_name; the run has written its model card" in caplog.text
    with pytest.raises(LoptError, match="the hub does not accept the token"):
        trainer.push_to_hub(token="hf_unknown")
    trainer.push_to_hub("Once more", blocking=False, revision="next", private=True)
    assert files(hub, "a-team/it", "next") == MODEL
