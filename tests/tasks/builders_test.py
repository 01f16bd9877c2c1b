"""TFDS datasets built of official forms hold what the project's own readers give."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

from codellm_jax.fetching.releases import release
from tasks import builders
from tasks.benchmarks.loading import BENCHMARKS, GENERATED, load, read_items
from tasks.benchmarks.locating import SAMPLES
from tasks.corpora import specs
from tasks.instruction_sets import instructions

CORPORA = {corpus.partition(".")[2]: corpus for corpus in specs.OFFICIAL}


def built(builder: type, config: str, folder: Path, manual: Path | None) -> Any:
    made = builder(config=config, data_dir=folder / "data")
    made.download_and_prepare(download_dir=folder / "downloads", download_config=tfds.download.DownloadConfig(
        manual_dir=manual))
    return made


def plain(value: Any) -> Any:
    """What TFDS gives, as Python's own values; of candidates a list of dicts."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, dict):
        texts = {field: [text.decode() for text in texts] for field, texts in value.items()}
        return [dict(zip(texts, each, strict=True)) for each in zip(*texts.values(), strict=True)]
    if isinstance(value, np.ndarray):
        return [each.decode() for each in value]
    return int(value)


def rows(made: Any, split: str) -> list[dict[str, Any]]:
    return [{key: plain(value) for key, value in row.items()} for row in tfds.as_numpy(made.as_dataset(split=split))]


@pytest.fixture(scope="module")
def manual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files in official form: our sample items, and instructions."""
    folder = tmp_path_factory.mktemp("manual")
    shutil.copytree(SAMPLES, folder / "samples")
    for name in ("alpaca_gpt4_data", "alpaca_gpt4_data_zh", "code_alpaca_20k"):
        (folder / f"{name}.json").write_text(json.dumps(
            [{"instruction": f"{name} {number}", "input": "", "output": f"答 {number}"} for number in range(40)]))
    for part in (1, 2):
        (folder / f"pCLUE_train_{part}.json").write_text("\n".join(
            json.dumps({"input": f"{part} {number}", "target": "是", "type": "nli"}) for number in range(20)))
    return folder


@pytest.mark.parametrize("task", BENCHMARKS)
def test_benchmarks(task: str, manual: Path, tmp_path: Path):
    made = built(builders.OfficialBenchmarks, task, tmp_path, manual)
    items = read_items(task, str(manual))[0]
    found = rows(made, "test")
    assert [row["id"] for row in found] == [question.id for question in load(task, str(manual)).questions]
    for row, item in zip(found, items, strict=True):
        extra = {key: list(value) if isinstance(value, tuple) else value for key, value in item.extra.items()
                 if key != "stop"}
        if task in GENERATED:
            assert row == {"id": item.id, **item.candidates[0], "references": list(item.references), **extra}
        else:
            assert row == {"id": item.id, "candidates": list(item.candidates), "answer": item.answer[0], **extra}
    if BENCHMARKS[task].shot_forms:
        assert made.info.splits["train"].num_examples >= 2
    assert (made.info.citation, made.info.homepage) == (release(task).citation.strip(), release(task).homepage)
    assert release(task).licence == made.info.as_proto.redistribution_info.license


@pytest.mark.parametrize("name", CORPORA)
def test_instruction_sets(name: str, manual: Path, tmp_path: Path):
    made = built(builders.OfficialInstructions, name, tmp_path, manual)
    spec = {"official": CORPORA[name], "data_dir": str(manual)}
    of_splits = {split: [{"inputs": pair.inputs, "targets": pair.targets}
                         for pair in instructions.pairs(spec, split, name)] for split in specs.splits(spec)}
    assert {split: rows(made, split) for split in made.info.splits} == {
        split: pairs for split, pairs in of_splits.items() if pairs}
    assert "train" in made.info.splits


def test_a_manual_folder_without_the_files_is_fetched_into_the_downloads(
        tmp_path: Path, manual: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def fetched(names: list[str], folder: str) -> None:
        asked.append((names, folder))
        shutil.copytree(manual, folder)

    monkeypatch.setattr(builders, "fetch", fetched)
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", tmp_path / "nowhere"):
        made = built(builders.OfficialBenchmarks, "c3", tmp_path / place.name, place)
        assert asked.pop() == (["c3"], str(tmp_path / place.name / "downloads" / "official")) and not asked
        assert len(rows(made, "test")) == len(load("c3", str(manual)).questions)


def test_what_needs_a_signature(tmp_path: Path):
    with pytest.raises(ValueError, match="Ask for them at https://jecqa.thunlp.org/.* Set --manual_dir"):
        built(builders.OfficialBenchmarks, "jecqa", tmp_path, tmp_path)


def test_every_config_has_its_release():
    names = {config.name for config in builders.OfficialBenchmarks.BUILDER_CONFIGS}
    assert names == set(BENCHMARKS)
    assert {config.name for config in builders.OfficialInstructions.BUILDER_CONFIGS} == set(CORPORA)


@pytest.mark.slow
def test_the_command_of_tfds(manual: Path, tmp_path: Path):
    pytest.importorskip("apache_beam", reason="the command of TFDS needs the extra tfds")
    pytest.importorskip("mlcroissant", reason="the command of TFDS needs the extra tfds")
    done = subprocess.run(
        [Path(sys.executable).parent / "tfds", "build", "official_benchmarks/mbpp", "--imports=tasks.builders",
         f"--manual_dir={manual}", f"--data_dir={tmp_path}"], capture_output=True, text=True,
        cwd=Path(__file__).resolve().parents[2])
    assert done.returncode == 0, done.stderr
    made = tfds.builder_from_directory(tmp_path / "official_benchmarks" / "mbpp" / builders.VERSION)
    assert made.info.splits["test"].num_examples == len(load("mbpp", str(manual)).questions)
