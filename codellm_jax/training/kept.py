"""Files that sessions of a run leave for later ones besides checkpoints: provenance.json, and files set aside."""

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from codellm_jax.mixture.ledger import arm
from codellm_jax.model.decoder import flops_per_token, parameter_count
from codellm_jax.results.files import Damaged, read_provenance, write_whole
from codellm_jax.runtime.files import set_aside
from codellm_jax.runtime.progress import read_records, say
from codellm_jax.runtime.provenance import software, training_hash
from codellm_jax.training.begin import Run


def set_earlier_aside(model_dir: epath.Path, report: Callable[[str], None]) -> None:
    """Sets aside, with a report, the records of a run that left no checkpoint, before the run starts over."""
    left = [path for name in ("metrics.jsonl", "results", "exports") if (path := model_dir / name).exists()]
    if left:
        steps = max((line["step"] for line in read_records(str(model_dir))), default=0)
        others = ("provenance.json", "config.gin", "tensorboard", "trackers")
        aside = set_aside([*left, *(model_dir / name for name in others)], model_dir)
        report(f"WARNING: {model_dir} has records of {steps:,} steps and no checkpoint to go on from: the run starts "
               f"again, and they are kept in {aside}.")


def _before(path: epath.Path, report: Callable[[str], None]) -> dict[str, Any]:
    """The facts written by earlier sessions; a damaged file is set aside."""
    try:
        return read_provenance(path.parent, ("sessions", "finished")) or {}
    except Damaged as error:
        aside = set_aside([path], path.parent)
        report(f"WARNING: {error} It is kept in {aside}; its facts about earlier sessions are lost.")
        return {}


class Provenance:
    """MODEL_DIR/provenance.json, written by one process at the start and the end of a session; see
    `runtime.provenance`. Facts of earlier sessions are kept, and a session with nothing left to train writes nothing.
    """

    def __init__(self, run: Run, settings: Mapping[str, str], asked: Mapping[str, str], runner: str,
                 active: bool, report: Callable[[str], None] = say) -> None:
        path = epath.Path(run.training.model_dir).expanduser() / "provenance.json"
        before = _before(path, report) if run.resumed and active else {}
        self._path = path if active and not before.get("finished") else None
        self._began = time.monotonic()
        self._software = software()
        self._session = {"from_step": run.step, "to_step": None, "seconds": None, "runner": runner} | self._software
        self._sessions = [*before.get("sessions", []), self._session]
        self._same = {"config_hash": training_hash(settings), "asked": dict(asked)}
        self.write(run, before.get("checkpoint"), before.get("kept", {}), ended=False)

    def write(self, run: Run, checkpoint: str | None, kept: Mapping[str, str], ended: bool = True) -> None:
        """Writes the current facts; `checkpoint` is the digest of the newest one, `kept` those of KEEP_STEPS by step.
        """
        if self._path is None:
            return
        if ended:
            self._session |= {"to_step": run.step, "seconds": round(time.monotonic() - self._began, 3)}
        order, config, ledger = run.plan.mixture.order, run.plan.model.config, run.ledger.to_json()
        facts = self._same | self._software | {
            "arm": arm(ledger), "seed": run.training.seed, "parameters": parameter_count(config),
            "flops_per_token": flops_per_token(config, causal=False), "order": order.fingerprint(),
            "vocabulary": run.training.vocabulary.content_hash,
            "data": {source.name: source.content_hash for source in order.sources},
            "prepared": dict(run.plan.mixture.prepared), "ledger": ledger,
            "notes": list(run.plan.mixture.warnings), "sessions": self._sessions, "step": run.step,
            "last_step": run.plan.last_step, "finished": run.step == run.plan.last_step,
            "checkpoint": checkpoint, "kept": dict(kept)}
        write_whole(self._path, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
