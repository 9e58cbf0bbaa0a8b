"""Saving beside the training: copies while arrays rest, files from a thread.

Parameters and optimizer state do not change from the end of one update to the
end of the next step's gradients. In that time they are copied to the host; the
runtime itself makes the next update, which donates them, wait for the copies.
All that is slow (checksums, folders, files) happens in one background thread,
from the copies. As in DataStates-LLM (Maurya et al., arXiv 2406.10707).
"""

import dataclasses
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from jaxtyping import Array

from jaxchunk.training import checkpoint


@dataclasses.dataclass(frozen=True)
class Snapshot:
  """A run as it was after a step, on its way to the host.

  Attributes:
    step: Updates that had been tried.
    arrays: `params` and `optimizer`, of the same shardings in host memory.
    meta: JSON values to keep with them.
  """

  step: int
  arrays: Mapping[str, Any]
  meta: Mapping[str, Any]


class Saver:
  """Writes snapshots one after the other, and remembers what that cost.

  `begin` starts the copies of a step, `commit` hands them to the thread. In
  between the caller writes what the checkpoint promises to be there. With
  several processes all must call it in the same order.

  Args:
    manager: From `checkpoint.open_manager`.
  """

  def __init__(self, manager: ocp.CheckpointManager):
    self.manager = manager
    self._thread = ThreadPoolExecutor(1, thread_name_prefix="saver")
    self._begun: Snapshot | None = None
    self._writing: Future[float] | None = None
    self._stall = 0.0

  def begin(
    self, step: int, *, params: Any, optimizer: Any, meta: Mapping[str, Any]
  ) -> None:
    """Starts to copy arrays to the host; they may be donated at once.

    Waits until an earlier snapshot is on disk, so that the host never holds
    two.

    Args:
      step: Names the checkpoint; one that exists is left as it is.
      params: A nested dictionary of arrays, which may still be computed.
      optimizer: A pytree of arrays.
      meta: JSON values to keep with them.

    Raises:
      CheckpointError: An earlier checkpoint could not be written.
    """
    start = time.perf_counter()
    self.wait()
    if step not in self.manager.all_steps():
      arrays = {"params": params, "optimizer": optimizer}
      self._begun = Snapshot(
        step, to_host(arrays), checkpoint.with_checksums(meta, arrays)
      )
    self._stall += time.perf_counter() - start

  def commit(self, gradients: Array | None = None) -> None:
    """Hands the snapshot begun, if there is one, to the thread.

    Args:
      gradients: Something that is computed when the next update could begin,
        to see whether that had to wait for the copies.
    """
    if self._begun is not None:
      begun, self._begun = self._begun, None
      self._writing = self._thread.submit(
        _write, self.manager, begun, gradients
      )

  def check(self) -> None:
    """Raises the error of a write that has ended, without waiting.

    Raises:
      CheckpointError: A checkpoint could not be written.
    """
    if self._writing is not None and self._writing.done():
      self.wait()

  def wait(self) -> None:
    """Waits until everything handed over is on disk.

    Raises:
      CheckpointError: It could not be written.
    """
    writing, self._writing = self._writing, None
    if writing is not None:
      self._stall += writing.result()

  def take_stall(self) -> float:
    """Seconds that the training waited because of saving, since the last call.

    Those of the loop, and those of the update that waited for the copies
    (known when the next line is made, and then counted there).
    """
    stall, self._stall = self._stall, 0.0
    return stall

  def __enter__(self) -> Self:
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    # A write in progress is finished whatever happened to the run.
    self._thread.shutdown(wait=True)
    if error is None:
      self.wait()


def to_host(tree: Any) -> Any:
  """Starts copies of arrays into the host memory of their own devices.

  Returns:
    A pytree of arrays that share no memory with the given ones.
  """

  def target(x: Array) -> jax.sharding.Sharding:
    devices: Any = x.sharding.addressable_devices
    device = min(devices, key=lambda d: d.id)
    kinds = {memory.kind for memory in device.addressable_memories()}
    # Without host memory of its own a device keeps the copy itself.
    fits = [k for k in ("pinned_host", "unpinned_host") if k in kinds]
    return x.sharding.with_memory_kind(fits[0]) if fits else x.sharding

  return jax.device_put(tree, jax.tree.map(target, tree), may_alias=False)


def _write(
  manager: ocp.CheckpointManager, snapshot: Snapshot, gradients: Array | None
) -> float:
  """Writes a snapshot and frees it; returns how long an update waited."""
  try:
    stall = _wait_for_copies(snapshot, gradients)
    checkpoint.write(
      manager, snapshot.step, arrays=snapshot.arrays, meta=snapshot.meta
    )
  finally:
    for leaf in jax.tree.leaves(snapshot.arrays):
      leaf.delete()
  return stall


def _wait_for_copies(snapshot: Snapshot, gradients: Array | None) -> float:
  """Seconds by which the copies ended later than the gradients.

  Never too few, and too many by the time to copy one array at most.
  """
  late: float | None = None
  marker: Any = gradients
  for leaf in jax.tree.leaves(snapshot.arrays):
    before = time.perf_counter()
    leaf.block_until_ready()
    if late is None and marker is not None and marker.is_ready():
      late = before
  return 0.0 if late is None else time.perf_counter() - late
