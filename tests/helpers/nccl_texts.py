"""What PyTorch, NCCL and CUDA say when something fails, word for word."""

_HEAD = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/{place}, {kind}, NCCL version 2.29.3\n{name}: {meaning}\n"
_LAST = "Last error:\n{last}"

DUPLICATE_GPU = _HEAD.format(
    place="NCCLUtils.cpp:94",
    kind="invalid usage (run with NCCL_DEBUG=WARN for details)",
    name="ncclInvalidUsage",
    meaning="This usually reflects invalid usage of NCCL library.",
) + _LAST.format(last="Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 4a000")
"""Two ranks on one GPU."""

SHARED_MEMORY = _HEAD.format(
    place="ProcessGroupNCCL.cpp:3690",
    kind="unhandled system error (run with NCCL_DEBUG=INFO for details)",
    name="ncclSystemError",
    meaning="System call (e.g. socket, malloc) or external library call failed or device error.",
) + _LAST.format(last="Error while creating shared memory segment /dev/shm/nccl-xT9QyA (size 9637888)")
"""A system error that has nothing to do with the neighbour."""

RESET = _HEAD.format(
    place="ProcessGroupNCCL.cpp:3690",
    kind="unhandled system error (run with NCCL_DEBUG=INFO for details)",
    name="ncclSystemError",
    meaning="System call (e.g. socket, malloc) or external library call failed or device error.",
) + _LAST.format(last="socketProgress: Connection closed by remote peer node1<53414>")
"""A system error because the neighbour has gone."""

REMOTE = _HEAD.format(
    place="ProcessGroupNCCL.cpp:2338",
    kind="remote process exited or there was a network error",
    name="ncclRemoteError",
    meaning="A call failed possibly due to a network error or a remote process exiting prematurely.",
) + _LAST.format(last="\nException raised from checkForNCCLErrorsInternal at ProcessGroupNCCL.cpp:2338")
"""The other side has gone; NCCL has no last error to tell, and C++ says where it was."""

WATCHDOG = (
    "[PG ID 2 PG GUID 5 Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=RECV, "
    "NumelIn=8, NumelOut=8, Timeout(ms)={limit:.0f}) ran for {age:.0f} milliseconds before timing out."
)
"""A message that has taken longer than the limit of its group, or than `Work.wait` was given."""

ILLEGAL_ACCESS = (
    "CUDA error: an illegal memory access was encountered\nSearch for `cudaErrorIllegalAddress' in the CUDA manual.\n"
    "CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be "
    "incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\n"
)
"""An error of this process's own device."""

NO_STORE = (
    "[1] is setting up NCCL communicator and retrieving ncclUniqueId from [0] via c10d key-value store by key '0:1', "
    "but store->get('0:1') got error: Connection reset by peer\nException raised from recvBytes at Utils.hpp:678"
)
"""The store has gone, whoever has held it."""

GLOO_CLOSED = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:12175. This is "
    "typically caused by a remote worker crashing. Check the logs of the remote worker before reporting an error."
)
GLOO_RESET = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Read error [10.0.0.2]:2921: Connection reset by peer"
)
GLOO_TIMED_OUT = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting {limit:.0f}ms for recv "
    "operation to complete"
)
