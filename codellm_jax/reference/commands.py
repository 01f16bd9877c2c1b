"""The sub-commands and their flags, read from the parser of the command itself."""

import argparse
import dataclasses

from codellm_jax.flags import parser


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag or a positional argument.

    Attributes:
      name: as it is typed, with what stands for its value: "--seed=SEED", "RUN[@STEP]".
      meaning: its help.
      choices: the values that it takes; empty for any.
      required: whether it must be given.
    """

    name: str
    meaning: str
    choices: tuple[str, ...]
    required: bool


@dataclasses.dataclass(frozen=True)
class Command:
    """A sub-command; `flags` has neither --help nor --gin.NAME=VALUE, and `after` is the text below its flags."""

    name: str
    summary: str
    description: str
    takes_gin: bool
    flags: tuple[Flag, ...]
    after: str


def commands() -> tuple[Command, ...]:
    """All sub-commands in the order of the help."""
    [sub] = [action for action in parser()._actions if isinstance(action, argparse._SubParsersAction)]
    summaries = {action.dest: action.help or "" for action in sub._choices_actions}
    return tuple(
        Command(name, summaries[name], command.description or "", "--gin_file" in command._option_string_actions,
                tuple(_flag(action) for action in command._actions
                      if action.option_strings != ["-h", "--help"] and action.help != argparse.SUPPRESS),
                command.epilog or "")
        for name, command in sub.choices.items())


def _flag(action: argparse.Action) -> Flag:
    value = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    names = ", ".join(action.option_strings)
    takes_value = action.nargs != 0
    written = f"{names}={value}" if names and takes_value else names or value
    meaning = (action.help or "") % {**vars(action), "prog": "t5x"}
    return Flag(written, meaning, tuple(map(str, action.choices or ())), bool(action.required))
