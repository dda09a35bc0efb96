"""Which of torchrun's attempts at a run this is.

torchrun (`--max-restarts`) keeps one key-value store for all attempts, with what dead processes have said, and counts
the attempts on each machine for itself. So the processes of an attempt make sure of each other first.
"""

import json
import uuid
from datetime import timedelta

from torch.distributed import Store


def agree_on_attempt(store: Store, rank: int, size: int, timeout: timedelta) -> int:
    """Numbers the attempt, from 1, the same in all of its processes. All must call this.

    Rank 0 counts, and answers whoever presents itself, until all of this attempt have confirmed its number. Each has a
    name that none had before, so nobody takes an answer that was meant for the dead, and a queue forgets what was taken
    from it.

    Args:
        store: of all attempts.
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
        attempt = int(store.get(f"attempt of {name}"))
        store.queue_push("arrivals", json.dumps({"rank": rank, "attempt": attempt}))
        return attempt
    attempt = store.add("attempts", 1)
    missing = set(range(1, size))
    while missing:
        arrival = json.loads(store.queue_pop("arrivals"))
        if "name" in arrival:
            store.set(f"attempt of {arrival['name']}", str(attempt))
        elif arrival["attempt"] == attempt:
            missing.discard(arrival["rank"])
    return attempt
