"""Help, its examples, and completion in a shell; nothing here needs JAX or gin."""

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from codellm_jax.completion import shipped_settings
from codellm_jax.flags import EXAMPLES, overrides_of, parser
from codellm_jax.settings import Configuration, Setting, listed, shipped_gin_files

ROOT = Path(__file__).resolve().parent.parent


def sub_commands() -> dict[str, argparse.ArgumentParser]:
    return next(action.choices for action in parser()._actions if isinstance(action, argparse._SubParsersAction))


def test_every_sub_command_has_examples():
    assert EXAMPLES.keys() == sub_commands().keys()


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_help_ends_with_two_examples_that_are_accepted(name):
    *_, first, second = sub_commands()[name].format_help().rstrip().splitlines()
    assert [first.strip(), second.strip()] == list(EXAMPLES[name])
    for example in EXAMPLES[name]:
        given = shlex.split(example)
        assert given[:2] == ["t5x", name]
        flags, rest = parser().parse_known_args(given[1:given.index("--") if "--" in given else None])
        overrides_of(rest)  # raises for a flag that there is not
        shipped = [file for file in getattr(flags, "gin_file", []) if file != "mine.gin"]
        assert set(shipped) <= set(shipped_gin_files())


def test_settings_are_listed_with_what_they_overrode():
    configuration = Configuration((
        Setting("CODE_RATE", "0.25", "a.gin:1"), Setting("mixture.code_rate", "%CODE_RATE", "a.gin:2"),
        Setting("model.layers", "4", "b.gin:7"), Setting("CODE_RATE", "0.5", "--gin.CODE_RATE")))
    assert [line.split() for line in listed(configuration).splitlines()] == [
        ["setting", "value", "sets", "stands", "in"],
        ["CODE_RATE", "0.5", "mixture.code_rate", "--gin.CODE_RATE,", "over", "0.25", "of", "a.gin:1"],
        ["model.layers", "4", "b.gin:7"]]


def completions(line: str, tmp_path: Path) -> list[str]:
    """What a shell is offered behind a line."""
    pytest.importorskip("argcomplete")
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "offered"), "_ARGCOMPLETE_IFS": "\n",
             "_ARGCOMPLETE_SHELL": "bash", "_ARGCOMPLETE_COMP_WORDBREAKS": " \t\n\"'@><=;|&(:", "COMP_TYPE": "9",
             "COMP_LINE": line, "COMP_POINT": str(len(line)), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "codellm_jax.cli"], env=os.environ | asked, check=True)
    return (tmp_path / "offered").read_text().split()


@pytest.mark.slow
@pytest.mark.parametrize("line, offered", [
    ("t5x contam", "contamination"), ("t5x train --gin_file=gin/mixed_pre", "gin/mixed_pretrain.gin"),
    ("t5x train --gin.BATCH", "--gin.BATCH_SIZE"), ("t5x train --dry", "--dry_run")])
def test_a_shell_completes_commands_files_and_settings(line, offered, tmp_path):
    assert offered in completions(line, tmp_path)


def test_the_settings_offered_are_those_of_the_files():
    assert {"CODE_RATE", "BATCH_SIZE", "STUDY_DIR", "CHECKPOINT_PATH"} <= set(shipped_settings())
    assert not [name for name in shipped_settings() if name != name.upper()]
