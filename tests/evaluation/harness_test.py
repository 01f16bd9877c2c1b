"""lm-evaluation-harness asks our checkpoints; its scores against the plain computation, one sequence at a time."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries are imported, which would look for tasks' data elsewhere
pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from codellm_jax.evaluation.decoding import Generation  # noqa: E402
from codellm_jax.evaluation.harness import CodellmJax  # noqa: E402
from codellm_jax.evaluation.sampling import Sampling  # noqa: E402
from codellm_jax.evaluation.scoring import Scores  # noqa: E402
from codellm_jax.model.decoder import Decoder  # noqa: E402
from codellm_jax.vocabulary import load_vocabulary  # noqa: E402

LENGTH = 32
QUESTIONS = [
    {"question": "a row of tokens", "choices": ["is read", "is never lost", "learns from text"], "answer": 1},
    {"question": "one model", "choices": ["learns", "value = value * 3", "世界"], "answer": 0},
    {"question": "def function(value):\n    value", "choices": [" = value", "quota", "schedule"], "answer": 2}]


@pytest.fixture(scope="module")
def harness(pretrained) -> CodellmJax:
    model = get_model("codellm_jax").create_from_arg_string(
        f"checkpoint={pretrained / 'CODE'},answers_at_once=2", {"batch_size": 1})
    yield model
    model._open.close()


@pytest.fixture(scope="module")
def log_probabilities(harness):
    """Log-probabilities of all next tokens behind each token of a row: float64 [tokens, vocabulary]."""
    config, variables = harness._model.config, {"params": jax.device_get(harness._model.params)}
    model = Decoder(config)
    positions, segments = jnp.arange(LENGTH)[None], jnp.ones((1, LENGTH), jnp.int32)
    apply = jax.jit(lambda tokens: model.apply(
        variables, model.apply(variables, tokens, positions, segments), method="logits"))

    def of(tokens: list[int]) -> np.ndarray:
        row = np.zeros((1, LENGTH), np.int32)
        row[0, : len(tokens)] = tokens
        logits = np.asarray(apply(row), np.float64)[0, : len(tokens)]
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    return of


def expected(log_probabilities, prompt: list[int], continuation: list[int]) -> tuple[float, bool]:
    tokens = [*prompt, *continuation]
    values = log_probabilities(tokens[:-1])[-len(continuation):]
    return (float(values[np.arange(len(continuation)), continuation].sum()),
            bool((values.argmax(-1) == continuation).all()))


def ask(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


def test_log_likelihoods(harness, log_probabilities):
    encode = harness.tok_encode
    greedy_prompt = "the row"
    likeliest = int(log_probabilities(encode(greedy_prompt))[-1].argmax())
    pairs = [("a row of tokens", " is read"), ("a row of tokens", " is never lost"), ("", "schedule"),
             ("value = ", "value * 3"), (greedy_prompt, harness._model.vocabulary.decode([likeliest]))]
    found = harness.loglikelihood(ask("loglikelihood", *pairs))
    tokens = [(encode("a row of tokens"), encode(" is read")), (encode("a row of tokens"), encode(" is never lost")),
              ([harness.eot_token_id], encode("schedule")), (encode("value ="), encode(" value * 3"))]
    for (value, greedy), (prompt, continuation) in zip(found, tokens, strict=False):
        wanted, wanted_greedy = expected(log_probabilities, prompt, continuation)
        assert value == pytest.approx(wanted, rel=1e-5) and greedy is wanted_greedy
    whole = encode("".join(pairs[-1]))
    if whole[:-1] == encode(greedy_prompt):  # the harness tokenizes both together
        assert found[-1][1] is True


@pytest.mark.parametrize("prompt, continuation", [
    ("the row of tokens " * 20, " is read"), ("the row", " of tokens is read" * 20), ("", " of tokens is read" * 20)])
def test_what_is_too_long_is_cut_and_told(harness, log_probabilities, caplog, prompt, continuation):
    short = ("a row of tokens", " is read")
    [found, (other, _)] = harness.loglikelihood(ask("loglikelihood", (prompt, continuation), short))
    tokens = harness.tok_encode(prompt.rstrip()) or [harness.eot_token_id]
    scored = harness.tok_encode(prompt + continuation)[len(harness.tok_encode(prompt.rstrip())):][:LENGTH]
    wanted, greedy = expected(log_probabilities, tokens[-(LENGTH + 1 - len(scored)):], scored)
    assert found[0] == pytest.approx(wanted, rel=1e-5) and found[1] is greedy
    assert [other] == [value for value, _ in harness.loglikelihood(ask("loglikelihood", short))]
    lost = len(tokens) + len(scored) > LENGTH + 1
    assert [record.message.split(":")[0] for record in caplog.records if record.levelname == "WARNING"] == (
        ["1 of 2 prompts are truncated at the beginning"] * lost
        + ["1 of 2 continuations are truncated at the end"] * (len(continuation) > 100))


def test_what_is_empty(harness, log_probabilities):
    """Nothing before is an end of document, as the harness's other models have it; nothing to score is certain."""
    found = harness.loglikelihood(ask("loglikelihood", ("", ""), ("a row", ""), ("", "schedule"), ("  ", "schedule")))
    assert found[:2] == [(0.0, True)] * 2
    for (value, _), text in zip(found[2:], ("schedule", "  schedule"), strict=True):
        wanted, _ = expected(log_probabilities, [harness.eot_token_id], harness.tok_encode(text))
        assert value == pytest.approx(wanted, rel=1e-5)
    assert harness.loglikelihood([]) == [] and harness.loglikelihood_rolling(ask("loglikelihood_rolling", ("",))) == [0]
    [text] = harness.generate_until(ask("generate_until", ("", {"until": [], "max_gen_toks": 2})))
    assert isinstance(text, str)


def test_texts_begin_where_the_vocabulary_says_so(harness, log_probabilities, beginning_tokenizer, monkeypatch):
    """With and without a prompt, scored, whole and written, as by the harness's own model of Hugging Face."""
    own, plain = load_vocabulary(beginning_tokenizer), harness._model.vocabulary.encode
    monkeypatch.setattr(harness, "_model", harness._model._replace(vocabulary=own))
    assert harness.tok_encode("the row") == [0, *plain("the row")]
    assert harness.tok_encode("the row", add_special_tokens=False) == plain("the row")
    assert (harness.prefix_token_id, harness.eot_token_id) == (0, 1)
    found = harness.loglikelihood(ask("loglikelihood", ("a row of tokens", " is read"), ("", "schedule"), ("", "")))
    for (value, _), (prompt, continuation) in zip(found, [
            ([0, *plain("a row of tokens")], plain(" is read")), ([0], plain("schedule"))], strict=False):
        assert value == pytest.approx(expected(log_probabilities, prompt, continuation)[0], rel=1e-5)
    assert found[2] == (0.0, True)
    wanted, _ = expected(log_probabilities, [0], [0, *plain("the row")])
    assert harness.loglikelihood_rolling(ask("loglikelihood_rolling", ("the row",))) == pytest.approx([wanted])
    asked = []
    monkeypatch.setattr(type(harness._model), "write", lambda self, prompts, *rest, **options: (
        asked.extend(prompts) or [Generation([], "end", 0) for _ in prompts]))
    harness.generate_until(ask("generate_until", ("the row", {"until": []}), ("", {"until": []})))
    assert asked == [[0, *plain("the row")], [0]]


def test_a_continuation_within_the_prompts_last_token_is_scored_by_itself(harness, log_probabilities):
    whole = next(text for text in ("schedule", "tokens", "position") if len(harness.tok_encode(text)) == 1)
    [(value, _)] = harness.loglikelihood(ask("loglikelihood", (whole[:-1], whole[-1])))
    rest = harness.tok_encode(whole)[len(harness.tok_encode(whole[:-1])):]
    wanted, _ = expected(log_probabilities, harness.tok_encode(whole[:-1]), rest or harness.tok_encode(whole[-1]))
    assert value == pytest.approx(wanted, rel=1e-5) and value < 0


def test_text_that_utf_8_cannot_hold(harness):
    assert harness.tok_encode("a\ud800b") == harness.tok_encode("a\ufffdb")
    assert harness.tok_encode("\ud83d\ude00") == harness.tok_encode("\U0001f600")


def test_sums_are_of_64_bits(harness, monkeypatch):
    values = np.array([-(2.0**24), -1, -1], np.float32)  # of which float32 keeps the first alone
    monkeypatch.setattr(type(harness._model), "score", lambda self, requests, batch_tokens: [
        Scores(values, np.ones(3, bool)) for _ in requests])
    assert harness.loglikelihood(ask("loglikelihood", ("a", " b"))) == [(-(2.0**24) - 2, True)]
    assert harness.loglikelihood_rolling(ask("loglikelihood_rolling", ("a",))) == [-(2.0**24) - 2]


def test_what_is_drawn_depends_on_the_request_alone(harness):
    options = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    one, other = ("the row", options), ("a schedule", options)
    first, again, second = harness.generate_until(ask("generate_until", one, one, other))
    assert first != again  # as often as a task asks for samples
    assert harness.generate_until(ask("generate_until", other, one)) == [second, first]
    assert harness.generate_until(ask("generate_until", ("x", {"max_gen_toks": 1}), other, one, one)[1:]) == [
        second, first, again]


def test_the_prompt_of_tuning_as_chat_template(harness):
    from tasks.instruction_sets.prompts import alpaca_prompt

    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"},
                {"role": "assistant", "content": "2"}, {"role": "user", "content": "2 + 2?"}]
    prompt = alpaca_prompt("Be brief.\n\n1 + 1?\n\n2\n\n2 + 2?")
    assert harness.apply_chat_template(messages) == prompt
    begun = [*messages, {"role": "assistant", "content": " It is"}]
    assert harness.apply_chat_template(begun, add_generation_prompt=False) == f"{prompt} It is"
    assert harness.chat_template(True) == alpaca_prompt("{instruction}") and harness.chat_template(False) is None
    with pytest.raises(ValueError, match="there is no template 'llama'"):
        harness.chat_template("llama")


def test_a_text_longer_than_the_model_is_scored_in_windows(harness, log_probabilities):
    text = "a row of tokens is read by its number and never lost while one model learns from text and code " * 3
    tokens = harness.tok_encode(text)
    assert len(tokens) > 2 * LENGTH
    wanted, seen = 0.0, [harness.eot_token_id, *tokens]
    for end in range(1, len(seen), LENGTH):  # windows of the model's length, the last one reaching back
        stop = min(end + LENGTH, len(seen))
        start = stop - LENGTH - 1 if end > 1 else 0
        values = log_probabilities(seen[start : stop - 1])
        wanted += sum(values[i - 1 - start, seen[i]] for i in range(end, stop))
    assert harness.loglikelihood_rolling(ask("loglikelihood_rolling", (text,))) == pytest.approx([wanted], rel=1e-5)


def test_generation_is_greedy_and_stops(harness, log_probabilities):
    encode, decode = harness.tok_encode, harness._model.vocabulary.decode
    tokens = encode("the row")
    for _ in range(8):
        tokens.append(int(log_probabilities(tokens)[-1].argmax()))
    text = decode(tokens[len(encode("the row")):])
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    requests = ask("generate_until", ("the row", {"until": ["\0"], "max_gen_toks": 8}),
                   ("the row", {"until": [stop, "\0"], "max_gen_toks": 8}),
                   ("", {"until": "\0", "max_gen_toks": 2, "do_sample": True, "temperature": 0.7, "top_k": 5}))
    found = harness.generate_until(requests)
    assert found[0] == text and found[1] == text.split(stop)[0] and isinstance(found[2], str)
    with pytest.raises(ValueError, match="does not know the generation_kwargs num_beams"):
        harness.generate_until(ask("generate_until", ("x", {"num_beams": 3})))


def test_without_the_harness_it_is_said_how_to_get_it():
    hidden = ("import runpy, sys; sys.modules['lm_eval'] = None; "
              "runpy.run_module('codellm_jax.evaluation.harness', run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == "codellm_jax harness: error: lm_eval is not installed: pip install '.[harness]'."


def test_a_prompt_too_long_keeps_half_the_model_for_itself(harness, caplog):
    prompt = "the row of tokens " * 20
    [answer] = harness.generate_until(ask("generate_until", (prompt, {"until": [], "max_gen_toks": 1000})))
    kept = harness.tok_encode(prompt)[-(LENGTH + 1 - LENGTH // 2) :]
    [written] = harness._model.write([kept], [()], Sampling(temperature=0.0, max_new_tokens=1000), 0)
    assert answer == harness._model.vocabulary.decode(written.ids)
    assert "1 of 1 prompts are truncated at the beginning" in caplog.text


@pytest.mark.parametrize("arguments, message", [
    ("", "--model_args: codellm_jax needs checkpoint=FOLDER, a run directory."),
    ("checkpoint=/nowhere/at/all", "/nowhere/at/all"),
    ("checkpoint={run},vocabulry=x", "does not know 'vocabulry', only checkpoint, vocabulary, batch_tokens, "
                                     "answers_at_once; nearest: vocabulary."),
    ("checkpoint={run},batch_tokens=many", "batch_tokens must be a whole number, at least 1, found 'many'."),
    ("checkpoint={run},answers_at_once=0", "answers_at_once must be a whole number, at least 1, found 0."),
    ("checkpoint={run},vocabulary=/nowhere.model", "/nowhere.model")])
def test_a_users_mistake_is_one_line(pretrained, monkeypatch, arguments, message):
    from codellm_jax.evaluation import harness

    given = arguments.format(run=pretrained / "CODE")
    monkeypatch.setattr(harness, "cli_evaluate", lambda: get_model("codellm_jax").create_from_arg_string(given))
    with pytest.raises(SystemExit) as ended:
        harness.main()
    assert str(ended.value).startswith("codellm_jax harness: error: ") and message in str(ended.value)
    assert "\n" not in str(ended.value)


@pytest.mark.parametrize("options, sampling", [
    ({}, Sampling(temperature=0.0, max_new_tokens=256)), ({"max_new_tokens": 3}, Sampling(0.0, max_new_tokens=3)),
    ({"do_sample": False, "temperature": 0.5}, Sampling(0.0, max_new_tokens=256)),
    ({"temperature": 0.5}, Sampling(0.5, max_new_tokens=256)),
    ({"num_beams": 1, "max_completion_tokens": 7}, Sampling(0.0, max_new_tokens=7)),
    ({"do_sample": True, "top_k": 9, "top_p": 0.5}, Sampling(1.0, 9, 0.5, max_new_tokens=256))])
def test_options_of_tasks(options, sampling):
    from codellm_jax.evaluation import harness

    assert harness._sampling(options) == sampling


def write_tasks(folder):
    """A task of choices and one of writing, as YAML files in the harness's own form."""
    (folder / "data.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    head = (f"dataset_path: json\ndataset_kwargs:\n  data_files: {{test: {folder}/data.jsonl}}\n  cache_dir: "
            f"{folder}/cache\ntest_split: test\ndoc_to_text: '{{{{question}}}}'\n")
    (folder / "choose.yaml").write_text(
        f"task: choose\noutput_type: multiple_choice\n{head}doc_to_choice: choices\ndoc_to_target: answer\n"
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n")
    (folder / "write.yaml").write_text(
        f"task: write\noutput_type: generate_until\n{head}doc_to_target: '{{{{choices[0]}}}}'\n"
        "generation_kwargs: {until: ['\\n'], max_gen_toks: 4}\nmetric_list: [{metric: exact_match}]\n")


def test_tasks_in_the_prompt_of_tuning(harness, tmp_path, monkeypatch):
    from tasks.instruction_sets.prompts import alpaca_prompt

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    write_tasks(tmp_path)
    results = simple_evaluate(model=harness, tasks=["choose", "write"], log_samples=True, bootstrap_iters=0,
                              apply_chat_template=True,
                              task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False))
    for samples in results["samples"].values():
        for question, sample in zip(QUESTIONS, samples, strict=True):
            assert sample["arguments"][0][0] == alpaca_prompt(question["question"])


def test_tasks_of_the_harness(harness, log_probabilities, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    write_tasks(tmp_path)
    results = simple_evaluate(model=harness, tasks=["choose", "write"], log_samples=True, bootstrap_iters=0,
                              task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False))
    right, by_length = [], []
    for question, sample in zip(QUESTIONS, results["samples"]["choose"], strict=True):
        encode = harness.tok_encode
        context = encode(question["question"])
        values = []
        for choice in question["choices"]:
            whole = encode(f"{question['question']} {choice}")
            values.append(expected(log_probabilities, context, whole[len(context):])[0])
        assert [float(value) for value, _ in sample["filtered_resps"]] == pytest.approx(values, rel=1e-5)
        right.append(int(np.argmax(values)) == question["answer"])
        lengths = [len(choice) for choice in question["choices"]]
        by_length.append(int(np.argmax(np.array(values) / lengths)) == question["answer"])
    assert results["results"]["choose"]["acc,none"] == pytest.approx(np.mean(right))
    assert results["results"]["choose"]["acc_norm,none"] == pytest.approx(np.mean(by_length))
    assert results["results"]["write"]["exact_match,none"] == 0
    assert results["config"]["model"] is not None


def test_what_is_written_keeps_its_first_blanks(harness, monkeypatch, other_vocabularies):
    llama = load_vocabulary(other_vocabularies["llama"])
    written = [llama.encode("value\n  x")[len(llama.encode("value\n")) :], llama.encode("the row")]
    monkeypatch.setattr(harness, "_model", harness._model._replace(vocabulary=llama))
    monkeypatch.setattr(type(harness._model), "write", lambda model, prompts, *rest, **options: [
        Generation(ids, "end", 0) for ids in written])
    assert harness.generate_until(ask("generate_until", ("value\n", {}), ("value", {}))) == ["  x", " the row"]
