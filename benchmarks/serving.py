"""The engine beside transformers' `generate`, on one machine, same weights.

  python benchmarks/serving.py [--part=NAME] [--rounds=2] [--record]

A random model of the shape of Qwen 2.5 0.5B (494M parameters), fp32, greedy.
Contestants are processes of their own and take turns; transformers runs with
the best of a few thread settings.

- `one`: one request at a time: tokens a second behind the first token.
- `many`: 16 requests at once, against one batch of transformers padded on the
  left; tokens asked for a second, prompts included in the time. "equal": 32 new
  tokens each; "varied": 8 to 64, where a batch goes on until its longest ends.
- `stall`: 8 requests draw while a prompt of 16k tokens arrives: the 99th
  percentile of the time between tokens then over that without it, and the
  prompt's time to its first token over that alone.
- `equal`: greedy tokens of the engine and of transformers; not among "all".
"""

import json
import pathlib
import sys
import tempfile
import time
from typing import Any

import numpy as np
from absl import app, flags
from common import (
  Compilations,
  record,
  report,
  rounded,
  run_contestant,
  torch_settings,
)

_PART = flags.DEFINE_enum(
  "part", "all", ("all", "one", "many", "stall", "equal"), "Which."
)
_ROUNDS = flags.DEFINE_integer("rounds", 2, "Turns of each.", lower_bound=1)
_RECORD = flags.DEFINE_bool("record", False, "Write benchmarks/results/.")
_RUN = flags.DEFINE_string("run", None, "Of a contestant's process: which.")
_FOLDER = flags.DEFINE_string("folder", None, "Of a contestant's process.")
_THREADS = flags.DEFINE_integer("threads", 2, "Of torch.")
_PROMPT = flags.DEFINE_integer("prompt", 16384, "Tokens of stall's prompt.")
_SLOWDOWN = flags.DEFINE_float("slowdown", 1.4, "The engine's, in stall.")
_SEED = flags.DEFINE_integer("seed", 0, "Of prompts.")
_LAYERS = flags.DEFINE_integer("layers", 24, "Of the model.")

_VOCAB, _REQUESTS, _DRAWING = 151_936, 16, 8


def save_model(folder: pathlib.Path) -> None:
  """Random weights, in the format of Hugging Face."""
  import torch
  import transformers

  config = transformers.Qwen2Config(
    vocab_size=_VOCAB,
    hidden_size=896,
    num_hidden_layers=_LAYERS.value,
    num_attention_heads=14,
    num_key_value_heads=2,
    intermediate_size=4864,
    max_position_embeddings=32768,
    tie_word_embeddings=True,
    initializer_range=0.05,
  )
  torch.manual_seed(0)
  transformers.Qwen2ForCausalLM(config).save_pretrained(folder)


def prompts(number: int, low: int, high: int) -> list[list[int]]:
  rng = np.random.default_rng([_SEED.value, number])
  lengths = rng.integers(low, high + 1, number)
  return [rng.integers(0, _VOCAB, n).tolist() for n in lengths]


def cases() -> dict[str, list[tuple[list[int], int]]]:
  """Prompts and how many tokens each asks for."""
  rng = np.random.default_rng(_SEED.value)
  varied = rng.permutation(np.linspace(8, 64, _REQUESTS).astype(int)).tolist()
  many = prompts(_REQUESTS, 16, 128)
  return {
    "one": [(prompts(1, 32, 32)[0], 48)],
    "many, equal": [(prompt, 32) for prompt in many],
    "many, varied": list(zip(many, varied, strict=True)),
    "equal": [(prompt, 200) for prompt in prompts(4, 8, 40)],
  }


def wanted() -> list[str]:
  part = _PART.value
  names = [name.partition(",")[0] for name in cases()]
  return [
    name
    for name, kind in zip(cases(), names, strict=True)
    if part == kind or (part == "all" and kind != "equal")
  ]


def run_torch() -> None:
  """Prints a line for each case."""
  import torch
  import transformers

  torch.set_num_threads(_THREADS.value)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    _FOLDER.value, dtype=torch.float32, attn_implementation="sdpa"
  ).eval()

  class Stamps(transformers.generation.streamers.BaseStreamer):
    def __init__(self) -> None:
      self.times: list[float] = []

    def put(self, value: Any) -> None:
      self.times.append(time.perf_counter())

    def end(self) -> None:
      pass

  def generate(case: list[tuple[list[int], int]], streamer: Any = None) -> Any:
    longest = max(len(prompt) for prompt, _ in case)
    ids = torch.zeros(len(case), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (prompt, _) in enumerate(case):
      ids[row, longest - len(prompt) :] = torch.tensor(prompt)
      mask[row, longest - len(prompt) :] = 1
    most = max(number for _, number in case)
    with torch.inference_mode():
      return model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=most,
        min_new_tokens=most,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        streamer=streamer,
      )[:, longest:].tolist()

  for name in wanted():
    case = cases()[name]
    generate([(prompt[:8], 4) for prompt, _ in case])
    for _ in range(_ROUNDS.value if name != "equal" else 1):
      stamps = Stamps() if name == "one" else None
      began = time.perf_counter()
      if name == "equal":
        tokens = [generate([one])[0] for one in case]
      else:
        tokens = generate(case, stamps)
      seconds = time.perf_counter() - began
      if stamps is not None:
        # The first is the prompt's.
        seconds = stamps.times[-1] - stamps.times[1]
      say(name, case, seconds, tokens)


def say(name: str, case: Any, seconds: float, tokens: Any) -> None:
  asked = sum(number for _, number in case) - (name == "one")
  line = {"case": name, "tokens_per_second": asked / seconds}
  if name == "equal":
    line["tokens"] = tokens
  print(json.dumps(line), flush=True)


def run_engine() -> None:
  """Prints a line for each case."""
  import jaxchunk as jc

  model = jc.load_hf(_FOLDER.value)
  stalls = _PART.value in ("all", "stall")
  engine = jc.Engine(
    model,
    max_length=_PROMPT.value + 256 if stalls else 1024,
    max_sequences=_REQUESTS,
    step_tokens=256,
    kv_gib=1.0,
    page_size=64,
    prefix_cache=False,
    max_slowdown=_SLOWDOWN.value if stalls else None,
    say=lambda text: print(text, file=sys.stderr, flush=True),
  )
  heard = Compilations()
  for name in wanted():
    case = cases()[name]
    for _ in range(_ROUNDS.value if name != "equal" else 1):
      times, tokens, seconds = serve(engine, case)
      if name == "one":
        seconds = times[0][-1] - times[0][0]
      say(name, case, seconds, tokens)
  if stalls:
    for _ in range(_ROUNDS.value):
      print(json.dumps({"case": "stall", **stall(engine)}), flush=True)
  line = {"case": "start", "seconds": engine.runners[0].startup_seconds}
  line["compiled_later"] = heard.count
  print(json.dumps(line), flush=True)


def serve(engine: Any, case: list[tuple[list[int], int]]) -> Any:
  """Times of every token, the tokens, and seconds in all."""
  import jaxchunk as jc
  from jaxchunk.inference.core import Request

  began = time.perf_counter()
  for number, (prompt, asked) in enumerate(case):
    params = jc.SamplingParams(temperature=0, max_tokens=asked)
    engine.core.add(
      Request(request_id=str(number), prompt=tuple(prompt), params=params)
    )
  times: list[list[float]] = [[] for _ in case]
  tokens: list[list[int]] = [[] for _ in case]
  while engine.core.has_work:
    for event in engine.core.step():
      at = int(event.sequence.request_id)
      times[at] += [event.time] * len(event.tokens)
      tokens[at] += event.tokens
  return times, tokens, time.perf_counter() - began


def stall(engine: Any) -> dict[str, float]:
  """Times between tokens without and with a long prompt, and its own."""
  import jaxchunk as jc
  from jaxchunk.inference.core import Request

  rng = np.random.default_rng(_SEED.value)
  long = tuple(rng.integers(0, _VOCAB, _PROMPT.value).tolist())
  params = jc.SamplingParams(temperature=0, max_tokens=1)
  began = engine.runners[0].now()
  engine.core.add(Request(request_id="alone", prompt=long, params=params))
  alone = first_token(engine, "alone", {}) - began
  print(f"the prompt alone: {alone:.1f} s", file=sys.stderr, flush=True)
  endless = jc.SamplingParams(temperature=0, max_tokens=_PROMPT.value)
  for number, prompt in enumerate(prompts(_DRAWING, 16, 64)):
    engine.core.add(
      Request(request_id=str(number), prompt=tuple(prompt), params=endless)
    )
  idle: dict[str, list[float]] = {}
  for step in range(120):
    for event in engine.core.step():
      if step >= 20:
        idle.setdefault(event.sequence.request_id, []).append(event.time)
  began = engine.runners[0].now()
  engine.core.add(Request(request_id="beside", prompt=long, params=params))
  busy: dict[str, list[float]] = {}
  beside = first_token(engine, "beside", busy) - began
  for number in range(_DRAWING):
    engine.core.cancel(str(number))
  while engine.core.has_work:
    engine.core.step()

  def p99(times: dict[str, list[float]]) -> float:
    gaps = [np.diff(one) for one in times.values()]
    return float(np.percentile(np.concatenate(gaps), 99))

  return {
    "idle_p99": p99(idle),
    "busy_p99": p99(busy),
    "between_ratio": p99(busy) / p99(idle),
    "first_alone": alone,
    "first_beside": beside,
    "first_ratio": beside / alone,
  }


def first_token(
  engine: Any, name: str, others: dict[str, list[float]]
) -> float:
  while True:
    for event in engine.core.step():
      if event.sequence.request_id == name:
        return float(event.time)
      others.setdefault(event.sequence.request_id, []).append(event.time)


def arguments(folder: str, run: str, **more: Any) -> list[str]:
  names = ("part", "rounds", "prompt", "slowdown", "seed", "layers")
  given = {name: flags.FLAGS[name].value for name in names} | more
  return [
    str(pathlib.Path(__file__).resolve()),
    f"--run={run}",
    f"--folder={folder}",
    *(f"--{name}={value}" for name, value in given.items()),
  ]


def main(_: list[str]) -> None:
  if _RUN.value is not None:
    {"torch": run_torch, "engine": run_engine}[_RUN.value]()
    return
  with tempfile.TemporaryDirectory() as folder:
    save_model(pathlib.Path(folder))
    best: dict[str, float] = {}
    found: dict[str, Any] = {}
    texts: dict[str, Any] = {}
    settings = [] if _PART.value == "stall" else torch_settings()
    if _PART.value == "equal":
      settings = settings[-1:]
    for threads, policy in settings:
      lines, code = run_contestant(
        arguments(folder, "torch", threads=threads), policy
      )
      if code:
        sys.exit(f"transformers ended with code {code}")
      for line in lines:
        name, speed = line["case"], line["tokens_per_second"]
        best[name] = max(best.get(name, 0), speed)
        texts["torch"] = line.get("tokens", texts.get("torch"))
    lines, code = run_contestant(arguments(folder, "engine"))
    if code:
      sys.exit(f"the engine ended with code {code}")
  ours: dict[str, float] = {}
  for line in lines:
    name = line.pop("case")
    if "tokens_per_second" in line:
      ours[name] = max(ours.get(name, 0), line["tokens_per_second"])
      texts["ours"] = line.get("tokens", texts.get("ours"))
    elif name == "stall":
      least = found.get("stall", line)
      found["stall"] = min(line, least, key=lambda one: one["between_ratio"])
    else:
      found[name] = line
  for name, speed in ours.items():
    found[name] = {
      "tokens_per_second": speed,
      "transformers": best[name],
      "ratio": speed / best[name],
    }
  if "equal" in found:
    same = [
      sum(a == b for a, b in zip(*pair, strict=True))
      for pair in zip(texts["ours"], texts["torch"], strict=True)
    ]
    found["equal"] = {"tokens": 200 * len(same), "equal": sum(same)}
  found = rounded(found)
  if _RECORD.value:
    record("serving", found, "cpu", ("jax", "jaxlib", "torch", "transformers"))
  report("serving", **found)


if __name__ == "__main__":
  app.run(main)
