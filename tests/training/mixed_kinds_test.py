"""Pre-training on documents and instructions in one mix: its loss, ledger, kills, branches, and the command."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import tasks
from codellm_jax import cli
from codellm_jax.model.decoder import Decoder, output_head
from codellm_jax.runtime.checkpoints import newest_record
from codellm_jax.runtime.progress import read_records
from codellm_jax.runtime.state import initial_state
from codellm_jax.training.plan import Training, describe, make_plan
from codellm_jax.training.train import batch_of_step, train

STEPS = 6


@pytest.fixture(scope="module")
def corpora(tmp_path_factory, tiny_corpora):
    folder = tmp_path_factory.mktemp("mixed")
    chat = [{"messages": [
        {"role": "user", "content": f"Which row is {number}?"}, {"role": "assistant", "content": f"Row {number}."},
        {"role": "user", "content": "And then?"}, {"role": "assistant", "content": f"Row {number + 1}."}]}
        for number in range(60)]
    (folder / "chat.jsonl").write_text("".join(json.dumps(record) + "\n" for record in chat))
    asked = [{"input": f"Add {number}.", "target": f"x + {number}\n"} for number in range(200)]
    (folder / "asked.json").write_text(json.dumps(asked))
    return tiny_corpora | {
        "text.chat": {"instructions": str(folder / "chat.jsonl"), "holdout": 0.2, "loss": "answers"},
        "code.asked": {"instructions": str(folder / "asked.json"), "holdout": 0.2}}


@pytest.fixture(scope="module")
def mixed(make_training, corpora) -> Training:
    return make_training(name=list(corpora), definitions=tasks.Definitions(corpora=corpora), code_rate=0.5,
                         train_steps=STEPS, eval_period=3, checkpoint_period=2, keep_last=10)


@pytest.fixture(scope="module")
def trained(mixed):
    return train(mixed)


def losses(run: str) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_records(run) if line["split"] == "train"}


def rows_as_told(training: Training, step: int) -> list[tuple[list[int], list[bool], list[int], str]]:
    """Of each row of a step its ids, which count, the documents they are of, and its source; out of the cache."""
    plan, end, within = make_plan(training), training.vocabulary.end_of_document_id, 1 << 30
    order = plan.mixture.order
    draw = order.draw(np.arange(step * training.batch_size, (step + 1) * training.batch_size))
    found = []
    for source, row in zip(draw.source.tolist(), draw.row.tolist(), strict=True):
        ids, counts, of, document = [], [], [], 0
        for number in plan.mixture.training[source].read(np.array([row]))[0].tolist():
            token = number if number >= 0 else -number - 1
            ids.append(token - within if token >= within else token)
            counts.append(number >= 0)
            of.append(document)
            document += token == end
        found.append((ids, counts, of, order.sources[source].name))
    return found


def test_the_loss_of_a_step_is_that_of_a_slow_count(mixed, trained):
    """Each document of each row by itself, without masks, in float64 from the logits on."""
    plan = make_plan(mixed)
    model = Decoder(plan.model.config)
    with jax.set_mesh(plan.mesh):
        params = jax.device_get(initial_state(plan.model, plan.optimizer, plan.state, mixed.seed).params)
    apply = jax.jit(model.apply)
    length = mixed.mixture.length
    total, tokens, by_source = 0.0, 0, {}
    for ids, counts, of, name in rows_as_told(mixed, 0):
        for document in sorted(set(of[:-1])):
            here = [place for place in range(length) if of[place] == document]
            inputs = np.zeros((1, length), np.int32)  # what stands behind changes nothing before it
            inputs[0, : len(here)] = [ids[place] for place in here]
            hidden = apply({"params": params}, inputs, np.arange(length)[None], np.ones_like(inputs))
            logits = np.asarray(hidden[0] @ output_head(params).T, np.float64)
            for column, place in enumerate(here):
                if counts[place + 1]:
                    loss = np.log(np.exp(logits[column]).sum()) - logits[column, ids[place + 1]]
                    total, tokens = total + loss, tokens + 1
                    by_source[name] = by_source.get(name, 0) + 1
    first = next(line for line in read_records(mixed.model_dir) if line["split"] == "train")
    assert first["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert first["tokens"] == tokens < mixed.batch_size * length
    for name, count in by_source.items():
        assert first[f"token_fraction/{name}"] == pytest.approx(count / tokens)


def test_the_ledger_counts_what_the_loss_counts(mixed, trained):
    expected = dict.fromkeys(trained.ledger.tokens, 0)
    for step in range(STEPS):
        for _, counts, _, name in rows_as_told(mixed, step):
            expected[name] += sum(counts[1:])
    assert trained.ledger.tokens == expected and trained.ledger.conversations
    for name, rows in trained.ledger.rows.items():
        assert rows and (expected[name] == rows * 32) == (name != "text.chat")
    provenance = json.loads((Path(mixed.model_dir) / "provenance.json").read_text())
    assert provenance["ledger"]["tokens"] == expected and set(provenance["data"]) == set(expected)


def test_held_out_losses_are_of_what_counts(mixed, trained):
    evaluated = [line for line in read_records(mixed.model_dir) if line["split"] == "eval"]
    counted = sum((rows.read(np.arange(min(8, rows.count)))[:, 1:] >= 0).sum()
                  for rows in make_plan(mixed).mixture.validation if rows)
    assert [line["tokens"] for line in evaluated] == [counted] * 3
    assert {"loss/text.chat", "loss/code.asked", "loss/text.tiny"} <= evaluated[0].keys()
    # Bytes of the tokens that count, one by one; a pool's are those of its sources together.
    pieces, nats, sizes = mixed.vocabulary.bytes_of_ids(), 0.0, 0
    for rows in make_plan(mixed).mixture.validation:
        counts = [number & ((1 << 30) - 1) for row in rows.read(np.arange(min(8, rows.count))).tolist()
                  for number in row[1:] if number >= 0]
        size, loss = sum(len(pieces[token]) for token in counts), evaluated[1][f"loss/{rows.name}"] * len(counts)
        assert evaluated[1][f"bits_per_byte/{rows.name}"] == pytest.approx(loss / np.log(2) / size)
        if rows.name.startswith("text."):
            nats, sizes = nats + loss, sizes + size
    assert evaluated[1]["bits_per_byte/text"] == pytest.approx(nats / np.log(2) / sizes)


def test_the_plan_says_what_stands_where(mixed):
    page = describe(mixed, make_plan(mixed))
    [chat] = [rows for rows in make_plan(mixed).mixture.training if rows.name == "text.chat"]
    assert (f"text.chat: {chat.documents} instructions are mixed with the documents; the loss counts their answers, "
            f"{chat.tokens - chat.uncounted:,} of {chat.tokens:,} tokens.") in page
    assert "instructions are mixed with the documents; the loss counts all of their " in page
    assert f"text.chat: {chat.documents} of {chat.documents} examples are conversations" in page


def test_a_killed_run_goes_on_as_if_it_had_not_been(mixed, trained, tmp_path):
    copy = dataclasses.replace(mixed, model_dir=str(tmp_path / "run"))
    shutil.copytree(mixed.model_dir, copy.model_dir)
    for step in (4, 6):  # as a kill after step 3 leaves it
        shutil.rmtree(Path(copy.model_dir) / "checkpoints" / str(step))
    run = train(copy)
    assert losses(copy.model_dir) == losses(mixed.model_dir) and run.ledger == trained.ledger
    assert newest_record(copy.model_dir)[1]["checksums"] == newest_record(mixed.model_dir)[1]["checksums"]


@pytest.mark.slow
def test_a_branch_adds_instructions_to_its_trunk(make_training, corpora, tiny_corpora, tmp_path):
    """What both have is read on from where the trunk stopped, what is new from its first row."""
    trunk = make_training(name=list(tiny_corpora), definitions=tasks.Definitions(corpora=corpora), code_rate=0.5,
                          train_steps=4, keep_steps=[3], checkpoint_period=100)
    train(trunk)
    branch = dataclasses.replace(
        trunk, mixture=dataclasses.replace(trunk.mixture, name=list(corpora)), keep_steps=(), train_steps=9,
        branch_from=f"{trunk.model_dir}@3", model_dir=str(tmp_path / "branch"))
    run = train(branch)
    orders = [make_plan(training).mixture.order for training in (trunk, branch)]
    seen: dict[str, list[tuple[int, int]]] = {}
    for order, begin, end in zip(orders, (0, 24), (24, 72), strict=True):
        for source, epoch, row in zip(*(part.tolist() for part in order.draw(np.arange(begin, end))), strict=True):
            seen.setdefault(order.sources[source].name, []).append((epoch, row))
    sizes = {source.name: source.rows for source in orders[1].sources}
    assert set(seen) == set(corpora)
    for name, drawn in seen.items():
        for start in range(0, len(drawn), sizes[name]):
            epoch = drawn[start : start + sizes[name]]
            assert len({row for _, row in epoch}) == len(epoch) and {e for e, _ in epoch} == {start // sizes[name]}
    assert run.ledger.conversations and run.ledger.before[0]["step"] == 3 and not run.ledger.before[0]["conversations"]


def test_a_step_of_prompts_alone_is_no_mistake(make_training, tmp_path):
    """Nothing is counted, no loss is measured, and the parameters stay finite."""
    (tmp_path / "asked.json").write_text(json.dumps([{"input": "a row " * 200, "target": "x"}] * 4))
    corpora = {"text.asked": {"instructions": str(tmp_path / "asked.json"), "holdout": 0, "loss": "answers"}}
    training = make_training(name="text.asked", definitions=tasks.Definitions(corpora=corpora), code_rate=0.0,
                             batch_size=8, train_steps=8, cache_dir=str(tmp_path))
    run = train(training)
    lines = [line for line in read_records(training.model_dir) if line["split"] == "train"]
    empty = [line for line in lines if line["loss"] is None]
    counted = [float(np.asarray(batch_of_step(training, run.plan, step)[0].weights).sum()) for step in range(8)]
    assert [line["step"] for line in empty] == [step + 1 for step, count in enumerate(counted) if not count] != []
    assert all(line["grad_norm"] == 0.0 for line in empty) and lines[-1]["tokens"] == sum(counted)


@pytest.mark.slow
def test_the_shipped_file_goes_on_from_a_trunk(tmp_path, capsys):
    small = ["--gin.model.layers=2", "--gin.model.hidden=32", "--gin.model.heads=2", "--gin.model.feedforward=64",
             "--gin.TASK_FEATURE_LENGTHS={'targets': 64}", "--gin.WARMUP_STEPS=1", "--gin.LOG_PERIOD=1"]
    trunk, branch = tmp_path / "trunk", tmp_path / "branch"
    assert cli.main(["train", "--gin_file=gin/mixed_pretrain.gin", *small, f"--gin.MODEL_DIR={trunk}",
                     "--gin.TRAIN_STEPS=4", "--gin.KEEP_STEPS=[2]"]) == 0, capsys.readouterr().err
    assert cli.main(["train", "--gin_file=gin/midtrain.gin", *small, f"--gin.MODEL_DIR={branch}",
                     "--gin.TRAIN_STEPS=6", f"--gin.BRANCH_FROM={trunk}@2"]) == 0, capsys.readouterr().err
    ledger = newest_record(str(branch))[1]["ledger"]
    assert ledger["stage"] == "pretraining" and ledger["branch"]["step"] == 2
    assert {name for name, rows in ledger["rows"].items() if rows} == {
        "text.python", "code.python", "text.python_instructions", "code.python_instructions"}
    assert ledger["before"][0]["rows"].keys() == {"text.python", "code.python"}
