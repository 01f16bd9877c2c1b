"""Results as lines of text."""

from collections.abc import Mapping, Sequence
from typing import Any

HEADINGS = f"{'task':<28} {'n':>6} {'score':>9} {'95% interval':>15} {'chance':>7} {'majority':>9}"
SHOWN = 60  # characters of a text that are shown of either end
CHANCE_LEVEL = 0.05  # a p-value above which a score is not distinguishable from chance


def told_from_chance(result: Mapping[str, Any]) -> bool:
    """Whether an accuracy differs from that of blind choice, by its exact test."""
    return result["chance_p_value"] < CHANCE_LEVEL


def table_rows(result: Mapping[str, Any]) -> str:
    """A result's lines of the table, in per cent, one for each metric, and raw outputs where it holds some."""
    rows = [_row_of_accuracy(result)] if result["metric"] == "accuracy" else _rows_of_texts(result)
    notes = [*_measures(result), *_ties(result), *_cut(result), *result.get("raw_outputs", ())]
    return "\n".join([*rows, *(f"  {note}" for note in notes)])


def short_score(result: Mapping[str, Any]) -> str:
    """A score with its interval, in per cent, as "27.3 (13.2-48.2, n 22)"; of one that says nothing, that and why."""
    if not result.get("measured", True):
        return f"not measured ({result['ties']:,} ties, n {result['n']:,})"
    low, high = result["interval"] or (float("nan"),) * 2
    return f"{100 * result['value']:.1f} ({100 * low:.1f}-{100 * high:.1f}, n {result['n']:,})"


def raw_choice(texts: Sequence[tuple[str, str]], line: Mapping[str, Any], scoring: str) -> str:
    """What was scored of one question, in a line: the candidate chosen, or the first of those that tie, and the right
    one.

    Args:
      texts: of each candidate the prompt and the continuation, as far as they were scored.
      line: its line of results.
      scoring: what decided.
    """

    def candidate(number: int) -> str:
        prompt, continuation = texts[number]
        numbers = line["candidates"][number]
        return (f"{number}: {prompt[-SHOWN:]!r} + {continuation[:SHOWN]!r} = {numbers['log_likelihood']:.3f} nats in "
                f"{numbers['tokens']} tokens")

    tied, right = line["tied"], line["answer"]
    shown = tied[0] if tied else line["prediction"]
    also = ", which is right" if shown == right else f"; right is {candidate(right)}"
    chose = f"{' and '.join(map(str, tied))} tie by {scoring}," if tied else f"chose by {scoring}"
    return f"{line['id']}: {chose} {candidate(shown)}{also}"


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
    score, interval, note = f"{100 * result['value']:.2f}", f"{100 * low:.1f} - {100 * high:.1f}", ""
    if not result.get("measured", True):
        score, interval, note = "-", "-", "  not measured: most questions are ties"
    elif not told_from_chance(result):
        note = "  not distinguishable from chance"
    return (f"{_name(result):<28} {result['n']:>6,} {score:>9} {interval:>15} {100 * result['chance']:>7.1f} "
            f"{100 * result['majority']:>9.1f}{note}")


def _measures(result: Mapping[str, Any]) -> list[str]:
    """A line of what stands beside an accuracy, with half the width of each 95% interval; none for older results, and
    where nothing is measured.
    """
    measures = result.get("measures")
    if not measures or not result.get("measured", True):
        return []

    def told(name: str, digits: int, scale: int = 1) -> str:
        value, interval = measures[name]["value"], measures[name]["interval"]
        half = f" \u00b1 {scale * (interval[1] - interval[0]) / 2:.{digits}f}" if interval else ""
        return f"{scale * value:.{digits}f}{half}"

    margin = (f"margin {told('margin', 3)} {measures['margin']['unit'].replace(' per ', '/')}, "
              if "margin" in measures else "")
    return [f"right answer: {told('bits_per_byte', 3)} bits/byte, {margin}probability {told('probability', 1, 100)}%"]


def _ties(result: Mapping[str, Any]) -> list[str]:
    """A line about ties, where there are some."""
    if not result.get("ties"):
        return []
    nothing = f", and in {result['ties_of_all']:,} all candidates tie, which is uninformative" * bool(
        result.get("ties_of_all"))
    return [f"in {result['ties']:,} of {result['n']:,} questions several candidates tie: a tie of k counts 1 / k"
            f"{nothing}"]


def _cut(result: Mapping[str, Any]) -> list[str]:
    """A line about what was too long for the model, where something was."""
    prompts, continuations = result.get("prompts_cut"), result.get("continuations_cut")
    if result["metric"] != "accuracy":
        return [f"{prompts:,} prompts were too long and were truncated at the beginning"] if prompts else []
    cut = " and ".join(f"{count:,} {what}" for count, what in (
        (prompts, "prompts"), (continuations, "continuations")) if count)
    return [f"{cut} of candidates were too long for the model and were truncated"] if cut else []


def _name(result: Mapping[str, Any]) -> str:
    return result["task"] + (" (sample)" if result["sample"] else "")
