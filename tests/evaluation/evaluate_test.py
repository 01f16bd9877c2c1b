"""`t5x eval`: against the plain computation of every candidate, through interruptions, and after slips."""

import hashlib
import importlib.util
import io
import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from scipy import stats

from codellm_jax import cli
from codellm_jax.configuration import build, read_configuration
from codellm_jax.evaluation import evaluate, trained
from codellm_jax.evaluation.compare import NotMeasured, compare, table
from codellm_jax.evaluation.cuts import fitted
from codellm_jax.evaluation.decoding import Generation
from codellm_jax.evaluation.scoring import Scores
from codellm_jax.model.decoder import Decoder
from codellm_jax.results import tables
from codellm_jax.results.answers import corpus_bleu
from codellm_jax.results.files import as_lines, lines_written, read_result
from codellm_jax.results.statistics import holm, sign_flips
from codellm_jax.runtime.checkpoints import restore_parameters
from codellm_jax.runtime.partitioning import make_mesh
from codellm_jax.runtime.process import alone_in
from codellm_jax.runtime.progress import read_records
from codellm_jax.runtime.state import abstract_state
from codellm_jax.vocabulary import load_vocabulary
from tasks.benchmarks.judging import Benchmarks
from tasks.benchmarks.loading import load
from tasks.benchmarks.metrics import bleu_of_counts
from tasks.programs.sandbox import guarantees

_spec = importlib.util.spec_from_file_location("planted", Path(__file__).parent.parent / "planted.py")
assert _spec and _spec.loader
planted = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(planted)

LENGTH = 32
TASKS = ["logic", "cosqa", "ekar_cot"]


@pytest.fixture(scope="module")
def run_dir(pretrained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated") / "CODE"
    shutil.copytree(pretrained / "CODE", folder)
    return folder


def flags(run_dir: Path, *more: str) -> list[str]:
    return ["eval", "--gin_file=gin/eval.gin", f"--gin.CHECKPOINT_PATH={run_dir}", f"--gin.TASKS={TASKS}", *more]


@pytest.fixture(scope="module")
def evaluated(run_dir):
    assert cli.main(flags(run_dir)) == 0
    return run_dir / "results"


def read(folder: Path, task: str) -> tuple[dict, list[dict]]:
    lines = [json.loads(line) for line in (folder / f"{task}_sample.jsonl").read_text().splitlines()]
    return json.loads((folder / f"{task}_sample.json").read_text()), lines


@pytest.fixture(scope="module")
def plainly(run_dir):
    """Log-likelihoods of a continuation's tokens, one sequence at a time, all logits at once."""
    checkpoint = build(read_configuration(["gin/eval.gin"], [("CHECKPOINT_PATH", str(run_dir))]), "checkpoint")
    model = Decoder(checkpoint.model(vocabulary_size=checkpoint.vocabulary.size, length=LENGTH))
    abstract = abstract_state(model, optax.identity(), make_mesh(checkpoint.mesh), checkpoint.mesh)
    params, _ = restore_parameters(str(run_dir), abstract.params)
    variables = {"params": jax.tree.map(jnp.asarray, jax.device_get(params))}
    positions, segments = jnp.arange(LENGTH)[None], jnp.ones((1, LENGTH), jnp.int32)
    apply = jax.jit(lambda tokens: model.apply(
        variables, model.apply(variables, tokens, positions, segments), method="logits"))

    def log_likelihoods(prompt: list[int], continuation: list[int]) -> np.ndarray:
        tokens = [*prompt, *continuation][-(LENGTH + 1):]
        inputs = np.zeros((1, LENGTH), np.int32)
        inputs[0, : len(tokens) - 1] = tokens[:-1]  # what follows cannot be seen
        logits = np.asarray(apply(inputs), np.float64)[0]
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        return logits[np.arange(len(tokens) - 1), tokens[1:]][-len(continuation):]

    return checkpoint.vocabulary, log_likelihoods


@pytest.mark.parametrize("task", TASKS)
def test_every_candidate_is_scored_as_the_plain_computation_does(evaluated, plainly, task):
    vocabulary, log_likelihoods = plainly
    result, (header, *lines) = read(evaluated, task)
    questions = load(task, None).questions
    assert [line["id"] for line in lines] == [question.id for question in questions]
    for question, line in zip(questions, lines, strict=True):
        whole = [tuple(map(vocabulary.encode, candidate)) for candidate in question.candidates]
        for (prompt, continuation), kept, found in zip(whole, fitted(whole, LENGTH), line["candidates"], strict=True):
            values = log_likelihoods(kept.prompt, kept.continuation)
            assert found["tokens"] == len(kept.continuation)
            assert found["prompt_tokens_cut"] == len(prompt) - len(kept.prompt)
            assert found["continuation_tokens_cut"] == len(continuation) - len(kept.continuation)
            assert found["log_likelihood"] == pytest.approx(values.sum(), rel=1e-5)
        losses = [-candidate["log_likelihood"] / candidate["tokens"] for candidate in line["candidates"]]
        assert not line["tied"]  # candidates are told apart, however short the model
        assert line["prediction"] == int(np.argmin(losses)) and line["answer"] == question.answer[0]
        assert line["correct"] == (line["prediction"] == line["answer"])
    assert result["value"] == np.mean([line["correct"] for line in lines]) == result["accuracy_by_scoring"]["per_token"]


def test_a_result_says_what_it_is(evaluated):
    result, (header, *lines) = read(evaluated, "logic")
    assert result["sample"] is True and result["n"] == len(lines) and result["metric"] == "accuracy"
    assert result["checkpoint"]["step"] == 4 and result["checkpoint"]["arm"] == "CODE"
    assert result["interval"][0] <= result["value"] <= result["interval"][1]
    assert result["chance"] == 0.25 and 0 < result["majority"] <= 1
    assert set(result["accuracy_by_scoring"]) == set(evaluate.SCORINGS)
    assert {name: result[name] for name in header if name != "digest"} == {
        name: header[name] for name in header if name != "digest"}
    assert result["settings"]["data"] == load("logic", None).sha256
    # Of the right answers, from the candidates as they stand in the lines.
    losses = [[-one["log_likelihood"] / one["tokens"] for one in line["candidates"]] for line in lines]
    margins = [min(of[:line["answer"]] + of[line["answer"] + 1:]) - of[line["answer"]]
               for of, line in zip(losses, lines, strict=True)]
    shares = [math.exp(-of[line["answer"]]) / sum(math.exp(-loss) for loss in of)
              for of, line in zip(losses, lines, strict=True)]
    bits = [-line["candidates"][line["answer"]]["log_likelihood"] / math.log(2)
            / line["candidates"][line["answer"]]["bytes"] for line in lines]
    for name, values in (("bits_per_byte", bits), ("margin", margins), ("probability", shares)):
        measure = result["measures"][name]
        assert measure["value"] == pytest.approx(np.mean(values)) and measure["n"] == len(lines)
        assert measure["interval"][0] < measure["value"] < measure["interval"][1]


def test_a_score_at_chance_shows_what_was_scored(evaluated, capsys):
    result, (_, *lines) = read(evaluated, "logic")
    assert result["chance_p_value"] >= 0.05  # four steps of training
    question, vocabulary = load("logic", None).questions[0], load_vocabulary("python_8k")
    assert len(result["raw_outputs"]) == 3
    chosen = fitted([tuple(map(vocabulary.encode, candidate)) for candidate in question.candidates], LENGTH)[
        lines[0]["prediction"]]
    assert chosen.continuation_tokens_cut and chosen.prompt_tokens_cut
    for text in (question.id, repr(vocabulary.decode(chosen.prompt)), repr(vocabulary.decode(chosen.continuation)),
                 f"{lines[0]['candidates'][lines[0]['prediction']]['log_likelihood']:.3f} nats"):
        assert text in result["raw_outputs"][0]
    result = dict(result, prompts_cut=0, continuations_cut=0)
    right = dict(result, value=1.0, chance_p_value=0.001)
    right.pop("raw_outputs")
    assert len(tables.table_rows(right).splitlines()) == 2 and "not distinguishable" not in tables.table_rows(right)
    assert len(tables.table_rows(result).splitlines()) == 5


def test_a_subset_is_the_same_whoever_asks(evaluated, run_dir, tmp_path):
    assert cli.main(flags(run_dir, "--gin.QUESTIONS=3", f"--gin.evaluate.results_dir={tmp_path}")) == 0
    (_, all_lines), (part, lines) = read(evaluated, "cosqa"), read(tmp_path, "cosqa")
    assert part["n"] == 3 and len(lines) == 4
    ids = [line["id"] for line in all_lines[1:]]
    assert sorted([line["id"] for line in lines[1:]], key=ids.index) == [line["id"] for line in lines[1:]]
    by_id = {line["id"]: line for line in all_lines[1:]}
    for line in lines[1:]:
        for found, wanted in zip(line["candidates"], by_id[line["id"]]["candidates"], strict=True):
            assert found["log_likelihood"] == pytest.approx(wanted["log_likelihood"], rel=1e-5)
    assert read(evaluated, "cosqa")[0]["settings"]["questions"] != part["settings"]["questions"]


@pytest.mark.slow
def test_benchmarks_are_asked_while_training(tiny_flags, tmp_path, capsys):
    """With the scores that the same checkpoint gets afterwards, through a resume, and under other questions."""
    arguments = ["train", *tiny_flags, f"--gin.MODEL_DIR={tmp_path}/run", "--gin.TRAIN_STEPS=4", "--gin.EVAL_PERIOD=2",
                 "--gin.CHECKPOINT_PERIOD=2", "--gin.EVAL_TASKS=['logic', 'cosqa']", "--gin.EVAL_QUESTIONS=3"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "benchmarks   logic (sample) 3, cosqa (sample) 3 questions, every 2 steps" in printed
    assert "benchmarks after step 4, in per cent: logic_sample " in printed
    evaluations = [line for line in read_records(str(tmp_path / "run")) if line["split"] == "eval"]
    assert [line["step"] for line in evaluations] == [0, 2, 4]
    assert cli.main(["eval", "--gin_file=gin/eval.gin", f"--gin.CHECKPOINT_PATH={tmp_path}/run",
                     "--gin.TASKS=['logic', 'cosqa']", "--gin.QUESTIONS=3"]) == 0
    for task in ("logic", "cosqa"):
        (afterwards, lines), (then, lines_then) = (
            read(tmp_path / "run" / "results" / folder, task) for folder in ("", "in_training/4"))
        assert evaluations[-1][f"score/{task}_sample"] == afterwards["value"] == then["value"]
        for measure in ("bits_per_byte", "margin", "probability"):
            assert evaluations[-1][f"answer_{measure}/{task}_sample"] == then["measures"][measure]["value"]
        assert [line["id"] for line in lines[1:]] == [line["id"] for line in lines_then[1:]]
        for line, line_then in zip(lines[1:], lines_then[1:], strict=True):
            assert [c["log_likelihood"] for c in line["candidates"]] == pytest.approx(
                [c["log_likelihood"] for c in line_then["candidates"]], rel=1e-5)
    # What is asked may change at a resume: it changes nothing of what is trained.
    (tmp_path / "run" / "checkpoints" / "4").rename(tmp_path / "gone")
    arguments[-2:] = ["--gin.EVAL_TASKS=['ekar']", "--gin.benchmarks.template=multiple_choice"]
    assert cli.main(arguments) == 0, capsys.readouterr().err
    again = [line for line in read_records(str(tmp_path / "run")) if line["split"] == "eval"]
    assert [line["step"] for line in again] == [0, 2, 4] and again[-1]["loss"] == evaluations[-1]["loss"]
    assert "score/ekar_sample" in again[-1] and "score/logic_sample" not in again[-1]
    assert [path.name for path in (tmp_path / "run" / "results" / "in_training" / "4").glob("*.json")] == [
        "ekar_sample.json"]
    assert cli.main([*arguments, f"--gin.MODEL_DIR={tmp_path}/other", "--gin.EVAL_TASKS=['logik']"]) == 1
    assert "There is no benchmark 'logik'" in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_results_of_another_checkpoint_at_the_same_step_are_not_gone_on_from(evaluated, run_dir, pretrained, tmp_path):
    """As where a run was begun anew in the same directory, and evaluated again."""
    shutil.copytree(run_dir, tmp_path / "run")
    assert cli.main(flags(tmp_path / "run", "--gin.TASKS=['cosqa']")) == 0
    first = read(tmp_path / "run" / "results", "cosqa")[1]
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    shutil.copytree(pretrained / "NL" / "checkpoints", tmp_path / "run" / "checkpoints")
    assert cli.main(flags(tmp_path / "run", "--gin.TASKS=['cosqa']")) == 0
    again = read(tmp_path / "run" / "results", "cosqa")[1]
    assert first[0] != again[0] and first[1]["candidates"][0] != again[1]["candidates"][0]


def test_an_interrupted_evaluation_goes_on(evaluated, run_dir, tmp_path, monkeypatch):
    shutil.copytree(run_dir, tmp_path / "run")
    # Results name the run they are of, so that a copy's are its own.
    assert cli.main(flags(tmp_path / "run")) == 0
    whole = (tmp_path / "run" / "results" / "cosqa_sample.jsonl").read_text()
    lines = whole.splitlines()
    started = [{key: value for key, value in json.loads(line).items() if key not in ("prediction", "tied", "correct")}
               for line in lines[:4]]
    (tmp_path / "run" / "results" / "cosqa_sample.jsonl").write_text(
        as_lines(started) + lines[4][:20])
    (tmp_path / "run" / "results" / "cosqa_sample.json").unlink()
    scored: list = []
    real = evaluate._scored
    monkeypatch.setattr(evaluate, "_scored", lambda questions, *rest: scored.extend(questions) or real(
        questions, *rest))
    assert cli.main(flags(tmp_path / "run", "--gin.TASKS=['cosqa']")) == 0
    assert len(scored) == len(lines) - 4  # a header and three questions were whole
    again = (tmp_path / "run" / "results" / "cosqa_sample.jsonl").read_text().splitlines()
    for found, wanted in zip(map(json.loads, again), map(json.loads, lines), strict=True):
        assert found.get("prediction") == wanted.get("prediction") and found.keys() == wanted.keys()
    # While the first new line is made, the old ones lie on the disk: a kill then loses none.
    path = tmp_path / "run" / "results" / "cosqa_sample.jsonl"
    path.write_text(as_lines(started))
    on_disk = []
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "_scored", lambda *rest: on_disk.append(path.read_text()) or real(*rest))
        assert cli.main(flags(tmp_path / "run", "--gin.TASKS=['cosqa']")) == 0
    assert on_disk[0] == as_lines(started)
    # Under other settings all questions are scored again.
    scored.clear()
    assert cli.main(flags(tmp_path / "run", "--gin.TASKS=['cosqa']", "--gin.SCORING=sum")) == 0
    assert len(scored) == len(lines) - 1


@pytest.mark.parametrize("cut", ["inside a character", "at a line separator of Unicode"])
def test_lines_that_a_kill_cut_anywhere_are_gone_on_from(tmp_path, cut):
    header, lines = {"settings": {}, "checkpoint": {}}, [{"id": "a\u2028b\x85"}, {"id": "世"}, {"id": "界"}]
    whole = as_lines([header, *lines]).encode()
    path = epath.Path(tmp_path / "task.jsonl")
    path.write_bytes(whole[: whole.index("界".encode()) + 1] if cut == "inside a character" else whole)
    assert lines_written(path, header) == (lines[:2] if cut == "inside a character" else lines)
    assert lines_written(path, header | {"settings": {"other": 1}}) == []


@pytest.mark.parametrize("old, new", [
    ("-1.25", "-1.26"), ('"answer": 0', '"answer": null'), ('"id": "2", ', ""), (', "digest": ', ', "other": ')])
def test_lines_end_before_the_first_that_differs_from_what_was_written(tmp_path, old, new):
    header = {"settings": {}, "checkpoint": {}}
    lines = [{"id": str(number), "answer": number % 2, "values": {0: -1.25, 10: float(number)}} for number in range(4)]
    text = as_lines([header, *lines]).splitlines()
    path = epath.Path(tmp_path / "task.jsonl")
    path.write_text("\n".join([*text[:3], text[3].replace(old, new), *text[4:]]))
    assert lines_written(path, header) == json.loads(json.dumps(lines[:2]))
    # Earlier versions wrote no digests.
    path.write_text("\n".join(map(json.dumps, [header, *lines])))
    assert lines_written(path, header) == json.loads(json.dumps(lines))


def test_another_model_of_the_same_arrays_is_asked_again(run_dir, tmp_path):
    arguments = flags(run_dir, "--gin.TASKS=['logic']", f"--gin.evaluate.results_dir={tmp_path}")
    assert cli.main(arguments) == 0
    exact = read(tmp_path, "logic")[1]
    assert cli.main([*arguments, "--gin.model.dtype=bfloat16"]) == 0
    rounded = read(tmp_path, "logic")[1]
    assert [line["candidates"] for line in exact[1:]] != [line["candidates"] for line in rounded[1:]]
    # Cut short under other settings, a task has no result that its lines do not bear out.
    (tmp_path / "logic_sample.jsonl").write_text("".join(
        json.dumps(line) + "\n" for line in [rounded[0], *rounded[1:2]]))
    for run in ("A", "B"):
        shutil.copytree(tmp_path, tmp_path / run / "results", ignore=shutil.ignore_patterns("A", "B"))
    with pytest.raises(ValueError, match="logic_sample of .*A: its lines do not match its result"):
        compare(str(tmp_path / "A"), str(tmp_path / "B"))


def test_a_prompt_too_long_leaves_room_for_its_answer(run_dir, tmp_path, capsys):
    assert cli.main(flags(run_dir, "--gin.TASKS=['dureader']", f"--gin.evaluate.results_dir={tmp_path}")) == 0
    result, (_, *lines) = read(tmp_path, "dureader")
    vocabulary = build(read_configuration(["gin/eval.gin"], [("CHECKPOINT_PATH", str(run_dir))]), "vocabulary")
    for question, line in zip(load("dureader", None).questions, lines, strict=True):
        tokens = len(vocabulary.encode(question.prompt))
        assert tokens > LENGTH and line["prompt_tokens_cut"] == tokens - (LENGTH + 1 - LENGTH // 2)
        if line["reasons"] == ["length"]:
            # Bytes that are no text may become fewer tokens when they are read again, hardly one.
            assert len(vocabulary.encode(line["texts"][0])) > 1
    assert f"{result['n']} prompts were too long and were truncated at the beginning" in capsys.readouterr().out
    # Of fewer questions each is answered as it was: an answer does not depend on where its question stands.
    assert cli.main(flags(run_dir, "--gin.TASKS=['dureader']", "--gin.QUESTIONS=2", "--gin.SEED=1",
                          f"--gin.evaluate.results_dir={tmp_path}/some")) == 0
    assert cli.main(flags(run_dir, "--gin.TASKS=['dureader']", "--gin.SEED=1",
                          f"--gin.evaluate.results_dir={tmp_path}/all")) == 0
    some, everything = (read(tmp_path / folder, "dureader")[1][1:] for folder in ("some", "all"))
    texts = {line["id"]: line["texts"] for line in everything}
    assert len(some) == 2 and some[0]["id"] != everything[0]["id"]
    assert [line["texts"] for line in some] == [texts[line["id"]] for line in some]


def test_a_judge_that_fails_leaves_the_other_tasks(run_dir, tmp_path, capsys, monkeypatch):
    """On a terminal that knows no Chinese: the error is one line at the end, and the status tells of it."""
    def fails(*arguments):
        raise ValueError("第一个 test\nis no Python")

    monkeypatch.setattr(Benchmarks, "judge", fails)
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        status = cli.main(flags(run_dir, "--gin.TASKS=['dureader', 'logic']", "--gin.sampling.max_new_tokens=4",
                                f"--gin.evaluate.results_dir={tmp_path}"))
    assert status == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("t5x eval: error: 1 of 2 tasks failed: dureader: the answers are written to")
    terminal.flush()
    printed = terminal.buffer.getvalue().decode("latin-1")
    assert "dureader                     failed: " in printed and "\\u7b2c" in printed and "logic (sample)" in printed
    assert read(tmp_path, "logic")[0]["n"] == len(load("logic", None).questions)
    assert not (tmp_path / "dureader_sample.json").exists() and (tmp_path / "dureader_sample.jsonl").exists()


def test_written_answers_are_judged(run_dir, tmp_path, monkeypatch, capsys):
    """The model's own are nonsense; two answers are put in their place, one of them right."""
    written = trained.generate
    prompts = load("mbpp", None).questions
    right = {prompt.prompt: prompt.references[0] for prompt in prompts[:2]}

    def knowing(params, config, prompts, *rest, **options):
        generations = written(params, config, prompts, *rest, **options)
        encode = vocabulary.encode
        for number, prompt in enumerate(prompts):
            text = right.get(vocabulary.decode(prompt))
            if text and number % 2 == 0:
                generations[number] = generations[number]._replace(ids=encode(text))
        return generations

    vocabulary = build(read_configuration(["gin/eval.gin"], [("CHECKPOINT_PATH", str(run_dir))]), "vocabulary")
    monkeypatch.setattr(trained, "generate", knowing)
    more = ["--gin.TASKS=['mbpp', 'dureader']", "--gin.SAMPLES=2", "--gin.sampling.max_new_tokens=8",
            f"--gin.evaluate.results_dir={tmp_path}",
            # What runs here is our own, so that a host that cannot confine it will do.
            f"--gin.benchmarks.unconfined={not all(guarantees().values())}"]
    assert cli.main(flags(run_dir, *more)) == 0, capsys.readouterr().err
    result, (header, *lines) = read(tmp_path, "mbpp")
    assert header["settings"]["samples"] == 2 and header["settings"]["sampling"]["top_k"] == 3
    assert [line["pass@1"] for line in lines] == [0.5, 0.5] + [0.0] * (len(lines) - 2)  # one of two samples
    assert [line["notes"][0] for line in lines[:2]] == ["passed"] * 2 and lines[2]["notes"][0] != "passed"
    assert result["metric"] == "pass@1" and result["value"] == pytest.approx(1 / len(lines))
    assert result["interval"][0] <= result["value"] <= result["interval"][1]
    assert {"pass@1", "bleu", "bleu_sacrebleu", "bleu_released"} == set(result["scores"])
    assert all(result["scores"][name]["value"] > 0 for name in ("bleu", "bleu_sacrebleu"))
    # The lines bear BLEU out, as a report needs it.
    counts = np.sum([line["bleu_counts"] for line in lines], axis=0)
    assert 100 * corpus_bleu(counts) == pytest.approx(result["scores"]["bleu"]["value"]) == bleu_of_counts(counts)
    result, lines = read(tmp_path, "dureader")
    assert {"f1", "exact_match"} == set(result["scores"]) and result["value"] == pytest.approx(
        np.mean([line["f1"] for line in lines[1:]]))
    printed = capsys.readouterr().out
    assert "mbpp (sample) pass@1" in printed and "dureader (sample) f1" in printed
    # A run is no better than itself, whether answers are right or wrong or in between.
    runs = [tmp_path / "A", tmp_path / "B"]
    for run in runs:
        shutil.copytree(tmp_path, run / "results", ignore=shutil.ignore_patterns("A", "B"))
    assert [(one.task, one.second - one.first, one.p_value) for one in compare(*map(str, runs))] == [
        ("dureader_sample", 0, 1), ("mbpp_sample", 0, 1)]
    # Written again, it is the same: nothing is left to do, and the seed decides.
    first = (tmp_path / "dureader_sample.jsonl").read_text()
    (tmp_path / "dureader_sample.jsonl").unlink()
    assert cli.main(flags(run_dir, *more)) == 0
    assert (tmp_path / "dureader_sample.jsonl").read_text() == first


def test_candidates_and_answers_stand_behind_their_prompts(run_dir, tmp_path, other_vocabularies):
    """Of a vocabulary that puts a space before a text: no candidate begins with it, and no answer loses its own."""
    llama, requests = load_vocabulary(other_vocabularies["llama"]), []
    asked = build(read_configuration(["gin/eval.gin"], [
        ("CHECKPOINT_PATH", str(run_dir)), ("TASKS", "['ekar_cot', 'dureader']")]), "evaluate").evaluation

    def score(scored, batch_tokens):
        requests.extend(scored)
        return [Scores(np.zeros(len(one.continuation), np.float32), np.zeros(len(one.continuation), bool))
                for one in scored]

    answer = llama.encode("value\n  x")[len(llama.encode("value\n")) :]
    model = SimpleNamespace(
        vocabulary=llama, config=SimpleNamespace(length=100, dtype="float32", activation="gelu"), score=score,
        write=lambda prompts, *rest, **options: [Generation(answer, "end", 0) for _ in prompts])
    loaded = asked.load()
    evaluate.ask(asked, loaded, model, {"step": 0}, str(tmp_path), lambda line: None, progress=False)
    candidates = [candidate for question in loaded[0].questions for candidate in question.candidates]
    _, (_, *lines) = read(tmp_path, "ekar_cot")
    cut = 0
    for candidate, request, scored in zip(
            candidates, requests, (one for line in lines for one in line["candidates"]), strict=True):
        ids = request.continuation[: scored["tokens"]]
        text, expected = llama.decode_after(request.prompt, ids), candidate.continuation
        cut += scored["continuation_tokens_cut"] > 0
        assert text == expected or scored["continuation_tokens_cut"] and expected.startswith(text.rstrip("\ufffd"))
        assert scored["bytes"] == sum(len(llama.bytes_of_ids()[token]) for token in ids) <= len(expected.encode())
    assert 0 < cut < len(candidates)
    assert {text for line in read(tmp_path, "dureader")[1][1:] for text in line["texts"]} == {"  x"}


def test_runs_are_compared_in_pairs(evaluated, run_dir, pretrained, tmp_path, capsys):
    shutil.copytree(pretrained / "NL", tmp_path / "NL")
    assert cli.main(flags(tmp_path / "NL", "--gin.TASKS=['logic', 'cosqa']")) == 0
    capsys.readouterr()
    assert cli.main(["compare", str(run_dir), str(tmp_path / "NL")]) == 0
    printed = capsys.readouterr().out
    for task in ("logic", "cosqa"):
        right = [[line["correct"] == 1 for line in read(folder, task)[1][1:]]
                 for folder in (evaluated, tmp_path / "NL" / "results")]
        only = [sum(a and not b for a, b in zip(*pair, strict=True)) for pair in (right, right[::-1])]
        n = sum(only)
        p_value = min(1.0, 2 * sum(math.comb(n, k) for k in range(min(only) + 1)) / 2**n)
        row = next(line.split() for line in printed.splitlines() if line.startswith(f"{task}_sample"))
        assert [int(row[1]), float(row[2]), float(row[3])] == [
            len(right[0]), *(round(100 * np.mean(each), 2) for each in right)]
        assert [int(row[8]), int(row[9]), float(row[10])] == [*only, round(p_value, 4)]
    assert "ekar" not in printed
    assert cli.main(flags(tmp_path / "NL", "--gin.TASKS=['logic', 'cosqa']", "--gin.TEMPLATE=paper")) == 0
    capsys.readouterr()
    assert cli.main(["compare", str(run_dir), str(tmp_path / "NL")]) == 1
    assert "cosqa_sample: the questions of" in capsys.readouterr().err
    assert cli.main(["compare", str(run_dir), str(tmp_path)]) == 1
    assert "No results in" in capsys.readouterr().err


def test_ties_are_compared_in_part_or_not_at_all(tmp_path):
    """Where most questions of a run are ties nothing is told; fewer count, and McNemar's test does not fit them."""
    for run, ties in (("A", {"logic": 0, "cosqa": 0, "ekar": 3}), ("B", {"logic": 12, "cosqa": 11, "ekar": 0})):
        for task, tied in ties.items():
            planted.write_task(tmp_path / run, task, 22, 0.0, "NL", ties=tied)
    found = {one.task: one for one in compare(str(tmp_path / "A"), str(tmp_path / "B"))}
    assert found["logic"] == NotMeasured("logic", 22, (0, 12))
    for task, ties in (("cosqa", (0, 11)), ("ekar", (3, 0))):
        one = found[task]
        values = [[line["correct"] for line in json.loads("[" + ",".join(
            (tmp_path / run / "results" / f"{task}.jsonl").read_text().splitlines()[1:]) + "]")] for run in "AB"]
        assert one.ties == ties and one.only_first is None
        assert (one.first, one.second) == pytest.approx(tuple(np.mean(values, axis=1)))
        assert one.p_value == sign_flips(values[1], values[0])
    # Holm's correction is for the two that were compared.
    smaller = min(found["cosqa"].p_value, found["ekar"].p_value)
    assert min(found["cosqa"].corrected, found["ekar"].corrected) == pytest.approx(min(1, 2 * smaller))
    printed = table(list(found.values()), "A", "B").splitlines()
    assert next(line for line in printed if line.startswith("logic")).split(maxsplit=2)[2] == (
        "not measured: most questions are ties, 0 in A and 12 in B")
    assert "  ties, which count 1 / k: 3 in A and 0 in B" in printed and printed[-1].endswith("for 2 tasks.")


def test_measures_of_the_right_answer_are_compared(tmp_path):
    """Of results without the new keys, from their lines; of two tasks, so that Holm's correction is of two."""
    for run, skill in (("A", 0.0), ("B", 1.0)):
        for task in ("logic", "cosqa", "mbpp"):
            planted.write_task(tmp_path / run, task, 120, skill, "NL", settings={"scoring": "per_byte"})
    assert "measures" not in json.loads((tmp_path / "A" / "results" / "logic.json").read_text())
    # In one question of run B the right answer costs 2 nats more.
    path = tmp_path / "B" / "results" / "logic.jsonl"
    header, first, *rest = path.read_text().splitlines()
    line = json.loads(first)
    line["candidates"][line["answer"]]["log_likelihood"] -= 2
    path.write_text(as_lines([line if text is first else json.loads(text) for text in (header, first, *rest)]))
    found = {one.task: one for one in compare(str(tmp_path / "A"), str(tmp_path / "B"))}
    assert found["mbpp"].measures == ()
    bits, margin, probability = found["logic"].measures
    assert (bits.name, bits.unit, bits.n) == ("bits_per_byte", "bits per byte", 120)
    assert (margin.unit, probability.unit) == ("nats per byte", "")
    lines = {run: [json.loads(text) for text in (
        tmp_path / run / "results" / "logic.jsonl").read_text().splitlines()[1:]] for run in "AB"}
    sizes = {run: np.array([-line["candidates"][line["answer"]]["log_likelihood"] / 9 / math.log(2)
                            for line in of_run]) for run, of_run in lines.items()}
    assert (bits.first, bits.second) == pytest.approx((sizes["A"].mean(), sizes["B"].mean()))
    paired = stats.ttest_rel(sizes["B"], sizes["A"])
    assert bits.found.difference == pytest.approx(bits.second - bits.first)
    assert bits.found.p_value == pytest.approx(paired.pvalue)
    assert bits.found.interval == pytest.approx(tuple(paired.confidence_interval()))
    # In a planted line the candidate that is chosen has 1 nat less than the others, which are 9 bytes each.
    margins = {run: np.array([1 / 9 if line["correct"] else -1 / 9 for line in lines[run]]) for run in "AB"}
    margins["B"][0] -= 2 / 9
    assert (margin.first, margin.second) == pytest.approx((margins["A"].mean(), margins["B"].mean()))
    for number, name in enumerate(("bits_per_byte", "margin", "probability")):
        of_tasks = [found[task].measures[number] for task in ("logic", "cosqa")]
        assert [of.corrected for of in of_tasks] == holm([of.found.p_value for of in of_tasks])
        assert [of.name for of in of_tasks] == [name, name]
    printed = table(list(found.values()), "A", "B").splitlines()
    at = next(number for number, row in enumerate(printed) if row.startswith("logic"))
    assert printed[at + 1].split()[:7] == ["bits", "per", "byte", "120", f"{bits.first:.3f}", f"{bits.second:.3f}",
                                           f"{bits.found.difference:+.3f}"]
    assert printed[at + 2].startswith("  margin, nats per byte") and printed[at + 3].startswith("  probability")
    assert printed[-1].endswith("for 3 tasks.")


def test_results_of_other_versions_are_not_compared(tmp_path):
    for run, version in (("A", 2), ("B", 3)):
        planted.write_task(tmp_path / run, "logic", 22, 0.0, "NL", settings={"version": version})
    with pytest.raises(ValueError, match="logic: the version of .* differ"):
        compare(str(tmp_path / "A"), str(tmp_path / "B"))
    # An earlier version took the first of those that tie.
    path = tmp_path / "A" / "results" / "logic.json"
    path.write_text(json.dumps(read_result(epath.Path(path)) | {"ties": 4}))
    with pytest.raises(ValueError, match="logic of .*A: its lines do not match its result"):
        compare(str(tmp_path / "A"), str(tmp_path / "B"))


@pytest.mark.parametrize("more, message", [
    (["--gin.TASKS=['logik']"], "logic"), (["--gin.SCORING=best"], "SCORING must be one of per_token, sum"),
    (["--gin.TASKS=logic"], "TASKS must be"), (["--gin.TASKS=[]"], "TASKS is empty"),
    (["--gin.QUESTIONS=0"], "QUESTIONS, or EVAL_QUESTIONS, must be at least 1"),
    (["--gin.TASKS=['logic', ['x']]"], "TASKS must be of type"),
    (["--gin.TEMPLATE={'logik': 'paper'}"], "TEMPLATE names 'logik'"), (["--gin.DATA_DIR=/nowhere"], "/nowhere"),
    (["--gin.TEMPLATE=released_"], "released"), (["--gin.CHECKPOINT_PATH=nowhere"], "name the MODEL_DIR of a run"),
    (["--gin.SAMPLES=0"], "SAMPLES must be at least 1"), (["--gin.SEED=-1"], "SEED must be a whole number from 0"),
    (["--gin.sampling.top_p=2.0"], "top_p must be above 0 and at most 1")])
def test_slips_get_one_line(capsys, run_dir, more, message):
    assert cli.main(flags(run_dir, *more)) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0], lines


def test_two_evaluations_of_a_task_at_once_are_refused_in_one_line(capsys, run_dir, tmp_path):
    """Before a question is asked; those of other tasks are not in the way."""
    results = [f"--gin.evaluate.results_dir={tmp_path}"]
    with alone_in(str(tmp_path), part="cosqa_sample"):
        assert cli.main(flags(run_dir, *results)) == 1
        lines = capsys.readouterr().err.strip().splitlines()
        assert lines == [f"t5x eval: error: Another process is evaluating cosqa_sample in {tmp_path}: wait for it, or "
                         "use another evaluate.results_dir."]
        assert not list(tmp_path.glob("*.json*"))
        assert cli.main(flags(run_dir, *results, "--gin.TASKS=['logic']")) == 0


# ---- Files of questions ------------------------------------------------------------------------


def write_lines(path: Path, *records: dict) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_files_of_questions(run_dir, tmp_path, capsys, monkeypatch):
    """Choices and numbers of files of one's own, asked as any benchmark is, compared, and gone on from."""
    monkeypatch.chdir(tmp_path)
    choices = write_lines(tmp_path / "my-questions.jsonl", *(
        {"question": f"{number}?", "choices": ["no", "yes", "perhaps"], "answer": "ABC"[number % 3]}
        for number in range(9)))
    write_lines(tmp_path / "sums.jsonl", {"stem": "3 + 4?", "answer": "#### 7"}, {"stem": "2 + 2?", "answer": "#### 4"})
    more = ["--gin.TASKS=['my-questions.jsonl', 'sums', 'logic']", "--gin.FEW_SHOT=1",
            "--gin.sampling.max_new_tokens=4",
            "--gin.BENCHMARKS={'sums': {'file': 'sums.jsonl', 'fields': {'question': 'stem'}}}"]
    for results in ("A/results", "B/results"):
        assert cli.main(flags(run_dir, *more, f"--gin.evaluate.results_dir={tmp_path}/{results}")) == 0
    printed = capsys.readouterr().out
    assert "my_questions" in printed and "sums exact_match" in printed
    folder = tmp_path / "A" / "results"
    assert sorted(path.name for path in folder.iterdir()) == [
        "logic_sample.json", "logic_sample.jsonl", "my_questions.json", "my_questions.jsonl", "sums.json", "sums.jsonl"]
    result = json.loads((folder / "my_questions.json").read_text())
    assert (result["n"], result["chance"], result["sample"]) == (9, pytest.approx(1 / 3), False)
    assert result["interval"][0] <= result["value"] <= result["interval"][1]
    assert result["files"] == [str(choices)] and result["settings"]["few_shot"] == 1
    assert result["settings"]["data"] == hashlib.sha256(choices.read_bytes()).hexdigest()
    numbers = json.loads((folder / "sums.json").read_text())
    assert numbers["metric"] == "exact_match" and "GSM8K" in numbers["rule"]
    assert {one.task for one in compare(str(tmp_path / "A"), str(tmp_path / "B"))} == {
        "my_questions", "sums", "logic_sample"}
    # Asked again there is nothing to do; of other questions under the same name, all of it.
    before = (folder / "my_questions.jsonl").stat().st_mtime_ns, (folder / "my_questions.jsonl").read_text()
    write_lines(choices, {"question": "9?", "choices": ["no", "yes"], "answer": 1})
    assert cli.main(flags(run_dir, *more[:1], *more[2:], f"--gin.evaluate.results_dir={folder}")) == 0
    assert json.loads((folder / "my_questions.json").read_text())["n"] == 1
    assert (folder / "my_questions.jsonl").read_text() != before[1]


def test_files_that_are_refused_before_a_model_is_loaded(run_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "trained_model", lambda *_: pytest.fail("a model is loaded"))
    broken = write_lines(tmp_path / "q.jsonl", {"question": "1?", "choices": ["no", "yes"]})
    assert cli.main(flags(run_dir, f"--gin.TASKS=['logic', '{broken}']")) == 1
    assert f"error: {broken}, line 1: there is no 'answer', only 'question', 'choices'; if " in capsys.readouterr().err
    record = {"question": "1?", "choices": ["no", "yes"], "answer": 1}
    files = [str(write_lines(tmp_path / folder / "q.jsonl", record)) for folder in ("a", "b")]
    assert cli.main(flags(run_dir, f"--gin.TASKS={files}")) == 1
    assert "error: TASKS names two files of one name, 'q': give one of them another name by" in capsys.readouterr().err
    assert not (run_dir / "results" / "q.json").exists()


def test_files_of_questions_while_training(run_dir, tmp_path):
    """EVAL_TASKS takes them in every stage."""
    path = write_lines(tmp_path / "q.jsonl", {"stem": "1?", "choices": ["no", "yes"], "answer": 1})
    asked = [("EVAL_TASKS", "['mine', 'logic']"),
             ("BENCHMARKS", str({"mine": {"file": str(path), "fields": {"question": "stem"}}}))]
    start = [("MODEL_DIR", str(tmp_path)), ("INITIAL_CHECKPOINT_PATH", str(run_dir))]
    for file, more in (("gin/mixed_pretrain.gin", []), ("gin/tune.gin", start), ("gin/continue_pretrain.gin", start)):
        evaluation = build(read_configuration([file], asked + more), "evaluation")
        assert [one.name for one in evaluation.load()] == ["mine", "logic"]
