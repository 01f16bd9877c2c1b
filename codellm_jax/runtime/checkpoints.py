"""Checkpoints: the only importer of Orbax.

  MODEL_DIR/checkpoints/<step>/state    parameters, optimizer, step, rng
  MODEL_DIR/checkpoints/<step>/record   JSON: ledger, settings, versions, and a checksum of every array

Saves are asynchronous and commit by renaming, so a process killed at any moment leaves the last complete checkpoint
intact. A restore recomputes the checksums: a checkpoint that does not match them is reported and set aside, and the
one before it is used.
"""

import contextlib
import datetime
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from codellm_jax.mixture.transient import SECONDS_BETWEEN_TRIES, is_transient
from codellm_jax.results.files import digest
from codellm_jax.runtime.distributed import gathered, wait_for_all
from codellm_jax.runtime.files import is_step
from codellm_jax.runtime.terminal import is_of_peers

WEIGHTS_OF_OTHERS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".gguf", ".npz")
SAVE_TIMEOUT = datetime.timedelta(minutes=20)
FULL = ("No space left on device", "Disk quota exceeded", "File too large")
CHUNKS = (2**20, 2**26)  # minimum and maximum bytes of an array chunk, which is stored and read as one


class Checkpoints:
    """The checkpoints of one run directory. A context manager: leaving it waits for a save in flight.

    Args:
      directory: MODEL_DIR/checkpoints, local or gs://.
      keep_last: number of the newest checkpoints to keep.
      keep_every: also keep those at multiples of this step; None for none.
      keep_steps: also keep those of these steps.

    Raises:
      ValueError: the directory is in gs://, and Orbax's requirements for it are not installed.
    """

    def __init__(
        self, directory: str, keep_last: int = 2, keep_every: int | None = None, keep_steps: Collection[int] = (),
    ) -> None:
        if directory.startswith("gs://"):
            # Orbax would only notice when it first deletes or restores something: at the first resume.
            try:
                from google.cloud import storage as _  # noqa: F401
            except ImportError:
                raise ValueError(f"{directory} needs google-cloud-storage: pip install google-cloud-storage "
                                 "google-cloud-storage-control, or this package with [gcs] or [tpu].") from None
        self._directory = _absolute(directory)  # Orbax refuses relative paths, but only when saving
        self._kept = _kept(keep_last, keep_every, keep_steps)
        self._saving = False
        self._bytes = 0  # of what is saved
        self._manager = self._opened()

    def _opened(self) -> ocp.CheckpointManager:
        """A manager of the steps that exist now."""
        # Lightweight: it reads no file of a checkpoint, which may be damaged. Its own `reload` reads them.
        return ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._kept, cleanup_tmp_directories=True, lightweight_initialize=True,
                # In the background, a folder that cannot be created keeps threads and the process for five minutes.
                async_options=ocp.AsyncOptions(
                    timeout_secs=int(SAVE_TIMEOUT.total_seconds()), create_directories_asynchronously=False)),
            item_handlers={"state": ocp.StandardCheckpointHandler(), "record": ocp.JsonCheckpointHandler()})

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        try:
            self._manager.close()
        except Exception:
            if error_type is None:  # else the error already being raised matters more
                raise

    @jax.profiler.annotate_function
    def save(self, step: int, state: Any, record: Mapping[str, Any]) -> None:
        """Starts a save; returns when the state is copied, so that its buffers may be donated."""
        record = dict(record) | {"checksums": checksums(state), "step": step}
        record["digest"] = digest(record)
        self._saving = True
        self._bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        with self._one_line():
            saves = self._manager.save(
                step, args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state, save_args=_chunked(state)), record=ocp.args.JsonSave(record)))
            if not saves:  # Orbax skips a step that is not after the newest
                raise ValueError(f"step {step} is not after step {self.newest_step()}, which exists already")

    def raise_if_failed(self) -> None:
        """Raises OSError if a background save failed. Cheap enough for every step."""
        # The manager's own check_for_errors misses errors of its finalizing thread; joining that thread does not.
        if self._saving and not self._manager.is_saving_in_progress():
            self._saving = False
            self.wait()

    def is_there(self, step: int) -> bool:
        """Whether a complete checkpoint of a step exists."""
        return (self._directory / str(step) / "record").exists() and (self._directory / str(step) / "state").exists()

    def reload(self) -> None:
        """Lists the steps again, since others may have removed some."""
        self._manager.close()
        self._manager = self._opened()

    def newest_step(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """The steps of the existing checkpoints."""
        return list(self._manager.all_steps())

    def wait(self) -> None:
        """Waits until the save in flight is committed. Raises OSError if it failed."""
        with self._one_line():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _one_line(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if is_of_peers(error):  # nothing to explain
                raise
            raise OSError(
                f"Saving to {self._directory} failed: {self._why(error)}. Fix this and run the same command again: it "
                "continues from the last complete checkpoint.") from error

    def _why(self, error: Exception) -> str:
        if not any(reason in str(error) for reason in FULL):
            return first_line(error)
        return f"No space left on device. The checkpoint takes {self._bytes / 1e6:,.1f} MB"

    def record(self, step: int) -> dict[str, Any]:
        """The JSON saved at a step, without the state. Raises ValueError if it differs from what was saved."""
        return _require_undamaged(
            self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore())).record, step)

    def restore_newest(
        self, abstract: Any, check: Callable[[dict[str, Any]], None], report: Callable[[str], None] = print
    ) -> tuple[Any, dict[str, Any]] | None:
        """The newest undamaged checkpoint as (state on `abstract`'s shardings, record); None if there is none.

        A damaged one is reported and moved to MODEL_DIR/damaged_checkpoints. `check` is called with the record
        before the state is read, and raises if it belongs to another run.

        Raises:
          ValueError: all checkpoints are damaged, or the state's arrays differ from `abstract`.
        """
        damaged = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            record, error = _tried(self.record, step)
            if error is None:
                check(record)
                require_same_arrays(record["checksums"], abstract, step)
                state, error = _tried(self._state, step, abstract)
            if error is None:
                _, error = _tried(_verify, record["checksums"], state)
            if error is None:
                _, error = _tried(_require_step, getattr(state, "step", None), step)
            if error is not None:
                damaged.append((step, error))
                continue
            self._set_aside(damaged, report)
            return state, record
        if damaged:
            raise ValueError(
                f"All checkpoints in {self._directory} are damaged ({first_line(damaged[0][1])}): "
                "restore one from a copy, or start again in another MODEL_DIR.")
        return None

    def set_aside_from(self, step: int, report: Callable[[str], None]) -> None:
        """Moves checkpoints of this step and later ones to MODEL_DIR/damaged_checkpoints, since they give no finite
        loss; earlier ones stay.
        """
        self._set_aside([(found, ValueError("its parameters give a loss that is not finite"))
                         for found in self._manager.all_steps() if found >= step], report)

    def _state(self, step: int, abstract: Any) -> Any:
        return self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))).state

    def _set_aside(self, damaged: list[tuple[int, Exception]], report: Callable[[str], None]) -> None:
        for step, error in damaged:
            aside = self._directory.parent / "damaged_checkpoints" / str(step)
            report(f"WARNING: the checkpoint of step {step} is damaged ({first_line(error)}); moved to {aside}; "
                   "the one before it is used.")
            if jax.process_index() == 0:
                aside.parent.mkdir(parents=True, exist_ok=True)
                if aside.exists():
                    aside.rmtree()
                (self._directory / str(step)).rename(aside)
        if damaged:
            wait_for_all("set aside")
            self.reload()


def restore_parameters(
    model_dir: str, abstract_params: Any, check: Callable[[dict[str, Any]], None] = lambda record: None,
    report: Callable[[str], None] = print,
) -> tuple[Any, dict[str, Any]]:
    """Only the parameters of the newest undamaged checkpoint of a run directory, and its record with its `step`.

    `check` is called with the record before parameters are read, and raises if they do not fit.

    Raises:
      FileNotFoundError: the directory holds no checkpoint.
      ValueError: its parameters have other names or shapes, or all checkpoints are damaged.
    """
    wanted = {"params": abstract_params}
    for path, record in undamaged_records(model_dir, report):
        saved = {name: facts for name, facts in record["checksums"].items() if name.startswith("params/")}
        check(record)
        require_same_arrays(saved, wanted, int(path.name))
        restored, error = _tried(
            ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore, path / "state", ocp.args.PyTreeRestore(
                item=wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True))
        if error is None:
            _, error = _tried(_verify, saved, restored)
        if error is not None:
            report(f"WARNING: the checkpoint {path} is damaged ({first_line(error)}).")
            continue
        report(f"Parameters from step {path.name} of {model_dir}.")
        return restored["params"], record | {"step": int(path.name)}
    raise ValueError(f"All checkpoints in {model_dir} are damaged: restore one from a copy.")


def restore_state(
    model_dir: str, step: int, abstract: Any, report: Callable[[str], None] = print
) -> tuple[Any, dict[str, Any]]:
    """The whole state of one step of a run directory, on `abstract`'s shardings, and its record with its `step`.

    Raises:
      FileNotFoundError: there is no checkpoint of the step.
      ValueError: it is damaged, or of another model or optimizer.
    """
    record = record_of(model_dir, step)
    require_same_arrays(record["checksums"], abstract, step)
    path = _absolute(model_dir) / "checkpoints" / str(step) / "state"
    state, error = _tried(ocp.Checkpointer(ocp.StandardCheckpointHandler()).restore, path,
                          ocp.args.StandardRestore(abstract))
    if error is None:
        _, error = _tried(_verify, record["checksums"], state)
    if error is not None:
        raise ValueError(f"The checkpoint of step {step} in {model_dir} is damaged ({first_line(error)}): branch from "
                         "another step.")
    report(f"State from step {step} of {model_dir}.")
    return state, record


def record_of(model_dir: str, step: int) -> dict[str, Any]:
    """The JSON of one step of a run directory, with its `step`.

    Raises:
      FileNotFoundError: there is no checkpoint of the step.
      ValueError: its record is damaged.
    """
    for _, record in undamaged_records(model_dir, lambda line: None, only=step):
        return record | {"step": step}
    raise ValueError(f"The record of step {step} in {model_dir} is damaged: choose another step.")


def newest_record(model_dir: str) -> tuple[int, dict[str, Any]]:
    """The step and the JSON of the newest checkpoint of a run directory with an undamaged record.

    Raises:
      FileNotFoundError: the directory holds no checkpoint.
      ValueError: the records of all its checkpoints are damaged.
    """
    for path, record in undamaged_records(model_dir, lambda line: None):
        return int(path.name), record
    raise ValueError(f"All checkpoints in {model_dir} are damaged: restore one from a copy.")


def undamaged_records(
    model_dir: str, report: Callable[[str], None], only: int | None = None
) -> Iterator[tuple[epath.Path, dict[str, Any]]]:
    """The checkpoints of a run directory with their records, newest first, or that of one step; damaged records are
    reported and skipped.
    """
    checkpoints = _absolute(model_dir) / "checkpoints"
    steps = sorted((int(path.name) for path in checkpoints.iterdir() if is_step(path.name)), reverse=True) \
        if checkpoints.exists() else []
    if not steps:
        raise FileNotFoundError(f"{_why_none(_absolute(model_dir))}: name the MODEL_DIR of a run that saved one.")
    if only is not None and only not in steps:
        raise FileNotFoundError(f"No checkpoint of step {only} in {checkpoints}; there are those of steps "
                                f"{', '.join(map(str, sorted(steps)))}.")
    for step in steps if only is None else [only]:
        path = checkpoints / str(step)
        record, error = _tried(_whole_record, path)
        if error is not None:
            report(f"WARNING: the checkpoint {path} is damaged ({first_line(error)}).")
            continue
        yield path, record


def _why_none(directory: epath.Path) -> str:
    """The reason why a run directory has no checkpoint, judged by its other content."""
    if not directory.exists():
        return f"There is no directory {directory}"
    if not directory.is_dir():
        return f"{directory} is a file, not a run directory"
    if directory.name.startswith("checkpoint_") or any(directory.glob("checkpoint_*")):
        return f"{directory} is upstream T5X's, of which t5x adopt {directory} --output=RUN makes a run"
    if foreign := sorted(path.name for path in directory.iterdir() if path.suffix in WEIGHTS_OF_OTHERS):
        return f"{directory} holds {foreign[0]}, weights of an unsupported format, and no checkpoint of t5x train"
    if inner := [path for path in (directory, directory.parent) if path.name == "checkpoints"]:
        return f"{directory} is a part of the run directory {inner[0].parent}"
    return f"No checkpoint in {directory / 'checkpoints'}"


def _whole_record(path: epath.Path) -> dict[str, Any]:
    return _require_undamaged(ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(path / "record"), int(path.name))


def _tried(read: Callable[..., Any], *arguments: Any) -> tuple[Any, Exception | None]:
    """The result of a read and None; or None and the error, on every process if it failed on one: processes that use
    different newest checkpoints would wait for each other forever.

    Raises:
      OSError: storage does not answer after several tries, which says nothing about the checkpoint.
    """
    for seconds in (*SECONDS_BETWEEN_TRIES, None):
        found, error = None, None
        try:
            found = read(*arguments)
        except Exception as failure:
            error = failure
        failed = gathered(np.array([2 if error is not None and is_transient(error) else error is not None])).max()
        if failed < 1:
            return found, None
        if failed < 2:
            break
        if seconds is None:
            raise OSError("A checkpoint cannot be read now and is left unchanged: "
                          f"{first_line(error) if error else 'another process could not read it'}. Run the same "
                          "command again once it can be read.")
        time.sleep(seconds)
    return None, error or OSError("another process could not read it")


def _absolute(path: str) -> epath.Path:
    """An absolute local path; a remote path unchanged, which `resolve` would turn into a local one."""
    return epath.Path(path) if "://" in path else epath.Path(path).expanduser().resolve()


def resolved(path: str) -> str:
    """A directory's absolute name."""
    return str(_absolute(path))


def checksums(tree: Any) -> dict[str, list[Any]]:
    """For each array its shape, dtype, and the wrapping sum of its bits as uint32: the same on any mesh."""
    leaves = named_leaves(tree)
    sums = jax.device_get(_bit_sums(list(leaves.values())))
    return {name: [list(leaf.shape), str(leaf.dtype), int(sum_)]
            for (name, leaf), sum_ in zip(leaves.items(), sums, strict=True)}


def _kept(last: int, every: int | None, steps: Collection[int]) -> Any:
    """Orbax's policy of which checkpoints to keep."""
    policies = ocp.checkpoint_managers.preservation_policy
    regular = [] if every is None else [policies.EveryNSteps(every)]
    return policies.AnyPreservationPolicy([policies.LatestN(last), *regular, policies.CustomSteps(sorted(steps))])


def _chunked(state: Any) -> Any:
    """The storage chunks of arrays: each layer of a stack separately, so that one can be read without the others."""
    least, most = CHUNKS

    def of(path: tuple[Any, ...], leaf: Any) -> ocp.SaveArgs:
        if leaf.ndim < 2 or "blocks" not in [getattr(key, "key", None) for key in path]:
            return ocp.SaveArgs(chunk_byte_size=most)
        layer = math.prod(leaf.sharding.shard_shape(leaf.shape)[1:]) * leaf.dtype.itemsize
        return ocp.SaveArgs(chunk_byte_size=min(max(layer, least), most), shard_axes=(0,))

    return jax.tree_util.tree_map_with_path(of, state)


@jax.jit
def _bit_sums(leaves: list[jax.Array]) -> list[jax.Array]:
    def bit_sum(leaf: jax.Array) -> jax.Array:
        if leaf.dtype == jnp.bool_:
            return jnp.sum(leaf, dtype=jnp.uint32)
        unsigned = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
        return jnp.sum(bits, dtype=jnp.uint32)

    return [bit_sum(leaf) for leaf in leaves]


def _require_undamaged(record: Mapping[str, Any], step: int) -> dict[str, Any]:
    if record.get("digest") != digest(record):
        raise ValueError("its record differs from what was saved")
    _require_step(record.get("step"), step)
    return dict(record)


def _require_step(found: Any, step: int) -> None:
    """Raises ValueError if a checkpoint is stored under another number; None, of earlier versions, is not checked."""
    if found is not None and int(found) != step:
        raise ValueError(f"it is the checkpoint of step {int(found)} under another number")


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths, such as "params/blocks/attention/key_kernel"."""
    return {"/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path): leaf
            for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _verify(saved: Mapping[str, list[Any]], tree: Any) -> None:
    found = checksums(tree)
    wrong = [name for name in found if found[name] != list(saved[name])]
    if wrong:
        raise ValueError(f"{len(wrong)} arrays differ from what was saved, {wrong[0]} first")


def require_same_arrays(saved: Mapping[str, list[Any]], abstract: Any, step: int) -> None:
    """Raises ValueError if the checkpoint's arrays differ from `abstract`: another model or optimizer."""
    wanted = {name: list(leaf.shape) for name, leaf in named_leaves(abstract).items()}
    found = {name: list(facts[0]) for name, facts in saved.items()}
    for name in [*wanted, *found]:
        if wanted.get(name) != found.get(name):
            raise ValueError(
                f"The checkpoint of step {step} has another model or optimizer: {name} is {found.get(name, 'absent')} "
                f"there and {wanted.get(name, 'absent')} here. Use the configuration it was trained with.")


def first_line(error: BaseException) -> str:
    """The first line of an error, without the details that libraries append."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].split(" (<")[0].split(": (slice")[0][:160]
