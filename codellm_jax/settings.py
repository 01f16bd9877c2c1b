"""What gin files and flags say, setting by setting, each with where it stands."""

import dataclasses
import difflib
import functools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

# What holds the shipped gin/ folder: the checkout, or in an installation the package. (The folder beside an installed
# package is the library of that name.)
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
    """All settings in the order in which they were read, and the modules that gin files import."""

    settings: tuple[Setting, ...]
    imports: tuple[str, ...] = ()
    taken_over: int = 0  # so many of the settings, the first ones, are those of a run that is gone on from

    @functools.cached_property
    def effective(self) -> dict[str, Setting]:
        """The last setting of each name."""
        return {setting.name: setting for setting in self.settings}

    @property
    def asked(self) -> dict[str, str]:
        """Name -> value of what files and flags say; nothing of it is taken over from another run."""
        return {setting.name: setting.value for setting in self.settings[self.taken_over:]}

    def of_stage(self, stage: str) -> list[tuple[str, str]]:
        """(name, value) of what a study's file says of one of its stages, as on the command line of its runs; what a
        run finds out itself, %BRANCH_STEP, stays as it is written.
        """
        return [(name.removeprefix(f"{stage}/"), value if value == "%BRANCH_STEP" else str(self.resolved(name)))
                for name, value in self.asked.items() if name.startswith(f"{stage}/")]

    def resolved(self, name: str) -> str | None:
        """The value of a setting, and where it is that of a macro the macro's; None where nothing sets it."""
        effective = self.effective
        value = effective[name].value if name in effective else None
        while value and re.fullmatch(r"%\w+", value):
            value = effective[value[1:]].value
        return value


@functools.lru_cache(maxsize=4096)
def references(mark: str, value: str) -> tuple[str, ...]:
    """The names behind each "@" or "%" of a value as gin writes it, but for those inside of strings."""
    return tuple(re.findall(rf"{mark}([\w/.]+)", re.sub(r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"", "''", value)))


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the names that are like it, or a full stop."""
    near = difflib.get_close_matches(name, set(known), n=3, cutoff=0.5)
    return f"; nearest: {', '.join(near)}." if near else "."


def shipped_gin_files() -> Iterator[str]:
    """Names of the gin files that come with the package, such as gin/models/tiny.gin, but for those of upstream T5X."""
    for path in sorted((SHIPPED / "gin").rglob("*.gin")):
        if path.parent.name != "t5x":
            yield path.relative_to(SHIPPED).as_posix()


def listed(configuration: Configuration) -> str:
    """Everything that files and flags set, a line each: name, value, the parameters that a macro is the value of, and
    where it stands. Parameters that only name a macro have no line of their own.
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
