"""Where the ranks of a round find each other."""

import contextlib
import fcntl
import os
import socket
import struct
from typing import Any

import torch.distributed as dist

_SIOCGIFADDR = 0x8915  # netdevice(7)
_ELSEWHERE = "192.0.2.1"  # an address of nobody's: the way to it is the default route


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


def gloo_interface(host: str) -> str | None:
    """The network interface for GLOO_SOCKET_IFNAME, where this machine's own name leads to itself alone (Debian's
    127.0.1.1) or nowhere: gloo goes by it, and the other nodes could not connect. None: gloo is right, the user has set
    the variable, or it can't be found out.

    host: of the rendezvous.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ or host in ("localhost", "::1") or host.startswith("127."):
        return None
    if not _is_loopback(socket.gethostname()):
        return None
    interfaces = _interfaces()
    for peer in (host, _ELSEWHERE):
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((peer, 9))  # sends nothing
            if probe.getsockname()[0] in interfaces:
                return interfaces[probe.getsockname()[0]]
    return next(iter(interfaces.values())) if len(interfaces) == 1 else None


def _is_loopback(name: str) -> bool:
    """Does a name lead to a machine itself alone, or nowhere? gloo takes the first address, IPv4 or IPv6."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return True
    first = str(found[0][-1][0])
    return first == "::1" or first.startswith("127.")


def _interfaces() -> dict[str, str]:
    """IPv4 address -> network interface, without those of the loopback interface."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asks:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has none
                answer = fcntl.ioctl(asks, _SIOCGIFADDR, struct.pack("256s", name.encode()))
                found[socket.inet_ntoa(answer[20:24])] = name
    return {address: name for address, name in found.items() if not address.startswith("127.")}


def open_store() -> tuple[Any, int]:
    """A new store, by which the ranks of one round find each other, and its port."""
    store = dist.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False)
    return store, store.port
