"""The training loop: one update for each global batch.

Dispatch stays ahead of the device: a step's metrics are fetched when the next
step has been dispatched. Only evaluation and the end wait; checkpoints are
copied and written beside the steps that follow (`saver`).
"""

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, PRNGKeyArray
from tqdm import tqdm

from jaxchunk.chunking import executor, parallel
from jaxchunk.chunking.cost import plan_cost
from jaxchunk.chunking.plan import ChunkPlan
from jaxchunk.chunking.spaco import SpaCO
from jaxchunk.data.accounting import KEPT, Accounting
from jaxchunk.data.pipeline import GlobalBatch
from jaxchunk.training import (
  checkpoint,
  distributed,
  info,
  metrics,
  optimizer,
  report,
)
from jaxchunk.training import config as config_lib
from jaxchunk.training.config import Config
from jaxchunk.training.meter import Meter, cost_metrics
from jaxchunk.training.metrics import CompileCounter, MetricsWriter
from jaxchunk.training.run import Run, begin_save, report_info, say, start
from jaxchunk.training.runtime import Profiler, SharedStop, StopSignal
from jaxchunk.training.saver import Saver
from jaxchunk.training.watchdog import Watchdog
from jaxchunk.training.workdir import Workdir, open_workdir, write_errors
from jaxchunk.types import Example, split_by_tokens


class NonFiniteError(RuntimeError):
  """Too many steps in a row had a loss or gradient that is not finite."""


@dataclasses.dataclass(frozen=True)
class Pending:
  """A step that was dispatched and whose metrics were not fetched.

  Attributes:
    step: Its number, from 1.
    metrics: Scalars still on the device.
    batch: What it trains on.
    values: Metrics that the host knew.
    gradients: Computed when the gradients are, and the update may begin.
  """

  step: int
  metrics: optimizer.UpdateMetrics
  batch: GlobalBatch
  values: dict[str, Any]
  gradients: Array


@dataclasses.dataclass(frozen=True)
class Result:
  """How a run ended.

  Attributes:
    step: Updates tried.
    accounting: Of all tokens read.
    heldout_bits_per_byte: Of the last evaluation; `None` if there was none.
    stopped_by: The signal that ended it, if one did.
    report: The path of the HTML page; pictures lie beside it.
  """

  step: int
  accounting: Accounting
  heldout_bits_per_byte: float | None
  stopped_by: str | None
  report: Path


def describe_result(result: Result) -> str:
  """What to print at the end of a run."""
  held = result.heldout_bits_per_byte
  return "\n".join(
    [
      f"{'Done' if result.stopped_by is None else result.stopped_by}: "
      f"{result.step} steps",
      f"Since the beginning: {result.accounting}",
      f"Held out: {'not evaluated' if held is None else f'{held:.4f}'}"
      f"{'' if held is None else ' bits per byte'}",
      f"Report: {result.report}",
    ]
  )


def train(
  config: Config,
  workdir: str | Path,
  *,
  profile_steps: tuple[int, int] | None = None,
) -> Result:
  """Trains, or goes on with the run that `workdir` holds.

  With several processes each calls it, after `distributed.initialize`.

  Args:
    config: What to train, on what and how.
    workdir: A folder for checkpoints, metrics and pictures; on a disk that all
      processes share.
    profile_steps: First and last step of a trace for xprof.

  Returns:
    How it ended: all steps made, the data at its end, or a signal.

  Raises:
    ConfigError: A field is impossible, or the data cannot be opened.
    CheckpointError: Checkpoints cannot be read or written.
    NonFiniteError: The loss stayed not finite; the parameters are untouched.
    ProcessError: Processes do not fit together, or one did not come.
  """
  began = time.perf_counter()
  config_lib.validate(config)
  workdir = Path(workdir).absolute()
  with Watchdog(config.processes) as watchdog:
    distributed.check_alike(config, workdir)
    with open_workdir(workdir) as folder:
      return _train(config, folder, watchdog, began, profile_steps)


def _train(
  config: Config,
  folder: Workdir,
  watchdog: Watchdog,
  began: float,
  profile_steps: tuple[int, int] | None,
) -> Result:
  """Trains in a folder that this run holds."""
  workdir = folder.path
  with (
    StopSignal() as signals,
    CompileCounter() as compiles,
    checkpoint.open_manager(workdir, config.checkpoint) as manager,
    Saver(manager) as saver,
  ):
    run = start(config, workdir, manager)
    first, stop = run.step, SharedStop(signals, run.mesh)
    with (
      contextlib.closing(run.batches),
      _writer(run) as writer,
      Profiler(workdir / "profile", profile_steps) as profiler,
      _progress_bar(run) as bar,
    ):
      meter = Meter(
        began,
        compiles,
        device=jax.local_devices()[0],
        dtype=config.model.dtype,
      )
      if run.step < config.train.num_steps:
        meter.warm_up(lambda: _compile(run))
      made = steps(run, stop, profiler, compiles, saver, watchdog)
      for values, documents in made:
        meter.complete(values)
        folder.check()
        if writer is not None:
          writer.write(values, documents)
        _show(bar, values)
        _check_finite(run, values)
      begin_save(run, saver)
      saver.commit()
      saver.wait()
      total = Accounting.from_json(run.batches.get_state()["total"])
  # Only now, with the checkpoint on disk: a signal may leave little time.
  if run.step > first and distributed.leads():
    with write_errors(workdir):
      info.write_info(workdir, report_info(run, total))
      report.draw(workdir)
  return _result(run, total, stop.received)


def _writer(run: Run) -> contextlib.AbstractContextManager[Any]:
  """Of the metrics, in one process; `None` in the others."""
  if not distributed.leads():
    return contextlib.nullcontext()
  return MetricsWriter(
    run.workdir, last_step=run.step, documents=run.config.train.log_documents
  )


def _result(run: Run, total: Accounting, stopped_by: str | None) -> Result:
  lines = metrics.read(run.workdir)
  name = "heldout_bits_per_byte"
  heldout = [line[name] for line in lines if line.get(name) is not None]
  return Result(
    step=run.step,
    accounting=total,
    heldout_bits_per_byte=heldout[-1] if heldout else None,
    stopped_by=stopped_by,
    report=run.workdir / report.HTML_NAME,
  )


def steps(
  run: Run,
  stop: SharedStop,
  profiler: Profiler,
  compiles: CompileCounter,
  saver: Saver,
  watchdog: Watchdog,
) -> Iterator[tuple[dict[str, Any], list[int]]]:
  """Trains to the end and yields what each step has to tell, one step late.

  Yields:
    The step's metrics, and the ids of the documents it trained on. When it
    is asked for the next ones they must be on disk: a checkpoint that is due
    goes to the thread only then.
  """
  train, options = run.config.train, run.config.checkpoint
  pending: Pending | None = None
  between: dict[str, Any] = {}
  run.clock = time.perf_counter()
  while run.step < train.num_steps and not stop.received:
    saver.check()
    before = time.perf_counter()
    batch = next(run.batches, None)
    waited = time.perf_counter() - before
    if batch is None:
      break
    profiler.before(run.step + 1)
    watchdog.begins(run.step + 1)
    launched = launch(run, batch)
    stop.ask()
    launched.values.update(between, input_wait=waited)
    compiles.add_to(launched.values)
    between = {}
    if pending is not None:
      yield finish(run, pending, saver, stop), ids_of(pending)
      saver.commit(launched.gradients)
    pending = launched
    if run.step % options.save_every == 0:
      # Before the next step is dispatched, which donates what is copied.
      begin_save(run, saver)
    due = run.step % max(train.eval_every, 1) == 0
    evaluates = train.eval_every and (due or run.step == train.num_steps)
    if not (evaluates or profiler.ends_with(run.step)):
      continue
    values = finish(run, pending, saver, stop)
    if profiler.ends_with(run.step):
      profiler.stop()
    if evaluates and run.heldout:
      before = time.perf_counter()
      values["heldout_bits_per_byte"] = heldout_bits_per_byte(run)
      values["eval_seconds"] = time.perf_counter() - before
      compiles.add_to(values, timed=False)
    yield values, ids_of(pending)
    saver.commit()
    pending = None
    # What saving compiled is told by the next line, but not timed as a step.
    compiles.add_to(between, timed=False)
    run.clock = time.perf_counter()
  if pending is not None:
    yield finish(run, pending, saver, stop), ids_of(pending)
    saver.commit()


def ids_of(pending: Pending) -> list[int]:
  """The ids of the documents of a step."""
  return [example.document_id for example in pending.batch.examples]


def _compile(run: Run) -> None:
  """Compiles the programs for all lengths, so that no later step has to.

  Those of stages depend on all lanes of a batch, and come with it.
  """
  if run.config.layout.stage > 1:
    say("Programs of stages are compiled in the steps that first need them")
    run.clock = time.perf_counter()
    return
  kept = run.corpus.lengths[run.corpus.reasons == KEPT]
  start_time = time.perf_counter()
  rng = run.key if _is_random(run) else None
  layout, longest = run.config.layout.layout(), int(kept.max())
  if layout is None:
    count = executor.warm_up(run.model, longest, run.options, rng=rng)
  else:
    count = parallel.warm_up_over(
      layout,
      run.model,
      longest,
      run.options,
      mesh=run.mesh,
      rng=rng,
      spread=True,
    )
  seconds = time.perf_counter() - start_time
  say(f"Compiled {count} chunk programs in {seconds:.0f} s")
  run.clock = time.perf_counter()


def _is_random(run: Run) -> bool:
  """Whether a step needs a key: for dropout, or to draw chunks."""
  drawn = run.config.train.spaco_rate is not None
  return bool(run.config.model.dropout) or drawn


def launch(run: Run, batch: GlobalBatch) -> Pending:
  """Dispatches one step and replaces the run's parameters and state."""
  run.step += 1
  with (
    jax.profiler.StepTraceAnnotation("train", step_num=run.step),
    # Whatever goes to the device goes there on purpose.
    jax.transfer_guard_host_to_device("disallow"),
  ):
    rng = None
    if _is_random(run):
      rng = _fold_in(run.key, jax.device_put(np.uint32(run.step)))
    sums = _accumulate(run, batch, rng)
    run.params, run.state, scalars = run.update(
      run.params,
      run.state,
      sums.loss,
      jax.device_put(np.float32(sums.weight)),
      nnx.to_pure_dict(sums.grads),
    )
  plan = sums.plan
  if run.busiest is None or _longest(plan) > _longest(run.busiest[1]):
    run.busiest = (run.step, plan)
  cost = {}
  if not isinstance(run.options.strategy, SpaCO):
    # Which chunks SpaCO runs backward is drawn on the device.
    cost = cost_metrics(
      plan_cost(
        run.config.model,
        plan,
        live_chunks=run.options.live_chunks,
        strategy=run.options.strategy,
      )
    )
  values = {
    "epoch": batch.epoch,
    "documents": len(batch.examples),
    "longest": max(map(len, batch.examples)),
    "num_chunks": plan.num_chunks,
    "padding_fraction": plan.padding_fraction,
    **cost,
  }
  return Pending(run.step, scalars, batch, values, sums.loss)


def _accumulate(
  run: Run, batch: GlobalBatch, rng: PRNGKeyArray | None
) -> executor.Sums:
  layout = run.config.layout.layout()
  if layout is None:
    return executor.accumulate(run.model, batch.examples, run.options, rng=rng)
  return parallel.accumulate_over(
    layout,
    run.model,
    batch.examples,
    run.options,
    mesh=run.mesh,
    rng=rng,
    spread=True,
  )


@jax.jit
def _fold_in(key: PRNGKeyArray, step: Array) -> PRNGKeyArray:
  return jax.random.fold_in(key, step)


def _longest(plan: ChunkPlan) -> int:
  return max(lane.num_chunks for lane in plan.lanes)


def finish(
  run: Run, pending: Pending, saver: Saver, stop: SharedStop
) -> dict[str, Any]:
  """Waits for a step and returns its line of metrics."""
  got = jax.device_get(pending.metrics)
  stop.settle()
  now = time.perf_counter()
  seconds, run.clock = now - run.clock, now
  loss, tokens = float(got.loss), float(got.tokens)
  size = run.corpus.byte_lengths
  read = sum(int(size[e.document_id]) for e in pending.batch.examples)
  if pending.batch.last_of_epoch:
    total = pending.batch.epoch_accounting
    say(f"Epoch {pending.batch.epoch}: {total}")
  return {
    "step": pending.step,
    "loss": loss,
    "bits_per_byte": loss * tokens / math.log(2) / max(read, 1),
    "tokens": int(tokens),
    "tokens_per_sec": tokens / seconds,
    "seconds": seconds,
    "grad_norm": float(got.grad_norm),
    "learning_rate": float(got.learning_rate),
    "skipped": int(got.skipped),
    "skipped_in_a_row": int(got.skipped_in_a_row),
    "save_stall": saver.take_stall(),
    **pending.values,
  }


def _check_finite(run: Run, values: dict[str, Any]) -> None:
  skipped = values["skipped_in_a_row"]
  if skipped >= run.config.train.max_skipped_steps:
    raise NonFiniteError(
      f"loss or gradient was not finite in {skipped} steps in a row, up to "
      f"step {values['step']} (loss {values['loss']}, gradient norm "
      f"{values['grad_norm']}); none of them changed the parameters. Lower "
      "train.learning_rate or train.clip_norm and run the same command again "
      "to go on from the last checkpoint"
    )


def heldout_bits_per_byte(run: Run) -> float:
  """Negative log-likelihood of the held-out documents, for each byte.

  In bits, summed over tokens and divided by the documents' bytes, so that it
  can be compared between tokenizers.
  """
  groups = split_by_tokens(run.heldout, run.config.data.batch_tokens)
  losses = [_loss_sum(run, group) for group in groups]
  nats = sum(map(float, jax.device_get(losses)))
  lengths = run.corpus.byte_lengths
  read = sum(int(lengths[e.document_id]) for e in run.heldout)
  return nats / math.log(2) / max(read, 1)


def _loss_sum(run: Run, examples: list[Example]) -> Array:
  layout, train = run.config.layout.layout(), run.config.train
  if layout is not None:
    return parallel.loss_sum_over(
      layout, run.model, examples, run.options, mesh=run.mesh
    )
  return executor.loss_sum(
    run.model,
    examples,
    chunk_size=train.chunk_size,
    implementation=train.implementation,
    kv_memory=train.kv_memory,
  )


def _progress_bar(run: Run) -> Any:
  return tqdm(
    total=run.config.train.num_steps,
    initial=run.step,
    unit="step",
    dynamic_ncols=True,
    disable=not (distributed.leads() and sys.stderr.isatty()),
  )


def _show(bar: Any, values: dict[str, Any]) -> None:
  bar.set_postfix_str(
    f"loss {values['loss']:.3f}, {values['tokens_per_sec']:,.0f} tokens/s, "
    f"padding {values['padding_fraction']:.1%}",
    refresh=False,
  )
  bar.update()
  if "heldout_bits_per_byte" in values:
    say(
      f"Step {values['step']}: training {values['bits_per_byte']:.3f}, held "
      f"out {values['heldout_bits_per_byte']:.3f} bits per byte, "
      f"{values['tokens_per_sec']:,.0f} tokens/s"
    )
