"""The plan of a study in forms for other tools: shell commands, a Slurm job array, a Kubernetes job."""

import re
import shlex
from collections.abc import Sequence
from typing import Any

import yaml

from codellm_jax.study.arms import Study, waves
from codellm_jax.study.planned import Planned

FORMS = ("shell", "slurm", "kubernetes")
IMAGE = "REGION-docker.pkg.dev/PROJECT/REPOSITORY/codellm_jax:COMMIT"  # as in docs/gke-jobset.yaml


def printed(form: str, chosen: Sequence[Planned], asked: Study, search_paths: Sequence[str],
            again: Sequence[str], devices_per_run: int | None) -> str:
    """The plan in one of FORMS.

    Args:
      chosen: the runs.
      search_paths: additional folders in which to look for gin files.
      again: the arguments of `t5x` that make the same runs of the same study.
      devices_per_run: for several workers per machine; None for one worker per machine.

    Raises:
      ValueError: the study lies in a place that workers would not share.
    """
    if form == "shell":
        return shell_commands(chosen, asked, search_paths, again)
    workers = max(len(group) for group in waves([one.run for one in chosen]))  # more would be idle
    name = "t5x-" + re.sub(r"[^a-z0-9]+", "-", asked.directory.rstrip("/").rsplit("/", 1)[-1].lower()).strip("-")
    command = ["t5x", *again, "--worker", *([f"--devices_per_run={devices_per_run}"] if devices_per_run else [])]
    make = slurm_script if form == "slurm" else kubernetes_job
    return make(name[:40].rstrip("-"), asked.directory, workers, command)


def shell_commands(chosen: Sequence[Planned], asked: Study, search_paths: Sequence[str], again: Sequence[str]) -> str:
    """The plan as shell commands, with comments on which may run concurrently."""
    by_name = {one.run.name: one for one in chosen}
    lines = [f"# {asked.directory}, {asked.comparison}: {len(chosen)} runs. Runs of one group may run concurrently, "
             "on any machines with access to that directory and the data."]
    for number, group in enumerate(waves([one.run for one in chosen]), 1):
        lines += ["", f"# Group {number}" + (", once the group before is done" if number > 1 else "")]
        for run in group:
            one = by_name[run.name]
            lines.append(" && ".join(shlex.join(["t5x", *command]) for command in (
                one.train_command(search_paths),
                *([one.eval_command(search_paths)] if one.tasks else []))))
    return "\n".join([*lines, "", "# When all are done: write the report",
                      shlex.join(["t5x", *again])])


def slurm_script(name: str, directory: str, workers: int, command: Sequence[str]) -> str:
    """A script for sbatch: a job array of workers, one task each."""
    return "\n".join([
        "#!/bin/bash",
        f"# {workers} workers share the study in {_in_comment(directory)}, to which every node must have access, as to "
        "the data and the environment of t5x.",
        "#   sbatch --gpus=1 --time=24:00:00 study.sbatch",
        "# More or fewer: sbatch --array=0-7 ...; submitting the script again continues where they ended. Five "
        "minutes before",
        "# its time limit each worker gets a signal to save and release its run.",
        f"#SBATCH --job-name={name}",
        f"#SBATCH --array=0-{workers - 1}",
        "#SBATCH --nodes=1",
        "#SBATCH --ntasks=1",
        "#SBATCH --requeue",
        "#SBATCH --signal=TERM@300",
        f"exec srun {shlex.join(command)}"])


def kubernetes_job(name: str, directory: str, workers: int, command: Sequence[str]) -> str:
    """A manifest for kubectl: an indexed Job of workers, one pod each.

    Raises:
      ValueError: STUDY_DIR is relative to the working directory of a process.
    """
    if "://" not in directory and not directory.startswith("/"):
        raise ValueError(f"STUDY_DIR is {directory}, which pods do not share: use gs://BUCKET/STUDY, or an absolute "
                         "path, at which the manifest mounts a volume.")
    container: dict[str, Any] = {
        "name": "t5x", "image": IMAGE,
        # Kubernetes turns two dollars into one, and would read $(NAME) as a variable.
        "command": [word.replace("$", "$$") for word in command]}
    pod: dict[str, Any] = {"restartPolicy": "Never", "terminationGracePeriodSeconds": 300, "containers": [container]}
    header = [
        f"# {workers} workers share the study in {_in_comment(directory)}.",
        "#   kubectl apply -f study.yaml",
        "# Set the image, and give the container the devices of a worker, such as resources: {limits: "
        "{nvidia.com/gpu: 1}};",
        "# docs/gke-jobset.yaml shows the settings for TPUs. The image must contain your own gin files."]
    if "://" not in directory:
        header.append("# CLAIM is a volume that many pods can write (ReadWriteMany).")
        container["volumeMounts"] = [{"name": "study", "mountPath": directory}]
        pod["volumes"] = [{"name": "study", "persistentVolumeClaim": {"claimName": "CLAIM"}}]
    job = {
        "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name},
        "spec": {
            "completionMode": "Indexed", "completions": workers, "parallelism": workers,
            # An evicted pod does not count as a failure. A pod whose study has failed runs is not restarted: workers
            # leave failed runs alone, and `t5x study` tries them again.
            "backoffLimitPerIndex": 2,
            "podFailurePolicy": {"rules": [
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {"action": "FailIndex", "onExitCodes": {"containerName": "t5x", "operator": "In", "values": [1]}}]},
            "template": {"spec": pod}}}
    return "\n".join([*header, yaml.safe_dump(job, sort_keys=False, allow_unicode=True, width=1 << 20).rstrip("\n")])


def _in_comment(text: str) -> str:
    """A text on a single line."""
    return " ".join(text.split())
