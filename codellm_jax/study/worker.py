"""One worker of a study: takes a free run, trains and evaluates it, and takes the next, until no work is left.

A run is free when the run from which it starts is done and no worker holds its lease. `t5x study` itself is one worker;
any number of others may run beside it, on any machines with access to STUDY_DIR: see `leases`.

    STUDY_DIR/state/RUN.json     how a run ended: "done", or "failed" with the reason; the time and the worker
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from codellm_jax.runtime.commands import Commands
from codellm_jax.runtime.leases import LEASE, RECORD, Lease, Leases, as_record
from codellm_jax.runtime.process import alone_in
from codellm_jax.runtime.progress import duration
from codellm_jax.study.pace import Pace, ToDo, seconds_left
from codellm_jax.study.planned import Planned, Standing, evaluation_seconds, standing

TRIES = 3  # of a command that a signal ends; a lack of memory ends it that way each time


class Worker:
    """A worker and its knowledge of the runs.

    Attributes:
      failures: a line for each run that failed, here or elsewhere, or whose parent failed.
    """

    def __init__(
        self, chosen: Sequence[Planned], facts: Mapping[str, Any], stand: Mapping[str, Standing], leases: Leases,
        processes: Commands, search_paths: Sequence[str],
    ) -> None:
        """
        Args:
          chosen: the runs, parents first.
          facts: by run, the answer of `survey`.
          stand: the progress of each run.
          leases: of this worker.
          processes: runs the commands, and reports.
          search_paths: additional folders in which to look for gin files.
        """
        self.failures: dict[str, str] = {}
        self._chosen, self._facts, self._stand = chosen, facts, dict(stand)
        self._leases, self._processes, self._search_paths = leases, processes, search_paths
        self._report = processes.report
        self._headings = {one.run.name: f"[{number}/{len(chosen)}] {one.run.name}"
                          for number, one in enumerate(chosen, 1)}
        self._done: set[str] = set()
        self._leased: set[str] = set()  # names of the leases found at the last check
        self._told: set[str] = set()
        self._pace = Pace()

    def work(self) -> None:
        """Runs everything that no other worker runs; returns when all runs are done or have failed, or at a signal."""
        self._leased, records = set(self._leases.state.names(LEASE)), self._records(self._chosen)
        for one in self._chosen:
            if self._stand[one.run.name].evaluated:
                self._found_done(one, "done before", records)
        told = ""
        while not self._processes.stopped:
            waited_for = self._pass()
            if waited_for == []:
                break
            if waited_for:
                line = f"Waiting for {'; '.join(waited_for[:3])}{'; and others' * (len(waited_for) > 3)}"
                if line != told:
                    self._report(line)
                told = line
                self._processes.wait(self._leases.poll_seconds)

    def _pass(self) -> list[str] | None:
        """Goes through the runs until it has made one; then returns None, else who is working on the remaining runs."""
        self.failures, waited_for = {}, []
        self._leased = set(self._leases.state.names(LEASE))
        to_do = [one for one in self._chosen if one.run.name not in self._done]
        records = self._records(to_do)
        for one in to_do:
            name, parent = one.run.name, one.run.parent
            holder = self._leases.holder(name) if name in self._leased else None
            if holder:
                waited_for.append(f"{name}, which {holder} has")
            elif parent in self.failures:
                self._failed(name, f"{name} is skipped, because it starts from {parent}.")
            elif parent is None or parent in self._done:
                of_run = self._stand[name] = standing(one, {}, None)
                if others := [*of_run.changed, *of_run.results_changed]:
                    self._failed(name, f"{name}: another worker ran it with another configuration: {others[0]}")
                elif of_run.evaluated:
                    self._found_done(one, "done by another worker", records)
                elif records.get(name, {}).get("state") == "failed":
                    self._failed(name, f"{name}: {records[name]['why']}")
                elif "error" in self._facts[name]:
                    self._failed(name, f"{name}: {self._facts[name]['error']}")
                elif busy := self._take(one):
                    waited_for.append(busy)
                else:
                    return None
        return waited_for

    def _records(self, runs: Sequence[Planned]) -> dict[str, dict[str, Any]]:
        """The records of these runs that workers wrote."""
        recorded = set(self._leases.state.names(RECORD))
        found = self._leases.state.read_all([one.run.name for one in runs if one.run.name in recorded], RECORD)
        return {name: record for name, (value, _) in found.items() if (record := as_record(value))}

    def _failed(self, name: str, why: str) -> None:
        self.failures[name] = why
        if why not in self._told:
            self._report(f"{self._headings[name]}: {why}")
        self._told.add(why)

    def _found_done(self, one: Planned, how: str, records: Mapping[str, Mapping[str, Any]]) -> None:
        name, seconds = one.run.name, self._stand[one.run.name].seconds
        self._done.add(name)
        self._report(f"{self._headings[name]}: {how}")
        evaluation = evaluation_seconds(one)
        if seconds and "flops" in self._facts[name]:
            self._pace.trained(self._facts[name]["flops"], seconds)
        if evaluation:
            self._pace.evaluated(evaluation)
        if name in self._leased:
            with self._leases.held(name, self._processes.kill):
                pass  # removes what a worker left that was killed at the very end
        if records.get(name, {}).get("state") != "done":
            self._record(name, "done", train_seconds=seconds, eval_seconds=evaluation)

    def _record(self, name: str, state: str, **more: Any) -> None:
        self._leases.state.write(name, {"state": state, "worker": self._leases.worker, "when": time.time()} | more,
                                 RECORD)

    def _take(self, one: Planned) -> str | None:
        """Makes a free run, or finds that it is done; returns who works on it, if another worker took it."""
        name = one.run.name
        with self._leases.held(name, self._processes.kill, self._stand[name].step) as lease:
            if lease is None:
                return f"{name}, which another worker has just taken"
            try:
                with alone_in(str(epath.Path(one.folder).expanduser())):
                    pass
            except ValueError:  # a command started by hand, or the dying command of a killed worker
                return f"{name}, in whose directory a process without a lease is training"
            record = as_record(self._leases.state.read(name, RECORD)[0]) or {}
            if record.get("state") == "failed" or standing(one, {}, None).evaluated:
                return None  # it ended elsewhere, between the check and the lease; the next check tells how
            why = self._make(one, lease)
            if lease.lost:
                self._report(f"{self._headings[name]}: the run stops here, because its lease is lost: "
                             f"{lease.lost}.")
            elif why:
                self._record(name, "failed", why=why)
        return None

    def _make(self, one: Planned, lease: Lease) -> str | None:
        """Completes the training and evaluation of a run; returns the reason if it failed, else None."""
        name, heading, seconds = one.run.name, self._headings[one.run.name], dict[str, float]()
        for verb, done, command in (("train", "trained", one.train_command(self._search_paths)),
                                    ("eval", "evaluated", one.eval_command(self._search_paths))):
            if getattr(standing(one, {}, None), done) or lease.lost:
                continue
            self._report(f"{heading}: {verb}{self._left()}")
            began = time.monotonic()
            for tries_left in reversed(range(TRIES)):
                ended = self._processes.run(
                    ["codellm_jax.cli", *command], f"{heading} {verb}", f"{one.folder}/{verb}.log", self._left)
                if self._processes.stopped or lease.lost:
                    return None
                if ended.status == 0 and getattr(standing(one, {}, None), done):
                    break
                if ended.status > 0 or not tries_left:
                    return f"{verb} {ended.how}"
                self._report(f"{heading}: {verb} {ended.how} It is started again.")
            seconds[verb] = time.monotonic() - began
            if verb == "train":
                self._pace.trained(self._facts[name]["flops"], seconds[verb])
            else:
                self._pace.evaluated(seconds[verb])
            self._stand[name] = standing(one, {}, None)
        if not lease.lost:
            self._done.add(name)
            self._record(name, "done", **{f"{verb}_seconds": value for verb, value in seconds.items()})
            took = ", ".join(f"{verb} {duration(value)}" for verb, value in seconds.items())
            self._report(f"{heading}: done, {took}")
        return None

    def _left(self) -> str:
        """The remaining time with these workers, as the end of a line."""
        to_do = [ToDo(one.run.name, one.run.parent, self._pace.seconds(
            0.0 if of_run.trained else self._facts[one.run.name].get("flops", 0.0), not of_run.evaluated))
            for one in self._chosen
            if one.run.name not in self._done and one.run.name not in self.failures
            and (of_run := self._stand[one.run.name])]
        workers = len(self._leased & {run.name for run in to_do}) + 1
        seconds = seconds_left(to_do, workers)
        return "" if seconds is None else f" | about {duration(seconds)} left for the study"
