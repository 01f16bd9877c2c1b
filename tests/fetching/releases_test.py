"""The table of official files against what reads them."""

import hashlib
import re
from pathlib import Path

import pytest

from codellm_jax.fetching.releases import release, releases
from tasks.benchmarks.loading import BENCHMARKS
from tasks.corpora.specs import OFFICIAL

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
FILES = [file for each in releases().values() for file in each.files]


def test_every_benchmark_and_official_corpus_has_its_files():
    tasks = [task for each in releases().values() for task in each.tasks]
    corpora = [corpus for each in releases().values() for corpus in each.corpora]
    assert set(BENCHMARKS) <= set(tasks) and set(OFFICIAL) == set(corpora)
    assert len(tasks) == len(set(tasks)) and len(corpora) == len(set(corpora))


def test_rows_are_whole():
    digits = {"sha256": 64, "md5": 32, "git": 40}
    for each in releases().values():
        assert re.match(r"@\w+\{[\w:]+,\n", each.citation) and each.citation.count("{") == each.citation.count("}")
        assert each.licence and each.title and each.homepage.startswith("https://")
        assert all(file.url is None for file in each.files) == (each.ask is not None)
    for file in FILES:
        if file.digest:
            kind, _, value = file.digest.partition(":")
            assert re.fullmatch(f"[0-9a-f]{{{digits[kind]}}}", value)
        if file.url and "githubusercontent" in file.url:  # what a branch holds may change
            assert re.search("/[0-9a-f]{40}/", file.url) and file.digest


def test_places_are_below_the_folder_and_each_is_of_one_file():
    places = [place for file in FILES for place in file.places]
    assert len(places) == len(set(places))
    assert all(re.fullmatch(r"\w+/[\w.-]+", place) and ".." not in place for place in places)


@pytest.mark.parametrize("name, found", [
    ("mbpp", "mbpp"), ("mbpp_three_shot", "mbpp"), ("code.mbpp", "mbpp"), ("ekar_cot", "ekar"),
    ("text.pclue", "pclue")])
def test_names_of_readers_lead_to_a_release(name: str, found: str):
    assert release(name).name == found


def test_a_wrong_name_lists_what_there_is():
    with pytest.raises(ValueError, match="'mbppp'; nearest: mbpp. The names are logic, jecqa, .*codealpaca.$"):
        release("mbppp")


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no official files at {DATA}")
def test_stated_digests_are_those_of_official_files():
    """Files that lie there in their publisher's own bytes."""
    checked = 0
    for file in FILES:
        name = Path(next(iter(file.places))).name
        for found in DATA.rglob(name):
            content = found.read_bytes()
            digests = {f"sha256:{hashlib.sha256(content).hexdigest()}",
                       f"git:{hashlib.sha1(b'blob %d' % len(content) + bytes(1) + content).hexdigest()}"}
            if name in ("HumanEval.jsonl.gz", "mbpp.jsonl", "c3-d-dev.json", "c3-d-train.json", "cosqa-dev.json",
                        "pCLUE_train_9.json"):
                assert file.digest in digests and file.size == len(content)
                checked += 1
    assert checked == 6
