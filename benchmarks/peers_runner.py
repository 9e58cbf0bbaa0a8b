"""Runs the jobs of `peers.py` and `chat_tail.py` and remembers the results."""

import dataclasses
import functools
import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from common import run_contestant, torch_settings
from peers_job import Job, adapters_path, weights_path, write_documents

# The C library gives freed blocks of 1 MiB and more back at once. By default it
# may keep them: torch's resident memory was seen to be twice what it used. Only
# where memory is all that counts, for page faults take time.
_GIVE_BACK = {
  "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
  "MALLOC_TRIM_THRESHOLD_": str(1 << 20),
}


@functools.cache
def stdlib_texts() -> list[np.ndarray]:
  """The standard library's documents as bytes, in the corpus's order."""
  from jaxchunk.data.sources import load_source

  with tempfile.TemporaryDirectory() as folder:
    source = load_source("stdlib", cache_dir=pathlib.Path(folder))
  texts = (source[n].encode() for n in range(len(source)))
  return [np.frombuffer(text, np.uint8).astype(np.int32) for text in texts]


def read_cache(path: str) -> dict[str, dict[str, Any]]:
  """Results by the job's key.

  Raises:
    ValueError: A line is none of this version's.
  """
  known = {}
  with open(path) as file:
    for number, line in enumerate(file, 1):
      try:
        entry = json.loads(line)
        key = Job(**json.loads(entry["key"])).key
        if key != entry["key"]:
          raise ValueError("fields are missing")
        known[key] = entry["result"]
      except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
          f"{path}, line {number}, was not written by this version of the "
          f"benchmark ({error}); name another file by --cache"
        ) from error
  return known


class Runner:
  """Runs jobs that the cache does not have, and remembers all results.

  Attributes:
    folder: What the contestants read.
    documents: Of a job, by step.
    cache: A file that keeps the results.
    seconds: No run starts later than that.
    pythons: Interpreters of contestants that have one of their own.
    stopped: Whether there was no time left for a job.
    runs: Jobs and their results, by the job's key.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    documents: Callable[[Job], list[list[np.ndarray]]],
    *,
    cache: str | None = None,
    seconds: float = float("inf"),
    pythons: Mapping[str, str] | None = None,
  ):
    self.folder = folder
    self.documents = documents
    self.cache = cache
    self.deadline = time.monotonic() + seconds
    self.pythons = pythons or {}
    self.stopped = False
    self.runs: dict[str, tuple[Job, dict[str, Any]]] = {}
    self.written: set[tuple[str, int]] = set()
    self.known: dict[str, dict[str, Any]] = {}
    if cache and os.path.exists(cache):
      self.known = read_cache(cache)

  def __call__(self, job: Job) -> dict[str, Any] | None:
    """The result; `None` if there is no time left for it."""
    key = job.key
    if key not in self.known:
      if time.monotonic() > self.deadline:
        self.stopped = True
        return None
      self.known[key] = self._run(job)
      if self.cache:
        with open(self.cache, "a") as file:
          line = {"key": key, "result": self.known[key]}
          file.write(json.dumps(line) + "\n")
    self.runs[key] = job, self.known[key]
    return self.known[key]

  def prepare(self, job: Job) -> None:
    """Writes what the contestants read: documents, and CPU shapes' weights."""
    weights = weights_path(self.folder, job.shape)
    if job.shape == "small" and not weights.exists():
      import peers_jax

      np.savez(weights, **peers_jax.initial_weights(job))
    adapters = adapters_path(self.folder, job)
    if job.shape == "small" and job.lora and not adapters.exists():
      import peers_jax

      peers_jax.save_adapters(job, adapters)
    if (job.task, job.length) in self.written or job.task == "compile":
      return
    write_documents(self.folder, job, self.documents(job))
    self.written.add((job.task, job.length))

  def _run(self, job: Job) -> dict[str, Any]:
    self.prepare(job)
    script = pathlib.Path(__file__).with_name("peers_run.py")
    fields = json.dumps(dataclasses.asdict(job))
    lines, code = run_contestant(
      [str(script), fields, str(self.folder)],
      job.policy,
      self.pythons.get(job.contestant, sys.executable),
      _GIVE_BACK if job.task == "longest" else None,
    )
    result = lines[-1] if lines else {"skipped": f"exit code {code}"}
    shown = {k: v for k, v in result.items() if k != "losses"}
    adapters = " LoRA" if job.lora else ""
    print(
      f"{job.task} {job.length} {job.contestant}{adapters} {job.threads} "
      f"{job.policy} {shown}",
      file=sys.stderr,
      flush=True,
    )
    return result


def settings(job: Job) -> Iterator[Job]:
  """The job under each of the settings that may be best for it."""
  if job.contestant.startswith("jaxchunk") or job.shape != "small":
    yield job
    return
  for threads, policy in torch_settings():
    yield dataclasses.replace(job, threads=threads, policy=policy)


def double_lengths(runner: Runner, job: Job, most: int, budget: int) -> None:
  """Runs or compiles a job at its length and at doubles of it.

  Args:
    runner: Runs it.
    job: Its task is "longest" or "compile".
    most: No length is greater.
    budget: Bytes; the first length that needs more is the last.
  """
  size = "peak_bytes" if job.task == "longest" else "compiled_bytes"
  length = job.length
  while length <= most:
    result = runner(dataclasses.replace(job, length=length))
    if result is None or "skipped" in result or result[size] > budget:
      return
    length *= 2


def device_memory() -> int:
  """Bytes of the GPU that jax may take; the budget of all contestants."""
  import jax

  return jax.devices()[0].memory_stats()["bytes_limit"]
