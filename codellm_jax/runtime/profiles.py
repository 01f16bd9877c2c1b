"""Profiles: traces of some steps of a run, on the host and on its devices.

    MODEL_DIR/tensorboard/plugins/profile/steps_10-15/
      process_0.xplane.pb           for TensorBoard with the plugin of `pip install xprof`
      process_0.perfetto.json.gz    the same for https://ui.perfetto.dev

In the row of the main thread, `train` is the host's part of a step. Functions that take time in it and between steps
appear by name, such as Meter.settle, evaluate and Checkpoints.save, as does batch_of_step in the threads that read
ahead. All other Python functions are left out, because tracing them would slow the host being profiled.
"""

import dataclasses
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
from etils import epath

from codellm_jax.runtime.meter import Meter


@dataclasses.dataclass(frozen=True)
class ProfileSteps:
    """Steps `first` to `last`, both included, counted from 1 as in the status line."""

    first: int
    last: int

    def require_within(self, last_step: int) -> None:
        """Raises ValueError if a run of `last_step` steps does not have all of these."""
        if self.last > last_step:
            raise ValueError(f"--profile_steps={self.first}:{self.last} exceeds the run, which has {last_step} "
                             "steps.")


def parse_profile_steps(text: str) -> ProfileSteps:
    """Parses --profile_steps=FIRST:LAST. Raises ValueError in one line."""
    found = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
    if found is None:
        raise ValueError(f"--profile_steps must be FIRST:LAST, two steps such as 10:15, found {text!r}.")
    first, last = map(int, found.groups())
    if first < 1:
        raise ValueError(f"--profile_steps={text}: steps are counted from 1.")
    if last < first:
        raise ValueError(f"--profile_steps={text} ends before it begins: give the earlier step first.")
    return ProfileSteps(first, last)


class Profile:
    """Traces the requested steps of a run, if any; each process writes its own files.

    Args:
      steps: the steps to trace; None for none.
      done: steps done before; a resumed run can trace only later ones.
      model_dir: the run directory, local or gs://.
      say: prints a line, only on the first process.
    """

    def __init__(self, steps: ProfileSteps | None, done: int, model_dir: str, say: Callable[[str], None]) -> None:
        self._steps, self._model_dir, self._say = steps, model_dir, say
        self._began: int | None = None
        self._traced: tempfile.TemporaryDirectory[str] | None = None
        if steps is None or steps.first > done:
            return
        asked = f"--profile_steps={steps.first}:{steps.last}"
        if steps.last <= done:
            say(f"{asked} is over, since {done} steps are done: nothing will be profiled.")
            self._steps = None
        else:
            say(f"{asked} begins with completed steps: steps {done + 1} to {steps.last} will be profiled.")
            self._steps = ProfileSteps(done + 1, steps.last)

    def begin_before(self, step: int, meter: Meter) -> None:
        """Starts tracing if `step`, about to be taken, is the first one requested."""
        if self._steps is None or step != self._steps.first:
            return
        meter.settle()  # keeps the end of the previous step off the trace
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        # JAX writes only to local folders, and names files by host, which processes may share.
        self._traced = tempfile.TemporaryDirectory()
        jax.profiler.start_trace(self._traced.name, create_perfetto_trace=True, profiler_options=options)
        self._began = step
        meter.restart()

    def end_after(self, step: int, meter: Meter) -> None:
        """Stops tracing and writes the profile if `step`, already dispatched, is the last one requested."""
        if self._steps is not None and step == self._steps.last:
            meter.settle()
            self.close(step)
            meter.restart()

    def close(self, step: int) -> None:
        """Writes the trace so far, unless that is done; `step` is the last step taken."""
        if self._traced is None or self._began is None:
            return
        jax.profiler.stop_trace()
        if step >= self._began:
            self._write(self._began, step, Path(self._traced.name))
        self._traced.cleanup()
        self._traced = None

    def _write(self, first: int, last: int, traced: Path) -> None:
        folder = epath.Path(self._model_dir) / "tensorboard" / "plugins" / "profile" / f"steps_{first}-{last}"
        process = f"process_{jax.process_index()}"
        (written,) = (traced / "plugins" / "profile").iterdir()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for file in written.glob("*.xplane.pb"):
                (folder / f"{process}.xplane.pb").write_bytes(file.read_bytes())
            (folder / f"{process}.perfetto.json.gz").write_bytes((written / "perfetto_trace.json.gz").read_bytes())
            self._say(f"Profile of steps {first} to {last}: {folder}. Drop {process}.perfetto.json.gz onto "
                      f"https://ui.perfetto.dev, or: pip install xprof; tensorboard --logdir {self._model_dir}")
        except OSError as error:  # must not end the run
            self._say(f"WARNING: the profile of steps {first} to {last} is not written: {error}.")
