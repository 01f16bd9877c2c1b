"""requirements.lock is what setup.py asks for, in versions that it allows."""

import runpy
from pathlib import Path

import pytest
import setuptools
from packaging.markers import default_environment
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent


def test_the_lock_holds_all_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, list[str]] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **given: asked.update(
        {"own": given["install_requires"]} | given["extras_require"]))
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    pins = [Requirement(line) for line in (ROOT / "requirements.lock").read_text().splitlines()]
    here = default_environment() | {"extra": ""}
    pinned = {pin.name.lower().replace("_", "-"): str(pin.specifier).removeprefix("==")
              for pin in pins if pin.marker is None or pin.marker.evaluate(here)}
    wanted = [Requirement(line) for extra in ("own", "test", "tpu", "gcs") for line in asked[extra]]
    assert len(wanted) > 40
    for requirement in wanted:
        version = pinned[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement} and {version}"
