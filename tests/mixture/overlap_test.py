"""What cached rows are searched for, against a slow search of the documents that were trained on."""

import itertools
import json
import multiprocessing
import os
import random
import signal
import struct
import unicodedata

import numpy as np
import pytest

import tasks
from codellm_jax.mixture import overlap
from codellm_jax.mixture.ngrams import END, Lengths, Question, index, words
from codellm_jax.mixture.overlap import Trained, search, texts
from codellm_jax.mixture.rows import cached_rows
from codellm_jax.vocabulary import load_vocabulary

LENGTH = 32
N, MINIMUM = LENGTHS = Lengths(13, 8)
CHINESE = "一个模型轮流学习文本和代码，每一行由它的编号读出。"


def prose(dice: random.Random, count: int) -> str:
    return " ".join(dice.choices("the a row of tokens is read by its number héllo 世界 never lost".split(), k=count))


def program(dice: random.Random, count: int) -> str:
    body = "".join(f"    my_value{dice.randrange(9)} = f(value * {dice.randrange(100)})\n" for _ in range(count // 6))
    return f"def function_{dice.randrange(1000)}(value):\n{body}    return value\n"


def trained_on(source: Trained, documents: list[str]) -> list[str]:
    """The text of each document, as far as it is within the last full row."""
    vocabulary, end = source.vocabulary, source.vocabulary.end_of_document_id
    tokens = [token for text in documents if text for token in [*vocabulary.encode(text), end]]
    tokens = tokens[: source.rows.count * (LENGTH + 1)]
    return [vocabulary.decode(group) for is_end, group in itertools.groupby(tokens, lambda token: token == end)
            if not is_end]


def slow_words(text: str) -> list[str]:
    """Character by character, by Unicode's names."""
    found, word = [], ""
    for character in unicodedata.normalize("NFKC", text).lower() + " ":
        alone = unicodedata.name(character, "").startswith(("CJK UNIFIED", "HIRAGANA LETTER", "KATAKANA LETTER"))
        if alone or not character.isalnum():
            found += [word] if word else []
            found += [character] if alone else []
            word = ""
        else:
            word += character
    return found


def slow_search(documents: list[str], questions: list[Question]) -> set[str]:
    """Ids of the questions of which any n-gram is in a document, or whose shorter text is."""
    sequences = [" ".join(["", *slow_words(text), ""]) for text in documents]
    found = set()
    for question in questions:
        [part] = question.parts
        sequence = slow_words(part)
        size = N if len(sequence) >= N else len(sequence)
        grams = [" ".join(["", *sequence[at : at + size], ""]) for at in range(len(sequence) - size + 1)]
        if size >= MINIMUM and any(gram in text for gram in grams for text in sequences):
            found.add(question.id)
    return found


@pytest.fixture(scope="module")
def make_source(tmp_path_factory):
    """Makes a source of documents, cached in rows of 32 tokens."""

    def make(documents: list[str]) -> Trained:
        folder = tmp_path_factory.mktemp("source")
        (folder / "made.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        corpora = {"text.made": {"json_lines": str(folder / "made.jsonl"), "holdout": 0}}
        vocabulary = load_vocabulary("python_8k")
        rows = cached_rows("text.made", tasks.Definitions(("tasks.pretraining",), corpora), vocabulary, LENGTH,
                           str(folder), report=lambda line: None)
        return Trained(rows["train"], vocabulary, "pretraining")

    return make


def ids_found(sources: list[Trained], questions: list[Question], processes: int = 1) -> list[set[str]]:
    ngrams = index(questions, LENGTHS, LENGTHS, most=10**6)
    return [{question.id for question, place in zip(questions, places, strict=True) if place >= 0}
            for places in search(sources, ngrams, processes)]


def a_phrase(dice: random.Random, count: int) -> list[str]:
    return [f"word{dice.randrange(10**6)}" for _ in range(count)]


@pytest.fixture(scope="module")
def planted(make_source):
    dice = random.Random(3)
    phrases = {name: a_phrase(dice, 20) for name in ("inside", "across", "near", "documents", "rest", "prefix")}
    documents = [prose(dice, 50) for _ in range(6)]
    documents[0] = f"{prose(dice, 3)} {' '.join(phrases['inside'][2:15])} {prose(dice, 9)}"
    documents[1] += " " + " ".join(phrases["across"]) + " "  # some ninety tokens in rows of 33
    documents[2] += " " + " ".join(phrases["near"][:12]) + " nothing " + " ".join(phrases["near"][8:20])
    documents[3] += " " + " ".join(phrases["documents"][:9])
    documents[4] = " ".join(phrases["documents"][9:]) + " " + documents[4]
    documents[5] += CHINESE + " ".join(phrases["prefix"]).replace(phrases["prefix"][0], "x" + phrases["prefix"][0], 1)
    documents += [prose(dice, 30), " ".join(phrases["rest"][:13])]
    source = make_source(documents)
    assert trained_on(source, documents)[-1] != documents[-1]  # cut off by the last full row
    phrases["prefix"], phrases["rest"] = phrases["prefix"][:13], phrases["rest"][:13]  # the first word is another
    questions = [Question("t", name, (" ".join(phrase),)) for name, phrase in phrases.items()]
    questions += [
        Question("t", "chinese", ("问：模型、轮流学习文本和代码，每一行？",)),
        Question("t", "short chinese", ("每一行由它的编号",)),
        Question("t", "near chinese", ("模型轮流学习文本和代码每，两行由它的编号读",)),
        Question("t", "shouted", (" / ".join(phrases["inside"][2:15]).upper() + "!",))]
    return source, documents, questions


def test_planted_questions(planted):
    source, documents, questions = planted
    expected = {"inside", "across", "chinese", "short chinese", "shouted"}
    assert slow_search(trained_on(source, documents), questions) == expected
    assert ids_found([source], questions) == [expected]
    # Rows by themselves do not hold what goes across their ends.
    rows = [source.vocabulary.decode(row) for row in source.rows.read(np.arange(source.rows.count))]
    assert "across" not in slow_search(rows, questions)


@pytest.mark.parametrize("seed", range(3))
def test_as_the_slow_search_whatever_the_ranges(make_source, monkeypatch, seed):
    dice = random.Random(seed)
    makers = (prose, program, lambda _, count: CHINESE * (1 + count // 20), lambda _, count: "Ünï，ｗｉｄｅ " * count)
    documents = [dice.choice(makers)(dice, dice.choice((1, 4, 30, 90, 300))) for _ in range(20)]
    source = make_source(documents)
    questions = []
    for number in range(150):
        text = " ".join(dice.sample(documents, 2)) if number % 5 == 0 else dice.choice(documents)
        sequence = slow_words(text)
        size = dice.choice((5, 8, 10, 12, 13, 14, 30))
        start = dice.randrange(max(1, len(sequence) - size))
        chosen = sequence[start : start + size]
        if number % 3 == 0 and len(chosen) > 1:
            chosen[dice.randrange(len(chosen))] = "other"
        questions.append(Question("t", str(number), (" ".join(chosen),)))
    expected = slow_search(trained_on(source, documents), questions)
    assert 10 < len(expected) < 140
    assert ids_found([source], questions) == [expected]
    for tokens_a_range, tokens_a_block in ((33, 33), (200, 70), (64, 1000)):
        monkeypatch.setattr(overlap, "TOKENS_A_RANGE", tokens_a_range)
        monkeypatch.setattr(overlap, "TOKENS_A_BLOCK", tokens_a_block)
        assert ids_found([source], questions) == [expected]


def test_text_comes_back_whole(make_source, monkeypatch):
    monkeypatch.setattr(overlap, "TOKENS_A_BLOCK", 40)
    documents = ["a b c", "", "x" * 700, "世界 " * 90, "\ttabs\n\n\n   and spaces", "no_blank_" * 60, "the end " * 30]
    source = make_source(documents)
    end = END.decode("utf-8", "surrogateescape")
    whole = "".join(texts(source, 0, source.rows.count))
    assert [text for text in whole.split(end) if text] == trained_on(source, documents)
    pieces = list(texts(source, 0, source.rows.count))
    assert len(pieces) > 5 and words(whole) == [word for piece in pieces for word in words(piece)]
    for cuts in ([7], [1, 2, 3], list(range(source.rows.count))):
        borders = [0, *cuts, source.rows.count]
        assert "".join(text for first, last in itertools.pairwise(borders)
                       for text in texts(source, first, last)) == whole


def test_several_processes_find_the_same_first_ngrams(planted, make_source, monkeypatch):
    source, _, questions = planted
    another = make_source([questions[0].parts[0] + " again and again", prose(random.Random(5), 200)])
    ngrams = index(questions, LENGTHS, LENGTHS)
    alone = search([source, another], ngrams, processes=1)
    assert (alone[1] >= 0).sum() == 2  # "inside" and "shouted"
    monkeypatch.setattr(overlap, "TOKENS_A_RANGE", 128)
    told = []
    for processes in (1, 2):
        found = search([source, another], ngrams, processes, lambda *done: told.append(done))
        np.testing.assert_array_equal(found, alone)
    total = source.rows.count + another.rows.count
    assert told[-1] == (total, total) and len(told) > 10


def test_a_process_ends_in_silence_if_its_parent_is_killed_in_the_middle_of_a_message():
    ours, theirs = multiprocessing.Pipe()
    os.write(ours.fileno(), struct.pack("!i", 1_000) + b"the first bytes of 1,000")  # as Connection.send begins
    ours.close()
    interrupted = signal.getsignal(signal.SIGINT)
    try:
        overlap._serve(theirs)
    finally:
        signal.signal(signal.SIGINT, interrupted)


def test_damaged_rows_are_told_by_other_processes_too(make_source, monkeypatch):
    source = make_source([prose(random.Random(6), 400)])
    monkeypatch.setattr(overlap, "TOKENS_A_RANGE", 128)
    gone = source._replace(rows=source.rows.__class__(**{**vars(source.rows), "path": source.rows.path + "gone"}))
    ngrams = index([Question("t", "a", ("one two three four five six seven eight",))], LENGTHS, LENGTHS)
    with pytest.raises(ValueError, match="The cached rows in .*gone are damaged"):
        search([gone], ngrams, processes=2)
