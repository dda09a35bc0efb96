"""The `lopt-pp` command."""

import argparse
import difflib
import importlib
import os
import select
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version

from lopt_pp.errors import LoptError, UsageError
from lopt_pp.util.console import open_streams, print_error

_DESCRIPTION = """\
Pipeline-parallel post-training of language models by local learning.

commands:
  train      post-train a model: lopt-pp train run.yaml, or with flags (lopt-pp train --help lists them)
  export     make the ordinary model of a checkpoint: lopt-pp export OUTPUT_DIR/checkpoint-500 MODEL
  generate   see what a model or a checkpoint answers: lopt-pp generate MODEL --prompt "What is 1 + 2?"
  chat       talk to a model or a checkpoint in the terminal: lopt-pp chat MODEL
  push       publish a model on the Hugging Face Hub: lopt-pp push OUTPUT_DIR --hub_model_id NAME
  evaluate   compare models on rows and benchmarks, before and after: lopt-pp evaluate MODEL --before BASE --tasks gsm8k
  plan       say what a run will need, from the config alone: lopt-pp plan run.yaml, or MODEL FLAGS
  auxiliary  find the layers that an auxiliary network is best made of: lopt-pp auxiliary MODEL --train_file FILE
  check      try whether runs will be right and fast on this machine or Slurm allocation: lopt-pp check
  submit     put a run into the queue of a Slurm cluster: lopt-pp submit run.yaml --nodes 2 --gpus-per-node 4
  recipe     print a run to start from: lopt-pp recipe two_gpus > run.yaml (lopt-pp recipe lists them)
  report     make a page on a run, with curves, timeline and advice: lopt-pp report OUTPUT_DIR; --serve: while it runs
  compare    make a page that overlays several runs: lopt-pp compare OUTPUT_DIR OUTPUT_DIR ...
  env        say what a bug report needs of this machine, versions, devices and links: lopt-pp env
  completion have a shell complete commands, flags and files: eval "$(lopt-pp completion bash)"
"""

_MODULES = {
    "train": "lopt_pp.commands.train",
    "export": "lopt_pp.commands.export",
    "generate": "lopt_pp.commands.generate",
    "chat": "lopt_pp.commands.chat",
    "push": "lopt_pp.commands.push",
    "evaluate": "lopt_pp.commands.evaluate",
    "plan": "lopt_pp.commands.plan",
    "auxiliary": "lopt_pp.commands.auxiliary",
    "check": "lopt_pp.commands.check",
    "submit": "lopt_pp.commands.submit",
    "recipe": "lopt_pp.commands.recipe",
    "report": "lopt_pp.commands.report",
    "compare": "lopt_pp.commands.compare",
    "env": "lopt_pp.commands.env",
    "completion": "lopt_pp.commands.completion",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command, says why it cannot go on where it raises a `LoptError`, and takes Ctrl-C for its end.

    Returns:
        The exit status: the command's; after an error 1, or 2 where it is a mistake in the flags; after Ctrl-C 130.
    """
    parser = argparse.ArgumentParser(
        "lopt-pp",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="lopt-pp COMMAND FLAGS",
    )
    parser.add_argument("--version", action="version", version=version("lopt-pp"))
    parser.add_argument("command", choices=_MODULES, help=argparse.SUPPRESS)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    open_streams()
    if not arguments:
        parser.print_help(sys.stderr)
        return 2
    if not arguments[0].startswith("-") and arguments[0] not in _MODULES:
        parser.exit(2, f"lopt-pp: error: invalid choice: '{arguments[0]}'; {_hint(arguments[0])}\n")
    command = parser.parse_args(arguments[:1]).command
    try:
        # Late, so that --help does not wait for torch.
        status: int = importlib.import_module(_MODULES[command]).main(arguments[1:])
        sys.stdout.flush()
    except LoptError as error:
        print_error(str(error))
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        if not _has_lost_its_reader(sys.stdout.fileno()):
            raise
        # Whoever reads has seen enough, as `head` has. Python would print an error at its end, where it flushes again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return status


def _hint(word: str) -> str:
    """What somebody may have meant by a word that is not a command."""
    if word.endswith((".yaml", ".yml")):
        return f"lopt-pp train {word} trains"
    close = ["train"] if word == "sft" else difflib.get_close_matches(word, _MODULES, n=1)
    return f"did you mean {close[0]}?" if close else "lopt-pp --help lists the commands"


def _has_lost_its_reader(pipe: int) -> bool:
    """Whether nobody reads any longer what is written to a pipe."""
    poll = select.poll()
    poll.register(pipe, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


if __name__ == "__main__":
    sys.exit(main())
