"""Checkpoints: atomic, checked when read; `saver` writes them.

A step holds three items: `params` and `optimizer` (plain dictionaries of
arrays) and `meta` (JSON: the place in the data, the configuration, and a
checksum of every array, because the array files themselves have none: a
flipped bit reads back as another number without a word).
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from flax import nnx
from jax import lax
from jaxtyping import Array

from jaxchunk.models.config import ModelConfig
from jaxchunk.models.transformer import Transformer
from jaxchunk.training import config as config_lib
from jaxchunk.training import distributed, initial
from jaxchunk.training.config import CheckpointConfig, Config

DIRECTORY = "checkpoints"
TOKENIZER = "tokenizer"
SET_ASIDE = "checkpoints-unreadable"
_FORMAT = 1


class CheckpointError(RuntimeError):
  """Checkpoints cannot be read or written; says which, and what to do."""


@dataclasses.dataclass(frozen=True)
class Restored:
  """A checkpoint that was read whole.

  Attributes:
    step: Updates that had been tried.
    params: As the target that was asked for.
    optimizer: Likewise; `None` if none was asked for.
    meta: What `save` was given.
  """

  step: int
  params: Any
  optimizer: Any
  meta: Mapping[str, Any]


@contextlib.contextmanager
def open_manager(
  workdir: Path, options: CheckpointConfig
) -> Iterator[ocp.CheckpointManager]:
  """The manager of a run's checkpoints, which saves before it returns.

  `saver.Saver` calls it from a thread.

  Raises:
    CheckpointError: The folder of the checkpoints cannot be made or read.
  """
  policies = ocp.checkpoint_managers
  keep: list[Any] = [policies.LatestN(options.keep_last)]
  if options.keep_every is not None:
    keep.append(policies.EveryNSteps(options.keep_every))
  folder = (workdir / DIRECTORY).absolute()
  # Barriers of named processes go through their coordinator. Others are
  # collectives of the devices, which a thread must not mix with training.
  processes = distributed.count()
  together = ocp.options.MultiprocessingOptions(
    active_processes=set(range(processes)) if processes > 1 else None
  )
  arrays = functools.partial(
    ocp.PyTreeCheckpointHandler,
    # Compressed pieces would be a second copy of the state in memory, and
    # trained weights hardly get smaller.
    use_compression=False,
    multiprocessing_options=together,
  )
  with _write_errors(workdir):
    folder.mkdir(parents=True, exist_ok=True)
    manager = ocp.CheckpointManager(
      folder,
      item_handlers={
        "params": arrays(),
        "optimizer": arrays(),
        "meta": ocp.JsonCheckpointHandler(multiprocessing_options=together),
      },
      # Old checkpoints go only after a new one is complete.
      options=ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(keep),
        cleanup_tmp_directories=True,
        enable_async_checkpointing=False,
        multiprocessing_options=together,
        create=False,
      ),
    )
  try:
    yield manager
  finally:
    with contextlib.suppress(Exception):
      manager.close()


def with_checksums(
  meta: Mapping[str, Any], arrays: Mapping[str, Any]
) -> Mapping[str, Any]:
  """Adds what only the devices of all processes know together: checksums.

  One process alone sums the copies on its host instead, in `write`.
  """
  if jax.process_count() == 1:
    return meta
  return {**meta, "checksums": {n: checksums(t) for n, t in arrays.items()}}


def write(
  manager: ocp.CheckpointManager,
  step: int,
  *,
  arrays: Mapping[str, Any],
  meta: Mapping[str, Any],
) -> None:
  """Writes a checkpoint; returns when it is complete.

  Args:
    manager: From `open_manager`.
    step: Names the checkpoint.
    arrays: `params`, a nested dictionary of arrays, and `optimizer`, a pytree
      of arrays. In host memory they are not copied again.
    meta: JSON values to keep with them.

  Raises:
    CheckpointError: It could not be written; earlier ones are untouched.
  """
  sums = meta.get("checksums") or jax.tree.map(host_checksum, dict(arrays))
  named = {name: _named(jax.device_get(tree)) for name, tree in sums.items()}
  meta = {**meta, "format": _FORMAT, "step": step, "checksums": named}
  folder = Path(manager.directory)
  with _write_errors(folder.parent):
    if not folder.is_dir():
      # Orbax would make it, and the ones above it, anew.
      raise FileNotFoundError(f"{folder} was removed, moved or replaced")
    manager.save(
      step,
      args=ocp.args.Composite(
        params=ocp.args.PyTreeSave(arrays["params"]),
        optimizer=ocp.args.PyTreeSave(arrays["optimizer"]),
        meta=ocp.args.JsonSave(meta),
      ),
      force=True,
    )


@contextlib.contextmanager
def _write_errors(workdir: Path) -> Iterator[None]:
  try:
    yield
  except Exception as error:
    # Orbax raises whatever its background thread met.
    raise CheckpointError(
      f"a checkpoint could not be written to {workdir / DIRECTORY} "
      f"({_first_line(error)}); earlier ones are untouched. Free some space "
      "or mend the permissions, and run the same command again"
    ) from error


def restore(
  manager: ocp.CheckpointManager,
  config: Config,
  *,
  params: Any,
  optimizer: Any = None,
) -> Restored | None:
  """Reads the newest checkpoint that is whole.

  Newer ones that cannot be read are moved to `checkpoints-unreadable`, with
  a warning, so that their steps can be saved again.

  Args:
    manager: From `open_manager`.
    config: The present configuration.
    params: Target: a dictionary of `ShapeDtypeStruct`s with shardings. Any
      mesh will do.
    optimizer: Target likewise.

  Returns:
    The checkpoint, or `None` if there is none at all.

  Raises:
    CheckpointError: The newest is of another architecture or optimizer, or
      all are unreadable.
  """
  workdir = Path(manager.directory).parent
  patience = config.processes.startup_timeout
  steps = sorted(manager.all_steps(), reverse=True)
  distributed.agree(
    "the processes see different checkpoints",
    {"steps": steps},
    timeout=patience,
  )
  unreadable: dict[int, str] = {}
  for step in steps:
    restored, problem = None, None
    try:
      meta = _read_meta(manager, step)
      _check_compatible(meta["config"], config, step, workdir)
      restored = _read_arrays(manager, step, meta, params, optimizer)
    except CheckpointError:
      raise
    except Exception as error:
      # Tensorstore, json and Orbax raise too many types to list.
      problem = _first_line(error)
    # What one process cannot read, none may take.
    problems = distributed.gather(
      f"restoring checkpoint {step}", problem, timeout=patience
    )
    problem = next(filter(None, problems), None)
    if restored is not None and problem is None:
      problem = _damage(restored)
    if restored is not None and problem is None:
      _set_aside(manager, unreadable, restored.step, patience)
      return restored
    unreadable[step] = str(problem)
    logging.warning("CHECKPOINT %d CANNOT BE READ (%s)", step, problem)
  if unreadable:
    newest = max(unreadable)
    raise CheckpointError(
      f"none of the checkpoints {sorted(unreadable)} in {manager.directory} "
      f"can be read (newest: {unreadable[newest]}); nothing was changed. Put "
      "back a copy, or name another --workdir to start anew"
    )
  return None


def _read_meta(manager: ocp.CheckpointManager, step: int) -> Mapping[str, Any]:
  found: Any = manager.restore(
    step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
  )
  meta: Mapping[str, Any] = found.meta
  if meta["format"] != _FORMAT:
    raise CheckpointError(
      f"checkpoint {step} in {manager.directory} has format "
      f"{meta['format']}, this jaxchunk reads {_FORMAT}; use the version "
      "that wrote it"
    )
  return meta


def _read_arrays(
  manager: ocp.CheckpointManager,
  step: int,
  meta: Mapping[str, Any],
  params: Any,
  optimizer: Any,
) -> Restored:
  """Reads arrays; raises anything at all if they cannot be read."""
  targets = {"params": params}
  if optimizer is not None:
    targets["optimizer"] = optimizer
  items = {
    name: ocp.args.PyTreeRestore(
      target, ocp.checkpoint_utils.construct_restore_args(target)
    )
    for name, target in targets.items()
  }
  found: Any = manager.restore(step, args=ocp.args.Composite(**items))
  return Restored(step, found.params, found.get("optimizer"), meta)


def _damage(restored: Restored) -> str | None:
  """What differs from what was saved; all processes sum together."""
  for name in ("params", "optimizer"):
    arrays = getattr(restored, name)
    if arrays is None:
      continue
    stored = restored.meta["checksums"][name]
    read = _named(jax.device_get(checksums(arrays)))
    if wrong := [path for path in read if read[path] != stored.get(path)]:
      return (
        f"the {name} {wrong[:3]} differ from what was saved: damaged on disk"
      )
  return None


def _check_compatible(
  stored: Mapping[str, Any], config: Config, step: int, workdir: Path
) -> None:
  """Compares the stored configuration with the present one."""
  found = config_lib.differences(stored, config)
  for kind, broken, remedy in (
    (
      "architecture",
      [d for d in found if d.breaks_model],
      "restore these fields, or name another --workdir to train the new model",
    ),
    (
      "optimizer",
      [d for d in found if d.field == "train.optimizer"],
      "its state does not fit; restore it, or name another --workdir",
    ),
  ):
    if broken:
      raise CheckpointError(
        f"checkpoint {step} in {workdir} is of another {kind}: "
        f"{', '.join(map(str, broken))}; {remedy}"
      )
  if found:
    logging.warning(
      "Resuming with other settings: %s", ", ".join(map(str, found))
    )


def _set_aside(
  manager: ocp.CheckpointManager,
  unreadable: Mapping[int, str],
  good: int,
  patience: float,
) -> None:
  if not unreadable:
    return
  if distributed.leads():
    _move(Path(manager.directory), unreadable, good)
  distributed.gather("setting checkpoints aside", None, timeout=patience)
  manager.reload()


def _move(directory: Path, unreadable: Mapping[int, str], good: int) -> None:
  aside = directory.parent / SET_ASIDE
  for step in unreadable:
    aside.mkdir(exist_ok=True)
    target = aside / str(step)
    number = 1
    while target.exists():
      number += 1
      target = aside / f"{step}-{number}"
    (directory / str(step)).rename(target)
    logging.warning(
      "Checkpoint %d is unreadable and was moved to %s; going on from the "
      "last good one, step %d.",
      step,
      target,
      good,
    )


@jax.jit
def checksums(tree: Any) -> Any:
  """The sum of the bits of each array, modulo 2**32.

  Exact in any order of summation, so it does not depend on the sharding; one
  flipped bit always changes it.
  """

  def checksum(x: Array) -> Array:
    # Nothing is computed in host memory.
    x = jax.device_put(x, jax.memory.Space.Device)
    if x.dtype in (jnp.bool_, jnp.uint4):
      x = x.astype(jnp.uint8)
    width = min(x.dtype.itemsize, 4)
    bits = lax.bitcast_convert_type(x, f"uint{8 * width}")
    return jnp.sum(bits, dtype=jnp.uint32)

  return jax.tree.map(checksum, tree)


def host_checksum(x: Array) -> int:
  """The same sum for one array, computed on the host without a copy of it.

  `x` must be wholly on devices of this process.
  """
  total = 0
  for shard in x.addressable_shards:
    if shard.replica_id == 0:
      data = np.ascontiguousarray(np.asarray(shard.data)).reshape(-1)
      width = min(data.dtype.itemsize, 4)
      bits = data.view(f"uint{8 * width}")
      total += int(np.sum(bits, dtype=np.uint32))
  return total % 2**32


def _named(tree: Any) -> dict[str, int]:
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): int(leaf)
    for path, leaf in leaves
  }


def frozen_sums(frozen: Any) -> dict[str, int]:
  """Checksums of what is not trained, to keep beside what is."""
  return _named(jax.device_get(checksums(frozen)))


def check_frozen(meta: Mapping[str, Any], frozen: Any) -> None:
  """Checks that what is not trained is what it was.

  Raises:
    CheckpointError: It is not.
  """
  stored = meta.get("frozen") or {}
  found = frozen_sums(frozen)
  if wrong := [path for path in stored if stored[path] != found.get(path)]:
    source = meta["config"]["train"].get("init_from")
    raise CheckpointError(
      f"the parameters beside the adapters, of train.init_from={source!r}, are "
      f"not those that they were trained beside ({wrong[:3]} differ); put the "
      "model back as it was"
    )


def target_like(tree: Any, sharding: jax.sharding.Sharding) -> Any:
  """The restore target of a pytree of arrays or of their shapes."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
  )


def _first_line(error: BaseException) -> str:
  text = (str(error).splitlines() or [""])[0][:200]
  return f"{type(error).__name__}: {text}"


def load_for_inference(
  workdir: str | os.PathLike[str],
) -> tuple[Transformer, str, int]:
  """The model of a run, from its workdir alone; changes nothing there.

  Args:
    workdir: Of a run of `scripts/train.py`.

  Returns:
    The model on the default device, the folder of its tokenizer, and the
    step.

  Raises:
    CheckpointError: There is no checkpoint that can be read, or what was not
      trained is not what it was.
    ConfigError: The model that the run began with cannot be read.
  """
  folder = Path(workdir).absolute()
  directory = folder / DIRECTORY
  if not directory.is_dir():
    raise CheckpointError(
      f"{folder} has no folder {DIRECTORY!r}; name the --workdir of a run of "
      "scripts/train.py that has saved"
    )
  options = ocp.CheckpointManagerOptions(
    read_only=True, save_interval_steps=0, create=False
  )
  problems = {}
  with ocp.CheckpointManager(directory, options=options) as manager:
    for step in sorted(manager.all_steps(), reverse=True):
      try:
        return _load_model(manager, step), str(folder / TOKENIZER), step
      except (CheckpointError, config_lib.ConfigError):
        raise
      except Exception as error:
        # As in `restore`: any type at all.
        problems[step] = _first_line(error)
        logging.warning(
          "CHECKPOINT %d CANNOT BE READ (%s); trying the one before it",
          step,
          problems[step],
        )
  detail = f": {problems}" if problems else " yet"
  raise CheckpointError(
    f"{directory} has no checkpoint that can be read{detail}; put back a copy "
    "or train again"
  )


def _load_model(manager: ocp.CheckpointManager, step: int) -> Transformer:
  meta = _read_meta(manager, step)
  cfg: ModelConfig = config_lib.from_json(ModelConfig, meta["config"]["model"])
  graphdef, state, _ = initial.abstract_model(cfg)
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  target = target_like(nnx.to_pure_dict(state), device)
  restored = _read_arrays(manager, step, meta, target, None)
  if problem := _damage(restored):
    raise ValueError(problem)
  train = meta["config"]["train"]
  frozen = initial.frozen_parameters(cfg, train.get("init_from"), train["seed"])
  check_frozen(meta, frozen)
  return nnx.merge(graphdef, nnx.State(restored.params), nnx.State(frozen))
