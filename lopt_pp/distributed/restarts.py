"""How often torchrun has started this run again.

torchrun (`--max-restarts`) keeps one key-value store for all starts of a run, with what dead processes have said, and
counts the restarts on each machine for itself. So the processes of a start make sure of each other first.
"""

import json
import uuid
from datetime import timedelta

from torch.distributed import Store

_NCCL_DUMP_SIGNAL = "exception_dump"
"""Where a process whose NCCL has failed leaves a word for all (`kStoreDumpKey` in torch's ProcessGroupNCCL.hpp, 2.11 to
2.13): below all prefixes, so that the processes of the next start would find it, take it for theirs, and be ended by
their monitor about 8 minutes later (`TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC`)."""


def agree_on_restart(store: Store, rank: int, size: int, timeout: timedelta) -> int:
    """The number of restarts so far, the same in all processes of this start: 0 at the first. All must call this.

    Rank 0 counts, and answers whoever presents itself, until all of this start have confirmed its number. Each has a
    name that none had before, so nobody takes an answer that was meant for the dead, and a queue forgets what was taken
    from it. Before it answers the first, it removes what NCCL's watchdog has left in the store of an earlier start.

    Args:
        store: of all starts, without a prefix.
        rank: of this process.
        size: number of processes.
        timeout: to wait for the others.

    Raises:
        torch.distributed.DistError: another process has not come.
    """
    store.set_timeout(timeout)
    if rank > 0:
        name = uuid.uuid4().hex
        store.queue_push("arrivals", json.dumps({"name": name}))
        restart = int(store.get(f"restart of {name}"))
        store.queue_push("arrivals", json.dumps({"rank": rank, "restart": restart}))
        return restart
    restart = store.add("starts", 1) - 1
    store.delete_key(_NCCL_DUMP_SIGNAL)
    missing = set(range(1, size))
    while missing:
        arrival = json.loads(store.queue_pop("arrivals"))
        if "name" in arrival:
            store.set(f"restart of {arrival['name']}", str(restart))
        elif arrival["restart"] == restart:
            missing.discard(arrival["rank"])
    return restart
