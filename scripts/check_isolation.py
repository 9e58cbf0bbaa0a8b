"""Checks that packed documents do not see each other, with your own model.

  python scripts/check_isolation.py --config=configs/x.py [--packings=20]

Changes one document of each random packing; the others' losses, and the
gradient of all parameters, must keep every bit. Prints a table, and exits with
1 and the documents' names if anything leaks.
"""

import dataclasses
import sys

import jax
from absl import app, flags
from flax import nnx
from ml_collections import config_flags

from jaxchunk.chunking.executor import Options, make_options
from jaxchunk.evaluation import isolation
from jaxchunk.models.transformer import Transformer
from jaxchunk.training.config import Config, ConfigError, strategy_of, validate
from jaxchunk.training.flags import parse_flags
from jaxchunk.training.run import check_kernels

_CONFIG = config_flags.DEFINE_config_file("config")
_PACKINGS = flags.DEFINE_integer("packings", 20, "Of each way.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of lengths and tokens.", lower_bound=0)
_LARGEST_CHUNK = flags.DEFINE_integer(
  "largest_chunk", 128, "Longer chunks are shortened to this.", lower_bound=1
)
flags.mark_flags_as_required(["config"])


def shrunk(config: Config) -> Config:
  """At most two layers of each kind, and short chunks; widths stay."""
  layers = min(
    config.model.num_layers, 2 * len(config.model.frozen().window_pattern)
  )
  size = min(config.train.chunk_size, _LARGEST_CHUNK.value)
  return dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, num_layers=layers),
    train=dataclasses.replace(config.train, chunk_size=size),
  )


def ways_of(config: Config, model: Transformer) -> dict[str, Options]:
  """The configuration's own way to run chunks, and the others."""
  train = config.train
  size = train.chunk_size
  own = make_options(
    model,
    chunk_size=size,
    live_chunks=train.live_chunks,
    strategy=strategy_of(config),
    kv_memory=train.kv_memory,
    implementation=train.implementation,
  )
  ways = {f"this config: {own.strategy}, K={own.live_chunks}": own}
  for live in (0, 2):
    ways[f"chunk_outer, K={live}"] = make_options(
      model, chunk_size=size, live_chunks=live, strategy="chunk_outer"
    )
  ways["layer_outer"] = make_options(
    model, chunk_size=size, strategy="layer_outer"
  )
  return ways


def main(argv: list[str]) -> None:
  """Prints the table."""
  if len(argv) > 1:
    sys.exit(f"check_isolation.py: {argv[1]!r} is not a flag")
  try:
    validate(_CONFIG.value)
    check_kernels(_CONFIG.value.train.implementation, jax.local_devices()[0])
  except ConfigError as error:
    sys.exit(f"check_isolation.py: {error}")
  config = shrunk(_CONFIG.value)
  cfg, size = config.model, config.train.chunk_size
  length = 4 * size
  print(
    f"Checked: {cfg.num_layers} of {_CONFIG.value.model.num_layers} layers at "
    f"full width, chunks of {size} of {_CONFIG.value.train.chunk_size} tokens, "
    f"random parameters, rows of {length} random tokens in 2 to 6 documents."
  )
  model = Transformer(cfg, rngs=nnx.Rngs(config.train.seed))
  key = jax.random.key(config.train.seed)
  runs = {
    name: isolation.by_chunks(model, options, key)
    for name, options in ways_of(config, model).items()
  }
  runs["whole rows, xla"] = isolation.in_whole_rows(model, "xla")
  width, leaking = max(map(len, runs)), 0
  for name, run in runs.items():
    leaks = isolation.model_leaks(
      run,
      vocab_size=cfg.vocab_size,
      packings=_PACKINGS.value,
      length=length,
      seed=_SEED.value,
    )
    verdict = f"FAIL, {len(leaks)} leaks" if leaks else "pass, 0 leaks"
    print(f"{name:<{width}}  {_PACKINGS.value:>5} packings  {verdict}")
    for leak in leaks[:5]:
      print(f"  {leak}")
    leaking += bool(leaks)
  if leaking:
    sys.exit(f"check_isolation.py: {leaking} of {len(runs)} ways leak")


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
