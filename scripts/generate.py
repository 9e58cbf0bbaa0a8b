"""Continues a prompt with the newest checkpoint of a run of train.py.

python scripts/generate.py --workdir=runs/quick --prompt="import os"

With --chat the prompt is what a user says, laid out by the chat template that
the run was trained with, and the assistant answers:

python scripts/generate.py --workdir=runs/sft --chat --prompt="Who are you?"
"""

import contextlib
import sys
from pathlib import Path

from absl import app, flags, logging

from jaxchunk.data.tokenizers import load_tokenizer
from jaxchunk.inference.chat import Chat
from jaxchunk.inference.sampling import Sampler
from jaxchunk.inference.text import continue_text
from jaxchunk.training.checkpoint import CheckpointError, load_for_inference

_WORKDIR = flags.DEFINE_string("workdir", None, "A run's.", required=True)
_PROMPT = flags.DEFINE_string("prompt", None, "Text to continue.")
_FILE = flags.DEFINE_string("prompt_file", None, "File that holds it.")
_MAX = flags.DEFINE_integer("max_new_tokens", 200, "Stop after so many.")
_TEMP = flags.DEFINE_float("temperature", 0.8, "0: the likeliest token.")
_K = flags.DEFINE_integer("top_k", None, "Sample from the k likeliest.")
_P = flags.DEFINE_float("top_p", None, "Or those of this probability.")
_SEED = flags.DEFINE_integer("seed", 0, "Of sampling.")
_CHUNK = flags.DEFINE_integer("chunk_size", 512, "Prompt tokens at a time.")
_CHAT = flags.DEFINE_bool("chat", False, "The prompt is a user's turn.")
_SYSTEM = flags.DEFINE_string("system", None, "With --chat: said before it.")
_BOS = flags.DEFINE_bool("bos", True, "Begin with the BOS token.")
flags.mark_flags_as_mutual_exclusive(["prompt", "prompt_file"], required=True)


def main(argv: list[str]) -> None:
  """Text goes to stdout as it comes, speed or one line of error to stderr."""
  if len(argv) > 1:
    sys.exit(f"generate.py: {argv[1]!r} is not a flag; write --name=value")
  logging.set_verbosity(logging.WARNING)
  try:
    sampler = Sampler(temperature=_TEMP.value, top_k=_K.value, top_p=_P.value)
    if (prompt := _PROMPT.value) is None:
      prompt = Path(_FILE.value or "").read_text(encoding="utf-8")
    if _SYSTEM.value is not None and not _CHAT.value:
      raise ValueError("--system goes with --chat")
    model, folder, _ = load_for_inference(_WORKDIR.value)
    tokenizer, ends, bos = load_tokenizer(folder), frozenset[int](), _BOS.value
    if _CHAT.value:
      chat = Chat.load(folder)
      prompt = chat.prompt(prompt, system=_SYSTEM.value)
      tokenizer, ends, bos = chat.tokenizer, chat.end_of_turn(), False
    pieces, clock = continue_text(
      model,
      tokenizer,
      prompt,
      max_new_tokens=_MAX.value,
      sampler=sampler,
      chunk_size=_CHUNK.value,
      seed=_SEED.value,
      bos=bos,
      ends=ends,
    )
  except (ValueError, OSError, CheckpointError) as error:
    sys.exit(f"generate.py: {error}")
  with contextlib.suppress(KeyboardInterrupt):
    for piece in pieces:
      print(piece, end="", flush=True)
  print(f"\n{clock}", file=sys.stderr)


if __name__ == "__main__":
  app.run(main)
