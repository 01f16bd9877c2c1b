"""Instructions among the documents of pre-training: by hand, against plain Python, and as they are cached and drawn."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from chat_templates import CHATML, MISTRAL, PHI_3, write_folder
from hypothesis import given, settings
from hypothesis import strategies as st

import tasks
from codellm_jax.mixture import rows as rows_module
from codellm_jax.mixture.batches import Batch, batch_of_rows, global_batch, held_out_batches
from codellm_jax.mixture.examples import WITHIN, Found, as_document, documents
from codellm_jax.mixture.mixture import Mixture, open_mixture
from codellm_jax.mixture.overlap import Trained, texts
from codellm_jax.mixture.places import cache_place
from codellm_jax.mixture.rows import cached_rows, document_rows
from codellm_jax.mixture.tokens import Example
from codellm_jax.runtime.partitioning import MeshShape, batch_sharding, make_mesh
from codellm_jax.vocabulary import Vocabulary, load_vocabulary
from tasks.instruction_sets.prompts import alpaca_prompt, conversation_turns

END = 1
LENGTH = 24
TURNS = [
    [("user", "One and one?"), ("assistant", "Two.")],
    [("user", "A row?"), ("assistant", "x = 1"), ("user", "Another?"), ("assistant", "y = 2\n")],
    [("system", "Be short."), ("user", "So?"), ("assistant", "No."), ("user", "So?"), ("assistant", "Yes, 世界.")],
]
CONVERSATIONS = [{"messages": [{"role": role, "content": text} for role, text in turns]} for turns in TURNS]
RECORDS = [{"instruction": f"Add {number} and 1.", "input": "", "output": f"That is {number + 1}."}
           for number in range(40)]


class Token(NamedTuple):
    id: int
    counts: bool


# ---- Plain Python ------------------------------------------------------------------------------


def cut_into_rows(written: list[list[Token]], length: int) -> list[dict[str, list[float]]]:
    """The rows of documents, token by token: what each column of a batch should hold."""
    stream = [(token, number, place) for number, document in enumerate(written)
              for place, token in enumerate(document)]
    rows = []
    for start in range(0, len(stream) - length, length + 1):
        row = stream[start : start + length + 1]
        first = {}  # of each document, the column in which it begins here
        for column, (_, number, _) in enumerate(row):
            first.setdefault(number, column)
        of_row = list(first)
        rows.append({
            "inputs": [token.id for token, _, _ in row[:-1]],
            "targets": [token.id for token, _, _ in row[1:]],
            "positions": [column - first[number] for column, (_, number, _) in enumerate(row[:-1])],
            "segment_ids": [of_row.index(number) + 1 for _, number, _ in row[:-1]],
            "weights": [float(token.counts) for token, _, _ in row[1:]],
        })
    return rows


def assert_same(batch: Batch, rows: list[dict[str, list[float]]]) -> None:
    for name in ("inputs", "targets", "positions", "segment_ids", "weights"):
        assert np.asarray(getattr(batch, name)).tolist() == [row[name] for row in rows], name


def batch_of(examples: list[Example], loss: str | None, length: int, found: Found | None = None) -> Batch | None:
    """What is trained on, all rows as one batch; None where there is no full row."""
    blocks = list(document_rows(documents(examples, loss, END, found or Found()), length))
    if not blocks:
        return None
    rows = np.concatenate(blocks)
    return batch_of_rows(rows, np.zeros(len(rows), int), END)


# ---- By hand -----------------------------------------------------------------------------------


def test_a_document_by_hand():
    plain = Example(np.array([10, 11]), np.array([50, 51, END]), 0)
    assert as_document(plain, "all", END).tolist() == [10, 11, 50, 51, END]
    assert as_document(plain, "answers", END).tolist() == [~10, ~11, 50, 51, END]
    # A conversation with an end behind each answer: the first ends no document.
    turns = Example(np.array([10]), np.array([50, END, ~12, 51, END]), 0, True)
    assert as_document(turns, "all", END).tolist() == [10, 50, END + WITHIN, 12, 51, END]
    assert as_document(turns, "answers", END).tolist() == [~10, 50, END + WITHIN, ~12, 51, END]
    # A template that has end tokens in prompts, ends turns with 7, and has 8 behind the last answer.
    template = Example(np.array([END, 10]), np.array([50, 7, ~8, ~END, 51, 7, ~8]), 0, True)
    assert as_document(template, "all", END).tolist() == [END + WITHIN, 10, 50, 7, 8, END + WITHIN, 51, 7, END]
    assert as_document(template, "answers", END).tolist() == [
        ~(END + WITHIN), ~10, 50, 7, ~8, ~(END + WITHIN), 51, 7, ~END]
    assert as_document(Example(np.array([10]), np.array([], np.int32), 0), "all", END).tolist() == []
    assert as_document(Example(np.array([], np.int32), np.array([50, END]), 0), "answers", END).tolist() == [50, END]
    assert as_document(plain, "answers", END).dtype == np.int32


def test_rows_and_weights_by_hand():
    """Prompts 10s, answers 50s; rows of four inputs cut a prompt, an answer, and begin with an answer."""
    examples = [Example(np.array([10, 11]), np.array([50, END]), 0),
                Example(np.array([12, 13, 14]), np.array([51, 52, END]), 0),
                Example(np.array([15]), np.array([53, END, ~16, 54, END]), 0, True)]
    found = Found()
    batch = batch_of(examples, "answers", 4, found)
    #  10 11 50 END 12 | 13 14 51 52 END | 15 53 END 16 54 | END
    assert batch.inputs.tolist() == [[10, 11, 50, END], [13, 14, 51, 52], [15, 53, END, 16]]
    assert batch.targets.tolist() == [[11, 50, END, 12], [14, 51, 52, END], [53, END, 16, 54]]
    assert batch.weights.tolist() == [[0, 1, 1, 0], [0, 1, 1, 1], [1, 1, 0, 1]]
    assert batch.positions.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]]  # the end at 53 ends no document
    assert batch.segment_ids.tolist() == [[1] * 4] * 3
    assert [np.asarray(field).dtype.name for field in batch] == ["int32"] * 4 + ["float32", "int32"]
    assert (found.documents, found.tokens, found.uncounted, found.conversations) == (3, 16, 7, 1)
    everything = batch_of(examples, "all", 4)
    assert everything.weights.tolist() == [[1] * 4] * 3
    for name in ("inputs", "targets", "positions", "segment_ids"):
        assert getattr(everything, name).tolist() == getattr(batch, name).tolist()


def test_an_end_that_the_loss_does_not_count_still_ends_its_document():
    examples = [Example(np.array([10]), np.array([50, 7, ~8]), 0, True)] * 2
    batch = batch_of(examples, "answers", 6)
    #  10 50 7 END 10 50 7
    assert batch.inputs.tolist() == [[10, 50, 7, END, 10, 50]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1]] and batch.segment_ids.tolist() == [[1, 1, 1, 1, 2, 2]]
    assert batch.weights.tolist() == [[1, 1, 0, 0, 1, 1]]


# ---- Against plain Python ----------------------------------------------------------------------

ids = st.integers(0, 9)


@st.composite
def random_examples(draw: Any) -> tuple[list[Example], list[list[Token]]]:
    """Examples as `tokens.examples` gives them, ids and ends anywhere, and what they should become token by token."""
    examples, written = [], []
    for _ in range(draw(st.integers(1, 12))):
        prompt = draw(st.lists(ids, max_size=6))
        rest = draw(st.lists(st.tuples(ids, st.booleans()), max_size=8))
        if rest:
            rest[0] = rest[0][0], True  # targets begin with an answer
            if draw(st.booleans()):
                rest[-1] = END, True  # as without a template
        examples.append(Example(np.array(prompt, np.int32),
                                np.array([token if counts else ~token for token, counts in rest], np.int32), 0))
        while rest and not rest[-1][1]:
            rest.pop()
        document = [Token(token, False) for token in prompt] + [Token(*one) for one in rest] if rest else []
        if document and document[-1].id != END:
            document.append(Token(END, False))
        written.append(document)
    return examples, written


@settings(max_examples=300, deadline=None)
@given(random_examples(), st.integers(1, 12), st.sampled_from(["all", "answers"]))
def test_rows_are_those_of_plain_python(made, length, loss):
    examples, written = made
    if loss == "all":
        written = [[Token(token.id, True) for token in document] for document in written]
    found = Found()
    batch, rows = batch_of(examples, loss, length, found), cut_into_rows(written, length)
    if batch is None:
        assert rows == []
        return
    assert_same(batch, rows)
    everything = [token for document in written for token in document]
    assert (found.tokens, found.uncounted) == (len(everything), sum(not token.counts for token in everything))
    assert (found.documents, found.left_out) == (len(examples), sum(not document for document in written))


# ---- As they are cached ------------------------------------------------------------------------


def silent(line: str) -> None:
    del line


def file_of(folder: Path, name: str, records: list[dict]) -> str:
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(folder / name)


def defined(corpora: dict[str, dict], modules: tuple[str, ...] = ("tasks.pretraining",)) -> tasks.Definitions:
    return tasks.Definitions(modules=modules, corpora=corpora)


def all_rows(rows: rows_module.Rows, end: int) -> Batch:
    return batch_of_rows(rows.read(np.arange(rows.count)), np.zeros(rows.count, int), end)


def turns_by_hand(vocabulary: Vocabulary) -> list[list[Token]]:
    """The conversations in the form of vocabularies without a template, each of which is one document."""
    written = []
    for record in CONVERSATIONS:
        tokens = []
        for number, turn in enumerate(conversation_turns(record["messages"])):
            answers = number % 2 == 1
            encoded = vocabulary.encode(turn) + [vocabulary.end_of_document_id] * answers
            tokens += [Token(token, answers) for token in encoded]
        written.append(tokens)
    return written


def chatml_by_hand(vocabulary: Vocabulary) -> list[list[Token]]:
    special = dict(vocabulary.special_tokens)
    start, end = special["<|im_start|>"], special["<|im_end|>"]
    written = []
    for turns in TURNS:
        tokens: list[Token] = []
        if turns[0][0] != "system":
            turns = [("system", "You are a helpful assistant."), *turns]
        for number, (role, text) in enumerate(turns):
            answers = role == "assistant"
            tokens += [Token(start, False), *(Token(token, False) for token in vocabulary.encode(f"{role}\n"))] \
                if answers else [Token(start, False)]
            encoded = vocabulary.encode(text if answers else f"{role}\n{text}")
            tokens += [Token(token, answers) for token in [*encoded, end]]
            if number < len(turns) - 1:
                tokens += [Token(token, False) for token in vocabulary.encode("\n")]
        written.append([*tokens, Token(vocabulary.end_of_document_id, False)])
    return written


@pytest.mark.parametrize("loss", ["all", "answers", None])
@pytest.mark.parametrize("templated", [True, False])
def test_conversations_are_documents(tmp_path, loss, templated):
    vocabulary = load_vocabulary(write_folder(tmp_path / "words", CHATML)) if templated else load_vocabulary()
    spec = {"instructions": file_of(tmp_path, "chat.jsonl", CONVERSATIONS), "holdout": 0} | (
        {"loss": loss} if loss else {})
    rows = cached_rows("text.chat", defined({"text.chat": spec}), vocabulary, LENGTH, str(tmp_path), silent)["train"]
    written = (chatml_by_hand if templated else turns_by_hand)(vocabulary)
    if loss != "answers":
        written = [[Token(token.id, True) for token in document] for document in written]
    expected = cut_into_rows(written, LENGTH)
    assert rows.count == len(expected) > 2
    assert_same(all_rows(rows, vocabulary.end_of_document_id), expected)
    assert (rows.documents, rows.conversations, rows.loss) == (3, 3, loss or "all")
    assert rows.uncounted == sum(not token.counts for document in written for token in document)


@pytest.mark.parametrize(("template", "ends"), [(MISTRAL, "</s>"), (PHI_3, "<|end|>")])
def test_a_conversation_is_one_document_whatever_ends_its_turns(tmp_path, template, ends):
    """Mistral's turns end with the end-of-document token itself; Phi's do not, and it stands behind all."""
    vocabulary = load_vocabulary(write_folder(tmp_path / "words", template))
    turns = [record for record in CONVERSATIONS if record["messages"][0]["role"] != "system"]
    spec = {"instructions": file_of(tmp_path, "chat.jsonl", turns), "holdout": 0, "loss": "answers"}
    rows = cached_rows("text.chat", defined({"text.chat": spec}), vocabulary, 8, str(tmp_path), silent)["train"]
    batch, end = all_rows(rows, vocabulary.end_of_document_id), dict(vocabulary.special_tokens)[ends]
    inputs, weights = batch.inputs.ravel(), batch.weights.ravel()
    assert (vocabulary.end_of_document_id == end) == (template is MISTRAL)
    stream = rows.read(np.arange(rows.count)).ravel()
    plain = [token if token >= 0 else ~token for token in stream.tolist()]
    # Three answers, of which the last document's end may lie behind the last full row.
    assert sum(token % WITHIN == end and raw >= 0 for token, raw in zip(plain, stream, strict=True)) in (2, 3)
    documents_ended = sum(token == vocabulary.end_of_document_id for token in plain)
    assert documents_ended in (1, 2) and inputs.max() < vocabulary.size and 0 < weights.sum() < weights.size


def test_records_are_prompt_answer_and_end(tmp_path):
    vocabulary = load_vocabulary()
    spec = {"instructions": file_of(tmp_path, "asked.jsonl", RECORDS), "holdout": 0.1, "loss": "answers"}
    splits = cached_rows("text.asked", defined({"text.asked": spec}), vocabulary, LENGTH, str(tmp_path), silent)
    seen = 0
    for rows in splits.values():
        batch = all_rows(rows, vocabulary.end_of_document_id)
        assert rows.count and rows.documents
        seen += rows.documents
        stream = rows.read(np.arange(rows.count)).ravel()
        answers = vocabulary.decode([token for token in stream.tolist() if token >= 0]).split("That is")
        assert len(answers) in (rows.documents, rows.documents + 1)
        assert 0 < batch.weights.mean() < 0.5  # Alpaca's prompt is long
    assert seen == len(RECORDS)
    prompt = vocabulary.encode(alpaca_prompt("Add 0 and 1."))
    first = splits["train"].read(np.array([0]))[0]
    assert len(prompt) > LENGTH and (first < 0).all()  # all of it prompt


@pytest.mark.slow
def test_registered_tasks_of_tuning(tmp_path, monkeypatch):
    """By their own names, for which no spec tells what they are, and by another with `loss`; then without SeqIO."""
    corpora = {"code.answers": {"task": "code.python_instructions", "loss": "answers"}}
    definitions = defined(corpora, ("tasks.pretraining", "tasks.tuning"))
    vocabulary, names = load_vocabulary(), ("code.python_instructions", "code.answers", "code.python")
    named, alias, python = (cached_rows(name, definitions, vocabulary, 64, str(tmp_path), silent)["train"]
                            for name in names)
    assert (named.loss, alias.loss, python.loss) == ("all", "answers", None)
    assert named.documents == alias.documents > 100 and alias.uncounted > named.uncounted == 0
    one, other = (all_rows(rows, vocabulary.end_of_document_id) for rows in (named, alias))
    np.testing.assert_array_equal(one.inputs, other.inputs)
    np.testing.assert_array_equal(one.positions, other.positions)
    assert one.weights.min() == 1 and 0 < other.weights.mean() < 1

    def fail(*_: object) -> None:
        raise AssertionError("the rows are cached already")

    monkeypatch.setattr("codellm_jax.mixture.places.open_task", fail)
    monkeypatch.setattr(rows_module, "open_task", fail)
    for name in names:
        assert cached_rows(name, definitions, vocabulary, 64, str(tmp_path), silent)["train"].count


def test_the_key_knows_loss_and_template_and_documents_keep_theirs(tmp_path):
    asked = {"instructions": file_of(tmp_path, "asked.jsonl", RECORDS)}
    definitions = defined({"text.books": {"json_lines": asked["instructions"]}, "text.asked": asked,
                           "text.answers": asked | {"loss": "answers"}})
    own, templated = load_vocabulary(), load_vocabulary(write_folder(tmp_path / "words", CHATML))

    def key(task: str, vocabulary: Vocabulary = own, stage: str = "pretraining") -> dict[str, Any]:
        return cache_place(task, definitions, vocabulary, LENGTH, str(tmp_path), stage).key

    fields = {"version", "task", "definition", "length", "vocabulary", "end_of_document_id"}
    assert key("text.books").keys() == key("text.books", templated).keys() == fields
    assert key("text.asked").keys() - fields == {"instructions"}
    assert key("text.asked", templated).keys() - fields == {"instructions", "chat"}
    assert key("text.asked", stage="tuning").keys() - fields == {"examples"}
    assert key("text.asked") != key("text.answers") | {"task": "text.asked"}
    assert key("text.asked", stage="tuning") == key("text.answers", stage="tuning") | {"task": "text.asked"}


@pytest.mark.parametrize(("spec", "stage", "message"), [
    ({"instructions": "FILE", "loss": "prompts"}, "pretraining", "'loss' must be 'all' or 'answers', found 'prompts'"),
    ({"json_lines": "FILE", "loss": "answers"}, "pretraining", "unknown option 'loss' of json_lines"),
    ({"task": "text.books", "loss": "all"}, "pretraining", "'loss' is an option of instructions, but these are"),
    ({"task": "code.python", "loss": "all"}, "pretraining", "'loss' is an option of instructions, but these are"),
    ({"instructions": "FILE", "loss": "all"}, "tuning", "'loss': 'all' is for pre-training; in tuning the loss counts"),
    ({"instructions": "EMPTY", "holdout": 0}, "pretraining", "none of its 2 examples has a token of an answer"),
    ({"instructions": "FILE", "holdout": 0}, "pretraining", "tokens, fewer than the 9001 of one row"),
])
def test_errors_are_a_line(tmp_path, other_vocabularies, spec, stage, message):
    files = {"FILE": file_of(tmp_path, "asked.jsonl", RECORDS), "EMPTY": file_of(
        tmp_path, "empty.jsonl", [{"input": "Say it.", "target": "\u200b"}] * 2)}  # which T5 takes for a blank
    spec = {name: files.get(value, value) if isinstance(value, str) else value for name, value in spec.items()}
    vocabulary = load_vocabulary(other_vocabularies["t5"])
    with pytest.raises(ValueError, match=message) as raised:
        definitions = defined({"text.asked": spec, "text.books": {"json_lines": files["FILE"], "field": "output"}})
        cached_rows("text.asked", definitions, vocabulary, 9000, str(tmp_path), silent, stage)
    assert "\n" not in str(raised.value) and str(raised.value).startswith("text.asked")


# ---- As they are drawn -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, tiny_corpora) -> Mixture:
    """Documents and instructions of both pools by rates, with conversations whose answers alone count."""
    folder = tmp_path_factory.mktemp("mixed")
    dice = np.random.default_rng(5)
    asked = [{"instruction": f"Add {number}.", "input": "", "output": " ".join(map(str, dice.integers(0, 99, 30)))}
             for number in range(60)]
    corpora = {
        "text.tiny": tiny_corpora["text.tiny"] | {"rate": 3},
        "code.tiny": tiny_corpora["code.tiny"] | {"rate": 2},
        "text.chat": {"instructions": file_of(folder, "chat.jsonl", CONVERSATIONS * 20), "holdout": 0.2, "rate": 1,
                      "loss": "answers"},
        "code.asked": {"instructions": file_of(folder, "asked.jsonl", asked), "holdout": 0.2, "rate": 1},
    }
    return Mixture(list(corpora), defined(corpora), {"targets": 32}, 0.4, cache_dir=str(folder))


def on_one_device() -> jax.sharding.NamedSharding:
    return batch_sharding(make_mesh(MeshShape(), jax.devices()[:1]))


def test_rates_count_tokens_and_sizes_are_those_of_the_batch(mixed):
    vocabulary, batch_size = load_vocabulary(), 16
    opened = open_mixture(mixed, vocabulary, 3, 4000, batch_size, silent)
    taken = np.zeros(4)
    for step in range(60):
        batch, draw = global_batch(step, batch_size, opened.order, opened.training, vocabulary.end_of_document_id,
                                   on_one_device())
        sizes = opened.sizes(draw)
        assert np.asarray(batch.weights).sum(axis=1).tolist() == sizes.counted.tolist()
        assert sizes.positions.tolist() == [32] * batch_size
        taken += np.bincount(draw.source, sizes.positions, minlength=4)
        code = [source.pool == "code" for source in opened.order.sources]
        done = (step + 1) * batch_size
        # Within half a row of the share asked for, and of sources within a pool by half a row more a level.
        assert abs(taken[code].sum() / 32 - 0.4 * done) <= 0.5
        asked = {"text.tiny": 0.6 * 3 / 4, "text.chat": 0.6 / 4, "code.tiny": 0.4 * 2 / 3, "code.asked": 0.4 / 3}
        for source, tokens in zip(opened.order.sources, taken, strict=True):
            assert abs(tokens / 32 - asked[source.name] * done) <= 1
    chat = [source.name for source in opened.order.sources].index("text.chat")
    assert opened.training[chat].loss == "answers" and opened.training[chat].uncounted


def test_held_out_rows_have_the_same_weights(mixed):
    vocabulary = load_vocabulary()
    opened = open_mixture(mixed, vocabulary, 3, 4000, 16, silent)
    for index, (source, rows) in enumerate(zip(opened.order.sources, opened.validation, strict=True)):
        read = rows.read(np.arange(rows.count))
        counted = (read[:, 1:] >= 0).sum()
        found = sum(float(np.asarray(batch.weights).sum()) for batch in held_out_batches(
            rows, 10**6, 4, index, vocabulary.end_of_document_id, on_one_device()))
        assert found == counted and (counted < rows.count * 32) == (source.name == "text.chat")


def test_text_is_searched_as_it_is_read(tmp_path):
    """As contamination reads rows: complements and marks are plain text, and a document's end parts texts."""
    vocabulary = load_vocabulary()
    spec = {"instructions": file_of(tmp_path, "chat.jsonl", CONVERSATIONS * 9), "holdout": 0, "loss": "answers"}
    rows = cached_rows("text.chat", defined({"text.chat": spec}), vocabulary, 16, str(tmp_path), silent)["train"]
    written = [turn for record in CONVERSATIONS * 9 for turn in conversation_turns(record["messages"])]
    source = Trained(rows, vocabulary, "pretraining")
    whole = "".join(texts(source, 0, rows.count))
    in_parts = "".join(text for first in range(0, rows.count, 3)
                       for text in texts(source, first, min(rows.count, first + 3)))
    assert in_parts == whole
    end = next(character for character in whole if character not in "".join(written))
    assert "".join(written)[: len(whole) // 2] == whole.replace(end, "")[: len(whole) // 2]
    assert "".join(written).startswith(whole.replace(end, "")[:-20])
