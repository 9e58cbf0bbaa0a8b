"""From folders to what a server serves."""

from collections.abc import Callable, Mapping
from pathlib import Path

from jaxchunk.data.cache import read_json
from jaxchunk.data.chat import ChatTemplate, load_template
from jaxchunk.data.tokenizers import Tokenizer, load_tokenizer
from jaxchunk.inference.chat import Chat
from jaxchunk.inference.engine import Engine, EngineConfig
from jaxchunk.inference.server.served import Served
from jaxchunk.interop.hugging_face import load_hf
from jaxchunk.interop.peft import load_peft
from jaxchunk.sharding.mesh import Layout
from jaxchunk.training.checkpoint import load_for_inference


def load_served(
  *,
  workdir: str | None = None,
  model: str | None = None,
  adapters: Mapping[str, str] | None = None,
  chat_template: str | None = None,
  name: str | None = None,
  config: EngineConfig | None = None,
  layout: Layout | None = None,
  say: Callable[[str], None] | None = None,
) -> Served:
  """Loads a model and makes its engine.

  Args:
    workdir: Of a run of `scripts/train.py`.
    model: Or a folder of Hugging Face.
    adapters: Folders of PEFT by the names that requests may ask for.
    chat_template: "chatml" or the path of one; `None` is the model's own.
    name: Of the model; `None` is the folder's.
    config: Of the engine.
    layout: Likewise; `None` is one device.
    say: Told what takes long.

  Raises:
    ValueError: One of the folders is not what it should be; names it.
    CheckpointError: The run has no checkpoint that can be read.
    OSError: There is no such file.
  """
  source = workdir if model is None else model
  if source is None or (workdir is not None and model is not None):
    raise ValueError(
      "name one of --workdir, a run's, and --model, a folder of Hugging Face"
    )
  path = Path(source).expanduser().absolute()
  config = config or EngineConfig()
  config.check()
  if model is None:
    transformer, folder, _ = load_for_inference(path)
  else:
    if not path.is_dir():
      raise ValueError(f"--model={source!r} is no folder")
    transformer, folder = load_hf(path), str(path)
  tokenizer = load_tokenizer(folder, parse_special=True)
  template = _template(chat_template, folder)
  engine = Engine(
    transformer,
    tokenizer,
    config=config,
    layout=layout,
    adapters={
      adapter: load_peft(transformer, place)
      for adapter, place in (adapters or {}).items()
    },
    ends=_ends(folder, template, tokenizer),
    say=say,
  )
  return Served(
    engine=engine,
    name=name or path.name,
    adapters=tuple(adapters or {}),
    template=template,
  )


def _template(spec: str | None, folder: str) -> ChatTemplate | None:
  """The chat template, if there is one."""
  try:
    return load_template(spec, folder)
  except ValueError as error:
    # A model without one can still complete texts.
    if spec is None and "has no chat template" in str(error):
      return None
    raise


def _ends(
  folder: str, template: ChatTemplate | None, tokenizer: Tokenizer
) -> frozenset[int]:
  """Tokens that end a turn, and those that the model's authors name."""
  ends: set[int] = set()
  if template is not None:
    ends |= Chat(template, tokenizer).end_of_turn()
  path = Path(folder) / "generation_config.json"
  if path.is_file():
    named = read_json(path).get("eos_token_id")
    every = named if isinstance(named, list) else [named]
    ends |= {n for n in every if isinstance(n, int)}
  return frozenset(ends)


def parse_adapters(values: list[str]) -> dict[str, str]:
  """Adapters as flags name them, `name=path`.

  Raises:
    ValueError: One is not written so, or two have one name.
  """
  found: dict[str, str] = {}
  for value in values:
    name, equals, path = value.partition("=")
    if not (name and equals and path):
      raise ValueError(f"--adapter={value!r} must be name=path")
    if name in found:
      raise ValueError(f"two adapters have the name {name!r}")
    found[name] = path
  return found
