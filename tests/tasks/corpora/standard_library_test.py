"""The corpora of Python's own library: docstrings as prose, the rest as code."""

import ast
import io
import os
import pathlib
import subprocess
import sys
import textwrap
import tokenize

import hypothesis
import pytest
from hypothesis import strategies as st

from tasks.corpora import specs, standard_library

ROOT = pathlib.Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("source", "code", "docstrings"),
    [
        ('"""Module."""\n\nimport os\n', "import os\n", ["Module."]),
        ('def f():\n    """Alone."""\n', "def f():\n    pass\n", ["Alone."]),
        ('def f(): "One line"\n', "def f(): pass\n", ["One line"]),
        ('class A: "doc"; x = 1\n', "class A: x = 1\n", ["doc"]),
        ('class A:\n    "doc"; x = 1\n', "class A:\n    x = 1\n", ["doc"]),
        ('def f():\n    ("in " "parts")\n    return 1\n', "def f():\n    return 1\n", ["in parts"]),
        ('def f():\n    "é—"  # kept\n    g()\n', "def f():\n      # kept\n    g()\n", ["é—"]),
        ('def f():\n    b"bytes"\n    return 1\n', 'def f():\n    b"bytes"\n    return 1\n', []),
        ('def f():\n    f"{1}"\n', 'def f():\n    f"{1}"\n', []),
        ('def f():\n    ""\n', "def f():\n    pass\n", []),
        ('"a"\r\n# b\r\nx = "a"\r\n', '# b\nx = "a"\n', ["a"]),
        ('x = 1\n"no docstring"\n', 'x = 1\n"no docstring"\n', []),
        ('"only"', "", ["only"]),
    ],
)
def test_split_docstrings(source: str, code: str, docstrings: list[str]) -> None:
    assert standard_library.split_docstrings(source) == (code, docstrings)


def test_docstrings_keep_the_order_of_the_file() -> None:
    source = '''
        class A:
            """First."""

            def f(self):
                """Second:

                    indented.
                and back.
                """

        async def g():
            """Third."""
            yield
    '''
    _, docstrings = standard_library.split_docstrings(textwrap.dedent(source))
    assert docstrings == ["First.", "Second:\n\n    indented.\nand back.", "Third."]


def _without_docstrings(tree: ast.Module) -> str:
    """The tree that cutting docstrings should leave, told in another way than by cutting text."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node, clean=False) is not None:
                rest = node.body[1:]
                node.body = rest or ([] if isinstance(node, ast.Module) else [ast.Pass()])
    return ast.dump(tree)


@pytest.mark.parametrize("module", ["json/decoder.py", "contextlib.py", "enum.py", "difflib.py"])
def test_cutting_leaves_the_rest_of_the_tree(module: str) -> None:
    source = (pathlib.Path(os.__file__).parent / module).read_text(encoding="utf-8")
    code, docstrings = standard_library.split_docstrings(source)
    assert ast.dump(ast.parse(code)) == _without_docstrings(ast.parse(source))
    assert docstrings
    assert _comments(code) == _comments(source)


def _comments(source: str) -> list[str]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [token.string for token in tokens if token.type == tokenize.COMMENT]


BODIES = st.recursive(
    st.sampled_from(["x = 1", '"text"', "'''two\nlines'''", "# note\npass", '("a"\n "b")', '"";y']),
    lambda inner: st.builds(
        lambda head, parts: head + "\n" + textwrap.indent("\n".join(parts), "    "),
        st.sampled_from(["class A:", "def f(a):", "async def g():", "if x:"]),
        st.lists(inner, min_size=1, max_size=3),
    ),
    max_leaves=8,
)


@hypothesis.given(st.lists(BODIES, max_size=3).map("\n".join))
def test_cutting_made_up_files(source: str) -> None:
    code, _ = standard_library.split_docstrings(source)
    assert ast.dump(ast.parse(code)) == _without_docstrings(ast.parse(source))


@pytest.mark.parametrize("source", ["def f(:\n", "\0", "(" * 5000])
def test_unreadable_source(source: str) -> None:
    with pytest.raises(SyntaxError):
        standard_library.split_docstrings(source)


def test_python_corpora_have_all_splits() -> None:
    for kind in ("text", "code"):
        sizes = {
            split: sum(map(len, standard_library.python_documents(kind, split)))
            for split in specs.SPLITS
        }
        assert sizes["train"] > 1_000_000
        assert 0.01 < sizes["validation"] / sizes["train"] < 0.15
        assert 0.01 < sizes["test"] / sizes["train"] < 0.15


def test_python_corpora_hold_no_tests_and_no_packages() -> None:
    for kind in ("text", "code"):
        names = [document.name for document in standard_library.python_corpus(kind)]
        assert names == sorted(set(names))
        for name in names:
            assert not {"test", "tests", "idle_test", "site-packages"} & set(name.split("/"))
    assert "pydoc_data/topics.py" not in names
    assert "encodings/cp1252.py" not in names


def test_python_splits_are_disjoint() -> None:
    """No file, no document, and hardly a paragraph is in two splits."""
    places: dict[str, str] = {}
    contents: dict[str, str] = {}
    for kind in ("text", "code"):
        for document in standard_library.python_corpus(kind):
            assert places.setdefault(document.name, document.split) == document.split
            assert contents.setdefault(document.text, document.split) == document.split
    paragraphs: dict[str, set[str]] = {}
    for document in standard_library.python_corpus("text"):
        for paragraph in document.text.split("\n\n"):
            if len(paragraph) > 200:
                paragraphs.setdefault(paragraph, set()).add(document.split)
    shared = sum(len(found) > 1 for found in paragraphs.values())
    assert shared < len(paragraphs) / 1000


def test_twins_of_a_module_fall_into_one_split() -> None:
    for twins in (
        ["heapq.py", "modules/_heapq"],
        ["_pydecimal.py", "decimal.py", "modules/_decimal"],
        ["json/__init__.py", "modules/_json"],
    ):
        assert len({standard_library.split_of(name) for name in twins}) == 1


def test_code_holds_no_docstrings() -> None:
    for document in standard_library.python_corpus("code")[::25]:
        for node in ast.walk(ast.parse(document.text)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                docstring = ast.get_docstring(node)
                # A second string of a body moves to the docstring's place; that is no docstring.
                assert docstring is None or docstring not in _all_text()


def _all_text() -> str:
    return "\n\n".join(document.text for document in standard_library.python_corpus("text"))


def test_python_corpora_are_deterministic(tmp_path: pathlib.Path) -> None:
    """Two processes with other hash seeds, folders and environments read the same."""
    (tmp_path / "array.py").write_text('"""Hides a module of the standard library."""\n')
    program = (
        "import hashlib; from tasks.corpora import standard_library as p; "
        "print([hashlib.sha256(repr(p.python_corpus(k)).encode()).hexdigest() for k in "
        "('code', 'text')])"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", program],
            check=True,
            capture_output=True,
            text=True,
            cwd=folder,
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT), "TERM": terminal},
        ).stdout
        for folder, seed, terminal in ((ROOT, "1", "dumb"), (tmp_path, "2", "xterm"))
    ]
    assert runs[0] == runs[1]
    assert " at 0x7f" not in _all_text()


def test_unknown_python_corpora() -> None:
    with pytest.raises(ValueError, match="'text' and 'code', found 'prose'"):
        standard_library.python_corpus("prose")
    with pytest.raises(ValueError, match="found 'dev'"):
        standard_library.python_documents("text", "dev")
