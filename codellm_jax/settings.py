"""The settings of gin files and flags, each with its source."""

import dataclasses
import difflib
import functools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

# The parent of the shipped gin/ folder: the checkout, or the package in an installation. (A folder gin/ beside an
# installed package is the library of that name.)
SHIPPED = next(folder for folder in (Path(__file__).resolve().parent, Path(__file__).resolve().parent.parent)
               if (folder / "gin" / "pretrain.gin").is_file())


@dataclasses.dataclass(frozen=True)
class Setting:
    """One line of a gin file or one flag."""

    name: str  # a macro such as BATCH_SIZE, or configurable.parameter
    value: str  # as gin writes it
    where: str  # file:line, or the flag


@dataclasses.dataclass(frozen=True)
class Configuration:
    """All settings in the order they were read, and the modules that gin files import."""

    settings: tuple[Setting, ...]
    imports: tuple[str, ...] = ()
    taken_over: int = 0  # the number of leading settings that are inherited from the parent run

    @functools.cached_property
    def effective(self) -> dict[str, Setting]:
        """The last setting of each name."""
        return {setting.name: setting for setting in self.settings}

    @property
    def asked(self) -> dict[str, str]:
        """Name -> value of the settings from files and flags, without those inherited from another run."""
        return {setting.name: setting.value for setting in self.settings[self.taken_over:]}

    def of_stage(self, stage: str) -> list[tuple[str, str]]:
        """(name, value) of a study file's settings of one of its stages, as on the command line of its runs;
        %BRANCH_STEP, which a run determines itself, stays as written.
        """
        return [(name.removeprefix(f"{stage}/"), value if value == "%BRANCH_STEP" else str(self.resolved(name)))
                for name, value in self.asked.items() if name.startswith(f"{stage}/")]

    def resolved(self, name: str) -> str | None:
        """The value of a setting, with macros resolved; None if nothing sets it."""
        effective = self.effective
        value = effective[name].value if name in effective else None
        while value and re.fullmatch(r"%\w+", value):
            value = effective[value[1:]].value
        return value


@functools.lru_cache(maxsize=4096)
def references(mark: str, value: str) -> tuple[str, ...]:
    """The names after each "@" or "%" of a value in gin's syntax, except inside strings."""
    return tuple(re.findall(rf"{mark}([\w/.]+)", re.sub(r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"", "''", value)))


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: similar names, or a full stop."""
    near = difflib.get_close_matches(name, set(known), n=3, cutoff=0.5)
    return f"; nearest: {', '.join(near)}." if near else "."


def shipped_gin_files() -> Iterator[str]:
    """Names of the gin files that come with the package, such as gin/models/tiny.gin, without those for upstream
    T5X."""
    for path in sorted((SHIPPED / "gin").rglob("*.gin")):
        if path.parent.name != "t5x":
            yield path.relative_to(SHIPPED).as_posix()


def listed(configuration: Configuration) -> str:
    """Everything that files and flags set, one line each: name, value, the parameters that use a macro, and the source.
    Parameters that only name a macro have no line of their own.
    """
    effective = configuration.effective
    uses: dict[str, list[str]] = {}
    for setting in effective.values():
        if re.fullmatch(r"%\w+", setting.value):
            uses.setdefault(setting.value[1:], []).append(setting.name)
    earlier: dict[str, list[Setting]] = {}
    for setting in configuration.settings:
        earlier.setdefault(setting.name, []).append(setting)
    rows = []
    for name, setting in effective.items():
        if not re.fullmatch(r"%\w+", setting.value):
            before = [old for old in earlier[name][:-1] if old.value != setting.value][-1:]
            over = "".join(f", over {old.value} of {old.where}" for old in before)
            rows.append((name, setting.value, _first(uses.get(name, [])), setting.where + over))
    head = ("setting", "value", "sets", "stands in")
    widths = [min(most, max(len(row[k]) for row in [head, *rows])) for k, most in enumerate((36, 44, 32))]
    return "\n".join("  ".join([*(f"{text:<{width}}" for text, width in zip(row[:3], widths, strict=True)), row[3]])
                     for row in [head, *rows])


def _first(names: list[str]) -> str:
    return "" if not names else names[0] + f" and {len(names) - 1} more" * (len(names) > 1)
