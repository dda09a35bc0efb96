"""`lopt-pp generate`: prints what a model answers."""

import shutil
from pathlib import Path

import pytest
import torch
from tiny import InputsWith
from transformers import AutoModelForCausalLM, AutoTokenizer

import lopt_pp.cli
from lopt_pp.config.parser import parse_config
from lopt_pp.distributed.world import connect
from lopt_pp.training.run import run


@pytest.fixture(scope="module")
def out(inputs_with: InputsWith, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of a run, with a checkpoint. The pretrained model's end of text is not its tokenizer's."""
    inputs = inputs_with(eos_token_id=1)
    folder = tmp_path_factory.mktemp("generate")
    given = (
        f"--model_name_or_path {inputs / 'model'} --train_file {inputs / 'rows.jsonl'} --output_dir {folder / 'out'}"
    )
    config = parse_config([*given.split(), *["--max_steps", "30", "--save_steps", "20", "--learning_rate", "1e-2"]])
    with connect(config.pipeline) as world:
        assert run(config, world)
    return folder / "out"


def generate(*arguments: object) -> int:
    return lopt_pp.cli.main(["generate", *map(str, arguments), "--device", "cpu", "--max_new_tokens", "8"])


def expected(path: Path, prompt: str, system: str | None = None, raw: bool = False) -> str:
    """The likeliest answer, token by token."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    text = prompt if raw else tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(text, add_special_tokens=False)
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + 8 and (len(ids) == start or ids[-1] != tokenizer.eos_token_id):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return str(tokenizer.decode(ids[start:], skip_special_tokens=True))


def test_it_prints_the_likeliest_answer(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(out, "--prompt", "what is 1 + 2?") == 0
    answer = expected(out, "what is 1 + 2?")
    assert answer.strip(), "nothing was answered: the comparison would prove nothing"
    assert capsys.readouterr().out == answer + "\n"


def test_it_stops_where_the_tokenizer_ends_a_text(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.config.eos_token_id == 2 and model.generation_config.eos_token_id == [2, 1]
    text = "<|im_start|>user\nwhat is 1 + 2?<|im_end|>\n<|im_start|>assistant\n"
    prompt = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    answer = model.generate(prompt, max_new_tokens=20, do_sample=False)[0, prompt.shape[1] :]  # type: ignore[misc]
    assert answer[-1] == tokenizer.eos_token_id and len(answer) < 20


def test_several_prompts_are_told_apart(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(out, "--prompt", "what is 7?", "what is 12?", "--system", "add") == 0
    answers = [f"> {prompt}\n{expected(out, prompt, 'add')}\n" for prompt in ("what is 7?", "what is 12?")]
    assert capsys.readouterr().out == "".join(answers)


def test_a_raw_prompt_is_gone_on_from(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(out, "--prompt", "what is 7", "--raw") == 0
    assert capsys.readouterr().out == expected(out, "what is 7", raw=True) + "\n"


def test_a_checkpoint_answers_as_its_model(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert lopt_pp.cli.main(["export", str(out / "checkpoint-20"), str(tmp_path / "exported")]) == 0
    capsys.readouterr()
    for given, said in [
        (out, f"{out} is a model already"),
        (out / "checkpoint-20", f"{tmp_path / 'exported'} already"),
    ]:
        assert lopt_pp.cli.main(["export", str(given), str(tmp_path / "exported")]) == 1
        assert capsys.readouterr().err.startswith(f"lopt-pp: error: {said}")
    assert generate(out / "checkpoint-20", "--prompt", "what is 7?") == 0
    assert capsys.readouterr().out == expected(tmp_path / "exported", "what is 7?") + "\n"
    assert [path.name for path in tmp_path.iterdir()] == ["exported"], "what was made for it is left behind"


def test_a_checkpoint_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = tmp_path / "out" / "checkpoint-7"
    assert lopt_pp.cli.main(["export", str(gone), str(tmp_path / "exported")]) == 1
    assert capsys.readouterr().err == f"lopt-pp: error: {gone}: no such directory\n"
    assert generate(gone, "--prompt", "hello") == 1
    assert capsys.readouterr().err == f"lopt-pp: error: {gone}: no such directory\n"
    assert not (tmp_path / "exported").exists()


def test_drawing_depends_on_the_seed_alone(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = []
    for seed in (0, 0, 1, 2, 3):
        assert generate(out, "--prompt", "what is 7?", "--temperature", 5, "--seed", seed) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] and len(set(answers)) > 1


def test_mistakes_are_one_line(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "bare").mkdir()
    shutil.copy(out / "config.json", tmp_path / "bare")
    for arguments, error in [
        ((tmp_path, "--prompt", "hello"), f"{tmp_path} has no model"),
        (
            (tmp_path / "run", "--prompt", "hello"),
            f"{tmp_path / 'run'} has no model; it has a checkpoint, {tmp_path / 'run' / 'checkpoint-5'}",
        ),
        ((tmp_path / "nothing", "--prompt", "hello"), f"{tmp_path / 'nothing'}: "),
        ((tmp_path / "bare", "--prompt", "hello"), f"{tmp_path / 'bare'}: there is no tokenizer beside the model ("),
        ((out, "--prompt", "hello", "--raw", "--system", "add"), "--system needs a chat template, which --raw leaves"),
        ((out, "--prompt", "", "--raw"), "--prompt is empty: there is nothing to go on from"),
    ]:
        assert generate(*arguments) == 1
        problem = capsys.readouterr().err
        assert problem.startswith(f"lopt-pp: error: {error}") and problem.count("\n") == 1


@pytest.mark.parametrize("flags", ["", "--prompt a --temperature -1", "--prompt a --top_p 0", "--prompt a --device x"])
def test_unusable_flags(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        lopt_pp.cli.main(["generate", "a-model", *flags.split()])
    assert left.value.code == 2
    assert "lopt-pp generate: error: " in capsys.readouterr().err
