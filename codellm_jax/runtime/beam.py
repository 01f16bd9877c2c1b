"""Work distributed by Apache Beam, which only this module imports.

Beam distributes short texts that each name a piece of work. Files record what is done, so the result does not depend
on the runner, its workers or its bundles; a worker that dies or repeats its work does no harm.
"""

import logging
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

LOCAL = "DirectRunner"


def require_beam(otherwise: str) -> None:
    """Raises ValueError, in one line, if Beam is not installed."""
    logging.disable(logging.WARNING)  # about optional clients that are not needed here
    try:
        import apache_beam  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "apache_beam":
            raise
        raise ValueError(otherwise) from None
    finally:
        logging.disable(logging.NOTSET)


def run(do: Callable[[str], None], todo: Sequence[str], runner: str, options: Sequence[str] = ()) -> None:
    """Runs `do` on each text with a Beam runner, in any order, in bundles of any size.

    Args:
      do: does the work that a text names; sent to workers, so it must be picklable.
      runner: Beam's name of the runner. DirectRunner uses a process per core unless `options` say otherwise.
      options: Beam's own, as on its command lines: ["--direct_num_workers=8"].

    Raises:
      ValueError, OSError, RuntimeError: the error of a worker, in one line.
    """
    if not todo:
        return
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions

    if runner not in (known := StandardOptions.KNOWN_RUNNER_NAMES) and "." not in runner:
        raise ValueError(f"--runner={runner} is not a Beam runner; these are: {', '.join(known)}.")
    workers = min(len(os.sched_getaffinity(0)), len(todo))
    if runner == LOCAL and workers > 1:
        options = [f"--direct_num_workers={workers}", "--direct_running_mode=multi_processing", *options]
    # Local workers would repeat warnings.
    parsed = PipelineOptions(["--default_sdk_harness_log_level=ERROR", *options])
    try:
        with beam.Pipeline(runner=_local_runner(parsed) if runner == LOCAL else runner, options=parsed) as pipeline:
            # Reshuffling lets workers other than the one that lists the texts do the work.
            _ = (pipeline | "parts" >> beam.Create(list(todo)) | "spread" >> beam.Reshuffle()
                 | "work" >> beam.Map(do))
    except Exception as error:
        raise _reason(error) from error


def _local_runner(options: Any) -> Any:
    """The local runner behind Beam's DirectRunner, without the program (Prism) that Beam would first download."""
    from apache_beam.portability.api import beam_provision_api_pb2
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner
    from apache_beam.runners.portability.fn_api_runner.fn_runner import ExtendedProvisionInfo
    from apache_beam.runners.portability.portable_runner import JobServiceHandle

    encoded = JobServiceHandle.encode_pipeline_options(options.get_all_options())
    return FnApiRunner(provision_info=ExtendedProvisionInfo(
        beam_provision_api_pb2.ProvisionInfo(pipeline_options=encoded)))


def _reason(error: Exception) -> Exception:
    """The error of a worker, extracted from Beam's long message."""
    own = re.findall(r"^(?:RuntimeError: )?(?:\w+\.)*(\w*Error): (?!Traceback)(.+?)(?: \[while running .*)?$",
                     str(error), flags=re.MULTILINE)
    if not own:
        return error
    name, line = own[-1]
    kind = {"ValueError": ValueError, "OSError": OSError, "FileNotFoundError": OSError, "PermissionError": OSError}
    return kind.get(name, RuntimeError)(line.strip())
