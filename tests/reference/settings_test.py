"""Every setting has a type, a meaning and the place where it stands, and imports nothing to say so."""

import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path

from codellm_jax.configuration import CONFIGURABLES, SHIPPED, imported
from codellm_jax.model.config import NAMES_OF, REMAT_POLICIES
from codellm_jax.reference.documented import described, parameters
from codellm_jax.reference.settings import settings

ROOT = Path(__file__).resolve().parent.parent.parent
BY_NAME = {setting.name: setting for setting in settings()}


def test_a_docstring_is_read_item_by_item():
    text = "It is.\n\nAttributes:\n  a, b: two of them,\n    on two lines.\n\n  c: one: of many.\n\nRaises:\n  E: no"
    assert described(text) == {"a": "two of them, on two lines.", "b": "two of them, on two lines.",
                               "c": "one: of many."}
    assert described("Args:\n  a: of one.") == {"a": "of one."}
    assert described("No parameters.\n") == {}


def test_parameters_are_those_that_python_sees():
    for target in CONFIGURABLES.values():
        module, name = target.split(":")
        seen = inspect.signature(getattr(imported(module), name)).parameters
        found = parameters(target)
        assert [parameter.name for parameter in found] == list(seen), target
        for parameter in found:
            default = seen[parameter.name].default
            is_factory = str(default) == "<factory>" or dataclasses.is_dataclass(default)
            assert (parameter.default is None) == (default is inspect.Parameter.empty), (target, parameter)
            if parameter.default is not None and not is_factory:
                assert eval(parameter.default) == default, (target, parameter)


def test_every_setting_has_a_meaning_and_a_type():
    assert len(BY_NAME) == len(settings()) > 200
    for setting in settings():
        assert setting.meaning.endswith(".") and len(setting.meaning) > 8, setting
        assert "see above" not in setting.meaning, setting
        assert setting.type and setting.defined, setting


def test_a_macro_has_its_values_and_what_it_sets():
    batch = BY_NAME["BATCH_SIZE"]
    assert batch.is_macro and batch.default is None and batch.type == "int" and batch.bound == ("train.batch_size",)
    values = dict(batch.files)
    assert {"8", "16", "256"} <= set(values.values())
    [line] = [where for where, value in batch.files if where.startswith("gin/tune.gin:")]
    written = (SHIPPED / "gin/tune.gin").read_text().splitlines()[int(line.split(":")[1]) - 1]
    assert written == f"BATCH_SIZE = {values[line]}"
    assert BY_NAME["train.batch_size"].bound == ("BATCH_SIZE",) and not BY_NAME["train.batch_size"].is_macro
    assert BY_NAME["train.log_period"].default == "10"
    assert BY_NAME["TRAIN_STEPS"].meaning == "Steps of the whole run."  # the run's, not a schedule's
    assert BY_NAME["TASKS"].bound == ("evaluation.tasks", "contamination.tasks", "prepare.tasks")
    assert "tuning/ 8" in [value for where, value in batch.files if where.startswith("gin/study.gin:")]


def test_choices_of_a_decoder_are_named_in_their_meanings():
    for field, choices in {**NAMES_OF, "remat": REMAT_POLICIES}.items():
        for choice in choices:
            assert choice in BY_NAME[f"model.{field}"].meaning.lower(), (field, choice)


def test_collecting_them_imports_no_heavy_library():
    script = ("import sys\nfrom codellm_jax.reference.settings import settings\nsettings()\n"
              "print({'jax', 'numpy', 'tensorflow', 'tasks'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "set()"
