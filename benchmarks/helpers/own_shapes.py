"""1F1B whose messages have the shape of their own microbatch: the fairer baseline where rows are of unequal lengths.

The schedules of `torch.distributed.pipelining` want all microbatches of a step in one shape, so `--method e2e` pads
them alike. Megatron-LM sends each in its own shape (`variable_seq_lengths`: a small message with the sizes before each
tensor). This does the same without that message, since every process knows the rows.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from lopt_pp.data import Microbatch
from lopt_pp.stage.end_to_end import EndToEndPipeline


class OwnShapesPipeline(EndToEndPipeline):
    """One block in each process, trained end to end by 1F1B; a microbatch is padded to its own longest row only.

    The order of work is 1F1B's, also with fewer microbatches than stages. All receives of a step are posted when it
    begins, and no send is waited for before it ends, so that transfers overlap with computing wherever they can.
    Gradients are those of the base class within rounding. The pipeline has no replicas.
    """

    def _run_schedule(self, batches: Sequence[Microbatch], num_targets: int) -> list[torch.Tensor]:
        (module,), group = self._modules, self._group
        assert group is not None and self._num_replicas == 1
        spec, hidden_size = module.block.spec, module.block.model.config.hidden_size
        batches = [batch.to(self._device) for batch in batches]
        module.begin(batches, num_targets)

        def receive_all(stage: int) -> list[tuple[torch.Tensor, dist.Work]]:
            """Begins to receive what another stage sends of each microbatch, in order."""
            coming = []
            for batch in batches:
                shape = *batch.input_ids.shape, hidden_size
                tensor = torch.empty(shape, dtype=self._dtype, device=self._device)
                coming.append((tensor, _begun(dist.irecv(tensor, group=group, group_src=stage))))
            return coming

        sent: list[tuple[torch.Tensor, dist.Work]] = []

        def send(tensor: torch.Tensor, stage: int) -> None:
            tensor = tensor.contiguous()
            # Kept, since what is sent must stay until it has left.
            sent.append((tensor, _begun(dist.isend(tensor, group=group, group_dst=stage))))

        hidden_states = [] if spec.is_first else receive_all(spec.stage - 1)
        gradients = [] if spec.is_last else receive_all(spec.stage + 1)
        under_way: dict[int, tuple[torch.Tensor | None, torch.Tensor]] = {}
        losses = []
        for number, goes_back in one_forward_one_backward(spec.stage, spec.num_stages, len(batches)):
            if not goes_back:
                given = None if spec.is_first else _arrived(hidden_states[number]).requires_grad_()
                made = module(given, index=torch.tensor([number]))
                under_way[number] = given, made
                if spec.is_last:
                    losses.append(made.detach())
                else:
                    send(made.detach(), spec.stage + 1)
                continue
            given, made = under_way.pop(number)
            made.backward(None if spec.is_last else _arrived(gradients[number]))
            if given is not None:
                assert given.grad is not None
                send(given.grad, spec.stage - 1)
        for _, work in sent:
            work.wait()
        module.begin((), 0)
        return losses


def one_forward_one_backward(stage: int, num_stages: int, num_microbatches: int) -> Iterator[tuple[int, bool]]:
    """The order in which a stage works in 1F1B: microbatches by number, and whether each goes backward now."""
    ahead = min(num_stages - stage - 1, num_microbatches)
    for number in range(num_microbatches + ahead):
        if number < num_microbatches:
            yield number, False
        if number >= ahead:
            yield number - ahead, True


def _begun(work: dist.Work | None) -> dist.Work:
    assert work is not None
    return work


def _arrived(coming: tuple[torch.Tensor, dist.Work]) -> torch.Tensor:
    tensor, work = coming
    work.wait()
    return tensor
