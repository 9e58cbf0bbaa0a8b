"""What a contestant is asked to do, and how it is watched.

Neither jax nor torch is imported here: contestants load their own.
"""

import contextlib
import ctypes
import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np

Task = Literal["speed", "curve", "longest", "compile", "chat"]

BETAS, EPSILON, DECAY = (0.9, 0.95), 1e-8, 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
  """A Llama: sizes, and whether its head is the embedding."""

  vocab: int
  d_model: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  d_ff: int
  tied: bool = False

  @property
  def matrices(self) -> list[tuple[int, int]]:
    """Inputs and outputs of a layer's matrices."""
    q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
    D, F = self.d_model, self.d_ff
    return [(D, q), (D, kv), (D, kv), (q, D), (D, F), (D, F), (F, D)]

  @property
  def parameters(self) -> int:
    """How many numbers it has."""
    layer = sum(n * m for n, m in self.matrices) + 2 * self.d_model
    embeddings = self.vocab * self.d_model * (1 if self.tied else 2)
    return embeddings + self.layers * layer + self.d_model

  def adapters(self, rank: int) -> int:
    """How many numbers LoRA of all matrices has."""
    return self.layers * rank * sum(n + m for n, m in self.matrices)


def _shape(numbers: tuple[int, ...], tied: bool = False) -> Shape:
  names = ("vocab", "d_model", "layers", "heads", "kv_heads", "head_dim")
  sizes = dict(zip((*names, "d_ff"), numbers, strict=True))
  return Shape(**sizes, tied=tied)


# "small" is for CPUs; the others have the sizes of Llama 3.2 1B and Llama 3 8B
# and are for GPUs, where "dry" shapes only show that the code runs.
SHAPES: Mapping[str, Shape] = {
  "small": _shape((256, 256, 4, 4, 2, 64, 768)),
  "1b": _shape((128_256, 2048, 16, 32, 8, 64, 8192), tied=True),
  "8b": _shape((128_256, 4096, 32, 32, 8, 128, 14_336)),
  "dry 1b": _shape((512, 64, 2, 4, 1, 16, 128), tied=True),
  "dry 8b": _shape((512, 64, 2, 4, 1, 16, 192)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """One run of one contestant.

  Attributes:
    contestant: Its name.
    task: "speed", "curve" and "chat" train for some steps, "longest" takes
      one; "compile" asks jaxchunk's compiler for the bytes and runs nothing.
    shape: Of the model, by name.
    dtype: Of its weights and activations.
    length: Tokens of the documents, at most.
    chunk_size: C of jaxchunk, and the tile of whoever has tiles.
    update: Whether AdamW follows; without, a step is loss and gradients.
    learning_rate: Of AdamW, without a schedule.
    threads: Of torch on CPU.
    policy: How those threads wait.
    steps: Of the speed part.
    seed: Which documents the curve and the chat have.
    turn: Counts repetitions.
    lora: Rank of adapters of all matrices, which alone are trained; 0 trains
      all parameters.
    batch: Documents that TRL takes at once; 0 is all of a step.
  """

  contestant: str
  task: Task
  shape: str
  dtype: str
  length: int
  chunk_size: int
  update: bool = True
  learning_rate: float = 1e-3
  threads: int = 0
  policy: str = "passive"
  steps: int = 0
  seed: int = 0
  turn: int = 0
  lora: int = 0
  batch: int = 0

  @property
  def key(self) -> str:
    """All fields, to find the result of the same run again."""
    return json.dumps(dataclasses.asdict(self), sort_keys=True)

  @property
  def sizes(self) -> Shape:
    """Of the model."""
    return SHAPES[self.shape]


def read_documents(folder: pathlib.Path, job: Job) -> list[list[np.ndarray]]:
  """Documents of each step as token ids, as the parent wrote them."""
  with np.load(folder / f"{job.task}_{job.length}.npz") as file:
    steps = file["steps"]
    return [
      [file[f"document{n}"] for n in np.flatnonzero(steps == step)]
      for step in range(steps.max() + 1)
    ]


def write_documents(
  folder: pathlib.Path, job: Job, steps: list[list[np.ndarray]]
) -> None:
  """For `read_documents`."""
  documents = [document for step in steps for document in step]
  numbers = [n for n, step in enumerate(steps) for _ in step]
  arrays = {f"document{n}": d for n, d in enumerate(documents)}
  np.savez(
    folder / f"{job.task}_{job.length}.npz",
    allow_pickle=False,
    steps=np.asarray(numbers),
    **arrays,
  )


def weights_path(folder: pathlib.Path, shape: str) -> pathlib.Path:
  """Where the parent put the initial weights of a shape, if it did."""
  return folder / f"weights_{shape}.npz"


def alpha_of(job: Job) -> float:
  """LoRA's alpha: the adapters' products count twice."""
  return 2.0 * job.lora


def adapters_path(folder: pathlib.Path, job: Job) -> pathlib.Path:
  """Where the parent put the initial adapters, in PEFT's format."""
  return folder / f"adapters_{job.shape}_{job.lora}"


class Growth:
  """Bytes of resident memory at most above those at the beginning."""

  grown = 0


@contextlib.contextmanager
def watch_resident() -> Iterator[Growth]:
  """Measures by how much this process grows inside the block (Linux).

  What was freed is given back to the system first, so that the beginning is
  what is really in use.
  """
  with contextlib.suppress(OSError, AttributeError):
    ctypes.CDLL("libc.so.6").malloc_trim(0)
  # 5 sets the peak of the resident size back to the present size.
  pathlib.Path("/proc/self/clear_refs").write_text("5")
  before = _status("VmRSS")
  growth = Growth()
  yield growth
  growth.grown = _status("VmHWM") - before


def _status(name: str) -> int:
  for line in pathlib.Path("/proc/self/status").read_text().splitlines():
    if line.startswith(name + ":"):
      return int(line.split()[1]) * 1024
  raise RuntimeError(f"/proc/self/status has no {name}")
