"""The plan of a study: what arms mean, in which order they can be trained, and how long they are."""

from fractions import Fraction

import pytest

from codellm_jax.mixture.order import Order, Source
from codellm_jax.study.arms import Asked, Study, data_matched_steps, expand, mix_of, plan_runs, select, waves

FILES = {"pretraining_files": ["p.gin"], "tuning_files": ["t.gin"], "evaluation_files": ["e.gin"]}
PAPER = {
    "NN": {"from": "NL", "CODE_RATE": 0.0},
    "NL": {"CODE_RATE": 0.0},
    "NC-uniform": {"from": "NL", "CODE_RATE": 0.375},
    "NC-decrease": {"from": "NL", "MIX_PHASES": ["5:5", "6:4", "7:3", "7:3"]},
    "CODE": {"CODE_RATE": 0.25},
    "CN": {"from": "CODE", "CODE_RATE": 0.0},
}


def make_study(arms, **others):
    return Study(directory="d", arms=arms, **FILES, **others)


def runs_of(study, steps=100, batch_size=8):
    arms, _ = expand(study)
    return plan_runs(study, arms, {arm.name: Asked(
        arm.settings.get("TRAIN_STEPS", steps), batch_size, arm.settings.get("CODE_RATE"),
        arm.settings.get("MIX_PHASES")) for arm in arms})


def names(runs):
    return [run.name for run in runs]


def test_each_run_comes_after_what_it_starts_from_and_a_shared_one_comes_once():
    runs = runs_of(make_study(PAPER, seeds=[3, 1]))
    assert names(runs) == [f"{arm}.seed{seed}" for seed in (3, 1)
                           for arm in ("NL", "NN", "NC-uniform", "NC-decrease", "CODE", "CN")]
    by_name = {run.name: run for run in runs}
    assert {run.parent for run in runs if run.arm.name.startswith("N") and run.arm.parent} == {"NL.seed3", "NL.seed1"}
    assert by_name["CN.seed1"].parent == "CODE.seed1" and by_name["CODE.seed1"].parent is None
    assert [[run.name for run in wave] for wave in waves(runs[:6])] == [
        ["NL.seed3", "CODE.seed3"], ["NN.seed3", "NC-uniform.seed3", "NC-decrease.seed3", "CN.seed3"]]
    assert [run.mix for run in runs[:6]] == ["constant", "constant", "uniform", "decrease", "constant", "constant"]
    # Without CODE_RATE: the stage's own would be told beside the phases.
    assert by_name["NC-decrease.seed3"].arm.settings == {"CODE_RATE": None, "MIX_PHASES": ["5:5", "6:4", "7:3", "7:3"]}


def test_three_stages_in_a_row():
    runs = runs_of(make_study({"A": {"CODE_RATE": 0.0}, "B": {"from": "A"}, "C": {"from": "B"}}))
    assert [names(wave) for wave in waves(runs)] == [["A.seed0"], ["B.seed0"], ["C.seed0"]]
    assert names(select(runs, ["C"])) == ["A.seed0", "B.seed0", "C.seed0"]


def test_arms_start_from_runs_and_published_weights():
    arms, _ = expand(make_study({
        "QN": {"from": "hf://ORG/NAME", "CODE_RATE": 0.0},
        "MORE": {"from": "runs/qwen", "stage": "pretraining", "sweep": {"CODE_RATE": [0.1, 0.5]}},
        "MN": {"from": "MORE", "CODE_RATE": 0.0}}))
    assert [(arm.name, arm.parent, arm.source, arm.stage) for arm in arms] == [
        ("QN", None, "hf://ORG/NAME", "tuning"), ("MORE-0.1", None, "runs/qwen", "pretraining"),
        ("MORE-0.5", None, "runs/qwen", "pretraining"), ("MN-0.1", "MORE-0.1", None, "tuning"),
        ("MN-0.5", "MORE-0.5", None, "tuning")]
    # The same rate from another start is another arm.
    assert len(expand(make_study({"A": {"from": "a/b"}, "B": {"from": "a/c"}}))[0]) == 2
    with pytest.raises(ValueError, match="named by a path with a slash"):
        expand(make_study({"A": {"from": "qwen", "CODE_RATE": 0.0}}))
    with pytest.raises(ValueError, match="'cooldown'; a stage is pretraining or tuning. STAGES adds others"):
        expand(make_study({"A": {"stage": "cooldown", "CODE_RATE": 0.0}}))


def test_a_sweep_and_what_is_tuned_from_it():
    sweep = {"NL": {"CODE_RATE": 0}, "R": {"sweep": {"CODE_RATE": [0.0, 0.1, 0.5]}, "LEARNING_RATE": 1e-4},
             "RATE": {"sweep": {"CODE_RATE": [0.0, 0.1]}}, "RN": {"from": "RATE", "CODE_RATE": 0.0},
             "LR": {"from": "NL", "sweep": {"LEARNING_RATE": [1e-4, 2e-4]}, "CODE_RATE": 0.5},
             "M": {"sweep": {"MIX_PHASES": [["5:5", "7:3"], ["7:3", "5:5"]]}}}
    arms, told = expand(make_study(sweep))
    assert [arm.name for arm in arms] == [
        "NL", "R-0.0", "R-0.1", "R-0.5", "RATE-0.1", "RN-0.0", "RN-0.1", "LR-0.0001", "LR-0.0002", "M-0", "M-1"]
    # What would be trained just as NL is NL; what is tuned from it is tuned from NL.
    assert told == ["RATE-0.0 equals NL, which is trained once."]
    by_name = {arm.name: arm for arm in arms}
    assert by_name["RN-0.0"].parent == "NL" and by_name["RN-0.1"].parent == "RATE-0.1"
    assert by_name["R-0.5"].settings == {"CODE_RATE": 0.5, "LEARNING_RATE": 1e-4}
    assert by_name["M-1"].settings == {"CODE_RATE": None, "MIX_PHASES": ["7:3", "5:5"]}
    assert names(select(runs_of(make_study(sweep)), ["RN"])) == ["NL.seed0", "RATE-0.1.seed0", "RN-0.0.seed0",
                                                                "RN-0.1.seed0"]


def test_more_arms_come_after_or_in_the_place_of_others():
    study = make_study(PAPER, more_arms={"CN": {"from": "CODE", "CODE_RATE": 0.1}, "XX": {"from": "CN"}})
    arms, _ = expand(study)
    assert [arm.name for arm in arms][-2:] == ["CN", "XX"] and arms[-2].settings == {"CODE_RATE": 0.1}


def test_an_arm_starts_from_one_point_of_a_sweep():
    sweep = {"NL": {"CODE_RATE": 0.0}, "TUNED": {"from": "RATE-0.5", "CODE_RATE": 0.0},
             "FIRST": {"from": "RATE-0.0"}, "MID": {"from": "RATE-0.5@0.5", "sweep": {"CODE_RATE": [0.1, 0.2]}},
             "LATE": {"from": "MID-0.1", "at": 0.8}, "RATE": {"sweep": {"CODE_RATE": [0.0, 0.5]}}}
    arms, told = expand(make_study(sweep))
    assert [(arm.name, arm.parent, arm.at) for arm in arms] == [
        ("NL", None, None), ("RATE-0.5", None, None), ("TUNED", "RATE-0.5", None), ("FIRST", "NL", None),
        ("MID-0.1", "RATE-0.5", 0.5), ("MID-0.2", "RATE-0.5", 0.5), ("LATE", "MID-0.1", 0.8)]
    assert told == ["RATE-0.0 equals NL, which is trained once."]
    with pytest.raises(ValueError, match="TUNED start from 'RATE-0.4', which is not an arm; the arms are NL, .*0.5"):
        expand(make_study(sweep | {"TUNED": {"from": "RATE-0.4"}}))


def test_select_takes_what_it_stands_on():
    runs = runs_of(make_study(PAPER, seeds=[0, 1]))
    assert names(select(runs, ["NC-uniform"], [1])) == ["NL.seed1", "NC-uniform.seed1"]
    assert names(select(runs, ["NC"], [1])) == ["NL.seed1", "NC-uniform.seed1", "NC-decrease.seed1"]
    assert names(select(runs, ["CODE", "CN"], [0])) == ["CODE.seed0", "CN.seed0"]
    assert select(runs) == runs
    with pytest.raises(ValueError, match="--arm=NX: the study has no such arm; it has NL, NN"):
        select(runs, ["NX"])
    with pytest.raises(ValueError, match="--seed=7: the study has no such seed; SEEDS lists 0, 1"):
        select(runs, [], [7])


@pytest.mark.parametrize("arms, message", [
    ({}, "ARMS is empty"),
    ({"A": {"from": "B"}, "B": {"from": "A"}}, "ARMS has a cycle: A, B"),
    ({"A": {"from": "NL"}}, "lets A start from 'NL', which is not an arm"),
    ({"a/b": {}}, "has an arm 'a/b'; its name must consist of letters"),
    ({"A": 0.5}, "must give A settings such as"),
    ({"A": {"SEED": 1}}, "gives A SEED, which the study sets"),
    ({"A": {"sweep": {"CODE_RATE": 0.5}}}, "must give A a sweep of settings and their values"),
    ({"A": {"sweep": {"CODE_RATE": [0], "SEED": [1]}}}, "ARMS gives A SEED, which the study sets"),
    ({"A": {"gin_file": ["a.gin"]}}, "must give A a gin_file that names one file"),
    ({"A-0.5": {"LEARNING_RATE": 1.0}, "A": {"sweep": {"CODE_RATE": [0.5]}}}, "two arms named A-0.5"),
    ({"A": {"MIX_PHASES": ["lots"]}}, "A: MIX_PHASES must list"),
])
def test_slips_get_one_line(arms, message):
    with pytest.raises(ValueError, match=message):
        runs_of(make_study(arms))


@pytest.mark.parametrize("others, message", [
    ({"seeds": [1, 1]}, "SEEDS must list different whole numbers"), ({"seeds": []}, "SEEDS must list"),
    ({"comparison": "fair"}, "COMPARISON must be one of compute-matched, data-matched")])
def test_a_study_is_checked(others, message):
    with pytest.raises(ValueError, match=message):
        make_study(PAPER, **others)


@pytest.mark.parametrize("rate, steps", [(0.0, 100), (0.1, 112), (0.25, 134), (1 / 3, 150), (0.375, 160), (0.5, 200),
                                         (0.9, 1000)])
def test_data_matched_is_text_in_full_and_code_on_top(rate, steps):
    """steps / (1 - rate), rounded up: 100 / 0.9 = 111.1, 100 / 0.75 = 133.3."""
    assert data_matched_steps(Asked(100, 8, rate, None)) == steps


@pytest.mark.parametrize("mix", [
    ["5:5", "6:4", "7:3", "7:3"], ["7:3 to 1:9"], {0: "1:1", 30: "3:1"}, {0: "1:0", 0.9: "1:4"},
    [{"text.a": 3, "code.b": 1}, {"text.a": 1, "code.b": 1}]])
def test_data_matched_under_a_schedule_is_the_shortest_run_that_has_the_text(mix):
    """Against the order itself, drawn row by row."""
    asked = Asked(60, 8, None, mix)
    steps = data_matched_steps(asked)
    sources = (Source("text.a", 50, Fraction(1), "x"), Source("code.b", 50, Fraction(1), "y"))

    def text_rows(steps: int) -> float:
        longer = asked._replace(steps=steps)
        return Order(0, longer.schedule, sources).counts(longer.rows)[0]

    assert abs(text_rows(steps) - 60 * 8) <= 8  # equal to a step
    assert text_rows(steps) >= 60 * 8 - 0.5 and all(text_rows(fewer) < 60 * 8 for fewer in range(60, steps))


def test_a_mix_without_text_cannot_be_data_matched():
    with pytest.raises(ValueError, match="A: COMPARISON = 'data-matched' needs text in each arm"):
        runs_of(make_study({"A": {"CODE_RATE": 1.0}}, comparison="data-matched"))


def test_compute_matched_arms_are_equally_long_and_data_matched_ones_have_the_same_text():
    for comparison in ("compute-matched", "data-matched"):
        for run in runs_of(make_study(PAPER, comparison=comparison)):
            settings = run.arm.settings
            asked = Asked(run.steps, 8, settings.get("CODE_RATE"), settings.get("MIX_PHASES"))
            text = asked.rows - asked.schedule.asked(asked.rows)
            assert run.steps == 100 if comparison == "compute-matched" else 0 <= text - 800 < 8, run.name


@pytest.mark.parametrize("mix, name", [
    (["7:3", "7:3", "6:4", "5:5"], "increase"), (["5:5", "6:4", "7:3", "7:3"], "decrease"), (["5:3"], "uniform"),
    (["5:5 to 7:3"], "decrease"), (["7:3", "5:5", "7:3"], "7:3, 5:5, 7:3"), ({0: "7:3", 0.9: "0:1"}, "increase")])
def test_names_of_mixes(mix, name):
    assert mix_of(Asked(100, 8, None, mix), "tuning") == name
    assert mix_of(Asked(100, 8, 0.3, None), "pretraining") == "constant"


def test_arms_branch_from_steps_of_their_trunk():
    """A crossed sweep of where and how much; what a branch does not set is its trunk's."""
    study = make_study({
        "TRUNK": {"CODE_RATE": 0.0, "TRAIN_STEPS": 200, "LEARNING_RATE": 1e-3, "gin_file": "gin/models/125m.gin"},
        "MID": {"from": "TRUNK@0.5", "CODE_RATE": 0.3},
        "GRID": {"from": "TRUNK", "sweep": {"at": [0.1, 150], "CODE_RATE": [0.1, 0.8]}},
        "COOL": {"from": "MID@180", "MIX_PHASES": ["1:1"], "TRAIN_STEPS": 220},
        "TUNED": {"from": "GRID", "CODE_RATE": 0.5}})
    runs = {run.arm.name: run for run in runs_of(study)}
    assert list(runs) == ["TRUNK", "MID", "GRID-0.1-0.1", "GRID-0.1-0.8", "GRID-150-0.1", "GRID-150-0.8", "COOL",
                          "TUNED-0.1-0.1", "TUNED-0.1-0.8", "TUNED-150-0.1", "TUNED-150-0.8"]
    assert {name: run.branch_step for name, run in runs.items() if run.branch_step} == {
        "MID": 100, "GRID-0.1-0.1": 20, "GRID-0.1-0.8": 20, "GRID-150-0.1": 150, "GRID-150-0.8": 150, "COOL": 180}
    assert runs["MID"].start == "TRUNK.seed0@100" and runs["MID"].parent == "TRUNK.seed0"
    assert runs["MID"].arm.settings == {"TRAIN_STEPS": 200, "LEARNING_RATE": 1e-3, "CODE_RATE": 0.3}
    assert runs["COOL"].arm.settings == {"CODE_RATE": None, "MIX_PHASES": ["1:1"], "TRAIN_STEPS": 220,
                                         "LEARNING_RATE": 1e-3}
    assert {run.arm.gin_file for run in runs.values() if run.branch_step} == {"gin/models/125m.gin"}
    assert {run.arm.stage for run in runs.values() if run.branch_step} == {"pretraining"}
    assert [len(wave) for wave in waves(list(runs.values()))] == [1, 5, 5]
    assert names(select(list(runs.values()), ["COOL"])) == ["TRUNK.seed0", "MID.seed0", "COOL.seed0"]


def test_a_branch_of_another_stage_has_the_settings_of_its_own_alone():
    """The trunk's are below those of the stage, which the arms do not know (see stages_test)."""
    stages = {"midtraining": ["m.gin"], "cooldown": ["p.gin"]}
    study = make_study({
        "TRUNK": {"CODE_RATE": 0.0, "LEARNING_RATE": 1e-3, "gin_file": "gin/models/125m.gin"},
        "MID": {"from": "TRUNK@0.5", "stage": "midtraining", "CODE_RATE": 0.3},
        "SAME": {"from": "MID@0.7", "MIX_PHASES": ["1:1"]},
        "COOL": {"from": "MID@0.9", "stage": "cooldown"},
        "LATER": {"from": "TRUNK", "stage": "midtraining", "CODE_RATE": 0.3}}, stages=stages)
    arms = {arm.name: arm for arm in expand(study)[0]}
    assert {name: (arm.stage, arm.settings) for name, arm in arms.items() if name != "TRUNK"} == {
        "MID": ("midtraining", {"CODE_RATE": 0.3}), "SAME": ("midtraining", {"CODE_RATE": None, "MIX_PHASES": ["1:1"]}),
        "COOL": ("cooldown", {}), "LATER": ("midtraining", {"CODE_RATE": 0.3})}
    assert {name for name, arm in arms.items() if arm.gin_file} == {"TRUNK", "MID", "SAME", "COOL"}
    assert study.files("midtraining") == ["m.gin"]
    with pytest.raises(ValueError, match="'annealing'; a stage is pretraining, tuning, midtraining or cooldown"):
        expand(make_study({"A": {"stage": "annealing"}}, stages=stages))


@pytest.mark.parametrize(("stages", "message"), [
    ({"tuning": ["t.gin"]}, "'tuning'; its name must be a word other than"), ({"mid-training": ["t.gin"]}, "'mid-tr"),
    ({"midtraining": []}, "must list the gin files of midtraining"), ({"m": "p.gin"}, "must list the gin files of m")])
def test_stages_that_are_none(stages, message):
    with pytest.raises(ValueError, match=message):
        make_study(PAPER, stages=stages)


@pytest.mark.parametrize(("arms", "message"), [
    ({"A": {"CODE_RATE": 0.0}, "B": {"from": "A@1.5"}}, "branch at 1.5, which must be a fraction"),
    ({"A": {"CODE_RATE": 0.0}, "B": {"from": "A@0"}}, "branch at 0, which must be"),
    ({"A": {"CODE_RATE": 0.0}, "B": {"from": "A@half"}}, "branch at 'half'"),
    ({"B": {"at": 0.5, "CODE_RATE": 0.0}}, "names no arm of the study in 'from'"),
    ({"A": {"CODE_RATE": 0.0}, "B": {"from": "A@100"}}, "B: it branches at step 100 of A, which has 100, and ends at"),
    ({"A": {"CODE_RATE": 0.0}, "B": {"from": "A@101", "TRAIN_STEPS": 500}}, "at step 101 of A, which has 100"),
])
def test_branches_that_are_none(arms, message):
    with pytest.raises(ValueError, match=message):
        runs_of(make_study(arms))


def test_the_other_arm_of_continued_pre_training_starts_from_the_same():
    from codellm_jax.study.arms import other_arm

    assert other_arm(["gin/continue_pretrain.gin"], [("INITIAL_CHECKPOINT_PATH", "a/b"), ("CODE_RATE", "0.5")],
                     "pretraining") == [
        "--gin_file=gin/continue_pretrain.gin", "--gin.INITIAL_CHECKPOINT_PATH=a/b", "--gin.CODE_RATE=0.0",
        "--gin.MODEL_DIR=runs/continue_pretrain_text"]
