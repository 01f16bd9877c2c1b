"""hf:// names against a stand-in hub on loopback: what comes, what is resumed, what is refused and how it heals."""

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import Hub, fake_hub

from codellm_jax import hub as library

huggingface_hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")
file_download = pytest.importorskip("huggingface_hub.file_download")

WEIGHTS = bytes(range(256)) * 40
PATTERNS = ["*.safetensors", "*.json"]
NAME = "hf://some/model"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process asks, with an empty cache in tmp_path/cache."""
    repository = tmp_path / "served/some/model"
    repository.mkdir(parents=True)
    (repository / "model.safetensors").write_bytes(WEIGHTS)
    (repository / "config.json").write_text('{"model_type": "llama"}')
    (repository / "picture.png").write_bytes(b"not asked for")
    with fake_hub(tmp_path / "served") as served:
        monkeypatch.setenv("HF_ENDPOINT", served.address)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
        for name, seconds in (("HF_HUB_ETAG_TIMEOUT", 2), ("HF_HUB_DOWNLOAD_TIMEOUT", 2)):
            monkeypatch.setattr(constants, name, seconds)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between attempts
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        yield served


def downloads(hub: Hub) -> list[str]:
    return [path for method, path in hub.requests if method == "GET" and not path.startswith("/api")]


def commits(hub: Hub, **contents: bytes) -> None:
    """Puts commits into some/model, each with weights of its own."""
    for name, content in contents.items():
        folder = hub.folder / "some/model/.commits" / name.ljust(40, "0")
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(content)


def points(hub: Hub, revision: str, name: str) -> None:
    file = hub.folder / "some/model/.refs" / revision
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(name.ljust(40, "0"))


def test_what_is_a_name():
    assert library.is_hub_name(NAME)
    assert not any(map(library.is_hub_name, ("some/model", "gs://some/model", "/hf://x", "")))


@pytest.mark.parametrize("name", ["hf://", "hf://model", "hf://some/", "hf:///model", "hf://some/model/config.json",
                                  "hf://some/model@", "hf://some/../model", "hf://some/model@../../x",
                                  "hf://some/model@/etc", "hf://some/mo del", "hf://datasets/some/model"])
def test_what_is_no_name_is_refused(name: str):
    with pytest.raises(ValueError, match="is not a name on the hub; give hf://ORG/NAME"):
        library.snapshot(name, PATTERNS)


def test_the_whole_is_downloaded_once(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder, commit = library.snapshot(NAME, PATTERNS)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert (folder / "config.json").read_text() == '{"model_type": "llama"}'
    assert not (folder / "picture.png").exists()
    assert commit == hub.commit("some/model", "main") and len(commit) == 40
    assert capsys.readouterr().err == f"{NAME}: downloading the files that {tmp_path}/cache lacks.\n"
    hub.requests.clear()
    assert library.snapshot(NAME, PATTERNS) == (folder, commit)
    assert not downloads(hub)


def test_the_content_is_read_once_for_its_check(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    library.snapshot(NAME, ["*.json"])
    read: list[str] = []
    digests = library._digests
    monkeypatch.setattr(library, "_digests", lambda file, length: [read.append(file.name), digests(file, length)][1])
    for _ in range(2):
        library.snapshot(NAME, PATTERNS)
    assert read == ["model.safetensors"]


@pytest.mark.parametrize("revision", ["branch", "v1.0", "refs/pr/1", "2".ljust(40, "0")])
def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: Hub, revision: str):
    commits(hub, **{"1": b"the first", "2": b"the second"})
    for name in ("branch", "v1.0", "refs/pr/1"):
        points(hub, name, "2")
    folder, commit = library.snapshot(f"{NAME}@{revision}", PATTERNS)
    assert commit == "2".ljust(40, "0")
    assert (folder / "model.safetensors").read_bytes() == b"the second"


def test_a_branch_that_goes_on_is_followed(hub: Hub):
    commits(hub, **{"1": b"the first", "2": b"the second"})
    points(hub, "main", "1")
    assert (library.snapshot(NAME, PATTERNS)[0] / "model.safetensors").read_bytes() == b"the first"
    points(hub, "main", "2")
    assert (library.snapshot(NAME, PATTERNS)[0] / "model.safetensors").read_bytes() == b"the second"


# ---- Connections -------------------------------------------------------------------------------


@pytest.mark.parametrize("ranges", [True, False])
def test_a_connection_that_breaks_off_is_taken_up_again(hub: Hub, ranges: bool):
    hub.ranges = ranges
    hub.drop["model.safetensors"] = [1000, 0, 5000]
    folder, _ = library.snapshot(NAME, PATTERNS)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert len(downloads(hub)) == 2 + 3


def test_a_connection_that_is_reset_is_tried_again(hub: Hub):
    hub.reset["model.safetensors"] = library.ATTEMPTS - 1
    assert (library.snapshot(NAME, PATTERNS)[0] / "model.safetensors").read_bytes() == WEIGHTS
    (hub.folder / "some/model/model.safetensors").write_bytes(WEIGHTS + b"2")
    hub.reset["model.safetensors"] = library.ATTEMPTS
    with pytest.raises(OSError, match=f"{NAME}: the connection to {hub.address} failed"):
        library.snapshot(NAME, PATTERNS)


def test_one_that_always_breaks_off_is_given_up(hub: Hub, tmp_path: Path):
    hub.drop_always["model.safetensors"] = 1000
    with pytest.raises(OSError, match=f"{NAME}: the connection to {hub.address} failed") as raised:
        library.snapshot(NAME, PATTERNS)
    assert "\n" not in str(raised.value)
    hub.drop_always.clear()
    assert (library.snapshot(NAME, PATTERNS)[0] / "model.safetensors").read_bytes() == WEIGHTS


def test_a_hub_that_does_not_answer_is_no_hang(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(library, "LONGEST_WAIT", 0.2)
    hub.silent = True
    with pytest.raises(OSError, match=f"the connection to {hub.address} failed"):
        library.snapshot(NAME, PATTERNS)


def test_a_hub_that_is_not_there(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    library.snapshot("hf://some/model", ["config.json"])
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OSError, match="the connection to http://127.0.0.1:9 failed"):
        library.snapshot("hf://other/model", PATTERNS)
    library.snapshot("hf://some/model", ["config.json"])  # which the cache has


def test_offline_the_cache_is_all_there_is(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    folder, commit = library.snapshot(NAME, PATTERNS)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    assert library.snapshot(NAME, PATTERNS) == (folder, commit)
    with pytest.raises(OSError, match="hf://other/model is not in .* and HF_HUB_OFFLINE forbids"):
        library.snapshot("hf://other/model", PATTERNS)
    with pytest.raises(OSError, match="HF_HUB_OFFLINE forbids"):
        library.snapshot(NAME, ["*.png"])


def test_a_full_disk_is_told(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(file_download, "http_get", full)
    with pytest.raises(OSError, match="the disk of .* is full; make room, or set HF_HOME"):
        library.snapshot(NAME, PATTERNS)


# ---- Content -----------------------------------------------------------------------------------


@pytest.mark.parametrize("file, expected", [
    ("model.safetensors", hashlib.sha256(WEIGHTS).hexdigest()),
    ("config.json", hashlib.sha1(b'blob 23\0{"model_type": "llama"}').hexdigest())])
def test_another_content_is_refused_and_heals(hub: Hub, tmp_path: Path, file: str, expected: str):
    good = (hub.folder / "some/model" / file).read_bytes()
    hub.content[file] = bytes([good[0] ^ 1]) + good[1:]
    digests = {64: hashlib.sha256(hub.content[file]), 40: hashlib.sha1(b"blob 23\0" + hub.content[file])}
    found = digests[len(expected)].hexdigest()
    for _ in range(2):
        with pytest.raises(OSError) as raised:
            library.snapshot(NAME, PATTERNS)
        assert f"{file} has the digest {found} instead of {expected}" in str(raised.value)
    assert not any(path.read_bytes() == hub.content[file] for path in tmp_path.glob("cache/**/*") if path.is_file())
    hub.content.clear()
    folder, _ = library.snapshot(NAME, PATTERNS)
    assert (folder / file).read_bytes() == good


def test_a_file_that_changes_in_the_cache_is_found(hub: Hub):
    folder, _ = library.snapshot(NAME, PATTERNS)
    (folder / "model.safetensors").write_bytes(b"x" + WEIGHTS[1:])
    with pytest.raises(OSError, match="model.safetensors has the digest"):
        library.snapshot(NAME, PATTERNS)
    assert (library.snapshot(NAME, PATTERNS)[0] / "model.safetensors").read_bytes() == WEIGHTS


def test_offline_a_file_of_other_programs_is_checked_by_its_name(hub: Hub, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch):
    hub.content["model.safetensors"] = b"x" + WEIGHTS[1:]
    # which does not look at the content
    huggingface_hub.snapshot_download("some/model", endpoint=hub.address, cache_dir=tmp_path / "cache")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    with pytest.raises(OSError, match="model.safetensors has the digest"):
        library.snapshot(NAME, PATTERNS)


def test_a_file_of_another_size_is_refused(hub: Hub):
    hub.content["model.safetensors"] = WEIGHTS + b"and more"
    with pytest.raises(OSError, match="model.safetensors"):
        library.snapshot(NAME, PATTERNS)


@pytest.mark.parametrize("evil", ["../../../evil.json", "/tmp/evil.json", "a/../../../../evil.json"])
def test_names_stay_in_their_folder(hub: Hub, tmp_path: Path, evil: str):
    hub.listed_besides.append(evil)
    with pytest.raises(OSError, match="evil.json") as raised:
        library.snapshot(NAME, PATTERNS)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.rglob("evil.json")) and not Path("/tmp/evil.json").exists()


# ---- What is not there or not allowed ----------------------------------------------------------


def test_what_is_not_there(hub: Hub):
    with pytest.raises(ValueError, match=f"{hub.address} has no hf://no/model, or it is private"):
        library.snapshot("hf://no/model", PATTERNS)
    with pytest.raises(ValueError, match="hf://some/model has no revision v9"):
        library.snapshot(f"{NAME}@v9", PATTERNS)
    with pytest.raises(ValueError, match=r"hf://some/model holds no file \*.gguf or \*.onnx"):
        library.snapshot(NAME, ["*.gguf", "*.onnx"])


@pytest.mark.parametrize("refused, line", [
    ((401, "RepoNotFound"), "or it is private: check the name, or set HF_TOKEN"), ((401, ""), "set HF_TOKEN"),
    ((403, "GatedRepo"), "is gated: accept its terms"), ((401, "GatedRepo"), "is gated: accept its terms"),
    ((403, ""), "(HTTP 403): set HF_TOKEN"), ((500, ""), "(HTTP 500)"), ((503, ""), "(HTTP 503)")])
@pytest.mark.parametrize("files_alone", [False, True])
def test_what_is_not_allowed(hub: Hub, monkeypatch: pytest.MonkeyPatch, refused: tuple[int, str], line: str,
                             files_alone: bool):
    (hub.refuse_files if files_alone else hub.refuse)["some/model"] = refused
    hub.token = "hf_good"
    with pytest.raises((ValueError, OSError)) as raised:
        library.snapshot(NAME, PATTERNS)
    assert line in str(raised.value) and "\n" not in str(raised.value)
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert (library.snapshot(NAME, PATTERNS)[0] / "model.safetensors").read_bytes() == WEIGHTS


# ---- Processes ---------------------------------------------------------------------------------


def test_several_processes_may_ask_at_once(hub: Hub, tmp_path: Path):
    (hub.folder / "some/model/model.safetensors").write_bytes(WEIGHTS * 500)
    script = f"from codellm_jax import hub; print(hub.snapshot({NAME!r}, {PATTERNS!r})[1])"
    environment = {**os.environ, **hub.environment(tmp_path / "home")}
    asking = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
              for _ in range(3)]
    commit = hub.commit("some/model", "main")
    assert [process.communicate()[0].strip() for process in asking] == [commit] * 3
    weights = tmp_path / f"home/hub/models--some--model/snapshots/{commit}/model.safetensors"
    assert weights.read_bytes() == WEIGHTS * 500


def test_without_the_library_it_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"hf://some/model needs huggingface_hub: pip install 'codellm_jax\[hf\]'"):
        library.snapshot(NAME, PATTERNS)
