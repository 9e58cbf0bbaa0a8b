"""Text of a context and its continuation as tokens."""

from collections.abc import Sequence

import numpy as np

from jaxchunk.data.tokenizers import Ids, Tokenizer


def encode_pairs(
  tokenizer: Tokenizer, context: str, continuations: Sequence[str]
) -> list[tuple[Ids, Ids]]:
  """Ids of a context and each continuation, cut where that begins.

  The whole is encoded at once, as a document would be. Where a token reaches
  over the border, it belongs to the continuation.

  Args:
    tokenizer: The model's.
    context: May be empty.
    continuations: Each may be empty.

  Returns:
    For each two arrays of ids, int32, which joined are those of the joined
    text.
  """
  texts = [context, *(context + rest for rest in continuations)]
  alone, *wholes = tokenizer.encode_batch(texts)
  pairs = []
  for whole in wholes:
    count = min(len(whole), len(alone))
    same = whole[:count] == alone[:count]
    shared = count if same.all() else int(np.argmin(same))
    pairs.append((whole[:shared], whole[shared:]))
  return pairs


def begin_ids(tokenizer: Tokenizer, bos: bool) -> Ids:
  """What stands before a text: the BOS token, if wanted and there is one."""
  first = [tokenizer.bos_id] if bos and tokenizer.bos_id is not None else []
  return np.asarray(first, np.int32)
