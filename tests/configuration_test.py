"""gin files and flags: what wins, where it came from, and what a slip is answered with."""

import ast
from fractions import Fraction
from pathlib import Path

import jax
import pytest

from codellm_jax.configuration import (
    as_gin_value,
    build,
    explain,
    operative,
    read_configuration,
    shipped_gin_files,
)
from codellm_jax.mixture.schedules import phases
from codellm_jax.model.decoder import Decoder, parameter_count
from codellm_jax.runtime.partitioning import make_mesh
from codellm_jax.runtime.state import abstract_state
from codellm_jax.study.planned import planned_runs
from codellm_jax.training.plan import Training

MIXED = "gin/mixed_pretrain.gin"


@pytest.mark.parametrize("text, value", [
    ("runs/first", "'runs/first'"), ("0.5", "0.5"), ("None", "None"), ("5:3", "'5:3'"), ("True", "True"),
    ("python_8k", "'python_8k'"), ("'quoted'", "'quoted'"), ("['5:5', '6:4']", "['5:5', '6:4']"), ("@chain", "@chain"),
    ("%SEED", "%SEED"), ("gs://bucket/run", "'gs://bucket/run'"), ("a b", "'a b'"), ("", "''"),
    ("{'text.a': {'python': 'text'}}", "{'text.a': {'python': 'text'}}"), ("1e-4", "0.0001"), ("a = 1", "'a = 1'"),
    ("2024-01-01", "'2024-01-01'"), ("~/runs", "'~/runs'"), ("it's", '"it\'s"')])
def test_a_bare_word_is_a_string(text, value):
    assert as_gin_value(text) == value


def test_half_a_list_is_refused():
    with pytest.raises(ValueError, match="is incomplete"):
        as_gin_value("['5:5', ")


def arms_and_sizes() -> list[list[str]]:
    names = list(shipped_gin_files())
    others = ("gin/pretrain.gin", "gin/tune.gin", "gin/eval.gin", "gin/infer.gin", "gin/contamination.gin",
              "gin/study.gin", "gin/prepare.gin")
    arms = [name for name in names if "/models/" not in name and "/studies/" not in name and name not in others]
    sizes = [name for name in names if "/models/" in name]
    assert len(arms) >= 8 and len(sizes) >= 6
    return [[arm] for arm in arms] + [[MIXED, size] for size in sizes]


# What starts from a run takes these over from the run it starts from; here from nothing, at the tiny size.
FROM_NEW_PARAMETERS = [("INITIAL_CHECKPOINT_PATH", "None"), ("VOCABULARY", "python_8k"),
                       ("TASK_FEATURE_LENGTHS", "{'targets': 256}"), ("model.layers", "4"), ("model.hidden", "256"),
                       ("model.heads", "4"), ("model.feedforward", "1024")]


@pytest.mark.parametrize("files", arms_and_sizes(), ids=lambda files: files[-1])
def test_every_shipped_file_loads_and_builds(files):
    tuning = "tune" in files[0]
    starts = tuning or "continue" in files[0]
    configuration = read_configuration(files, FROM_NEW_PARAMETERS if starts else [])
    training = build(configuration, "train")
    assert isinstance(training, Training)
    assert training.mixture.stage == ("tuning" if tuning else "pretraining")
    config = training.model(vocabulary_size=training.vocabulary.size, length=training.mixture.length)
    mesh = make_mesh(training.mesh)
    state = abstract_state(Decoder(config), training.optimizer(training.learning_rate), mesh, training.mesh)
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) == parameter_count(config)
    for name in files:
        text = (Path(__file__).resolve().parent.parent / name).read_text()
        # Each opens with what it is, and its command.
        assert text.startswith("# ") and f"--gin_file={name}" in text, name


@pytest.mark.parametrize("name", [name for name in shipped_gin_files() if "/studies/" in name])
def test_every_shipped_design_plans_its_arms(name):
    """Beside its own arms there are none; each names its paper and its command."""
    configuration = read_configuration(["gin/study.gin", name], [])
    study = build(configuration, "study")
    planned, _ = planned_runs(study, configuration, ())
    assert {one.run.arm.name.split("-")[0] for one in planned} <= {arm.split("-")[0] for arm in study.arms}
    text = (Path(__file__).resolve().parent.parent / name).read_text()
    assert "arXiv:" in text and f"--gin_file={name}" in text and "tiny size" in text or "stand-in" in text


def test_the_shipped_study_has_the_arms_of_their_own_files():
    """gin/study.gin and the files that train one arm by hand say the same of the mix."""
    configuration = read_configuration(["gin/study.gin"], [])
    study = build(configuration, "study")
    files = {"NL": "text_pretrain", "CODE": "mixed_pretrain", "NN": "tune_text", "NC-uniform": "tune_mixed",
             "NC-increase": "tune_increase", "NC-decrease": "tune_decrease", "CN": "tune_text",
             "CC-uniform": "tune_mixed", "CC-increase": "tune_increase", "CC-decrease": "tune_decrease"}
    assert list(study.arms) == list(files)
    for arm, file in files.items():
        tuning = "tune" in file
        alone = read_configuration([f"gin/{file}.gin"], FROM_NEW_PARAMETERS if tuning else []).effective
        facts = study.arms[arm]
        assert facts.get("from") == (("NL" if arm[0] == "N" else "CODE") if tuning else None), arm
        for name in ("CODE_RATE", "MIX_PHASES"):
            assert str(facts.get(name)) == str(ast.literal_eval(alone[name].value)), (arm, name)
    assert (Path(__file__).resolve().parent.parent / "gin/study.gin").read_text().startswith("# ")


def test_settings_of_a_stage_are_kept_apart_and_explained():
    configuration = read_configuration(["gin/study.gin"], [
        ("tuning/BATCH_SIZE", "3"), ("pretraining/model.layers", "2"), ("DATA_DIR", "/data"),
        ("tuning/DATA_DIR", "%DATA_DIR")])
    assert dict(configuration.of_stage("tuning"))["BATCH_SIZE"] == "3"
    assert dict(configuration.of_stage("tuning"))["DATA_DIR"] == "'/data'"  # where the file says %DATA_DIR
    assert "BATCH_SIZE" not in dict(configuration.of_stage("pretraining"))
    lines = explain(configuration, "tuning/BATCH_SIZE").splitlines()
    assert lines[:3] == ["tuning/BATCH_SIZE = 3", "  set by --gin.tuning/BATCH_SIZE", lines[2]]
    assert lines[2].startswith("  overriding 8 of gin/study.gin:")
    assert "used by tuning/DATA_DIR" in explain(configuration, "DATA_DIR")
    with pytest.raises(ValueError, match="model has no parameter 'layer'; nearest: layers"):
        read_configuration(["gin/study.gin"], [("pretraining/model.layer", "2")])


def test_the_two_arms_differ_in_the_rate_alone():
    mixed, text = (read_configuration([f"gin/{arm}_pretrain.gin"], []).effective for arm in ("mixed", "text"))
    differing = {name for name in mixed.keys() | text.keys() if mixed[name].value != text[name].value}
    assert differing == {"CODE_RATE", "MODEL_DIR"}


def test_the_arms_of_tuning_differ_in_the_mix_alone():
    arms = {arm: read_configuration([f"gin/tune_{arm}.gin"], FROM_NEW_PARAMETERS).effective
            for arm in ("text", "mixed", "increase", "decrease")}
    for arm, settings in arms.items():
        differing = {name for name in settings.keys() | arms["text"].keys()
                     if settings[name].value != arms["text"][name].value}
        assert differing <= {"CODE_RATE", "MIX_PHASES", "MODEL_DIR"}, arm
    assert arms["text"]["CODE_RATE"].value == "0.0" and arms["mixed"]["CODE_RATE"].value == "0.375"  # 5:3
    assert arms["increase"]["MIX_PHASES"].value == "['7:3', '7:3', '6:4', '5:5']"  # Table 5
    assert arms["decrease"]["MIX_PHASES"].value == "['5:5', '6:4', '7:3', '7:3']"
    assert arms["text"]["LEARNING_RATE"].value == "2e-05"  # Table 9


@pytest.mark.parametrize("arm", ["mixed_pretrain_increase", "mixed_pretrain_decrease"])
def test_dynamic_pre_training_sees_as_much_code_as_constant(arm):
    mix_phases = ast.literal_eval(read_configuration([f"gin/{arm}.gin"], []).effective["MIX_PHASES"].value)
    assert phases(mix_phases, 3200).asked(3200) == Fraction(3200, 3)


def test_later_files_and_flags_win_and_explain_tells():
    configuration = read_configuration([MIXED, "gin/models/2_6b.gin"], [("BATCH_SIZE", "64")])
    assert configuration.effective["BATCH_SIZE"].value == "64"
    lines = explain(configuration, "BATCH_SIZE").splitlines()
    assert lines[0] == "BATCH_SIZE = 64"
    assert lines[1] == "  set by --gin.BATCH_SIZE"
    assert "512 of gin/models/2_6b.gin:" in lines[2] and "8 of gin/pretrain.gin:" in lines[3]
    assert lines[4] == "  used by train.batch_size"
    assert "where BATCH_SIZE = 64" in explain(configuration, "train.batch_size")
    assert "its default is 'gelu'" in explain(configuration, "model.activation")
    with pytest.raises(ValueError, match="nearest: BATCH_SIZE"):
        explain(configuration, "BATCH_SIZ")


@pytest.mark.parametrize("override, message", [
    (("CODE_RAT", "0.5"), r"--gin.CODE_RAT: nothing uses the setting CODE_RAT; nearest: CODE_RATE"),
    (("train.batchsize", "8"), r"train has no parameter 'batchsize'; nearest: batch_size"),
    (("trian.batch_size", "8"), r"nothing is named 'trian'; nearest: train"),
    (("train.optimizer", "@adam_w"), r"nothing is named 'adam_w'; nearest: adamw"),
    (("train.batch_size", "%BATCH"), r"train.batch_size needs BATCH, which no file or flag sets"),
])
def test_unknown_names_get_the_nearest(override, message):
    with pytest.raises(ValueError, match=message):
        read_configuration([MIXED], [override])


def test_unknown_files_get_the_nearest():
    with pytest.raises(FileNotFoundError, match=r"No gin file gin/mixed_pretain.gin; nearest shipped: gin/mixed"):
        read_configuration(["gin/mixed_pretain.gin"], [])


@pytest.mark.parametrize("line, where", [
    ("CODE_RATE = = 1\n", "line 2"), ("CODE_RATE = [1,\n", "line [23]: .*bracket")])
def test_syntax_errors_name_file_and_line(tmp_path, line, where):
    (tmp_path / "broken.gin").write_text("SEED = 1\n" + line)
    with pytest.raises(ValueError, match=rf"broken\.gin, {where}"):
        read_configuration([str(tmp_path / "broken.gin")], [])


def test_one_level_of_include(tmp_path):
    (tmp_path / "own.gin").write_text(f"include '{MIXED}'\n")
    with pytest.raises(ValueError, match="one level of include"):
        read_configuration([str(tmp_path / "own.gin")], [])


def test_search_paths(tmp_path):
    (tmp_path / "mine.gin").write_text("SEED = 7\n")
    assert read_configuration([MIXED, "mine.gin"], [], [str(tmp_path)]).effective["SEED"].value == "7"


def test_the_written_configuration_loads_again(tmp_path):
    overrides = [("CODE_RATE", "0.25"), ("MODEL_DIR", "runs/a b"), ("MIX_PHASES", "['5:5', '7:3']")]
    configuration = read_configuration([MIXED], overrides)
    training = build(configuration, "train")
    training.model(vocabulary_size=8, length=8)
    training.optimizer(training.learning_rate)
    text, values = operative(configuration)
    (tmp_path / "config.gin").write_text(text)
    again = read_configuration([str(tmp_path / "config.gin")], [])
    rebuilt = build(again, "train")
    rebuilt.model(vocabulary_size=8, length=8)
    rebuilt.optimizer(rebuilt.learning_rate)
    assert operative(again)[1] == values
    assert "CODE_RATE = 0.25  # --gin.CODE_RATE" in text
    assert "adamw.eps = 1e-08  # default" in text
    assert rebuilt.mixture.code_rate == 0.25 and rebuilt.model_dir == "runs/a b"


def test_any_optax_chain(tmp_path):
    configuration = read_configuration([MIXED], [
        ("train.optimizer", "@chain"),
        ("chain.transformations", "[@optax.clip_by_global_norm(), @optax.scale_by_lion()]"),
        ("optax.clip_by_global_norm.max_norm", "1.0")])
    training = build(configuration, "train")
    transformation = training.optimizer(training.learning_rate)
    params = {"w": jax.numpy.ones(3)}
    configuration_text, values = operative(configuration)
    assert values["optax.clip_by_global_norm.max_norm"] == "1.0"
    (tmp_path / "config.gin").write_text(configuration_text)
    assert build(read_configuration([str(tmp_path / "config.gin")], []), "train").train_steps == training.train_steps
    updates, _ = transformation.update({"w": jax.numpy.array([1.0, -2.0, 3.0])}, transformation.init(params), params)
    assert updates["w"].shape == (3,)


def test_a_users_module_can_add_configurables(tmp_path, monkeypatch):
    (tmp_path / "my_schedules.py").write_text(
        "import gin\n@gin.configurable\ndef flat(rate):\n  return lambda step: rate\n")
    (tmp_path / "mine.gin").write_text(
        "import my_schedules\ntrain.learning_rate = @flat()\nflat.rate = 0.25\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    training = build(read_configuration([MIXED, str(tmp_path / "mine.gin")], []), "train")
    assert training.learning_rate(3) == 0.25
