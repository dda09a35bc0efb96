"""`lopt-pp` finds the user's own code and files where `python -m` finds them, and trains the same weights with them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launching import HELPERS, run, torchrun
from results import weights
from tiny import write_model, write_rows

OBJECTIVE = (HELPERS / "own_objective.py").read_text()

MAPPING = """\
import my_words

def shout(row):
    import my_marks
    return {"prompt": my_words.start + row["ask"], "completion": row["reply"] + my_marks.end}
"""

MODEL = """\
import my_words
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""

TEMPLATE = """\
{% for message in messages %}{{ '<|im_start|>' + message['content'] + '<|im_end|>' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"""

OBJECTIVE_FLAGS = ["--local_objective", "my_objectives:TokenItself"]
MAPPING_FLAGS = ["--train_file", "asked.jsonl", "--dataset_mapping", "my_rows:shout", "--dataset_num_proc", "2"]
OWN = {
    "objective": OBJECTIVE_FLAGS,
    "mapping and model": [*MAPPING_FLAGS, "--model_name_or_path", "own_model", "--trust_remote_code"],
    "files": ["--config", "run.yaml", "--chat_template_path", "my_template.jinja"],
}
"""The flags that take what is the user's own."""

COMMON = "--max_steps 2 --per_device_train_batch_size 2 --learning_rate 1e-3 --num_stages 2 --backend gloo"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's directory, where a run is started."""
    folder = tmp_path_factory.mktemp("project")
    modules = {"my_objectives": OBJECTIVE, "my_rows": MAPPING}
    modules |= {"my_words": "start = 'say '\n", "my_marks": "end = '?'\n"}
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)
    (folder / "my_template.jinja").write_text(TEMPLATE)
    for name in ("model", "own_model"):
        write_model(folder / name, num_hidden_layers=2)
    (folder / "own_model" / "own.py").write_text(MODEL)
    config = json.loads((folder / "own_model" / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (folder / "own_model" / "config.json").write_text(json.dumps(config))
    rows = [json.loads(line) for line in write_rows(folder / "rows.jsonl", 8).read_text().splitlines()]
    asked = [{"ask": row["question"], "reply": row["answer"]} for row in rows]
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    flags = "model_name_or_path: model\ntrain_file: rows.jsonl\nlocal_objective: my_objectives:TokenItself\n"
    (folder / "run.yaml").write_text(flags)
    return folder


@pytest.fixture(scope="module")
def console_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an installer makes of the entry point: a script whose own directory is on the path, and not the user's."""
    script = tmp_path_factory.mktemp("bin") / "lopt-pp"
    text = f"#!{sys.executable}\nimport sys\nfrom lopt_pp.cli import main\nif __name__ == '__main__':\n"
    script.write_text(text + "    sys.exit(main())\n")
    script.chmod(0o755)
    return script


def succeed(folder: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs a command in the user's directory. Rows that another has encoded are not there for it."""
    cache = folder / f"cache-{len(list(folder.glob('cache-*')))}"
    cache.mkdir()
    result = run(["env", f"HF_DATASETS_CACHE={cache}", *command], cwd=folder)
    assert result.returncode == 0, result.stderr
    return result


def flags_with(own: list[str]) -> list[str]:
    given = {"--model_name_or_path": "model", "--train_file": "rows.jsonl"} if "--config" not in own else {}
    return [*COMMON.split(), *(word for pair in given.items() if pair[0] not in own for word in pair), *own]


def check_same(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    records = (one / "metrics.jsonl").read_text().splitlines()
    assert len(records) == 4


@pytest.mark.parametrize("what", OWN)
def test_both_forms_train_the_same_weights(what: str, folder: Path, console_script: Path) -> None:
    flags = flags_with(OWN[what])
    script, module = folder / f"{what}, script", folder / f"{what}, module"
    succeed(folder, [str(console_script), "train", *flags, "--output_dir", str(script)])
    succeed(folder, [sys.executable, "-m", "lopt_pp.train", *flags, "--output_dir", str(module)])
    check_same(script, module)


def test_both_forms_train_the_same_weights_in_two_processes(folder: Path, console_script: Path) -> None:
    own = [word for what in ("mapping and model", "objective") for word in OWN[what]]
    script, module = folder / "processes, script", folder / "processes, module"
    flags = flags_with(own)
    command = torchrun(2, "--no-python", str(console_script), "train", *flags, "--output_dir", str(script))
    succeed(folder, command)
    succeed(folder, torchrun(2, "-m", "lopt_pp.train", *flags, "--output_dir", str(module)))
    check_same(script, module)


def test_processes_that_inherit_no_modules_find_the_users_code(
    folder: Path, console_script: Path, tmp_path: Path
) -> None:
    """Rows are encoded in processes that are forked from this one, but not by every version of Python.

    A library has the name of the user's module, and is what the path alone would lead them to.
    """
    (tmp_path / "my_rows.py").write_text("def shout(row):\n    raise ValueError('a library')\n")
    start = (
        f"    import multiprocess\n    multiprocess.set_start_method('spawn')\n    sys.path.insert(1, '{tmp_path}')\n"
    )
    spawning = console_script.with_name("spawning")
    spawning.write_text(console_script.read_text().replace("    sys.exit", start + "    sys.exit"))
    spawning.chmod(0o755)
    flags = flags_with(MAPPING_FLAGS)
    spawned, forked = folder / "spawned", folder / "forked"
    succeed(folder, [str(spawning), "train", *flags, "--output_dir", str(spawned)])
    succeed(folder, [str(console_script), "train", *flags, "--output_dir", str(forked)])
    check_same(spawned, forked)


def test_other_commands_find_the_users_code(folder: Path, console_script: Path) -> None:
    flags = ["model", *OBJECTIVE_FLAGS, "--num_stages", "2", "--max_length", "16", "--json"]
    planned = json.loads(succeed(folder, [str(console_script), "plan", *flags]).stdout)
    assert planned["local_objective"] == "my_objectives:TokenItself" and len(planned["stages"]) == 2
    wrong = (folder / "run.yaml").read_text().replace("TokenItself", "Gone") + "output_dir: out\n"
    (folder / "wrong.yaml").write_text(wrong)
    submitted = run([str(console_script), "submit", "wrong.yaml", "--gpus-per-node", "2", "--dry-run"], cwd=folder)
    assert submitted.returncode == 2 and submitted.stdout == ""
    assert submitted.stderr == "lopt-pp: error: --local_objective my_objectives:Gone: my_objectives has no Gone\n"
    rows = ["--train_file", "rows.jsonl", "--split", "1", "--auxiliary_layers", "1", "--limit", "1"]
    found = succeed(folder, [str(console_script), "auxiliary", "own_model", "--trust_remote_code", *rows])
    assert found.stdout.endswith("--auxiliary_choice 1\n")
    evaluate = ["evaluate", "own_model", "--trust_remote_code", "--eval_file", "rows.jsonl", "--limit", "1"]
    assert "perplexity" in succeed(folder, [str(console_script), *evaluate]).stdout
