"""A run's newest checkpoint in the format of Hugging Face or of PEFT."""

import json
import os
import shutil
from pathlib import Path

from jaxchunk.data.chat import TEMPLATE
from jaxchunk.data.tokenizers import Tokenizer, load_tokenizer
from jaxchunk.interop.hugging_face import save_hf
from jaxchunk.interop.peft import save_peft
from jaxchunk.models.config import DType
from jaxchunk.training.checkpoint import load_for_inference


def export_run(
  workdir: str | os.PathLike[str],
  output: str | os.PathLike[str],
  *,
  adapters: bool = False,
  dtype: DType | None = None,
  overwrite: bool = False,
) -> str:
  """Writes the newest checkpoint of a run.

  Args:
    workdir: Of a run of `scripts/train.py`.
    output: A folder, made if need be.
    adapters: Write the adapters alone, for PEFT; otherwise they are merged.
    dtype: Of the weights; by default that of the parameters.
    overwrite: Whether weights that are there already may be replaced.

  Returns:
    What was written, in a line.

  Raises:
    CheckpointError: There is no checkpoint that can be read.
    InteropError: The model cannot be written so, or the folder holds weights.
  """
  model, folder, step = load_for_inference(workdir)
  values = json.loads((Path(workdir) / "config.json").read_text())
  base = values["train"].get("init_from")
  if adapters:
    save_peft(model, Path(output), base=base or "")
    return f"Adapters of step {step}: {output}"
  tokenizer: Tokenizer | None = load_tokenizer(folder)
  if base and _same_tokenizer(base, folder):
    # What it came with says more than what a run keeps.
    tokenizer = None
  save_hf(
    model,
    Path(output),
    like=base,
    tokenizer=tokenizer,
    dtype=dtype,
    overwrite=overwrite,
  )
  if (template := Path(folder) / TEMPLATE).is_file():
    shutil.copyfile(template, Path(output) / TEMPLATE)
  return f"Model of step {step}: {output}"


def _same_tokenizer(base: str, folder: str) -> bool:
  """Whether a run's tokenizer is that of the model that it began with."""
  try:
    ours, theirs = load_tokenizer(folder), load_tokenizer(base)
  except (ValueError, OSError):
    return False
  return ours.fingerprint == theirs.fingerprint
