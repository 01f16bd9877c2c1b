"""TFDS builders of the official benchmarks and instruction sets, through this package's readers.

    tfds build official_benchmarks/mbpp --imports=tasks.builders --manual_dir=/data
    tfds build official_instructions/pclue --imports=tasks.builders

The command `tfds` needs the extra `tfds`; `tfds.load("official_benchmarks/mbpp")`, once this module is imported, does
not. If the manual folder, a folder as for DATA_DIR, holds the files, they are read there. Else they are downloaded,
as by `t5x fetch`, into the folder "official" of TFDS's downloads.

`official_benchmarks` has a config for each task of `benchmarks.loading`. Its split "test" holds the questions, and
"train" the worked examples of few-shot prompts, if they are in other files. A question with candidates has their
fields and the position of the right one; one whose answer is written has its fields, the right answers, and for MBPP
the tests. `official_instructions` has a config for each corpus of `corpora.official`, with its splits, as inputs and
targets.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from codellm_jax.fetching.fetch import fetch
from codellm_jax.fetching.releases import Release, release
from tasks.benchmarks.loading import BENCHMARKS, GENERATED, read_items
from tasks.benchmarks.locating import locate
from tasks.benchmarks.questions import Item, is_valid_text
from tasks.corpora import official, specs
from tasks.instruction_sets import instructions

VERSION = "1.0.0"
MANUAL = "Files with their publishers' names, anywhere in the folder; `t5x fetch NAME` downloads them."


class OfficialBenchmarks(tfds.core.GeneratorBasedBuilder):
    """Questions of the study's benchmarks."""

    VERSION = tfds.core.Version(VERSION)
    MANUAL_DOWNLOAD_INSTRUCTIONS = MANUAL
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=task, description=release(task).title) for task in BENCHMARKS]

    def _info(self) -> tfds.core.DatasetInfo:
        task = self.builder_config.name
        sample = _example(task, read_items(task, None)[0][0])  # the package's sample items have the same fields
        return _info(self, release(task), {key: _feature(value) for key, value in sample.items()})

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[Any]]:
        task = self.builder_config.name
        folder = _folder(release(task), dl_manager, lambda folder: locate(task, BENCHMARKS[task].forms, folder))
        items = {"test": read_items(task, folder)[0], "train": _worked_examples(task, folder)}
        return {split: _numbered(_example(task, item) for item in found) for split, found in items.items() if found}

    def _generate_examples(self) -> None:  # TFDS requires the method; `_split_generators` gives the examples
        raise NotImplementedError


class OfficialInstructions(tfds.core.GeneratorBasedBuilder):
    """The study's instruction sets."""

    VERSION = tfds.core.Version(VERSION)
    MANUAL_DOWNLOAD_INSTRUCTIONS = MANUAL
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=corpus.partition(".")[2], description=release(corpus).title)
                       for corpus in specs.OFFICIAL]

    def _corpus(self) -> str:
        return next(corpus for corpus in specs.OFFICIAL if corpus.partition(".")[2] == self.builder_config.name)

    def _info(self) -> tfds.core.DatasetInfo:
        return _info(self, release(self._corpus()), {key: tfds.features.Text() for key in ("inputs", "targets")})

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[Any]]:
        corpus = self._corpus()
        folder = _folder(release(corpus), dl_manager,
                         lambda folder: official.resolve({"official": corpus, "data_dir": folder}, corpus))
        spec = {"official": corpus, "data_dir": folder}
        found = {split: instructions.pairs(spec, split, corpus) for split in specs.splits(spec)}
        begun = {split: list(itertools.islice(pairs, 1)) for split, pairs in found.items()}
        return {split: _numbered({"inputs": pair.inputs, "targets": pair.targets}
                                 for pair in itertools.chain(first, found[split]))
                for split, first in begun.items() if first}  # TFDS allows no empty split

    def _generate_examples(self) -> None:
        raise NotImplementedError


def _info(builder: Any, of: Release, features: Mapping[str, Any]) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
        builder=builder, description=of.title, features=tfds.features.FeaturesDict(features), homepage=of.homepage,
        citation=of.citation, license=of.licence, disable_shuffling=True)


def _folder(of: Release, dl_manager: tfds.download.DownloadManager, locate_in: Callable[[str], object]) -> str:
    """The manual folder if it holds the files, else a folder into which they are downloaded."""
    try:
        manual = str(dl_manager.manual_dir)
        locate_in(manual)
    except (AssertionError, FileNotFoundError):  # TFDS has no such folder; the files are missing
        manual = str(Path(dl_manager.download_dir) / "official")
        try:
            fetch([of.name], manual)
        except (OSError, ValueError) as error:
            raise type(error)(f"{error} Set --manual_dir to a folder that holds them.") from error
    return manual


def _worked_examples(task: str, folder: str) -> list[Item]:
    """The worked examples of few-shot prompts; none if no file has them, or the file holds the questions."""
    benchmark = BENCHMARKS[task]
    try:
        files = locate(task, benchmark.shot_forms, folder)
    except FileNotFoundError:
        return []
    if benchmark.read_shots is None or (
            benchmark.read_shots == benchmark.read and files == locate(task, benchmark.forms, folder)):
        return []
    return [item for item in benchmark.read_shots(files) if isinstance(item, Item) and is_valid_text(item)]


def _example(task: str, item: Item) -> dict[str, Any]:
    extra = {key: value for key, value in item.extra.items() if key != "stop"}  # which ends what is written
    if task in GENERATED:
        return {"id": item.id, **item.candidates[0], "references": item.references, **extra}
    return {"id": item.id, "candidates": list(item.candidates), "answer": item.answer[0], **extra}


def _feature(value: Any) -> Any:
    """The TFDS feature of a value: a text, a whole number, several texts, or several candidates."""
    if isinstance(value, str):
        return tfds.features.Text()
    if isinstance(value, int):
        return np.int32
    if isinstance(value, list):
        return tfds.features.Sequence({field: tfds.features.Text() for field in value[0]})
    return tfds.features.Sequence(tfds.features.Text())


def _numbered(examples: Iterable[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    return iter(enumerate(examples))
