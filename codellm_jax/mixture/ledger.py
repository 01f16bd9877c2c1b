"""What was really trained on: rows, tokens and epochs of each source, saved with every checkpoint.

The ledger is counted from the batches as they are trained on. At a resume it is compared with what the order says
must have been drawn; a difference means other data, another seed or another schedule, and is refused.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from codellm_jax.mixture.order import Order


@dataclasses.dataclass
class Ledger:
    """Counts of one stage.

    Attributes:
      stage: "pretraining" or "tuning".
      order_fingerprint: of the order that was followed.
      vocabulary_hash: of the vocabulary's file.
      length: tokens trained on in a row.
      rows: rows trained on so far, of each source by name.
    """

    stage: str
    order_fingerprint: str
    vocabulary_hash: str
    length: int
    rows: dict[str, int]

    @classmethod
    def begin(cls, stage: str, order: Order, vocabulary_hash: str, length: int) -> "Ledger":
        return cls(stage, order.fingerprint(), vocabulary_hash, length, {source.name: 0 for source in order.sources})

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "Ledger":
        return cls(**{field.name: saved[field.name] for field in dataclasses.fields(cls)})

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"tokens": {name: rows * self.length for name, rows in self.rows.items()}}

    @property
    def position(self) -> int:
        """Rows trained on so far: the position in the order."""
        return sum(self.rows.values())

    def add(self, order: Order, sources: np.ndarray) -> None:
        """Counts one batch, given the source of each of its rows (int [batch])."""
        for index, source in enumerate(order.sources):
            self.rows[source.name] += int(np.count_nonzero(sources == index))

    def check(self, order: Order, position: int) -> None:
        """Raises ValueError where this ledger is not of this order and position."""
        expected = dict(zip((source.name for source in order.sources), order.counts(position).tolist(), strict=True))
        if self.rows != expected:
            raise ValueError(
                f"The checkpoint was trained on other data: its ledger has {self.rows} rows, this configuration would "
                f"have drawn {expected}. The sources, their rates or the seed changed: restore them, or use another "
                "MODEL_DIR.")
        if self.order_fingerprint != order.fingerprint():
            raise ValueError(
                f"The checkpoint was trained on other data: the order was {self.order_fingerprint[:12]} and is "
                f"{order.fingerprint()[:12]}. The content of {', '.join(expected)}, their rates, the seed or the steps "
                "to come changed: restore them, or use another MODEL_DIR.")

    def table(self, order: Order) -> str:
        """Lines of text: for each source its rows, tokens, epochs, and its share asked and realised."""
        total = max(1, self.position)
        lines = [f"{'source':<20} {'tokens':>14} {'epochs':>8} {'share asked':>12} {'realised':>9}"]
        for source, asked in zip(order.sources, order.asked(self.position), strict=True):
            rows = self.rows[source.name]
            lines.append(f"{source.name:<20} {rows * self.length:>14,} {rows / source.rows:>8.2f} "
                         f"{float(asked) / total:>12.4f} {rows / total:>9.4f}")
        return "\n".join(lines)
