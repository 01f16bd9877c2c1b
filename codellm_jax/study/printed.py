"""The plan of a study as commands for something else to run."""

import shlex
from collections.abc import Sequence

from codellm_jax.study.arms import Study, waves
from codellm_jax.study.planned import Planned


def shell_commands(chosen: Sequence[Planned], asked: Study, search_paths: Sequence[str], again: str) -> str:
    """The plan as shell commands, with comments that tell which may run at the same time."""
    by_name = {one.run.name: one for one in chosen}
    lines = [f"# {asked.directory}, {asked.comparison}: {len(chosen)} runs. Those of one group may run at the same "
             "time, on any machines that see that directory and the data."]
    for number, group in enumerate(waves([one.run for one in chosen]), 1):
        lines += ["", f"# Group {number}" + (", once the group before is done" if number > 1 else "")]
        for run in group:
            one = by_name[run.name]
            lines.append(" && ".join(shlex.join(["t5x", *command]) for command in (
                one.train_command(search_paths),
                *([one.eval_command(search_paths)] if one.tasks else []))))
    return "\n".join([*lines, "", "# When all are done: finds them done, and writes what tells of all of them",
                      again])
