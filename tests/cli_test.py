"""The command: what it answers to a user's slips, and what --dry_run and explain print."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from codellm_jax import cli

ROOT = Path(__file__).resolve().parent.parent
MIXED = "--gin_file=gin/mixed_pretrain.gin"


def refusal(capsys, *arguments: str) -> str:
    """The one line on stderr with which a command is refused."""
    assert cli.main(arguments) != 0
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("arguments, message", [
    (["trian"], "there is no sub-command 'trian'; nearest: train"),
    (["train"], "no --gin_file is given"),
    (["study"], "no --gin_file is given; gin/study.gin is the file to start with."),
    (["train", MIXED, "--dryrun"], "unknown argument --dryrun; nearest: --dry_run"),
    (["train", MIXED, "--gin.SEED"], "--gin.SEED needs a value"),
    (["train", "--gin_file=gin/mixed_pretrian.gin"],
     "No gin file gin/mixed_pretrian.gin; nearest shipped: gin/mixed_pretrain.gin"),
    (["train", MIXED, "--gin.BATCHSIZE=8"], "nothing uses the setting BATCHSIZE; nearest: BATCH_SIZE"),
    (["train", MIXED, "--gin.CODE_RATE=1.5"], "CODE_RATE must lie between 0 (text only) and 1 (code only), found 1.5"),
    (["train", MIXED, "--gin.CODE_RATE=lots"], "--gin.CODE_RATE: CODE_RATE must be of type float | None, found 'lots'"),
    (["train", MIXED, "--gin.BATCH_SIZE=12"], "BATCH_SIZE = 12 cannot be divided by the mesh"),
    (["train", MIXED, "--gin.BATCH_SIZE=0"], "BATCH_SIZE must be a whole number of at least 1, found 0"),
    (["train", MIXED, "--gin.mesh.data=3"], "does not fit 8 devices"),
    (["train", MIXED, "--gin.mesh.model=8", "--gin.model.heads=4"], "cannot divide the parameter"),
    (["train", MIXED, "--gin.WARMUP_STEPS=900"], "WARMUP_STEPS = 900 must be at least 0 and below the 400 steps"),
    (["train", MIXED, "--gin.TRAIN_STEPS=0"], "TRAIN_STEPS must be a whole number of at least 1, found 0"),
    (["train", MIXED, "--gin.SEED=-1"], "SEED must be a whole number from 0"),
    (["train", MIXED, "--gin.SEED=abc"], "SEED must be of type int, found 'abc'"),
    (["train", MIXED, "--gin.BATCH_SIZE=True"], "BATCH_SIZE must be of type int, found True"),
    (["train", MIXED, "--gin.MODEL_DIR="], "MODEL_DIR is empty"),
    (["train", MIXED, "--gin.MODEL_DIR=3"], "MODEL_DIR must be of type str, found 3"),
    (["train", MIXED, "--gin.TASK_FEATURE_LENGTHS=256"], "TASK_FEATURE_LENGTHS must be of type Mapping[str, int]"),
    (["train", MIXED, "--gin.MAX_EPOCHS=1.5"], "MAX_EPOCHS must be of type int | None, found 1.5"),
    (["train", MIXED, "--gin.MIX_PHASES=5:3"], "MIX_PHASES must"),
    (["train", MIXED, "--gin.MIX_PHASES=['5:3', 'lots']"], "MIX_PHASES must list text:code ratios"),
    (["train", MIXED, "--gin.MIX_PHASES={0.5: '5:3'}"], "MIX_PHASES must start at 0"),
    (["train", MIXED, "--gin.MIX_PHASES={0: '5:3', 500: '1:1'}"], "a phase that starts at step 500, but training ends"),
    (["train", MIXED, "--gin.MIX_PHASES=[]"], "MIX_PHASES is empty"),
    (["train", MIXED, "--gin.MIX_PHASES={0: '5:3', '0.5': '1:1'}"], "starts that are numbers without quotes"),
    (["train", MIXED, "--gin.MIXTURE_OR_TASK_NAME=[]"], "MIXTURE_OR_TASK_NAME is empty"),
    (["train", MIXED, "--gin.MIXTURE_OR_TASK_NAME=python_rows_increase"], "changes its mix itself"),
    (["train", MIXED, "--gin.CODE_RATE=None"], "Neither CODE_RATE nor MIX_PHASES is set"),
    (["train", "--gin_file=gin/tune_text.gin"], "needs INITIAL_CHECKPOINT_PATH, which no file or flag sets"),
    (["train", "--gin_file=gin/tune_text.gin", "--gin.INITIAL_CHECKPOINT_PATH=nowhere"],
     "name the MODEL_DIR of a run that saved one"),
    (["train", MIXED, "--gin.train.keep_every=0"], "train.keep_every must be at least 1"),
    (["train", MIXED, "--gin.EXPORT_PERIOD=0"], "EXPORT_PERIOD must be at least 1, or None for never, found 0"),
    (["train", MIXED, "--gin.LEARNING_RATE=-1"], "LEARNING_RATE = -1"),
    (["train", MIXED, "--gin.mesh.rules=[('embed', 'foo')]"], "mesh.rules lays embed onto 'foo'"),
    (["train", MIXED, "--gin.train.optimizer=@optax.adamw"], "use @adamw, or @chain"),
    (["train", MIXED, "--gin.train.optimizer=@optax.lio"], "optax has no 'lio'; nearest: lion"),
    (["vocabulary", MIXED, "--output=/nowhere/my.model"], "/nowhere/my.model cannot be written: its directory"),
    (["train", MIXED, "--gin.VOCABULARY=nowhere.model"], "There is no vocabulary file nowhere.model"),
    (["train", MIXED, "--gin.VOCABULARY=python_9k"], "No vocabulary 'python_9k' is shipped"),
    (["train", MIXED, "--gin.model.heads=5"], "heads must divide hidden"),
    (["train", MIXED, "--gin.model.activation=gela"], "gela"),
    (["train", MIXED, "--gin.TASK_MODULES=['my_tasks']"], "my_tasks"),
    (["train", MIXED, "--gin.CORPORA={'text.a': {'json_lines': 'nowhere/*.jsonl'}}",
      "--gin.MIXTURE_OR_TASK_NAME=['text.a', 'code.python']"], "nowhere/*.jsonl"),
    (["train", MIXED, "--gin.CORPORA={'prose.a': {'text_files': '*'}}"], "prose.a"),
    (["train", MIXED, "--gin.MAX_EPOCHS=0"], "MAX_EPOCHS must be at least 1"),
    (["explain", "BATCH", MIXED], "Nothing is named 'BATCH'; nearest: BATCH_SIZE"),
])
def test_slips_get_one_line(capsys, arguments, message):
    assert message in refusal(capsys, *arguments)


def test_errors_end_without_what_gin_adds(capsys):
    assert refusal(capsys, "train", MIXED, "--gin.WARMUP_STEPS=900").endswith("lower it or raise TRAIN_STEPS.")


def test_an_unknown_mixture_gets_the_nearest_names(capsys, tiny_cache):
    line = refusal(capsys, "train", MIXED, f"--gin.CACHE_DIR={tiny_cache}",
                   "--gin.MIXTURE_OR_TASK_NAME=python_text_cod")
    assert "No SeqIO task or mixture is named 'python_text_cod'; nearest: python_text_code" in line


def test_a_corpus_smaller_than_a_row_is_refused(capsys, tmp_path):
    (tmp_path / "a.txt").write_text("too short")
    line = refusal(capsys, "train", MIXED, f"--gin.CACHE_DIR={tmp_path}", "--gin.CODE_RATE=0.0",
                   f"--gin.CORPORA={{'text.a': {{'text_files': '{tmp_path}/a.txt', 'holdout': 0}}}}",
                   "--gin.MIXTURE_OR_TASK_NAME=['text.a']")
    assert "text.a: its training split has" in line and "lower TASK_FEATURE_LENGTHS" in line


def test_passed_over_records_are_told_while_rows_are_cached(tmp_path):
    """By the command itself, once, in its plan; TensorFlow's own log is kept off the terminal."""
    lines = ['{"text": "a document of some words"}'] * 60 + ['{"text": '] * 7
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    done = subprocess.run(
        [sys.executable, "-m", "codellm_jax.cli", "train", MIXED, "--dry_run", f"--gin.CACHE_DIR={tmp_path}",
         "--gin.CODE_RATE=0.0", "--gin.MIXTURE_OR_TASK_NAME=['text.a']", "--gin.TASK_FEATURE_LENGTHS={'targets': 16}",
         f"--gin.CORPORA={{'text.a': {{'json_lines': '{tmp_path}/a.jsonl', 'holdout': 0}}}}"],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert "text.a, read for train: 60 records are documents, skipped: 7 broken JSON" in done.stdout
    assert done.stderr == ""


def test_a_pool_that_is_asked_for_but_not_there_is_refused(capsys, tiny_flags):
    line = refusal(capsys, "train", *tiny_flags, "--gin.MIXTURE_OR_TASK_NAME=['text.tiny']")
    assert "The mixture has no code source: set CODE_RATE = 0.0" in line


def test_a_run_directory_of_another_configuration_says_what_differs(capsys, tiny_flags, tmp_path):
    flags = [*tiny_flags, f"--gin.MODEL_DIR={tmp_path}/run", "--gin.TRAIN_STEPS=4"]
    assert cli.main(["train", *flags]) == 0
    capsys.readouterr()
    line = refusal(capsys, "train", *flags, "--gin.CODE_RATE=0.75", "--gin.SEED=5")
    assert "another configuration: CODE_RATE was 0.333333333333, is 0.75; SEED was 0, is 5" in line
    line = refusal(capsys, "train", *flags, "--gin.model.layers=4")
    assert "model.layers was 3, is 4" in line
    assert f"with --gin.INITIAL_CHECKPOINT_PATH={tmp_path}/run a new run starts from these parameters" in line


def test_a_run_directory_that_cannot_be_written_is_refused(capsys, tiny_flags, tmp_path):
    (tmp_path / "file").write_text("")
    line = refusal(capsys, "train", *tiny_flags, f"--gin.MODEL_DIR={tmp_path}/file/run")
    assert "file" in line and "Traceback" not in line


@pytest.mark.slow
def test_a_full_disk_ends_the_run_in_one_line(tiny_flags, tmp_path):
    """A file system of four megabytes, in a mount namespace of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=4m none {disk}"
    if subprocess.run(["unshare", "-rm", "bash", "-c", mount], capture_output=True).returncode:
        pytest.skip("no user and mount namespaces here")
    flags = " ".join(f"'{flag}'" if "'" not in flag else f'"{flag}"' for flag in tiny_flags)
    done = subprocess.run(
        ["unshare", "-rm", "bash", "-c",
         f"{mount} && exec {sys.executable} -m codellm_jax.cli train {flags} --gin.MODEL_DIR={disk}/run "
         "--gin.TRAIN_STEPS=12 --gin.CHECKPOINT_PERIOD=4"],
        capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and "No space left on device" in lines[0], done.stderr


def test_debug_shows_the_traceback(capsys):
    assert cli.main(["train", "--gin_file=none.gin", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_dry_run_prints_the_plan_and_trains_nothing(capsys, tiny_flags, tmp_path):
    flags = [*tiny_flags, f"--gin.MODEL_DIR={tmp_path}/run", "--gin.TRAIN_STEPS=200",
             "--gin.MIX_PHASES=['5:5', '6:4', '7:3', '7:3']"]
    assert cli.main(["train", *flags, "--dry_run"]) == 0
    printed = capsys.readouterr().out
    for words in ("CODE_RATE = 0.333333333333  # gin/mixed_pretrain.gin:", "MIX_PHASES = ['5:5', '6:4', '7:3', '7:3']",
                  "epochs to come", "MIX_PHASES is set, so that CODE_RATE = 0.333333333333 is not used",
                  f"  step      0-50      0.5000  0.5000 |{'#' * 20}{' ' * 20}|\n",
                  f"  step     50-100     0.4000  0.4000 |{'#' * 16}{' ' * 24}|\n",
                  "WARNING: text.tiny will be repeated", "parameters", "mesh", "GiB per device", "order"):
        assert words in printed, printed
    assert not (tmp_path / "run").exists()


def test_explain(capsys):
    assert cli.main(["explain", "CODE_RATE", MIXED, "--gin.CODE_RATE=0.5"]) == 0
    printed = capsys.readouterr().out
    assert "CODE_RATE = 0.5" in printed and "set by --gin.CODE_RATE" in printed
    assert "overriding 0.333333333333 of gin/mixed_pretrain.gin:" in printed


def test_help_and_no_command(capsys):
    assert cli.main([]) == 2
    assert "COMMAND" in capsys.readouterr().out


def test_the_command_works_from_another_directory(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "codellm_jax.cli", "explain", "BATCH_SIZE", MIXED], capture_output=True, text=True,
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and "BATCH_SIZE = 8" in done.stdout


@pytest.mark.parametrize("name", ["lr[1e-3]", "back\\slash", "star*", "what?", "[!a]"])
@pytest.mark.parametrize("command, setting", [("train", "MODEL_DIR"), ("study", "STUDY_DIR")])
def test_names_that_would_be_patterns_are_refused_before_anything_is_done(capsys, tmp_path, name, command, setting):
    file = MIXED if command == "train" else "--gin_file=gin/study.gin"
    line = refusal(capsys, command, file, f"--gin.{setting}={str(tmp_path / name)!r}")
    assert f"{setting} {tmp_path / name} holds " in line and "use another name, such as" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["module", "package"])
def test_a_users_own_module_named_tasks_is_named(tmp_path, what):
    (tmp_path / "tasks").mkdir()
    mine = tmp_path / ("tasks.py" if what == "module" else "tasks/__init__.py")
    mine.write_text("from invoke import task\n")
    if what == "module":
        (tmp_path / "tasks").rmdir()
    done = subprocess.run([sys.executable, "-m", "codellm_jax.cli", "explain", "BATCH_SIZE", MIXED],
                          capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 1 and done.stdout == ""
    [line] = done.stderr.strip().splitlines()
    assert line.startswith(f"t5x explain: error: {mine} shadows this package's module `tasks`") and "rename it" in line


def test_a_model_that_the_machine_cannot_hold_is_refused(capsys, tiny_flags, tmp_path):
    flags = [*tiny_flags, f"--gin.MODEL_DIR={tmp_path / 'run'}", "--gin.TRAIN_STEPS=12", "--gin.model.layers=400",
             "--gin.model.hidden=65536", "--gin.model.heads=512", "--gin.model.feedforward=262144"]
    capsys.readouterr()
    assert cli.main(["train", *flags]) == 1
    said = capsys.readouterr()
    [line] = said.err.strip().splitlines()
    assert "Parameters and optimizer state need" in line and "GiB per device, but a device here has" in line
    assert "\nWARNING: a device here has" in said.out
    assert cli.main(["train", *flags, "--dry_run"]) == 0  # to look at it is no harm
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_without_a_share_of_code_tuning_and_pre_training_say_so(capsys, pretrained, tmp_path):
    for flags in (["--gin_file=gin/tune.gin", f"--gin.INITIAL_CHECKPOINT_PATH={pretrained / 'NL'}"],
                  ["--gin_file=gin/models/tiny.gin", "--gin_file=gin/pretrain.gin"]):
        flags = [*flags, f"--gin.MODEL_DIR={tmp_path / 'run'}", "--dry_run"]
        assert "Neither CODE_RATE nor MIX_PHASES is set" in refusal(capsys, "train", *flags)
        assert cli.main(["explain", "MIX_PHASES", *flags[:-1], "--gin.MIX_PHASES=['5:5', '7:3']"]) == 0
        assert capsys.readouterr().out.startswith("MIX_PHASES = ['5:5', '7:3']")  # and that is enough
