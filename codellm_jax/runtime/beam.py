"""Work shared out by Apache Beam, which is imported here alone.

Beam carries little texts that name a piece of the work. What is done is seen in files, so that a runner, its workers
and its bundles change nothing of it; a worker that dies or does its work twice does no harm.
"""

import logging
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

LOCAL = "DirectRunner"


def require_beam(otherwise: str) -> None:
    """Raises ValueError with a line of text where Beam is not installed."""
    logging.disable(logging.WARNING)  # of clients that it could have and that nobody needs here
    try:
        import apache_beam  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "apache_beam":
            raise
        raise ValueError(otherwise) from None
    finally:
        logging.disable(logging.NOTSET)


def run(do: Callable[[str], None], todo: Sequence[str], runner: str, options: Sequence[str] = ()) -> None:
    """Has a runner do what each text says, in any order, in bundles of any size.

    Args:
      do: is sent to workers, and so must be of a kind that can be pickled.
      runner: by Beam's name. DirectRunner has as many processes as this machine has cores, unless `options` say others.
      options: Beam's own, as on its command lines: ["--direct_num_workers=8"].

    Raises:
      ValueError, OSError, RuntimeError: what went wrong in a worker, in one line.
    """
    if not todo:
        return
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions

    if runner not in (known := StandardOptions.KNOWN_RUNNER_NAMES) and "." not in runner:
        raise ValueError(f"--runner={runner} is no runner of Beam's; it has {', '.join(known)}.")
    workers = min(len(os.sched_getaffinity(0)), len(todo))
    if runner == LOCAL and workers > 1:
        options = [f"--direct_num_workers={workers}", "--direct_running_mode=multi_processing", *options]
    # Of workers on this machine warnings would be seen several times.
    parsed = PipelineOptions(["--default_sdk_harness_log_level=ERROR", *options])
    try:
        with beam.Pipeline(runner=_local_runner(parsed) if runner == LOCAL else runner, options=parsed) as pipeline:
            # Reshuffling lets other workers than the one that lists them do the work.
            _ = (pipeline | "parts" >> beam.Create(list(todo)) | "spread" >> beam.Reshuffle()
                 | "work" >> beam.Map(do))
    except Exception as error:
        raise _reason(error) from error


def _local_runner(options: Any) -> Any:
    """What Beam's DirectRunner comes to, without the program (Prism) that it would first download to try."""
    from apache_beam.portability.api import beam_provision_api_pb2
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner
    from apache_beam.runners.portability.fn_api_runner.fn_runner import ExtendedProvisionInfo
    from apache_beam.runners.portability.portable_runner import JobServiceHandle

    encoded = JobServiceHandle.encode_pipeline_options(options.get_all_options())
    return FnApiRunner(provision_info=ExtendedProvisionInfo(
        beam_provision_api_pb2.ProvisionInfo(pipeline_options=encoded)))


def _reason(error: Exception) -> Exception:
    """What went wrong in a worker, out of the page that Beam makes of it."""
    own = re.findall(r"^(?:RuntimeError: )?(?:\w+\.)*(\w*Error): (?!Traceback)(.+?)(?: \[while running .*)?$",
                     str(error), flags=re.MULTILINE)
    if not own:
        return error
    name, line = own[-1]
    kind = {"ValueError": ValueError, "OSError": OSError, "FileNotFoundError": OSError, "PermissionError": OSError}
    return kind.get(name, RuntimeError)(line.strip())
