"""The study's corpora by their official file names, below a folder."""

import gzip
import json
import pathlib
from collections.abc import Callable

import pytest

import tasks
from tasks.corpora import files, official, specs
from tasks.instruction_sets import instructions


def _record(number: int) -> dict[str, str]:
    return {"instruction": f"Question {number}", "input": "", "output": f"answer {number}"}


def _targets(spec: dict, split: str = "train", name: str = "text.mine") -> list[str]:
    return [pair.targets for pair in instructions.pairs(spec, split, name)]


@pytest.fixture
def data_dir(write: Callable[..., str], tmp_path: pathlib.Path) -> str:
    """A folder with all official files but CodeAlpaca's, in folders of their own."""
    write("data/alpaca/alpaca_gpt4_data.json", [_record(number) for number in range(300)])
    write("data/alpaca/alpaca_gpt4_data_zh.json.gz", gzip.compress(json.dumps([_record(1)] * 2).encode()))
    for part, name in enumerate(("pCLUE_train_1.json", "pCLUE_train_2.json")):
        write(f"data/deep/er/{name}", "\n".join(
            json.dumps({"input": f"{part} {number}", "target": str(part)}) for number in range(50)))
    write("data/cosqa-train.json", [{"doc": "q", "code": "c", "label": 1}])
    write("data/mbpp.jsonl", json.dumps({"text": "Problem.", "code": "pass", "task_id": 974}))
    write("data/.cache/mbpp.jsonl", "hidden")
    return str(tmp_path / "data")


def test_official_names(data_dir: str) -> None:
    definitions = tasks.Definitions(data_dir=data_dir)
    assert set(definitions.corpora) == set(specs.OFFICIAL) == set(official.MIXTURE_RATES)
    counts = {}
    for name, spec in definitions.corpora.items():
        if name != "code.codealpaca":
            assert definitions.describe(name)["train_files"]
            counts[name] = sum(len(_targets(dict(spec), split, name)) for split in specs.splits(spec))
    assert counts == {
        "text.alpaca_gpt4_en": 300, "text.alpaca_gpt4_zh": 2, "text.pclue": 100, "code.cosqa": 1, "code.mbpp": 1}
    [first, *_] = instructions.pairs(definitions.corpora["text.alpaca_gpt4_zh"], "train")
    assert first.inputs.startswith("下面")


def test_official_files_that_are_missing(data_dir: str) -> None:
    definitions = tasks.Definitions(data_dir=data_dir)
    with pytest.raises(FileNotFoundError, match="^code.codealpaca: DATA_DIR .*data' holds no file code_alpaca_20k"):
        definitions.describe("code.codealpaca")
    nowhere = tasks.Definitions(data_dir=data_dir + "/nowhere")
    with pytest.raises(FileNotFoundError, match=r"^text.pclue: there is no folder .*nowhere'; set DATA_DIR") as error:
        nowhere.describe("text.pclue")
    assert "pCLUE_train.json or pCLUE_train_*.json" in str(error.value) and "\n" not in str(error.value)


def test_merged_or_parts(data_dir: str, write: Callable[..., str]) -> None:
    merged = write("data/pCLUE_train.json", '{"input": "all", "target": "x"}\n')
    description = tasks.Definitions(data_dir=data_dir).describe("text.pclue")
    assert [path for path, _ in description["train_files"]] == [merged]
    assert description["options"]["sample"] == 200_000


def test_the_same_file_twice(data_dir: str, write: Callable[..., str]) -> None:
    write("data/copy/mbpp.jsonl.gz", b"")
    with pytest.raises(ValueError, match="^code.mbpp: DATA_DIR holds mbpp.jsonl twice, .*copy/mbpp.jsonl.gz and "):
        tasks.Definitions(data_dir=data_dir).describe("code.mbpp")


def test_a_corpora_line_wins(data_dir: str, write: Callable[..., str]) -> None:
    own = {"instructions": write("own.json", [_record(1)]), "rate": 3}
    definitions = tasks.Definitions(corpora={"text.pclue": own}, data_dir=data_dir)
    assert definitions.corpora["text.pclue"] == own
    assert definitions.describe("text.pclue") == instructions.describe(own)
    elsewhere = {"official": "code.mbpp", "data_dir": data_dir, "rate": 2}
    assert tasks.Definitions(corpora={"code.second": elsewhere}).describe("code.second")["kind"] == "mbpp"


def test_official_names_without_a_folder() -> None:
    definitions = tasks.Definitions(modules=["tasks.tuning"])
    with pytest.raises(ValueError, match="^code.cosqa is read from its official file, cosqa-train.json: set DATA_DIR"):
        definitions.describe("code.cosqa")
    with pytest.raises(ValueError, match="^paper_instructions is a mixture of text.alpaca_gpt4_en, .*set DATA_DIR"):
        definitions.describe("paper_instructions")
    with pytest.raises(ValueError, match=r"data_dir \(DATA_DIR\) must be a folder, or None; found 7"):
        tasks.Definitions(data_dir=7)  # type: ignore[arg-type]


def test_folders_with_links(data_dir: str, tmp_path: pathlib.Path) -> None:
    pathlib.Path(data_dir, "circle").symlink_to(data_dir)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "code_alpaca_20k.json").write_text(json.dumps([_record(1)]))
    pathlib.Path(data_dir, "linked").symlink_to(tmp_path / "other")
    definitions = tasks.Definitions(data_dir=data_dir)
    [[path, _]] = definitions.describe("code.codealpaca")["train_files"]
    assert path == f"{data_dir}/linked/code_alpaca_20k.json"
    assert definitions.describe("code.mbpp")


def test_remote_folders(data_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    epath = pytest.importorskip("etils.epath")
    monkeypatch.setattr(epath, "Path", lambda path: pathlib.Path(path.replace("gs://bucket", data_dir)))
    monkeypatch.setattr(pathlib.Path, "walk", _walk, raising=False)  # Python has it from 3.12 on, etils before.
    found = files.below("gs://bucket")
    assert sorted(map(pathlib.Path, found)) == sorted(map(pathlib.Path, files.below(data_dir)))


def _walk(top: pathlib.Path):
    import os

    return ((pathlib.Path(root), folders, names) for root, folders, names in os.walk(top))
