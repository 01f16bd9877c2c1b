"""Every command of docs/guides.md runs as it stands there, on small data and without TPUs."""

import json
import re
import shlex
import sys
import types
from pathlib import Path

import pytest
from fake_hub import fake_hub
from published import write_llama
from written_runs import write_run, write_study

from codellm_jax import cli
from tasks.benchmarks import loading, templates, texts

ROOT = Path(__file__).resolve().parent.parent
GUIDES = (ROOT / "docs" / "guides.md").read_text()


def section(title: str) -> str:
    return re.split(r"^## ", GUIDES, flags=re.MULTILINE)[1:][titles().index(title)]


def titles() -> list[str]:
    return re.findall(r"^## (.*)$", GUIDES, flags=re.MULTILINE)


def blocks(title: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", section(title), flags=re.DOTALL)


def commands(title: str) -> list[list[str]]:
    lines = "".join(blocks(title, "bash")).splitlines()
    assert lines and all(line.startswith("t5x ") for line in lines)
    return [shlex.split(line)[1:] for line in lines]


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    status = cli.main(arguments)
    told = capsys.readouterr()
    assert status == 0, (arguments, told.err)
    return told.out


def small(arguments: list[str], flags: list[str], kept: tuple[str, ...]) -> list[str]:
    """The command with a micro model and corpora, four steps of training, and one benchmark."""
    if arguments[0] in ("train", "contamination", "vocabulary", "explain"):
        arguments = [*arguments, *(flag for flag in flags if flag.startswith(kept))]
    if arguments[0] == "train" and "--dry_run" not in arguments:
        arguments = [*arguments, "--gin.TRAIN_STEPS=4", "--gin.EVAL_PERIOD=4"]
    if arguments[0] == "eval" and not any("TASKS" in argument for argument in arguments):
        arguments = [*arguments, "--gin.TASKS=['logic']"]
    return arguments


MODEL = ("--gin.CACHE_DIR", "--gin.TASK_FEATURE", "--gin.model", "--gin.WARMUP", "--gin.train.eval_rows")


def test_there_are_guides():
    assert titles() == ["Your own corpora", "A published model, before and after code", "An ablation by overrides",
                        "Adding an arm to a study", "A trunk and its branches",
                        "A study on many machines", "Watching a run and a study", "A TPU pod", "Adding a benchmark"]
    for target in re.findall(r"\]\(((?!http)[^)]+)\)", GUIDES):
        assert (ROOT / "docs" / target).exists(), target


@pytest.mark.slow
def test_your_own_corpora(tiny_corpora, tiny_flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    [settings] = blocks("Your own corpora", "gin")
    for pattern, name in (("/data/books/*.jsonl.gz", "text.tiny"), ("/data/github/*.jsonl.gz", "code.tiny")):
        assert pattern in settings
        settings = settings.replace(pattern, tiny_corpora[name]["json_lines"])
    Path("mine.gin").write_text(settings)
    for arguments in commands("Your own corpora"):
        arguments = ["--size=500" if flag == "--size=16000" else flag for flag in arguments]
        told = run(small(arguments, tiny_flags, MODEL if arguments[0] == "train" else MODEL[:2]), capsys)
        assert "text.books" in told or arguments[0] in ("eval", "vocabulary")
    assert Path("my.model").stat().st_size and Path("runs/mine/results/logic_sample.json").exists()


@pytest.mark.slow
def test_a_published_model(tiny_corpora, tiny_flags, tmp_path, monkeypatch, capsys):
    """A small Llama in the place of the one that the guide names, on a stand-in for the hub."""
    title = "A published model, before and after code"
    write_llama(tmp_path / "hub" / "Qwen" / "Qwen3-0.6B")
    monkeypatch.chdir(tmp_path)
    [settings] = blocks("Your own corpora", "gin")
    for pattern, name in (("/data/books/*.jsonl.gz", "text.tiny"), ("/data/github/*.jsonl.gz", "code.tiny")):
        settings = settings.replace(pattern, tiny_corpora[name]["json_lines"])
    Path("mine.gin").write_text(settings)
    with fake_hub(tmp_path / "hub") as hub:
        for name, value in hub.environment(tmp_path / "downloads").items():
            monkeypatch.setenv(name, value)
        told = {}
        for arguments in commands(title):
            more = [f"--gin.CACHE_DIR={tmp_path / 'rows'}"] if arguments[0] == "train" else []
            told[arguments[0]] = run(small([*arguments, *more], tiny_flags, ("--gin.WARMUP", "--gin.train.eval_rows")),
                                     capsys)
    assert "imported-CODE" in told["train"] and "logic" in told["compare"]
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {
        path.name for path in Path("qwen3-code").iterdir()}


def test_an_ablation(tiny_flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    told = {arguments[0]: run(small(arguments, tiny_flags, (*MODEL, "--gin.CORPORA", "--gin.MIXTURE")), capsys)
            for arguments in commands("An ablation by overrides")}
    assert "CODE_RATE" in told["explain"] and "0.1" in told["explain"] and "logic" in told["compare"]
    assert Path("runs/report/report.html").exists()


def test_an_arm(tiny_flags, tiny_tuning_flags, tmp_path, capsys):
    of_stages = [flag.replace("--gin.", f"--gin.{stage}/", 1)
                 for stage, flags in (("pretraining", tiny_flags), ("tuning", tiny_tuning_flags)) for flag in flags
                 if flag.startswith(("--gin.CORPORA", "--gin.CACHE_DIR", "--gin.MIXTURE", "--gin.model", "--gin.TASK"))]
    told = []
    for arguments in commands("Adding an arm to a study"):
        arguments = [argument for argument in arguments if argument != "--dry_run"]
        told.append(run([*arguments, *of_stages, f"--gin.STUDY_DIR={tmp_path}/study", "--gin.SEEDS=[0]",
                         "--print_commands"], capsys))
    assert "NC-tenth.seed0" in told[0] and "CC-decrease.seed0" in told[0]
    assert re.findall(r"runs/([\w.-]+)'? ", told[1])[0] == "NL.seed0" and "CC-decrease" not in told[1]
    assert all(f"RATE-{rate}.seed0" in told[2] for rate in ("0.1", "0.25", "0.5"))


@pytest.mark.slow
def test_a_trunk_and_its_branches(tiny_corpora, tiny_flags, tmp_path, monkeypatch, capsys):
    """Four steps in the place of 400: the branches begin after the second."""
    monkeypatch.chdir(tmp_path)
    trunk, branch, study, mixed_trunk, mixed_branch = commands("A trunk and its branches")
    for arguments in (trunk, branch):
        arguments = [argument.replace("@200", "@2") for argument in arguments]
        told = run(small(arguments, tiny_flags, (*MODEL, "--gin.CORPORA", "--gin.MIXTURE")), capsys)
    assert "The learning rate continues" in told and "0.300" in told
    assert {path.name for path in Path("runs/trunk/checkpoints").iterdir()} == {"1", "2", "4"}
    of_stages = [flag.replace("--gin.", f"--gin.{stage}/", 1) for stage in ("pretraining",) for flag in tiny_flags
                 if flag.startswith(("--gin.CORPORA", "--gin.CACHE_DIR", "--gin.MIXTURE", "--gin.model", "--gin.TASK"))]
    study = [argument for argument in study if argument != "--dry_run"]
    told = run([*study, *of_stages, f"--gin.STUDY_DIR={tmp_path}/study", "--print_commands"], capsys)
    assert "BRANCH_FROM=" in told and "runs/TEXT.seed0@30" in told
    assert "KEEP_STEPS=[6, 30, 48, 60]" in told.replace("'", "")
    run(small([argument.replace("[300]", "[2]") for argument in mixed_trunk], tiny_flags, (
        *MODEL, "--gin.CORPORA", "--gin.MIXTURE")), capsys)
    Path("asked.jsonl").write_text("".join(json.dumps(
        {"instruction": f"Name a number above {n}.", "output": f"{n + 1} is above {n}."}) + "\n" for n in range(400)))
    corpora = tiny_corpora | {"text.asked": {"instructions": str(tmp_path / "asked.jsonl")}}
    told = run([*small([argument.replace("@300", "@2") for argument in mixed_branch], tiny_flags, MODEL),
                f"--gin.CORPORA={corpora}", f"--gin.MIXTURE_OR_TASK_NAME={list(corpora)}",
                f"--gin.MIX_PHASES={[dict.fromkeys(corpora, 1)]}"], capsys)
    assert re.search(r"^text\.asked .* 0\.3333 ", told, re.MULTILINE)


def test_a_study_on_many_machines(checkout, tmp_path, monkeypatch, capsys):
    """On a directory instead of a bucket, and before any worker has begun: workers and jobs have tests of their own."""
    worker, status, slurm, kubernetes, launch = commands("A study on many machines")
    monkeypatch.chdir(checkout)
    assert worker[-1] == "--worker" and worker[:-1] == status[:-1]
    assert cli.main([argument.replace("gs://bucket", str(tmp_path)) for argument in status]) == 1
    assert "no study has started there" in capsys.readouterr().err
    assert "#SBATCH --array=0-" in run(slurm[: slurm.index(">")], capsys)
    assert "completionMode: Indexed" in run(kubernetes[: kubernetes.index(">")], capsys)
    assert "queued-resources create" in run([*launch[:1], "--print_only", *launch[1:]], capsys)


def test_a_pod(checkout, tiny_flags, tmp_path, monkeypatch, capsys):
    """The two that need neither libtpu nor several processes; precompile's and local ones have tests of their own."""
    precompile, local, launch = commands("A TPU pod")
    assert precompile[0] == "precompile" and "--topology=v5e-256" in precompile
    assert local[-1] == "--local_processes=2"
    monkeypatch.chdir(tmp_path)
    run(small(local[:-1], tiny_flags, (*MODEL, "--gin.CORPORA", "--gin.MIXTURE")), capsys)
    monkeypatch.chdir(checkout)
    assert "queued-resources create" in run(launch, capsys)


def test_a_benchmark(pretrained, tmp_path, monkeypatch, capsys):
    [module], [entries], [items] = (blocks("Adding a benchmark", language) for language in ("python", "text", "json"))
    riddles = types.ModuleType("tasks.benchmarks.riddles")
    exec(compile(module, "riddles.py", "exec"), riddles.__dict__)
    monkeypatch.setitem(sys.modules, riddles.__name__, riddles)
    added: dict[str, dict] = {"BENCHMARKS": {}, "TEMPLATES": {}, "PARTS": {}}
    exec(entries, {**vars(templates), "_benchmark": loading._benchmark, "riddles": riddles, **added})
    for name, place in (("BENCHMARKS", loading.BENCHMARKS), ("TEMPLATES", templates.TEMPLATES), ("PARTS", texts.PARTS)):
        monkeypatch.setitem(place, "riddles", added[name]["riddles"])
    (tmp_path / "riddles-test.json").write_text(items)
    [arguments] = commands("Adding a benchmark")
    arguments = [argument.replace("runs/mixed_pretrain", str(pretrained / "CODE")) for argument in arguments]
    run([*arguments, f"--gin.DATA_DIR={tmp_path}", f"--gin.evaluate.results_dir={tmp_path}/results"], capsys)
    result = json.loads((tmp_path / "results" / "riddles.json").read_text())
    assert result["n"] == 2 and result["chance"] == 0.5 and not result["sample"]
    assert texts.read_texts("riddles", str(tmp_path)).parts["2"][1] == "a towel"


def test_watching_a_run_and_a_study(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "first", 10, 10)
    write_study(tmp_path / "studies" / "first")
    served: list[tuple[object, ...]] = []
    monkeypatch.setattr("codellm_jax.watching.serve.serve", lambda *arguments: served.append(arguments) or 0)
    title = "Watching a run and a study"
    told = {shlex.join(arguments): run(arguments, capsys) for arguments in commands(title)}
    assert "gin/models/tiny.gin" in told["list models"] and "DROPOUT_RATE" in told["settings dropout"]
    assert "--gin_file" not in told["explain --gin_file=gin/mixed_pretrain.gin"]
    assert "trained to the end" in told["show runs/first"] and "1 of 4 runs are done" in told["show studies/first"]
    assert told["show runs"].splitlines()[1].split()[:3] == ["first", "trained", "10/10"]
    assert served == [("studies/first", "127.0.0.1", None)]
    [trackers] = blocks(title, "gin")
    Path("trackers.gin").write_text(trackers)
    assert "['tensorboard', 'wandb', 'mlflow']" in run(
        ["explain", "train.trackers", "--gin_file=gin/mixed_pretrain.gin", "--gin_file=trackers.gin"], capsys)
