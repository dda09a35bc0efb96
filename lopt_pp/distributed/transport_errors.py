"""What gloo, NCCL and CUDA say when a message between processes fails, as one line, and whose fault it is."""

import re

import torch.distributed as dist

from lopt_pp.errors import first_line

_LEFT_OUT = (
    (re.compile(r" in: \S+\.\w+:\d+,"), ":"),
    (re.compile(r"^\[\S+\.\w+:\d+\] "), ""),
    (re.compile(r"\. This is typically caused by a remote worker crashing.*"), ""),
)
"""What says nothing to a user, and what comes instead: where in the source of NCCL or gloo it was, and gloo's guess."""

_LAST_ERROR = re.compile(r"^Last error:[ \t]*\n?(?P<said>[^\n]*)", re.MULTILINE)
"""NCCL's own reason, which may be empty."""

_GONE = (
    "connection closed by peer",
    "connection closed by remote peer",
    "connection reset by",
    "broken pipe",
    "ncclremoteerror",
)
"""What is said of a connection whose other end is gone: by gloo, by NCCL over sockets, by NCCL of any network."""

_STORE = ("key-value store", "store->")
"""What is said where the store failed, whoever holds it, and not the other end."""

_GLOO = "gloo/"
"""In what gloo says, whose errors have no type of their own: a path of its source."""


def cause_of(error: BaseException) -> str:
    """Why a message failed, in one line: the first line of what the library says, and NCCL's last error."""
    cause = first_line(error)
    for words, instead in _LEFT_OUT:
        cause = words.sub(instead, cause)
    last = _LAST_ERROR.search(str(error))
    said = "" if last is None else last["said"].strip()
    return f"{cause}: {said}" if said and said not in cause else cause


def peer_is_gone(error: BaseException) -> bool:
    """Whether a message failed because the process at the other end has ended, or cannot be reached any more.

    It is not where NCCL refuses what it is asked for, the system or the device of this process fails, or the store.
    """
    text = str(error).lower()
    return any(words in text for words in _GONE) and not any(words in text for words in _STORE)


def is_transport_error(error: BaseException) -> bool:
    """Whether an error is of a message between processes, whichever library it went by; the store's are not."""
    if isinstance(error, dist.DistNetworkError | dist.DistStoreError):
        return False
    return isinstance(error, dist.DistBackendError) or (isinstance(error, RuntimeError) and _GLOO in str(error))
