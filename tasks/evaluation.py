"""SeqIO tasks of the benchmarks: the prompt as `inputs`, and the scored or written text as `targets`.

`register(data_dir)` adds a task for each name of `tasks.benchmarks.loading`, with a split "test". A question with
candidates becomes an example for each of them, all with the question's number and the position of the right candidate,
so that the metric can regroup them: accuracy, by the mean log-likelihood of a candidate's tokens, whose sum
is the score that `seqio.Evaluator` is given; a tie of k candidates counts 1 / k. A question whose answer is written
becomes one, with the first reference as its targets and all of them as `references`; its metrics are those of
`benchmarks.judging`, and MBPP's programs are run where the sandbox can confine them. Neither feature gets an end token,
because a candidate's score is that of its own text.

Importing this module registers the package's sample items as `sample.NAME`, which cannot be mistaken for the
benchmarks, and their mixture as `sample.benchmarks`. `all_benchmarks(data_dir)` registers the benchmarks themselves.

The vocabulary in the task's `output_features` tokenizes, so that `task.replace(output_features=...)` selects another
one; the texts remain as `inputs_pretokenized` and `targets_pretokenized`. Each feature is tokenized by itself; this
package's own scoring joins prompt and continuation differently.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from codellm_jax.vocabulary import Vocabulary
from tasks import pretraining
from tasks.benchmarks import metrics
from tasks.benchmarks.judging import Benchmarks
from tasks.benchmarks.loading import BENCHMARKS, GENERATED, NO_SPECS, load
from tasks.benchmarks.questions import Loaded, Prompt, Question
from tasks.benchmarks.templates import RELEASED

SPLIT = "test"
SAMPLE_PREFIX = "sample."
MIXTURE = "benchmarks"  # of all of them

# The tasks that `register` added, to distinguish them from others.
_added: set[str] = set()


def output_features(path: str = pretraining.DEFAULT_VOCABULARY.path) -> dict[str, seqio.Feature]:
    """The features of an evaluation task, tokenized by a SentencePiece model file."""
    vocabulary = seqio.SentencePieceVocabulary(path)
    return {"inputs": seqio.Feature(vocabulary, add_eos=False), "targets": seqio.Feature(vocabulary, add_eos=False)}


def register(
    data_dir: str | None,
    template: str | Mapping[str, str] = RELEASED,
    few_shot: int = 0,
    seed: int = 0,
    prefix: str = "",
    specs: Mapping[str, Mapping[str, Any]] = NO_SPECS,
    vocabulary: Vocabulary = pretraining.DEFAULT_VOCABULARY,
) -> list[str]:
    """Registers every benchmark as a SeqIO task; reads only `specs`, other errors occur when a task is read.

    Registering again replaces earlier tasks, so the last arguments hold.

    Args:
      data_dir, template, few_shot, seed: as `tasks.benchmarks.loading.load` takes them. Tasks that lack the template,
        or whose prompt has its own examples, raise when they are read.
      prefix: before each name.
      specs: users' benchmarks, likewise. The files decide whether answers are written.
      vocabulary: the vocabulary that tokenizes them, of a SentencePiece file.

    Returns:
      The names registered.

    Raises:
      ValueError: a name is a task or mixture of another origin, or a user's file is invalid.
      OSError: such a file cannot be read.
    """
    written = {name: isinstance(load(name, None, specs=specs).questions[0], Prompt) for name in specs}
    generated = {benchmark: benchmark in GENERATED for benchmark in BENCHMARKS} | written
    names = [prefix + benchmark for benchmark in generated]
    for name in names:
        taken = name in seqio.TaskRegistry.names() or name in seqio.MixtureRegistry.names()
        if taken and name not in _added:
            raise ValueError(f"{name} is already another task; give the benchmarks a prefix.")
    for name, (benchmark, is_written) in zip(names, generated.items(), strict=True):
        read = functools.partial(load, benchmark, data_dir, template, few_shot, seed, specs)
        seqio.TaskRegistry.remove(name)
        seqio.TaskRegistry.add_provider(name, _task(name, read, is_written, vocabulary))
        _added.add(name)
    return names


def all_benchmarks(
    data_dir: str | None = None, vocabulary: Vocabulary = pretraining.DEFAULT_VOCABULARY, **options: Any
) -> str:
    """Registers every benchmark as `register` does, and returns the name of the SeqIO mixture of them, "benchmarks".

    Without `data_dir`, it is that of the package's sample items, "sample.benchmarks".
    """
    prefix = SAMPLE_PREFIX if data_dir is None else ""
    names = register(data_dir, prefix=prefix, vocabulary=vocabulary, **options)
    seqio.MixtureRegistry.remove(f"{prefix}{MIXTURE}")
    seqio.MixtureRegistry.add(f"{prefix}{MIXTURE}", names, default_rate=1)
    return f"{prefix}{MIXTURE}"


def one_benchmark(
    name: str, data_dir: str | None = None, vocabulary: Vocabulary = pretraining.DEFAULT_VOCABULARY, **options: Any
) -> str:
    """Registers every benchmark as `all_benchmarks` does, and returns the task of one of them.

    Raises:
      ValueError: there is no such benchmark.
    """
    mixture = all_benchmarks(data_dir, vocabulary, **options)
    task = mixture.removesuffix(MIXTURE) + name
    known = [task.name for task in seqio.MixtureRegistry.get(mixture).tasks]
    if task not in known:
        raise ValueError(f"There is no benchmark {name!r}; there are {', '.join(sorted(known))}.")
    return task


def examples(loaded: Loaded) -> Iterator[dict[str, Any]]:
    """A benchmark's questions as SeqIO examples, before tokenization."""
    questions: Sequence[Question | Prompt] = loaded.questions
    for number, question in enumerate(questions):
        if isinstance(question, Prompt):
            yield {"inputs": question.prompt, "targets": question.references[0], "question": number, "candidate": 0,
                   "answer": 0, "id": question.id, "references": list(question.references)}
            continue
        for place, candidate in enumerate(question.candidates):
            yield {"inputs": candidate.prompt, "targets": candidate.continuation, "question": number,
                   "candidate": place, "answer": question.answer[0], "id": question.id}


def _task(name: str, read: functools.partial[Loaded], generated: bool, vocabulary: Vocabulary) -> seqio.Task:
    return seqio.Task(
        name=name,
        source=seqio.FunctionDataSource(
            functools.partial(_dataset, read=read, generated=generated), splits=(SPLIT,)),
        preprocessors=[seqio.preprocessors.tokenize],
        output_features=output_features(vocabulary.file),
        postprocess_fn=_texts if generated else _candidate,
        metric_fns=[_judged(read) if generated else accuracy],
    )


def _candidate(_: str, example: Mapping[str, Any], is_target: bool) -> dict[str, Any]:
    """What the metric needs of an example besides its score."""
    del is_target  # nothing is predicted
    tokens = tuple(tuple(int(token) for token in example[feature]) for feature in ("inputs", "targets"))
    return {"tokens": tokens} | {key: int(example[key]) for key in ("question", "candidate", "answer")}


def accuracy(targets: Sequence[Mapping[str, Any]], scores: Any) -> dict[str, float]:
    """The share of questions whose right candidate has the lowest perplexity, their number, and how many are ties.

    Args:
      targets: for each example, its question, its candidate, the right candidate, and the tokens of both features.
      scores: for each example, the sum of the log-likelihoods of its tokens, in nats.
    """
    losses: dict[int, dict[int, float]] = {}
    answers = {}
    same: dict[tuple[Any, ...], float] = {}  # equal tokens tie, even if batches rounded differently
    values = scores[0] if isinstance(scores, tuple) else scores  # with other outputs of a scorer
    for target, score in zip(targets, values, strict=True):
        loss = same.setdefault((target["question"], *target["tokens"]), -float(score) / len(target["tokens"][1]))
        losses.setdefault(target["question"], {})[target["candidate"]] = loss
        answers[target["question"]] = target["answer"]
    found = metrics.accuracy([[of[place] for place in sorted(of)] for of in losses.values()], list(answers.values()))
    return {"accuracy": found.accuracy, "questions": found.n, "ties": found.ties}


def _texts(text: str, example: Mapping[str, Any], is_target: bool) -> Any:
    return int(example["question"]) if is_target else text


def _judged(read: functools.partial[Loaded]) -> Any:
    """The metric of written answers; it reads the benchmark again, for its tests and references.

    BLEU counts the tokens of the default vocabulary, whatever the task's features are.
    """

    def judged(targets: Sequence[int], predictions: Sequence[str]) -> dict[str, float]:
        loaded = read()
        if list(targets) != list(range(len(loaded.questions))):
            raise ValueError(f"{loaded.name} has {len(loaded.questions)} questions, but there are answers to "
                             f"{len(targets)}; all must be answered.")
        tokenize = seqio.SentencePieceVocabulary(pretraining.DEFAULT_VOCABULARY.path).encode
        found = Benchmarks().judge(loaded, [[_until(text, question)] for text, question in zip(
            predictions, loaded.questions, strict=True)], tokenize)
        return {metric: sum(values) / len(values) for metric, values in found.values.items()} | {
            metric: of_sums(np.sum(counts, axis=0)) for metric, (counts, of_sums) in found.corpus.items()} | found.fixed

    return judged


def _until(text: str, question: Any) -> str:
    for word in question.extra.get("stop", ()):
        text = text.split(word)[0]
    return text


def _dataset(
    split: str, shuffle_files: bool, seed: int | None = None, *, read: functools.partial[Loaded], generated: bool
) -> tf.data.Dataset:
    del split, shuffle_files, seed
    loaded = read()  # Outside of TensorFlow, so that errors keep their type and one line.
    signature = {
        **{key: tf.TensorSpec((), tf.string) for key in ("inputs", "targets", "id")},
        **{key: tf.TensorSpec((), tf.int32) for key in ("question", "candidate", "answer")},
    }
    if generated:
        signature["references"] = tf.TensorSpec((None,), tf.string)
    return tf.data.Dataset.from_generator(functools.partial(examples, loaded), output_signature=signature)


all_benchmarks()
