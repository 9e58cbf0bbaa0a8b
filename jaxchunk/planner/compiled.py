"""Candidates compiled for their devices, which need not be there."""

import time
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

from jaxchunk.chunking.lanes import capacity_chunks
from jaxchunk.planner.candidates import (
  Candidate,
  Request,
  config_of,
  layout_name,
)
from jaxchunk.training import fits

Say = Callable[[str], None]
"""Takes a line about what goes on."""


class Program(NamedTuple):
  """One of those that a run needs.

  Attributes:
    name: As in `Predicted.programs`.
    key: Equal for what need not be compiled again.
    need: Compiles it.
  """

  name: str
  key: Hashable
  need: Callable[[], fits.Need]


class Compiler:
  """Compiles what candidates of a request run; what they share once."""

  def __init__(self, request: Request, say: Say):
    self.request, self.say = request, say
    self._known: dict[Any, fits.Need] = {}

  def needs(self, candidate: Candidate) -> dict[str, fits.Need]:
    """What each program of a candidate needs, by the compiler's account.

    Returns:
      By the names of `Predicted.programs`.

    Raises:
      RuntimeError: What compiles for the target is not installed.
    """
    found = {}
    for program in self._programs(candidate):
      if program.key not in self._known:
        self.say(f"compiling the {program.name} of {candidate} ...")
        began = time.perf_counter()
        need = program.need()
        seconds = time.perf_counter() - began
        self.say(f"  {need.peak / 2**30:.2f} GiB, in {seconds:.0f} s")
        self._known[program.key] = need
      found[program.name] = self._known[program.key]
    return found

  def _programs(self, candidate: Candidate) -> Iterator[Program]:
    config = config_of(self.request, candidate)
    target, longest = self.request.machine.target, self.request.lengths.longest
    name = f"{layout_name(candidate.layout)} {candidate.schedule}"
    yield Program(
      "lane", candidate, lambda: fits.lane_need(config, target, longest)
    )
    yield Program(
      "update", ("update", name), lambda: fits.update_need(config, target)
    )
    if candidate.layout.num_devices > 1:
      yield Program(
        "sums", ("sums", name), lambda: fits.sums_need(config, target)
      )
    size = candidate.chunk_size
    # Over stages the loss is that of the gradient's program.
    if config.train.eval_every and candidate.layout.stage == 1:
      tokens = min(longest, config.train.eval_tokens)
      capacity = capacity_chunks(-(-tokens // size)) * size
      yield Program(
        "evaluation",
        ("evaluation", name, size, candidate.kv_memory),
        lambda: fits.evaluation_need(config, target, capacity),
      )
