"""Serves a model by OpenAI's HTTP interface, and a page to try it.

python scripts/serve.py --workdir=runs/sft

A model of Hugging Face, with LoRA adapters that requests choose by `model`:

python scripts/serve.py --model=Qwen3-0.6B --adapter=poems=adapters/poems
"""

import asyncio
import os
import sys
import time

from absl import app, flags, logging

from jaxchunk.inference.engine import EngineConfig
from jaxchunk.sharding.mesh import Layout
from jaxchunk.training.checkpoint import CheckpointError

_STARTED = time.monotonic()
_SIZES = EngineConfig()

_WORKDIR = flags.DEFINE_string("workdir", None, "A run's.")
_MODEL = flags.DEFINE_string("model", None, "Or a folder of Hugging Face.")
_ADAPTER = flags.DEFINE_multi_string(
  "adapter", [], "name=path, a folder of PEFT; several if given several times."
)
_TEMPLATE = flags.DEFINE_string(
  "chat_template", None, "'chatml' or a file, in place of the model's own."
)
_NAME = flags.DEFINE_string("served_model_name", None, "The folder's if unset.")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Others need an API key.")
_PORT = flags.DEFINE_integer("port", 8000, "0: any.", 0, 65535)
_KEY = flags.DEFINE_string("api_key", None, "Or set JAXCHUNK_API_KEY.")
_QUEUE = flags.DEFINE_integer("max_queue", 256, "That may wait.", 0)
_BODY = flags.DEFINE_float("max_body_mb", 8.0, "Of a request.", 0.001)
_GRACE = flags.DEFINE_float("grace_seconds", 30.0, "To finish in.", 0.0)
_LENGTH = flags.DEFINE_integer("max_length", None, "Tokens of a sequence.")
_SEQUENCES = flags.DEFINE_integer(
  "max_sequences", _SIZES.max_sequences, "That run at a time."
)
_STEP = flags.DEFINE_integer(
  "step_tokens", _SIZES.step_tokens, "That a step has room for."
)
_KV = flags.DEFINE_float("kv_gib", _SIZES.kv_gib, "For keys and values.")
_KV_DTYPE = flags.DEFINE_string("kv_dtype", None, "'int8', or the model's own.")
_HOST_GIB = flags.DEFINE_float(
  "host_gib", _SIZES.host_gib, "Host memory for keys and values."
)
_PAGE = flags.DEFINE_integer("page_size", _SIZES.page_size, "Tokens of a page.")
_SLOWDOWN = flags.DEFINE_float(
  "max_slowdown", None, "Of a step by parts of prompts; any if unset."
)
_DATA = flags.DEFINE_integer("data", 1, "Copies of the model.", 1)
_TENSOR = flags.DEFINE_integer("tensor", 1, "Devices that share a copy.", 1)
_SCHEDULER = flags.DEFINE_string(
  "scheduler", _SIZES.scheduler, "'stall_free' or 'past_future'."
)


def main(argv: list[str]) -> None:
  """Loads, says where it listens, and serves until it is told to stop."""
  if len(argv) > 1:
    sys.exit(f"serve.py: {argv[1]!r} is not a flag; write --name=value")
  logging.set_verbosity(logging.WARNING)
  key = _KEY.value or os.environ.get("JAXCHUNK_API_KEY") or None
  config = EngineConfig(
    max_length=_LENGTH.value,
    max_sequences=_SEQUENCES.value,
    step_tokens=_STEP.value,
    kv_gib=_KV.value,
    kv_dtype=_KV_DTYPE.value,
    host_gib=_HOST_GIB.value,
    page_size=_PAGE.value,
    scheduler=_SCHEDULER.value,
    max_slowdown=_SLOWDOWN.value,
  )
  layout = None
  if _DATA.value * _TENSOR.value > 1:
    layout = Layout(data=_DATA.value, tensor=_TENSOR.value)
  try:
    from jaxchunk.inference.server.app import Limits
    from jaxchunk.inference.server.load import load_served, parse_adapters
    from jaxchunk.inference.server.main import check_address, serve

    check_address(_HOST.value, key)
    served = load_served(
      workdir=_WORKDIR.value,
      model=_MODEL.value,
      adapters=parse_adapters(_ADAPTER.value),
      chat_template=_TEMPLATE.value,
      name=_NAME.value,
      config=config,
      layout=layout,
      say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    finished = asyncio.run(
      serve(
        served,
        host=_HOST.value,
        port=_PORT.value,
        api_key=key,
        max_queue=_QUEUE.value,
        grace_seconds=_GRACE.value,
        limits=Limits(body_bytes=int(_BODY.value * 2**20)),
        ready=lambda address: _greet(address, served.name, key is not None),
      )
    )
  except (ValueError, OSError, ImportError, CheckpointError) as error:
    sys.exit(f"serve.py: {error}")
  except KeyboardInterrupt:
    sys.exit(130)
  if not finished:
    sys.exit("serve.py: not all requests were finished in --grace_seconds")


def _greet(address: str, name: str, guarded: bool) -> None:
  seconds = time.monotonic() - _STARTED
  key = ' -H "Authorization: Bearer $JAXCHUNK_API_KEY"' if guarded else ""
  body = f'{{"model": "{name}", "prompt": "Once upon", "max_tokens": 20}}'
  print(f"{name} at {address} after {seconds:.1f} s; a page to try it is there")
  print(
    f"curl {address}/v1/completions -H 'Content-Type: application/json'{key} "
    f"-d '{body}'",
    flush=True,
  )


if __name__ == "__main__":
  app.run(main)
