"""Tries to split every causal language model class that the installed transformers has, with its default config.

    python -m benchmarks.models.families [--output families.json] [--seconds 60] [NAME ...]

For each model type: exact, or the reason why it is refused; whether rows may be packed; and how long the check took.
Default configs differ from those of real models (some cannot even be built), so a refusal here is not a verdict on a
checkpoint; the program checks the config of the one that it is given.
"""

import argparse
import json
import multiprocessing
import time
import warnings
from pathlib import Path

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lopt_pp.errors import LoptError, first_line
from lopt_pp.model.partition import split_evenly
from lopt_pp.model.pretrained import model_class_of
from lopt_pp.model.verify import check_split
from lopt_pp.model.verify_packing import check_packing


def verdict(model_type: str) -> str:
    """`exact`, with the reason why rows may not be packed if so; or the reason for the refusal."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    try:
        config = CONFIG_MAPPING[model_type]()
    except Exception as error:
        return f"it has no default config: {first_line(error)}"
    try:
        model_class = model_class_of(config)
        specs = split_evenly(config.num_hidden_layers, 2)
        structure = check_split(model_class, config, specs)
    except LoptError as error:
        return str(error)
    try:
        check_packing(model_class, config, specs, structure)
    except LoptError as error:
        return f"exact; {error}"
    return "exact"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="model types, such as llama (default: all)")
    parser.add_argument("--seconds", type=float, default=60, help="longest time for one of them")
    parser.add_argument("--output", type=Path, default=Path("families.json"))
    arguments = parser.parse_args()

    results: dict[str, dict[str, str | float]] = {}
    context = multiprocessing.get_context("fork")
    for model_type in arguments.names or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        begun = time.perf_counter()
        # A pool of one for each, so that one which takes too long can be ended.
        with context.Pool(1) as pool:
            try:
                result = pool.apply_async(verdict, (model_type,)).get(arguments.seconds)
            except multiprocessing.TimeoutError:
                result = f"its default config is too large to try in {arguments.seconds:g} s"
        seconds = time.perf_counter() - begun
        results[model_type] = {"result": result, "seconds": round(seconds, 2)}
        print(f"{model_type:<28} {seconds:6.1f} s  {result}", flush=True)
    exact = [entry["result"] for entry in results.values() if str(entry["result"]).startswith("exact")]
    packed = exact.count("exact")
    print(
        f"{len(exact)} of {len(results)} split exactly, {packed} of them may pack rows; "
        f"transformers {transformers.__version__}"
    )
    arguments.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
