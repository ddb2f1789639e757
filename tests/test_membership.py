"""Who trains together, and what follows from a loss, a failure, a newcomer: the decisions, without processes."""

import pytest

from pipeline.errors import (
    EXIT_GPU_FAULT,
    EXIT_INTERRUPTED,
    EXIT_NODE_LOST,
    EXIT_OK,
    EXIT_REGROUP,
    EXIT_RETRY,
    EXIT_USER,
)
from pipeline.launch.membership import SETTLE_S, Membership
from pipeline.launch.node import Limits, Node


class Case:
    """A membership whose clock and messages are in the hands of the test."""

    def __init__(self, *names: str, ranks: int = 1, **limits):
        self.time, self.sent, self.said = 100.0, [], []
        limits = {"min_nodes": len(names), "max_nodes": len(names), "last_call_s": 5.0} | limits
        self.it = Membership(
            Limits(**limits), lambda key, message: self.sent.append((key, message)), self.said.append, lambda: self.time
        )
        self.ranks = ranks
        for name in names:
            self.join(name)

    def join(self, name: str, node_rank: int | None = None) -> None:
        self.it.join(Node(int(name.strip("n")), name, self.ranks, node_rank))

    def later(self, seconds: float) -> None:
        self.time += seconds
        self.it.tick()

    def end(self, name: str, code: int, failure: str = "") -> None:
        self.it.report(int(name.strip("n")), self.it.round, code, failure)

    def lose(self, name: str) -> None:
        self.it.lose(int(name.strip("n")), "it was killed")

    def world(self) -> list[str]:
        """Who trains in the present round, in the order of ranks."""
        last = {key: m for key, m in self.sent if m["do"] == "train" and m["round"] == self.it.round}
        return [f"n{key}" for key, m in sorted(last.items(), key=lambda item: item[1]["group_rank"])]

    def orders(self, name: str) -> list[str]:
        return [m["do"] for key, m in self.sent if f"n{key}" == name]


def test_ranks_follow_names_as_people_count():
    case = Case("n10", "n2", "n1", ranks=4)
    assert case.world() == ["n1", "n2", "n10"]
    first = [m["first_rank"] for _, m in sorted(case.sent, key=lambda item: item[1].get("group_rank", 0))]
    assert first == [0, 4, 8] and case.sent[0][1]["world_size"] == 12


def test_a_fixed_number_of_nodes_begins_when_all_are_there_and_not_before():
    case = Case("n1", min_nodes=2, max_nodes=2)
    case.later(300)
    assert not case.sent
    case.join("n2")
    assert case.world() == ["n1", "n2"]


def test_a_range_of_nodes_begins_after_the_last_call():
    case = Case("n1", min_nodes=1, max_nodes=3)
    case.later(4)
    case.join("n2")
    assert case.it.round == 0
    case.later(2)
    assert case.world() == ["n1", "n2"]


def test_too_few_nodes_end_the_job_after_the_join_time_with_their_names():
    case = Case("n1", min_nodes=2, max_nodes=2, join_timeout_s=60.0)
    case.later(61)
    assert case.it.exit_code == EXIT_NODE_LOST and "n1" in case.said[-1] and case.orders("n1") == ["end"]


def test_a_lost_node_is_done_without_at_once_and_costs_no_restart():
    case = Case("n1", "n2", "n3", min_nodes=2)
    case.lose("n1")
    assert case.orders("n2")[-1] == "stop"
    case.end("n3", EXIT_RETRY, "rank 2 (n3, pid 5) ended with exit code 1")  # it noticed
    case.end("n2", -9, "rank 1 (n2, pid 4) was killed by SIGKILL")
    assert case.world() == ["n2", "n3"] and case.it.restarts == 0 and case.it.round == 2
    assert case.sent[-1][1]["reason"] == "n1 was lost"


def test_the_loss_may_be_seen_after_the_failures_that_it_causes():
    case = Case("n1", "n2", "n3", min_nodes=2, max_restarts=0)
    case.end("n2", EXIT_RETRY, "rank 1 ended with exit code 1")
    case.end("n3", EXIT_RETRY, "rank 2 ended with exit code 1")
    case.lose("n1")
    assert case.it.phase == "training" and case.world() == ["n2", "n3"]


def test_below_the_least_number_lost_nodes_are_waited_for_and_then_the_job_ends():
    case = Case("n1", "n2", rejoin_timeout_s=20.0)
    case.lose("n2")
    case.end("n1", EXIT_RETRY)
    case.later(10)
    assert case.it.exit_code is None
    case.join("n2")
    assert case.world() == ["n1", "n2"]  # a node that was only away
    case.lose("n2")
    case.end("n1", EXIT_RETRY)
    case.later(21)
    assert case.it.exit_code == EXIT_NODE_LOST and "1 node left, 2 required" in case.said[-1]


def test_a_spare_takes_the_place_of_a_lost_node():
    case = Case("n1", "n2", "n3", min_nodes=2, max_nodes=2)
    assert case.world() == ["n1", "n2"]
    case.later(SETTLE_S)
    assert any("n3 waits as a spare" in line for line in case.said) and case.orders("n3") == ["wait"]
    case.lose("n1")
    case.end("n2", EXIT_RETRY)
    assert case.world() == ["n2", "n3"]


def test_newcomers_are_taken_in_together_after_a_save_and_come_last():
    case = Case("n2", min_nodes=1, max_nodes=3)
    case.later(6)
    case.join("n1")
    case.later(SETTLE_S / 2)
    assert case.it.phase == "training"
    case.join("n3")
    case.later(SETTLE_S)
    assert case.sent[-1][1] == {"do": "stop", "round": 1, "why": "regroup"}
    case.end("n2", EXIT_REGROUP)
    assert case.world() == ["n2", "n1", "n3"] and case.it.restarts == 0


def test_saved_for_newcomers_is_no_success_and_a_success_is_no_restart():
    case = Case("n1", "n2", min_nodes=1, max_nodes=3)
    case.later(6)
    case.join("n3")
    case.later(SETTLE_S)
    case.end("n1", EXIT_REGROUP)
    case.end("n2", EXIT_REGROUP)  # before or after its launcher was told: the same
    assert case.world() == ["n1", "n2", "n3"]
    for name in ("n1", "n2", "n3"):
        assert case.it.exit_code is None
        case.end(name, EXIT_OK)
    assert case.it.exit_code == EXIT_OK


@pytest.mark.parametrize(
    ("nodes", "batch", "world", "spare"), [(3, 16, 2, 1), (4, 24, 4, 0), (7, 12, 6, 1), (5, 8, 4, 1)]
)
def test_the_largest_world_that_divides_the_batch(nodes, batch, world, spare):
    names = [f"n{i}" for i in range(1, nodes + 1)]
    case = Case(*names, min_nodes=1, batch_size=batch)
    case.later(6)
    assert len(case.world()) == world
    case.later(SETTLE_S)
    assert sum("waits as a spare" in line and str(batch) in line for line in case.said) == spare


def test_a_batch_that_no_number_of_nodes_divides_is_the_users_to_mend():
    case = Case("n1", "n2", "n3", batch_size=16)
    assert case.it.exit_code == EXIT_USER and "--train.global_batch_size 16" in case.said[0]


def test_failures_are_counted_over_all_nodes_and_the_first_cause_is_named():
    case = Case("n1", "n2", max_restarts=1)
    for code in (None, EXIT_RETRY):
        case.end("n1", EXIT_RETRY, "rank 0 (n1) ended with exit code 1")
        assert case.orders("n2")[-1] == "stop"
        case.end("n2", -11, "rank 1 (n2) was killed by SIGSEGV")
        assert case.it.exit_code == code
    assert "rank 1 (n2) was killed by SIGSEGV; restart 1 of 1" in case.said
    assert case.said[-1].startswith("rank 1 (n2) was killed by SIGSEGV after 1 restart")


def test_what_the_user_must_mend_ends_all_at_once():
    case = Case("n1", "n2", max_restarts=3)
    case.end("n2", EXIT_USER)
    assert case.it.exit_code == EXIT_USER and case.orders("n1")[-1] == "end"


def test_a_node_with_a_gpu_fault_is_left_out_and_the_others_go_on_if_they_may():
    case = Case("n1", "n2", "n3", min_nodes=2)
    case.end("n2", EXIT_GPU_FAULT, "rank 1 (n2) ended with exit code 71")
    assert case.orders("n2")[-1] == "end"
    case.end("n1", EXIT_RETRY)
    case.end("n3", EXIT_RETRY)
    assert case.world() == ["n1", "n3"]
    case.end("n3", EXIT_GPU_FAULT)
    assert case.it.exit_code == EXIT_GPU_FAULT


def test_a_request_to_stop_ends_the_job_when_all_have_saved():
    case = Case("n1", "n2")
    case.it.ask_to_stop(1, "SIGTERM")
    case.end("n1", EXIT_INTERRUPTED)
    assert case.it.exit_code is None
    case.end("n2", EXIT_INTERRUPTED)
    assert case.it.exit_code == EXIT_INTERRUPTED


def test_a_request_to_a_spare_is_passed_on_to_those_that_train():
    case = Case("n1", "n2", min_nodes=1, max_nodes=1)
    assert case.world() == ["n1"]
    case.it.ask_to_stop(1, "SIGTERM")
    assert "stop" not in case.orders("n1")  # its own ranks know
    case.it.ask_to_stop(2, "SIGTERM")
    assert case.sent[-1] == (1, {"do": "stop", "round": 1, "why": "request"})
    case.end("n1", EXIT_INTERRUPTED)
    assert case.it.exit_code == EXIT_INTERRUPTED


def test_a_request_to_stop_before_anything_began_ends_the_job():
    case = Case("n1", min_nodes=2, max_nodes=2)
    case.it.ask_to_stop(1, "SIGTERM")
    assert case.it.exit_code == EXIT_INTERRUPTED


def test_asked_to_stop_while_nodes_join():
    case = Case("n1", "n2", min_nodes=1, max_nodes=3)
    case.later(6)
    case.join("n3")
    case.later(SETTLE_S)
    case.it.ask_to_stop(1, "SIGTERM")
    case.end("n1", EXIT_REGROUP)
    case.end("n2", EXIT_REGROUP)
    assert case.it.exit_code == EXIT_INTERRUPTED  # saved, and asked to stop: no further round


@pytest.mark.parametrize("leave", [Case.lose, lambda case, name: case.end(name, EXIT_GPU_FAULT)])
def test_a_loss_or_a_gpu_fault_while_all_save_for_a_newcomer(leave):
    case = Case("n1", "n2", min_nodes=1, max_nodes=3)
    case.later(6)
    case.join("n3")
    case.later(SETTLE_S)
    leave(case, "n1")
    assert case.sent[-1] == (2, {"do": "stop", "round": 1, "why": "loss"})  # it can't save alone
    case.end("n2", EXIT_RETRY)
    assert case.world() == ["n2", "n3"] and case.it.restarts == 0


def test_ranks_that_could_save_when_a_launcher_was_lost_go_on():
    case = Case("n1", "n2", min_nodes=1)
    case.lose("n2")
    case.end("n1", EXIT_REGROUP)
    assert case.world() == ["n1"] and case.it.exit_code is None and case.it.restarts == 0


def test_reports_of_an_earlier_round_do_not_count():
    case = Case("n1", "n2", min_nodes=1)
    case.lose("n2")
    case.end("n1", EXIT_RETRY)
    case.it.report(1, 1, EXIT_USER)
    assert case.it.round == 2 and case.it.exit_code is None


def test_a_rank_that_dies_while_all_save_for_a_newcomer_does_not_leave_the_others_waiting():
    case = Case("n1", "n2", min_nodes=1, max_nodes=3, max_restarts=1)
    case.later(6)
    case.join("n3")
    case.later(SETTLE_S)
    case.end("n1", -9, "rank 0 (n1) was killed by SIGKILL")
    assert case.sent[-1] == (2, {"do": "stop", "round": 1, "why": "failure"})
    case.end("n2", EXIT_RETRY)
    assert case.world() == ["n1", "n2", "n3"] and case.it.restarts == 1
