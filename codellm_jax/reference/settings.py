"""Every setting: its type, its default, what it means, where a shipped gin file sets it, and what uses it."""

import dataclasses
import functools
import io
import re
import tokenize
from collections.abc import Collection, Mapping, Sequence

from codellm_jax.configuration import CONFIGURABLES, SHIPPED, read_settings, shipped_gin_files
from codellm_jax.reference.documented import Parameter, parameters
from codellm_jax.settings import Setting, references

# What the command itself sets: name -> meaning.
SET_BY_THE_COMMAND = {"BRANCH_STEP": "The step of BRANCH_FROM, or 0: where the schedules of a branch begin."}


@dataclasses.dataclass(frozen=True)
class Documented:
    """A setting of gin files and flags.

    Attributes:
      name: a macro such as "BATCH_SIZE", or "configurable.parameter".
      type: the annotation of the parameter, or of that which the macro is bound to.
      default: the parameter's default as the source writes it; None where a value must be given. Macros have none.
      meaning: one or more sentences; of a macro the meaning of the parameter that it is bound to.
      defined: "package.module:name", what takes the parameter.
      files: the shipped gin files that set it, each with its line and its value: ("gin/pretrain.gin:59", "8").
      bound: of a macro the parameters that are bound to it, of a parameter the macros.
    """

    name: str
    type: str
    default: str | None
    meaning: str
    defined: str
    files: tuple[tuple[str, str], ...] = ()
    bound: tuple[str, ...] = ()

    @property
    def is_macro(self) -> bool:
        """Whether it is set by a bare name, BATCH_SIZE = 8."""
        return "." not in self.name


@functools.cache
def settings() -> tuple[Documented, ...]:
    """All settings: macros in the order in which the shipped files name them, then parameters by configurable."""
    shipped = _shipped()
    set_in: dict[str, list[Setting]] = {}
    for setting in shipped:
        set_in.setdefault(setting.name.rpartition("/")[2], []).append(setting)
    of_macro: dict[str, dict[str, None]] = {}
    for name, each in set_in.items():
        for setting in each:
            for macro in references("%", setting.value):
                of_macro.setdefault(macro, {})[name] = None
    plain = {f"{configurable}.{parameter.name}": _parameter(configurable, parameter, set_in)
             for configurable, target in CONFIGURABLES.items() for parameter in parameters(target)}
    return (*(_macro(name, set_in.get(name, ()), uses, plain) for name, uses in of_macro.items()), *plain.values())


def _parameter(configurable: str, found: Parameter, set_in: Mapping[str, Sequence[Setting]]) -> Documented:
    name = f"{configurable}.{found.name}"
    where = set_in.get(name, ())
    bound = dict.fromkeys(macro for setting in where for macro in references("%", setting.value))
    return Documented(name, found.type, found.default, _sentence(found.meaning), CONFIGURABLES[configurable],
                      _values(where), tuple(bound))


def _macro(
    name: str, where: Sequence[Setting], uses: Collection[str], plain: Mapping[str, Documented]
) -> Documented:
    """A macro; the first parameter that it is bound to, in the order of CONFIGURABLES, says its type and meaning."""
    bound = tuple(each for each in plain if each in uses)
    comment = next(filter(None, map(_comment, where)), "")
    return Documented(
        name, plain[bound[0]].type, None,
        _sentence(SET_BY_THE_COMMAND.get(name) or comment or plain[bound[0]].meaning), plain[bound[0]].defined,
        _values(where), bound)


def _sentence(meaning: str) -> str:
    """A meaning with a capital at its beginning, unless that is a name, and a full stop."""
    if re.match(r"[a-z]+\b(?![._])", meaning):
        meaning = meaning[0].upper() + meaning[1:]
    return meaning if not meaning or meaning.endswith(".") else f"{meaning}."


def _values(where: Sequence[Setting]) -> tuple[tuple[str, str], ...]:
    return tuple((setting.where, _scoped(setting)) for setting in where)


def _scoped(setting: Setting) -> str:
    """The value; of one stage of a study, with the stage in front."""
    stage = setting.name.rpartition("/")[0]
    return f"{stage}/ {setting.value}" if stage else setting.value


@functools.cache
def _shipped() -> tuple[Setting, ...]:
    """Every line of the shipped gin files that sets something, once; those of pre-training, which has most, first."""
    found = {}
    for file in sorted(shipped_gin_files(), key=lambda file: file != "gin/pretrain.gin"):
        for setting in read_settings([file], ()).settings:
            found[setting.where] = setting
    return tuple(found.values())


def _comment(setting: Setting) -> str:
    """The comment that ends a setting's line in its gin file; "" if there is none."""
    file, _, line = setting.where.rpartition(":")
    text = (SHIPPED / file).read_text(encoding="utf-8").splitlines()[int(line) - 1]
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    except tokenize.TokenError:  # a value of several lines
        return ""
    return next((token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT), "")
