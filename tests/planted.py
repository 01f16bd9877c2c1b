"""Studies with known truth: run directories as written by evaluation and training, with planted effects."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from codellm_jax.results.answers import corpus_bleu
from codellm_jax.results.files import digest, write_result
from codellm_jax.results.levels import accuracy_summary
from codellm_jax.results.statistics import bootstrap

CANDIDATES = {"logic": 4, "jecqa": 4, "scienceqa": 3, "scienceqa_cot": 3, "ekar": 4, "ekar_cot": 4, "cosqa": 2, "c3": 4,
              "ocnli": 3, "cmnli": 3}
LARGE = {"params/embedding": [[130_344, 2560], "float32", 1], "params/layers": [[32, 2560, 30_720], "float32", 2]}
TINY = {"params/embedding": [[8192, 256], "float32", 1]}
MIXES = {None: None, "uniform": "['5:3', '5:3', '5:3', '5:3']", "increase": "['7:3', '7:3', '6:4', '5:5']",
         "decrease": "['5:5', '6:4', '7:3', '7:3']"}
CODE_SHARES = {"decrease": (0.5, 0.4, 0.3, 0.3), "uniform": (0.375,) * 4, "increase": (0.3, 0.3, 0.4, 0.5)}
STEPS, BATCH = 400, 16


def seed_of(*names: Any) -> np.random.Generator:
    return np.random.default_rng([ord(letter) for letter in json.dumps(names)])


def write_study(
    folder: Path, arms: Sequence[str], seeds: int, n: Mapping[str, int], skill: Mapping[tuple[str, str], float],
    spread: float = 0.15, sample: bool = False, arrays: Mapping[str, Any] = LARGE, tokens: int = 42_000_000_000,
    plan: bool = True, rates: Mapping[str, float] | None = None, settings: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a study.

    Args:
      arms: labels, such as NL, CODE, NC-decrease, CC-uniform.
      n: number of questions of each task.
      skill: for (arm, task), the logit of the probability to answer a question of average difficulty correctly; arm ""
        is the default of a task.
      spread: standard deviation of a seed's skill.
      rates: code rates of swept arms.
      settings: further settings of all results.
    """
    entries = []
    for label in arms:
        letters, _, mix = label.partition("-")
        letters, mix = ("CODE", "") if rates and label in rates else (letters, mix)
        for seed in range(seeds):
            name = f"{label}.seed{seed}"
            parent = None if letters in ("NL", "CODE") else f"{'CODE' if letters[0] == 'C' else 'NL'}.seed{seed}"
            entries.append({"run": name, "arm": label, "seed": seed, "from": parent, "settings": {},
                            "stage": "tuning" if parent else "pretraining", "mix": mix or "constant"})
            run = folder / "runs" / name
            _write_training(run, letters, mix or None, seed, arrays, tokens, (rates or {}).get(label))
            for task, questions in n.items():
                found = skill.get((label, task), skill.get(("", task), 0.0)) + seed_of(name, task).normal(0, spread)
                write_task(run, task, questions, found, letters, sample, settings or {})
    if plan:
        (folder / "study.json").write_text(json.dumps(
            {"runs": entries, "comparison": "compute-matched", "common": {}}))
    return folder


def write_task(run: Path, task: str, n: int, skill: float, letters: str, sample: bool = False,
               settings: Mapping[str, Any] | None = None, ties: int = 0) -> None:
    """Writes both files of a task, as an evaluation does; all candidates of the last `ties` questions tie."""
    difficulty = seed_of("difficulty", task).normal(size=n)
    dice = seed_of(run.name, task, "answers")
    right = dice.random(n) < 1 / (1 + np.exp(difficulty - skill))
    header = {"settings": {"version": 3, "vocabulary": "d798822c22de", "dtype": "bfloat16", "length": 1024,
                           "template": "released", "few_shot": 0, "seed": 0, "data": f"{task} data".ljust(64, "0"),
                           "questions": f"{task} {n}".ljust(64, "0"), "scoring": "per_token", **(settings or {})},
              "checkpoint": {"run": str(run), "step": STEPS, "arm": letters, "digest": f"digest of {run.name}"}}
    shared = {"task": task, "sample": sample, "read": n + 1, "skipped": {"empty": 1}, "files": [f"{task}.json"],
              "prompts_cut": 0, "questions_per_second": 10.0, "provenance": {
                  "config_hash": "e7a1" * 16, "code": {"version": "0.1.0", "commit": "412abbb" * 5, "dirty": False}}}
    if task in CANDIDATES:
        k = CANDIDATES[task]
        answers = seed_of("answers", task).integers(k, size=n)
        predictions = np.where(right, answers, (answers + 1 + dice.integers(k - 1, size=n)) % k)
        lines = [{"id": f"{task}-{place}", "answer": int(answer), "prediction": int(prediction), "tied": [],
                  "correct": float(answer == prediction), "candidates": [
                      {"log_likelihood": -1.0 - (number != prediction), "tokens": 3, "bytes": 9}
                      for number in range(k)]}
                 for place, (answer, prediction) in enumerate(zip(answers, predictions, strict=True))]
        for line in lines[len(lines) - ties:]:
            line |= {"prediction": None, "tied": list(range(k)), "correct": 1 / k, "candidates": [
                {"log_likelihood": -1.0, "tokens": 3, "bytes": 9}] * k}
        found = accuracy_summary([line["correct"] for line in lines], [k] * n, answers.tolist())
        result = header | shared | {
            "metric": "accuracy", "value": found.accuracy, "n": n, "interval": list(found.interval),
            "measured": 2 * ties <= n, "ties": ties, "ties_of_all": ties,
            "chance": found.chance, "chance_p_value": found.chance_p_value, "majority": found.majority}
    else:
        metric = "pass@1" if task == "mbpp" else "f1"
        header["settings"] |= {"sampling": {"top_k": 3}, "samples": 1, "sampling_seed": 0}
        header["settings"].pop("scoring")
        lines = [{"id": f"{task}-{place}", "texts": ["x"], "reasons": ["end"]} for place in range(n)]
        for line, good in zip(lines, right, strict=True):
            if task == "mbpp":
                matches = dice.integers(8, 14, size=4) if good else dice.integers(0, 4, size=4)
                line |= {"pass@1": float(good), "bleu_counts": [20, 21, *(-np.sort(-matches)).tolist(), 20, 19, 18, 17]}
            else:
                line |= {"f1": float(dice.random() if good else 0.1 * dice.random()), "exact_match": float(good)}
        values = [line[metric] for line in lines]
        result = header | shared | {"metric": metric, "value": float(np.mean(values)), "n": n, "interval": list(
            bootstrap(values, resamples=200).interval), "scores": {metric: {"value": float(np.mean(values))}}}
        if task == "mbpp":
            counts = np.array([line["bleu_counts"] for line in lines])
            result["scores"]["bleu"] = {"value": 100 * float(corpus_bleu(counts.sum(axis=0)))}
    (run / "results").mkdir(parents=True, exist_ok=True)
    write_result(epath.Path(run / "results"), task + "_sample" * sample, header, lines, result)


def _write_training(run: Path, letters: str, mix: str | None, seed: int, arrays: Mapping[str, Any], tokens: int,
                    rate: float | None) -> None:
    """Writes metrics.jsonl, provenance.json, and a checkpoint's record."""
    tuning = letters not in ("NL", "CODE")
    stage = "tuning" if tuning else "pretraining"
    rate = rate if rate is not None else 0.0 if letters[-1] in "NL" else 1 / 3 if not tuning else 0.375
    shares = CODE_SHARES.get(mix or "", (rate,) * 4)
    settings = {"CODE_RATE": "None" if mix else repr(rate), "mixture.code_rate": "%CODE_RATE", "SEED": str(seed),
                "mixture.mix_phases": str(MIXES[mix]), "train.seed": "%SEED", "train.batch_size": str(BATCH),
                "train.train_steps": str(STEPS), "model.layers": "32", "model.hidden": "2560"}
    ledger = _ledger(stage, shares, tokens // 100 if tuning else tokens, mix is not None)
    if tuning:
        first = 0.0 if letters[0] == "N" else 1 / 3
        ledger["before"] = [_ledger("pretraining", (first,) * 4, tokens, False)]
    record = {"settings": settings, "ledger": ledger, "checksums": dict(arrays)}
    record["digest"] = digest(record)
    ocp.Checkpointer(ocp.JsonCheckpointHandler()).save((run / "checkpoints" / str(STEPS) / "record").absolute(), record)
    dice, unit = seed_of(run.name, "loss"), "example" if tuning else "token"
    lines: list[dict[str, Any]] = []
    for step in range(0, STEPS + 1, 10):
        share = shares[min(3, 4 * step // STEPS)]
        text, code = (bottom + (4 - tuning) * np.exp(-step / 90) + dice.normal(0, 0.02) for bottom in (
            2.8 + 0.1 * rate, 2.3 - rate))
        if step:
            drawn = dice.binomial(BATCH, share) / BATCH
            counted = sum(ledger["tokens"].values()) * step / STEPS
            lines.append({"step": step, "split": "train", "loss": float(text), "tokens": counted,
                          f"{unit}_fraction/code": drawn, f"{unit}_fraction/text": 1 - drawn})
        if step % 40 == 0:
            lines.append({"step": step, "split": "eval", "loss": float(text), "tokens": 512.0, "loss/text": float(text),
                          "loss/code": float(code)})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "provenance.json").write_text(json.dumps({
        "config_hash": f"{seed}c0ffee{letters}".ljust(64, "0"), "seed": seed, "order": ledger["order_fingerprint"],
        "code": {"version": "0.1.0", "commit": "412abbb" * 5, "dirty": False},
        "data": {"text.books": "ab" * 32, "code.github": "cd" * 32}, "versions": {"jax": "0.10.2", "numpy": "2.4.6"}}))


def _ledger(stage: str, shares: Sequence[float], tokens: int, phases: bool) -> dict[str, Any]:
    rows = STEPS * BATCH
    each = [{"text.books": round(rows / 4 * (1 - share)), "code.github": round(rows / 4 * share)} for share in shares]
    starts = [{"start": rows // 4 * place, "rows": part} for place, part in enumerate(each)]
    total = {name: sum(part[name] for part in each) for name in each[0]}
    return {"stage": stage, "order_fingerprint": "0f" * 32, "vocabulary_hash": "d798822c22de", "length": 1024,
            "rows": total, "tokens": {name: tokens * count // rows for name, count in total.items()},
            "phases": starts if phases else [{"start": 0, "rows": total}], "before": []}
