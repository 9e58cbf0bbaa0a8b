"""TRL's SFTTrainer as a contestant of `peers.py`.

The trainer as it is: its loop, its collator, its fused head, which builds no
logits of the whole row, and gradient checkpointing.
"""

import pathlib
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from peers_job import Job, read_documents
from peers_torch import (
  adamw,
  build,
  device_of,
  library,
  make_step,
  plain,
  synchronize,
  warm,
  watch,
)
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

ROWS, PADDING_FREE = "TRL SFTTrainer, rows", "TRL SFTTrainer, padding-free"


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


def settings(job: Job, documents: int, steps: int, folder: str) -> SFTConfig:
  """Rows one after the other, or a step's documents behind each other."""
  at_once = documents if job.contestant == PADDING_FREE else 1
  return SFTConfig(
    output_dir=folder,
    max_steps=steps,
    per_device_train_batch_size=at_once,
    gradient_accumulation_steps=documents // at_once,
    padding_free=job.contestant == PADDING_FREE,
    # Nothing is cut; documents are prepared already.
    max_length=None,
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
  model = build(job, folder)
  steps = read_documents(folder, job)
  count = len(steps[0])
  ids = [d.tolist() for documents in steps for d in documents]
  optimizer: torch.optim.Optimizer
  if job.update:
    optimizer = adamw(model, job)
  else:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
  row = torch.tensor(ids[0], device=device_of(job))[None]
  warm(model, make_step(model, plain(model, job), optimizer), optimizer, row)
  clock = Clock()
  with tempfile.TemporaryDirectory() as out:
    trainer = Trainer(
      model=model,
      args=settings(job, count, len(steps), out),
      train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
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
