"""Where every token that was read went.

`read = trained + masked + truncated + excluded`, always. The unit is a token of
the tokenised document, BOS and EOS included. A document of n tokens has at most
n - 1 targets: its first token is never one and counts as masked, and so does
what is not trained on of a conversation. A record that cannot be laid out has
no tokens and is counted as a document.
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxchunk.data.chat import Problem

PROBLEMS: tuple[str, ...] = typing.get_args(Problem)
"""Why a record cannot be laid out."""

EXCLUSIONS = (
  *PROBLEMS,
  "held_out",
  "empty",
  "too_short",
  "too_long",
  "no_target",
)
"""Why a document is not trained on, in the order in which it is decided."""

KEPT = -1
"""What stands in place of an index into `EXCLUSIONS` for a trained document."""


@dataclasses.dataclass(frozen=True)
class Accounting:
  """Counts of tokens (and documents) by what became of them; addable.

  Attributes:
    documents: Documents read, excluded ones included.
    read: Tokens of those documents.
    trained: Tokens that are targets of the loss.
    masked: Tokens of trained documents that are no target.
    truncated: Tokens cut off from documents that are longer than allowed.
    excluded: Tokens of excluded documents, by reason.
    excluded_documents: Their number, by reason.
  """

  documents: int = 0
  read: int = 0
  trained: int = 0
  masked: int = 0
  truncated: int = 0
  excluded: Mapping[str, int] = dataclasses.field(default_factory=dict)
  excluded_documents: Mapping[str, int] = dataclasses.field(
    default_factory=dict
  )

  def __add__(self, other: "Accounting") -> "Accounting":
    return Accounting(
      documents=self.documents + other.documents,
      read=self.read + other.read,
      trained=self.trained + other.trained,
      masked=self.masked + other.masked,
      truncated=self.truncated + other.truncated,
      excluded=_add(self.excluded, other.excluded),
      excluded_documents=_add(
        self.excluded_documents, other.excluded_documents
      ),
    )

  def check(self) -> "Accounting":
    """Returns itself if the parts sum to what was read.

    Raises:
      ValueError: They do not, or a count is negative.
    """
    parts = (self.trained, self.masked, self.truncated, *self.excluded.values())
    if sum(parts) != self.read or min(parts) < 0:
      raise ValueError(f"accounting does not add up: {self}")
    return self

  def to_json(self) -> dict[str, Any]:
    """The counts as plain JSON values."""
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, values: Mapping[str, Any]) -> "Accounting":
    """The inverse of `to_json`.

    Raises:
      ValueError: An entry is unknown, or the counts do not add up.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - known):
      raise ValueError(f"accounting has unknown entries {unknown}")
    return cls(**values).check()

  def __str__(self) -> str:
    reasons = ", ".join(
      f"{reason} {tokens:,}" for reason, tokens in self.excluded.items()
    )
    return (
      f"{self.read:,} tokens read = {self.trained:,} trained"
      f" + {self.masked:,} masked + {self.truncated:,} truncated"
      f" + {sum(self.excluded.values()):,} excluded"
      + (f" ({reasons})" if reasons else "")
    )

  def table(self) -> str:
    """The counts as a small table, one line a part."""
    dropped = sum(self.excluded_documents.values())
    kept = self.documents - dropped
    rows = [
      ("trained", self.trained, f"{kept:,}"),
      ("masked", self.masked, ""),
      ("truncated", self.truncated, "0"),
      *(
        (f"excluded: {r}", n, f"{self.excluded_documents.get(r, 0):,}")
        for r, n in self.excluded.items()
      ),
      ("read", self.read, f"{self.documents:,}"),
    ]
    lines = [f"{'':22}{'tokens':>16}{'':>8}{'documents':>12}"]
    for label, tokens, documents in rows:
      share = f"{tokens / self.read:.1%}" if self.read else "-"
      lines.append(f"{label:22}{tokens:>16,}{share:>8}{documents:>12}")
    return "\n".join(line.rstrip() for line in lines)


def count_documents(
  lengths: np.ndarray,
  reasons: np.ndarray,
  *,
  used: np.ndarray | None = None,
  targets: np.ndarray | None = None,
) -> Accounting:
  """Accounts for documents that are trained on or excluded.

  Args:
    lengths: Tokens of each document, `[documents]` integers.
    reasons: `[documents]` integers: `KEPT`, or an index into `EXCLUSIONS`.
    used: How many of a document's tokens are used, the others truncated; by
      default all.
    targets: How many of those are trained on; by default all but the first.

  Returns:
    The counts; reasons that do not occur are left out.
  """
  lengths = np.asarray(lengths, np.int64)
  used = lengths if used is None else np.asarray(used, np.int64)
  targets = used - 1 if targets is None else np.asarray(targets, np.int64)
  kept = reasons == KEPT
  masks = {name: reasons == i for i, name in enumerate(EXCLUSIONS)}
  masks = {name: mask for name, mask in masks.items() if mask.any()}
  return Accounting(
    documents=len(lengths),
    read=int(lengths.sum()),
    trained=int(targets[kept].sum()),
    masked=int((used - targets)[kept].sum()),
    truncated=int((lengths - used)[kept].sum()),
    excluded={name: int(lengths[m].sum()) for name, m in masks.items()},
    excluded_documents={name: int(m.sum()) for name, m in masks.items()},
  )


def _add(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
  known = [reason for reason in EXCLUSIONS if reason in a or reason in b]
  others = sorted((set(a) | set(b)) - set(EXCLUSIONS))
  return {r: a.get(r, 0) + b.get(r, 0) for r in (*known, *others)}
