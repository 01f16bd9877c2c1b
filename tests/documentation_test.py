"""The documentation: links, commands, settings and pictures are true; the site builds; the notebook runs."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from codellm_jax import flags
from codellm_jax.reference.commands import commands
from codellm_jax.reference.registries import REGISTRIES
from codellm_jax.reference.settings import settings

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")])
SETTINGS = {setting.name for setting in settings()}
# Names in the pages that look like settings: variables of the environment that libraries read.
FOREIGN = re.compile(r"(HF|JAX|MLFLOW|WANDB|XLA)_")


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for target, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)(#[^)\s]*)?\)", re.sub(r"`[^`\n]+`", "", prose(page))):
        file = page.parent / target if target else page
        if target.startswith("reference/"):  # made from the code when the site is built
            assert target.removeprefix("reference/") in ("commands.md", "settings.md", "names.md")
            continue
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", file.read_text(), flags=re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings]
            assert anchor[1:] in slugs, anchor


def test_every_page_stands_in_the_navigation():
    class Loader(yaml.SafeLoader):
        pass

    def pages(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for each in (entry.values() if isinstance(entry, dict) else entry) for page in pages(each)]

    named = pages(yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"])
    assert len(set(named)) == len(named)
    assert {page.name for page in (ROOT / "docs").glob("*.md")} <= set(named)


def typed(pattern: str, of: str) -> list[str]:
    """What a pattern finds in the pages' shell blocks ("blocks") or between them ("prose"); sketches are left out."""
    found: set[str] = set()
    for page in PAGES:
        text = prose(page)
        if of == "blocks":
            text = "\n".join(re.findall(r"^```bash\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE))
        found |= set(re.findall(pattern, text, flags=re.MULTILINE))
    return sorted(line for line in found if "..." not in line and "--help" not in line)


def test_commands_of_the_pages_are_those_of_the_parser():
    lines = typed(r"\b(t5x .*)$", "blocks")
    assert len(lines) > 40
    for line in lines:
        arguments = shlex.split(re.split(r" [#>] ", line)[0])[1:]
        if "--" in arguments:
            arguments = arguments[:arguments.index("--")]
        known, rest = flags.parser().parse_known_args(
            ["--print_commands=shell" if argument == "--print_commands" else argument for argument in arguments])
        assert known.command, line
        for name, _ in flags.overrides_of(rest):
            short = name.rpartition("/")[2]
            assert short in SETTINGS or short.startswith("optax."), line


def test_flags_that_the_pages_name_are_there():
    of_command = {command.name: " ".join(flag.name for flag in command.flags) for command in commands()}
    lines = typed(r"`t5x ([a-z]+ [^`]*)`", "prose")
    assert len(lines) > 10
    for line in lines:
        name, *rest = line.partition(" -- ")[0].split()
        for flag in re.findall(r"--(?!gin)\w+", " ".join(rest)):
            assert re.search(rf"{flag}\b", of_command[name]), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_that_the_pages_name_are_there(page):
    if page.name == "comparison.md":  # of the peers
        return
    left_out = prose(page)
    if page.name == "coming-from.md":  # its left columns are of others
        left_out = "\n".join(re.sub(r"^\| [^|]*\|", "", line) for line in left_out.splitlines())
    named = set(re.findall(r"`([A-Z][A-Z]+(?:_[A-Z]+)+)(?:=[^`]*)?`", left_out))
    blocks = "".join(re.findall(r"^```(?:gin|text)\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE))
    set_there = set(re.findall(r"^([A-Z]+(?:_[A-Z]+)+) = ", blocks, flags=re.MULTILINE))
    assert {name for name in named | set_there if not FOREIGN.match(name)} <= SETTINGS


def test_the_pictures_are_those_that_the_script_draws():
    spec = importlib.util.spec_from_file_location("draw", ROOT / "docs" / "pictures" / "draw.py")
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert len(script.PICTURES) == 6
    for name, draw in script.PICTURES.items():
        assert (ROOT / "docs" / "pictures" / f"{name}.svg").read_text() == draw(), name


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="MkDocs is not installed: pip install '.[docs]'")
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
                          cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stderr
    read = {name: (tmp_path / "site" / name / "index.html").read_text() for name in (
        "reference/commands", "reference/settings", "reference/names", "tutorial", "source/gin/study.gin")}
    for command in commands():
        assert f'id="t5x-{command.name}"' in read["reference/commands"]
    assert all(f"<code>{name}</code>" in read["reference/settings"] for name in SETTINGS)
    for registry in REGISTRIES:
        assert f'id="{registry}"' in read["reference/names"]
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 35
    for page in pages:  # fonts, scripts and pictures of the site alone
        assert not re.search(r'<(?:script|img|link)[^>]+(?:src|href)="https?://(?!squidfunk)', page.read_text()), page


@pytest.mark.slow
def test_the_notebook_runs_and_shows_what_it_says(tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install '.[docs]'")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install '.[docs]'")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(ROOT / "docs" / "tutorial.ipynb", as_version=4)
    shown = json.dumps(notebook)
    assert "image/png" in shown and str(ROOT) not in shown and "/home/" not in shown and "/tmp/" not in shown
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    (tmp_path / "t5x").write_text(f"#!/bin/sh\nexec {shlex.quote(sys.executable)} -m codellm_jax.cli \"$@\"\n")
    (tmp_path / "t5x").chmod(0o755)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PATH", f"{tmp_path}{os.pathsep}{path}")
        patched.setenv("PYTHONPATH", str(ROOT))
        nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = ["".join(output.get("text", "") for output in cell["outputs"])
               for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert re.search(r"^code\.python .* 0\.3333 ", outputs[0], flags=re.MULTILINE)
    last = [float(re.findall(r"held-out loss after step 96: text \S+, code ([\d.]+);", output)[0])
            for output in outputs[1:3]]
    assert last[1] < last[0]  # the arm with code is better on code
    assert outputs[3].splitlines() == ["text {'text.python': 768, 'code.python': 0}",
                                       "mixed {'text.python': 512, 'code.python': 256}"]
    assert "cosqa_sample" in outputs[5] and "B - A" in outputs[5]
    assert (tmp_path / "runs" / "mixed" / "results" / "logic_sample.json").exists()


@pytest.mark.slow
def test_the_files_of_a_run_are_those_of_the_page(pretrained):
    """Every field of records, provenance, ledger and results stands on docs/files.md."""
    from codellm_jax import cli

    page = (ROOT / "docs" / "files.md").read_text()
    fields = set(re.findall(r"`([^`]+)`", page))
    run = pretrained / "CODE"
    assert cli.main(["eval", "--gin_file=gin/eval.gin", f"--gin.CHECKPOINT_PATH={run}", "--gin.TASKS=['logic', 'mbpp']",
                     "--gin.sampling.max_new_tokens=4"]) == 0
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    provenance = json.loads((run / "provenance.json").read_text())
    forms = {re.sub(r"/(text|code)$", "/POOL", re.sub(r"/(text|code)\..*", "/SOURCE", name))
             for record in records for name in record if not name.startswith("last_step/")}
    assert forms - {"split"} <= fields
    assert set(provenance) | set(provenance["ledger"]) <= fields
    for task in ("logic", "mbpp"):
        assert set(json.loads((run / "results" / f"{task}_sample.json").read_text())) <= fields
        first, second, *_ = map(json.loads, (run / "results" / f"{task}_sample.jsonl").read_text().splitlines())
        assert set(first) == {"settings", "checkpoint", "digest"} and set(second) <= fields
