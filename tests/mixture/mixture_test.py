"""From names to an order: pools, rates, phases, and what is refused."""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import tasks
from codellm_jax.mixture import mixture as mixture_module
from codellm_jax.mixture.mixture import Mixture, held_out_warnings, open_mixture
from codellm_jax.mixture.order import Source
from codellm_jax.mixture.rows import Rows
from codellm_jax.mixture.schedules import constant, phases
from codellm_jax.vocabulary import load_vocabulary

LENGTH = 32


@pytest.fixture(scope="module")
def vocabulary():
    return load_vocabulary("python_8k")


@pytest.fixture
def mixture_of(tiny_corpora, tiny_cache):
    def make(name=("text.tiny", "code.tiny"), corpora=None, **changes) -> Mixture:
        definitions = tasks.Definitions(modules=("tasks.pretraining",), corpora=tiny_corpora | (corpora or {}))
        return Mixture(**{"name": name, "definitions": definitions, "lengths": {"targets": LENGTH}, "code_rate": 0.25,
                          "cache_dir": tiny_cache} | changes)

    return make


def silent(line: str) -> None:
    del line


def test_names_become_an_order(mixture_of, vocabulary):
    opened = open_mixture(mixture_of(), vocabulary, 5, 100)
    text, code = opened.training
    assert opened.order.seed == 5 and opened.order.schedule == constant(0.25)
    assert [(source.name, source.rows, source.content_hash) for source in opened.order.sources] == [
        ("text.tiny", text.count, text.content_hash), ("code.tiny", code.count, code.content_hash)]
    assert [(rows.name, rows.split) for rows in opened.training] == [("text.tiny", "train"), ("code.tiny", "train")]
    assert [(rows.name, rows.split) for rows in opened.validation] == [
        ("text.tiny", "validation"), ("code.tiny", "validation")]
    assert opened.order.counts(400).tolist() == [300, 100]


def test_a_single_name(mixture_of, vocabulary):
    opened = open_mixture(mixture_of("code.tiny", code_rate=1.0), vocabulary, 0, 100)
    assert [source.name for source in opened.order.sources] == ["code.tiny"]
    with pytest.raises(ValueError, match="The mixture has no text source: set CODE_RATE = 1.0"):
        open_mixture(mixture_of("code.tiny"), vocabulary, 0, 100)


def test_phases_replace_the_rate(mixture_of, vocabulary):
    opened = open_mixture(mixture_of(mix_phases=["5:5", "6:4", "7:3", "7:3"]), vocabulary, 0, 400)
    assert opened.order.schedule == phases(["5:5", "6:4", "7:3", "7:3"], 400)
    assert opened.order.counts(400).tolist() == [250, 150]


def test_without_rates_a_pool_is_shared_by_size(mixture_of, vocabulary, tiny_corpora, tmp_path):
    half = Path(tiny_corpora["text.tiny"]["json_lines"]).read_text().splitlines(keepends=True)
    (tmp_path / "half.jsonl").write_text("".join(half[:10]))
    corpora = {"text.half": {"json_lines": str(tmp_path / "half.jsonl"), "holdout": 0}}
    opened = open_mixture(mixture_of(["text.tiny", "text.half"], corpora, code_rate=0), vocabulary, 0, 100, silent)
    small, large = opened.training  # by name, however the list has them
    assert small.name == "text.half" and small.count < large.count
    assert [source.weight for source in opened.order.sources] == [small.count, large.count]
    # All the rows of the pool are through at the same time.
    assert opened.order.counts(large.count + small.count).tolist() == [small.count, large.count]
    assert opened.validation[0] is None  # nothing is held out


def held_out(name: str, documents: int, count: int) -> Rows:
    return Rows(name, "validation", "", count, 32, 99, documents, "")


@pytest.mark.parametrize("stage, validation, told", [
    ("pretraining", {"text.a": (20, 2), "code.b": (30, 9)}, []),
    ("pretraining", {"text.a": (19, 2), "text.c": (1, 0), "code.b": (30, 9)}, []),  # a pool's sources together
    ("pretraining", {"text.a": (19, 2), "code.b": (30, 9)}, [
        "text: held-out documents: 19 (text.a 19 in 2 row(s)), too few to measure its loss. Give a corpus of text a "
        "larger 'holdout', or separate files as 'validation', in CORPORA."]),
    ("pretraining", {"text.a": (20, 2), "code.b": (90, 1), "code.d": None}, [
        "code: held-out documents: 90 (code.b 90 in 1 row(s), code.d 0), too few"]),
    ("pretraining", {"text.a": (0, 0), "code.b": (3, 0)}, [
        "text: held-out documents: 0 (text.a 0), so its loss on held-out rows is not measured. Give",
        "code: held-out documents: 3 (code.b 3 in 0 row(s)), so its loss on held-out rows is not measured."]),
    ("tuning", {"text.a": (40, 19), "code.b": (40, 20)}, [  # 21 examples of 40 are left out
        "text: held-out examples: 19 (text.a 19), too few"])])
def test_pools_with_too_little_held_out_are_told(stage, validation, told):
    rows = {name: size and held_out(name, *size) for name, size in validation.items()}
    found = list(held_out_warnings(rows, stage))
    assert len(found) == len(told) and all(line.startswith(start) for line, start in zip(found, told, strict=True))


def test_warnings_of_a_mixture(mixture_of, vocabulary, tiny_documents):
    opened = open_mixture(mixture_of(), vocabulary, 5, 100)
    assert [line.split(" (")[0] for line in opened.warnings] == [
        "text: held-out documents: 4", "code: held-out documents: 4"]
    assert [rows.documents for rows in opened.validation] == [
        len(tiny_documents[name, "validation"]) for name in ("text.tiny", "code.tiny")]


def test_rates_of_corpora(mixture_of, vocabulary, tiny_corpora):
    weighted = {"text.one": tiny_corpora["text.tiny"] | {"rate": 0.1},
                "text.two": tiny_corpora["text.tiny"] | {"rate": 0.3}}
    opened = open_mixture(mixture_of(["text.one", "text.two", "code.tiny"], weighted), vocabulary, 0, 100, silent)
    assert opened.order.asked(400) == [75, 225, 100]
    # A rate is no part of the content: a changed one needs no other cache.
    changed = {name: spec | {"rate": 7} for name, spec in weighted.items()}
    again = open_mixture(mixture_of(["text.one", "text.two", "code.tiny"], changed), vocabulary, 0, 100, silent)
    assert again.training == opened.training and again.order.asked(400) == [150, 150, 100]
    # Two sources of the same content go through it in orders of their own.
    rows = [opened.order.draw(np.arange(400)).row[opened.order.draw(np.arange(400)).source == k][:20] for k in (0, 1)]
    assert rows[0].tolist() != rows[1].tolist()


def test_rates_for_some_of_a_pool_are_refused(mixture_of, vocabulary, tiny_corpora):
    corpora = {"text.one": tiny_corpora["text.tiny"] | {"rate": 2}}
    with pytest.raises(ValueError, match="have a rate or none; without one: text.tiny") as raised:
        open_mixture(mixture_of(["text.tiny", "text.one", "code.tiny"], corpora), vocabulary, 0, 100, silent)
    assert "\n" not in str(raised.value)


def test_a_seqio_mixture_brings_its_rates(mixture_of, vocabulary, tiny_corpora, monkeypatch):
    import seqio

    corpora = {"text.one": tiny_corpora["text.tiny"], "text.two": tiny_corpora["text.tiny"]}
    mixture = mixture_of("weighted_pair", corpora, code_rate=0.0)
    mixture.definitions.register()
    seqio.MixtureRegistry.remove("weighted_pair")
    seqio.MixtureRegistry.add("weighted_pair", [("text.one", 0.2), ("text.two", 0.6)])
    first = open_mixture(mixture, vocabulary, 0, 100, silent)
    assert first.order.sources == tuple(
        Source(name, rows.count, Fraction(rate), rows.content_hash)
        for name, rate, rows in zip(("text.one", "text.two"), (Fraction(1, 5), Fraction(3, 5)), first.training,
                                    strict=True))
    # The second time the cache knows which tasks it has.
    monkeypatch.setattr(mixture_module, "require_registered", lambda name: pytest.fail("asked SeqIO again"))
    assert open_mixture(mixture, vocabulary, 0, 100, silent) == first


def test_remembered_names_are_whole_or_not_there(mixture_of, vocabulary, tmp_path, monkeypatch):
    mixture = mixture_of("python_text_code", cache_dir=str(tmp_path))

    class Killed(BaseException):
        pass

    def die_halfway(path: Path, text: str) -> None:
        path.write_bytes(text[:10].encode())
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(type(mixture_module.epath.Path(tmp_path)), "write_text", die_halfway)
        with pytest.raises(Killed):
            mixture_module._tasks_of("python_text_code", mixture.definitions, str(tmp_path))
    assert len(list((tmp_path / "mixtures").iterdir())) == 1
    remembered = mixture_module._tasks_of("python_text_code", mixture.definitions, str(tmp_path))
    assert remembered == {"text.python": 2.0, "code.python": 1.0}
    assert [json.loads(path.read_text()) for path in (tmp_path / "mixtures").glob("*.json")
            if not path.name.startswith(".")] == [remembered]
    assert mixture_module._tasks_of("python_text_code", mixture.definitions, str(tmp_path)) == remembered


def test_an_unknown_name_names_the_nearest(mixture_of, vocabulary):
    with pytest.raises(ValueError, match=r"No SeqIO task or mixture is named 'text.tinny'; nearest: text.tiny") as e:
        open_mixture(mixture_of(["text.tinny", "code.tiny"]), vocabulary, 0, 100, silent)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(("changes", "message"), [
    ({"code_rate": 1.5}, "CODE_RATE must lie between 0"), ({"code_rate": -0.1}, "CODE_RATE must lie between 0"),
    ({"code_rate": "most"}, "CODE_RATE must be a number"), ({"code_rate": float("nan")}, "CODE_RATE must be a number"),
    ({"max_epochs": 0}, "MAX_EPOCHS must be at least 1"), ({"lengths": {"inputs": 5}}, "a length for 'targets'"),
    ({"lengths": {"targets": 0}}, "a length for 'targets'")])
def test_settings_are_refused_in_one_line(mixture_of, changes, message):
    with pytest.raises(ValueError, match=message) as raised:
        mixture_of(**changes)
    assert "\n" not in str(raised.value)


def test_bad_phases_are_refused_in_one_line(mixture_of, vocabulary):
    with pytest.raises(ValueError, match="MIX_PHASES must list text:code ratios") as raised:
        open_mixture(mixture_of(mix_phases=["5/5"]), vocabulary, 0, 100)
    assert "\n" not in str(raised.value)


def test_a_cache_whose_name_would_be_another_is_refused():
    with pytest.raises(ValueError, match=r"CACHE_DIR /tmp/a\\b holds a backslash"):
        Mixture(name="text.a", definitions=None, lengths={"targets": 8}, code_rate=0.0, cache_dir="/tmp/a\\b")
