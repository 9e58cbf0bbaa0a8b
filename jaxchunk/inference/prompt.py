"""From text to the tokens that a model continues."""

import numpy as np

from jaxchunk.data.tokenizers import Ids, Tokenizer


def encode_prompt(tokenizer: Tokenizer, text: str, *, bos: bool = True) -> Ids:
  """Ids of a prompt, as a document of training begins.

  Args:
    tokenizer: The model's.
    text: May be empty where BOS comes first.
    bos: Put the BOS token first, if the tokenizer has one.

  Returns:
    At least one id, int32.

  Raises:
    ValueError: There would be none.
  """
  begin = [tokenizer.bos_id] if bos and tokenizer.bos_id is not None else []
  ids = np.concatenate([np.asarray(begin, np.int32), tokenizer.encode(text)])
  if not ids.size:
    reason = "has no BOS token" if bos else "was told to leave out BOS"
    raise ValueError(
      f"the prompt is empty and the tokenizer {reason} to begin with; write "
      "some text"
    )
  return ids
