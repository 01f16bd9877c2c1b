"""Official files come to where the readers find them, are checked, and nothing half stands under their names."""

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from fake_publisher import Publisher

import tasks
from codellm_jax import cli
from codellm_jax.fetching import download, fetch, releases
from tasks.benchmarks.loading import BENCHMARKS, load
from tasks.corpora import specs
from tasks.instruction_sets import instructions

EXISTING = "exists already"


def run(names: list[str], folder: Path) -> list[str]:
    """What a fetch says."""
    said: list[str] = []
    fetch.fetch(names, str(folder), said.append)
    return said


def tree(folder: Path) -> set[str]:
    """Files below a folder but for the lock."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {fetch.LOCK}


NAMES = [name for name, each in releases.releases().items() if not each.ask]
TASKS = [task for name in NAMES for task in releases.releases()[name].tasks if task in BENCHMARKS]


@pytest.fixture
def all_fetched(published: Publisher, tmp_path: Path) -> Path:
    run(NAMES, tmp_path)
    return tmp_path


def test_benchmarks_are_found_where_they_were_put(all_fetched: Path):
    """The stand-in gives our own sample items, whose names and forms are the official ones."""
    assert len(TASKS) >= 13
    for task in TASKS:
        assert load(task, str(all_fetched)).questions == load(task, None).questions
        if BENCHMARKS[task].shot_forms and not BENCHMARKS[task].own_shots:
            few = load(task, str(all_fetched), few_shot=1, seed=3)
            assert few.questions == load(task, None, few_shot=1, seed=3).questions
            assert all(file.startswith(str(all_fetched)) for file in few.files)


def test_instruction_sets_are_found_where_they_were_put(all_fetched: Path):
    definitions = tasks.Definitions(data_dir=str(all_fetched))
    counts = {}
    for corpus in specs.OFFICIAL:
        assert definitions.describe(corpus)["train_files"]
        counts[corpus] = sum(1 for split in specs.splits(definitions.corpora[corpus])
                             for _ in instructions.pairs(definitions.corpora[corpus], split, corpus))
    assert counts["text.pclue"] == 9 and counts["code.codealpaca"] == 2 and min(counts.values()) >= 2


def test_nothing_else_is_left_there(all_fetched: Path):
    places = {place for name in NAMES for file in releases.releases()[name].files for place in file.places}
    assert tree(all_fetched) == places | {fetch.SUMS}
    done = subprocess.run(["sha256sum", "--check", "--strict", fetch.SUMS], cwd=all_fetched, capture_output=True,
                          text=True)
    assert done.returncode == 0 and done.stdout.count(": OK") == len(places)


def test_the_second_time_nothing_is_downloaded(all_fetched: Path, published: Publisher):
    published.reset()
    said = run(NAMES, all_fetched)
    assert not published.asked
    assert sum(EXISTING in line for line in said) == len(tree(all_fetched)) - 1
    assert any("cosqa-train.json exists already, matches the published digest" in line for line in said)
    assert any("ekar_chinese/test.json exists already, unchanged since it was fetched" in line for line in said)


def test_only_what_is_missing_is_downloaded(all_fetched: Path, published: Publisher):
    published.reset()
    (all_fetched / "cmnli/dev.json").unlink()
    (all_fetched / "pclue/pCLUE_train_4.json").unlink()
    run(["cmnli", "pclue"], all_fetched)
    assert [path.rpartition("/")[2] for path, _ in published.asked] == ["cmnli_public.zip", "pCLUE_train_4.json"]
    assert load("cmnli", str(all_fetched)).questions == load("cmnli", None).questions


def test_a_file_that_was_changed_is_told_and_kept(all_fetched: Path):
    for place in ("mbpp/mbpp.jsonl", "ekar_chinese/test.json", "logic/logic_val.csv"):
        (all_fetched / place).write_text("mine")
    with pytest.raises(OSError) as error:
        run(["mbpp", "ekar", "logic", "c3"], all_fetched)
    assert str(error.value).count("is not the official file") == 3 and "\n" not in str(error.value)
    assert (all_fetched / "mbpp/mbpp.jsonl").read_text() == "mine"


def test_a_file_that_a_user_brought_is_not_taken_for_checked(published: Publisher, tmp_path: Path):
    (tmp_path / "ekar_chinese").mkdir()
    (tmp_path / "ekar_chinese/test.json").write_text("{}")
    said = run(["ekar"], tmp_path)
    assert any("test.json exists already, not checked" in line for line in said)
    assert "ekar_chinese/test.json" not in (tmp_path / fetch.SUMS).read_text()


def test_where_nobody_publishes_a_digest_the_first_download_is_recorded(published: Publisher, tmp_path: Path):
    said = run(["ekar"], tmp_path)
    assert any("no digest is published; recorded in SHA256SUMS" in line for line in said)
    before = (tmp_path / "ekar_chinese/train.json").read_bytes()
    (tmp_path / "ekar_chinese/train.json").unlink()
    [path] = [path for path in published.files if "ekar_chinese" in path and path.endswith("/train.json")]
    published.files[path] = b'{"other": 1}'
    with pytest.raises(OSError, match="has changed since its first download: the sha256 of ekar_chinese/train.json is"):
        run(["ekar"], tmp_path)
    assert tree(tmp_path) == {"ekar_chinese/test.json", fetch.SUMS}
    published.files[path] = before
    run(["ekar"], tmp_path)
    assert (tmp_path / "ekar_chinese/train.json").read_bytes() == before


def test_a_newly_published_digest_wins_over_an_older_record(published: Publisher, tmp_path: Path):
    (tmp_path / fetch.SUMS).write_text(f"{'0' * 64}  mbpp/mbpp.jsonl\n{'0' * 64}  other/file\n")
    run(["mbpp"], tmp_path)
    lines = (tmp_path / fetch.SUMS).read_text().splitlines()
    assert len(lines) == 3 and f"{'0' * 64}  other/file" in lines and f"{'0' * 64}  mbpp/mbpp.jsonl" not in lines


def test_one_that_fails_leaves_the_others_to_be_fetched(published: Publisher, tmp_path: Path):
    [wrong] = [path for path in published.files if path.endswith("/c3-d-dev.json")]
    published.files[wrong] += b" "
    [gone] = [path for path in published.files if path.endswith("/pid_splits.json")]
    del published.files[gone]
    with pytest.raises(OSError) as error:
        run(["c3", "scienceqa", "mbpp"], tmp_path)
    told = str(error.value)
    assert "c3: http" in told and "is not the published file: " in told
    assert "scienceqa: the server refuses" in told and "Look at https://scienceqa.github.io for where" in told
    assert tree(tmp_path) == {"mbpp/mbpp.jsonl", "mbpp/sanitized-mbpp.json", "scienceqa/problems.json", fetch.SUMS}


def test_an_archive_that_lacks_a_file(published: Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    [path] = [path for path in published.files if path.endswith("dureader_robust-data.tar.gz")]
    monkeypatch.setattr(fetch, "_members", lambda archive, members, top: fetch_members(
        archive, members | {"dureader_robust/dev.json": "nowhere.json"}, top))
    with pytest.raises(OSError, match="dureader: dureader_robust-data.tar.gz is not an archive with .*nowhere.json"):
        run(["dureader"], tmp_path)
    assert tree(tmp_path) == set() and published.asked == [(path, None)]


fetch_members = fetch._members


@pytest.mark.parametrize("name", ["logic", "dureader"])
def test_what_is_no_archive(published: Publisher, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    for path in published.files:
        published.files[path] = b"no archive"
    [file] = releases.releases()[name].files
    monkeypatch.setitem(releases.releases(), name, dataclasses.replace(
        releases.releases()[name], files=(releases.File(file.url, file.places),)))
    with pytest.raises(OSError, match=f"{name}: .* is not an archive with .*"):
        run([name], tmp_path)
    assert tree(tmp_path) == set()


def test_a_file_that_would_be_there_twice(published: Publisher, tmp_path: Path):
    """Readers refuse two of a name, whichever they are."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mbpp.jsonl").write_text("{}")
    with pytest.raises(OSError, match=r"mbpp: .*/mine/mbpp.jsonl exists already. Move it to .*/mbpp/mbpp.jsonl, "):
        run(["mbpp"], tmp_path)
    assert not published.asked


def test_what_needs_a_signature_is_refused_with_the_address(published: Publisher, tmp_path: Path):
    with pytest.raises(ValueError, match="^jecqa: the publisher provides the files only on request. Ask for them at "
                                         "https://jecqa.thunlp.org/ and put them at .*/jecqa/0_train.json and "):
        run(["jecqa", "c3"], tmp_path)
    assert "c3/c3-d-dev.json" in tree(tmp_path)


def test_what_was_asked_for_is_read_where_it_is_to_be_put(published: Publisher, tmp_path: Path):
    for number in range(2):
        (tmp_path / "jecqa").mkdir(exist_ok=True)
        (tmp_path / f"jecqa/{number}_train.json").write_text(
            json.dumps({"id": str(number), "statement": "S", "option_list": {"A": "a", "B": "b"}, "answer": ["B"]}))
    assert any("not checked" in line for line in run(["jecqa"], tmp_path))
    assert len(load("jecqa", str(tmp_path)).questions) == 2


def test_no_network_is_one_line(published: Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                capsys: pytest.CaptureFixture[str]):
    def refuses(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", refuses)
    assert cli.main(["fetch", "mbpp", "logic", f"--data_dir={tmp_path}"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("t5x fetch: error: mbpp: no connection to 127.0.0.1 (") and "copy its folder" in line


def test_the_command(published: Publisher, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["fetch", "mbpp", "code.mbpp", f"--gin.DATA_DIR={tmp_path}/new/data"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("mbpp: MBPP") and "licence: CC BY 4.0" in told[0]
    assert told[-1] == f"Use them with --gin.DATA_DIR={tmp_path}/new/data"
    assert len(published.asked) == 2
    assert load("mbpp", f"{tmp_path}/new/data").questions == load("mbpp", None).questions


def test_slips_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for arguments, message in (
            (["mbppp"], "there are no official files named 'mbppp'; nearest: mbpp"),
            (["mbpp"], "no --data_dir is given"),
            (["mbpp", "--data_dir=gs://bucket/data"], "gs://bucket/data is not a local folder")):
        assert cli.main(["fetch", *arguments]) == 1
        [line] = capsys.readouterr().err.splitlines()
        assert message in line
    assert cli.main(["fetch"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(releases.releases())


def test_a_mirror_of_the_hub(published: Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_ENDPOINT", published.address + "/mirror/")
    [file] = releases.releases()["logic"].files
    path = str(file.url).removeprefix(published.address)
    official = dataclasses.replace(file, url="https://huggingface.co" + path)
    monkeypatch.setitem(releases.releases(), "logic", dataclasses.replace(
        releases.releases()["logic"], files=(official,)))
    published.files["/mirror" + path] = published.files.pop(path)
    run(["logic"], tmp_path)
    assert load("logic", str(tmp_path)).questions == load("logic", None).questions


def test_two_at_once(published: Publisher, tmp_path: Path):
    with fetch._alone(tmp_path), pytest.raises(OSError, match="another process is fetching into"):
        run(["mbpp"], tmp_path)
    run(["mbpp"], tmp_path)


def test_a_kill_before_the_file_has_its_name(published: Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As a kill between any two steps: of the moves each in turn does not happen."""
    reached = 0
    replace = os.replace

    class Killed(BaseException):
        pass

    while True:
        moves = iter(range(reached))

        def move(source: str, target: str, moves=moves) -> None:
            if next(moves, None) is None:
                raise Killed
            replace(source, target)

        folder = tmp_path / str(reached)
        monkeypatch.setattr(fetch.os, "replace", move)
        try:
            run(["cmnli", "mbpp"], folder)
            break
        except Killed:
            pass
        monkeypatch.setattr(fetch.os, "replace", replace)
        for place in tree(folder):
            if not Path(place).name.startswith(".") and place != fetch.SUMS:
                assert (folder / place).read_bytes() == _official(published, place)
        run(["cmnli", "mbpp"], folder)
        assert load("cmnli", str(folder)).questions == load("cmnli", None).questions
        assert not any(Path(place).name.startswith(".") for place in tree(folder))
        reached += 1
    assert reached == 7  # three files recorded, of which an archive has two, and four moved


def _official(published: Publisher, place: str) -> bytes:
    name = place.rpartition("/")[2]
    return (Path(tasks.__file__).parent / "benchmarks" / "samples" / (place if name in ("dev.json", "train.json")
                                                                      else name)).read_bytes()


def test_help_needs_no_network_and_no_heavy_library():
    script = ("import sys; from codellm_jax import cli; cli.main(['fetch']); "
              "print(sorted({'jax', 'gin', 'numpy', 'tensorflow', 'tqdm'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_progress_on_a_terminal(published: Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run(["alpaca_gpt4_en"], tmp_path)
    shown = capsys.readouterr().err
    assert "alpaca_gpt4_data.json" in shown and "B/s" in shown and "0%" in shown


def test_progress_in_a_log(published: Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                           capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(download, "LOG_EVERY", 0.0001)
    monkeypatch.setattr(download, "PIECE", 100)
    run(["alpaca_gpt4_en"], tmp_path)
    shown = capsys.readouterr().err.splitlines()
    form = r"alpaca_gpt4_data.json: \d+%, [\d.]+k? of 200kB, ([\d.]+[kM]?|\?)B/s, (\d\d:\d\d|\?) left"
    assert len(shown) >= 3 and all(re.fullmatch(form, line) for line in shown)
