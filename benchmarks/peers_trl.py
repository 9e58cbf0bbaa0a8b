"""TRL's SFTTrainer as a contestant of `peers.py` and `chat_tail.py`.

The trainer as it is: its loop, its collator, its fused head, which builds no
logits of the whole row, and gradient checkpointing.
"""

import pathlib
import tempfile
import time
from typing import Any

import numpy as np
import torch
import transformers
from chat_tail_data import even_rows
from datasets import Dataset, disable_progress_bars
from peers_job import Job, read_documents
from peers_torch import (
  adamw,
  build,
  device_of,
  library,
  make_step,
  plain,
  synchronize,
  trained,
  warm,
  watch,
)
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer, pack_dataset

NAME = "TRL SFTTrainer, "
ROWS, PADDING_FREE, PACKED = "rows", "padding-free", "packed"
PADDED, BY_LENGTH = "padded", "padded by length"

Rows = list[dict[str, list[int]]]
"""What a collator is given: `input_ids`, `labels`, perhaps `seq_lengths`."""


class Clock(TrainerCallback):
  """Seconds of each step, optimizer and all."""

  def __init__(self) -> None:
    self.seconds: list[float] = []
    self.start = 0.0

  def on_step_begin(self, *_: Any, **__: Any) -> None:
    """Starts."""
    self.start = time.perf_counter()

  def on_step_end(self, *_: Any, **__: Any) -> None:
    """Stops."""
    synchronize()
    self.seconds.append(time.perf_counter() - self.start)


class Trainer(SFTTrainer):
  """Keeps the losses, which its log rounds."""

  def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The loss of a part of a batch, divided by the batch's targets."""
    loss = super().training_step(*args, **kwargs)
    self.parts.append(loss.item())
    return loss


def tokenizer(vocab: int) -> PreTrainedTokenizerFast:
  """Names for the ids; the trainer asks for one that pads."""
  names = {str(n): n for n in range(vocab)}
  return PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel(names, "0")),
    pad_token="0",
    eos_token="0",
  )


def way_of(job: Job) -> str:
  """How documents are brought together."""
  return job.contestant.removeprefix(NAME)


def rows_of(documents: list[np.ndarray], way: str, longest: int) -> Rows:
  """A step's documents as rows; packed, the longest is a row's limit."""
  if way == BY_LENGTH:
    documents = sorted(documents, key=len)
  ids = [d.tolist() for d in documents]
  rows = [{"input_ids": i, "labels": i} for i in ids]
  if way != PACKED:
    return rows
  return pack_dataset(Dataset.from_list(rows), longest).to_list()


def even(steps: list[Rows]) -> list[Rows]:
  """As many packed rows in each step, for the trainer takes no other."""
  lengths = [[row["seq_lengths"] for row in rows] for rows in steps]
  return [
    [
      part
      for row, parts in zip(rows, cuts, strict=True)
      for part in cut(row, parts)
    ]
    for rows, cuts in zip(steps, even_rows(lengths), strict=True)
  ]


def cut(row: dict[str, list[int]], parts: list[list[int]]) -> Rows:
  """A packed row as several, each with its documents' lengths."""
  rows, start = [], 0
  for lengths in parts:
    stop = start + sum(lengths)
    ids = row["input_ids"][start:stop]
    rows.append({"input_ids": ids, "labels": ids, "seq_lengths": lengths})
    start = stop
  return rows


def at_once(job: Job, documents: int) -> int:
  """Rows of a forward pass."""
  if way_of(job) in (ROWS, PACKED):
    return 1
  return job.batch or documents


def attention_of(job: Job) -> str:
  """Flash attention, if it is there, where documents lie behind each other.

  SDPA gets a mask of all tokens by all tokens then.
  """
  flat = way_of(job) in (PADDING_FREE, PACKED)
  there = transformers.utils.is_flash_attn_2_available()
  if flat and there and device_of(job) == "cuda":
    return "flash_attention_2"
  return "sdpa"


def settings(
  job: Job, rows: int, steps: int, longest: int, folder: str
) -> SFTConfig:
  """Of a trainer that runs so many rows in each step."""
  together = at_once(job, rows)
  if rows % together:
    raise ValueError(
      f"a step's {rows} documents are no multiple of batch={together}"
    )
  packing = way_of(job) == PACKED
  return SFTConfig(
    output_dir=folder,
    max_steps=steps,
    per_device_train_batch_size=together,
    gradient_accumulation_steps=rows // together,
    padding_free=way_of(job) == PADDING_FREE,
    packing=packing,
    # Nothing is cut; documents are prepared already.
    max_length=longest if packing else None,
    dataset_kwargs={"skip_prepare_dataset": True},
    train_sampling_strategy="sequential",
    lr_scheduler_type="constant",
    max_grad_norm=0.0,
    gradient_checkpointing=True,
    bf16=job.dtype == "bfloat16",
    use_cpu=device_of(job) == "cpu",
    dataloader_pin_memory=False,
    save_strategy="no",
    logging_strategy="no",
    report_to=[],
    disable_tqdm=True,
  )


def run(job: Job, folder: pathlib.Path) -> dict[str, Any]:
  """As `peers_torch.run`."""
  model = build(job, folder, attention_of(job))
  disable_progress_bars()
  documents = read_documents(folder, job)
  longest = max(len(d) for step in documents for d in step)
  steps = [rows_of(step, way_of(job), longest) for step in documents]
  if way_of(job) == PACKED:
    steps = even(steps)
  optimizer: torch.optim.Optimizer
  if job.update:
    optimizer = adamw(model, job)
  else:
    optimizer = torch.optim.SGD([p for _, p in trained(model)], lr=0.0)
  ids = steps[0][0]["input_ids"]
  row = torch.tensor(ids, device=device_of(job))[None]
  warm(model, make_step(model, plain(model, job), optimizer), optimizer, row)
  clock = Clock()
  with tempfile.TemporaryDirectory() as out:
    trainer = Trainer(
      model=model,
      args=settings(job, len(steps[0]), len(steps), longest, out),
      train_dataset=Dataset.from_list([r for rows in steps for r in rows]),
      processing_class=tokenizer(job.sizes.vocab),
      callbacks=[clock],
      optimizers=(
        optimizer,
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0),
      ),
    )
    # Standard output is for the figures.
    trainer.remove_callback(PrinterCallback)
    trainer.parts = []
    with watch(job) as growth:
      trainer.train()
  per_step = len(trainer.parts) // len(steps)
  losses = [
    sum(trainer.parts[i : i + per_step])
    for i in range(0, len(trainer.parts), per_step)
  ]
  cuda = device_of(job) == "cuda"
  return {
    "losses": losses,
    "seconds": clock.seconds,
    "peak_bytes": growth.grown,
    "device": torch.cuda.get_device_name() if cuda else "cpu",
    "library": library(),
  }
