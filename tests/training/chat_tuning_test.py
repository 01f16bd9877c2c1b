"""Tuning on conversations: what the loss counts, by hand, through the command, packed and not, killed and resumed."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from chat_templates import CHATML, QWEN_3, write_folder

import tasks
from codellm_jax import chat, cli
from codellm_jax.evaluation.decoding import Piece
from codellm_jax.mixture import shards
from codellm_jax.mixture.examples import ids_of
from codellm_jax.mixture.overlap import Trained, texts
from codellm_jax.mixture.places import cache_place
from codellm_jax.mixture.rows import cached_rows
from codellm_jax.runtime.checkpoints import newest_record
from codellm_jax.runtime.progress import read_records
from codellm_jax.training.plan import describe, make_plan
from codellm_jax.training.train import batch_of_step, train
from codellm_jax.vocabulary import load_vocabulary
from tasks.instruction_sets.prompts import alpaca_prompt

ANSWERS = [["1"], ["2", "no"], ["yes", "x = 1", "the row"]]
LENGTH = 200


def conversations() -> list[dict]:
    return [{"messages": [message for number, answer in enumerate(answers) for message in (
        {"role": "user", "content": f"Q{number} {len(answers)}?"}, {"role": "assistant", "content": answer})]}
        for answers in ANSWERS]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    file = tmp_path_factory.mktemp("chat") / "chat.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in conversations()))
    return {"text.chat": {"instructions": str(file), "holdout": 0}}


@pytest.fixture(scope="module")
def chatml(tmp_path_factory):
    """As of Qwen's base models: a turn ends with <|im_end|>, a document with another token."""
    return load_vocabulary(write_folder(tmp_path_factory.mktemp("words") / "chatml", CHATML))


@pytest.fixture(scope="module")
def make(make_training, corpora):
    def made(**overrides):
        return make_training(**({
            "stage": "tuning", "name": "text.chat", "definitions": tasks.Definitions(corpora=corpora),
            "code_rate": 0.0, "batch_size": 24, "train_steps": 2, "lengths": {"targets": LENGTH}} | overrides))

    return made


def by_hand(vocabulary) -> list[list[tuple[int, bool]]]:
    """The tokens of each conversation, and which of them count, put together piece by piece."""
    def pieces(answers: list[str]):
        for number, answer in enumerate(answers):
            asked = f"Q{number} {len(answers)}?"
            if vocabulary.chat_template is None:
                prompt = alpaca_prompt(asked) if number == 0 else f"\n\n### Instruction:\n{asked}\n\n### Response:"
                yield vocabulary.encode(prompt), False
                yield [*vocabulary.encode(answer), vocabulary.end_of_document_id], True
                continue
            special = dict(vocabulary.special_tokens)
            start, end = special["<|im_start|>"], special["<|im_end|>"]
            before = "system\nYou are a helpful assistant."
            yield [start, *vocabulary.encode(before), end, *vocabulary.encode("\n")] if number == 0 else [], False
            yield [start, *vocabulary.encode(f"user\n{asked}"), end, *vocabulary.encode("\n")], False
            yield [start, *vocabulary.encode("assistant\n")], False
            yield [*vocabulary.encode(answer), end], True
            yield vocabulary.encode("\n"), False

    return [[(token, counts) for ids, counts in pieces(answers) for token in ids] for answers in ANSWERS]


@pytest.mark.parametrize("templated", [True, False])
@pytest.mark.parametrize("packing", [True, False])
def test_the_loss_counts_answers_alone(make, chatml, templated, packing):
    training = make(packing=packing, **({"vocabulary": chatml} if templated else {}))
    plan = make_plan(training)
    expected = by_hand(training.vocabulary)
    batch, _ = batch_of_step(training, plan, 0)  # each eight times
    found = []
    for arrays in zip(*(np.asarray(array) for array in batch), strict=True):
        inputs, targets, positions, segments, weights, _ = arrays
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            assert positions[here].tolist() == list(range(here.sum()))
            found.append([(int(inputs[here][0]), False), *(
                (token, weight == 1) for token, weight in zip(targets[here].tolist(), weights[here], strict=True))])
            assert inputs[here][1:].tolist() == targets[here][:-1].tolist()
    assert sorted(found) == sorted(expected * 8)


@pytest.mark.slow
@pytest.mark.parametrize("templated", [True, False])
def test_the_ledger_counts_answers_alone(make, chatml, templated):
    training = make(**({"vocabulary": chatml} if templated else {}))
    run = train(training)
    counted = sum(counts for tokens in by_hand(training.vocabulary) for _, counts in tokens)
    assert run.ledger.tokens == {"text.chat": 16 * counted} and run.ledger.rows == {"text.chat": 48}
    trained = [line for line in read_records(training.model_dir) if line["split"] == "train"]
    assert trained[-1]["tokens"] == 16 * counted
    assert run.ledger.conversations and newest_record(training.model_dir)[1]["ledger"]["conversations"]


@pytest.mark.slow
def test_packed_and_unpacked_runs_have_the_same_losses(make, chatml):
    runs = [train(make(vocabulary=chatml, packing=packing)) for packing in (True, False)]
    assert runs[0].plan.rows < runs[1].plan.rows == 24 and runs[0].ledger == runs[1].ledger
    for packed, alone in zip(*(read_records(run.training.model_dir) for run in runs), strict=True):
        assert packed["loss"] == pytest.approx(alone["loss"], rel=1e-4)


def test_what_is_cut_and_left_out(make):
    """Rows that end within the first prompt, an answer, and what stands between answers."""
    expected = by_hand(load_vocabulary("python_8k"))
    first = [[counts for _, counts in tokens].index(True) for tokens in expected]
    for length in (first[1] - 1, first[1], first[1] + 4, first[1] + 10):
        training = make(lengths={"targets": length})
        if length + 1 <= min(first):
            with pytest.raises(ValueError, match="of 3 none has a token of its target"):
                make_plan(training)
            continue
        [rows] = make_plan(training).mixture.training
        left = [tokens[: length + 1] for tokens in expected if any(counts for _, counts in tokens[: length + 1])]
        assert rows.count == len(left) and rows.left_out == 3 - len(left)
        assert rows.cut == sum(len(tokens) > length + 1 for tokens in expected)
        for row, tokens in zip(rows.read(np.arange(rows.count)), left, strict=True):
            *cached, prompt, size = row.tolist()
            assert ids_of(row[:size]).tolist() == [token for token, _ in tokens]
            assert [k >= prompt and cached[k] >= 0 for k in range(size)] == [counts for _, counts in tokens]


def test_conversations_that_a_template_refuses_are_told(make, tmp_path):
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('No system.') }}{% endif %}" + CHATML
    words = load_vocabulary(write_folder(tmp_path / "words", template, eos_token="<|im_end|>"))
    records = conversations()
    records[1]["messages"].insert(0, {"role": "system", "content": "Be brief."})
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    definitions = tasks.Definitions(corpora={"text.chat": {"instructions": str(file), "holdout": 0}})
    training = make(vocabulary=words, definitions=definitions)
    printed = describe(training, make_plan(training))
    assert ("text.chat, read for train: conversations skipped: 1 refused by the chat template: No system "
            f"(first: {file}, line 2).") in printed
    assert "text.chat: 2 of 2 examples are conversations, in the vocabulary's chat template." in printed
    assert describe(training, make_plan(training)) == printed  # from the cache, too
    file.write_text(json.dumps(records[1]) + "\n")
    with pytest.raises(ValueError, match=r"text.chat: no example[^:]*\. \(.*refused by the chat template: No system"):
        make_plan(make(vocabulary=words, definitions=definitions))


def test_a_template_that_forgets_makes_several_examples(make, tmp_path):
    words = load_vocabulary(write_folder(tmp_path / "words", QWEN_3, eos_token="<|im_end|>"))
    [rows] = make_plan(make(vocabulary=words)).mixture.training
    assert rows.count == rows.documents == rows.conversations == 6  # one for each answer
    end, found = dict(words.special_tokens)["<|im_end|>"], []
    for row in rows.read(np.arange(6)):
        *_, prompt, size = row.tolist()
        counted = [token for token in row[prompt:size].tolist() if token >= 0]
        assert counted[-1] == end and counted.count(end) == 1
        found.append(words.decode(counted).removeprefix("<think>\n\n</think>\n\n"))
    assert found == [answer for answers in ANSWERS for answer in answers]


def test_rows_depend_on_the_template_where_there_is_one(corpora, tmp_path):
    definitions = tasks.Definitions(corpora=corpora)

    def place(words):
        return cache_place("text.chat", definitions, words, LENGTH, str(tmp_path), "tuning")

    places = [place(load_vocabulary(write_folder(tmp_path / "words", template, **names)))
              for template in (CHATML, CHATML.replace("helpful", "brief")) for names in ({}, {"unk_token": "<s>"})]
    assert len({found.directory for found in places}) == 4
    assert set(place(load_vocabulary("python_8k")).key) == {
        "version", "task", "definition", "length", "vocabulary", "end_of_document_id", "examples"}


def test_rows_are_the_same_by_shards(tmp_path, monkeypatch):
    """As of many processes: files each by itself, some with conversations that the template refuses."""
    template = "{% if messages[0].content == 'Q0 2?' %}{{ raise_exception('Two.') }}{% endif %}" + CHATML
    words = load_vocabulary(write_folder(tmp_path / "words", template))
    for number in range(3):
        lines = [json.dumps(record) for record in conversations() * (number + 1)]
        lines.append(json.dumps({"instruction": f"Say {number}.", "output": "It."}))
        (tmp_path / f"{number}.jsonl").write_text("\n".join(lines))
    corpora = {"text.chat": {"instructions": f"{tmp_path}/*.jsonl", "holdout": 0.2}}
    definitions, found = tasks.Definitions(corpora=corpora), {}
    monkeypatch.setattr(shards, "SHARD_BYTES", 1)
    for way in ("alone", "shards"):
        place = cache_place("text.chat", definitions, words, LENGTH, str(tmp_path / way), "tuning")
        if way == "shards":
            build = shards.Build("text.chat", definitions, words, LENGTH, "tuning", place)
            planned = shards.plan(build)
            for shard in planned:
                shards.tokenize(build, shard)
            pieces = shards.pieces(build, planned)
            for piece in pieces:
                shards.cut(build, piece)
            shards.finish(build, planned, pieces)
        rows = cached_rows("text.chat", definitions, words, LENGTH, str(tmp_path / way), lambda line: None, "tuning")
        found[way] = {split: (each.count, each.content_hash, each.conversations, each.notes)
                      for split, each in rows.items()}
    assert found["alone"] == found["shards"]
    assert sum(split[2] for split in found["alone"].values()) == 12 and sum(
        split[0] for split in found["alone"].values()) == 15
    [note] = [note for split in found["alone"].values() for note in split[3] if "refused" in note]
    assert f"6 refused by the chat template: Two (first: {tmp_path}/0.jsonl, line 2)" in note


def test_questions_are_found_in_every_turn(corpora, chatml, tmp_path):
    rows = cached_rows("text.chat", tasks.Definitions(corpora=corpora), chatml, LENGTH, str(tmp_path),
                       lambda line: None, "tuning")["train"]
    text = " ".join(texts(Trained(rows, chatml, "tuning"), 0, rows.count))
    for record in conversations():
        for message in record["messages"]:
            assert message["content"] in text


# ---- Through the commands -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flags(tiny_tuning_flags, corpora, chatml):
    """Of `t5x train`: a micro model tuned from new parameters; MODEL_DIR is the test's."""
    return ["train", "--gin_file=gin/tune_text.gin", "--gin.INITIAL_CHECKPOINT_PATH=None", *tiny_tuning_flags,
            f"--gin.CORPORA={corpora}", "--gin.MIXTURE_OR_TASK_NAME=text.chat", f"--gin.VOCABULARY={chatml.path}",
            f"--gin.TASK_FEATURE_LENGTHS={{'targets': {LENGTH}}}", "--gin.model.layers=1", "--gin.model.hidden=32",
            "--gin.model.heads=2", "--gin.model.feedforward=64", "--gin.BATCH_SIZE=8", "--gin.TRAIN_STEPS=30",
            "--gin.CHECKPOINT_PERIOD=5", "--gin.LOG_PERIOD=1"]


@pytest.fixture(scope="module")
def tuned(flags, tmp_path_factory) -> Path:
    model_dir = tmp_path_factory.mktemp("tuned") / "run"
    assert cli.main([*flags, f"--gin.MODEL_DIR={model_dir}"]) == 0
    return model_dir


def answers(tuned: Path, folder: Path, records: list[dict], *more: str) -> list[dict]:
    (folder / "asked.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert cli.main(["infer", "--gin_file=gin/infer.gin", f"--gin.CHECKPOINT_PATH={tuned}",
                     f"--prompts={folder}/asked.jsonl", f"--output={folder}/out.jsonl",
                     "--gin.sampling.max_new_tokens=3", *more]) == 0
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def test_a_tuned_run_is_asked_as_it_was_tuned(tuned, tmp_path):
    messages = conversations()[1]["messages"][:3]
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    asked = f"{system}<|im_start|>user\nQ0 2?<|im_end|>\n<|im_start|>assistant\n"
    [line] = answers(tuned, tmp_path, [{"messages": messages}])
    assert line["prompt"] == f"{asked}2<|im_end|>\n<|im_start|>user\nQ1 2?<|im_end|>\n<|im_start|>assistant\n"
    lines = answers(tuned, tmp_path, [{"prompt": "Q0 2?"}, {"instruction": "Q0", "input": "2?"}], "--instruction")
    assert [line["prompt"] for line in lines] == [asked, asked.replace("Q0 2?", "Q0\n\n2?")]
    [line] = answers(tuned, tmp_path, [{"prompt": "Q0 2?"}])
    assert line["prompt"] == "Q0 2?"


def test_a_run_tuned_on_instructions_alone_keeps_their_prompt(flags, chatml, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"instruction": f"Q{n}?", "output": "1"} for n in range(8)]))
    corpora = {"text.chat": {"instructions": f"{tmp_path}/a.json", "holdout": 0}}
    assert cli.main([*flags, f"--gin.CORPORA={corpora}", f"--gin.MODEL_DIR={tmp_path}/run", "--gin.TRAIN_STEPS=3"]) == 0
    assert newest_record(str(tmp_path / "run"))[1]["ledger"]["conversations"] is False
    [line, other] = answers(tmp_path / "run", tmp_path, [
        {"prompt": "Q0?"}, {"messages": [{"role": "user", "content": "Q0?"}]}], "--instruction")
    assert line["prompt"] == other["prompt"] == alpaca_prompt("Q0?")


@pytest.mark.parametrize("record, message", [
    ({"messages": []}, "the last message must be a user's"),
    ({"messages": conversations()[0]["messages"]}, "the last message must be a user's"),
    ({"messages": [{"role": "user"}]}, "has a message that is not of the form"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "has a message that is not of the form"),
    ({"messages": "Q0?"}, "must be a JSON object such as")])
def test_messages_that_cannot_be_answered(tuned, tmp_path, capsys, record, message):
    (tmp_path / "asked.jsonl").write_text(json.dumps(record) + "\n")
    assert cli.main(["infer", "--gin_file=gin/infer.gin", f"--gin.CHECKPOINT_PATH={tuned}",
                     f"--prompts={tmp_path}/asked.jsonl"]) == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "asked.jsonl, line 1" in line and message in line


def test_an_answer_ends_where_its_turn_ends(tuned, chatml, tmp_path, monkeypatch):
    from codellm_jax.evaluation import trained

    given = {}

    def stream(*rest, **options):
        given.update(options)
        return iter([Piece(0, chatml.encode("1"), "end")])

    words = dict(chatml.special_tokens)
    monkeypatch.setattr(trained, "stream", stream)
    [line] = answers(tuned, tmp_path, [{"messages": conversations()[0]["messages"][:1]}])
    assert line["text"] == "1" and given["stop_ids"] == {words["</s>"], words["<|im_end|>"]}


def test_the_harness_asks_as_the_run_was_tuned(tuned, chatml):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    from codellm_jax.evaluation.harness import CodellmJax

    harness = CodellmJax(checkpoint=str(tuned))
    messages = [{"role": "user", "content": "<|im_end|>?"}]
    text = harness.apply_chat_template(messages)
    assert text == chat.prompt_text(chatml, messages) and harness.chat_template(True) == CHATML
    prompt, continuation = harness._encode_pair(text, " yes")
    assert prompt == chat.prompt_tokens(chatml, messages) and continuation == chatml.encode(" yes")
    begun = harness.apply_chat_template([*messages, {"role": "assistant", "content": "It"}], False)
    assert begun == f"{text}It" and harness._encode_pair(begun, " is") == (
        [*prompt, *chatml.encode("It")], chatml.encode(" is"))
    assert harness._encode_pair("the row", " yes")[0] == chatml.encode("the row")
    odd = harness.apply_chat_template([{"role": "user", "content": "a\ud800"}])
    assert harness._encode_pair(odd, "\udfff")[1] == chatml.encode("\ufffd") and "a\ufffd" in odd
    harness._open.close()


@pytest.mark.slow
def test_killed_and_resumed(flags, tuned, tmp_path):
    def losses(model_dir: Path) -> dict[int, float]:
        return {line["step"]: line["loss"] for line in read_records(str(model_dir)) if line["split"] == "train"}

    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "codellm_jax.cli", *flags, f"--gin.MODEL_DIR={killed}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    try:
        while process.poll() is None and time.monotonic() < deadline:
            if (killed / "metrics.jsonl").exists() and len(losses(killed)) >= 8:
                break
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait(60)
    assert 8 <= len(losses(killed)) < 30
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert losses(killed) == losses(tuned) and len(losses(tuned)) == 30
    ledgers = [newest_record(str(folder))[1]["ledger"] for folder in (tuned, killed)]
    assert ledgers[0] == ledgers[1] and ledgers[0]["conversations"]
