"""Where the ranks of a round find each other."""

import contextlib
import socket
from typing import Any

import torch.distributed as dist


def is_here(host: str) -> bool:
    """Is this an address of this machine?"""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except OSError:
        return False
    for family, *_, address in found:
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind(address)
            return True
    return False


def open_store() -> tuple[Any, int]:
    """A new store, by which the ranks of one round find each other, and its port."""
    store = dist.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False)
    return store, store.port
