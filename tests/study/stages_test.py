"""Stages of a study by name: which settings hold for their runs, and which slips are told."""

import pytest

from codellm_jax import cli
from codellm_jax.configuration import build, read_configuration
from codellm_jax.study.planned import plan_as_json, planned_runs

TRUNK = {"TRUNK": {"CODE_RATE": 0.0, "LEARNING_RATE": 2e-3}}


def planned(arms, *settings):
    """The runs of a study by arm."""
    configuration = read_configuration(["gin/study.gin"], [("ARMS", str(arms)), ("SEEDS", "[0]"), *settings])
    study = build(configuration, "study")
    runs, _ = planned_runs(study, configuration, [])
    return {one.run.arm.name: one for one in runs}, plan_as_json(study, configuration, [], runs)


def resolved(one, *names):
    return [one.training.resolved(name) for name in names]


def test_a_branch_has_its_trunks_settings_below_those_of_its_stage_and_its_own_above():
    runs, plan = planned(
        TRUNK | {"MID": {"from": "TRUNK@0.5", "stage": "midtraining", "CODE_RATE": 0.3},
                 "COOL": {"from": "MID@50", "stage": "cooldown", "TRAIN_STEPS": 70},
                 "OWN": {"from": "TRUNK@0.5", "stage": "midtraining", "CODE_RATE": 0.3, "LEARNING_RATE": 7e-4}},
        ("midtraining/LEARNING_RATE", "5e-4"), ("midtraining/BATCH_SIZE", "4"), ("pretraining/DROPOUT_RATE", "0.1"),
        ("LOG_PERIOD", "7"), ("cooldown/train.learning_rate", "@warmup_linear()"),
        ("cooldown/warmup_linear.begin_step", "%BRANCH_STEP"), ("cooldown/warmup_linear.warmup_steps", "0"))
    names = ("train.batch_size", "warmup_cosine.peak", "model.dropout_rate", "train.log_period", "train.train_steps",
             "mixture.code_rate")
    assert {name: resolved(one, *names) for name, one in runs.items()} == {
        "TRUNK": ["8", "0.002", "0.1", "7", "60", "0.0"], "MID": ["4", "0.0005", "0.1", "7", "60", "0.3"],
        "COOL": ["4", "0.0005", "0.1", "7", "70", "0.3"], "OWN": ["4", "0.0007", "0.1", "7", "60", "0.3"]}
    assert resolved(runs["COOL"], "train.learning_rate", "warmup_linear.begin_step") == ["@warmup_linear()", "50"]
    assert resolved(runs["MID"], "train.learning_rate") == ["@warmup_cosine()"]
    assert [(run["arm"], run["stage"], run["kind"], run["from"]) for run in plan["runs"]] == [
        ("TRUNK", "pretraining", "pretraining", None), ("MID", "midtraining", "pretraining", "TRUNK.seed0@30"),
        ("COOL", "cooldown", "pretraining", "MID.seed0@50"), ("OWN", "midtraining", "pretraining", "TRUNK.seed0@30")]
    assert plan["common"]["midtraining"]["settings"]["LEARNING_RATE"] == "0.0005"


def test_a_mix_of_the_stage_takes_the_place_of_the_trunks_and_an_arms_that_of_the_stage():
    runs, _ = planned(TRUNK | {"MID": {"from": "TRUNK@0.5", "stage": "midtraining"},
                               "RATE": {"from": "TRUNK@0.5", "stage": "midtraining", "CODE_RATE": 0.2}},
                      ("midtraining/MIX_PHASES", "['5:5', '7:3']"))
    assert resolved(runs["MID"], "mixture.code_rate", "mixture.mix_phases") == ["None", "['5:5', '7:3']"]
    assert resolved(runs["RATE"], "mixture.code_rate", "mixture.mix_phases") == ["0.2", "None"]
    assert (runs["MID"].run.mix, runs["RATE"].run.mix) == ("decrease", "constant")


def test_a_stage_that_begins_with_pretrainings_files_has_its_settings_too():
    runs, _ = planned(TRUNK | {"MORE": {"from": "TRUNK", "stage": "continue", "CODE_RATE": 0.5}},
                      ("continue/BATCH_SIZE", "4"))
    # No branch: the trunk's own learning rate is not its.
    assert resolved(runs["MORE"], "train.train_steps", "train.batch_size", "warmup_cosine.peak") == ["60", "4", "0.001"]


def test_files_of_a_stage_are_above_what_the_trunk_had_where_they_say_otherwise(tmp_path):
    file = tmp_path / "mid.gin"
    file.write_text("include 'gin/pretrain.gin'\ninclude 'gin/models/tiny.gin'\nLEARNING_RATE = 3e-4\n")
    runs, _ = planned(TRUNK | {"MID": {"from": "TRUNK@0.5", "stage": "annealing", "CODE_RATE": 0.3}},
                      ("STAGES", str({"annealing": [str(file)]})))
    assert resolved(runs["MID"], "warmup_cosine.peak", "train.train_steps") == ["0.0003", "60"]


def test_what_goes_on_from_another_size_is_of_that_size():
    runs, _ = planned({"WIDE": {"gin_file": "gin/models/125m.gin", "CODE_RATE": 0.5},
                       "MORE": {"from": "WIDE", "stage": "continue", "CODE_RATE": 0.1},
                       "MID": {"from": "WIDE@0.5", "stage": "midtraining", "CODE_RATE": 0.1}})
    for name in ("MORE", "MID"):
        assert resolved(runs[name], "model.layers", "model.hidden", "mixture.lengths") == [
            "12", "768", "{'targets': 1024}"], name


def test_a_stage_of_instructions_by_another_name_is_tuned():
    runs, plan = planned(TRUNK | {"ASKED": {"from": "TRUNK", "stage": "alignment", "CODE_RATE": 0.5}},
                         ("STAGES", "{'alignment': ['gin/tune.gin']}"), ("alignment/TRAIN_STEPS", "5"))
    assert runs["ASKED"].kind == "tuning" and runs["ASKED"].run.mix == "uniform"
    # tuning's settings in gin/study.gin hold, as it begins with the same files
    assert resolved(runs["ASKED"], "train.batch_size", "train.train_steps") == ["8", "5"]
    assert plan["runs"][1]["stage"] == "alignment" and plan["runs"][1]["kind"] == "tuning"


@pytest.mark.parametrize(("arguments", "message"), [
    (["--gin.coldown/BATCH_SIZE=4"], "coldown/BATCH_SIZE does not name a stage of the study; the stages are "
                                     "pretraining, tuning, continue, midtraining, cooldown, evaluation"),
    (["--gin.ARMS={'A': {'CODE_RATE': 0.0}, 'B': {'from': 'A@0.5', 'stage': 'tuning', 'CODE_RATE': 0.0}}"],
     "B: its stage, tuning, is tuning, but a branch must be of the same kind as its trunk, pretraining"),
    (["--gin.ARMS={'A': {'stage': 'annealing'}}"], "A the stage 'annealing'; a stage is pretraining, tuning, continue, "
                                                   "midtraining or cooldown"),
    (["--gin.STAGES={'annealing': ['gin/none.gin']}", "--gin.ARMS={'A': {'stage': 'annealing', 'CODE_RATE': 0.0}}"],
     "No gin file gin/none.gin"),
])
def test_slips_get_one_line(arguments, message, capsys):
    assert cli.main(["study", "--gin_file=gin/study.gin", *arguments, "--print_commands"]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0], lines


@pytest.mark.parametrize(("name", "lines"), [
    ("midtraining/BATCH_SIZE", ["midtraining/BATCH_SIZE = 4", "  set by --gin.midtraining/BATCH_SIZE"]),
    ("continue/TRAIN_STEPS", ["continue/TRAIN_STEPS = 60", "  set by gin/study.gin:", "  overriding 400"]),
    ("PACKING", ["tuning/PACKING = True"]),
])
def test_explain_answers_of_named_stages(capsys, name, lines):
    assert cli.main(["explain", name, "--gin_file=gin/study.gin", "--gin.midtraining/BATCH_SIZE=4"]) == 0
    printed = capsys.readouterr().out.splitlines()
    for line, start in zip(printed, lines, strict=False):
        assert line.startswith(start), printed


def test_explain_names_the_stages_there_are(capsys):
    assert cli.main(["explain", "mid/BATCH_SIZE", "--gin_file=gin/study.gin"]) == 1
    assert "mid is not a stage of the study; the stages are pretraining, tuning, continue" in capsys.readouterr().err


@pytest.mark.parametrize(("design", "stages"), [
    ("competitive_additive", {"pretraining"}), ("cooldown", {"pretraining", "continue", "cooldown"}),
    ("midtraining", {"pretraining", "continue", "midtraining", "tuning"}),
    ("kinds_of_code", {"pretraining", "continue"}), ("tuning_published", {"pretraining", "tuning"})])
def test_the_shipped_designs_are_planned(design, stages):
    configuration = read_configuration(["gin/study.gin", f"gin/studies/{design}.gin"], [])
    runs, _ = planned_runs(build(configuration, "study"), configuration, [])
    assert {one.run.arm.stage for one in runs} == stages


def test_a_cooldown_falls_from_where_it_branches():
    configuration = read_configuration(["gin/study.gin", "gin/studies/cooldown.gin"], [])
    runs, _ = planned_runs(build(configuration, "study"), configuration, [])
    cool = next(one for one in runs if one.run.arm.name == "COOL-0.2")
    rate = build(cool.training, "warmup_linear")
    assert cool.run.branch_step == 120 and cool.run.steps == 135
    # From the peak of 1e-3 at the branch in a straight line to zero at the end.
    assert [float(rate(step)) for step in (120, 123, 135)] == pytest.approx([1e-3, 0.8e-3, 0.0], abs=1e-9)
