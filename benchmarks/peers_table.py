"""From the runs of `peers.py` and `chat_tail.py` to figures and a table.

A run is a `Job` and what came of it: figures, or "skipped" and the reason.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from peers_job import Job, Task

Runs = Iterable[tuple[Job, Mapping[str, Any]]]


def tokens_per_second(
  result: Mapping[str, Any], tokens: Iterable[int]
) -> float:
  """Of the best step but the first, which may still warm up.

  Args:
    result: Of a run with two steps or more.
    tokens: Targets of each step.
  """
  pairs = list(zip(tokens, result["seconds"], strict=True))
  return max(count / seconds for count, seconds in pairs[1:])


def rate_of_steps(result: Mapping[str, Any], tokens: Iterable[int]) -> float:
  """Tokens a second of all steps but the first, taken together.

  Args:
    result: Of a run with two steps or more.
    tokens: Targets of each step.
  """
  return sum(list(tokens)[1:]) / sum(result["seconds"][1:])


def speed_rows(
  runs: Runs,
  tokens: list[int],
  task: Task = "speed",
  rate_of: Callable[
    [Mapping[str, Any], Iterable[int]], float
  ] = tokens_per_second,
) -> dict[str, dict[str, Any]]:
  """The best run of each contestant over settings and turns.

  Peak bytes are the least over turns of the setting that was fastest: what
  the allocator keeps by chance only adds.

  Args:
    runs: All of them.
    tokens: Targets of each step.
    task: Whose runs count.
    rate_of: Tokens a second of a result.
  """
  rows: dict[str, dict[str, Any]] = {}
  peaks: dict[tuple[str, int, str], int] = {}
  for job, result in runs:
    if job.task != task or "skipped" in result:
      continue
    setting = (job.contestant, job.threads, job.policy)
    peak = min(peaks.get(setting, result["peak_bytes"]), result["peak_bytes"])
    peaks[setting] = peak
    rate = rate_of(result, tokens)
    best = rows.get(job.contestant)
    if best is not None and best["tokens_per_sec"] >= rate:
      continue
    rows[job.contestant] = {
      "tokens_per_sec": rate,
      "threads": job.threads,
      "policy": job.policy,
      "loss": result["losses"][-1],
      "compiled_bytes": result.get("compiled_bytes"),
      "warm_seconds": result.get("warm_seconds"),
    }
  for name, row in rows.items():
    row["peak_bytes"] = peaks[name, row["threads"], row["policy"]]
  return rows


def loss_gap(runs: Runs, task: Task = "curve") -> tuple[float, str] | None:
  """The largest difference of two losses after the same tokens, and whose.

  Against the first contestant, over all steps; `None` with fewer than two. A
  loss that is not a number is an infinite difference.
  """
  curves = {
    job.contestant: result["losses"]
    for job, result in runs
    if job.task == task and "skipped" not in result
  }
  if len(curves) < 2:
    return None
  (_, first), *others = curves.items()
  gaps = []
  for name, losses in others:
    steps = [abs(a - b) for a, b in zip(first, losses, strict=True)]
    worst = max(gap if gap == gap else float("inf") for gap in steps)
    gaps.append((worst, name))
  return max(gaps)


def longest_fitting(sizes: Mapping[int, int], budget: int) -> dict[str, Any]:
  """Which lengths fit into a budget.

  Args:
    sizes: Bytes at each length that ran, over the beginning.
    budget: Bytes.

  Returns:
    `fits`, the longest that ran within the budget (0 if none), and `line`,
    where a straight line through the two longest that ran meets the budget;
    `None` if bytes do not grow. `slope` is the line's, in bytes a token.
  """
  fits = [length for length, size in sizes.items() if size <= budget]
  figures = {"fits": max(fits, default=0), "line": None, "bytes": dict(sizes)}
  figures["slope"] = None
  lengths = sorted(sizes)
  if len(lengths) > 1:
    short, long = lengths[-2:]
    slope = (sizes[long] - sizes[short]) / (long - short)
    figures["slope"] = slope
    if slope > 0:
      figures["line"] = max(0.0, long + (budget - sizes[long]) / slope)
  return figures


def longest_rows(runs: Runs, budget: int) -> dict[str, dict[str, Any]]:
  """Of each contestant what fits, as run and as compiled."""
  ran: dict[str, dict[int, int]] = {}
  compiled: dict[str, dict[int, int]] = {}
  for job, result in runs:
    if "skipped" in result:
      continue
    if job.task == "longest":
      ran.setdefault(job.contestant, {})[job.length] = result["peak_bytes"]
    if job.task == "compile":
      sizes = compiled.setdefault(job.contestant, {})
      sizes[job.length] = result["compiled_bytes"]
  rows = {name: longest_fitting(sizes, budget) for name, sizes in ran.items()}
  for name, sizes in compiled.items():
    row = rows.setdefault(name, {})
    row["compiled"] = longest_fitting(sizes, budget)
  return rows


def ratios(
  speed: Mapping[str, Mapping[str, Any]],
  longest: Mapping[str, Mapping[str, Any]],
) -> dict[str, float]:
  """What jaxchunk's best is of its peers' best: speed, longest length.

  The length is where the straight lines meet the budget; and that of what
  ran, which is a power of two times the shortest and may have been capped.
  A ratio is there only if both sides are.
  """
  figures = {}
  for name, rows, field in (
    ("tokens_per_sec", speed, "tokens_per_sec"),
    ("longest_by_line", longest, "line"),
    ("longest_that_ran", longest, "fits"),
  ):
    values = {n: row[field] for n, row in rows.items() if row.get(field)}
    mine = [v for n, v in values.items() if n.startswith("jaxchunk")]
    peers = [v for n, v in values.items() if not n.startswith("jaxchunk")]
    if mine and peers:
      figures[name] = max(mine) / max(peers)
      figures[f"{name}_over_each"] = {
        n: max(mine) / v for n, v in values.items() if v not in mine
      }
  return figures


def table(
  names: Iterable[str],
  speed: Mapping[str, Mapping[str, Any]],
  longest: Mapping[str, Mapping[str, Any]],
  skipped: Mapping[str, str],
) -> str:
  """Lines for people: a contestant each, also those that did not run."""
  head = (
    f"{'':34}{'tokens/s':>9}{'threads':>16}{'peak MB':>9}{'compiled':>9}"
    f"{'loss':>9}{'fits':>8}{'by line':>9}{'compiled':>9}"
  )
  lines = [head]
  for name in names:
    row, length = speed.get(name, {}), longest.get(name, {})
    if not row and not length:
      reason = skipped.get(name, "no run yet")
      lines.append(f"{name:34}not measured: {reason}")
      continue
    threads = ""
    if row.get("threads"):
      threads = f"{row['threads']} {row['policy']}"
    by_compiler = length.get("compiled", {}).get("fits")
    lines.append(
      f"{name:34}{cell(row.get('tokens_per_sec'), 9)}{threads:>16}"
      f"{cell(row.get('peak_bytes'), 9, 1e6)}"
      f"{cell(row.get('compiled_bytes'), 9, 1e6)}"
      f"{cell(row.get('loss'), 9, digits=4)}{cell(length.get('fits'), 8)}"
      f"{cell(length.get('line'), 9)}{cell(by_compiler, 9)}"
    )
  return "\n".join(lines)


def cell(
  value: float | None, width: int, unit: float = 1.0, digits: int = 0
) -> str:
  """A number of a table, empty if there is none."""
  text = "" if value is None else f"{value / unit:,.{digits}f}"
  return f"{text:>{width}}"
