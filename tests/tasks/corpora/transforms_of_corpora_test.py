"""Corpora with transforms, and their kinds beside code: notebooks, commits, threads."""

import json
import logging
import pathlib

import pytest

import tasks
from tasks.corpora import sources, specs, transforms
from tests.transformed import apply, dedent

WHOLE = {"holdout": 0}


def documents(spec: dict, split: str = "train", name: str = "code.mine") -> list[str]:
    return list(sources.documents(spec, split, name))


def write_lines(file: pathlib.Path, records: list[object]) -> str:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def test_transforms_of_a_corpus_come_in_turn_and_are_counted(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, text in (("a", "def f(x):  # one\n    return x\n"), ("b", "print 'two'\n"), ("c", "# three\n"),
                       ("d", "def g(\n")):
        (tmp_path / f"{name}.py").write_text(text)
    spec = {"text_files": str(tmp_path / "*.py"), "transform": ["strip_comments", "rename_identifiers"], **WHOLE}
    counted = ("code.mine, read for train: 1 documents are transformed (strip_comments, rename_identifiers), others "
               f"not: 1 left empty by strip_comments (first: {tmp_path}/c.py), "
               f"2 not parsed by strip_comments as python{{}} (first: {tmp_path}/b.py).")
    with caplog.at_level(logging.WARNING):
        assert documents(spec) == ["def v0(v1):\n    return v1\n"]
        assert documents(spec | {"unparsed": "keep"}) == ["def v0(v1):\n    return v1\n", "print 'two'\n", "def g(\n"]
    assert [record.getMessage() for record in caplog.records] == [
        counted.format(""), counted.format(", kept as they were")]


def test_files_read_by_themselves_are_transformed_as_the_whole(tmp_path: pathlib.Path) -> None:
    for number in range(120):
        (tmp_path / f"{number:03}.py").write_text(f"x{number} = {number}  # note\n")
    spec = {"text_files": str(tmp_path / "*.py"), "transform": ["rename_identifiers", "strip_comments"], "holdout": 0.1}
    plain = {key: value for key, value in spec.items() if key != "transform"}
    listed = sources.files(spec, "train")
    for split in specs.SPLITS:
        whole = documents(spec, split)
        # The splits are those of the texts before.
        assert whole == [f"v0 ={text.partition('=')[2].partition('  #')[0]}\n" for text in documents(plain, split)]
        assert whole == [text for start in (0, 50, 100) for text in sources.documents(
            spec, split, only_files=listed[start : start + 50])]


def test_languages_of_records_and_files(
    tree_sitter: None, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_lines(tmp_path / "a.jsonl", [
        {"text": "x = 1  # a\n", "language": "Python"}, {"text": "var x = 1; // b\n", "language": "JavaScript"},
        {"text": "main = 1 -- c\n", "language": "Haskell"}])
    spec = {"json_lines": file, "transform": ["strip_comments"], **WHOLE}
    assert documents(spec) == ["x = 1\n", "var x = 1;\n"]
    assert f"1 in a language that transforms do not read (first: {file}, line 3)" in caplog.text
    assert documents(spec | {"language": "java", "unparsed": "keep"})[2] == "main = 1 -- c\n"
    (tmp_path / "b.go").write_text("package p // d\n")
    (tmp_path / "c.js").write_text("f(); // e\n")
    by_suffix = {"text_files": str(tmp_path / "[bc].*"), "transform": ["strip_comments"], **WHOLE}
    assert documents(by_suffix) == ["package p\n", "f();\n"]
    (tmp_path / "b.txt").write_text("prose")
    with pytest.raises(ValueError, match=r"code.mine: 1 of 3 files have a suffix .*b.txt. .* give 'language'"):
        documents(by_suffix)
    assert len(documents(by_suffix | {"transform": ["shuffle_lines"]})) == 3
    write_lines(tmp_path / "a.jsonl", [{"text": "x"}])
    with pytest.raises(ValueError, match=r"code.mine: .*a.jsonl, line 1 has no field 'language', .* as 'language'"):
        documents(spec)


def test_nothing_left_by_transforms(tmp_path: pathlib.Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", [{"text": f"x = {number}"} for number in range(3)])
    spec = {"json_lines": file, "language": "python", "transform": ["comments_only"], **WHOLE}
    with pytest.raises(ValueError, match=r"code.mine: the transforms leave no document to train on \(3 left empty"):
        documents(spec)


def test_a_missing_extra_is_one_line(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.c").write_text("int x; // y\n")
    transforms.missing.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^code.mine: transforms of c need the extra tree_sitter, .*tree-sitter and "
                                         r"tree-sitter-c are not installed: pip install 'codellm_jax\[tree_sitter\]'"):
        documents({"text_files": str(tmp_path / "*.c"), "transform": ["strip_comments"], **WHOLE})
    transforms.missing.cache_clear()


@pytest.mark.parametrize(("spec", "message"), [
    ({"python": "code", "transform": []}, "'transform' must be a list of strip_comments, .*found \\[\\]"),
    ({"python": "code", "transform": "strip_comments"}, "'transform' must be a list"),
    ({"python": "code", "transform": ["strip"]}, "'transform' has no transform 'strip'; there are strip_comments"),
    ({"python": "code", "transform": [3]}, "'transform' must hold names, or mappings such as .* found 3"),
    ({"python": "code", "transform": [{"name": "strip_comments", "seed": 1}]}, "which has no option 'seed'"),
    ({"python": "code", "transform": [{"name": "shuffle_lines", "sed": 1}]}, "which has no option 'sed'"),
    ({"python": "code", "transform": [{"name": "shuffle_lines", "seed": 1.5}]}, "whole numbers as seeds; found 1.5"),
    ({"python": "code", "transform": ["pseudocode", "strip_comments"]}, "'strip_comments' after 'pseudocode'"),
    ({"python": "code", "transform": ["prose_only"]}, "'prose_only' reads 'notebooks', not 'python'"),
    ({"notebooks": "*", "transform": ["strip_comments", "code_cells_only"]}, "must begin with 'code_cells_only'"),
    ({"commits": "*", "transform": ["strip_comments"]}, "'strip_comments' reads code, but 'commits'"),
    ({"tfds": "a:1.0.0", "transform": ["strip_comments"]}, "'strip_comments' needs a 'language', one of python"),
    ({"text_files": "*", "transform": ["pseudocode"], "language": "cobol"}, "'language' must be one of python, java"),
    ({"text_files": "*", "transform": ["pseudocode"], "unparsed": "skip"}, "'unparsed' must be 'drop' or 'keep'"),
    ({"text_files": "*", "language": "c"}, "'language' is an option of 'transform', which is missing"),
    ({"python": "code", "unparsed": "keep"}, "'unparsed' is an option of 'transform'"),
    ({"task": "x", "transform": ["shuffle_lines"]}, "unknown option 'transform' of task"),
])
def test_malformed_transforms(spec: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^code.mine: .*{message}") as error:
        specs.validate(spec, "code.mine")
    assert "\n" not in str(error.value)


def test_descriptions_tell_transforms_apart() -> None:
    def described(*transform: object, **more: str) -> str:
        options = {"transform": list(transform), **more} if transform else {}
        return json.dumps(sources.describe({"python": "code", **options}), sort_keys=True)

    ways = [described(), described("strip_comments"), described("rename_identifiers"), described("shuffle_lines"),
            described("strip_comments", "rename_identifiers"), described("rename_identifiers", "strip_comments"),
            described({"name": "shuffle_lines", "seed": 1}), described("strip_comments", unparsed="keep")]
    assert len(set(ways)) == len(ways)
    assert "transform" not in ways[0]
    assert described({"name": "shuffle_lines", "seed": 0}, unparsed="drop") == described("shuffle_lines")


def test_corpora_that_differ_in_a_transform_have_other_rows(tmp_path: pathlib.Path) -> None:
    from codellm_jax.mixture.rows import cached_rows
    from codellm_jax.vocabulary import load_vocabulary

    texts = [f"def f{n}(x):\n    return x + {n}  # note {n}\n" for n in range(60)]
    file = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in (*texts, "def (")])
    spec = {"json_lines": file, "language": "python", **WHOLE}
    found = {}
    for name, options in (("plain", {}), ("stripped", {"transform": ["strip_comments"]}),
                          ("shuffled", {"transform": ["shuffle_lines"]}),
                          ("otherwise", {"transform": [{"name": "shuffle_lines", "seed": 1}]})):
        corpus = {key: value for key, value in spec.items() if key != "language" or options} | options
        definitions = tasks.Definitions(modules=("tasks.pretraining",), corpora={"code.mine": corpus})
        found[name] = cached_rows("code.mine", definitions, load_vocabulary("python_8k"), 32, str(tmp_path / "cache"),
                                  report=lambda line: None)["train"]
    assert len({rows.path for rows in found.values()}) == len({rows.content_hash for rows in found.values()}) == 4
    assert any("60 documents are transformed (strip_comments), others not: 1 not parsed" in note
               for note in found["stripped"].notes)


@pytest.mark.slow
def test_a_transformed_corpus_opens_in_a_dry_run(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    from codellm_jax import cli

    corpora = {"code.renamed": {"python": "code", "transform": ["strip_comments", "rename_identifiers"]}}
    assert cli.main(["train", "--gin_file=gin/mixed_pretrain.gin", f"--gin.CORPORA={corpora}",
                     f"--gin.CACHE_DIR={tmp_path}", "--gin.MIXTURE_OR_TASK_NAME=['code.renamed']",
                     "--gin.CODE_RATE=1.0", "--gin.TASK_FEATURE_LENGTHS={'targets': 64}",
                     f"--gin.MODEL_DIR={tmp_path / 'run'}",
                     "--gin.TRAIN_STEPS=4", "--gin.WARMUP_STEPS=2", "--dry_run"]) == 0
    assert "code.renamed" in capsys.readouterr().out


def notebook(*cells: tuple[str, object], language: str = "python", **facts: object) -> str:
    return json.dumps({"nbformat": 4, "metadata": {"kernelspec": {"language": language}}, "cells": [
        {"cell_type": kind, "source": source, "outputs": [{"text": "shown"}]} for kind, source in cells]} | facts)


CELLS = (("markdown", ["# Title\n", "\n", "Some *prose*."]), ("code", "%matplotlib inline\nx = 1  # one\n!ls\nx?\n"),
         ("raw", "raw"), ("code", ""), ("markdown", "%%"), ("code", "%%bash\nls\n# %%"),
         ("code", ["def f(y):\n", "    return y"]))
NOTEBOOK = dedent('''
    # %% [markdown]
    # # Title
    #
    # Some *prose*.

    # %%
    # %matplotlib inline
    x = 1  # one
    # !ls
    # x?

    # %% [markdown]
    #  %%

    # %%
    # %%bash
    # ls
    # # %%

    # %%
    def f(y):
        return y
''')


def test_notebooks(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "sub").mkdir()
    for name, content in {
        "a": notebook(*CELLS), "b": "{broken", "c": "[1]", "d": notebook(*CELLS, nbformat=3), "e": notebook(),
        "f": notebook(("code", 3)), "g": "", "h": notebook(("code", "x <- 1"), language="R"),
        "sub/i": notebook(("code", "1 +")),
    }.items():
        (tmp_path / f"{name}.ipynb").write_text(content)
    spec = {"notebooks": str(tmp_path / "**" / "*.ipynb"), **WHOLE}
    assert documents(spec) == [NOTEBOOK, "# %%\nx <- 1\n", "# %%\n1 +\n"]
    for reason in ("1 broken JSON (first: {}/b.ipynb)", "1 not a JSON object (first: {}/c",
                   "1 not a notebook of nbformat 4 (first: {}/d", "2 empty",
                   "1 with a cell that has no source (first: {}/f"):
        assert reason.format(tmp_path) in caplog.text.replace("1 empty file", "").replace("1 empty", "2 empty")
    assert documents(spec | {"transform": ["strip_comments", "rename_identifiers"]}) == [
        "v0 = 1\n\n\n\ndef v1(v2):\n    return v2\n"]
    assert "1 in a language that transforms do not read" in caplog.text
    assert documents(spec | {"transform": ["prose_only"]}) == ["# Title\n\nSome *prose*.\n\n %%\n"]
    code = documents(spec | {"transform": ["code_cells_only"]})
    assert code[0] == (
        "# %matplotlib inline\nx = 1  # one\n# !ls\n# x?\n\n# %%bash\n# ls\n# # %%\n\ndef f(y):\n    return y\n")
    assert [apply(text, "code_cells_only") for text in code] == code


def test_commits(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write_lines(tmp_path / "a.jsonl", [
        {"before": "x = 1\n", "after": "width = 1\n", "message": "Say what x is for\n"},
        {"before": None, "after": "new\n", "message": "Add"}, {"before": "old", "after": "", "message": "Remove"},
        {"before": "same", "after": "same", "message": "m"}, {"before": "x", "after": "y", "message": " "},
        {"before": "x", "after": "y"}, {"after": "y", "message": "m"}, {"before": 3, "after": "y", "message": "m"}, []])
    assert documents({"commits": file, **WHOLE}) == [
        "Before:\nx = 1\n\nCommit: Say what x is for\n\nAfter:\nwidth = 1\n", "Commit: Add\n\nAfter:\nnew\n",
        "Before:\nold\n\nCommit: Remove\n"]
    for reason in ("1 without a change (first: {}, line 4)", "1 without a message (first: {}, line 5)",
                   "1 without text in field 'message' (first: {}, line 6)",
                   "2 without text in field 'before' (first: {}, line 7)", "1 not a JSON object"):
        assert reason.format(file) in caplog.text


def test_threads(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write_lines(tmp_path / "a.jsonl", [
        {"title": "Width", "question": "How wide?\n", "answers": [
            "Look.", {"text": "One.", "score": 3}, {"text": "Ask.", "score": -1}, {"text": "Measure.", "score": 0}]},
        {"question": "Why?", "answers": ["So."]}, {"question": "q", "answers": []}, {"question": " ", "answers": ["a"]},
        {"question": "q", "answers": [{"text": ""}]}, {"question": "q", "answers": [{"text": "a", "score": "3"}]}])
    assert documents({"threads": file, **WHOLE}) == [
        "Question: Width\n\nHow wide?\n\nAnswer: One.\n\nAnswer: Look.\n\nAnswer: Measure.\n\nAnswer: Ask.\n",
        "Question: Why?\n\nAnswer: So.\n"]
    for reason in ("1 without answers (first: {}, line 3)", "1 without text in field 'question' (first: {}, line 4)",
                   "1 with an answer without text (first: {}, line 5)", "1 with a score that is not a number"):
        assert reason.format(file) in caplog.text
