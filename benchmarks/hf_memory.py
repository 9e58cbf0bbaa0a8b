"""One task of `hugging_face.py --memory`, in a process of its own.

  python benchmarks/hf_memory.py make|load|save FOLDER

Prints the peak of the process's own (anonymous) memory during the task, over
that before it and, when loading, over the model's own, in units of the largest
tensor. Pages of mapped files are the system's to drop and do not count.
"""

import ctypes
import gc
import pathlib
import re
import sys
import threading
import time

import jax
from flax import nnx

import jaxchunk as jc
from jaxchunk.models.families import llama3


def anonymous_bytes() -> int:
  """What the process holds that no file backs."""
  status = pathlib.Path("/proc/self/status").read_text()
  found = re.search(r"RssAnon:\s+(\d+) kB", status)
  assert found, status
  return int(found[1]) * 1024


class Peak:
  """The largest `anonymous_bytes` while it is open."""

  def __enter__(self) -> "Peak":
    self.before = self.most = anonymous_bytes()
    self._open = True
    self._thread = threading.Thread(target=self._watch)
    self._thread.start()
    return self

  def _watch(self) -> None:
    while self._open:
      self.most = max(self.most, anonymous_bytes())
      time.sleep(0.001)

  def __exit__(self, *_: object) -> None:
    self._open = False
    self._thread.join()


def model() -> jc.Transformer:
  """400 MB, of which the embedding and the head are 64 MB each."""
  cfg = llama3(
    vocab_size=16_384,
    d_model=1024,
    num_layers=6,
    num_heads=16,
    num_kv_heads=4,
    d_ff=2816,
  )
  return jc.Transformer(cfg, rngs=nnx.Rngs(0))


def main() -> None:
  """Runs the task."""
  task, folder = sys.argv[1], pathlib.Path(sys.argv[2])
  if task == "make":
    jc.save_hf(model(), folder / "model")
    return
  # Once before: programs and libraries are not what is measured.
  loaded = jc.load_hf(folder / "model")
  jc.save_hf(loaded, folder / "warm", overwrite=True)
  sizes = [leaf.nbytes for leaf in jax.tree.leaves(loaded)]
  largest = loaded.embed[...].nbytes
  own = sum(sizes) if task == "load" else 0
  if task == "load":
    del loaded
  # What Python and the C library keep of what was freed is not in use.
  gc.collect()
  ctypes.CDLL(None).malloc_trim(0)
  with Peak() as peak:
    if task == "load":
      loaded = jc.load_hf(folder / "model")
      jax.block_until_ready(loaded)
    else:
      jc.save_hf(loaded, folder / "saved", overwrite=True)
  print((peak.most - peak.before - own) / largest)


if __name__ == "__main__":
  main()
