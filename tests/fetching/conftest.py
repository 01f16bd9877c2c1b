"""A publisher on loopback, and the table of releases with its addresses there."""

import dataclasses
import gzip
import hashlib
import io
import os
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_publisher import Publisher, fake_publisher

from codellm_jax.fetching import download, releases
from tasks.benchmarks.locating import SAMPLES


@pytest.fixture
def publisher(monkeypatch: pytest.MonkeyPatch) -> Iterator[Publisher]:
    """One that serves nothing yet, to a client that is impatient."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(download, "TIMEOUT", 1.0)
    monkeypatch.setattr(download, "FIRST_WAIT", 0.01)
    with fake_publisher({}) as found:
        yield found


INSTRUCTIONS = b'[{"instruction": "Name a colour.", "input": "", "output": "Green."},' + b"\n" * 200_000 + (
    b'{"instruction": "Name a town.", "input": "", "output": "Ulm."}]')


def official(place: str) -> bytes:
    """A small file in the official form of a path below DATA_DIR."""
    if place.endswith(".gz"):
        return gzip.compress(official(place.removesuffix(".gz")))
    name = place.replace("ekar_chinese", "ekar").replace("dureader_robust", "dureader").replace("train.50k", "train")
    for sample in (Path(SAMPLES, name), Path(SAMPLES, Path(name).name)):
        if sample.is_file():
            return sample.read_bytes()
    if place.startswith("pclue/"):
        return b'{"input": "%s", "target": "yes"}\n' % place.encode()
    assert place.startswith(("alpaca_gpt4/", "codealpaca/", "humaneval/")), place
    return INSTRUCTIONS


def archived(url: str, members: dict[str, bytes]) -> bytes:
    """A zip or tar archive, as the address's suffix says, with a member beside those that are wanted."""
    made = io.BytesIO()
    members = members | {"README.md": b"Cite us."}
    if url.endswith(".zip"):
        with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as zipped:
            for name, content in members.items():
                zipped.writestr(name, content)
    else:
        with tarfile.open(fileobj=made, mode="w:gz") as tape:
            for name, content in members.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tape.addfile(entry, io.BytesIO(content))
    return made.getvalue()


@pytest.fixture
def published(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> Publisher:
    """Serves small files in official form where the table says, but for the host; digests are of the same kinds."""
    kinds: dict[str, Any] = {
        "sha256": lambda content: hashlib.sha256(content).hexdigest(),
        "md5": lambda content: hashlib.md5(content).hexdigest(),
        "git": lambda content: hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}

    def here(file: releases.File) -> releases.File:
        if file.url is None:
            return file
        path = "/" + file.url.split("/", 3)[3]
        members = {member: official(place) for place, member in file.places.items() if member}
        content = archived(file.url, members) if members else official(next(iter(file.places)))
        publisher.files[path] = content
        kind = file.digest and file.digest.partition(":")[0]
        return dataclasses.replace(
            file, url=publisher.address + path, size=file.size and len(content),
            digest=kind and f"{kind}:{kinds[kind](content)}")

    table = {name: dataclasses.replace(each, files=tuple(map(here, each.files)))
             for name, each in releases.releases().items()}
    monkeypatch.setattr(releases, "releases", lambda: table)
    return publisher
