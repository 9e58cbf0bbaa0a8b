"""The state of a run: begun or restored, saved, and described."""

import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from absl import logging
from flax import nnx
from jaxtyping import PRNGKeyArray
from tqdm import tqdm

from jaxchunk.chunking.cost import active_parameters
from jaxchunk.chunking.executor import Options, choose_strategy, make_options
from jaxchunk.chunking.memory import Strategy, memory_by_length
from jaxchunk.chunking.pipeline import stored_shards
from jaxchunk.chunking.plan import ChunkPlan
from jaxchunk.chunking.spaco import SpaCO
from jaxchunk.data.accounting import KEPT, Accounting
from jaxchunk.data.corpus import (
  Corpus,
  describe,
  heldout_examples,
  open_corpus,
)
from jaxchunk.data.pipeline import training_batches
from jaxchunk.data.tokenizers import load_tokenizer
from jaxchunk.kernels.attention.backends import Backend
from jaxchunk.models.rope import LongRopeScaling
from jaxchunk.models.transformer import Transformer
from jaxchunk.sharding.mesh import Layout
from jaxchunk.training import (
  checkpoint,
  distributed,
  info,
  initial,
  optimizer,
  schedule,
)
from jaxchunk.training import config as config_lib
from jaxchunk.training.checkpoint import CheckpointError, Restored
from jaxchunk.training.config import Config, ConfigError
from jaxchunk.training.places import Places, places_of
from jaxchunk.training.saver import Saver
from jaxchunk.training.workdir import write_errors
from jaxchunk.types import Example

_GATHERED = {"layer": "a layer at a time", "step": "all once a step"}


@dataclasses.dataclass
class Run:
  """A run: what stays, and what every step replaces.

  Attributes:
    config: What was asked for.
    workdir: Where everything is written.
    corpus: The documents.
    batches: Their iterator; its state is the cursor.
    heldout: Sequences to evaluate on.
    graphdef: The model without its parameters.
    options: What the chunk programs are compiled for.
    update: The compiled update.
    key: Of dropout.
    params: What is trained, a nested dictionary of arrays.
    frozen: The other parameters, likewise.
    frozen_sums: Checksums of those.
    state: The optimizer's.
    step: Updates tried.
    mesh: The devices; `None` is one.
    clock: When the last step ended, or its successor could have begun.
    busiest: The plan with the longest sequence so far, and its step.
  """

  config: Config
  workdir: Path
  corpus: Corpus
  batches: grain.DatasetIterator
  heldout: list[Example]
  graphdef: Any
  options: Options
  update: optimizer.Update
  key: PRNGKeyArray
  params: optimizer.Params
  frozen: optimizer.Params
  frozen_sums: dict[str, int]
  state: optimizer.OptimizerState
  step: int
  mesh: jax.sharding.Mesh | None = None
  clock: float = 0.0
  busiest: tuple[int, ChunkPlan] | None = None

  @property
  def model(self) -> Transformer:
    """The model with the present parameters."""
    return nnx.merge(
      self.graphdef, nnx.State(self.params), nnx.State(self.frozen)
    )


def start(config: Config, workdir: Path, manager: Any) -> Run:
  """Restores the newest checkpoint, or begins anew.

  Order matters: the stored configuration is compared first, so that another
  architecture is not mistaken for damage; then arrays are read into targets
  with explicit shardings; then the data goes to its cursor, which checks that
  the documents are the same. Metrics are cut back last, by the caller, when
  nothing can fail any more.
  """
  check_kernels(config.train.implementation, jax.local_devices()[0])
  graphdef, shapes, others = initial.abstract_model(config.model)
  tx = optimizer.make_optimizer(config.train)
  mesh = _mesh(config)
  places = _places(config, nnx.merge(graphdef, shapes, others), mesh)
  target = jax.tree.map(
    checkpoint.target_like, nnx.to_pure_dict(shapes), places.params
  )
  init = functools.partial(optimizer.init_state, tx)
  state_shapes = jax.eval_shape(init, target)
  state_places = optimizer.state_shardings(
    config.train, state_shapes, places.everywhere, places.updated
  )
  restored = checkpoint.restore(
    manager,
    config,
    params=target,
    optimizer=jax.tree.map(checkpoint.target_like, state_shapes, state_places),
  )
  corpus = _open(config, workdir, restored)
  batches = training_batches(corpus)
  if restored is None:
    params, frozen = initial.parameters(
      config.model, config.train.init_from, config.train.seed, places.of
    )
    params = _put(params, places.params)
    state = jax.jit(init, out_shardings=state_places)(params)
    step = 0
  else:
    params, state, step = restored.params, restored.optimizer, restored.step
    frozen = initial.frozen_parameters(
      config.model, config.train.init_from, config.train.seed, places.of
    )
    try:
      batches.set_state(dict(restored.meta["cursor"]))
    except ValueError as error:
      raise CheckpointError(
        f"checkpoint {step} in {workdir} cannot go on: {error}"
      ) from error
    say(f"Resuming after step {step} of {workdir}")
  limit = config.train.eval_tokens
  heldout = heldout_examples(corpus, max_tokens=limit)
  if config.train.eval_every and not heldout:
    say(
      f"No evaluation: no held-out document within train.eval_tokens={limit} "
      f"(data.heldout_fraction={config.data.heldout_fraction})"
    )
  frozen = _put(frozen, places.frozen)
  if restored is not None:
    checkpoint.check_frozen(restored.meta, frozen)
  distributed.check_same_place(config, corpus, step, batches.get_state())
  if distributed.leads():
    _write_start(config, workdir, None if restored else corpus)
  options = make_options(
    nnx.merge(graphdef, nnx.State(params), nnx.State(frozen)),
    chunk_size=config.train.chunk_size,
    live_chunks=config.train.live_chunks,
    strategy=config_lib.strategy_of(config),
    trainable=initial.trainable(config.model),
    keep=config.train.keep,
    kv_memory=config.train.kv_memory,
    implementation=config.train.implementation,
  )
  _say_layout(config, nnx.merge(graphdef, shapes, others), options)
  key = jax.random.key_data(jax.random.key(config.train.seed))
  return Run(
    config=config,
    workdir=workdir,
    corpus=corpus,
    batches=batches,
    heldout=heldout,
    graphdef=graphdef,
    options=options,
    update=optimizer.make_update(
      config.train,
      state_places,
      kept=places.params if mesh else None,
      updated=places.updated if mesh else None,
    ),
    key=jax.random.wrap_key_data(_put(key, places.everywhere)),
    params=params,
    frozen=frozen,
    frozen_sums=checkpoint.frozen_sums(frozen) if frozen else {},
    state=state,
    step=step,
    mesh=mesh,
  )


def _say_layout(config: Config, model: Transformer, options: Options) -> None:
  """Prints what each axis splits, and what gathering takes."""
  layout = config.layout.layout()
  if layout is None:
    return
  say(layout.table())
  shards = stored_shards(layout, model)
  if not shards.gathers:
    return
  sizes = shards.gathered_bytes(model, options.trainable, layout)
  other = "step" if layout.gather == "layer" else "layer"
  say(
    f"Parameters are gathered {_GATHERED[layout.gather]}: "
    f"{sizes[layout.gather] / 2**20:,.1f} MiB on each device "
    f"({_GATHERED[other]}, layout.gather={other!r}, it would be "
    f"{sizes[other] / 2**20:,.1f})"
  )


def _write_start(config: Config, workdir: Path, new: Corpus | None) -> None:
  """Writes the configuration, and what a new run's documents are read by."""
  text = json.dumps(config_lib.to_json(config), indent=2)
  with write_errors(workdir):
    (workdir / "config.json").write_text(text + "\n", encoding="utf-8")
    if new is not None:
      new.tokenizer.save(workdir / checkpoint.TOKENIZER)
      if new.template is not None:
        new.template.save(workdir / checkpoint.TOKENIZER)


def _put(tree: Any, places: Any) -> Any:
  """Arrays that every process has, to where they belong."""
  if distributed.count() == 1:
    return jax.device_put(tree, places)

  def put(x: jax.Array, place: jax.sharding.Sharding) -> jax.Array:
    if not x.is_fully_addressable:
      same = x.sharding.is_equivalent_to(place, x.ndim)
      return x if same else jax.device_put(x, place)
    # Each gives what its own devices need, and nothing is sent.
    whole = np.asarray(x)
    return jax.make_array_from_callback(x.shape, place, whole.__getitem__)

  return jax.tree.map(put, tree, places)


def _places(
  config: Config, model: Transformer, mesh: jax.sharding.Mesh | None
) -> Places:
  """Where the parameters are.

  Raises:
    ConfigError: The layout cannot split them.
  """
  try:
    return places_of(model, config.layout.layout(), mesh)
  except (ValueError, NotImplementedError) as error:
    raise ConfigError(f"layout: {error}") from error


def _mesh(config: Config) -> jax.sharding.Mesh | None:
  """The devices of a layout; `None` is one.

  Raises:
    ConfigError: There are more or fewer.
  """
  layout = config.layout.layout()
  if layout is None and (processes := distributed.count()) > 1:
    devices = jax.device_count()
    raise ConfigError(
      f"layout takes 1 device and there are {devices} in {processes} "
      f"processes; the nearest layout is {Layout(data=devices)}"
    )
  try:
    return None if layout is None else layout.mesh()
  except ValueError as error:
    raise ConfigError(f"layout: {error}") from error


def check_kernels(implementation: Backend | None, device: jax.Device) -> None:
  """Refuses kernels that are for another kind of device.

  Args:
    implementation: As `train.implementation`.
    device: Where a run would be.

  Raises:
    ConfigError: They are.
  """
  wanted = {"pallas_tpu": "tpu", "pallas_gpu": "gpu"}.get(implementation or "")
  fits = wanted in (None, device.platform)
  if wanted == "gpu" and fits:
    # Later generations have other instructions for products.
    fits = device.compute_capability == "9.0"
  if not fits:
    raise ConfigError(
      f"train.implementation={implementation!r} does not run on "
      f"{device.device_kind}; leave it at None"
    )


def _open(config: Config, workdir: Path, restored: Restored | None) -> Corpus:
  """The documents, with the tokenizer that the run began with."""
  tokenizer = None
  saved = workdir / checkpoint.TOKENIZER
  try:
    if restored is not None and saved.is_dir():
      special = config.data.parse_special
      tokenizer = load_tokenizer(str(saved), parse_special=special)
    corpus = open_corpus(config.data, tokenizer=tokenizer)
  except (ValueError, OSError) as error:
    raise ConfigError(str(error)) from error
  surplus = corpus.tokenizer.vocab_size > config.model.vocab_size
  if surplus and config.train.init_from is not None:
    # Published tokenizers may name tokens of other parts of a model, such as
    # images; a document that has one is an error when it comes.
    logging.warning(
      "The tokenizer has %d ids, the model's vocabulary %d; documents must not "
      "contain the others",
      corpus.tokenizer.vocab_size,
      config.model.vocab_size,
    )
  elif surplus:
    raise ConfigError(
      f"model.vocab_size={config.model.vocab_size} is less than the "
      f"{corpus.tokenizer.vocab_size} ids of data.tokenizer="
      f"{config.data.tokenizer!r}; raise it"
    )
  say(describe(corpus))
  _check_rope(config, corpus)
  return corpus


def _check_rope(config: Config, corpus: Corpus) -> None:
  """Warns of an embedding for longer sequences than there are."""
  scaling = config.model.rope.scaling
  if not isinstance(scaling, LongRopeScaling):
    return
  longest = int(corpus.lengths[corpus.reasons == KEPT].max())
  if longest <= scaling.original_length < scaling.length:
    logging.warning(
      "The model embeds positions for sequences beyond %d tokens, and the "
      "longest has %d: elsewhere these are embedded by its short factors; give "
      "load_config context_length=%d",
      scaling.original_length,
      longest,
      scaling.original_length,
    )


def begin_save(run: Run, saver: Saver) -> None:
  """Starts to save the run as it is after the step dispatched last."""
  saver.begin(
    run.step,
    params=run.params,
    optimizer=run.state,
    meta={
      "config": config_lib.to_json(run.config),
      "fingerprint": config_lib.fingerprint(run.config),
      "cursor": run.batches.get_state(),
      "frozen": run.frozen_sums,
    },
  )


def report_info(run: Run, total: Accounting) -> info.RunInfo:
  """What the report shows besides the metrics."""
  cfg, train = run.config.model, run.config.train
  parameters = sum(x.size for x in jax.tree.leaves((run.params, run.frozen)))
  size = f"{parameters:,} parameters"
  if cfg.moe is not None:
    size += f" ({active_parameters(cfg, parameters):,} for each token)"
  picture = None
  if run.busiest is not None:
    step, plan = run.busiest
    chosen = config_lib.strategy_of(run.config)
    live, drawn = train.live_chunks, ""
    strategy: Strategy
    if isinstance(chosen, SpaCO):
      strategy, live = "chunk_outer", 0
      drawn = f" (SpaCO at {train.spaco_rate:g} runs part of B; all are drawn)"
    else:
      strategy = chosen or choose_strategy(cfg, train.live_chunks)
    picture = schedule.of_plan(
      f"Step {step}: {plan.num_chunks} chunks of {train.chunk_size:,} tokens "
      f"in {len(plan.lanes)} lane{'s' if len(plan.lanes) > 1 else ''}, "
      f"{strategy.replace('_', '-')}{drawn}",
      plan,
      cfg=cfg,
      live_chunks=live,
      strategy=strategy,
    )
  return info.RunInfo(
    title=f"{run.workdir.name}: {size}, step {run.step:,}",
    chunk_size=train.chunk_size,
    lengths=info.document_lengths(run.corpus.index.lengths, run.corpus.reasons),
    accounting=total,
    schedule=picture,
    memory=_memory(run),
  )


def _memory(run: Run) -> info.Memory:
  """Predicted memory up to the longest document of the corpus."""
  size = run.config.train.chunk_size
  longest = max(int(run.corpus.lengths.max()), 2 * size)
  lengths = [size]
  while lengths[-1] < longest:
    lengths.append(2 * lengths[-1])
  ways = memory_by_length(
    run.config.model,
    lengths,
    chunk_size=size,
    live_chunks=run.config.train.live_chunks,
  )
  return info.Memory(lengths, ways)


def say(text: str) -> None:
  """Prints without tearing the progress bar, in one process."""
  if not distributed.leads():
    return
  tqdm.write(text)
  sys.stdout.flush()
