"""Completes a step's metrics by what the run and the machine know.

Besides what the loop puts there:

- `model_flops`, `hardware_flops`, `padding_flops`, `imbalance` and
  `lane_imbalance`: from the step's plan, see `chunking/cost.py` (not with
  `SpaCO`, whose draws only the device knows);
- `mfu` and `hfu`: model and hardware FLOPs per second of the step, as shares
  of the device's peak; evaluation and saving between steps do not count;
- `wall_seconds`: since the line before, whatever was done in it;
- `compiles`, `compile_seconds`, `compiled`, `eval_seconds`: put there by the
  loop.

The first line after a start or a resume also has `startup_seconds` (all before
the warm-up), `warmup_seconds`, `startup_compiled` (in both), `peak_flops` and
`peak_source`.
"""

import time
from collections.abc import Callable
from typing import Any

import jax

from jaxchunk.chunking.cost import StepCost
from jaxchunk.training.metrics import CompileCounter, as_lists
from jaxchunk.training.peak import Peak, peak_of


def cost_metrics(cost: StepCost) -> dict[str, Any]:
  """What a step's line holds of its cost."""
  return {
    "model_flops": cost.model,
    "hardware_flops": cost.hardware,
    "padding_flops": cost.padding,
    "imbalance": cost.chunk_imbalance,
    "lane_imbalance": cost.lane_imbalance,
  }


class Meter:
  """Adds the clock's and the device's share to the metrics of steps.

  Args:
    began: `time.perf_counter()` when the run was started or resumed.
    compiles: Counts compilations.
    device: On which the model runs.
    dtype: Of its matrix products.
  """

  def __init__(
    self,
    began: float,
    compiles: CompileCounter,
    *,
    device: jax.Device,
    dtype: str,
  ):
    self._began = self._clock = began
    self._compiles = compiles
    self._device, self._dtype = device, dtype
    self._peak: Peak | None = None
    self._first: dict[str, Any] = {}

  def warm_up(self, work: Callable[[], Any]) -> None:
    """Runs what compiles the programs; the next line will tell of it."""
    self._peak = peak_of(self._device, self._dtype)
    ready = time.perf_counter()
    work()
    self._first = {
      "startup_seconds": ready - self._began,
      "warmup_seconds": time.perf_counter() - ready,
      "startup_compiled": as_lists(self._compiles.take_events()),
      "peak_flops": self._peak.flops,
      "peak_source": self._peak.source,
    }

  def complete(self, values: dict[str, Any]) -> None:
    """Adds to the metrics of the step that just ended."""
    now = time.perf_counter()
    values["wall_seconds"], self._clock = now - self._clock, now
    if self._peak is not None and "model_flops" in values:
      possible = values["seconds"] * self._peak.flops
      values["mfu"] = values["model_flops"] / possible
      values["hfu"] = values["hardware_flops"] / possible
    values.update(self._first)
    self._first = {}
