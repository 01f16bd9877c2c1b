"""Leases, on a disk and in a bucket: one holder of any number, renewed, given back, taken over, lost."""

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_bucket import FakeBucket

from codellm_jax.runtime import leases as module
from codellm_jax.runtime.leases import (
    BEATS,
    LEASE,
    LEASE_SECONDS,
    RECORD,
    Leases,
    State,
    as_holder,
    as_record,
    leased,
)

BEAT = LEASE_SECONDS / BEATS


class Clock:
    """A monotonic clock that stands still but for `sleep`, which wakes the threads that wait by it, one deadline after
    the other, and goes on once they wait again. So nothing depends on how busy the machine is.
    """

    def __init__(self) -> None:
        self.now = 1000.0
        self.changed = threading.Condition()
        self.events: list[Event] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        end = self.now + seconds
        with self.changed:
            while True:
                assert self.changed.wait_for(lambda: all(event.is_set or event.due for event in self.events), 60)
                due = [event for event in self.events if not event.is_set and event.due <= end]
                if not due:
                    break
                first = min(due, key=lambda event: event.due)
                self.now, first.due = max(self.now, first.due), 0.0
                self.changed.notify_all()
            self.now = end


class Event:
    """A `threading.Event` for one thread, which waits by the clock; `due` is until when, 0 while it does not wait."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self.is_set, self.due = clock, False, 0.0
        clock.events.append(self)

    def set(self) -> None:
        with self._clock.changed:
            self.is_set = True
            self._clock.changed.notify_all()

    def wait(self, seconds: float = float("inf")) -> bool:
        with self._clock.changed:
            self.due = self._clock.now + seconds
            self._clock.changed.notify_all()
            self._clock.changed.wait_for(lambda: self.is_set or not self.due)
            return self.is_set


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """The clock of the leases of a test."""
    clock = Clock()
    monkeypatch.setattr(module, "time", SimpleNamespace(
        monotonic=clock.monotonic, sleep=clock.sleep, time=lambda: time.time()))
    monkeypatch.setattr(module, "threading", SimpleNamespace(
        Event=lambda: Event(clock), Thread=threading.Thread, Lock=threading.Lock))
    return clock


@pytest.fixture(scope="module")
def bucket():
    with FakeBucket() as fake, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", fake.url)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
        yield fake


@pytest.fixture(params=["disk", "gs"])
def place(request, tmp_path, bucket) -> str:
    bucket.objects.clear()
    return str(tmp_path / "a study: 100% #1?") if request.param == "disk" else "gs://bucket/a study #1"


def stop() -> None:
    """What a lease calls once it is lost."""


def text(place: str, bucket: FakeBucket, name: str) -> bytes | None:
    """A file of the state as it lies there, read without the library."""
    if place.startswith("gs://"):
        return bucket.objects.get(f"a study #1/state/{name}", (0, None))[1]
    path = Path(place) / "state" / name
    return path.read_bytes() if path.exists() else None


def test_one_of_many_has_it_and_gives_it_back(place, bucket):
    everyone = [Leases(State(place)) for _ in range(8)]
    for _ in range(5):
        held, ready = [], threading.Barrier(len(everyone))

        def take(one: Leases, held: list[str] = held, ready: threading.Barrier = ready) -> None:
            ready.wait()
            with one.held("A.seed0", stop, step=7) as lease:
                if lease is not None:
                    held.append(one._token)
                ready.wait()  # none gives it back before all have asked

        with ThreadPoolExecutor(len(everyone)) as pool:
            list(pool.map(take, everyone))
        assert len(held) == 1
        assert text(place, bucket, "A.seed0.lease") is None
    assert bucket.refused or not place.startswith("gs://")


def test_what_a_lease_says_and_who_sees_it(place, bucket):
    one, other = Leases(State(place)), Leases(State(place))
    with one.held("A.seed0", stop, step=7) as lease:
        assert lease is not None and other.holder("A.seed0") == one.worker
        said = json.loads(text(place, bucket, "A.seed0.lease") or b"")
        assert (said["worker"], said["step"], said["expires"], said["process"]) == (one.worker, 7, 120.0, os.getpid())
        assert other.state.names(LEASE) == ["A.seed0"] and other.state.names(RECORD) == []
        with other.held("A.seed0", stop) as second, other.held("B.seed0", stop) as third:
            assert second is None and third is not None
    assert other.holder("A.seed0") is None and other.state.names(LEASE) == []


def test_a_lease_that_is_renewed_outlives_its_time(place, clock):
    one, other = Leases(State(place)), Leases(State(place))
    with one.held("A.seed0", stop) as lease:
        for _ in range(12):
            assert other.holder("A.seed0") == one.worker
            clock.sleep(LEASE_SECONDS / 4)
        assert lease is not None and not lease.lost
        assert (other.state.read("A.seed0")[0] or {})["beats"] == 3 * BEATS


def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases taken from now on are not renewed, as though their machine were cut off or gone."""
    monkeypatch.setattr(module.Lease, "_renew", lambda self: self._ended.wait())


def test_a_silent_lease_is_over_by_the_clock_of_who_waits(place, monkeypatch, clock):
    """Clocks of other machines, and jumps of one's own, change nothing; the first owner's end leaves the second's."""
    one, other = Leases(State(place)), Leases(State(place))
    with monkeypatch.context() as patch:
        silent(patch)
        patch.setattr(time, "time", lambda: 4e9)  # the holder's clock is decades ahead
        first = one.held("A.seed0", stop)
        assert first.__enter__() is not None
    clock.sleep(1.5 * LEASE_SECONDS)
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: 9e9)
        assert other.holder("A.seed0") == one.worker  # seen for the first time
        clock.sleep(0.99 * LEASE_SECONDS)
        assert other.holder("A.seed0") == one.worker
        clock.sleep(0.02 * LEASE_SECONDS)
        assert other.holder("A.seed0") is None
    with other.held("A.seed0", stop) as lease:
        assert lease is not None
        first.__exit__(None, None, None)
        assert one.holder("A.seed0") == other.worker and other.state.names(LEASE) == ["A.seed0"]
        assert not lease.lost


@pytest.mark.parametrize("how", ["taken", "removed"])
def test_who_loses_a_lease_stops_at_the_next_beat(place, how, clock):
    one, thief = Leases(State(place)), State(place)
    stopped = threading.Event()
    with one.held("A.seed0", stopped.set) as lease:
        assert lease is not None
        value = thief.read("A.seed0")[0]
        assert value is not None
        another = value | {"token": "another", "worker": "host:1"}
        thief.write("A.seed0", another if how == "taken" else None)
        clock.sleep(0.9 * BEAT)
        assert not stopped.is_set()
        clock.sleep(0.1 * BEAT + 0.5)
        assert stopped.is_set()
        assert lease.lost == ("host:1 took it over" if how == "taken" else "it was removed")
    assert (thief.read("A.seed0")[0] or {}).get("token") == ("another" if how == "taken" else None)


def test_who_cannot_renew_stops_before_others_may_take_it(tmp_path, monkeypatch, clock):
    one = Leases(State(str(tmp_path)))
    stopped = threading.Event()
    with one.held("A.seed0", stopped.set) as lease:
        assert lease is not None
        with monkeypatch.context() as patch:
            patch.setattr(State, "write", lambda *_, **__: (_ for _ in ()).throw(OSError("the disk is away")))
            clock.sleep(0.5 * LEASE_SECONDS)
            assert not stopped.is_set()
            clock.sleep(BEAT + 0.5)
            assert stopped.is_set()
        assert lease.lost == "it could not be renewed (the disk is away)"


def test_a_lease_that_cannot_be_given_back_hides_neither_success_nor_the_error(tmp_path, monkeypatch):
    def away(*_: object) -> None:
        raise OSError("the disk is away")

    for error in (None, ValueError("a loss is not finite")):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match="a loss") if error else nullcontext():
            with Leases(State(str(tmp_path / str(error)))).held("A.seed0", stop) as lease:
                assert lease is not None
                patch.setattr(State, "read", away)
                if error:
                    raise error


def test_a_process_that_is_gone_from_this_machine_is_known_to_be(place):
    script = ("import sys, time; from codellm_jax.runtime.leases import Leases, State\n"
              "with Leases(State(sys.argv[1])).held('A.seed0', print): print('held', flush=True); time.sleep(60)")
    process = subprocess.Popen([sys.executable, "-c", script, place], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    other = Leases(State(place))
    assert str(other.holder("A.seed0")).endswith(f":{process.pid}")
    process.kill()
    end = time.monotonic() + 10  # nobody has waited for it yet: it is a zombie
    while other.holder("A.seed0") is not None:
        assert time.monotonic() < end
        time.sleep(0.02)
    process.wait()
    assert other.holder("A.seed0") is None
    # The same number on another start of the machine, or in another container, says nothing.
    value, generation = other.state.read("A.seed0")
    assert value is not None and other.state.write("A.seed0", value | {"place": "elsewhere"}, where=generation)
    assert other.holder("A.seed0") is not None


def test_a_broken_lease_is_nobodys(tmp_path):
    (tmp_path / "state").mkdir()
    for number, broken in enumerate((b"", b"{", b"[]", b'{"worker": "a"}')):
        (tmp_path / "state" / f"R{number}.lease").write_bytes(broken)
        with Leases(State(str(tmp_path))).held(f"R{number}", stop) as lease:
            assert lease is not None


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OSError, match="STUDY_DIR .*file cannot be read or written: ") as caught:
        with Leases(State(str(blocked))).held("A.seed0", stop):
            pass
    assert "\n" not in str(caught.value) and "x00" not in str(caught.value)
    with pytest.raises(ValueError, match="STUDY_DIR is s3://bucket/s; workers need a folder on a shared disk, or one "
                                         "in gs"):
        State("s3://bucket/s")


def test_records(place, bucket):
    state = State(place)
    state.write("A.seed0", {"why": "caf\u00e9 \udc80"}, RECORD)
    assert state.read("A.seed0", RECORD)[0] == {"why": "café \udc80"}
    assert state.names(RECORD) == ["A.seed0"] and state.names(LEASE) == []
    assert set(state.read_all(["A.seed0", "B.seed0"], RECORD)) == {"A.seed0", "B.seed0"}


def test_a_second_run_is_kept_out_of_a_bucket_and_a_killed_one_is_waited_for(bucket, monkeypatch, clock):
    bucket.objects.clear()
    told: list[str] = []
    with leased("gs://bucket/run", "MODEL_DIR", "training", told.append) as first:
        first.require()
        with pytest.raises(ValueError, match=r"Another process \(.*\) is training in gs://bucket/run: wait for it, or "
                                             "use another MODEL_DIR"):
            with leased("gs://bucket/run", "MODEL_DIR", "training", told.append):
                pass
        first.require()
    assert len(told) == 1 and not bucket.objects
    silent(monkeypatch)
    monkeypatch.setattr(module.Holder, "is_gone", False)  # as of another machine
    with leased("gs://bucket/run", "MODEL_DIR", "training", told.append) as left:
        began = clock.now
        with leased("gs://bucket/run", "MODEL_DIR", "training", told.append):
            assert LEASE_SECONDS <= clock.now - began < LEASE_SECONDS + BEAT
            with pytest.raises(OSError, match="The lease on gs://bucket/run is lost: .* took it over"):
                left.require()


def test_a_process_that_stood_still_looks_whether_its_lease_is_still_its_own(bucket, monkeypatch, clock):
    bucket.objects.clear()
    silent(monkeypatch)
    with leased("gs://bucket/run", "MODEL_DIR", "training", print) as lease:
        clock.sleep(10 * LEASE_SECONDS)
        lease.require()
        assert json.loads(bucket.objects["run/.lease/run.lease"][1])["beats"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("failures", [[503, 503], [429], [504]])
def test_storage_that_fails_for_a_while_is_asked_again(bucket, failures):
    bucket.objects.clear()
    state = State("gs://bucket/a study #1")
    bucket.failures = list(failures)
    generation = state.write("A.seed0", {"worker": "w"})
    bucket.failures = list(failures)
    assert state.read("A.seed0") == ({"worker": "w"}, generation) and not bucket.failures


def test_a_write_whose_answer_is_lost_counts_as_written(bucket, clock):
    """TensorStore repeats it, and finds the generation that it wrote itself instead of the one before."""
    bucket.objects.clear()
    one, other = Leases(State("gs://bucket/a study #1")), Leases(State("gs://bucket/a study #1"))
    bucket.lost = [503]
    with one.held("A.seed0", stop) as lease:
        assert lease is not None and not bucket.lost
        with other.held("A.seed0", stop) as second:
            assert second is None
        bucket.lost = [503]
        lease._renew_once()
        assert not bucket.lost and not lease.lost
        lease._renew_once()
        assert not lease.lost and (other.state.read("A.seed0")[0] or {})["beats"] == 2
        bucket.lost = [503]
    assert not bucket.lost and one.holder("A.seed0") is None


HOLDER = {"worker": "host:7", "token": "t", "place": None, "process": 7, "started": None, "since": 1.0, "beat_at": 2,
          "beats": 3, "expires": 120.0, "step": 5}


@pytest.mark.parametrize("damage", [
    {"expires": "many"}, {"process": None}, {"beats": 1.5}, {"other": 1}, {"token": []}], ids=str)
def test_what_is_no_lease_or_record_counts_as_none(damage):
    assert as_holder(HOLDER) is not None and as_holder({**HOLDER, **damage}) is None
    assert as_holder(None) is None and as_holder({name: HOLDER[name] for name in list(HOLDER)[:-1]}) is None
    failed = {"state": "failed", "why": "train ended", "worker": "host:7", "when": 1.0}
    assert as_record(failed) == failed and as_record({"state": "done"}) == {"state": "done"}
    for record in (None, {}, {"state": 3}, failed | {"when": "now"}, {"state": "failed"}, failed | {"why": None}):
        assert as_record(record) is None
