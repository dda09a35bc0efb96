"""A rank on a machine of its own, as far as the network goes: `main([end, socket, *flags])` trains in a new namespace.

The namespace has one end of a link, whose device goes to whoever listens at the socket.
"""

import os
import socket
from collections.abc import Sequence

import lopt_pp.train
from benchmarks.network.emulated_link import ADDRESSES, DEVICE, enter_namespace


def main(arguments: Sequence[str]) -> int:
    end, address, *flags = arguments
    device = enter_namespace(int(end))
    with socket.socket(socket.AF_UNIX) as there:
        there.connect(address)
        socket.send_fds(there, [end.encode()], [device])
    os.close(device)
    os.environ |= {
        "MASTER_ADDR": ADDRESSES[0],
        "GLOO_SOCKET_IFNAME": DEVICE,
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
    }
    return lopt_pp.train.main(flags)
