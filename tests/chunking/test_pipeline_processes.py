"""Stages in two processes: the same loss and gradients on both."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

_PROGRAM = """
import dataclasses, os, sys
process, port = int(sys.argv[1]), sys.argv[2]
import jax
import numpy as np
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_enable_x64", True)
jax.distributed.initialize(f"localhost:{port}", 2, process)
import jaxchunk as jc
from jaxchunk.chunking import executor, parallel
from jaxchunk.sharding.mesh import Layout
from jaxchunk.sharding.pipeline.tables import Pipeline
from jaxchunk.types import Batch
from tests.chunking.conftest import PLAIN, build, make_batch

batch = make_batch(((75, 9, 1), (70, 14)))
model = build(dataclasses.replace(PLAIN, vocab_size=64, num_layers=8))
loss, grads = jc.full_value_and_grad(model, batch)
examples = Batch.of(batch).examples()
options = executor.make_options(model, chunk_size=16, strategy="chunk_outer")
for schedule in ("1f1b", "v_half"):
  pipeline = Pipeline(schedule=schedule)
  layout = Layout(stage=4, data=2, pipeline=pipeline)
  sums = parallel.accumulate_over(layout, model, examples, options)
  got = float(sums.loss.addressable_data(0)) / sums.weight
  np.testing.assert_allclose(got, loss, rtol=1e-11)
  pairs = zip(jax.tree.leaves(sums.grads), jax.tree.leaves(grads), strict=True)
  for mine, whole in pairs:
    scale = np.abs(whole).max()
    for shard in mine.addressable_shards:
      np.testing.assert_allclose(
        np.asarray(shard.data) / sums.weight,
        np.asarray(whole)[shard.index],
        rtol=1e-11,
        atol=1e-11 * scale,
      )
  devices = layout.mesh().devices.reshape(4, -1)
  hosts = [{d.process_index for d in row} for row in devices]
  assert hosts == [{0}, {0}, {1}, {1}], hosts
  print(schedule, "is the same", flush=True)
"""


def test_stages_in_two_processes(tmp_path):
  root = Path(__file__).parents[2]
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  program = tmp_path / "program.py"
  program.write_text(_PROGRAM)
  running = [
    subprocess.Popen(
      [sys.executable, str(program), str(number), str(port)],
      cwd=root,
      env=_environment(root),
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for number in range(2)
  ]
  try:
    texts = [process.communicate(timeout=500)[0] for process in running]
  finally:
    for process in running:
      process.kill()
  for process, text in zip(running, texts, strict=True):
    if process.returncode:
      pytest.fail(text)
    assert "1f1b is the same" in text and "v_half is the same" in text


def _environment(root: Path) -> dict[str, str]:

  kept = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  return {**kept, "PYTHONPATH": str(root)}
