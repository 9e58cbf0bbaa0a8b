"""From the runs of `chat_tail.py` to its figures and its table."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from chat_tail_data import padded_tokens
from peers_table import cell, ratios

Rows = Mapping[str, Mapping[str, Any]]


def by_compiler(longest: Rows) -> dict[str, Mapping[str, Any]]:
  """What was only compiled counts as the compiler says."""
  return {
    name: row if "fits" in row else row.get("compiled", {})
    for name, row in longest.items()
  }


def compare(speed: Rows, longest: Rows) -> dict[str, float]:
  """`peers_table.ratios`, and the length's ratio where the budget is large.

  There only the bytes that a token adds count, on both sides the least.
  """
  figures = ratios(speed, longest)
  slopes = {n: row.get("slope") for n, row in longest.items()}
  slopes = {n: slope for n, slope in slopes.items() if slope and slope > 0}
  mine = [v for n, v in slopes.items() if n.startswith("jaxchunk")]
  peers = [v for n, v in slopes.items() if not n.startswith("jaxchunk")]
  if mine and peers:
    figures["longest_by_slopes"] = min(peers) / min(mine)
  return figures


def verdicts(
  gap: tuple[float, str] | None,
  over: Mapping[str, float],
  tolerance: float,
  targets: Mapping[str, float],
) -> dict[str, bool | None]:
  """Which goals are met; `None` where there is nothing to judge.

  Args:
    gap: Of `peers_table.loss_gap`.
    over: Of `compare`.
    tolerance: Of losses, in nats.
    targets: The least of ratios, by name.
  """
  met: dict[str, bool | None] = {"losses": gap and gap[0] <= tolerance}
  for name, least in targets.items():
    met[name] = over[name] >= least if name in over else None
  return met


def useful(
  steps: Sequence[Sequence[int]], chunks: Sequence[int], size: int, batch: int
) -> dict[str, float]:
  """Percent of the tokens computed that are no padding.

  Args:
    steps: Of each the lengths of its conversations, in order.
    chunks: Of each how many chunks `chunk_plan` makes of them.
    size: Tokens of a chunk.
    batch: Rows that are padded to their longest.
  """
  tokens = sum(map(sum, steps))
  ways = {
    "jaxchunk": sum(chunks) * size,
    "padded": sum(padded_tokens(s, batch) for s in steps),
    "padded by length": sum(padded_tokens(sorted(s), batch) for s in steps),
  }
  return {name: 100 * tokens / total for name, total in ways.items()}


def table(
  names: Iterable[str],
  speed: Rows,
  longest: Rows,
  skipped: Mapping[str, str],
) -> str:
  """Lines for people: a contestant each, also those that did not run."""
  lines = [
    f"{'':36}{'tokens/s':>9}{'threads':>11}{'warm s':>8}{'peak MB':>9}"
    f"{'loss':>9}{'fits':>8}{'by line':>9}{'kB/token':>10}"
  ]
  for name in names:
    row, length = speed.get(name, {}), longest.get(name, {})
    if not row and not length:
      lines.append(f"{name:36}not measured: {skipped.get(name, 'no run yet')}")
      continue
    threads = ""
    if row.get("threads"):
      threads = f"{row['threads']} {row['policy']}"
    lines.append(
      f"{name:36}{cell(row.get('tokens_per_sec'), 9)}{threads:>11}"
      f"{cell(row.get('warm_seconds'), 8, digits=1)}"
      f"{cell(row.get('peak_bytes'), 9, 1e6)}"
      f"{cell(row.get('loss'), 9, digits=4)}{cell(length.get('fits'), 8)}"
      f"{cell(length.get('line'), 9)}"
      f"{cell(length.get('slope'), 10, 1e3, digits=1)}"
    )
  return "\n".join(lines)
