"""Fine-tunes a published 8B on long conversations, on a small TPU slice.

Command:  python scripts/train.py --config=configs/sft_slices.py:MODEL,v5e
            --workdir=DIR --config.data.source=talk.jsonl
          on every host of the slice, where MODEL is a folder in the format of
          Hugging Face, and v5e (a slice of 4x4) or v6e (of 2x4) what it is;
          DIR is on a disk that all hosts share. Conversations beyond 128k
          tokens are left out and counted.
Hardware: A slice v5e:4x4 (15.75 GiB a chip, 15.28 without the 3% left to the
          runtime), or v6e:2x4 (31.25 and 30.31). Compiled for Llama 3.1 8B, at
          its peak, on each chip:
            v5e  10.9 GiB
            v6e  21.4 GiB
Expected: Not run on hardware yet. The figures are those of
          python scripts/compile.py --config=configs/sft_slices.py:MODEL,v5e
            --target=v5e:4x4
          A sequence beyond the context that the model was made for has the
          positions that `model.rope` gives it.
"""

from pathlib import Path

from jaxchunk.data.config import DataConfig
from jaxchunk.interop.hugging_face import load_config
from jaxchunk.training.config import (
  CheckpointConfig,
  Config,
  ConfigError,
  LayoutConfig,
  TrainConfig,
)

# Groups of chips share a sequence, and all chips share the parameters.
_LAYOUTS = {
  "v5e": LayoutConfig(context=8, tensor=2, fsdp_over_context=True),
  "v6e": LayoutConfig(fsdp=2, context=4, fsdp_over_context=True),
}
_LONGEST = 131_072


def get_config(argument: str = "") -> Config:
  """The configuration for a folder, and a slice behind a comma (v6e)."""
  model, _, slice_ = argument.rpartition(",")
  if slice_ not in _LAYOUTS:
    model, slice_ = argument, "v6e"
  if not model:
    raise ConfigError(
      "name the model's folder, and one of "
      f"{', '.join(_LAYOUTS)}: --config=configs/sft_slices.py:MODEL,v5e"
    )
  folder = str(Path(model).expanduser().resolve())
  return Config(
    # Two bytes a parameter, and no copy in fp32: rounding at random keeps
    # updates smaller than half a unit.
    model=load_config(folder, dtype="bfloat16", param_dtype="bfloat16"),
    data=DataConfig(
      source="talk.jsonl",
      format="messages",
      tokenizer=folder,
      batch_tokens=4 * _LONGEST,
      max_document_tokens=_LONGEST,
      heldout_fraction=0.02,
    ),
    train=TrainConfig(
      init_from=folder,
      num_steps=1000,
      chunk_size=2048,
      strategy="layer_outer",
      optimizer="adamw8bit",
      stochastic_rounding=True,
      implementation="pallas_tpu",
      learning_rate=1e-5,
      weight_decay=0.0,
      warmup_steps=50,
      eval_every=100,
    ),
    checkpoint=CheckpointConfig(save_every=200, keep_last=2),
    layout=_LAYOUTS[slice_],
  )
