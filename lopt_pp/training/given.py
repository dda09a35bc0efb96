"""What a script gives a run as objects, in place of what flags would name; and the same where flags name it."""

import copy
from dataclasses import dataclass

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lopt_pp.config.data import DataConfig
from lopt_pp.config.model import ModelConfig
from lopt_pp.data import with_chat_template
from lopt_pp.data.in_memory import NO_GIVEN_ROWS, GivenRows
from lopt_pp.errors import LoptError
from lopt_pp.metrics.listeners import OwnCallbacks
from lopt_pp.model.in_memory import LoadedWeights, check_modules, config_of, generation_of
from lopt_pp.model.pretrained import load_model_config, load_tokenizer, model_class_of
from lopt_pp.model.stored import without_quantization
from lopt_pp.model.vocabulary import AddedRows, grown, with_tokens
from lopt_pp.model.weights import PretrainedWeights
from lopt_pp.training.own_metrics import ComputeMetrics
from lopt_pp.training.own_optimizer import OwnOptimizer


@dataclass(frozen=True)
class Given:
    """The objects of a script; what is None, or empty, flags say.

    Attributes:
        model: loaded, to be trained.
        tokenizer: of the model.
        rows: to train and to evaluate on.
        callbacks: that rank 0 calls; None where there are none.
        compute_metrics: makes metrics of evaluations, in the first process of the last stage.
        optimizer: makes each stage's.
    """

    model: PreTrainedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    rows: GivenRows = NO_GIVEN_ROWS
    callbacks: OwnCallbacks | None = None
    compute_metrics: ComputeMetrics | None = None
    optimizer: OwnOptimizer | None = None


NOTHING = Given()


@dataclass(frozen=True)
class Pretrained:
    """A pretrained model, of which no weights have been read yet.

    Attributes:
        model_class: of the model.
        config: of the model.
        weights: of the model.
        generation: settings of a loaded model; None where they are read from its files.
        added: the rows that its embeddings get.
    """

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    weights: PretrainedWeights
    generation: GenerationConfig | None
    added: AddedRows | None = None


def find_pretrained(
    config: ModelConfig, model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase, seed: int, warns: bool
) -> Pretrained:
    """The model that a run begins with.

    Args:
        config: names it.
        model: loaded by the script, in place of that.
        tokenizer: of the run; the model gets embeddings for the tokens that were added to it.
        seed: of the run, that these are drawn by.
        warns: whether to say what is left out of its config.

    Raises:
        LoptError: it is not there, or not one that can be trained.
    """
    generation = None
    if model is None:
        said = load_model_config(config)
        weights = PretrainedWeights(config.model_name_or_path, config.model_revision)
    else:
        said = config_of(model, config.attn_implementation)
        _check_class(model, model_class_of(said, config.trust_remote_code))
        weights, generation = LoadedWeights(model), generation_of(model)
    own = without_quantization(said, weights.name_or_path, weights, warns)
    if model is not None:
        check_modules(model)
    model_class = model_class_of(own, config.trust_remote_code)
    own, added = grown(own, tokenizer, config, seed)
    return Pretrained(model_class, own, weights, generation, added)


def _check_class(model: PreTrainedModel, expected: type[PreTrainedModel]) -> None:
    """Sees that a loaded model is the causal language model that its config makes.

    Raises:
        LoptError: it is another.
    """
    if type(model) is not expected:
        raise LoptError(
            f"model is a {type(model).__name__}, and the causal language model of its config is "
            f"{expected.__name__}; give one that AutoModelForCausalLM has loaded"
        )


def find_tokenizer(
    config: ModelConfig, data: DataConfig, tokenizer: PreTrainedTokenizerBase | None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a run: a copy of the script's, which stays as it is, or that of the model; with its template.

    Raises:
        LoptError: there is none, or `--chat_template_path` has none for it.
    """
    found = load_tokenizer(config) if tokenizer is None else with_tokens(copy.deepcopy(tokenizer), config)
    return with_chat_template(found, data)


def check_tokenizer(tokenizer: object) -> PreTrainedTokenizerBase:
    """Sees that a `processing_class` is a tokenizer.

    Raises:
        LoptError: it is something else, such as a processor of images.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise LoptError(
            f"processing_class is a {type(tokenizer).__name__}; give a tokenizer: models are trained on text only"
        )
    return tokenizer
