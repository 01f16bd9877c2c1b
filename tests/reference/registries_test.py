"""The registries hold what the code accepts, each with a line; the commands are those of the parser."""

import pytest

from codellm_jax import flags
from codellm_jax.configuration import shipped_gin_files
from codellm_jax.prepare import steps
from codellm_jax.reference.commands import commands
from codellm_jax.reference.registries import REGISTRIES
from codellm_jax.weights.families import FAMILIES
from tasks.benchmarks.loading import BENCHMARKS
from tasks.benchmarks.templates import TEMPLATES
from tasks.corpora import specs, transforms

ENTRIES = {name: {entry.name: entry for entry in registry.entries()} for name, registry in REGISTRIES.items()}


@pytest.mark.parametrize("name", REGISTRIES)
def test_every_entry_has_a_line(name):
    assert len(ENTRIES[name]) >= 3
    for entry in ENTRIES[name].values():
        assert 10 < len(entry.description) and entry.description[-1] in ".?)", entry


def test_they_are_what_the_code_accepts():
    assert list(ENTRIES["corpora"]) == list(specs.OPTIONS) != []
    assert list(ENTRIES["benchmarks"]) == list(BENCHMARKS) and set(BENCHMARKS) == set(TEMPLATES)
    assert list(ENTRIES["transforms"]) == list(transforms.NAMES)
    assert list(ENTRIES["steps"]) == list(steps.ALL)
    assert list(ENTRIES["families"]) == list(FAMILIES)
    assert {name for one in ("arms", "models", "studies") for name in ENTRIES[one]} == set(shipped_gin_files())


def test_options_are_those_of_each():
    assert ENTRIES["corpora"]["csv"].options[:2] == ("separator", "columns")
    assert ENTRIES["steps"]["near_duplicates"].options == ("ngram", "bands", "rows", "similarity")
    assert ENTRIES["steps"]["licence"].options and "text" not in ENTRIES["steps"]["licence"].options
    assert ENTRIES["benchmarks"]["mbpp_three_shot"].options == ("released",)
    assert "ocnli" in ENTRIES["templates"]["multiple_choice"].options
    assert "decay" in ENTRIES["learning_rates"]["@warmup_stable_decay()"].options
    assert ENTRIES["models"]["gin/models/13b.gin"].description == "The paper's 13B: 40 layers of 5120."
    assert ENTRIES["official"]["jecqa"].options == ("jecqa", "jecqa_exact_set")


def test_the_forms_of_a_mix_are_accepted():
    from codellm_jax.mixture.schedules import phases

    for form in ENTRIES["schedules"]:
        assert phases([eval(form)], 100).asked(100) > 0


def test_commands_have_their_flags():
    found = {command.name: command for command in commands()}
    help_of_all = flags.parser().format_help()
    for name, command in found.items():
        assert f"    {name}" in help_of_all and command.summary and command.description, name
        for flag in command.flags:
            assert "%(" not in flag.meaning, flag
    study = {flag.name: flag for flag in found["study"].flags}
    assert study["--lease_seconds=S"].meaning.endswith("(default: 120)")
    assert study["--print_commands=FORM"].choices == ("shell", "slurm", "kubernetes")
    assert found["study"].takes_gin and not found["compare"].takes_gin
    assert [flag.name for flag in found["export"].flags][:2] == ["RUN[@STEP]", "--output=DIR"]
    assert next(flag for flag in found["export"].flags if flag.name == "--output=DIR").required
