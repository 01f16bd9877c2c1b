"""The stages of a study: gin files by name, and the settings of the study's file and flags for the runs of each."""

import ast
import dataclasses
import re
from collections.abc import Sequence

from codellm_jax.configuration import as_gin_value, explain, read_configuration
from codellm_jax.settings import Configuration, Setting, nearest, references
from codellm_jax.study.arms import OWN, STAGES, Study

# Settings that a run inherits from the run it starts from.
TAKEN_OVER = re.compile(r"(model|mesh|vocabulary)\.|mixture\.lengths$|VOCABULARY$|TASK_FEATURE_LENGTHS$")

# Settings about the run to start from, with their values where there is none: files do not set these themselves.
NOT_KNOWN = {"vocabulary.path": "None", "mixture.lengths": "None"}

Settings = tuple[tuple[str, str], ...]  # (name, value), as on the command line


def stage_settings(study: Study, configuration: Configuration, search_paths: Sequence[str]) -> dict[str, Settings]:
    """The settings of a study's file and flags for each of its stages, and for "evaluation".

    A setting with a stage before its name, tuning/BATCH_SIZE, applies to that stage; settings of pretraining and tuning
    also apply to other stages that begin with the same gin files, unless those set them themselves. A setting without a
    stage applies to every stage that reads it, below the stages' own settings. Settings that a tuned run inherits from
    the run it starts from, such as the model's size, are set where the first of these runs begins.

    Raises:
      ValueError: no stage reads a setting, there is no such stage, or the study sets it itself.
    """
    effective = configuration.effective
    of_study = {macro for name, setting in effective.items() if name.startswith("study.")
                for macro in references("%", setting.value)}
    used = {macro for setting in effective.values() for macro in references("%", setting.value)}
    shared = [name for name in configuration.asked
              if "/" not in name and not name.startswith("study.") and name not in of_study]
    names = {stage: _names_of_stage(study, stage, search_paths) for stage in _with_settings(study)}
    for name in effective:
        stage, mark, _ = name.partition("/")
        if mark and stage not in names:
            raise ValueError(f"{effective[name].where}: {name} does not name a stage of the study; the "
                             f"stages are {', '.join(names)}, and STAGES adds others.")
    for name in shared:
        if effective[name].where.startswith("gin/models/"):
            raise ValueError(f"{effective[name].where}: a size is set for pre-training, and tuning inherits it: "
                             "name its file in PRETRAINING_FILES, or as an arm's 'gin_file'.")
        if name in (*OWN, "CHECKPOINT_PATH"):
            raise ValueError(f"{effective[name].where}: the study sets {name} itself: SEEDS lists seeds, STUDY_DIR is "
                             "where runs are stored, and an arm's 'from' names the run to start from.")
        if name not in used and not any(name.rpartition(".")[0] in known or name in known for known in names.values()):
            raise ValueError(f"{effective[name].where}: no stage of the study reads the setting {name}"
                             + nearest(name, set().union(*names.values())))
    common: dict[str, Settings] = {}
    for stage, known in names.items():
        inherits = stage in ("tuning", "evaluation")
        of_all = [(name, str(configuration.resolved(name))) for name in shared
                  if (name.rpartition(".")[0] or name) in known and not (inherits and TAKEN_OVER.match(name))]
        scoped = [pair for scope in _scopes(study, stage) for pair in configuration.of_stage(scope)]
        common[stage] = tuple(dict(bare([*of_all, *scoped])).items())
    return common


def _scopes(study: Study, stage: str) -> list[str]:
    """The stages whose settings apply to a stage; later ones override earlier ones."""
    return [*(known for known in STAGES if known != stage and study.files(known) == study.files(stage)), stage]


def _with_settings(study: Study) -> tuple[str, ...]:
    """The prefixes allowed before a setting's name."""
    return (*study.stage_names, "evaluation")


def _names_of_stage(study: Study, stage: str, search_paths: Sequence[str]) -> set[str]:
    """The macros that a stage's files use, and the configurables that they bind or refer to."""
    read = of_files(study, stage, search_paths)
    names = {name.rpartition(".")[0] for setting in read.settings if "." in (name := setting.name)}
    for setting in read.settings:
        names |= set(re.findall(r"[%@](\w+)", setting.value))
    return names


def of_files(study: Study, stage: str, search_paths: Sequence[str], *more: str) -> Configuration:
    """The configuration of a stage's gin files and of further files, with "None" for the settings that only the plan
    has.
    """
    return read_configuration([*study.files(stage), *more], _placeholders(stage), search_paths, NOT_KNOWN)


def stage_configuration(study: Study, configuration: Configuration, stage: str,
                        search_paths: Sequence[str]) -> Configuration:
    """The configuration of a stage's runs before an arm adds its own settings, each setting with its origin."""
    common = stage_settings(study, configuration, search_paths)[stage]
    read = read_configuration(study.files(stage), [*_placeholders(stage), *common], search_paths, NOT_KNOWN)
    effective = configuration.effective

    def placed(setting: Setting) -> Setting:
        if not setting.where.startswith("--gin."):
            return setting
        names = [*(f"{scope}/{setting.name}" for scope in reversed(_scopes(study, stage))), setting.name]
        where = next((effective[name].where for name in names if name in effective), "the study's plan")
        return dataclasses.replace(setting, where=where)

    return dataclasses.replace(read, settings=tuple(map(placed, read.settings)))


def explain_in_study(study: Study, configuration: Configuration, name: str, search_paths: Sequence[str]) -> str:
    """The origin of a value in a study, in a few lines: for one stage (tuning/BATCH_SIZE), or for each that reads it.

    Raises:
      ValueError: neither the study nor any stage has a setting of that name.
    """
    stage, mark, plain = name.partition("/")
    if mark and stage not in _with_settings(study):
        raise ValueError(f"{stage} is not a stage of the study; the stages are {', '.join(_with_settings(study))}.")
    if mark:
        return f"{stage}/{explain(stage_configuration(study, configuration, stage, search_paths), plain)}"
    names = {stage: _names_of_stage(study, stage, search_paths) for stage in _with_settings(study)}
    reading = [stage for stage, known in names.items() if name in known or name.rpartition(".")[0] in known]
    if not reading and name in configuration.effective:  # a setting of the study itself
        return explain(configuration, name)
    if not reading:
        raise ValueError(f"Nothing is named {name!r}"
                         + nearest(name, set().union(configuration.effective, *names.values())))
    return "\n".join(f"{stage}/{explain(stage_configuration(study, configuration, stage, search_paths), name)}"
                     for stage in reading)


def _placeholders(stage: str) -> Settings:
    """Settings that a stage's files need and only the plan has, for reading the files alone."""
    names = ["CHECKPOINT_PATH"] if stage == "evaluation" else ["MODEL_DIR", "CODE_RATE", "INITIAL_CHECKPOINT_PATH"]
    return tuple((name, "None") for name in names)


def bare(settings: Sequence[tuple[str, str]]) -> Settings:
    """Settings as typed on the command line."""
    return tuple((name, bare_value(value)) for name, value in settings)


def bare_value(value: str) -> str:
    """A value as typed: a string without quotes if it is still read as a string."""
    try:
        text = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
    return text if isinstance(text, str) and as_gin_value(text) == repr(text) and text else value
