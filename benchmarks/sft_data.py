"""Conversations from the docstrings of Python's standard library.

Somebody asks about a function, the assistant answers with its docstring or its
source, over one or more turns; a few sources are long, so that lengths have
the tail that chats have.
"""

import ast
import json
import pathlib
import sysconfig
from typing import Any

import numpy as np
import tokenizers

from jaxchunk.data.bpe import train_bpe
from jaxchunk.data.chat import CHATML

SPECIALS = ("<|pad|>", "<|eos|>", "<|im_start|>", "<|im_end|>")


def functions() -> list[tuple[str, str, str]]:
  """Name, docstring and source of documented functions."""
  found = []
  root = pathlib.Path(sysconfig.get_path("stdlib"))
  for path in sorted(root.glob("*.py")):
    text = path.read_text(encoding="utf-8", errors="replace")
    for node in ast.walk(ast.parse(text)):
      if isinstance(node, ast.FunctionDef) and (doc := ast.get_docstring(node)):
        source = ast.get_source_segment(text, node) or ""
        found.append((f"{path.stem}.{node.name}", doc, source))
  return found


def conversations(count: int, seed: int) -> list[dict[str, Any]]:
  """Records with `messages`."""
  rng = np.random.default_rng(seed)
  pool = functions()
  records = []
  for _ in range(count):
    messages = []
    if rng.random() < 0.3:
      messages.append({"role": "system", "content": "You know Python well."})
    for _ in range(1 + rng.geometric(0.6)):
      name, doc, source = pool[rng.integers(len(pool))]
      shows = rng.random() < 0.2
      ask = f"Show me {name}." if shows else f"What does {name} do?"
      messages.append({"role": "user", "content": ask})
      answer = source if shows else doc
      messages.append({"role": "assistant", "content": answer})
    records.append({"messages": messages})
  return records


def write(folder: pathlib.Path, count: int, seed: int, vocab: int) -> None:
  """`talk.jsonl`, and in `tokenizer` a BPE trained on it."""
  records = conversations(count, seed)
  with (folder / "talk.jsonl").open("w", encoding="utf-8") as file:
    for record in records:
      file.write(json.dumps(record, ensure_ascii=False) + "\n")
  texts = (m["content"] for r in records for m in r["messages"])
  definition = train_bpe(vocab, texts, SPECIALS)
  from transformers import PreTrainedTokenizerFast

  PreTrainedTokenizerFast(
    tokenizer_object=tokenizers.Tokenizer.from_str(definition),
    pad_token="<|pad|>",
    eos_token="<|eos|>",
    chat_template=CHATML,
  ).save_pretrained(folder / "tokenizer")
