"""Cloud TPU jobs, with gcloud replaced by a recorder whose workers really run what they are sent."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from codellm_jax import cli
from codellm_jax.pods.job import Job, Source, accelerator, default_name, require_one_host, require_reachable, source
from codellm_jax.pods.launch import RESTARTS, commands, create, install_script, launch, nodes, poll_script, start_script

ROOT = Path(__file__).resolve().parents[2]
MIXED = "--gin_file=gin/mixed_pretrain.gin"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
WHERE = ["--zone=us-central2-b", "--project=mine", "--quiet"]

PYTHON3 = r"""#!/bin/bash
echo "python3 $*" >>"$HOME/calls"
if [ "$2" = uv ] && [ "$3" = venv ]; then mkdir -p t5x/venv/bin; cp "$FAKE/t5x" t5x/venv/bin/t5x; fi
"""
GIT = r"""#!/bin/bash
echo "git $*" >>"$HOME/calls"
if [ "$1" = clone ]; then mkdir -p t5x/source; fi
"""


def job(tpu: str = "v4-16", command: tuple[str, ...] = ("train", MIXED, "--gin.MODEL_DIR=gs://bucket/it's a run"),
        spot: bool = False) -> Job:
    return Job("t5x-run", accelerator(tpu), "us-central2-b", Source("https://host/me/code.git", COMMIT, ""), command,
               project="mine", spot=spot)


class Cloud:
    """A folder that the recorder reads its part from and writes down what it was asked."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        for name, text in {"bin/gcloud": f'#!/bin/sh\nexec {sys.executable} -I -S {ROOT}/tests/fake_gcloud.py "$@"\n',
                           "worker_bin/python3": PYTHON3, "worker_bin/git": GIT}.items():
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)
        monkeypatch.setenv("FAKE", str(folder))
        monkeypatch.setenv("PATH", f"{folder}/bin:{os.environ['PATH']}")
        self.t5x("echo done")

    def t5x(self, script: str) -> None:
        """What the command does on a worker; --help is for the installation."""
        path = self.folder / "t5x"
        path.write_text(f'#!/bin/bash\n[ "$1" = --help ] && exit\n{script}\n')
        path.chmod(0o755)

    def play(self, name: str, value: object) -> None:
        (self.folder / name).write_text(json.dumps(value))

    def commands(self) -> list[list[str]]:
        path = self.folder / "commands"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def story(self) -> list[str]:
        """What was asked, in a word each, repetitions once."""
        words = []
        for command in self.commands():
            script = command[-1]
            word = next((name for sign, name in (("uv venv", "install"), ("setsid", "start"), ("state=", "poll"))
                         if sign in script), command[3])
            if word == "poll" and "hostname" in script:
                word = "finish"
            if not words or words[-1] != word:
                words.append(word)
        return [word for word in words if word not in ("describe", "poll")]


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    return Cloud(tmp_path, monkeypatch)


def test_a_job_line_by_line(cloud, capsys):
    """Two workers, from nothing to nothing; what they are sent is spelled out once, here."""
    cloud.t5x('pwd; printf "%s|" "$@"; ulimit -n; sleep 0.3; echo the end')
    assert launch(job(spot=True), poll_seconds=0) == 0
    found = cloud.commands()
    label = next(word for word in found[1] if word.startswith("--labels=t5x-job=")).rpartition("=")[2]
    assert len(label) == 16
    queued = ["compute", "tpus", "queued-resources"]
    assert found[:5] == [
        [*queued, "describe", "t5x-run", *WHERE, "--format=json"],
        [*queued, "create", "t5x-run", *WHERE, "--node-id=t5x-run", "--accelerator-type=v4-16",
         "--runtime-version=tpu-ubuntu2204-base", f"--labels=t5x-job={label}", "--spot"],
        *[[*queued, "describe", "t5x-run", *WHERE, "--format=json"]] * 3]  # waiting, provisioning, active

    def ssh(worker: str, script: str) -> list[str]:
        return ["compute", "tpus", "tpu-vm", "ssh", "t5x-run", *WHERE, f"--worker={worker}",
                "--ssh-flag=-oConnectTimeout=20", "--ssh-flag=-oServerAliveInterval=20", f"--command={script}"]

    state = "if flock --nonblock lock true; then cat status 2>/dev/null || echo lost; else echo running; fi"
    assert found[5] == ssh(
        "0", f"cd ~/t5x 2>/dev/null || exit 0; state=$({state}); echo; echo {label} $state; "
             "tail --bytes=+1 log 2>/dev/null | head --bytes=1048576")
    assert found[6] == ssh(
        "all", f'set -e; cd; if [ "$(cat t5x/installed 2>/dev/null)" != {COMMIT} ]; then rm -rf t5x; mkdir t5x; '
               "PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --user --quiet --upgrade uv; "
               "GIT_TERMINAL_PROMPT=0 git clone --quiet https://host/me/code.git t5x/source; "
               f"git -C t5x/source checkout --quiet --detach {COMMIT}; "
               "python3 -m uv venv --quiet --python 3.11 t5x/venv; "
               "python3 -m uv pip install --quiet --python t5x/venv/bin/python './t5x/source[tpu]'; "
               f"t5x/venv/bin/t5x --help >/dev/null; echo {COMMIT} >t5x/installed; fi")
    assert found[7][:-1] == ssh("all", "")[:-1] and "setsid nohup bash -c" in found[7][-1]
    assert found[-2] == ssh(
        "all", f"cd ~/t5x; flock --timeout 60 lock true || true; state=$({state}); echo; echo {label} $(hostname) "
               '$state; [ "$state" = 0 ] || tail --lines=20 log | sed "s/^/$(hostname): /"')
    assert found[-1] == [*queued, "delete", "t5x-run", *WHERE, "--force"]
    printed = capsys.readouterr()
    hard = subprocess.run(["bash", "-c", "ulimit -Hn"], capture_output=True, text=True).stdout
    assert printed.out == (f"{cloud.folder}/t5x-run.0/t5x/source\ntrain|{MIXED}|--gin.MODEL_DIR=gs://bucket/it's a run|"
                           f"{hard}the end\n")
    assert "t5x-run is WAITING_FOR_RESOURCES" in printed.err


def test_slices(cloud):
    """Two nodes by one request; each is installed and started, and worker 0 of the first is listened to."""
    asked = create(job("2xv5e-256"))
    assert asked[6:] == [*WHERE, "--node-count=2", "--node-prefix=t5x-run", "--accelerator-type=v5litepod-256",
                         "--runtime-version=v2-alpha-tpuv5-lite", asked[-1]]
    assert nodes(job("2xv5e-256")) == ["t5x-run-0", "t5x-run-1"]
    assert launch(job("2xv5e-256"), poll_seconds=0) == 0
    found = [(command[4], command[-1]) for command in cloud.commands() if command[3] == "ssh"]
    for sign in ("uv venv", "setsid", "hostname"):
        assert sorted(node for node, script in found if sign in script) == ["t5x-run-0", "t5x-run-1"]
    assert {node for node, script in found if "tail --bytes" in script} == {"t5x-run-0"}


def test_a_failure_ends_with_its_status_and_what_the_worker_said(cloud, capsys):
    cloud.t5x('[ $WORKER = 0 ] || { echo out of memory; exit 3; }')
    assert launch(job(), poll_seconds=0) == 3
    told = capsys.readouterr().err
    assert "t5x-run.1: out of memory" in told and "1 of 2 workers failed; t5x-run.1: exit status 3" in told
    assert cloud.story() == ["create", "install", "start", "finish", "delete"]


def test_a_preemption_starts_the_same_command_on_new_tpus(cloud, capsys):
    cloud.t5x('if [ ! -e $FAKE/once ]; then echo first; if [ $WORKER = 1 ]; then sleep 2; touch $FAKE/once; '
              'echo \'["SUSPENDING", "SUSPENDED"]\' >$FAKE/state; fi; sleep 9; fi; echo second')
    assert launch(job(), poll_seconds=0) == 0
    assert cloud.story() == ["create", "install", "start", "delete", "create", "install", "start", "finish", "delete"]
    printed = capsys.readouterr()
    assert printed.out == "first\nsecond\n"
    assert "t5x-run is SUSPENDED: it is deleted and requested again." in printed.err


def test_a_command_that_saves_and_ends_with_0_at_a_preemption_is_not_done(cloud, capsys):
    """As t5x train does at the SIGTERM that a machine sends when it goes down, before the resource says so."""
    cloud.t5x('[ -e $FAKE/once ] && { echo second; exit 0; }; trap "sleep 0.1; exit 0" TERM; echo first\n'
              'if [ $WORKER = 1 ]; then touch $FAKE/once; sleep 0.2; kill -TERM -- -$(cat ~/t5x/pid); fi; '
              'sleep 0.3')
    assert launch(job(), poll_seconds=0) == 0
    assert capsys.readouterr().out == "first\nsecond\n"
    assert cloud.story().count("start") == 2


def test_a_crash_seconds_before_the_preemption_shows_is_one(cloud):
    cloud.t5x('[ -e $FAKE/once ] && exit 0; sleep 0.2; touch $FAKE/once; '
              'echo \'["ACTIVE", "ACTIVE", "ACTIVE", "SUSPENDED"]\' >$FAKE/later; exit 1')
    # The recorder's workers cannot be reached in any other state, so the state changes once they were all asked.
    (cloud.folder / "bin/gcloud").write_text((cloud.folder / "bin/gcloud").read_text().replace(
        "exec", 'case "$*" in *hostname*) after=1;; esac\n', 1) + f"""
status=$?
[ -z "$after" ] || [ ! -e {cloud.folder}/later ] || mv {cloud.folder}/later {cloud.folder}/state
exit $status
""")
    assert launch(job(), poll_seconds=0) == 0
    assert cloud.story() == ["create", "install", "start", "finish", "delete", "create", "install", "start", "finish",
                             "delete"]


def test_an_installation_that_fails_on_a_worker_is_tried_again_and_then_given_up(cloud, capfd):
    cloud.play("breaks", [["uv venv", 1]])
    assert launch(job(), poll_seconds=0) == 0
    assert "exit status 1" in capfd.readouterr().err
    cloud.play("breaks", [["uv venv", 1]] * 3)
    with pytest.raises(OSError, match="Installing the package failed on a worker 3 times"):
        launch(job(), poll_seconds=0)
    assert cloud.story()[-2:] == ["install", "delete"]


def test_a_dropped_connection_loses_no_line_and_repeats_none(cloud, capsys):
    cloud.t5x("for i in $(seq 60); do echo line $i; sleep 0.005; done")
    cloud.play("breaks", [["--bytes=+1 ", 255]] + [["tail --bytes", 255]] * 3)
    assert launch(job(), poll_seconds=0) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [f"line {i}" for i in range(1, 61)]
    assert "Worker 0 cannot be reached" in printed.err
    assert cloud.story().count("start") == 1


def test_what_gcloud_repeats_of_a_dropped_connection_is_not_told_twice(cloud, capsys):
    """gcloud tries again by itself, so that one answer may hold the beginning of another."""
    gcloud = cloud.folder / "bin/gcloud"
    gcloud.write_text(gcloud.read_text().replace(
        "exec", f'case "$*" in *"tail --bytes"*) {sys.executable} -I -S {ROOT}/tests/fake_gcloud.py "$@";; esac\nexec'))
    cloud.t5x("echo one; sleep 0.2; echo two")
    assert launch(job(), poll_seconds=0) == 0
    assert capsys.readouterr().out == "one\ntwo\n"


def test_a_machine_that_restarts_goes_on_in_place(cloud, capsys):
    """A restart ends the command and its lock and leaves no status; the installation is still there."""
    cloud.t5x('[ -e $FAKE/once ] && { echo second; exit 0; }; echo first; sleep 0.2; '
              '[ $WORKER = 1 ] || { sleep 0.1; touch $FAKE/once; kill -KILL -- -$(cat ~/t5x/pid); }; sleep 9')
    assert launch(job(), poll_seconds=0) == 0
    assert capsys.readouterr().out == "first\nsecond\n"
    assert cloud.story() == ["create", "install", "start", "install", "start", "finish", "delete"]
    # On the worker that had not gone down, too, the first command was ended before the second began.
    calls = [json.loads(line)[-1] for line in (cloud.folder / "commands").read_text().splitlines()]
    assert sum("setsid" in call for call in calls) == 2


def test_restarts_in_place_have_an_end(cloud):
    cloud.t5x("kill -KILL -- -$(cat ~/t5x/pid); sleep 9")
    with pytest.raises(OSError, match=f"went down under the command, {RESTARTS + 1} times"):
        launch(job(), poll_seconds=0)
    assert cloud.story()[-1] == "delete"


def test_a_resource_that_never_comes(cloud):
    cloud.play("plays", [["WAITING_FOR_RESOURCES", "FAILED: Quota 'TPUV4PodPerProjectPerZone' exceeded"]])
    with pytest.raises(OSError, match="t5x-run failed before it had a TPU: Quota 'TPUV4Pod.*' exceeded"):
        launch(job(), poll_seconds=0)
    assert cloud.story() == ["create", "delete"]


def test_what_gcloud_refuses_is_one_line(cloud):
    cloud.play("refusals", {"create": "Some lines\nERROR: (gcloud) PERMISSION_DENIED: tpu.nodes.create is missing"})
    with pytest.raises(OSError, match="gcloud refused to create t5x-run: ERROR: .gcloud. PERMISSION_DENIED"):
        launch(job(), poll_seconds=0)
    cloud.play("refusals", {"describe": "ERROR: you do not currently have an active account selected."})
    with pytest.raises(OSError, match="cannot query t5x-run: ERROR: you do not"):
        launch(job(), poll_seconds=0)
    assert [command[3] for command in cloud.commands()][-1] == "describe"  # nothing was made, nothing deleted


def test_a_resource_of_the_same_name_is_left_alone(cloud):
    cloud.play("state", ["ACTIVE"])
    cloud.play("label", "someone-else")
    with pytest.raises(ValueError, match="another command or commit created: delete it, or give"):
        launch(job(), poll_seconds=0)
    assert [command[3] for command in cloud.commands()] == ["describe"]


def test_a_second_launch_listens_to_the_job_that_runs(cloud, capsys):
    cloud.t5x("echo begun; until [ -e $FAKE/go ]; do sleep 0.02; done; echo the end")
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from launch_test import job, launch; " \
             "launch(job(), poll_seconds=0.01)"
    first = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                             env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert first.stdout is not None and first.stdout.readline() == b"begun\n"
    first.kill()  # as by a laptop whose battery is empty
    first.wait()
    (cloud.folder / "go").touch()
    assert launch(job(), poll_seconds=0) == 0
    assert capsys.readouterr().out.startswith("begun\nthe end\n")
    assert cloud.story().count("create") == 1 and cloud.story()[-1] == "delete"


@pytest.mark.parametrize("flags, number", [([], signal.SIGINT), (["--keep"], signal.SIGINT), ([], signal.SIGTERM)])
def test_an_interruption_deletes_the_resource_unless_it_is_to_be_kept(cloud, checkout, flags, number):
    cloud.play("plays", [["WAITING_FOR_RESOURCES"]])
    process = subprocess.Popen(
        [sys.executable, "-m", "codellm_jax.cli", "launch", "--tpu=v4-8", "--zone=us-central2-b", *flags, "--", "train",
         MIXED, "--gin.MODEL_DIR=gs://bucket/run"], cwd=checkout, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert process.stderr is not None
    while "WAITING_FOR_RESOURCES" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(number)
    rest = process.communicate(timeout=20)[1]
    assert process.returncode == 130 and rest.endswith("t5x launch: error: interrupted.\n")
    assert cloud.story() == (["create"] if flags else ["create", "delete"])
    assert ("gcloud compute tpus queued-resources delete t5x-run" in rest) == bool(flags)


def test_without_gcloud(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(FileNotFoundError, match="gcloud is not on PATH"):
        launch(job())


@pytest.mark.parametrize("script", [install_script(job()), start_script(job()), poll_script(job(), 0)])
def test_scripts_are_one_line_that_a_shell_takes(script):
    assert "\n" not in script
    assert subprocess.run(["bash", "-n", "-c", script]).returncode == 0


def test_what_is_printed_can_be_typed():
    lines = [line for line in commands(job("2xv5e-256")).splitlines() if line and not line.startswith("#")]
    assert len(lines) == 2 + 2 * 2 + 1 + 2 + 1
    assert [shlex.split(line)[0] for line in lines] == ["gcloud"] * len(lines)
    typed = subprocess.run(["bash", "-c", f"gcloud() {{ printf '%s' \"${{@: -1}}\"; }}; {lines[4]}"],
                           capture_output=True, text=True).stdout
    assert typed == "--command=" + start_script(job("2xv5e-256"))


@pytest.mark.parametrize("name, type_, software, slices", [
    ("v4-8", "v4-8", "tpu-ubuntu2204-base", 1), ("v4-128", "v4-128", "tpu-ubuntu2204-base", 1),
    ("v5e-256", "v5litepod-256", "v2-alpha-tpuv5-lite", 1), ("v5litepod-16", "v5litepod-16", "v2-alpha-tpuv5-lite", 1),
    ("v5p-128", "v5p-128", "v2-alpha-tpuv5", 1), ("v6e-256", "v6e-256", "v2-alpha-tpuv6e", 1),
    ("2xv5litepod-256", "v5litepod-256", "v2-alpha-tpuv5-lite", 2)])
def test_accelerators(name, type_, software, slices):
    found = accelerator(name)
    assert (found.type, found.runtime_version, found.slices) == (type_, software, slices)


@pytest.mark.parametrize("name, message", [
    ("v4-100", "There is no TPU topology 'v4-100' (the number counts TensorCores); nearest: v4-128, v4-64, v4-"),
    ("v5-256", "v5e-256"), ("v5e-512", "nearest: v5e-256"), ("2xv5e-255", "nearest: v5e-256"),
    ("tpu", "There is no TPU topology 'tpu'"), ("0xv4-8", "slices are joined from v4 on, 1 to 256"),
    ("v4", "'v4'"), ("v3-8", "jobs are started on v4, v5e, v5p, v6e")])
def test_wrong_accelerators(name, message):
    with pytest.raises(ValueError) as error:
        accelerator(name)
    assert message in str(error.value)


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e", "-C", str(folder), *arguments], check=True)


def test_the_commit_is_told_by_git(checkout):
    found = source(checkout)
    assert (found.url, len(found.commit), found.folder) == ("https://host/me/code.git", 40, "")
    assert source(checkout / "codellm_jax").folder == "codellm_jax"
    git(checkout, "remote", "set-url", "origin", "git@host:me/code.git")
    assert source(checkout).url == "https://host/me/code.git"
    git(checkout, "remote", "set-url", "origin", "ssh://git@host:2222/me/code.git")
    assert source(checkout).url == "https://host/me/code.git"


@pytest.mark.parametrize("change, message", [
    (lambda folder: (folder / "mine.gin").write_text(""), "1 files here are not committed, mine.gin first: commit"),
    (lambda folder: (folder / "new.py").write_text(""), "1 files here are not committed, new.py first"),
    (lambda folder: git(folder, "commit", "--quiet", "--allow-empty", "-m", "second"), "no remote has it. Push it."),
    (lambda folder: git(folder, "remote", "set-url", "origin", "/srv/code.git"), "cannot reach the commit's remote"),
    (lambda folder: git(folder, "remote", "set-url", "origin", "https://me:secret@host/x.git"), "name or password"),
    (lambda folder: (folder / "codellm_jax/pods/launch.py").unlink(), "not in a git checkout of codellm_jax")])
def test_a_commit_that_workers_could_not_install_is_refused(checkout, change, message):
    change(checkout)
    with pytest.raises(ValueError) as error:
        source(checkout)
    assert message in str(error.value) and "secret" not in str(error.value)


@pytest.mark.parametrize("settings, message", [
    ({"MODEL_DIR": "'runs/x'"}, "MODEL_DIR is runs/x on a local disk"),
    ({}, "MODEL_DIR is not set"),
    ({"MODEL_DIR": "'gs://b/x'", "DATA_DIR": "'/data'"}, "DATA_DIR is /data on a local disk"),
    ({"MODEL_DIR": "'gs://b/x'", "CORPORA": "{'text.a': {'json_lines': '/data/*.jsonl'}}"}, "CORPORA is /data/*.jsonl"),
    ({"MODEL_DIR": "'gs://b/x'", "VOCABULARY": "'my.model'"}, "VOCABULARY is my.model on a local disk")])
def test_what_workers_cannot_reach_is_refused(checkout, settings, message):
    with pytest.raises(ValueError) as error:
        require_reachable("train", ["mine.gin"], [], settings, [], checkout)
    assert message in str(error.value)


def test_what_workers_can_reach(checkout):
    settings = {"MODEL_DIR": "'gs://b/x'", "CACHE_DIR": "'~/.cache'", "VOCABULARY": "'python_8k'", "A": "%B",
                "INITIAL_CHECKPOINT_PATH": "None", "CORPORA": "{'text.a': {'json_lines': 'gs://b/*.gz'}}"}
    files = ["mine.gin", "gs://b/theirs.gin", "gin/mixed_pretrain.gin"]
    assert require_reachable("train", files, [], settings, ["gin/mixed_pretrain.gin"], checkout) == "gs://b/x"
    (checkout / "other.gin").write_text("")
    with pytest.raises(ValueError, match="cannot read other.gin: commit it"):
        require_reachable("train", ["other.gin"], [], settings, [], checkout)


@pytest.mark.parametrize("arguments, message", [
    (["--tpu=v4-9", "--zone=us-central2-b", "--", "train", MIXED], "nearest: v4-8"),
    (["--tpu=v4-8", "--zone=us-central2-b"], "the command for the TPUs follows --"),
    (["--tpu=v4-8", "--zone=us-central2-b", "--", "tarin"], "is one of train, eval"),
    (["--tpu=v4-8", "--zone=us-central2-b", "--", "train"], "no --gin_file is given"),
    (["--tpu=v4-8", "--zone=us-central2-b", "--", "train", "--gin_file=nowhere.gin"], "No gin file nowhere.gin"),
    (["--tpu=v4-8", "--zone=us-central2-b", "--", "train", MIXED, "--gin.BATCHSIZE=8"], "nearest: BATCH_SIZE"),
    (["--tpu=v4-8", "--zone=us-central2-b", "--", "train", MIXED, "--gin.SEED=abc"], "SEED must be of type int"),
    (["--tpu=v4-8", "--zone=us-central2-b", "--", "train", MIXED], "MODEL_DIR is runs/mixed_pretrain on a local disk"),
    (["--tpu=v4-8", "--zone=central", "--", "train", MIXED, "--gin.MODEL_DIR=gs://b/x"], "--zone must be a zone"),
    (["--tpu=v4-8", "--zone=us-central2-b", "--name=X", "--", "train", MIXED, "--gin.MODEL_DIR=gs://b/x"],
     "--name must be at most 40 lower-case letters"),
    (["--tpu=v4-8", "--zone=us-central2-b", "--sport", "--", "train", MIXED], "unknown argument --sport")])
def test_a_slip_costs_no_tpu(cloud, checkout, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(checkout)
    assert cli.main(["launch", *arguments]) != 0
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0], lines
    assert cloud.commands() == []


STUDY = ["--tpu=v5e-8", "--zone=us-central2-b", "--print_only", "--", "study", "--gin_file=gin/study.gin"]


def test_a_study_is_launched_on_one_host(cloud, checkout, monkeypatch, capsys):
    monkeypatch.chdir(checkout)
    assert cli.main(["launch", *STUDY, "--gin.STUDY_DIR=gs://b/s", "--devices_per_run=1"]) == 0
    assert '/t5x/venv/bin/t5x study --gin_file=gin/study.gin --gin.STUDY_DIR=gs://b/s --devices_per_run=1;' in \
        capsys.readouterr().out


@pytest.mark.parametrize("arguments, message", [
    (["--gin.STUDY_DIR=runs/study"], "STUDY_DIR is runs/study on a local disk"),
    (["--gin.STUDY_DIR=gs://b/s", "--gin.tuning/CORPORA={'text.a': {'instructions': '/data/x.json'}}"],
     "CORPORA is /data/x.json on a local disk"),
    (["--gin.STUDY_DIR=gs://b/s", "--gin.pretraining/VOCABULARY=my.model"], "VOCABULARY is my.model on a local disk")])
def test_what_a_studys_workers_cannot_reach_costs_no_tpu(cloud, checkout, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(checkout)
    assert cli.main(["launch", *STUDY, *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("tpu, fits", [("v4-8", True), ("v4-16", False), ("v5e-8", True), ("v5e-16", False),
                                       ("2xv5e-4", False), ("v5p-8", True), ("v6e-1", True)])
def test_a_study_wants_one_host(tpu, fits):
    if fits:
        return require_one_host(accelerator(tpu))
    with pytest.raises(ValueError, match="has several hosts, but a study trains each run on one"):
        require_one_host(accelerator(tpu))


def test_names():
    assert default_name("gs://bucket/runs/Mixed_2.6B/") == "t5x-mixed-2-6b"
    assert len(default_name("gs://bucket/" + "long" * 30)) == 40
