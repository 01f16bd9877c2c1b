"""Shell completion of `t5x` by argcomplete: sub-commands, flags, gin files, and the settings of the shipped ones.

    eval "$(register-python-argcomplete t5x)"
"""

import argparse
import re

from codellm_jax.settings import SHIPPED, shipped_gin_files


def complete(parser: argparse.ArgumentParser) -> None:
    """Answers the shell and ends the process. Raises ImportError if argcomplete is not installed."""
    import argcomplete

    files = argcomplete.completers.FilesCompleter((".gin",))
    settings = shipped_settings()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                for flag in command._actions:
                    if "--gin_file" in flag.option_strings:
                        flag.completer = lambda prefix, **_: [  # type: ignore[attr-defined]
                            *(name for name in shipped_gin_files() if name.startswith(prefix)), *files(prefix)]
                        for name in settings:
                            command.add_argument(f"--gin.{name}", metavar="VALUE")
    argcomplete.autocomplete(parser, always_complete_options="long")


def shipped_settings() -> list[str]:
    """The settings, such as BATCH_SIZE, that the shipped gin files set or need."""
    text = "\n".join((SHIPPED / name).read_text() for name in shipped_gin_files())
    return sorted(set(re.findall(r"(?:^(?:\w+/)?|%)([A-Z][A-Z0-9_]+)\b", text, flags=re.MULTILINE)))
