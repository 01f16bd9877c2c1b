"""What a checkpoint's settings may and may not do where it is used again."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from codellm_jax import cli
from codellm_jax.configuration import read_configuration
from codellm_jax.model.decoder import DecoderConfig
from codellm_jax.results.files import digest
from codellm_jax.runtime.checkpoints import newest_record
from codellm_jax.runtime.compatibility import (
    literal,
    moved_along,
    require_same_model,
    require_same_settings,
    require_same_vocabulary,
    vocabulary_facts,
)
from codellm_jax.vocabulary import load_vocabulary

END = 5  # of the shipped vocabulary an ordinary id


@pytest.fixture(scope="module")
def run_with_own_end(tiny_flags, tmp_path_factory) -> Path:
    """A run of four steps whose documents end with another id than the vocabulary's own."""
    folder = tmp_path_factory.mktemp("own_end") / "run"
    assert cli.main(["train", *tiny_flags, f"--gin.MODEL_DIR={folder}", "--gin.TRAIN_STEPS=4",
                     "--gin.model.activation=fast_gelu", f"--gin.vocabulary.end_of_document_id={END}",
                     "--gin.vocabulary.pad_id=7", "--gin.vocabulary.multiple=64"]) == 0
    return folder


def forged(run: Path, target: Path, **settings: object) -> Path:
    """A copy of a run whose newest record says something else, with a digest that fits."""
    shutil.copytree(run, target)
    [file] = (target / "checkpoints" / "4" / "record").glob("metadata")
    record = json.loads(file.read_text())
    record["settings"] |= settings
    record["digest"] = digest(record)
    file.write_text(json.dumps(record))
    return target


@pytest.mark.parametrize("text, value", [
    ("'python_8k'", "'python_8k'"), ("{'targets': 32}", "{'targets': 32}"), ("None", "None"), ("1e-3", "0.001"),
    ("%A", "3"), ("%B", "3"), ("%LOOP", None), ("%NOBODY", None), ("@os.system()", None), ("[%A]", None),
    ("'python_8k'\nimport this", None), ("__import__('os')", None), ("(" * 100_000, None), (3, None), (None, None)])
def test_only_literals_are_taken(text, value):
    settings = {"name": text, "A": "3", "B": "%A", "LOOP": "%POOL", "POOL": "%LOOP"}
    assert literal(settings, "name") == value
    assert literal(settings, "absent") is None


@pytest.mark.parametrize("name, value", [
    ("vocabulary.path", "'python_8k'\nimport planted_module"),
    ("model.hidden", "32\nimport planted_module"),
    ("mesh.data", "@planted_module.call()"),
    ("model.layers = 3\nimport planted_module\nmodel.heads", "2"),
    ("mixture.lengths", "{'targets': __import__('planted_module')}"),
])
@pytest.mark.parametrize("command", ["eval", "infer", "tune"])
def test_a_foreign_checkpoint_runs_no_code(
        pretrained, tiny_tuning_flags, tmp_path, monkeypatch, capsys, name, value, command):
    run = forged(pretrained / "CODE", tmp_path / "run", **{name: value})
    assert newest_record(str(run))[1]["settings"][name] == value  # passes for whole
    (tmp_path / "planted_module.py").write_text("raise SystemExit('this ran')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "prompts.txt").write_text("a\n")
    arguments = {
        "eval": ["eval", "--gin_file=gin/eval.gin", f"--gin.CHECKPOINT_PATH={run}", "--gin.TASKS=['logic']"],
        "infer": ["infer", "--gin_file=gin/infer.gin", f"--gin.CHECKPOINT_PATH={run}",
                  f"--prompts={tmp_path / 'prompts.txt'}", "--gin.sampling.max_new_tokens=1"],
        "tune": ["train", "--gin_file=gin/tune_text.gin", f"--gin.INITIAL_CHECKPOINT_PATH={run}", "--dry_run",
                 f"--gin.MODEL_DIR={tmp_path / 'tuned'}", "--gin.TRAIN_STEPS=4", *tiny_tuning_flags]}
    cli.main(arguments[command])  # whether it works without the setting depends on which one it is
    assert "planted_module" not in sys.modules
    assert "this ran" not in "".join(capsys.readouterr())


def test_ids_of_the_vocabulary_come_from_the_run(run_with_own_end, tiny_tuning_flags, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the row\n")

    def answers(*more: str) -> str:
        output = tmp_path / f"{len(more)}.jsonl"
        assert cli.main(["infer", "--gin_file=gin/infer.gin", f"--gin.CHECKPOINT_PATH={run_with_own_end}",
                         "--gin.sampling.max_new_tokens=16", f"--prompts={prompts}", f"--output={output}", *more]) == 0
        return output.read_text()

    assert answers() == answers(f"--gin.vocabulary.end_of_document_id={END}", "--gin.vocabulary.pad_id=7")
    for files, place in ((["gin/eval.gin"], "CHECKPOINT_PATH"), (["gin/tune_text.gin"], "INITIAL_CHECKPOINT_PATH")):
        found = read_configuration(files, [(place, str(run_with_own_end))])
        assert [found.resolved(f"vocabulary.{name}") for name in ("end_of_document_id", "pad_id", "multiple")] == [
            "5", "7", "64"]
    status = cli.main(["train", "--gin_file=gin/tune_text.gin", f"--gin.MODEL_DIR={tmp_path / 'tuned'}",
                       f"--gin.INITIAL_CHECKPOINT_PATH={run_with_own_end}", *tiny_tuning_flags, "--gin.TRAIN_STEPS=3"])
    assert status == 0, capsys.readouterr().err
    assert newest_record(str(tmp_path / "tuned"))[1]["settings"]["vocabulary.end_of_document_id"] == str(END)


@pytest.mark.parametrize("setting, message", [
    ("vocabulary.end_of_document_id=6", "vocabulary.end_of_document_id = 5, here it is 6: remove"),
    ("vocabulary.pad_id=8", "vocabulary.pad_id = 7, here it is 8"),
    ("vocabulary.multiple=3000", "an embedding of"),
    ("vocabulary.size=9000", "an embedding of 8192 rows, here it is 9000"),
    ("vocabulary.begin_id=6", "vocabulary.begin_ids = (), here it is (6,): remove vocabulary.begin_id"),
    ("model.heads=4", "model.heads = 2, here it is 4: remove model.heads"),
    ("model.activation=gelu", "model.activation = 'fast_gelu', here it is 'gelu'"),
    ("model.norm=rms", "model.norm = 'layer', here it is 'rms'"),
    ("TASK_FEATURE_LENGTHS={'targets': 48}", "rows of 32 tokens, here they have 48"),
])
def test_what_contradicts_the_run_is_refused(
        run_with_own_end, tiny_tuning_flags, tmp_path, capsys, setting, message):
    for arguments in (["eval", "--gin_file=gin/eval.gin", f"--gin.CHECKPOINT_PATH={run_with_own_end}",
                       "--gin.TASKS=['logic']"],
                      ["train", "--gin_file=gin/tune_text.gin", f"--gin.INITIAL_CHECKPOINT_PATH={run_with_own_end}",
                       f"--gin.MODEL_DIR={tmp_path / 'tuned'}", "--gin.TRAIN_STEPS=3",
                       *tiny_tuning_flags]):
        assert cli.main([*arguments, f"--gin.{setting}"]) == 1
        error = capsys.readouterr().err
        assert message in error and len(error.strip().splitlines()) == 1, error


def test_what_changes_no_meaning_is_free(run_with_own_end, capsys):
    assert cli.main(["eval", "--gin_file=gin/eval.gin", f"--gin.CHECKPOINT_PATH={run_with_own_end}",
                     "--gin.TASKS=['logic']", "--gin.QUESTIONS=2", "--gin.model.dtype=bfloat16",
                     "--gin.model.remat=full", "--gin.mesh.data=4", "--gin.mesh.model=2"]) == 0, capsys.readouterr().err


NEW_PARTS = ("kv_heads", "head_size", "norm", "norm_epsilon", "norm_place", "residual", "positions", "rotary_theta",
             "rotary_part", "rotary_scaling", "query_key_norm", "biases", "tied_head")


def test_a_checkpoint_of_before_a_part_could_be_chosen_has_its_default(run_with_own_end):
    record = newest_record(str(run_with_own_end))[1]
    assert {f"model.{name}" for name in NEW_PARTS} <= set(record["settings"])
    kept = {name: value for name, value in record["settings"].items() if name.removeprefix("model.") not in NEW_PARTS}
    vocabulary = load_vocabulary("python_8k", end_of_document_id=END, pad_id=7, multiple=64)

    def check(settings: dict[str, str], **parts: object) -> None:
        config = DecoderConfig(layers=3, hidden=32, heads=2, feedforward=64, vocabulary_size=vocabulary.size, length=32,
                               activation="fast_gelu", **parts)
        require_same_model(record | {"settings": settings}, vocabulary, config, "before")

    check(kept)
    check(kept, kv_heads=2, head_size=16)  # what None means here
    rotary = {"positions": "rotary", "rotary_scaling": {"kind": "linear", "factor": 2.0}}
    check(kept | {f"model.{name}": repr(value) for name, value in rotary.items()}, **rotary)
    for parts, message in (
        ({"norm": "rms"}, "model.norm = 'layer', here it is 'rms': remove model.norm"),
        ({"kv_heads": 1}, "model.kv_heads = None, here it is 1"),
        ({"head_size": 8}, "model.head_size = None, here it is 8"),
        ({"norm_epsilon": 1e-6}, "model.norm_epsilon = 1e-05, here it is 1e-06"),
        ({"tied_head": False}, "model.tied_head = True, here it is False"), (rotary, "model.positions = 'learned'"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            check(kept, **parts)
        assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="model.rotary_scaling = {'kind': 'linear', 'factor': 4.0}, here it is"):
        check(kept | {f"model.{name}": repr(value) for name, value in rotary.items()} | {
            "model.rotary_scaling": "{'kind': 'linear', 'factor': 4.0}"}, **rotary)
    require_same_settings({"model.layers": "3"}, {"model.layers": "3", "model.norm": "'layer'"}, "before")
    with pytest.raises(ValueError, match="model.norm was 'layer', is 'rms'"):
        require_same_settings({"model.layers": "3"}, {"model.layers": "3", "model.norm": "'rms'"}, "before")


@pytest.mark.slow
def test_a_run_of_other_parts_goes_on_and_is_read_with_them(tiny_flags, tmp_path, capsys):
    run, prompts, output = tmp_path / "run", tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    prompts.write_text("the row\n")
    scaling = "{'kind': 'llama3', 'factor': 4.0, 'original_length': 16}"
    flags = ["train", *tiny_flags, f"--gin.MODEL_DIR={run}", *(f"--gin.model.{setting}" for setting in (
        "query_layer=False", "kv_heads=1", "norm=rms", "positions=rotary", f"rotary_scaling={scaling}",
        "activation=swiglu", "biases=none", "tied_head=False"))]
    for _ in range(2):
        assert cli.main([*flags, "--gin.TRAIN_STEPS=4"]) == 0, capsys.readouterr().err
    assert f"Resuming {run} after step 4" in capsys.readouterr().out
    assert cli.main(["infer", "--gin_file=gin/infer.gin", f"--gin.CHECKPOINT_PATH={run}", f"--prompts={prompts}",
                     "--gin.sampling.max_new_tokens=4", f"--output={output}"]) == 0, capsys.readouterr().err
    assert output.read_text()
    assert cli.main([*flags, "--gin.TRAIN_STEPS=4", "--gin.model.rotary_theta=500000.0"]) == 1
    assert "model.rotary_theta was 10000.0, is 500000.0" in capsys.readouterr().err
    assert cli.main([*flags, "--gin.TRAIN_STEPS=4", "--gin.model.rotary_scaling={'kind': 'yarn', 'factor': 2.0}"]) == 1
    error = capsys.readouterr().err
    assert "needs 'original_length'" in error and len(error.strip().splitlines()) == 1


def test_ids_that_an_edited_configuration_changes_are_refused():
    vocabulary = load_vocabulary("python_8k")
    record = {"settings": {"vocabulary.path": repr(vocabulary.path)}, "vocabulary": vocabulary_facts(vocabulary),
              "ledger": {"vocabulary_hash": vocabulary.content_hash}}
    require_same_vocabulary(json.loads(json.dumps(record)), vocabulary, "run")
    record["vocabulary"] = vocabulary_facts(vocabulary) | {"pad_id": 7}
    with pytest.raises(ValueError, match="run was trained with pad_id = 7, .* tokenizer_config.json edited"):
        require_same_vocabulary(record, vocabulary, "run")


@pytest.mark.parametrize("name", ["vocabulary", "vocabulary/spiece.model"])
def test_an_imported_run_that_is_moved_has_its_tokenizer_with_it(tmp_path, name):
    (tmp_path / "now" / "vocabulary").mkdir(parents=True)
    (tmp_path / "now" / "vocabulary" / "spiece.model").touch()
    settings = {"vocabulary.path": "%VOCABULARY", "VOCABULARY": repr(f"/then/{name}"), "SEED": "1"}
    found = moved_along(settings, str(tmp_path / "now"))
    assert found == settings | {"vocabulary.path": repr(str(tmp_path / "now" / name))}
    assert moved_along(settings, str(tmp_path)) == settings
    assert moved_along(found, "elsewhere") == found
