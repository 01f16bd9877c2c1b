"""The plan of a study for something else to run: as commands, as a job array of Slurm, as a job of Kubernetes."""

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
      search_paths: where gin files are looked for besides.
      again: arguments of `t5x` that make the same runs of the same study.
      devices_per_run: of each machine's workers; None where a machine is one.

    Raises:
      ValueError: the study lies where the workers would not share it.
    """
    if form == "shell":
        return shell_commands(chosen, asked, search_paths, again)
    workers = max(len(group) for group in waves([one.run for one in chosen]))  # more have nothing to do
    name = "t5x-" + re.sub(r"[^a-z0-9]+", "-", asked.directory.rstrip("/").rsplit("/", 1)[-1].lower()).strip("-")
    command = ["t5x", *again, "--worker", *([f"--devices_per_run={devices_per_run}"] if devices_per_run else [])]
    make = slurm_script if form == "slurm" else kubernetes_job
    return make(name[:40].rstrip("-"), asked.directory, workers, command)


def shell_commands(chosen: Sequence[Planned], asked: Study, search_paths: Sequence[str], again: Sequence[str]) -> str:
    """The plan as shell commands, with comments that tell which may run at the same time."""
    by_name = {one.run.name: one for one in chosen}
    lines = [f"# {asked.directory}, {asked.comparison}: {len(chosen)} runs. Runs of one group may run concurrently, "
             "on any machines that see that directory and the data."]
    for number, group in enumerate(waves([one.run for one in chosen]), 1):
        lines += ["", f"# Group {number}" + (", once the group before is done" if number > 1 else "")]
        for run in group:
            one = by_name[run.name]
            lines.append(" && ".join(shlex.join(["t5x", *command]) for command in (
                one.train_command(search_paths),
                *([one.eval_command(search_paths)] if one.tasks else []))))
    return "\n".join([*lines, "", "# When all are done: writes the report of all of them",
                      shlex.join(["t5x", *again])])


def slurm_script(name: str, directory: str, workers: int, command: Sequence[str]) -> str:
    """A script for sbatch: a job array of workers, one task each."""
    return "\n".join([
        "#!/bin/bash",
        f"# {workers} workers share the study in {_in_comment(directory)}, which every node must see, like the data "
        "and the environment of t5x.",
        "#   sbatch --gpus=1 --time=24:00:00 study.sbatch",
        "# More or fewer: sbatch --array=0-7 ...; submitting the script again continues where they ended. Five "
        "minutes before",
        "# its time limit a worker is signalled to save its run and to release it.",
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
      ValueError: the study lies in a folder that is relative to where a process happens to start.
    """
    if "://" not in directory and not directory.startswith("/"):
        raise ValueError(f"STUDY_DIR is {directory}, which pods do not share: use gs://BUCKET/STUDY, or an absolute "
                         "path, at which the manifest mounts a volume.")
    container: dict[str, Any] = {
        "name": "t5x", "image": IMAGE,
        # Kubernetes makes one dollar of two, and would read $(NAME) as a variable.
        "command": [word.replace("$", "$$") for word in command]}
    pod: dict[str, Any] = {"restartPolicy": "Never", "terminationGracePeriodSeconds": 300, "containers": [container]}
    header = [
        f"# {workers} workers share the study in {_in_comment(directory)}.",
        "#   kubectl apply -f study.yaml",
        "# Set the image, and give the container the devices of a worker, such as resources: {limits: "
        "{nvidia.com/gpu: 1}};",
        "# docs/gke-jobset.yaml shows the settings for TPUs. The image must contain your own gin files."]
    if "://" not in directory:
        header.append("# CLAIM is a volume that many pods may write (ReadWriteMany).")
        container["volumeMounts"] = [{"name": "study", "mountPath": directory}]
        pod["volumes"] = [{"name": "study", "persistentVolumeClaim": {"claimName": "CLAIM"}}]
    job = {
        "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name},
        "spec": {
            "completionMode": "Indexed", "completions": workers, "parallelism": workers,
            # A pod that is taken away is no failure. One whose study has runs that fail is not tried again: a worker
            # leaves these alone, and `t5x study` tries them.
            "backoffLimitPerIndex": 2,
            "podFailurePolicy": {"rules": [
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {"action": "FailIndex", "onExitCodes": {"containerName": "t5x", "operator": "In", "values": [1]}}]},
            "template": {"spec": pod}}}
    return "\n".join([*header, yaml.safe_dump(job, sort_keys=False, allow_unicode=True, width=1 << 20).rstrip("\n")])


def _in_comment(text: str) -> str:
    """A text that stays in its line."""
    return " ".join(text.split())
