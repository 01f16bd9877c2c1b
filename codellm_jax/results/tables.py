"""Results as lines of text."""

from collections.abc import Mapping
from typing import Any

HEADINGS = f"{'task':<28} {'n':>6} {'score':>9} {'95% interval':>15} {'chance':>7} {'majority':>9}"
SHOWN = 60  # characters of a text that are shown of either end
CHANCE_LEVEL = 0.05  # a p-value from which on a score is not told from chance


def told_from_chance(result: Mapping[str, Any]) -> bool:
    """Whether an accuracy differs from that of blind choice, by its exact test."""
    return result["chance_p_value"] < CHANCE_LEVEL


def table_rows(result: Mapping[str, Any]) -> str:
    """A result's lines of the table, in per cent, one for each metric, and raw outputs where it holds some."""
    rows = [_row_of_accuracy(result)] if result["metric"] == "accuracy" else _rows_of_texts(result)
    cut = result.get("prompts_cut")
    return "\n".join([*rows, *([f"  {cut:,} prompts were too long and lost their beginning"] if cut else []),
                      *(f"  {line}" for line in result.get("raw_outputs", ()))])


def short_score(result: Mapping[str, Any]) -> str:
    """A score with its interval, in per cent, as "27.3 (13.2-48.2, n 22)"."""
    low, high = result["interval"] or (float("nan"),) * 2
    return f"{100 * result['value']:.1f} ({100 * low:.1f}-{100 * high:.1f}, n {result['n']:,})"


def raw_choice(question: Any, line: Mapping[str, Any], scoring: str) -> str:
    """What was scored of one question, in a line: the candidate chosen and the right one.

    Args:
      question: with its `candidates`, a prompt and a continuation each.
      line: its line of results.
      scoring: what decided.
    """

    def candidate(number: int) -> str:
        prompt, continuation = question.candidates[number]
        numbers = line["candidates"][number]
        return (f"{number}: {prompt[-SHOWN:]!r} + {continuation[:SHOWN]!r} = {numbers['log_likelihood']:.3f} nats in "
                f"{numbers['tokens']} tokens")

    chosen, right = line["prediction"], line["answer"]
    also = "" if chosen == right else f"; right is {candidate(right)}"
    return f"{line['id']}: chose by {scoring} {candidate(chosen)}{also or ', which is right'}"


def raw_text(line: Mapping[str, Any]) -> str:
    """What was written as the first answer to one question, in a line."""
    return f"{line['id']}: {line['texts'][0][: 2 * SHOWN]!r} {line['notes'][0]}".rstrip()


def _rows_of_texts(result: Mapping[str, Any]) -> list[str]:
    """BLEU is in per cent already."""
    rows = []
    for metric, score in result["scores"].items():
        scale = 1 if metric.startswith("bleu") else 100
        between = " - ".join(f"{scale * bound:.1f}" for bound in score.get("interval") or ()) or "-"
        rows.append(f"{_name(result) + ' ' + metric:<28} {result['n']:>6,} {scale * score['value']:>9.2f} "
                    f"{between:>15} {'-':>7} {'-':>9}")
    return rows


def _row_of_accuracy(result: Mapping[str, Any]) -> str:
    low, high = result["interval"]
    note = "" if told_from_chance(result) else "  not told from chance"
    return (f"{_name(result):<28} {result['n']:>6,} {100 * result['value']:>9.2f} "
            f"{f'{100 * low:.1f} - {100 * high:.1f}':>15} {100 * result['chance']:>7.1f} "
            f"{100 * result['majority']:>9.1f}{note}")


def _name(result: Mapping[str, Any]) -> str:
    return result["task"] + (" (sample)" if result["sample"] else "")
