"""What a user of upstream T5X types leads to what stands for it here; and gin/t5x/ binds what exists."""

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from codellm_jax import cli, t5x_names
from codellm_jax.configuration import CONFIGURABLES, SHIPPED, read_configuration, read_settings
from codellm_jax.flags import overrides_of, parser
from codellm_jax.runtime.checkpoints import newest_record
from gin import config_parser

MIXED = "gin/mixed_pretrain.gin"


@pytest.mark.parametrize(("name", "value", "said"), [
    ("MIXTURE_OR_TASK_MODULE", "my.tasks", "TASK_MODULES"),
    ("train/utils.DatasetConfig.batch_size", "16", "BATCH_SIZE"),
    ("utils.DatasetConfig.batch_size", "16", "BATCH_SIZE"),
    ("trainer.Trainer.num_microbatches", "2", "train.microbatches"),
    ("partitioning.PjitPartitioner.num_partitions", "2", "mesh.model"),
    ("PjitPartitioner.num_partitions", "2", "mesh.model"),
    ("utils.SaveCheckpointConfig.period", "10", "CHECKPOINT_PERIOD"),
    ("utils.SaveCheckpointConfig.keep", "3", "train.keep_last"),
    ("utils.RestoreCheckpointConfig.path", "runs/first", "INITIAL_CHECKPOINT_PATH"),
    ("RANDOM_SEED", "3", "SEED"),
    ("USE_CACHED_TASKS", "False", "CACHE_DIR"),
    ("SHUFFLE_TRAIN_EXAMPLES", "False", "SEED shuffles"),
    ("EVAL_OUTPUT_DIR", "out", "evaluate.results_dir"),
    ("INFER_OUTPUT_DIR", "out", "--output=FILE"),
    ("train.total_steps", "3", "TRAIN_STEPS"),
    ("train.use_orbax", "False", "Orbax writes all checkpoints"),
    ("network.T5Config.emb_dim", "8", "model.hidden"),
    ("EVAL_STEPS", "3", "train.eval_rows"),
], ids=lambda value: value if isinstance(value, str) and value.isidentifier() else None)
def test_a_setting_of_t5x_leads_to_ours(name: str, value: str, said: str):
    with pytest.raises(ValueError, match=re.escape(said)) as raised:
        read_configuration([MIXED], [(name, value)])
    told = str(raised.value)
    assert told.startswith(f"--gin.{name}: nothing is named {name}; here T5X's ") and "\n" not in told


@pytest.mark.parametrize(("name", "value", "said"), [
    ("utils.RestoreCheckpointConfig.mode", "specific", "RestoreCheckpointConfig is INITIAL_CHECKPOINT_PATH"),
    ("adafactor.Adafactor.decay_rate", "0.8", "Adafactor is train.optimizer"),
    ("train.model", "@models.DecoderOnlyModel()", "DecoderOnlyModel is model.layers"),
], ids=["parameter", "optimizer", "reference"])
def test_a_class_of_t5x_leads_to_ours(name: str, value: str, said: str):
    with pytest.raises(ValueError, match=f"here T5X's {re.escape(said)}"):
        read_configuration([MIXED], [(name, value)])


def test_mixture_or_task_name_is_none_of_evaluation():
    with pytest.raises(ValueError, match="TASKS in evaluation"):
        read_configuration(["gin/eval.gin"], [("MIXTURE_OR_TASK_NAME", "logic"), ("CHECKPOINT_PATH", "None"),
                                              ("VOCABULARY", "python_8k"), ("TASK_FEATURE_LENGTHS", "{'targets': 8}")])


@pytest.mark.parametrize("flag", ["--tfds_data_dir=/data", "--multiprocess_gpu", "--alsologtostderr",
                                  "--seqio_additional_cache_dirs=/data", "--run_mode=train", "-v"])
def test_a_flag_of_t5x_leads_to_ours(flag: str):
    with pytest.raises(ValueError, match=f"^unknown argument {flag}; here T5X's {flag.split('=')[0]} is "):
        overrides_of([flag])


@pytest.mark.parametrize(("arguments", "said"), [
    (["inspect_checkpoint", "--dir=x"], "RUN/provenance.json"),
    (["export", "--gin_file=export.gin"], "t5x export RUN --output=DIR"),
    (["finetune"], "gin/tune_mixed.gin"),
    (["pretrain"], MIXED),
], ids=["inspect", "export", "finetune", "pretrain"])
def test_a_command_of_t5x_leads_to_ours(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(arguments) == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1


@pytest.mark.parametrize("file", ["gin/t5x/mixed_pretrain.gin", "gin/t5x/eval.gin", "own.gin"])
def test_a_gin_file_of_t5x_is_told_from_ours(file: str, tmp_path: Path):
    (tmp_path / "own.gin").write_text(
        "from __gin__ import dynamic_registration\nfrom t5x import utils\ninclude 't5x/configs/runs/pretrain.gin'\n")
    with pytest.raises(ValueError, match="is a gin file of upstream T5X, for python -m t5x.train"):
        read_configuration([file], [], [str(tmp_path)])


def test_a_gin_file_of_t5x_s_source_is_no_slip_of_the_pen():
    with pytest.raises(FileNotFoundError, match="^t5x/configs/runs/pretrain.gin is a gin file of upstream T5X"):
        read_configuration(["t5x/configs/runs/pretrain.gin"], [])


def test_a_flag_of_jax_leads_to_its_variable():
    with pytest.raises(ValueError, match="environment, as JAX_LOG_COMPILES=VALUE"):
        overrides_of(["--jax_log_compiles=1"])


def test_a_checkpoint_of_t5x_leads_to_adopt(tmp_path: Path):
    (tmp_path / "checkpoint_4").mkdir()
    for path in (tmp_path, tmp_path / "checkpoint_4"):
        with pytest.raises(FileNotFoundError, match=f"t5x adopt {path} --output=RUN"):
            newest_record(str(path))


def test_gin_bindings_are_taken_as_t5x_takes_them():
    given = ["--gin_bindings=TRAIN_STEPS = 8", "--gin_bindings", "model.dtype = 'bfloat16'", "--gin.SEED=3"]
    assert overrides_of(given) == [("TRAIN_STEPS", "8"), ("model.dtype", "'bfloat16'"), ("SEED", "3")]
    for wrong in ("--gin_bindings", "--gin_bindings=TRAIN_STEPS", "--gin_bindings= = 3"):
        with pytest.raises(ValueError, match="must be 'NAME = VALUE'"):
            overrides_of([wrong])


def test_lengths_of_two_features_are_refused_in_both_stages():
    import tasks
    from codellm_jax.mixture.mixture import Mixture

    for stage in ("pretraining", "tuning"):
        with pytest.raises(ValueError, match="TASK_FEATURE_LENGTHS has one length"):
            Mixture("python_text_code", tasks.Definitions(), {"inputs": 128, "targets": 128}, 0.5, stage=stage)


def test_what_the_table_names_is_there():
    files = ["gin/pretrain.gin", "gin/tune.gin", "gin/eval.gin", "gin/infer.gin"]
    macros = {name for file in files for name in read_settings([file], []).effective if "." not in name}
    macros |= {reference for file in files for setting in read_settings([file], []).settings
               for reference in re.findall(r"%(\w+)", setting.value)}
    flags = parser().format_help() + "".join(
        sub.format_help() for sub in parser()._subparsers._group_actions[0].choices.values())
    for ours in (*t5x_names.SETTINGS.values(), *t5x_names.CLASSES.values(), *t5x_names.FLAGS.values(),
                 *t5x_names.COMMANDS.values()):
        for macro in re.findall(r"\b[A-Z]+(?:_[A-Z]+)*\b", ours):
            assert macro in macros | {"TFDS", "TFDS_DATA_DIR", "JAX", "DIR", "FILE", "RUN", "SOURCE", "CACHE", "T"}
        for name, parameter in re.findall(r"\b(model|mesh|train|evaluate|sampling)\.(\w+)\b", ours):
            module, _, attribute = CONFIGURABLES[name].partition(":")
            assert parameter in inspect.signature(getattr(importlib.import_module(module), attribute)).parameters
        for flag in re.findall(r"--(?!gin)[a-z_]+", ours):
            assert flag in flags


def _parameters(module: str, attribute: str) -> set[str]:
    """Those of a class or function, read from its source where importing it would need T5X."""
    if module == "codellm_jax.upstream.models":
        source = ast.parse((SHIPPED / "codellm_jax" / "upstream" / "models.py").read_text())
        [found] = [node for node in source.body if getattr(node, "name", "") == attribute]
        if isinstance(found, ast.ClassDef):
            [found] = [node for node in found.body if getattr(node, "name", "") == "__init__"]
        return {argument.arg for argument in found.args.args}
    target: Any = getattr(importlib.import_module(module), attribute)
    return set(inspect.signature(target).parameters)


@pytest.mark.parametrize("file", sorted((SHIPPED / "gin" / "t5x").glob("*.gin")), ids=lambda file: file.name)
def test_files_for_t5x_bind_what_exists(file: Path):
    statements = list(config_parser.ConfigParser(file.read_text(), _AsText()))
    modules: dict[str, str] = {}
    for statement in statements:
        if isinstance(statement, config_parser.ImportStatement):
            modules[statement.alias or statement.module.split(".")[-1]] = statement.module
    bound = [statement for statement in statements if isinstance(statement, config_parser.BindingStatement)]
    for binding in bound:
        names = [(binding.selector, binding.arg_name), *((name, None) for name in re.findall(
            r"@([\w.]+\.\w+)", str(binding.value)))]
        for selector, parameter in names:
            alias, _, attribute = selector.rpartition(".")
            if not alias:
                continue
            assert alias in modules, f"{file.name} imports no {alias}"
            if modules[alias].startswith(("codellm_jax", "tasks")):
                found = _parameters(modules[alias], attribute)
                assert parameter is None or parameter in found, f"{selector}.{parameter}"
    for statement in statements:
        if isinstance(statement, config_parser.IncludeStatement):
            assert statement.filename.startswith("t5x/configs/") or (SHIPPED / statement.filename).is_file()


class _AsText(config_parser.ParserDelegate):
    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> str:
        return f"@{scoped_configurable_name.split('/')[-1]}"

    def macro(self, macro_name: str) -> str:
        return f"%{macro_name}"
