"""All of a model but its weights: config, tokenizer, generation settings; of the pretrained one, and of the result."""

import contextlib
import copy
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils import logging as transformers_logging

from lopt_pp.config.model import ModelConfig
from lopt_pp.errors import LoptError, first_line
from lopt_pp.model.location import explain
from lopt_pp.model.on_hub import check_named
from lopt_pp.model.special_tokens import align_special_tokens
from lopt_pp.model.vocabulary import with_tokens
from lopt_pp.util.compat_transformers import attention_of, find_file
from lopt_pp.util.user_code import search_current_directory


def load_model_config(config: ModelConfig) -> PreTrainedConfig:
    """The pretrained model's config.

    Raises:
        LoptError: there is none, or it needs code of its own that the user has not allowed; or what is there is not a
            whole model of `transformers`, such as an adapter.
    """
    check_named(config)
    if config.trust_remote_code:
        search_current_directory()  # The model's code may import modules of the user's.
    try:
        return AutoConfig.from_pretrained(
            config.model_name_or_path,
            revision=config.model_revision,
            trust_remote_code=config.trust_remote_code,
            **({"attn_implementation": config.attn_implementation} if config.attn_implementation else {}),
        )
    except (
        Exception
    ) as error:  # A config is a class that is called with whatever the file holds: anything may go wrong.
        if "trust_remote_code" in str(error):
            raise LoptError(
                f"--model_name_or_path {config.model_name_or_path} comes with Python code of its own, which is not run "
                f"unless you give --trust_remote_code; read it first"
            ) from error
        reason = explain(config.model_name_or_path, first_line(error))
        raise LoptError(f"--model_name_or_path {config.model_name_or_path}: {reason}") from error


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The pretrained model's tokenizer, with the tokens that the flags name.

    Raises:
        LoptError: there is none, or a token is not in its vocabulary; or there is not even such a model.
    """
    check_named(config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            config.model_name_or_path, revision=config.model_revision, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:  # The tokenizers library raises bare ones.
        name, said = config.model_name_or_path, first_line(error)
        reason = explain(name, said)
        reason = f"no tokenizer: {said}" if reason == said else reason
        raise LoptError(f"--model_name_or_path {name}: {reason}") from error
    return with_tokens(tokenizer, config)


def load_generation_config(config: ModelConfig, model_config: PreTrainedConfig) -> GenerationConfig:
    """The pretrained model's generation settings, which older models have in their `config.json`.

    Raises:
        LoptError: the file cannot be used.
    """
    name, revision = config.model_name_or_path, config.model_revision
    try:
        if find_file(name, GENERATION_CONFIG_NAME, revision) is not None:
            return GenerationConfig.from_pretrained(name, revision=revision)
        # `AutoConfig` leaves out what is of generation, and not of the model.
        in_file, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
        return GenerationConfig.from_model_config(model_config.to_dict() | in_file)
    except Exception as error:  # Whatever the file holds is given to a class: anything may go wrong.
        raise LoptError(
            f"--model_name_or_path {name}: its {GENERATION_CONFIG_NAME} cannot be used: {first_line(error)}; mend the "
            f"file, or remove it"
        ) from error


def description(
    scratch: Path,
    config: ModelConfig,
    model_config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    model_class: type[PreTrainedModel],
    dtype: torch.dtype,
    ties_embeddings: bool = False,
    generation: GenerationConfig | None = None,
) -> dict[str, bytes]:
    """All of the trained model but its weights: config, generation settings, tokenizer.

    For before the first step: what cannot be saved comes out then, and what becomes of the pretrained model's files
    meanwhile does not matter.

    Args:
        scratch: a directory that is made, and removed again.
        config: names the pretrained model.
        model_config: of the pretrained model.
        tokenizer: of the pretrained model.
        model_class: that was trained; the config of a classifier, say, may name another.
        dtype: of the weights.
        ties_embeddings: whether the output head is the input embedding.
        generation: settings of a model that a script has loaded; None for those of its files.

    Returns:
        The content of each file, by its name.

    Raises:
        LoptError: one of them cannot be saved; the text says which.
    """
    name = config.model_name_or_path
    own, generation, _ = aligned_configs(config, model_config, tokenizer, generation)
    own.tie_word_embeddings = ties_embeddings
    own.dtype, own.architectures = dtype, [model_class.__name__]
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir()
        with _saving(f"the config of {name}"):
            own.save_pretrained(scratch)
        with _saving(f"the generation settings of {name}"):
            _save_generation_config(generation, scratch)
        with _saving(f"the tokenizer of {name}"):
            tokenizer.save_pretrained(scratch)
        files = sorted(path for path in scratch.rglob("*") if path.is_file())
        return {path.relative_to(scratch).as_posix(): path.read_bytes() for path in files}
    except OSError as error:
        raise LoptError(f"{scratch} cannot be written: {first_line(error)}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def aligned_configs(
    config: ModelConfig,
    model_config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    generation: GenerationConfig | None = None,
) -> tuple[PreTrainedConfig, GenerationConfig, list[str]]:
    """The configs of the result, with its tokenizer's ids of special tokens; and what these have changed, for the log.

    Args:
        config: names the pretrained model, for its generation settings.
        model_config: of the pretrained model.
        tokenizer: of the pretrained model.
        generation: settings of a model that a script has loaded; None for those of its files.

    Raises:
        LoptError: the generation settings cannot be used.
    """
    own = copy.deepcopy(model_config)
    generation = load_generation_config(config, own) if generation is None else copy.deepcopy(generation)
    return own, generation, align_special_tokens(own, generation, tokenizer)


def write_description(directory: Path, files: Mapping[str, bytes]) -> None:
    """Writes what `description` has made into a model's directory.

    Raises:
        OSError: it cannot be written.
    """
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@contextlib.contextmanager
def _saving(what: str) -> Iterator[None]:
    """Says of an error what could not be saved. Where the disk is at fault it is left as it is."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # The tokenizers library raises bare ones, and so does code that comes with a model.
        raise LoptError(
            f"{what} can be read but not saved again ({first_line(error)}), so neither a checkpoint nor the model "
            f"could be; mend its file"
        ) from error


def _save_generation_config(generation: GenerationConfig, directory: Path) -> None:
    """Saves the settings, also those that `transformers` loads but will not save: a temperature without sampling, say.

    The pretrained model is published with them, and generates.
    """
    try:
        generation.save_pretrained(directory)
    except ValueError:
        generation.to_json_file(directory / GENERATION_CONFIG_NAME, keys_to_pop=["compile_config"])


def model_class_of(config: PreTrainedConfig, trust_remote_code: bool = False) -> type[PreTrainedModel]:
    """The causal-LM class that `transformers` would take for `config`, found without allocating any weights.

    Raises:
        LoptError: the config is of no causal language model, or of one with more than text.
    """
    try:
        is_text_only = config.get_text_config() is config
    except ValueError:  # It has several.
        is_text_only = False
    if not is_text_only:
        raise LoptError(
            f"{config.model_type} is a multimodal model; only text-only causal language models can be split"
        )
    if getattr(config, "num_hidden_layers", None) is None:
        raise LoptError(f"{config.model_type} cannot be split: its config has no num_hidden_layers")
    try:
        with torch.device("meta"), quiet():
            return type(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))
    except ValueError as error:
        if "attn_implementation" in str(error):
            raise LoptError(f"--attn_implementation {attention_of(config)}: {first_line(error)}") from error
        raise LoptError(f"{config.model_type} is not a causal language model: {first_line(error)}") from error
    except Exception as error:  # Whatever a class of transformers, or the user's own, may raise.
        raise LoptError(f"no {config.model_type} model can be made of its config: {first_line(error)}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps back what `transformers` says about models that no user has asked for."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
