"""A study's runs as `t5x` commands, and how far each has come: what its directory tells without a device.

    STUDY_DIR/study.json    the plan: every run, its arm, stage, seed, and what it starts from
    STUDY_DIR/runs/RUN      an ordinary run directory: of NC-uniform under seed 1, runs/NC-uniform.seed1
    STUDY_DIR/replaced/     what was there before a run was made again
"""

import ast
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from codellm_jax.configuration import (
    STAGES,
    Configuration,
    Setting,
    as_gin_value,
    explain,
    nearest,
    read_configuration,
    references,
)
from codellm_jax.results.files import files_of, write_whole
from codellm_jax.runtime.provenance import FREE_IN_EVALUATION, differences
from codellm_jax.study.arms import OWN, Arm, Asked, Run, Study, expand, plan_runs
from codellm_jax.weights.start import newest_settings

# Where a result was looked for or what else was asked with it makes no other result of it.
FREE_OF_RESULTS = frozenset(("CHECKPOINT_PATH", "TASKS", "evaluate.results_dir"))

# What a run takes over from the run it starts from.
TAKEN_OVER = re.compile(r"(model|mesh|vocabulary)\.|mixture\.lengths$|VOCABULARY$|TASK_FEATURE_LENGTHS$")

# Settings of a run to start from, where there is none: what files do not set themselves.
NOT_KNOWN = {"vocabulary.path": "None", "mixture.lengths": "None"}

Settings = tuple[tuple[str, str], ...]  # (name, value), as on the command line


class Planned(NamedTuple):
    """A run, and the commands that make it."""

    run: Run
    folder: str
    files: tuple[str, ...]
    overrides: Settings
    parent: Mapping[str, str] | None  # settings of the run it starts from
    training: Configuration
    evaluation_files: tuple[str, ...]
    evaluation_overrides: Settings
    evaluation: Configuration
    tasks: tuple[str, ...]

    def train_command(self, search_paths: Sequence[str]) -> list[str]:
        """Arguments of `t5x`."""
        return ["train", *_flags(self.files, self.overrides, search_paths)]

    def eval_command(self, search_paths: Sequence[str]) -> list[str]:
        """Arguments of `t5x`."""
        return ["eval", *_flags(self.evaluation_files, self.evaluation_overrides, search_paths)]

    def request(self) -> dict[str, Any]:
        """What `survey` is asked."""
        return {"name": self.run.name, "files": self.files, "overrides": self.overrides, "parent": self.parent,
                "trunk": None if self.run.branch_step is None else [self.run.parent, self.run.branch_step]}


class Standing(NamedTuple):
    """How far a run has come."""

    step: int  # of its newest checkpoint, as its last session left it; 0 of a run that has none
    trained: bool
    evaluated: bool
    checkpoint: str | None  # the digest of the newest
    kept: Mapping[str, str]  # step -> digest of those that KEEP_STEPS keeps
    changed: tuple[str, ...]  # what differs between what was trained and the plan; nothing of a run that is not begun
    results_changed: tuple[str, ...]  # likewise between how it was evaluated and the plan
    seconds: float  # of training, as far as sessions ended by themselves

    @property
    def state(self) -> str:
        """In a word or two."""
        if self.changed or self.results_changed:
            return "changed"
        if not self.trained:
            return f"at step {self.step}" if self.step else "to do"
        return "done" if self.evaluated else "trained"


def planned_runs(study: Study, configuration: Configuration, search_paths: Sequence[str]) -> tuple[
        list[Planned], list[str]]:
    """Every run of a study in order, and lines about arms that are another one.

    Args:
      study: what the gin file says.
      configuration: which it was built from.
      search_paths: where gin files are looked for besides.

    Raises:
      ValueError, FileNotFoundError: in one line, for arms, files and settings that do not fit.
    """
    arms, told = expand(study)
    common = stage_settings(study, configuration, search_paths)
    read: dict[str, tuple[tuple[str, ...], Settings, Mapping[str, str] | None]] = {}
    effective: dict[str, Mapping[str, str]] = {}
    asked: dict[str, Asked] = {}
    outside: dict[str, bool] = {}  # whether an arm's line begins outside of the study
    for arm in arms:
        outside[arm.name] = arm.source is not None or outside.get(arm.parent or "", False)
        # The model and its vocabulary are those of what lies outside.
        stated = [pair for pair in common[arm.stage] if not (outside[arm.name] and TAKEN_OVER.match(pair[0]))]
        files, overrides = _of_arm(arm, study, stated, search_paths)
        parent = effective[arm.parent] if arm.parent else _settings_of(arm)
        start = ("INITIAL_CHECKPOINT_PATH", "planned") if arm.at is None else ("BRANCH_FROM", "planned@1")
        places: Settings = (("MODEL_DIR", "planned"), *((start,) if parent else ()))
        try:
            found = read_configuration(files, [*overrides, *places], search_paths, parent)
            if "CODE_RATE" in arm.settings and "MIX_PHASES" not in arm.settings and found.resolved(
                    "mixture.mix_phases") != "None":  # the stage's own, above which the arm's rate would say nothing
                overrides = (*(pair for pair in overrides if pair[0] != "MIX_PHASES"), ("MIX_PHASES", "None"))
                found = read_configuration(files, [*overrides, *places], search_paths, parent)
            asked[arm.name] = Asked(*(_literal(found, name) for name in (
                "train.train_steps", "train.batch_size", "mixture.code_rate", "mixture.mix_phases")))
            if asked[arm.name].code_rate is None and asked[arm.name].mix_phases is None:
                raise ValueError("neither CODE_RATE nor MIX_PHASES is set: give the arm a share of code, such as "
                                 "{'CODE_RATE': 0.5}.")
        except ValueError as error:
            raise ValueError(f"{arm.name}: {error}") from None
        effective[arm.name] = {name: setting.value for name, setting in found.effective.items()}
        read[arm.name] = files, overrides, parent
    runs = plan_runs(study, arms, asked)
    planned = []
    for run in runs:
        files, overrides, parent = read[run.arm.name]
        folder = run_folder(study.directory, run.name)
        own = [("SEED", str(run.seed)), ("MODEL_DIR", folder)]
        if run.steps != asked[run.arm.name].steps:
            own.insert(0, ("TRAIN_STEPS", str(run.steps)))
        if run.branch_step is not None:
            own.append(("BRANCH_FROM", f"{run_folder(study.directory, str(run.parent))}@{run.branch_step}"))
        elif path := run_folder(study.directory, run.parent) if run.parent else run.arm.source:
            own.append(("INITIAL_CHECKPOINT_PATH", path))
        branched = {other.branch_step for other in runs if other.parent == run.name} - {None}
        if branched:
            steps = dict.fromkeys([*_kept(overrides), *sorted(branched)])  # type: ignore[type-var]
            own.append(("KEEP_STEPS", str(list(steps))))
        kept = [pair for pair in overrides if pair[0] not in dict(own)]
        # Of a run's evaluation only the settings asked are compared, so that nothing need be taken over here.
        evaluation = [*common["evaluation"], ("CHECKPOINT_PATH", folder)]
        try:
            asking = read_configuration(study.evaluation_files, evaluation, search_paths, effective[run.arm.name])
            tasks = tuple(_literal(asking, "evaluation.tasks"))
        except ValueError as error:
            raise ValueError(f"evaluation: {error}") from None
        planned.append(Planned(
            run, folder, files, (*kept, *own), parent,
            read_configuration(files, [*kept, *own], search_paths, parent or {}),
            tuple(study.evaluation_files), tuple(evaluation), asking, tasks))
    return planned, told


def _kept(overrides: Settings) -> list[Any]:
    """KEEP_STEPS of an arm's own settings."""
    return list(ast.literal_eval(dict(overrides).get("KEEP_STEPS", "[]")))


def _settings_of(arm: Arm) -> Mapping[str, str] | None:
    """Settings of the run directory or the published weights that an arm starts from, if it does."""
    try:
        return None if arm.source is None else newest_settings(arm.source, training=True)[1]
    except (OSError, ValueError) as error:
        raise type(error)(f"{arm.name}: {error}") from None


def run_folder(directory: str, name: str) -> str:
    """The directory of a run."""
    return f"{directory.rstrip('/')}/runs/{name}"


def stage_settings(study: Study, configuration: Configuration, search_paths: Sequence[str]) -> dict[str, Settings]:
    """What a study's file and flags set for each of its stages.

    A setting with a stage before its name, tuning/BATCH_SIZE, is of that stage. One without holds for every stage that
    reads it, below the stages' own; but what a run takes over from the run that it starts from, such as the model's
    size, is set where the first of them begins.

    Raises:
      ValueError: no stage reads a setting, or the study sets it itself.
    """
    effective = configuration.effective
    of_study = {macro for name, setting in effective.items() if name.startswith("study.")
                for macro in references("%", setting.value)}
    used = {macro for setting in effective.values() for macro in references("%", setting.value)}
    shared = [name for name in effective if "/" not in name and not name.startswith("study.") and name not in of_study]
    names = {stage: _names_of_stage(study, stage, search_paths) for stage in STAGES}
    for name in shared:
        if effective[name].where.startswith("gin/models/"):
            raise ValueError(f"{effective[name].where}: a size holds for pre-training, and what is tuned takes it "
                             "over: name its file in PRETRAINING_FILES, or as an arm's 'gin_file'.")
        if name in (*OWN, "CHECKPOINT_PATH"):
            raise ValueError(f"{effective[name].where}: the study sets {name} itself: SEEDS lists seeds, STUDY_DIR is "
                             "where runs are kept, and an arm's 'from' names the run to start from.")
        if name not in used and not any(name.rpartition(".")[0] in known or name in known for known in names.values()):
            raise ValueError(f"{effective[name].where}: no stage of the study reads the setting {name}"
                             + nearest(name, set().union(*names.values())))
    common: dict[str, Settings] = {}
    for stage, known in names.items():
        inherits = stage != "pretraining"
        of_all = [(name, str(configuration.resolved(name))) for name in shared
                  if (name.rpartition(".")[0] or name) in known and not (inherits and TAKEN_OVER.match(name))]
        common[stage] = tuple((dict(_bare(of_all)) | dict(_bare(configuration.of_stage(stage)))).items())
    return common


def _names_of_stage(study: Study, stage: str, search_paths: Sequence[str]) -> set[str]:
    """The macros that a stage's files use, and the configurables that they bind or refer to."""
    read = read_configuration(study.files(stage), _placeholders(stage), search_paths, NOT_KNOWN)
    names = {name.rpartition(".")[0] for setting in read.settings if "." in (name := setting.name)}
    for setting in read.settings:
        names |= set(re.findall(r"[%@](\w+)", setting.value))
    return names


def stage_configuration(study: Study, configuration: Configuration, stage: str,
                        search_paths: Sequence[str]) -> Configuration:
    """What holds for the runs of a stage before an arm adds its own, each setting with where it stands."""
    common = stage_settings(study, configuration, search_paths)[stage]
    read = read_configuration(study.files(stage), [*_placeholders(stage), *common], search_paths, NOT_KNOWN)
    effective = configuration.effective

    def placed(setting: Setting) -> Setting:
        if not setting.where.startswith("--gin."):
            return setting
        stated = effective.get(f"{stage}/{setting.name}") or effective.get(setting.name)
        return dataclasses.replace(setting, where=stated.where if stated else "the study's plan")

    return dataclasses.replace(read, settings=tuple(map(placed, read.settings)))


def explain_in_study(study: Study, configuration: Configuration, name: str, search_paths: Sequence[str]) -> str:
    """What sets a value in a study, in a few lines: of a stage (tuning/BATCH_SIZE), or of each that reads it.

    Raises:
      ValueError: neither the study nor a stage of it has a setting of that name.
    """
    stage, _, plain = name.rpartition("/")
    if stage in STAGES:
        return f"{stage}/{explain(stage_configuration(study, configuration, stage, search_paths), plain)}"
    names = {stage: _names_of_stage(study, stage, search_paths) for stage in STAGES}
    reading = [stage for stage, known in names.items() if name in known or name.rpartition(".")[0] in known]
    if not reading and name in configuration.effective:  # of the study itself
        return explain(configuration, name)
    if not reading:
        raise ValueError(f"Nothing is named {name!r}"
                         + nearest(name, set().union(configuration.effective, *names.values())))
    return "\n".join(f"{stage}/{explain(stage_configuration(study, configuration, stage, search_paths), name)}"
                     for stage in reading)


def _of_arm(
    arm: Arm, study: Study, common_settings: Sequence[tuple[str, str]], search_paths: Sequence[str]
) -> tuple[tuple[str, ...], Settings]:
    """The gin files and the settings of an arm; what its own file sets is above what the study says of the stage."""
    common = dict(common_settings)
    if arm.gin_file:
        alone = {setting.name for setting in read_configuration(
            [*study.files(arm.stage), arm.gin_file], _placeholders(arm.stage), search_paths, NOT_KNOWN).settings
            if setting.where.startswith(f"{arm.gin_file}:")}
        common = {name: value for name, value in common.items() if name not in alone}
    own = {name: value if isinstance(value, str) and value[:1] in ("@", "%") else _bare_value(repr(value))
           for name, value in arm.settings.items()}
    return (*study.files(arm.stage), *((arm.gin_file,) if arm.gin_file else ())), tuple((common | own).items())


def _placeholders(stage: str) -> Settings:
    """Settings that the files of a stage need and only the plan has, for reading the files alone."""
    names = {
        "pretraining": ["MODEL_DIR", "CODE_RATE", "INITIAL_CHECKPOINT_PATH"],
        "tuning": ["MODEL_DIR", "CODE_RATE", "INITIAL_CHECKPOINT_PATH"],
        "evaluation": ["CHECKPOINT_PATH"]}[stage]
    return tuple((name, "None") for name in names)


def _literal(configuration: Configuration, name: str) -> Any:
    value = configuration.resolved(name)
    try:
        return None if value is None else ast.literal_eval(value)
    except (ValueError, SyntaxError):
        raise ValueError(f"{name} must be a plain value in a study, found {value}.") from None


def _bare(settings: Sequence[tuple[str, str]]) -> Settings:
    return tuple((name, _bare_value(value)) for name, value in settings)


def _bare_value(value: str) -> str:
    """A value as one types it: a string without quotes where it is read as one all the same."""
    try:
        text = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
    return text if isinstance(text, str) and as_gin_value(text) == repr(text) and text else value


def _flags(files: Sequence[str], overrides: Settings, search_paths: Sequence[str]) -> list[str]:
    return [*(f"--gin_file={file}" for file in files),
            *([f"--gin_search_paths={','.join(search_paths)}"] if search_paths else []),
            *(f"--gin.{name}={value}" for name, value in overrides)]


def plan_as_json(
    study: Study, configuration: Configuration, search_paths: Sequence[str], planned: Sequence[Planned]
) -> dict[str, Any]:
    """What STUDY_DIR/study.json holds."""
    common = stage_settings(study, configuration, search_paths)
    return {"comparison": study.comparison, "seeds": list(study.seeds), "common": {
        stage: {"gin_files": study.files(stage), "settings": dict(common[stage])} for stage in STAGES}, "runs": [
        {"run": one.run.name, "arm": one.run.arm.name, "stage": one.run.arm.stage, "seed": one.run.seed,
         "from": one.run.start, "mix": one.run.mix, "steps": one.run.steps, "gin_file": one.run.arm.gin_file,
         "settings": {name: value for name, value in one.run.arm.settings.items() if value is not None}}
        for one in planned]}


def write_plan(directory: str, plan: Mapping[str, Any]) -> None:
    """Writes study.json, whole or not at all, where it does not say so already."""
    folder = epath.Path(directory).expanduser()
    text = json.dumps(plan, indent=2, ensure_ascii=False) + "\n"
    path = folder / "study.json"
    if not path.exists() or path.read_text() != text:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)


def standing(one: Planned, facts: Mapping[str, Any], parent: Standing | None) -> Standing:
    """How far a run has come.

    Args:
      one: the run.
      facts: what `survey` told of it.
      parent: how far the run has come that it starts from.
    """
    provenance = _json(epath.Path(one.folder).expanduser() / "provenance.json")
    if provenance is None:
        return Standing(0, False, False, None, {}, (), (), 0.0)
    changed = differences(provenance["asked"], one.training.asked)
    if not changed and facts.get("order", provenance["order"]) != provenance["order"]:
        changed = ["the data, or the order in which they are drawn, are others"]
    before = provenance["ledger"]["before"]
    of_parent = parent and (parent.checkpoint if one.run.branch_step is None else
                            parent.kept.get(str(one.run.branch_step)))
    if of_parent and before and before[-1].get("digest") not in (None, of_parent):
        changed.append(f"{one.run.parent}, which it started from, was trained again")
    results_changed, evaluated = _results(one, provenance["checkpoint"])
    checkpoints = epath.Path(one.folder).expanduser() / "checkpoints"
    steps = [int(path.name) for path in (checkpoints.iterdir() if checkpoints.exists() else []) if path.name.isdigit()]
    return Standing(max(steps, default=0), provenance["finished"], evaluated and provenance["finished"],
                    provenance["checkpoint"], provenance.get("kept", {}), tuple(changed), tuple(results_changed),
                    sum(session["seconds"] or 0.0 for session in provenance["sessions"]))


def _results(one: Planned, checkpoint: str | None) -> tuple[list[str], bool]:
    """What differs between results that are there and the plan, and whether all are there."""
    folder, changed, missing = epath.Path(one.folder).expanduser() / "results", [], False
    for task in one.tasks:
        found = [result for name in (task, f"{task}_sample") if (result := _json(folder / f"{name}.json"))]
        found = [result for result in found if result["checkpoint"].get("digest") == checkpoint]
        asked = [result.get("provenance", {}).get("asked", {}) for result in found]
        if any(not differences(each, one.evaluation.asked, FREE_OF_RESULTS.__contains__) for each in asked):
            continue
        missing = True
        changed += [difference for each in asked if each
                    for difference in differences(each, one.evaluation.asked, FREE_IN_EVALUATION.__contains__)]
    return list(dict.fromkeys(changed)), not missing


def evaluation_seconds(one: Planned) -> float | None:
    """How long the questions of a run took, where results tell; without the start of the command."""
    folder = epath.Path(one.folder).expanduser() / "results"
    results = [result for path in files_of(folder, ".json") if (result := _json(path))]
    rates = [(result["n"], result.get("questions_per_second")) for result in results]
    return sum(n / rate for n, rate in rates) if rates and all(rate for _, rate in rates) else None


def move_aside(one: Planned, directory: str, results_alone: bool) -> str:
    """Moves a run, or its results alone, to STUDY_DIR/replaced; returns where it is now."""
    source = epath.Path(one.folder).expanduser()
    source = source / "results" if results_alone else source
    replaced = epath.Path(directory).expanduser() / "replaced"
    replaced.mkdir(parents=True, exist_ok=True)
    number = 1
    while (target := replaced / f"{one.run.name}{'-results' * results_alone}-{number}").exists():
        number += 1
    source.rename(target)
    return str(target)


def _json(path: epath.Path) -> dict[str, Any] | None:
    """What a file holds; None where there is none, or a kill left half of it."""
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except json.JSONDecodeError:
        return None
