"""The plan of a study: expands the arms of a gin file to runs, in an order in which they can be trained.

    ARMS = {
        'NL': {'CODE_RATE': 0.0},                                a run of pre-training
        'NC-uniform': {'from': 'NL', 'CODE_RATE': 0.375},        a tuning run that starts from NL with the same seed
        'QC': {'from': 'hf://ORG/NAME', 'CODE_RATE': 0.375},     a tuning run that starts from published weights
        'MORE': {'from': 'NL', 'stage': 'pretraining', 'CODE_RATE': 0.5},   a run that continues the pre-training of NL
        'MID': {'from': 'NL@0.5', 'CODE_RATE': 0.3},             a run that branches from NL half-way
        'LATE': {'from': 'NL@0.5', 'stage': 'midtraining', 'CODE_RATE': 0.3},   likewise, with the settings of a stage
        'GRID': {'from': 'NL', 'sweep': {'at': [0.1, 0.5], 'CODE_RATE': [0.1, 0.3]}},   four such runs
        'RATE': {'sweep': {'CODE_RATE': [0.1, 0.25, 0.5]}},      RATE-0.1, RATE-0.25 and RATE-0.5
        'WIDE': {'gin_file': 'gin/models/125m.gin', 'CODE_RATE': 0.0},
    }

'from' names an arm, a run directory, or published weights: a folder of them (a path contains a slash) or hf://ORG/NAME.
An arm with 'from' is tuned, unless its 'stage' says otherwise: "pretraining", "tuning" or another stage of the study
(`Study.stages`). All keys of an arm except WORDS are settings, as on the command line. An arm that starts from a swept
arm is swept with it; an arm that starts from one of its points ('from': 'RATE-0.1') is not. A sweep of several settings
combines each value of one with each value of the others.

An arm that branches ('from': 'NL@0.5', or 'at' beside 'from'; a fraction of the trunk's steps, or a step as a whole
number) continues from that step with the optimizer state and the data position. It inherits the stage, the settings and
the gin file of its trunk, except for its own settings; if it has another stage, that stage's settings override the
trunk's. TRAIN_STEPS includes the trunk's steps.

There are two comparisons, for any stage:

  compute-matched   every arm takes the same number of steps: code replaces text
  data-matched      every arm is trained on the text of TRAIN_STEPS steps without code: code comes on top, and the run
                    is longer

This module has only plain functions on plain values, without JAX, gin or files.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from codellm_jax.mixture.schedules import Schedule, constant, phases
from codellm_jax.runtime.process import require_plain_name

COMPARISONS = ("compute-matched", "data-matched")
WORDS = ("from", "at", "stage", "sweep", "gin_file")  # keys of an arm that are not settings
STAGES = ("pretraining", "tuning")  # of every study
OWN = ("SEED", "MODEL_DIR", "INITIAL_CHECKPOINT_PATH", "BRANCH_FROM")  # settings made by the plan

_PAIRS_OF_FILES = (("mixed_pretrain", "text_pretrain"), ("mixed_pretrain_increase", "mixed_pretrain_decrease"),
                   ("tune_mixed", "tune_text"), ("tune_increase", "tune_decrease"))
OTHER_FILES = {f"gin/{one}.gin": f"gin/{other}.gin" for pair in _PAIRS_OF_FILES for one, other in (pair, pair[::-1])}


@dataclasses.dataclass(frozen=True)
class Study:
    """The description of a study in a gin file.

    Attributes:
      directory: the folder of the study, local or gs://.
      arms: the settings of each arm, by the arm's name, as the docstring of `study.arms` describes them.
      more_arms: further arms; each replaces an arm of the same name in `arms`.
      seeds: the seeds; each arm is trained once with each.
      comparison: "compute-matched" (equal steps for all arms) or "data-matched" (equal text for all arms).
      stages: for each further stage by name, the gin files that its runs begin with.
      pretraining_files: the gin files that pre-training runs begin with.
      tuning_files: the gin files that tuning runs begin with.
      evaluation_files: the gin files that evaluations begin with.
    """

    directory: str
    arms: Mapping[str, Mapping[str, Any]]
    pretraining_files: Sequence[str]
    tuning_files: Sequence[str]
    evaluation_files: Sequence[str]
    more_arms: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    seeds: Sequence[int] = (0,)
    comparison: str = "compute-matched"
    stages: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.directory.strip():
            raise ValueError("STUDY_DIR is empty: name the study's directory, such as runs/study.")
        require_plain_name("STUDY_DIR", self.directory)
        if self.comparison not in COMPARISONS:
            raise ValueError(f"COMPARISON must be one of {', '.join(COMPARISONS)}, found {self.comparison!r}.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or not all(
                isinstance(seed, int) and 0 <= seed < 2**32 for seed in self.seeds):
            raise ValueError(f"SEEDS must list different whole numbers from 0, found {list(self.seeds)}.")
        for name, files in self.stages.items():
            if not re.fullmatch(r"[A-Za-z_]\w*", name) or name in (*STAGES, "evaluation"):
                raise ValueError(f"STAGES has a stage {name!r}; its name must be a word other than pretraining, tuning "
                                 "and evaluation, which have their own files.")
            if isinstance(files, str) or not files:
                raise ValueError(f"STAGES must list the gin files of {name}, such as ['gin/pretrain.gin'], found "
                                 f"{files!r}.")

    @property
    def stage_names(self) -> tuple[str, ...]:
        """The stages that an arm may have."""
        return (*STAGES, *self.stages)

    def files(self, stage: str) -> list[str]:
        """The gin files that runs of a stage, or their "evaluation", begin with."""
        return list({"pretraining": self.pretraining_files, "tuning": self.tuning_files,
                     "evaluation": self.evaluation_files, **self.stages}[stage])


class Arm(NamedTuple):
    """One arm, fully expanded."""

    name: str
    parent: str | None  # the arm whose runs it starts from
    gin_file: str | None  # its own settings, which override those of its stage
    settings: Mapping[str, Any]  # for a branch in its trunk's stage, includes the trunk's
    source: str | None = None  # the run directory or published weights that it starts from
    stage: str = "pretraining"
    at: int | float | None = None  # where it branches from the parent: a step, or a fraction of the steps


class Run(NamedTuple):
    """One arm with one seed: a run directory."""

    arm: Arm
    seed: int
    steps: int
    mix: str  # "constant", "uniform", "increase", "decrease", or the value of MIX_PHASES
    branch_step: int | None = None  # of the run from which it branches

    @property
    def name(self) -> str:
        return f"{self.arm.name}.seed{self.seed}"

    @property
    def parent(self) -> str | None:
        """The run of the study from which it starts."""
        return f"{self.arm.parent}.seed{self.seed}" if self.arm.parent else None

    @property
    def start(self) -> str | None:
        """The start: a run of the study, another run's directory, or published weights."""
        at = "" if self.branch_step is None else f"@{self.branch_step}"
        return f"{self.parent}{at}" if self.parent else self.arm.source


class Asked(NamedTuple):
    """The length of an arm's runs and their mix, from its settings."""

    steps: int
    batch_size: int
    code_rate: float | None
    mix_phases: Any
    kind: str | None = None  # of a stage with another name: "pretraining" or "tuning"

    @property
    def rows(self) -> int:
        """Of the whole run; examples in tuning."""
        return self.steps * self.batch_size

    @property
    def schedule(self) -> Schedule:
        """The share of code over the run."""
        if self.mix_phases is not None:
            return phases(self.mix_phases, self.rows, self.batch_size)
        return constant(self.code_rate or 0.0)


def expand(study: Study) -> tuple[list[Arm], list[str]]:
    """The arms of a study, each after the arm from which it starts.

    An arm that would be trained exactly like an earlier arm, such as the point 0.0 of a sweep beside NL, is merged into
    it.

    Returns:
      The arms, and a line for each arm that was merged into another.

    Raises:
      ValueError: with a one-line message, for an invalid arm.
    """
    given = dict(study.arms) | dict(study.more_arms)
    if not given:
        raise ValueError("ARMS is empty: list an arm, such as {'NL': {'CODE_RATE': 0.0}}.")
    for name, facts in given.items():
        _require_arm(name, facts, given, study.stage_names)
    arms: dict[str, Arm] = {}
    families: dict[str, list[tuple[str, str]]] = {}  # by name, the suffixes of its arms and the arms
    points: dict[str, list[tuple[str, str]]] = {}  # likewise for one point of a sweep, by its full name
    told: list[str] = []
    waiting = dict(given)
    while waiting:
        starts = {name: _start(facts, given) for name, facts in waiting.items()}
        ready = [name for name, (start, _) in starts.items()
                 if start in families or start in points or not _of_the_study(start, given)]
        if not ready:
            if strange := next((name for name, (start, _) in starts.items() if start not in given), None):
                raise ValueError(_no_arm(strange, starts[strange][0], dict.fromkeys([*given, *points])))
            raise ValueError(f"ARMS has a cycle: {', '.join(waiting)} start from each other.")
        for name in ready:
            facts = waiting.pop(name)
            families[name] = []
            start, at = starts[name]
            parents = families.get(str(start)) or points.get(str(start)) or [("", "")]
            for suffix, arm in _members(name, dict(facts) | {"from": start, "at": at}, parents, arms):
                same = next((other.name for other in arms.values() if other[1:] == arm[1:]), None)
                if same:
                    told.append(f"{arm.name} equals {same}, which is trained once.")
                elif arm.name in arms:
                    raise ValueError(f"ARMS has two arms named {arm.name}: rename one.")
                else:
                    arms[arm.name] = arm
                families[name].append((suffix, same or arm.name))
                points[arm.name] = [("", same or arm.name)]
    # In the order listed, except that each arm follows the arm from which it starts.
    listed = [member for name in given for _, member in families[name]]
    ordered: dict[str, Arm] = {}
    for name in listed:
        for ancestor in reversed(_line_of(name, arms)):
            ordered.setdefault(ancestor, arms[ancestor])
    return list(ordered.values()), told


def _line_of(name: str, arms: Mapping[str, Arm]) -> list[str]:
    """An arm, the arm from which it starts, that arm's start, and so on."""
    line = [name]
    while parent := arms[line[-1]].parent:
        line.append(parent)
    return line


def _require_arm(name: str, facts: Any, given: Mapping[str, Any], stages: Sequence[str]) -> None:
    if not re.fullmatch(r"\w[\w.-]*", name) or ".seed" in name:
        raise ValueError(f"ARMS has an arm {name!r}; its name must consist of letters, digits, dots and hyphens, "
                         "because run directories have this name.")
    if not isinstance(facts, Mapping) or not all(isinstance(key, str) for key in facts):
        raise ValueError(f"ARMS must give {name} settings such as {{'CODE_RATE': 0.5}}, found {facts!r}.")
    sweep = facts.get("sweep")
    if own := [key for key in (*facts, *(sweep if isinstance(sweep, Mapping) else ())) if key in OWN]:
        raise ValueError(f"ARMS gives {name} {own[0]}, which the study sets: SEEDS lists seeds, 'from' names the arm "
                         "to start from.")
    start, at = _start(facts, given)
    every_at = [at, *(sweep.get("at", ()) if isinstance(sweep, Mapping) else ())]
    for place in every_at:
        if place is not None and not (isinstance(place, int | float) and not isinstance(place, bool) and place > 0
                                      and (isinstance(place, int) or place < 1)):
            raise ValueError(f"ARMS lets {name} branch at {place!r}, which must be a fraction of the trunk's steps, "
                             "such as 0.5, or a step of it.")
        if place is not None and not _of_the_study(start, given):
            raise ValueError(f"ARMS lets {name} branch at {place!r}, but names no arm of the study in 'from'.")
    if start is not None and not _of_the_study(start, given) and not (isinstance(start, str) and "/" in start):
        raise ValueError(_no_arm(name, start, given))
    if facts.get("stage", STAGES[0]) not in stages:
        raise ValueError(f"ARMS gives {name} the stage {facts['stage']!r}; a stage is {', '.join(stages[:-1])} or "
                         f"{stages[-1]}. STAGES adds others, with the gin files of each.")
    if "sweep" in facts:
        if not isinstance(sweep, Mapping) or not sweep or not all(
                isinstance(values, list | tuple) and values for values in sweep.values()):
            raise ValueError(f"ARMS must give {name} a sweep of settings and their values, such as "
                             f"{{'CODE_RATE': [0.0, 0.25, 0.5]}}, found {sweep!r}.")
    if not isinstance(facts.get("gin_file", ""), str):
        raise ValueError(f"ARMS must give {name} a gin_file that names one file, found {facts['gin_file']!r}.")


def _of_the_study(start: Any, given: Mapping[str, Any]) -> bool:
    """Whether `start` names an arm of the study, or may name one point of a swept arm, such as RATE-0.1."""
    return start in given or isinstance(start, str) and "/" not in start and any(
        start.startswith(f"{name}-") for name in given)


def _no_arm(name: str, start: Any, there: Iterable[str]) -> str:
    return (f"ARMS lets {name} start from {start!r}, which is not an arm; the arms are {', '.join(there)}. A run "
            "directory or published weights are named by a path with a slash, or as hf://ORG/NAME.")


def _start(facts: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[Any, Any]:
    """The start of an arm, and the point at which it branches from it, or None."""
    start, at = facts.get("from"), facts.get("at")
    trunk, mark, place = start.rpartition("@") if isinstance(start, str) else ("", "", "")
    if start in given or not _of_the_study(trunk, given) or not mark:
        return start, at
    try:
        return trunk, int(place) if place.isdigit() else float(place)
    except ValueError:
        return trunk, place


def _members(
    name: str, facts: Mapping[str, Any], parents: Sequence[tuple[str, str]], arms: Mapping[str, Arm]
) -> list[tuple[str, Arm]]:
    """(suffix, arm) for each combination of a point of the arm's own sweep and a member of its start."""
    settings = {key: value for key, value in facts.items() if key not in WORDS}
    start = facts.get("from")
    points: list[tuple[str, dict[str, Any]]] = [("", {})]
    if "sweep" in facts:
        for swept, values in facts["sweep"].items():
            plain = all(re.fullmatch(r"[\w.-]+", str(value)) for value in values)
            points = [(f"{suffix}-{value if plain else number}", point | {swept: value})
                      for suffix, point in points for number, value in enumerate(values)]
    members = []
    for parent_suffix, parent in parents:
        for suffix, point in points:
            both = settings | point
            at = both.pop("at", facts.get("at"))
            gin_file, stage = facts.get("gin_file"), facts.get("stage", "tuning" if start else "pretraining")
            if at is not None:
                trunk = arms[parent]
                gin_file, stage = gin_file or trunk.gin_file, facts.get("stage", trunk.stage)
                if stage == trunk.stage:  # else the stage's settings override the trunk's, and its own override both
                    both = without_mix(trunk.settings, both) | both
            if "MIX_PHASES" in both:
                both = {"CODE_RATE": None} | both
            source = None if parent else start
            members.append((parent_suffix + suffix, Arm(
                f"{name}{parent_suffix}{suffix}", parent or None, gin_file, both, source, stage, at)))
    return members


def without_mix(settings: Mapping[str, Any], above: Iterable[str]) -> dict[str, Any]:
    """The settings without their mix, if a setting in `above` determines the mix."""
    mix = {"CODE_RATE", "MIX_PHASES"}
    return {name: value for name, value in settings.items() if name not in mix or mix.isdisjoint(above)}


def plan_runs(study: Study, arms: Sequence[Arm], asked: Mapping[str, Asked]) -> list[Run]:
    """The runs of a study in an order in which they can be trained: all arms with the first seed, then with the next.

    Args:
      study: the description in the gin file.
      arms: as returned by `expand`.
      asked: by arm name, the length and mix from its settings.

    Raises:
      ValueError: with a one-line message, for an invalid mix, or one that no length makes data-matched.
    """
    planned: dict[str, tuple[Arm, int, str, int | None]] = {}
    for arm in arms:
        of_arm, branch_step = asked[arm.name], None
        try:
            if arm.at is not None and arm.parent:
                trunk = planned[arm.parent][1]
                branch_step = arm.at if isinstance(arm.at, int) else max(1, round(arm.at * trunk))
                if not branch_step <= trunk or not branch_step < of_arm.steps:
                    raise ValueError(f"it branches at step {branch_step} of {arm.parent}, which has {trunk}, and ends "
                                     f"at {of_arm.steps}: TRAIN_STEPS counts the trunk's steps too.")
            if study.comparison == "data-matched":
                if branch_step is not None:
                    raise ValueError("COMPARISON = 'data-matched' requires runs that start at step 0, but this "
                                     "one branches: set its TRAIN_STEPS, and use 'compute-matched'.")
                of_arm = of_arm._replace(steps=data_matched_steps(of_arm))
            planned[arm.name] = arm, of_arm.steps, mix_of(of_arm, of_arm.kind or arm.stage), branch_step
        except ValueError as error:
            raise ValueError(f"{arm.name}: {error}") from None
    return [Run(arm, seed, steps, mix, branch_step) for seed in study.seeds
            for arm, steps, mix, branch_step in planned.values()]


def data_matched_steps(asked: Asked) -> int:
    """The smallest number of steps in which a run of this mix is trained on the text of `asked.steps` steps without
    code.

    For a constant share c of code this is steps / (1 - c), rounded up.

    Raises:
      ValueError: the mix has too little text.
    """
    longer = asked
    while (missing := asked.rows - (longer.rows - longer.schedule.asked(longer.rows))) > 0:
        # A step adds at most one step of text, so the smallest number is never skipped.
        longer = longer._replace(steps=longer.steps + math.ceil(missing / asked.batch_size))
        if longer.steps > 1000 * asked.steps:
            raise ValueError("COMPARISON = 'data-matched' needs text in each arm, but this mix has less than one part "
                             "in a thousand; add some, or use 'compute-matched'.")
    return longer.steps


def mix_of(asked: Asked, stage: str) -> str:
    """The name of the mix: "constant" ("uniform" in tuning with code), "increase", "decrease", or its phases."""
    schedule = asked.schedule
    shares = [share for pair in zip(schedule.shares, schedule.ends, strict=True) for share in pair]
    if not any(schedule.tables):
        if len(set(shares)) == 1:
            return "uniform" if stage == "tuning" and shares[0] else "constant"
        if shares in (sorted(shares), sorted(shares, reverse=True)):
            return "increase" if shares[0] < shares[-1] else "decrease"
    given = asked.mix_phases
    return ", ".join(str(phase) for phase in given) if isinstance(given, list | tuple) else str(given)


def select(runs: Sequence[Run], arms: Sequence[str] = (), seeds: Sequence[int] = ()) -> list[Run]:
    """The runs of these arms and seeds (by default of all), and the runs from which they start.

    An arm is given by its name or by the part before the hyphen: NC selects NC-uniform, NC-increase and NC-decrease.

    Raises:
      ValueError: there is no such arm or seed.
    """
    names = list(dict.fromkeys(run.arm.name for run in runs))
    for arm in arms:
        if not any(_is_named(name, arm) for name in names):
            raise ValueError(f"--arm={arm}: the study has no such arm; it has {', '.join(names)}.")
    known = {run.seed: str(run.seed) for run in runs}
    for seed in seeds:
        if seed not in known:
            raise ValueError(f"--seed={seed}: the study has no such seed; SEEDS lists {', '.join(known.values())}.")
    by_name = {run.name: run for run in runs}
    wanted: set[str] = set()
    for run in runs:
        if (not arms or any(_is_named(run.arm.name, arm) for arm in arms)) and (not seeds or run.seed in seeds):
            name: str | None = run.name
            while name:
                wanted.add(name)
                name = by_name[name].parent
    return [run for run in runs if run.name in wanted]


def _is_named(name: str, asked: str) -> bool:
    return name == asked or name.startswith(f"{asked}-")


def waves(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs in groups: runs of one group may be trained concurrently, once the groups before are done."""
    depth: dict[str, int] = {}
    for run in runs:
        depth[run.name] = depth[run.parent] + 1 if run.parent in depth else 0
    return [[run for run in runs if depth[run.name] == level] for level in sorted(set(depth.values()))]


def other_arm(gin_files: Sequence[str], overrides: Sequence[tuple[str, str]], stage: str) -> list[str]:
    """The flags of the same run at the opposite end of the study's question: without or with code; late or early."""
    files = [OTHER_FILES.get(file, file) for file in gin_files]
    kept = [(name, value) for name, value in overrides if name not in ("MODEL_DIR", "CODE_RATE", "MIX_PHASES")]
    if "gin/continue_pretrain.gin" in files:
        kept += [("CODE_RATE", "0.0"), ("MODEL_DIR", "runs/continue_pretrain_text")]
    elif files == list(gin_files):
        files = ["gin/tune_text.gin" if stage == "tuning" else "gin/text_pretrain.gin"]
    return [*(f"--gin_file={file}" for file in files), *(f"--gin.{name}={value}" for name, value in kept)]
