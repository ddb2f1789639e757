"""The launcher of a node: it does what the coordinator says, and looks after the node's workers."""

import contextlib
import os
import queue
import signal
import socket
import time
from typing import Any

from pipeline.counts import count
from pipeline.errors import (
    EXIT_GPU_FAULT,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_REGROUP,
    EXIT_RETRY,
    EXIT_STORE_LOST,
    EXIT_USER,
    UserError,
)
from pipeline.launch.coordinator import SILENT_S, Coordinator, say
from pipeline.launch.environment import environment_of, prefixes_of
from pipeline.launch.link import Link
from pipeline.launch.local import LocalFolder
from pipeline.launch.options import Options
from pipeline.launch.program import logs_of, numa_of, program_of
from pipeline.launch.store import gloo_interface, is_here, open_store
from pipeline.launch.workers import Workers

GRACE_S = {"loss": 1.0, "failure": 5.0}  # between TERM and KILL; the others take as long as a step and a save
_SAY_WAITING_S = 5.0
_REFUSED_S = 2.0  # its machine is there, and the process that decides is not: it does not come back


class Launcher:
    """Starts, watches and stops the workers of this node until the job has ended.

    Args:
        options: what was asked for.
        signals: those that have asked this process to stop; it grows.
    """

    def __init__(self, options: Options, signals: list[signal.Signals]):
        self.options, self.signals = options, signals
        self.coordinator: Coordinator | None = None
        self.link: Link | None = None
        self.workers: Workers | None = None
        self.order: dict[str, Any] = {}  # of the present round
        self.stop_by: float | None = None  # when workers that were asked to save and stop are killed
        self.local = LocalFolder(options.job)
        self.host, self.port = options.host, options.port
        self.name = f"{socket.gethostname()} (pid {os.getpid()})"
        self.interface = gloo_interface(options.host) if options.limits.max_nodes > 1 else None
        self.program, self.logs, self.numa = program_of(options), logs_of(options), numa_of(options)

    # --- the job

    def run(self) -> int:
        """Returns the job's exit code, the same on every node."""
        try:
            self.host_rendezvous()
            if self.options.serve_store:
                assert self.coordinator is not None
                return self.coordinator.serve(stop_reason=self.stop_reason)
            problem = self.connect(self.options.limits.join_timeout_s)
            if problem is not None:
                return problem
            code = self.follow()
            if code == EXIT_STORE_LOST and not self.signals:
                say(f"{self.host}:{self.port}, the host of the rendezvous, was lost; start the job again to resume")
            return code
        finally:
            if self.workers is not None:
                self.workers.close()
            if self.link is not None:
                self.link.close()
            if self.coordinator is not None and not self.options.serve_store:
                self.coordinator.join()
            self.local.remove()

    def host_rendezvous(self) -> None:
        """Host it if it is for this node to do so. Raises UserError where that was asked for and can't be."""
        options = self.options
        wanted = True if options.serve_store else options.is_host
        if wanted is False or (wanted is None and not is_here(options.host)):
            return
        try:
            self.coordinator = Coordinator(options.limits, options.port, open_store, options.about)
        except OSError as error:
            if wanted:
                raise UserError(
                    f"--rdzv-endpoint {options.host}:{options.port}: this node can't host the rendezvous there "
                    f"({error.strerror}); give another port"
                ) from error
            return  # another launcher of this machine hosts it
        self.port = self.coordinator.port
        if not options.serve_store:
            self.coordinator.start()

    def connect(self, timeout_s: float, refused_s: float = float("inf")) -> int | None:
        """Connect to the coordinator, and wait for it where it is not there yet. Returns an exit code where there is
        nobody within `timeout_s`, where its machine refuses the connection for `refused_s`, or where this launcher is
        asked to stop. Raises UserError where it is another job's coordinator."""
        begun, said = time.monotonic(), False
        options = self.options
        hello = {"name": self.name, "ranks": options.nproc, "node_rank": options.node_rank, "job": options.about}
        while True:
            try:
                self.link = Link(self.host, self.port, {**hello, "stop": self.stop_reason()}, timeout_s=SILENT_S)
                return None
            except UserError as error:
                raise UserError(f"--rdzv-endpoint {self.host}:{self.port}: {error}") from None
            except OSError as error:
                problem = error.strerror or str(error)
                refused = isinstance(error, ConnectionRefusedError)
            waited = time.monotonic() - begun
            if self.signals:
                return EXIT_INTERRUPTED
            if waited > timeout_s or (refused and waited > refused_s):
                return EXIT_STORE_LOST
            if waited > _SAY_WAITING_S and not said:
                said = True
                say(
                    f"{socket.gethostname()} does not reach the rendezvous at {self.host}:{self.port} ({problem}); "
                    f"trying for {timeout_s:.0f} s: is the name known here, and the port open?"
                )
            time.sleep(0.1 if waited < _SAY_WAITING_S else 1.0)

    def follow(self) -> int:
        """Do what the coordinator says until it says that the job has ended."""
        assert self.link is not None
        while True:
            order: dict[str, Any] = {}
            with contextlib.suppress(queue.Empty):
                order = self.link.orders.get(timeout=self.options.monitor_interval_s)
            do = order.get("do")
            if do == "train":
                self.start(order)
            elif do == "stop" and order["round"] == self.order.get("round"):
                self.stop(order["why"])
            elif do == "end":
                self.end_workers(order["exit_code"])
                return int(order["exit_code"])
            elif do == "cut":
                code = self.rejoin()
                if code is not None:
                    return code
            self.pass_on_signals()
            self.look()
            if self.leave_unkillable():
                return EXIT_RETRY  # the others go on without this node, if they may

    def rejoin(self) -> int | None:
        """The connection is lost. What trains here is not part of the job any more; come back as a new node."""
        if self.workers is not None:
            self.workers.close()
            self.workers = None
        self.order = {}
        if self.signals:
            return EXIT_RETRY
        code = self.connect(2 * SILENT_S, _REFUSED_S)
        if code is None:
            say(f"{self.name} was cut off from the others; it joins again")
        return code

    # --- the workers

    def start(self, order: dict[str, Any]) -> None:
        """Start the workers of a round."""
        if self.workers is not None:
            self.workers.close()
        self.order = order
        envs = {rank: self.environment(order, rank) for rank in range(self.options.nproc)}
        role = self.options.torch.role
        self.workers = Workers(self.program, envs, self.logs, role, prefixes_of(self.options, order), self.numa)
        self.stop_by = None  # a signal that arrives before this is passed on to these

    def environment(self, order: dict[str, Any], local_rank: int) -> dict[str, str]:
        """What a worker finds in its environment: what each node has of its own, and what `environment_of` gives."""
        own = {"MASTER_ADDR": self.host, "PIPELINE_LAUNCH_LOCAL": str(self.local.path or "")}
        if self.interface is not None:
            own["GLOO_SOCKET_IFNAME"] = self.interface
        return own | environment_of(self.options, order, local_rank)

    def stop(self, why: str) -> None:
        """Have the workers stop: those of a world that lost a member at once, the others after they have saved."""
        if self.workers is None:
            return
        if why == "regroup":
            self.workers.signal(signal.SIGUSR2)
        elif why == "request":  # to a launcher that has no ranks
            self.signals.append(signal.SIGTERM)
        elif why in GRACE_S:
            # Ranks may still reach each other, where only a launcher was lost. What they save is no interruption.
            self.workers.signal(signal.SIGUSR2 if self.program.asks_for_signals else signal.SIGTERM)
            self.workers.kill_after(GRACE_S[why])

    def end_workers(self, code: int) -> None:
        """The job has ended: so do the workers."""
        if self.workers is None:
            return
        if code not in (EXIT_OK, EXIT_INTERRUPTED):
            self.workers.signal(signal.SIGTERM)
        self.workers.kill_after(GRACE_S["failure"])
        while not self.workers.poll():
            time.sleep(0.02)
            if self.leave_unkillable():
                return
        self.workers.close()
        self.workers = None

    def leave_unkillable(self) -> bool:
        """Are there workers that can't be killed? Then they are left behind: all nodes would wait for them."""
        found = self.workers.unkillable if self.workers is not None else []
        if self.workers is None or not found:
            return False
        pids = ", ".join(str(self.workers.pids[rank]) for rank in found)
        say(
            f"{self.name}: SIGKILL does not end {count(len(found), 'rank')} (pid {pids}): a GPU's driver or a file "
            "system hangs, see dmesg; this node is left out until it is started again"
        )
        self.workers.abandon()
        self.workers = None
        return True

    def pass_on_signals(self) -> None:
        """Somebody asked this launcher to stop: the workers save. A third Ctrl-C does not wait for them."""
        if not self.signals or self.link is None:
            return
        if self.stop_by is None:
            self.link.say("stop", reason=self.stop_reason())
            if self.workers is not None:
                self.workers.signal(signal.SIGTERM)
            self.stop_by = time.monotonic() + self.options.shutdown_timeout_s
        elif self.workers is not None and self.stop_by < float("inf"):
            late, impatient = time.monotonic() > self.stop_by, self.signals.count(signal.SIGINT) > 2
            if not late and not impatient:
                return
            why = "were not waited for" if impatient else f"did not save within {self.options.shutdown_timeout_s:.0f} s"
            say(f"{self.name}: the workers {why}; killed")
            self.workers.signal(signal.SIGKILL)
            self.stop_by = float("inf")

    def stop_reason(self) -> str:
        """Who asked this launcher to stop; empty: nobody."""
        return f"{self.signals[0].name} to the launcher on {socket.gethostname()}" if self.signals else ""

    def look(self) -> None:
        """See which workers have ended; report when all have."""
        if self.workers is None or self.link is None:
            return
        ended = self.workers.poll()
        codes = self.workers.exit_codes
        if not ended:
            if any(code not in (EXIT_OK, EXIT_INTERRUPTED, EXIT_REGROUP) for code in codes.values()):
                if not self.workers.is_ending:
                    self.workers.signal(signal.SIGTERM)
                self.workers.kill_after(GRACE_S["failure"])
            return
        if not self.program.asks_for_signals:  # another program: its end by our request to regroup is no failure
            codes = {r: EXIT_REGROUP if code == -signal.SIGUSR2 else code for r, code in codes.items()}
        stopped = {rank for rank in codes if self.workers.was_stopped(rank)}
        code, rank = _sum_up(codes, stopped)
        pid = self.workers.pids[rank]
        self.workers.close()
        self.workers = None
        failure = ""  # a rank that was stopped from here is no cause
        if code not in (EXIT_OK, EXIT_USER, EXIT_INTERRUPTED, EXIT_REGROUP) and rank not in stopped:
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            how += " (perhaps by the kernel, out of memory)" if code == -signal.SIGKILL else ""
            failure = f"rank {self.order['first_rank'] + rank} ({socket.gethostname()}, pid {pid}) {how}"
        self.link.say("ended", round=self.order["round"], exit_code=code, failure=failure)


def _sum_up(codes: dict[int, int], stopped: set[int]) -> tuple[int, int]:
    """(exit code of the node, local rank that it is of). What the user must fix comes first, then a GPU's fault, then
    what ended first, but for those that only noticed it. stopped: ranks that a signal of the launcher ended."""
    for code in (EXIT_USER, EXIT_GPU_FAULT):
        for rank, found in codes.items():
            if found == code:
                return code, rank
    failed = [(code, rank) for rank, code in codes.items() if code not in (EXIT_OK, EXIT_INTERRUPTED, EXIT_REGROUP)]
    if failed:
        return min(failed, key=lambda found: found[1] in stopped)
    for code in (EXIT_INTERRUPTED, EXIT_REGROUP):
        if code in codes.values():
            return code, next(rank for rank, found in codes.items() if found == code)
    return EXIT_OK, next(iter(codes))
