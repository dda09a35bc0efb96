"""Interface health: how far the hidden states at a boundary have drifted from the pretrained model's.

The blocks before a boundary learn from local losses alone, so what they send on moves by itself. A few fixed rows, the
probe, go through them at the start, with the pretrained weights, and again every so often; what leaves each block is
compared with what left it then. The drift of a boundary is that of all blocks before it together, so the probe's hidden
states of now go down the stream, as one more message of such a step. Nothing comes back, and nobody waits for more.
The last stage has no boundary after it, and gets no such message: with two stages the stream carries none.

An example with three stages and `--probe_steps 50`: four sequences of 128 tokens go through the pretrained stages 0 and
1 before step 1, and what leaves each is kept. After step 50 they go through both again, stage 0's output as one more
message to stage 1. If a token's hidden state at boundary 0 was (3, 4) and is (3, 5) now, it has moved by 1 on a length
of 5, and `drift_norm` is 0.2: a fifth of what the next stage was pretrained on is no longer there.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F

from lopt_pp.config.topology import Topology
from lopt_pp.data import MicrobatchSampler
from lopt_pp.metrics.records import Record
from lopt_pp.stage.stage import Stage

_ROWS, _TOKENS = 4, 128
"""The most that a probe has."""

_TAG = 3


class Probe:
    """The probe of one process: fixed rows, and what the pretrained blocks of its stages made of them.

    Args:
        sampler: of the data, the same in all processes: the probe is the beginning of its first microbatch.
        every: steps between measurements.
        num_stages: of the run.
        max_positions: that the model can compute on in a sequence. Packed rows may be longer, and the probe takes no
            notice of where each of them begins.
    """

    def __init__(
        self, sampler: MicrobatchSampler, every: int, num_stages: int, max_positions: int | None = None
    ) -> None:
        # The rows of a streamed step may all be unusable.
        batch = next(b for step in itertools.count() for b in sampler.microbatches(step) if b.num_tokens > 0)
        most = _TOKENS if max_positions is None else min(_TOKENS, max_positions)
        tokens = min(int(batch.token_mask[:_ROWS].sum(dim=1).max()), most)
        self._input_ids = batch.input_ids[:_ROWS, :tokens]
        self._mask = batch.token_mask[:_ROWS, :tokens]
        self._every = every
        self._num_stages = num_stages
        self._pretrained: dict[int, torch.Tensor] = {}

    def is_due(self, step: int) -> bool:
        """Whether the stages measure after the step, counted from 0."""
        return (step + 1) % self._every == 0

    @property
    def shape(self) -> tuple[int, int]:
        """The (sequences, tokens) of its message across a boundary."""
        return self._input_ids.shape[0], self._input_ids.shape[1]

    def is_sent_by(self, stage: int) -> bool:
        """Whether the hidden states of the probe go on from a stage to the next. The last stage needs none."""
        return stage < self._num_stages - 2

    def measures(self, stage: Stage) -> bool:
        """Whether there is a boundary after the stage whose drift is measured."""
        return stage.index in self._pretrained

    def remember(self, stages: Sequence[Stage], topology: Topology, rank: int) -> None:
        """Runs the probe through the blocks with their pretrained weights. All processes must call this, before they
        train or go on from a checkpoint.

        Args:
            stages: of this process, in order.
            topology: of the run.
            rank: of this process.
        """
        replica = topology.replica_of(rank)
        for stage in stages:
            if stage.block.spec.is_last:
                continue
            inputs = self._pretrained.get(stage.index - 1, self._input_ids)
            if stage.index > 0 and stage.index - 1 not in self._pretrained:
                hidden_size = stage.block.model.config.hidden_size
                inputs = torch.empty(*self._input_ids.shape, hidden_size, dtype=stage.dtype)
                dist.recv(inputs, topology.rank_of(stage.index - 1, replica), tag=_TAG)
            self._pretrained[stage.index] = stage.probe(inputs.to(stage.device)).cpu()
            target = topology.rank_of(stage.index + 1, replica)
            if self.is_sent_by(stage.index) and target != rank:
                dist.send(self._pretrained[stage.index], target, tag=_TAG)

    def measure(self, stage: Stage, received: torch.Tensor | None) -> tuple[torch.Tensor, Record]:
        """Runs the probe through a stage as it is now.

        Args:
            stage: of this process, that `measures` names.
            received: what the stage before has made of it, `[sequences, tokens, hidden]`; None on the first stage.

        Returns:
            What the next stage would get, `[sequences, tokens, hidden]`; and `drift_norm` and `drift_cosine` of the
            boundary after the stage.
        """
        outputs = stage.probe(self._input_ids.to(stage.device) if received is None else received)
        pretrained = self._pretrained[stage.index].to(stage.device)
        return outputs, drift(outputs, pretrained, self._mask.to(stage.device))


def drift(now: torch.Tensor, then: torch.Tensor, mask: torch.Tensor) -> Record:
    """How far hidden states have moved.

    Token by token, and the mean over tokens: a norm over all of them would be that of the first token alone in models
    which give it a hundred times the others' norm.

    Args:
        now: `[sequences, tokens, hidden]`.
        then: the same.
        mask: bool `[sequences, tokens]`, the tokens that count.

    Returns:
        `drift_norm`: the norm of the difference over the norm of `then`. `drift_cosine`: the cosine of the two.
    """
    now, then = now[mask].float(), then[mask].float()
    distance = (now - then).norm(dim=-1) / then.norm(dim=-1)
    cosine = F.cosine_similarity(now, then, dim=-1)
    norm, cosine = torch.stack([distance.mean(), cosine.mean()]).tolist()
    return {"drift_norm": norm, "drift_cosine": cosine}
