"""The guide to Cloud TPU, the Kubernetes manifest and the Dockerfile: as far as they can be held without a cluster."""

import math
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from codellm_jax import cli
from codellm_jax.configuration import read_configuration, require_types, shipped_gin_files
from codellm_jax.pods.job import accelerator, require_reachable

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "cloud-tpu.md").read_text()
MANIFEST = (ROOT / "docs" / "gke-jobset.yaml").read_text()
JOBSET = yaml.safe_load(MANIFEST)
JOB = JOBSET["spec"]["replicatedJobs"][0]["template"]["spec"]
POD = JOB["template"]["spec"]
CONTAINER = POD["containers"][0]
# Of each accelerator its name in GKE and how many dimensions its topologies have.
ACCELERATORS = {"v4": ("tpu-v4-podslice", 3), "v5e": ("tpu-v5-lite-podslice", 2), "v5p": ("tpu-v5p-slice", 3),
                "v6e": ("tpu-v6e-slice", 2)}
CHIPS_A_HOST = 4


def chips(name: str) -> int:
    generation, size = name.split("-")
    return int(size) // (2 if generation in ("v4", "v5p") else 1)


def guide_commands() -> list[str]:
    return re.findall(r"^t5x launch .*$", GUIDE, flags=re.MULTILINE)


@pytest.mark.parametrize("command", guide_commands())
def test_the_commands_of_the_guide(command, checkout, monkeypatch, capsys):
    monkeypatch.chdir(checkout)
    arguments = shlex.split(command)[1:]
    if "--print_only" not in arguments:
        arguments.insert(1, "--print_only")
    assert cli.main(arguments) == 0, capsys.readouterr().err
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if line.startswith("gcloud ")]
    assert [line[4] for line in lines if line[3] == "queued-resources"] == ["create", "describe", "delete"]
    assert sum("uv pip install" in line[-1] for line in lines) == (2 if "--tpu=2x" in command else 1)


def test_the_guide_has_commands_and_true_links():
    assert len(guide_commands()) == 3
    for target in re.findall(r"\]\(((?!http)[^)]+)\)", GUIDE):
        assert (ROOT / "docs" / target).exists(), target


def test_the_accelerators_of_the_guide():
    rows = re.findall(r"^\| `(v[^`]+)` \.\.\. `(v[^`]+)` .* \| (.*) \| `(.*)` \|$", GUIDE, flags=re.MULTILINE)
    assert len(rows) == 4
    for first, last, asked, software in rows:
        for name in (first, last):
            found = accelerator(name)
            assert found.runtime_version == software
            assert found.type == (name if asked == "the same" else f"v5litepod-{name.split('-')[1]}")


def test_the_manifest_has_what_a_jobset_needs():
    assert (JOBSET["apiVersion"], JOBSET["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert JOBSET["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    assert (JOB["completionMode"], JOB["backoffLimit"], POD["restartPolicy"]) == ("Indexed", 0, "Never")
    # The reason that a job has which its own failure policy ended, and what that policy catches.
    assert JOBSET["spec"]["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    catches = JOB["podFailurePolicy"]["rules"]
    assert catches[0]["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert catches[1]["onExitCodes"] == {"containerName": CONTAINER["name"], "operator": "In", "values": [143]}


def test_hosts_and_topology_of_the_manifest_belong_together():
    selector = POD["nodeSelector"]
    topology = [int(side) for side in selector["cloud.google.com/gke-tpu-topology"].split("x")]
    tpu = CONTAINER["resources"]
    assert tpu["limits"] == tpu["requests"] == {"google.com/tpu": CHIPS_A_HOST}
    assert JOB["completions"] == JOB["parallelism"] == math.prod(topology) // CHIPS_A_HOST
    assert (selector["cloud.google.com/gke-tpu-accelerator"], len(topology)) in ACCELERATORS.values()


def test_the_table_of_the_manifest():
    rows = re.findall(r"(v\d\w?-\d+) +(tpu-[\w-]+) +([\dx]+) +(\d+)", MANIFEST)
    assert len(rows) == 4
    for name, label, topology, hosts in rows:
        accelerator(name)
        sides = [int(side) for side in topology.split("x")]
        assert (label, len(sides)) == ACCELERATORS[name.split("-")[0]]
        assert math.prod(sides) == chips(name) == CHIPS_A_HOST * int(hosts)


def test_the_command_of_the_manifest_is_one():
    assert CONTAINER["command"] == ["bash", "-c"]
    script, name, *arguments = CONTAINER["args"]
    assert name == "t5x" and arguments[0] == "train"
    files = [flag.split("=", 1)[1] for flag in arguments if flag.startswith("--gin_file=")]
    overrides = [tuple(flag.removeprefix("--gin.").split("=", 1)) for flag in arguments if flag.startswith("--gin.")]
    configuration = read_configuration(files, overrides)
    require_types(configuration)
    settings = {name: setting.value for name, setting in configuration.effective.items()}
    assert require_reachable("train", files, [], settings, list(shipped_gin_files())).startswith("gs://")


@pytest.mark.parametrize("body, terminate, status", [
    ("exit 0", False, 0), ("exit 3", False, 3),
    ("trap 'touch saved; exit 0' TERM; touch ready; while :; do sleep 0.02; done", True, 143)])
def test_a_terminated_container_saves_and_is_not_done(tmp_path, body, terminate, status):
    """The shell is the container's first process, so that it alone gets the signal."""
    t5x = tmp_path / "t5x"
    t5x.write_text(f'#!/bin/bash\necho "$*" >given\n{body}\n')
    t5x.chmod(0o755)
    # Not every machine lets a shell lock that much memory, and none of this needs it.
    script = CONTAINER["args"][0].replace("ulimit -l", ": ulimit -l")
    process = subprocess.Popen([*CONTAINER["command"], script, *CONTAINER["args"][1:]], cwd=tmp_path,
                               env={"PATH": f"{tmp_path}:/usr/bin:/bin"})
    while terminate and not (tmp_path / "ready").exists():
        time.sleep(0.01)
    if terminate:
        process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == status
    assert (tmp_path / "given").read_text().split() == CONTAINER["args"][2:]
    assert (tmp_path / "saved").exists() == terminate


def test_the_image_copies_what_is_there_and_ends_without_root():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    for line in lines:
        if line.startswith("COPY "):
            for name in line.split()[1:-1]:
                assert (ROOT / name).exists(), name
    copied = {name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]}
    assert {"setup.py", "pyproject.toml", "README.md", "codellm_jax", "tasks", "gin"} <= copied
    assert [line for line in lines if line.startswith("USER ")] == ["USER t5x"]
    assert lines[-1] == 'ENTRYPOINT ["t5x"]'
