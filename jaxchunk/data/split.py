"""Which documents are kept for evaluation: a property of their text."""

import hashlib

import numpy as np


def text_hash(text: str) -> int:
  """Sixty-four bits that depend on the text alone."""
  digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
  return int.from_bytes(digest, "little")


def held_out(hashes: np.ndarray, fraction: float) -> np.ndarray:
  """Which documents are kept for evaluation.

  A document stays on its side whatever else is in the corpus, and equal
  documents fall on the same side.

  Args:
    hashes: `text_hash` of each document, `[documents]` uint64.
    fraction: Expected share of documents, at least 0 and less than 1.

  Returns:
    `[documents]` bool.
  """
  return hashes < np.uint64(int(fraction * 2**64))
