"""Run directories and a study written by hand, for tests of their readers, without training."""

import json
from pathlib import Path
from typing import Any

LEDGER = {"stage": "pretraining", "rows": {"text.a": 30, "code.a": 10}, "tokens": {"text.a": 300, "code.a": 100},
          "epoch_rows": {"text.a": 60, "code.a": 5}, "phases": [], "before": []}


def write_run(path: Path, step: int, last_step: int, ended: bool = True, **facts: Any) -> Path:
    """Writes a run directory with ten tokens per row and four rows per step, recorded every second step."""
    path.mkdir(parents=True)
    session = {"from_step": 0, "to_step": step if ended else None, "seconds": 90.0 if ended else None}
    (path / "provenance.json").write_text(json.dumps({
        "arm": "CODE", "seed": 3, "parameters": 1234567, "ledger": LEDGER, "sessions": [session],
        "devices": {"kind": "cpu", "count": 2}, "step": step if ended else 0, "last_step": last_step,
        "finished": step == last_step, "notes": []} | facts))
    lines = [{"step": n, "split": "train", "loss": 9 - n / 10, "tokens": 40 * n, "tokens_per_second": 8.0}
             for n in range(2, step + 1, 2)]
    lines.append({"step": step, "split": "eval", "loss": 7.0, "loss/text": 6.5, "loss/code": 7.5})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "config.gin").write_text("")
    (path / "checkpoints" / str(step)).mkdir(parents=True)
    return path


def write_study(path: Path) -> None:
    """Writes two arms of two seeds, NC after NL: NL.seed0 is done and NL.seed1 failed, both with all their steps."""
    plan = [{"run": f"{arm}.seed{seed}", "arm": arm, "stage": stage, "from": start and f"{start}.seed{seed}",
             "steps": 10, "seed": seed} for arm, stage, start in (
                 ("NL", "pretraining", None), ("NC", "tuning", "NL")) for seed in (0, 1)]
    (path / "state").mkdir(parents=True)
    (path / "study.json").write_text(json.dumps({"runs": plan}))
    for seed in (0, 1):
        write_run(path / "runs" / f"NL.seed{seed}", 10, 10)
    (path / "state" / "NL.seed0.json").write_text('{"state": "done"}')
    (path / "state" / "NL.seed1.json").write_text(
        '{"state": "failed", "why": "train ended with status 1", "worker": "host:7", "when": 0}')
