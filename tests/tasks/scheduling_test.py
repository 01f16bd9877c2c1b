"""Plain SeqIO reads mixtures in codellm_jax's order: counts of each phase, ends, splits, saved iterators."""

import ast
import functools
import itertools
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest

seqio = pytest.importorskip("seqio")

import tensorflow as tf  # noqa: E402

from codellm_jax.mixture.order import Order, Source  # noqa: E402
from codellm_jax.mixture.schedules import phases  # noqa: E402
from tasks.scheduling import CHUNK, add_scheduled_mixture  # noqa: E402

EXAMPLES = 100  # of each task; the first token of each is its task's


def _dataset(split: str, shuffle_files: bool, seed: int | None = None, *, first: int, examples: int) -> tf.data.Dataset:
    del split, shuffle_files, seed
    return tf.data.Dataset.range(examples).map(lambda k: {"targets": tf.cast(tf.stack([first, k]), tf.int32)})


def _task(name: str, first: int, splits: tuple[str, ...] = ("train", "validation"), examples: int = EXAMPLES) -> str:
    """Registers a task of examples [first, number]; a name of its own, which sorts as `name` does."""
    name = f"{name}_{uuid.uuid4().hex[:8]}"
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(functools.partial(_dataset, first=first, examples=examples), splits=splits),
        preprocessors=[],
        output_features={"targets": seqio.Feature(seqio.PassThroughVocabulary(1000), add_eos=False)})
    return name


def _mixture(tasks: list[Any], **settings: Any) -> str:
    name = f"scheduled_{uuid.uuid4().hex[:8]}"
    add_scheduled_mixture(name, tasks, **settings)
    return name


def _drawn(name: str, rows: int, split: str = "train", **settings: Any) -> np.ndarray:
    """The task of each of the first examples, as plain SeqIO reads them."""
    settings = {"num_epochs": None, "shuffle": False} | settings
    dataset = seqio.get_mixture_or_task(name).get_dataset({"targets": 2}, split=split, **settings)
    return np.array([int(example["targets"][0]) for example in dataset.take(rows).as_numpy_iterator()])


@pytest.mark.parametrize("settings", [{}, {"shuffle": True, "seed": 3}, {"shuffle": True, "seed": 4}])
def test_phases_of_the_paper(settings: dict[str, Any]):
    name = _mixture([_task("code.a", 1), _task("text.b", 0)], mix_phases=["5:5", "6:4", "7:3", "7:3"], examples=400)
    drawn = _drawn(name, 440, **settings)
    assert drawn[:400].reshape(4, 100).sum(1).tolist() == [50, 40, 30, 30]
    assert drawn[400:].sum() == 12  # beyond the run the last phase goes on
    order = Order(0, phases(["5:5", "6:4", "7:3", "7:3"], 400), (Source("text.b", 1), Source("code.a", 1)))
    np.testing.assert_array_equal(drawn, order.draw(np.arange(440)).source)


def test_a_ramp_by_steps():
    value = {0: "7:3", 25: "7:3 to 0:1"}
    name = _mixture([_task("code.a", 1), _task("text.b", 0)], mix_phases=value, examples=400, batch_size=8)
    drawn = _drawn(name, 500)
    assert drawn[:200].sum() == 60 and drawn[200:400].sum() == 130 and drawn[400:].sum() == 100
    schedule = phases(value, 400, 8)
    np.testing.assert_array_equal(np.cumsum(drawn), schedule.quota(np.arange(1, 501)))


def test_a_table_of_three_sources():
    tasks = [_task("text.b", 1), _task("code.a", 0), _task("text.c", 2)]  # numbered as they sort
    text_b, code_a, text_c = tasks
    name = _mixture(tasks, mix_phases=["1:1", {text_c: 3, text_b: 2, code_a: 5}, {text_c: 1}], examples=300)
    counts = [np.bincount(part, minlength=3).tolist() for part in _drawn(name, 300).reshape(3, 100)]
    assert counts == [[50, 25, 25], [50, 20, 30], [0, 0, 100]]
    mixture = seqio.get_mixture_or_task(name)
    assert [mixture.get_rate(task) for task in mixture.tasks] == pytest.approx([1 / 3, 0.15, 155 / 300])


def test_rates_within_a_pool_and_a_constant_share():
    name = _mixture([(_task("text.a", 1), 3), (_task("text.b", 2), 1.0), _task("code.c", 0)], code_rate=0.2)
    assert np.bincount(_drawn(name, 1000)).tolist() == [200, 600, 200]


def test_beyond_a_chunk():
    name = _mixture([_task("code.a", 1), _task("text.b", 0)], code_rate=1 / 3)
    cumulated = np.cumsum(_drawn(name, 2 * CHUNK + 10))
    np.testing.assert_array_equal(cumulated, (2 * np.arange(1, len(cumulated) + 1) + 3) // 6)


def test_examples_come_in_their_own_order_and_repeat():
    name = _mixture([_task("code.a", 1, examples=7), _task("text.b", 0, examples=5)], code_rate=0.5)
    dataset = seqio.get_mixture_or_task(name).get_dataset({"targets": 2}, "train", shuffle=False, num_epochs=None)
    found = [example["targets"].tolist() for example in dataset.take(60).as_numpy_iterator()]
    for first, examples in ((0, 5), (1, 7)):
        assert [k for task, k in found if task == first] == list(
            itertools.islice(itertools.cycle(range(examples)), 30))


def test_the_mix_ends_with_the_first_task_that_ends():
    name = _mixture([_task("code.a", 1, examples=10), _task("text.b", 0, examples=90)], code_rate=0.5)
    drawn = _drawn(name, 1000, num_epochs=1)
    assert drawn.sum() == 10 and 19 <= len(drawn) <= 20


def test_a_split_that_all_have_and_one_that_one_lacks():
    tasks = [_task("code.a", 1), _task("text.b", 0), _task("text.c", 2, splits=("train",))]
    name = _mixture(tasks, mix_phases=["0:1", "1:1", "1:0"], examples=300)
    assert set(_drawn(name, 300)[:100].tolist()) == {1}
    # text.c has no validation split: by rates, 1/2 of code and 1/4 of text.b.
    drawn = _drawn(name, 3000, "validation", seed=1)
    assert set(drawn.tolist()) == {0, 1} and abs(drawn.mean() - 2 / 3) < 0.05
    both = _mixture(tasks[:2], mix_phases=["0:1", "1:0"], examples=40)
    assert _drawn(both, 40, "validation", num_epochs=1).tolist() == [1] * 20 + [0] * 20


def test_an_iterator_goes_on_where_it_was_saved(tmp_path: Path):
    name = _mixture([_task("code.a", 1), _task("text.b", 0)], mix_phases=["5:5 to 7:3"], examples=400)
    dataset = seqio.get_mixture_or_task(name).get_dataset({"targets": 2}, "train", shuffle=True, seed=5)
    iterator = iter(dataset)
    for _ in range(130):
        next(iterator)
    saved = tf.train.Checkpoint(iterator=iterator).save(str(tmp_path / "iterator"))
    expected = [next(iterator)["targets"].numpy().tolist() for _ in range(50)]
    restored = iter(dataset)
    tf.train.Checkpoint(iterator=restored).restore(saved)
    assert [next(restored)["targets"].numpy().tolist() for _ in range(50)] == expected


@pytest.mark.parametrize(("given", "settings", "message"), [
    (["code.x", "text.y"], {}, "give code_rate or mix_phases"),
    (["code.x", "text.y"], {"code_rate": 0.5, "mix_phases": ["1:1"], "examples": 5}, "give code_rate or mix_phases"),
    (["code.x", "text.y"], {"mix_phases": ["1:1"]}, "needs the examples of the whole run, found examples=None"),
    (["code.x", "text.y"], {"mix_phases": ["1:1"], "examples": 0}, "found examples=0"),
    (["code.x", "text.y"], {"mix_phases": ["1:1 to"], "examples": 5}, "^MIX_PHASES must list"),
    (["code.x", "text.y"], {"code_rate": 2}, "^CODE_RATE must lie between"),
    (["code.x"], {"code_rate": 0.5}, "has no text source"),
    (["code.x", "code.x"], {"code_rate": 1}, "code.x.* is given twice"),
    (["code.x", "text.nowhere"], {"code_rate": 0.5}, "'text.nowhere' is no task"),
    (["code.x", "a mixture"], {"code_rate": 0.5}, "is a mixture: name its tasks"),
    ([("code.x", 0), "text.y"], {"code_rate": 0.5}, "the rate of code.x.* must be above 0, found 0"),
    ([("code.x", 1), "code.z", "text.y"], {"code_rate": 0.5}, "either all code tasks have a rate or none"),
])
def test_errors_are_one_line(given: list[Any], settings: dict[str, Any], message: str):
    names = {short: _task(short, 0) for short in ("code.x", "code.z", "text.y")}
    names["a mixture"] = _mixture([names["code.x"], names["text.y"]], code_rate=0.5)
    tasks = [(names[task[0]], task[1]) if isinstance(task, tuple) else names.get(task, task) for task in given]
    with pytest.raises(ValueError, match=message) as raised:
        _mixture(tasks, **settings)
    assert "\n" not in str(raised.value)


@pytest.mark.slow
@pytest.mark.parametrize(("mixture", "gin_file", "pool"), [
    ("python_instructions_increase", "gin/tune_increase.gin", "python_instructions"),
    ("python_instructions_decrease", "gin/tune_decrease.gin", "python_instructions"),
    ("python_rows_increase", "gin/mixed_pretrain_increase.gin", "python_rows"),
    ("python_rows_decrease", "gin/mixed_pretrain_decrease.gin", "python_rows")])
def test_the_shipped_mixtures_are_the_arms(mixture, gin_file, pool):
    """Told apart by their targets, which occur in one of the two tasks alone; counted in each quarter of the run."""
    import tasks.tuning  # noqa: F401, registers them, and those of pre-training
    from codellm_jax.configuration import read_configuration

    tuning = "tune" in gin_file
    start = [("INITIAL_CHECKPOINT_PATH", "None"), ("VOCABULARY", "python_8k"),
             ("TASK_FEATURE_LENGTHS", "{'targets': 8}")]
    settings = read_configuration([gin_file], start if tuning else []).effective
    mix_phases = ast.literal_eval(settings["MIX_PHASES"].value)
    examples = int(settings["BATCH_SIZE"].value) * int(settings["TRAIN_STEPS"].value)

    def read(name: str, count: int) -> list[bytes]:
        dataset = seqio.get_mixture_or_task(name).get_dataset(None, split="train", shuffle=False, num_epochs=None)
        return [example["targets"].tobytes() for example in dataset.take(count).as_numpy_iterator()]

    code = set(read(f"code.{pool}", examples // 2))
    is_code = np.array([targets in code for targets in read(mixture, examples)])
    assert not code & set(read(f"text.{pool}", examples))
    for phase, ratio in enumerate(mix_phases):
        quarter = is_code[phase * examples // 4 : (phase + 1) * examples // 4]
        text, of_code = map(int, ratio.split(":"))
        assert abs(quarter.sum() - len(quarter) * of_code / (text + of_code)) <= 1
    assert abs(is_code.sum() - examples * (3 / 8 if tuning else 1 / 3)) <= 1
    if not tuning:
        assert settings["TASK_FEATURE_LENGTHS"].value == "{'targets': 256}"
        assert {len(row) for row in code} == {256 * 4}  # int32
