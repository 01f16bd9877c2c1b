"""The commands of README and docs/settings.md work as they stand there, and the installed form needs no checkout."""

import ast
import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import fake_hub
from fake_publisher import official_publisher
from published import write_llama

from codellm_jax import cli
from codellm_jax.mixture.schedules import phases
from codellm_jax.pods.topologies import has_libtpu

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SETTINGS = (ROOT / "docs" / "settings.md").read_text()


def commands() -> list[str]:
    """Every line of their shell blocks that runs t5x, and the inline ones that have flags."""
    both = README + SETTINGS
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", both, flags=re.DOTALL))
    lines = [line[line.index("t5x "):] for line in blocks.splitlines() if re.search(r"\bt5x ", line)]
    return list(dict.fromkeys([*lines, *re.findall(r"`(t5x [^`]* [^`]*)`", both)]))


def test_there_are_commands():
    assert len(commands()) >= 5
    assert any(line.startswith("t5x train --gin_file=gin/mixed_pretrain.gin") for line in commands())


@pytest.fixture
def of_test() -> Iterator[contextlib.ExitStack]:
    """What is open as long as a test runs."""
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("command", commands())
def test_readme_commands_are_accepted(
        command, capsys, tmp_path, tiny_flags, tiny_tuning_flags, pretrained, checkout, monkeypatch, of_test):
    """Run on the tiny corpora and without training: what the flags of README mean is resolved to the last one."""
    arguments = [flag.replace("runs/mixed_pretrain", str(pretrained / "CODE")) for flag in shlex.split(command)[1:]]
    if "--gin_file=mine.gin" in arguments:
        [mine] = re.findall(r"Write `mine.gin`:\n\n```text\n(.*?)```", README, flags=re.DOTALL)
        for pool, suffix in (("text", "txt"), ("code", "py")):
            (tmp_path / pool / "deep").mkdir(parents=True)
            for number in range(60):
                (tmp_path / pool / "deep" / f"{number}.{suffix}").write_text(f"The {pool} of file {number}. " * 40)
        (tmp_path / "mine.gin").write_text(mine.replace("/data/", f"{tmp_path}/"))
        monkeypatch.chdir(tmp_path)
    if arguments[0] == "train":
        kept = ("--gin.CORPORA", "--gin.CACHE_DIR", "--gin.MIXTURE")
        flags = tiny_tuning_flags if "gin/tune_" in command else tiny_flags
        corpora = [flag for flag in flags if flag.startswith(kept)]
        arguments = [*arguments, *corpora, f"--gin.MODEL_DIR={tmp_path}/run"]
        if "--dry_run" not in arguments:
            arguments.append("--dry_run")
    if arguments[0] == "contamination":
        kept = ("--gin.CORPORA", "--gin.CACHE_DIR", "--gin.MIXTURE")
        arguments += [flag for flag in tiny_flags if flag.startswith(kept)]
    if arguments[0] == "study":
        kept = ("--gin.CACHE_DIR", "--gin.model", "--gin.TASK_FEATURE")
        if "--gin_file=mine.gin" not in arguments:
            kept += ("--gin.CORPORA", "--gin.MIXTURE")
        arguments += [flag.replace("--gin.", f"--gin.{stage}/", 1) for stage, flags in (
            ("pretraining", tiny_flags), ("tuning", tiny_tuning_flags)) for flag in flags if flag.startswith(kept)]
        arguments += [f"--gin.STUDY_DIR={tmp_path}/study", "--print_commands"]
    if arguments[0] in ("compare", "report"):
        for run in (pretrained / "NL", pretrained / "CODE"):
            assert cli.main(["eval", "--gin_file=gin/eval.gin", f"--gin.CHECKPOINT_PATH={run}",
                             f"--gin.evaluate.results_dir={tmp_path / run.name / 'results'}",
                             "--gin.TASKS=['logic']"]) == 0
        runs = [str(tmp_path / "NL"), str(tmp_path / "CODE")]
        arguments = ["compare", *runs] if arguments[0] == "compare" else ["report", str(tmp_path)]
    if arguments[0] == "show":
        arguments[1] = str(pretrained / "CODE")
    if arguments[0] == "laws":
        (tmp_path / "ratios.csv").write_text("run,text,code\n" + "".join(
            f"{code},{1 - code},{code}\n" for code in (0.0, 0.25, 0.5, 0.75)))
        (tmp_path / "metrics.csv").write_text("run,text,code\n0.0,3.0,4.1\n0.25,3.1,3.4\n0.5,3.3,3.2\n0.75,3.8,3.1\n")
        arguments[1] = str(tmp_path)
    if arguments[0] == "plot":
        monkeypatch.chdir(tmp_path)
        arguments = [flag.replace("runs/text_pretrain", str(pretrained / "NL")) for flag in arguments]
    if arguments[0] == "prepare":
        arguments += ["--gin.CORPORA={'text.python': {'python': 'text'}}", f"--gin.OUTPUT={tmp_path}/prepared",
                      "--gin.TASKS=['logic']", "--workers=1"]
    if arguments[0] == "fetch":
        of_test.enter_context(official_publisher())
        arguments = [flag.replace("/data", str(tmp_path)) for flag in arguments]
    if arguments[0] == "launch":
        monkeypatch.chdir(checkout)
        arguments.insert(1, "--print_only")
    if arguments[0] == "import":
        write_llama(tmp_path / "hub" / "Qwen" / "Qwen3-0.6B")
        hub = of_test.enter_context(fake_hub(tmp_path / "hub"))
        for name, value in hub.environment(tmp_path / "downloads").items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(tmp_path)
    if arguments[0] == "export":
        monkeypatch.chdir(tmp_path)
    if arguments[0] == "eval":
        arguments += [f"--gin.evaluate.results_dir={tmp_path}/results", "--gin.TASKS=['logic']"]
    if arguments[0] == "infer":
        monkeypatch.setattr("sys.stdin", io.StringIO("the row\n"))
        arguments.append("--gin.sampling.max_new_tokens=4")
    if arguments[0] == "precompile":
        if not has_libtpu():
            pytest.skip("libtpu is not installed: pip install '.[tpu]'")
        arguments += ["--no_search", "--gin.model.layers=1", "--gin.model.hidden=256", "--gin.model.feedforward=256"]
    if arguments[0] == "cache":
        pytest.importorskip("apache_beam", reason="Apache Beam is not installed: pip install '.[beam]'")
        kept = [flag for flag in tiny_flags if flag.startswith(("--gin.CORPORA", "--gin.MIXTURE"))]
        arguments[1:1] = [*kept, f"--gin.CACHE_DIR={tmp_path}/rows"]
    if arguments[0] == "vocabulary":
        # As much text as a test has does not fill 16,000 pieces.
        arguments = [flag.replace("my.model", f"{tmp_path}/my.model").replace("16000", "500") for flag in arguments]
        arguments += [flag for flag in tiny_flags if flag.startswith(("--gin.CORPORA", "--gin.MIXTURE"))]
    assert cli.main(arguments) == 0, capsys.readouterr().err


def test_the_optimizer_of_the_settings(capsys, tmp_path, tiny_flags):
    optimizer = SETTINGS[SETTINGS.index("The optimizer is"):SETTINGS.index("## Your own data")]
    flags = re.findall(r"`(--gin\.[^`]+)`", optimizer)
    assert len(flags) == 4
    for given in (flags[:1], flags[1:]):  # one of optax's, and a chain
        arguments = [argument for flag in given for argument in shlex.split(flag)]
        assert cli.main(["train", *tiny_flags, *arguments, f"--gin.MODEL_DIR={tmp_path}/run", "--dry_run"]) == 0, \
            capsys.readouterr().err


def test_the_mixes_of_the_settings():
    lines = re.findall(r"^MIX_PHASES = (.*)$", SETTINGS, flags=re.MULTILINE)
    values = [re.split(r"\s{2,}", line)[0] for line in lines]
    values += re.findall(r"whole numbers are steps: (\{.*\})", SETTINGS)
    assert len(values) == 5
    for value in values:
        assert phases(ast.literal_eval(value), 100_000, 8).asked(100_000) > 0


def test_files_that_are_named_exist():
    tree = README[README.index("## What is where"):]
    for name in re.findall(r"^  (\w+(?:\.py|/))", tree, flags=re.MULTILINE):
        assert (ROOT / "codellm_jax" / name).exists(), name
    for name in re.findall(r"^(\w+/)", tree, flags=re.MULTILINE):
        assert (ROOT / name).exists(), name
    for text, folder in ((README, ROOT), (SETTINGS, ROOT / "docs")):
        for target in re.findall(r"\]\(((?!http)[^)]+)\)", text):
            assert (folder / target).exists(), target


def test_an_installed_package_finds_its_files_from_any_directory(tmp_path):
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", "*.egg-info"))
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir",
         str(tmp_path), str(checkout)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "site")
    shutil.rmtree(checkout)
    done = subprocess.run(
        [sys.executable, "-m", "codellm_jax.cli", "explain", "vocabulary.path", "--gin_file=gin/mixed_pretrain.gin",
         "--gin_file=gin/models/13b.gin"],
        capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path / "site")})
    assert "VOCABULARY = 'python_8k', set by gin/pretrain.gin" in done.stdout, done.stderr
    assert not (tmp_path / "site" / "gin").exists()  # which would hide the library of that name
    found = subprocess.run(
        [sys.executable, "-c", "from codellm_jax.vocabulary import load_vocabulary as load; print(load().path)"],
        capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path / "site")})
    assert found.stdout.startswith(str(tmp_path / "site")), found.stderr
