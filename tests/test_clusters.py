"""The examples for clusters without Slurm say what the program does."""

import configparser
import shlex
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from pipeline.errors import (
    EXIT_GPU_FAULT,
    EXIT_INTERRUPTED,
    EXIT_NODE_LOST,
    EXIT_RETRY,
    EXIT_STORE_LOST,
    EXIT_USER,
)
from pipeline.launch.options import parse

EXAMPLES = Path(__file__).parents[1] / "examples" / "clusters"


@pytest.fixture(scope="module")
def service_and_job() -> tuple[dict, dict]:
    service, job = yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())
    return service, job


def test_the_manifest_is_valid(service_and_job):
    for resource in service_and_job:
        kubernetes_validate.validate(resource, "1.31", strict=True)
    broken = yaml.safe_load(yaml.safe_dump(service_and_job[1]))
    rule = next(rule for rule in broken["spec"]["podFailurePolicy"]["rules"] if "onExitCodes" in rule)
    rule["onExitCodes"]["values"] = ["two"]
    with pytest.raises(kubernetes_validate.ValidationError):  # the schema is looked at
        kubernetes_validate.validate(broken, "1.31", strict=True)


def test_each_exit_code_has_its_rule(service_and_job):
    rules = service_and_job[1]["spec"]["podFailurePolicy"]["rules"]
    action = {
        code: rule["action"] for rule in reversed(rules) for code in rule.get("onExitCodes", {}).get("values", [])
    }
    assert action == {
        EXIT_USER: "FailJob",
        EXIT_INTERRUPTED: "Ignore",
        EXIT_STORE_LOST: "Ignore",
        EXIT_NODE_LOST: "Ignore",
        EXIT_RETRY: "Count",
        EXIT_GPU_FAULT: "Count",
    }


def test_the_pods_meet_and_have_time_to_save(service_and_job):
    service, job = service_and_job
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["pipeline", "launch"]
    arguments = [item.replace("--nproc-per-node=8", "--nproc-per-node=1") for item in container["args"]]
    options = parse(arguments)
    assert (
        options.host == f"{job['metadata']['name']}-0.{pod['subdomain']}"
        and pod["subdomain"] == service["metadata"]["name"]
    )
    assert options.limits.max_nodes == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert options.shutdown_timeout_s < pod["terminationGracePeriodSeconds"]
    assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
    assert options.limits.batch_size is not None  # the recipe is known, and read


def test_the_service_waits_for_the_save_and_does_not_repeat_what_must_be_fixed():
    text = (EXAMPLES / "pipeline.service").read_text().replace("\\\n", " ")
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(text)
    service = unit["Service"]
    program, verb, *arguments = shlex.split(service["ExecStart"])
    assert program.endswith("/bin/pipeline") and verb == "launch"
    options = parse([item.replace("=gpu", "=1") for item in arguments])
    assert options.command[0] == "train" and options.shutdown_timeout_s < float(service["TimeoutStopSec"])
    assert set(map(int, service["RestartPreventExitStatus"].split())) == {EXIT_USER, EXIT_GPU_FAULT}
    assert int(service["SuccessExitStatus"]) == EXIT_INTERRUPTED
