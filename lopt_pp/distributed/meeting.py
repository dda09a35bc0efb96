"""How the processes of a script find each other: once, and then as often as the script joins them."""

import functools
import hashlib
import itertools
import uuid
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import PrefixStore, Store

from lopt_pp.distributed.groups import GROUP_TIMEOUT
from lopt_pp.distributed.restarts import agree_on_restart
from lopt_pp.distributed.store import has_agent_store, join, join_machines


@dataclass(frozen=True)
class Meeting:
    """What the processes have in common.

    Attributes:
        store: that they share, with a prefix of its own each time they meet.
        launch: names what one launcher has started, the first time and again, each time the script joins its
            processes: 32 hexadecimal digits that no other has.
        restart: how often the launcher has started them again.
    """

    store: Store
    launch: str
    restart: int


_times = itertools.count()


def meet(rank: int, size: int, is_one_machine: bool) -> Meeting:
    """Has the processes meet. All must call this, and as often as each other: to evaluate, to train, to evaluate again.

    Args:
        rank: of this process.
        size: number of processes.
        is_one_machine: whether all of them are on this one.

    Raises:
        LoptError: the environment does not say where, or the port is taken.
        torch.distributed.DistError: another process has not come.
    """
    first = _first(rank, size, is_one_machine)
    if not (time := next(_times)):
        return first
    # After a restart the script does the same things again, so the same time has the same name.
    launch = hashlib.sha256(f"{first.launch} {time}".encode()).hexdigest()[:32]
    return Meeting(PrefixStore(f"time {time}", first.store), launch, first.restart)


@functools.cache
def _first(rank: int, size: int, is_one_machine: bool) -> Meeting:
    """Kept for as long as this process lasts: one of them may hold the store."""
    store: Store = join(rank, size) if is_one_machine else join_machines(rank, size)
    launch, restart = store.compare_set("launch", "", uuid.uuid4().hex).decode(), 0
    if has_agent_store():
        restart = agree_on_restart(store, rank, size, timedelta(minutes=30))
        store = PrefixStore(f"start {restart}", store)
    store.set_timeout(GROUP_TIMEOUT)
    return Meeting(store, launch, restart)
