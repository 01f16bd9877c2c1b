"""A study as a job of Slurm and of Kubernetes, with stand-ins for both that run what they are given; and devices."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from codellm_jax import cli
from codellm_jax.study.devices import surroundings
from codellm_jax.study.printed import kubernetes_job, slurm_script

ROOT = Path(__file__).resolve().parents[2]
ODD = ["study", "--gin_file=my study's.gin", "--gin.VOCABULARY=$(NAME) $$ ${HOME} `id` $(id) \"q\" 'it''s' \\n \\",
       "--gin.ARMS={'é': {'CODE_RATE': 0.5}}\n#SBATCH --array=0-99\n...\n--- # none: [é, \U0001f600]\t\x7f\x85\u2028",
       "--gin.X=", "--gin.Y= yes: no ", "--gin.Z=!x &y *z %a @b | > ?"]
RECORDER = f"""#!{sys.executable}
import json, os, sys
place = os.environ.get("SLURM_ARRAY_TASK_ID", os.environ.get("JOB_COMPLETION_INDEX"))
open(os.path.join(os.environ["FAKE"], "given." + place), "w").write(json.dumps(sys.argv[1:]))
"""
STUDY = ["study", "--gin_file=gin/study.gin", "--gin.evaluation/TASKS=[]", "--gin.SEEDS=[0]",
         "--gin.ARMS={'A': {'CODE_RATE': 0.0}, 'B': {'CODE_RATE': 0.5}, 'C': {'from': 'A', 'CODE_RATE': 0.0}}"]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of stand-ins on PATH; `t5x` writes down what it is given."""
    write(tmp_path / "t5x", RECORDER)
    write(tmp_path / "srun", '#!/bin/sh\nSLURM_PROCID=0 SLURM_NTASKS=1 exec "$@"\n')
    monkeypatch.setenv("FAKE", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def sbatch(script: str, folder: Path) -> list[int]:
    """Runs a job array as sbatch does: its lines before the first command are read, and each element is a process."""
    path = folder / "study.sbatch"
    path.write_text(script)
    options = {}
    for line in script.splitlines():
        if line.startswith("#SBATCH --"):
            name, _, value = line.removeprefix("#SBATCH --").partition("=")
            options[name] = value
        elif line and not line.startswith("#"):
            break
    first, last = map(int, options["array"].split("-"))
    assert options["ntasks"] == options["nodes"] == "1" and script.startswith("#!/bin/bash\n")
    running = [subprocess.Popen(["bash", str(path)], cwd=ROOT, env=os.environ | {"SLURM_ARRAY_TASK_ID": str(element)})
               for element in range(first, last + 1)]
    return [process.wait(120) for process in running]


def kubernetes(manifest: str) -> list[int]:
    """Runs the pods of an indexed job, after what the API asks of one."""
    job: dict[str, Any] = yaml.safe_load(manifest)
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job") and re.fullmatch(
        r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", job["metadata"]["name"])
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"]
    assert pod["restartPolicy"] == "Never"  # as a podFailurePolicy wants it
    mounted = {mount["name"] for mount in pod["containers"][0].get("volumeMounts", [])}
    assert mounted == {volume["name"] for volume in pod.get("volumes", [])}

    def expanded(word: str, variables: dict[str, str]) -> str:
        """As the kubelet does it: $$ is a dollar, $(NAME) a variable where there is one."""
        return re.sub(r"\$\$|\$\((\w+)\)", lambda found: "$" if found[0] == "$$" else
                      variables.get(found[1], found[0]), word)

    running = []
    for index in range(spec["completions"]):
        variables = {"NAME": "expanded", "JOB_COMPLETION_INDEX": str(index)}
        running.append(subprocess.Popen([expanded(word, variables) for word in pod["containers"][0]["command"]],
                                        cwd=ROOT, env=os.environ | variables))
    return [process.wait(120) for process in running]


def given(folder: Path) -> list[list[str]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("given.*"))]


def test_odd_settings_come_through_slurm(fake):
    assert sbatch(slurm_script("t5x-s", "a\nb", 3, ["t5x", *ODD]), fake) == [0, 0, 0]
    assert given(fake) == [ODD] * 3


def test_odd_settings_come_through_kubernetes(fake):
    assert kubernetes(kubernetes_job("t5x-s", "gs://a\nb", 3, ["t5x", *ODD])) == [0, 0, 0]
    assert given(fake) == [ODD] * 3


@pytest.mark.parametrize("form", ["slurm", pytest.param("kubernetes", marks=pytest.mark.slow)])
def test_the_printed_job_makes_the_study(fake, monkeypatch, capsys, form):
    directory = fake / "My study"
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT}/tests/study")
    monkeypatch.setenv("STEP_SECONDS", "0.005")
    write(fake / "t5x", f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/study/stand_in.py "$@"\n')
    flags = [*STUDY, f"--gin.STUDY_DIR={directory}", "--gin.pretraining/TRAIN_STEPS=8", "--gin.tuning/TRAIN_STEPS=8"]
    assert cli.main([*flags, f"--print_commands={form}"]) == 0
    printed = capsys.readouterr().out
    assert not directory.exists() and "t5x-my-study" in printed
    assert (sbatch(printed, fake) if form == "slurm" else kubernetes(printed)) == [0, 0]  # A and B, then C
    steps = [tuple(line.split()[:2]) for line in (directory / "log").read_text().splitlines()]
    assert sorted(steps) == sorted((f"{arm}.seed0", str(step)) for arm in "ABC" for step in range(1, 9))


def test_the_jobs_ask_for_what_they_need(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert cli.main([*STUDY, "--gin.STUDY_DIR=gs://bucket/Study_1", "--arm=C", "--print_commands=slurm"]) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --array=0-0\n" in script and "#SBATCH --signal=TERM@300\n" in script
    assert shlex.split(script.splitlines()[-1]) == [
        "exec", "srun", "t5x", "study", "--gin_file=gin/study.gin", "--arm=C", *STUDY[2:],
        "--gin.STUDY_DIR=gs://bucket/Study_1", "--worker"]
    assert cli.main([*STUDY, "--devices_per_run=2", "--print_commands=slurm"]) == 0
    assert shlex.split(capsys.readouterr().out.splitlines()[-1])[-2:] == ["--worker", "--devices_per_run=2"]
    assert cli.main([*STUDY, "--gin.STUDY_DIR=/shared/study", "--print_commands=kubernetes"]) == 0
    pod = yaml.safe_load(capsys.readouterr().out)["spec"]["template"]["spec"]
    assert pod["containers"][0]["volumeMounts"] == [{"name": "study", "mountPath": "/shared/study"}]
    assert cli.main([*STUDY, "--gin.STUDY_DIR=runs/study", "--print_commands=kubernetes"]) == 1
    assert capsys.readouterr().err.startswith("t5x study: error: STUDY_DIR is runs/study, which pods do not share:")


def test_plain_print_commands_and_unknown_forms(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert cli.main([*STUDY, "--print_commands"]) == 0
    plain = capsys.readouterr().out
    for arguments in ([*STUDY, "--print_commands=shell"], ["study", "--print_commands", *reversed(STUDY[1:])]):
        assert cli.main(arguments) == 0
        assert capsys.readouterr().out.splitlines()[:-1] == plain.splitlines()[:-1]
    with pytest.raises(SystemExit):
        cli.main([*STUDY, "--print_commands=pbs"])
    assert "pbs" in capsys.readouterr().err


def test_graphics_cards_are_shared_out():
    assert [one["CUDA_VISIBLE_DEVICES"] for one in surroundings(1, "gpu", 3, {"A": "b"})] == ["0", "1", "2"]
    shares = surroundings(2, "gpu", 5, {"CUDA_VISIBLE_DEVICES": "7,GPU-1,5,4,3", "A": "b"})
    assert shares == [{"CUDA_VISIBLE_DEVICES": "7,GPU-1", "A": "b"}, {"CUDA_VISIBLE_DEVICES": "5,4", "A": "b"}]


def test_chips_are_shared_out():
    shares = surroundings(2, "tpu", 4, {})
    assert [share["TPU_VISIBLE_CHIPS"] for share in shares] == ["0,1", "2,3"]
    assert {share["TPU_CHIPS_PER_PROCESS_BOUNDS"] for share in shares} == {"1,2,1"}
    assert {share["TPU_PROCESS_BOUNDS"] for share in shares} == {"1,1,1"}
    with pytest.raises(ValueError, match="--devices_per_run=3: a process can use 1, 2, 4, 8 TPU chips"):
        surroundings(3, "tpu", 8, {})


def test_a_process_with_chips_of_its_own_joins_no_others(monkeypatch):
    from codellm_jax.runtime import supervision

    monkeypatch.setattr(supervision.glob, "glob", lambda pattern: ["/dev/accel0"])
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert supervision.has_others()
    monkeypatch.setenv("TPU_PROCESS_BOUNDS", "1,1,1")
    assert not supervision.has_others()


def test_a_worker_that_is_one_of_slurms_tasks_trains_alone(monkeypatch):
    from codellm_jax.runtime import supervision

    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "2")
    assert supervision.has_others()
    kept = supervision.without_others(os.environ)
    monkeypatch.delenv("SLURM_NTASKS")
    monkeypatch.delenv("SLURM_PROCID")
    assert kept == dict(os.environ) and not supervision.has_others()


def test_processors_are_shared_out():
    script = "import jax; print(jax.local_device_count())"
    [one, _] = surroundings(3, "cpu", 8, os.environ | {"JAX_PLATFORMS": "cpu"})
    done = subprocess.run([sys.executable, "-c", script], env=one, capture_output=True, text=True, check=True)
    assert done.stdout == "3\n"
    with pytest.raises(ValueError, match="--devices_per_run=9: this machine has 8 cpu device"):
        surroundings(9, "cpu", 8, {})
