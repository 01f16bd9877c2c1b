"""The actual training data: rows or examples, tokens and epochs of each source, saved with every checkpoint.

The ledger is counted from the batches during training. On a resume it is compared with the draws that the order
implies; a difference means other data, another seed or another schedule, and is refused.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from codellm_jax.mixture.order import Order


@dataclasses.dataclass
class Ledger:
    """Counts of one stage, and the ledgers of the stages before it.

    Attributes:
      stage: "pretraining" or "tuning"; "imported" for published weights, whose training data is unknown.
      order_fingerprint: of the order in use.
      vocabulary_hash: of the vocabulary's file.
      length: tokens of a row.
      rows: rows (in tuning: examples) trained on so far, by source name.
      tokens: tokens that the loss counted so far, by source name.
      conversations: in tuning, whether any source has examples with turns.
      phases: for each phase of the schedule its first row or example, "start", and its part of "rows".
      before: the ledgers, as JSON, of the stages whose parameters this one started from, oldest first.
      branch: for a run that branched from another, its "step", and the state that the order inherited; see
        `order.Branch`.
      prepared: for sources that `t5x prepare` wrote, the hashes of its steps and inputs, and the paths of the inputs.
      epoch_rows: the rows or examples in an epoch of each source; ledgers of earlier versions have none.
    """

    stage: str
    order_fingerprint: str
    vocabulary_hash: str
    length: int
    rows: dict[str, int]
    tokens: dict[str, int]
    phases: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    before: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    conversations: bool = False
    epoch_rows: dict[str, int] = dataclasses.field(default_factory=dict)
    branch: dict[str, Any] | None = None
    prepared: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def begin(
        cls, stage: str, order: Order, vocabulary_hash: str, length: int, parent: Mapping[str, Any] | None = None,
        conversations: bool = False, branch: Mapping[str, Any] | None = None, prepared: Mapping[str, Any] | None = None,
    ) -> "Ledger":
        """A new ledger without counts; `parent` is the ledger, as JSON, of the run from which it starts."""
        before = [*parent.get("before", []), {name: value for name, value in parent.items() if name != "before"}] \
            if parent else []
        none = {source.name: 0 for source in order.sources}
        phases = [{"start": start, "rows": dict(none)} for start in order.phase_starts]
        return cls(stage, order.fingerprint(), vocabulary_hash, length, dict(none), dict(none), phases, before,
                   conversations, {source.name: source.rows for source in order.sources},
                   dict(branch) if branch else None, dict(prepared or {}))

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "Ledger":
        return cls(**{field.name: saved[field.name] for field in dataclasses.fields(cls) if field.name in saved})

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def position(self) -> int:
        """Rows trained on so far, without those of a trunk."""
        return sum(self.rows.values())

    def add(self, order: Order, sources: np.ndarray, tokens: np.ndarray) -> None:
        """Counts one batch, given the source of each of its rows or examples and the number of its tokens that the loss
        counts, both int [batch].
        """
        starts = [phase["start"] for phase in self.phases]
        phase_of = np.searchsorted(starts, order.begin + self.position + np.arange(len(sources)), side="right") - 1
        for index, source in enumerate(order.sources):
            for number in np.unique(phase_of[sources == index]) if starts else ():
                here = np.count_nonzero((sources == index) & (phase_of == number))
                self.phases[number]["rows"][source.name] += int(here)
        for index, source in enumerate(order.sources):
            self.rows[source.name] += int(np.count_nonzero(sources == index))
            self.tokens[source.name] += int(tokens[sources == index].sum())

    def check(self, order: Order, position: int) -> None:
        """Raises ValueError if this ledger does not match this order and position."""
        expected = dict(zip((source.name for source in order.sources), order.counts(position).tolist(), strict=True))
        if self.rows != expected:
            raise ValueError(
                f"The checkpoint was trained on other data: its ledger has {self.rows} rows, but this configuration "
                f"would have drawn {expected}. The sources, their rates or the seed changed: restore them, or use "
                "another MODEL_DIR.")
        if self.order_fingerprint != order.fingerprint():
            raise ValueError(
                f"The checkpoint was trained on other data: the order was {self.order_fingerprint[:12]} and is "
                f"now {order.fingerprint()[:12]}. The content of {', '.join(expected)}, their rates, the seed or the "
                "steps to come changed: restore them, or use another MODEL_DIR.")

    def table(self, order: Order) -> str:
        """Lines of text: for each source its tokens, epochs, and its share of rows or examples, asked and realised."""
        total = max(1, self.position)
        examples = self.stage == "tuning"
        lines = [f"{'source':<26}" + (f" {'examples':>10}" if examples else "")
                 + f" {'tokens':>14} {'epochs':>8} {'share asked':>12} {'realised':>9}"]
        asked_of_each = order.asked(order.begin + self.position)
        for source, asked, before in zip(order.sources, asked_of_each, order.drawn_before.tolist(), strict=True):
            rows = self.rows[source.name]
            lines.append(f"{source.name:<26}" + (f" {rows:>10,}" if examples else "")
                         + f" {self.tokens[source.name]:>14,} {(before + rows) / source.rows:>8.2f} "
                         f"{float(asked) / total:>12.4f} {rows / total:>9.4f}")
        return "\n".join(lines)


    def table_of_phases(self, order: Order) -> str:
        """Lines of text: for each phase that has begun, the share of code asked and realised."""
        unit = "example" if self.stage == "tuning" else "row"
        lines = [f"{f'phase, from {unit}':<26} {unit + 's':>14} {'code asked':>12} {'realised':>9}"]
        position = order.begin + self.position
        ends = [*(phase["start"] for phase in self.phases[1:]), position]
        for phase, end in zip(self.phases, ends, strict=True):
            total = sum(phase["rows"].values())
            if total:
                end = min(end, position)
                code = sum(rows for name, rows in phase["rows"].items() if name.startswith("code."))
                asked = order.schedule.asked(end) - order.schedule.asked(phase["start"])
                lines.append(f"{phase['start']:<26,} {total:>14,} {float(asked) / total:>12.4f} {code / total:>9.4f}")
        return "\n".join(lines)


def arm(ledger: Mapping[str, Any]) -> str:
    """The study's name of the arm that a ledger (as JSON) belongs to: the paper's NL, CODE, NN, NC, CN or CC.

    N and C say whether a stage was trained on any code. Other sequences of stages have names from the same letters,
    none of which is one of the paper's:

      NCC             two stages on documents, then tuned: a letter for each stage in order
      NL-CODE         two stages, both on documents: NC is the paper's pre-training without code and tuning with it
      NC-C, NC-CODE   a stage after tuning follows a hyphen: tuned again, or trained on documents again
      imported-C      the training data of published weights is unknown; "imported" precedes the later stages, as also
                      in imported-NL and imported-NC

    A branch is a separate stage, unless its share of code equals that of its trunk, to a row: it then continues as the
    trunk would have.
    """
    stages = stages_of(ledger)
    imported = stages[0]["stage"] == "imported"
    if not imported and stages[0]["stage"] == "tuning":
        return "none, because it was tuned from new parameters"
    letters, parts = "", []  # of the stages on documents that nothing follows yet, and the parts before them
    for number, stage in enumerate(stages[imported:], imported):
        if stage.get("branch") and number > imported and _has_share_of(stage, stages[number - 1]):
            continue
        letter = "C" if rows_of_code(stage) else "N"
        if stage["stage"] == "tuning":
            parts.append(letters + letter)
            letters = ""
        elif parts:
            parts.append(_WORDS[letter])
        else:
            letters += letter
    parts += [_WORDS[letter] for letter in letters]
    return "-".join([*(["imported"] if imported else []), *parts])


_WORDS = {"N": "NL", "C": "CODE"}


def stages_of(ledger: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The ledgers of the stages of a run as JSON, the oldest first, its own last."""
    return [*ledger.get("before", []), ledger]


def rows_of_code(ledger: Mapping[str, Any]) -> int:
    """Rows, or examples, of code that a stage was trained on."""
    return sum(count for name, count in ledger["rows"].items() if name.startswith("code."))


def _has_share_of(branch: Mapping[str, Any], trunk: Mapping[str, Any]) -> bool:
    """Whether a branch has the share of code of its trunk, up to rounding: half a row of the trunk's, and one of its
    own, because it carries over the trunk's remainder."""
    own, before = sum(branch["rows"].values()), sum(trunk["rows"].values())
    difference = rows_of_code(branch) * before - rows_of_code(trunk) * own
    return branch["stage"] == trunk["stage"] and bool(rows_of_code(branch)) == bool(rows_of_code(trunk)) \
        and abs(difference) <= before + 0.5 * own
