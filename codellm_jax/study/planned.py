"""A study's runs as `t5x` commands, and their progress, as read from its directory without a device.

    STUDY_DIR/study.json    the plan: every run, its arm, stage, seed, and what it starts from
    STUDY_DIR/runs/RUN      an ordinary run directory: runs/NC-uniform.seed1 for NC-uniform with seed 1
    STUDY_DIR/replaced/     the old files of runs that were run again
"""

import ast
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from codellm_jax.configuration import read_configuration
from codellm_jax.contents import absolute, word_of
from codellm_jax.results.files import Damaged, files_of, finished_lines, read_provenance, read_result, write_whole
from codellm_jax.runtime.compatibility import FREE_OF_MODEL
from codellm_jax.runtime.files import is_step
from codellm_jax.runtime.provenance import FREE_IN_EVALUATION, differences
from codellm_jax.settings import Configuration
from codellm_jax.study.arms import Arm, Asked, Run, Study, expand, plan_runs, without_mix
from codellm_jax.study.stages import TAKEN_OVER, Settings, bare, bare_value, of_files, stage_settings
from codellm_jax.weights.start import newest_settings

# The location of the data and the other tasks of the same evaluation do not change a result.
FREE_OF_RESULTS = frozenset(("CHECKPOINT_PATH", "TASKS", "evaluate.results_dir"))
OF_FILES = frozenset(("BENCHMARKS", "benchmarks.specs"))  # likewise for a task without a line in them


class Planned(NamedTuple):
    """A run, and the commands that make it."""

    run: Run
    folder: str
    kind: str  # of its stage: "pretraining" or "tuning"
    files: tuple[str, ...]
    overrides: Settings
    parent: Mapping[str, str] | None  # settings of the run from which it starts
    training: Configuration
    evaluation_files: tuple[str, ...]
    evaluation_overrides: Settings
    evaluation: Configuration
    tasks: tuple[str, ...]

    def train_command(self, search_paths: Sequence[str]) -> list[str]:
        """The arguments of `t5x` that train the run."""
        return ["train", *_flags(self.files, self.overrides, search_paths)]

    def eval_command(self, search_paths: Sequence[str]) -> list[str]:
        """The arguments of `t5x` that evaluate the run."""
        return ["eval", *_flags(self.evaluation_files, self.evaluation_overrides, search_paths)]

    def request(self) -> dict[str, Any]:
        """The request for this run, for `survey`."""
        return {"name": self.run.name, "files": self.files, "overrides": self.overrides, "parent": self.parent,
                "after": self.run.parent, "step": self.run.branch_step}


class Standing(NamedTuple):
    """The progress of a run."""

    step: int  # of its newest checkpoint, as its last session left it; 0 without one
    trained: bool
    evaluated: bool
    checkpoint: str | None  # digest of the newest checkpoint
    kept: Mapping[str, str]  # step -> digest of the checkpoints that KEEP_STEPS keeps
    changed: tuple[str, ...]  # differences between training and plan; none for a run that has not begun
    results_changed: tuple[str, ...]  # likewise between evaluation and plan
    seconds: float  # of training, in sessions that ended normally

    @property
    def state(self) -> str:
        """The state in one or two words."""
        if self.changed or self.results_changed:
            return "changed"
        if not self.trained:
            return f"at step {self.step}" if self.step else "to do"
        return "done" if self.evaluated else "trained"


def planned_runs(study: Study, configuration: Configuration, search_paths: Sequence[str]) -> tuple[
        list[Planned], list[str]]:
    """All runs of a study in order, and lines about arms that were merged into others.

    Args:
      study: the description in the gin file.
      configuration: the configuration it was built from.
      search_paths: additional folders in which to look for gin files.

    Raises:
      ValueError, FileNotFoundError: with a one-line message, for invalid arms, files or settings.
    """
    arms, told = expand(study)
    common = stage_settings(study, configuration, search_paths)
    read: dict[str, _Read] = {}
    of_source: dict[str, Mapping[str, str]] = {}  # settings of runs outside of the study, each read once
    for arm in arms:
        parent = read[arm.parent] if arm.parent else None
        taken_over = parent.settings if parent else None
        try:
            if arm.source is not None:
                taken_over = of_source.get(arm.source) or newest_settings(arm.source, training=True)[1]
                of_source[arm.source] = taken_over
            read[arm.name] = _read_arm(arm, parent, taken_over, study, configuration, common[arm.stage], search_paths)
        except (ValueError, OSError) as error:
            raise type(error)(f"{arm.name}: {error}") from None
    runs = plan_runs(study, arms, {name: of_arm.asked for name, of_arm in read.items()})
    branched: dict[str | None, list[int]] = {}
    for run in runs:
        if run.branch_step is not None:
            branched.setdefault(run.parent, []).append(run.branch_step)
    planned = []
    for run in runs:
        of_arm = read[run.arm.name]
        folder = run_folder(study.directory, run.name)
        own = [("SEED", str(run.seed)), ("MODEL_DIR", folder)]
        if run.steps != of_arm.asked.steps:
            own.insert(0, ("TRAIN_STEPS", str(run.steps)))
        if run.branch_step is not None:
            own.append(("BRANCH_FROM", f"{run_folder(study.directory, str(run.parent))}@{run.branch_step}"))
        elif path := run_folder(study.directory, run.parent) if run.parent else run.arm.source:
            own.append(("INITIAL_CHECKPOINT_PATH", path))
        if run.name in branched:
            steps = dict.fromkeys([*_kept(of_arm.overrides), *sorted(branched[run.name])])
            own.append(("KEEP_STEPS", str(list(steps))))
        overrides = (*(pair for pair in of_arm.overrides if pair[0] not in dict(own)), *own)
        # A run's evaluation is compared by the requested settings alone, so it inherits nothing here.
        evaluation = [*common["evaluation"], ("CHECKPOINT_PATH", folder)]
        try:
            asking = read_configuration(study.evaluation_files, evaluation, search_paths, of_arm.settings)
            tasks = tuple(_literal(asking, "evaluation.tasks"))
        except ValueError as error:
            raise ValueError(f"evaluation: {error}") from None
        planned.append(Planned(
            run, folder, of_arm.kind, of_arm.files, overrides, of_arm.parent,
            read_configuration(of_arm.files, overrides, search_paths, of_arm.parent or {}),
            tuple(study.evaluation_files), tuple(evaluation), asking, tasks))
    return planned, told


class _Read(NamedTuple):
    """The files and settings of an arm, read as its runs will read them."""

    arm: Arm
    outside: bool  # whether its line begins outside of the study
    files: tuple[str, ...]
    overrides: Settings
    parent: Mapping[str, str] | None  # settings of its start
    settings: Mapping[str, str]  # all settings in force
    asked: Asked

    @property
    def kind(self) -> str:
        return self.asked.kind or self.arm.stage


def _read_arm(
    arm: Arm, parent: _Read | None, taken_over: Mapping[str, str] | None, study: Study, configuration: Configuration,
    common: Settings, search_paths: Sequence[str],
) -> _Read:
    """Reads an arm, given the arm from which it starts, the settings of its start (inside or outside of the study), and
    the study's settings for its stage.
    """
    outside = arm.source is not None or parent is not None and parent.outside
    files = (*study.files(arm.stage), *((arm.gin_file,) if arm.gin_file else ()))
    if arm.at is not None and parent:
        below = _of_trunk(arm, parent, study, configuration, search_paths)
    else:
        # A run that starts from another inherits that run's model and vocabulary.
        scoped = {} if outside else dict(configuration.of_stage(arm.stage))
        below = {name: value for name, value in common
                 if taken_over is None or name in scoped or not TAKEN_OVER.match(name)}
    if arm.gin_file and (arm.at is None or parent is None or arm.gin_file != parent.arm.gin_file):
        # Settings in the arm's own file override the study's settings for the stage.
        alone = {setting.name for setting in of_files(study, arm.stage, search_paths, arm.gin_file).settings
                 if setting.where.startswith(f"{arm.gin_file}:")}
        below = {name: value for name, value in below.items() if name not in alone}
    own = {name: value if isinstance(value, str) and value[:1] in ("@", "%") else bare_value(repr(value))
           for name, value in arm.settings.items()}
    start = ("INITIAL_CHECKPOINT_PATH", "planned") if arm.at is None else ("BRANCH_FROM", "planned@1")
    places: Settings = (("MODEL_DIR", "planned"), *((start,) if taken_over else ()))

    def reading(overrides: Mapping[str, str]) -> Configuration:
        return read_configuration(files, [*overrides.items(), *places], search_paths, taken_over)

    overrides = below | own
    found = reading(overrides)
    if "CODE_RATE" in own and "MIX_PHASES" not in own and found.resolved("mixture.mix_phases") != "None":
        overrides |= {"MIX_PHASES": "None"}  # otherwise the stage's value would override the arm's rate
        found = reading(overrides)
    if above := _above_files(arm, found):
        overrides |= above
        found = reading(overrides)
    asked = Asked(*(_literal(found, name) for name in (
        "train.train_steps", "train.batch_size", "mixture.code_rate", "mixture.mix_phases")))._replace(
            kind=_kind_of(found))
    if asked.code_rate is None and asked.mix_phases is None:
        raise ValueError("neither CODE_RATE nor MIX_PHASES is set: give the arm a share of code, such as "
                         "{'CODE_RATE': 0.5}.")
    return _Read(arm, outside, files, tuple(overrides.items()), taken_over,
                 {name: setting.value for name, setting in found.effective.items()}, asked)


def _of_trunk(
    arm: Arm, trunk: _Read, study: Study, configuration: Configuration, search_paths: Sequence[str]
) -> dict[str, str]:
    """The settings of a branch below its own: the trunk's, overridden by its stage's where that differs."""
    of_trunk = dict(trunk.overrides)
    stage: dict[str, str] = {}
    if arm.stage != trunk.arm.stage:
        stage = dict(bare(configuration.of_stage(arm.stage)))
        files, before = (of_files(study, name, search_paths) for name in (arm.stage, trunk.arm.stage))
        if _kind_of(files) != trunk.kind:
            raise ValueError(f"its stage, {arm.stage}, is {_kind_of(files)}, but a branch must be of the same kind as "
                             f"its trunk, {trunk.kind}: start from the end of {trunk.arm.name}, without a step.")
        for name, setting in files.effective.items():
            if name in before.effective and before.effective[name].value != setting.value:  # these files set it
                of_trunk.pop(name, None)
    return without_mix(of_trunk, [*stage, *arm.settings]) | stage


def _kind_of(configuration: Configuration) -> str:
    return _literal(configuration, "mixture.stage") or "pretraining"


def _above_files(arm: Arm, found: Configuration) -> dict[str, str]:
    """Inherited settings that the stage's files, which are written for new parameters, set differently."""
    above = {}
    for setting in found.settings[:found.taken_over]:
        here = found.effective[setting.name]
        is_free = setting.name.startswith("mesh.") or setting.name.removeprefix("model.") in FREE_OF_MODEL
        is_of_stage = not here.where.startswith(("--gin.", f"{arm.gin_file}:"))
        if here.value != setting.value and is_of_stage and not is_free and not here.value.startswith("%"):
            above[setting.name] = bare_value(setting.value)
    return above


def _kept(overrides: Settings) -> list[Any]:
    """The KEEP_STEPS in an arm's own settings."""
    return list(ast.literal_eval(dict(overrides).get("KEEP_STEPS", "[]")))


def run_folder(directory: str, name: str) -> str:
    """The directory of a run."""
    return f"{directory.rstrip('/')}/runs/{name}"


def _literal(configuration: Configuration, name: str) -> Any:
    value = configuration.resolved(name)
    try:
        return None if value is None else ast.literal_eval(value)
    except (ValueError, SyntaxError):
        raise ValueError(f"{name} must be a plain value in a study, found {value}.") from None


def _flags(files: Sequence[str], overrides: Settings, search_paths: Sequence[str]) -> list[str]:
    return [*(f"--gin_file={file}" for file in files),
            *([f"--gin_search_paths={','.join(search_paths)}"] if search_paths else []),
            *(f"--gin.{name}={value}" for name, value in overrides)]


def plan_as_json(
    study: Study, configuration: Configuration, search_paths: Sequence[str], planned: Sequence[Planned]
) -> dict[str, Any]:
    """The content of STUDY_DIR/study.json."""
    common = stage_settings(study, configuration, search_paths)
    stages = {stage: {"gin_files": study.files(stage), "settings": dict(settings)}
              for stage, settings in common.items()}
    return {"comparison": study.comparison, "seeds": list(study.seeds), "common": stages, "runs": [
        {"run": one.run.name, "arm": one.run.arm.name, "stage": one.run.arm.stage, "kind": one.kind,
         "seed": one.run.seed, "from": one.run.start, "mix": one.run.mix, "steps": one.run.steps,
         "gin_file": one.run.arm.gin_file,
         "settings": {name: value for name, value in one.run.arm.settings.items() if value is not None}}
        for one in planned]}


def write_plan(directory: str, plan: Mapping[str, Any]) -> None:
    """Writes study.json atomically, if its content changes."""
    folder = epath.Path(directory).expanduser()
    text = json.dumps(plan, indent=2, ensure_ascii=False) + "\n"
    path = folder / "study.json"
    if not path.exists() or path.read_text() != text:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)


def standing(one: Planned, facts: Mapping[str, Any], parent: Standing | None) -> Standing:
    """The progress of a run.

    Args:
      one: the run.
      facts: the answer of `survey` for it.
      parent: the progress of the run from which it starts.
    """
    try:
        provenance = read_provenance(epath.Path(one.folder).expanduser(), (
            "asked", "order", "ledger", "sessions", "finished", "checkpoint"))
    except Damaged:  # the run moves it aside when it continues
        provenance = None
    if provenance is None:
        return Standing(0, False, False, None, {}, (), (), 0.0)
    changed = differences(provenance["asked"], one.training.asked)
    if not changed and facts.get("order", provenance["order"]) != provenance["order"]:
        changed = ["the data or their order differ"]
    before = provenance["ledger"].get("before")
    of_parent = parent and (parent.checkpoint if one.run.branch_step is None else
                            parent.kept.get(str(one.run.branch_step)))
    if of_parent and before and before[-1].get("digest") not in (None, of_parent):
        changed.append(f"{one.run.parent}, from which it started, was trained again")
    results_changed, evaluated = _results(one, provenance["checkpoint"])
    checkpoints = epath.Path(one.folder).expanduser() / "checkpoints"
    steps = [int(path.name) for path in (checkpoints.iterdir() if checkpoints.exists() else []) if is_step(path.name)]
    trained = provenance["finished"] and bool(evaluated or steps)  # evaluation needs a checkpoint
    return Standing(max(steps, default=0), trained, evaluated and trained,
                    provenance["checkpoint"], provenance.get("kept", {}), tuple(changed), tuple(results_changed),
                    sum(session["seconds"] or 0.0 for session in provenance["sessions"]))


def _results(one: Planned, checkpoint: str | None) -> tuple[list[str], bool]:
    """The differences between existing results and the plan, and whether all results exist."""
    folder, changed, missing = epath.Path(one.folder).expanduser() / "results", [], False
    specs = ast.literal_eval(one.evaluation.resolved("benchmarks.specs") or "{}")
    for task in one.tasks:
        name = word_of(str(task))
        found = [result for each in (name, f"{name}_sample") if (result := _whole_result(folder / f"{each}.json"))]
        found = [result for result in found if result["checkpoint"].get("digest") == checkpoint
                 and (task == name or absolute(task) in result["files"])]  # a file of this name in another folder
        asked = [result.get("provenance", {}).get("asked", {}) for result in found]
        free = FREE_OF_RESULTS if name in specs else FREE_OF_RESULTS | OF_FILES
        if any(not differences(each, one.evaluation.asked, free.__contains__) for each in asked):
            continue
        missing = True
        changed += [difference for each in asked if each
                    for difference in differences(each, one.evaluation.asked, FREE_IN_EVALUATION.__contains__)]
    return list(dict.fromkeys(changed)), not missing


def evaluation_seconds(one: Planned) -> float | None:
    """The seconds that the questions of a run took, if recorded in its results; the start of the command is excluded.
    """
    folder = epath.Path(one.folder).expanduser() / "results"
    results = [result for path in files_of(folder, ".json") if (result := _whole_result(path))]
    rates = [(result["n"], result.get("questions_per_second")) for result in results]
    return sum(n / rate for n, rate in rates) if rates and all(rate for _, rate in rates) else None


def move_aside(one: Planned, directory: str, results_alone: bool) -> str:
    """Moves a run, or only its results, to STUDY_DIR/replaced; returns the new place."""
    source = epath.Path(one.folder).expanduser()
    source = source / "results" if results_alone else source
    replaced = epath.Path(directory).expanduser() / "replaced"
    replaced.mkdir(parents=True, exist_ok=True)
    number = 1
    while (target := replaced / f"{one.run.name}{'-results' * results_alone}-{number}").exists():
        number += 1
    source.rename(target)
    return str(target)


def _whole_result(path: epath.Path) -> dict[str, Any] | None:
    """A result with all its lines; None if there is none, or if it must be evaluated again."""
    stamps = [(status.length, status.mtime) for file in (path, path.with_suffix(".jsonl")) if file.exists()
              for status in [file.stat()]]
    return _read_result(path, *stamps) if path.exists() else None


@functools.lru_cache(maxsize=4096)
def _read_result(path: epath.Path, *stamps: tuple[int, Any]) -> dict[str, Any] | None:
    """Like `_whole_result`, but reads each file only once until it changes."""
    del stamps
    try:
        result = read_result(path, required=())
    except Damaged:
        return None
    return result if "n" not in result or finished_lines(path.with_suffix(".jsonl"), result) is not None else None
