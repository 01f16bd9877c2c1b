"""Effects of stages and laws of the mixture from a study's runs so far; runs as a separate process.

    python -m codellm_jax.watching.told STUDY_DIR

It prints a part of a page. Fits and figures take seconds to minutes, during which the page keeps refreshing.
"""

import html
import os
import sys

from etils import epath

from codellm_jax.report import asked, effects_page, law_files, sweep_page
from codellm_jax.report.pages import fragment
from codellm_jax.report.runs import require_same_arm, require_same_measurement, require_same_sources
from codellm_jax.report.write import read_study
from codellm_jax.runtime.supervision import die_with_parent
from codellm_jax.runtime.terminal import one_line


def told(directory: str) -> str:
    """The effects and laws that can be determined now, as HTML.

    Raises:
      FileNotFoundError, ValueError: with a one-line message, why there are none yet.
    """
    study = read_study(epath.Path(directory).expanduser(), lambda line: None)
    require_same_arm(study.runs)
    require_same_sources(study.runs)
    require_same_measurement(run.results for run in study.runs)
    compared = asked.groups(study)
    effects, _ = effects_page.effects(compared)
    swept, said = sweep_page.sweeps(compared)
    blocks = [*effects.blocks, *swept.blocks, *(law_files.section(directory) if said else [])]
    if not blocks:
        raise ValueError("no two arms that differ in the share of code have finished training")
    return fragment(blocks)


def main(directory: str) -> int:
    """Prints them, or the reason why there are none yet."""
    try:
        print(told(directory))
    except Exception as error:  # includes half-written files
        print(f"<h2>Effects and laws</h2><p>They cannot be determined yet: {html.escape(one_line(error))}</p>")
    return 0


if __name__ == "__main__":
    die_with_parent()
    os.nice(10)
    sys.exit(main(sys.argv[1]))
