"""A run's newest checkpoint in the format of Hugging Face or of PEFT."""

import json
import os
from pathlib import Path

from jaxchunk.data.tokenizers import load_tokenizer
from jaxchunk.interop.hugging_face import save_hf
from jaxchunk.interop.peft import save_peft
from jaxchunk.models.adapters import merge_lora
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
  model, tokenizer, step = load_for_inference(workdir)
  values = json.loads((Path(workdir) / "config.json").read_text())
  base = values["train"].get("init_from")
  if adapters:
    save_peft(model, Path(output), base=base or "")
    return f"Adapters of step {step}: {output}"
  save_hf(
    merge_lora(model),
    Path(output),
    like=base,
    tokenizer=None if base else load_tokenizer(tokenizer),
    dtype=dtype,
    overwrite=overwrite,
  )
  return f"Model of step {step}: {output}"
