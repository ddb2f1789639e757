"""What the nodes of a job can only find out together: do they share the run folder, and can they reach the head node?

Each node reports its own view in its facts; None means that all is well.
"""

import socket
import time
from pathlib import Path

from pipeline.launch.coordinator import listen

TOKEN = ".token"  # in the run folder, written by the batch script on the first node
TOKEN_TIMEOUT_S = 30.0  # NFS shows a new file to the other nodes within this time
CONNECT_TIMEOUT_S = 60.0  # until the step has started on every node


def probe_token(run_dir: Path, token: str, head: str) -> str | None:
    """Is the run folder the one that the head node sees, which wrote `token` into it?"""
    deadline = time.monotonic() + TOKEN_TIMEOUT_S
    while True:
        try:
            found = (run_dir / TOKEN).read_text(encoding="utf-8").strip()
        except OSError:
            found = None
        if found == token:
            return None
        if time.monotonic() > deadline:
            return (
                f"{run_dir} is not the folder that the first node ({head}) sees; "
                "give a --run_dir on a disk that all nodes share"
            )
        time.sleep(0.5)


def probe_rendezvous(host: str, port: int, is_head: bool, others: int) -> str | None:
    """Can this node reach the port of the head node where the ranks will meet? The head node listens until `others`
    nodes have connected; the others resolve its name and connect."""
    return _listen(host, port, others) if is_head else _connect(host, port)


def _listen(host: str, port: int, others: int) -> str | None:
    deadline = time.monotonic() + CONNECT_TIMEOUT_S
    try:
        with listen(port, backlog=max(1, others)) as server:
            while others > 0 and time.monotonic() < deadline:
                server.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    break
                with connection:
                    connection.settimeout(5.0)
                    others -= connection.recv(1) == b"n"  # anything else: somebody who scans ports
    except OSError as error:
        return f"port {port} of {host}, where the ranks would meet, can't be opened ({error.strerror})"
    return None


def _connect(host: str, port: int) -> str | None:
    deadline = time.monotonic() + CONNECT_TIMEOUT_S
    while True:
        try:
            with socket.create_connection((host, port), timeout=5.0) as connection:
                connection.sendall(b"n")
            return None
        except socket.gaierror as error:
            return (
                f"the head node's name {host} does not resolve here ({error.strerror}); add it to DNS or /etc/hosts, "
                "or set HEAD_ADDRESS to its IP address in slurm/site.env"
            )
        except OSError as error:
            if time.monotonic() > deadline:
                return (
                    f"can't connect to the head node {host}, port {port} ({error.strerror or error}); allow TCP "
                    "between the nodes, or set HEAD_ADDRESS in slurm/site.env to its address on a network they share"
                )
        time.sleep(0.5)
