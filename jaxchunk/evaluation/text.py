"""Text of a context and its continuation as tokens."""

import numpy as np

from jaxchunk.data.tokenizers import Ids, Tokenizer


def encode_pair(
  tokenizer: Tokenizer, context: str, continuation: str
) -> tuple[Ids, Ids]:
  """Ids of both texts, cut where the continuation begins.

  The whole is encoded at once, as a document would be. Where a token reaches
  over the border, it belongs to the continuation.

  Args:
    tokenizer: The model's.
    context: May be empty.
    continuation: May be empty.

  Returns:
    Two arrays of ids, int32, which joined are those of the joined text.
  """
  whole = tokenizer.encode(context + continuation)
  alone = tokenizer.encode(context)
  count = min(len(whole), len(alone))
  same = whole[:count] == alone[:count]
  shared = count if same.all() else int(np.argmin(same))
  return whole[:shared], whole[shared:]


def begin_ids(tokenizer: Tokenizer, bos: bool) -> Ids:
  """What stands before a text: the BOS token, if wanted and there is one."""
  first = [tokenizer.bos_id] if bos and tokenizer.bos_id is not None else []
  return np.asarray(first, np.int32)
