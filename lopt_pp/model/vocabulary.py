"""Tokens that are added to a tokenizer, and the rows that the embeddings of its model get for them."""

import copy
from dataclasses import dataclass

import torch
from tokenizers import AddedToken
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from lopt_pp.config.model import ModelConfig
from lopt_pp.errors import LoptError


def with_tokens(tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer with `--added_tokens`, and with `--eos_token` and `--pad_token` as its own.

    Raises:
        LoptError: the end-of-sequence or the padding token is not in its vocabulary.
    """
    if config.added_tokens:
        added = [AddedToken(token, special=True, normalized=False) for token in config.added_tokens]
        tokenizer.add_tokens(added, special_tokens=True)
    vocabulary = tokenizer.get_vocab() if config.eos_token or config.pad_token else {}
    for name in ("eos_token", "pad_token"):
        token = getattr(config, name)
        if token is None:
            continue
        if token not in vocabulary:
            raise LoptError(
                f"--{name} {token} is not in the tokenizer's vocabulary; give one that is, or add it: "
                f"--added_tokens '{token}'"
            )
        setattr(tokenizer, name, token)
    return tokenizer


@dataclass(frozen=True)
class AddedRows:
    """The rows that embeddings get for further tokens.

    Attributes:
        size: the rows that there are then.
        seed: that the new ones are drawn by.
    """

    size: int
    seed: int

    def resize(
        self, embedding: torch.Tensor, head: torch.Tensor | None, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """What `resize_token_embeddings` makes of a whole model's, after `torch.manual_seed(seed)`.

        New rows are drawn around the mean of the others (`mean_resizing`). It is a function of the arguments and the
        seed, so every process that needs one of the tensors makes the same, however the model is cut.

        Args:
            embedding: float `[tokens, hidden]`, on the CPU, of the input.
            head: float `[tokens, hidden]`, likewise, of the output; None where it is the input's.
            bias: float `[tokens]`, of the output head; None where it has none.

        Returns:
            The same with `size` tokens.

        Source: Hewitt, "Initializing New Word Embeddings for Pretrained Language Models".
        """
        model = _Embeddings(embedding, head, bias)
        verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()  # That they are drawn is what was asked for.
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                model.resize_token_embeddings(self.size)
        finally:
            transformers_logging.set_verbosity(verbosity)
        outer = model.head
        return (
            model.embedding.weight.detach(),
            None if outer is None else outer.weight.detach(),
            None if outer is None or outer.bias is None else outer.bias.detach(),
        )


class _Embeddings(PreTrainedModel):
    """Nothing of a model but its embeddings, for `resize_token_embeddings`."""

    def __init__(self, embedding: torch.Tensor, head: torch.Tensor | None, bias: torch.Tensor | None) -> None:
        super().__init__(PreTrainedConfig())
        self.embedding = nn.Embedding.from_pretrained(embedding)
        self.head: nn.Linear | None = None
        if head is not None:
            self.head = nn.Linear(head.shape[1], head.shape[0], bias=bias is not None, device="meta")
            self.head.weight = nn.Parameter(head)
            if bias is not None:
                self.head.bias = nn.Parameter(bias)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        assert isinstance(value, nn.Embedding)
        self.embedding = value

    def get_output_embeddings(self) -> nn.Module | None:
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        assert isinstance(new_embeddings, nn.Linear)
        self.head = new_embeddings


def grown(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, flags: ModelConfig, seed: int
) -> tuple[PreTrainedConfig, AddedRows | None]:
    """A model's config with room for `--added_tokens`, and the rows for it; None where there is room already.

    Args:
        config: of the model.
        tokenizer: of the model, with the added tokens.
        flags: of the model.
        seed: of the run.
    """
    size, multiple = len(tokenizer), flags.resize_to_multiple_of or 1
    size = -(-size // multiple) * multiple
    if not flags.added_tokens or size <= config.vocab_size:
        return config, None
    own = copy.deepcopy(config)
    own.vocab_size = size
    return own, AddedRows(size, seed)
