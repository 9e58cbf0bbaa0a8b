"""`--config=FILE --config.section.field=value`, with errors that help."""

import difflib
import os
import re
import typing
from collections.abc import Iterator, Sequence
from logging import INFO, LogRecord
from pathlib import Path
from typing import Any, Literal

from absl import flags, logging
from ml_collections import config_flags

from jaxchunk.interop.errors import InteropError
from jaxchunk.training.config import (
  Config,
  ConfigError,
  dataclasses_of,
  options_of,
)


def parse_flags(argv: list[str]) -> list[str]:
  """`app.run(main, flags_parser=parse_flags)` for scripts with `--config`.

  Answers a misspelt field or a missing file with one line on stderr and a
  non-zero exit, where ml_collections would raise from its depths.

  Args:
    argv: The command line, the program first.

  Returns:
    What is left of it once the flags are taken.
  """
  try:
    check_overrides(argv, Config)
  except ConfigError as error:
    raise SystemExit(f"{os.path.basename(argv[0])}: {error}") from error
  for kind in _literals(Config):
    config_flags.register_flag_parser_for_type(
      kind, flags.EnumParser(list(typing.get_args(kind)))
    )
  try:
    # Runs get_config().
    remaining: list[str] = flags.FLAGS(argv)
  except flags.Error as error:
    name = os.path.basename(argv[0])
    raise SystemExit(f"{name}: {_own_error(error) or error}") from error
  # --verbosity=1 shows them.
  if not logging.level_debug():
    logging.get_absl_handler().addFilter(_matters)
  return remaining


def _own_error(error: BaseException | None) -> BaseException | None:
  """What a configuration file raised, beneath what was made of it."""
  while error is not None and type(error) not in (ConfigError, InteropError):
    error = error.__cause__ or error.__context__
  while error is not None and isinstance(error.__context__, type(error)):
    error = error.__context__
  return error


def _matters(record: LogRecord) -> bool:
  """Drops the thirty lines that Orbax tells about each checkpoint."""
  return record.levelno > INFO or "orbax" not in Path(record.pathname).parts


def check_overrides(argv: Sequence[str], kind: type) -> None:
  """Checks that each `--config.a.b` of a command line names a field of `kind`.

  Raises:
    ConfigError: One does not, and which field is nearest; or `--config` names
      no file.
  """
  for index, argument in enumerate(argv[1:], 1):
    if argument == "--":
      return
    match = re.fullmatch(
      r"--?(?P<no>no)?config(?P<path>(\.[^=.]*)*)(=(?P<value>.*))?",
      argument,
      re.DOTALL,
    )
    if match is None:
      continue
    if match["path"]:
      _check_path(match["path"][1:].split("."), kind)
      continue
    value = match["value"]
    if value is None:
      value = argv[index + 1] if index + 1 < len(argv) else ""
    if not os.path.isfile(value.split(":")[0]):
      raise ConfigError(f"--config={value}: there is no such file")


def _check_path(path: list[str], kind: type) -> None:
  holder = kind
  for depth, name in enumerate(path):
    hints = typing.get_type_hints(holder)
    prefix = ".".join(["config", *path[:depth]])
    if name not in hints:
      raise ConfigError(_misspelt(f"{prefix}.{name}", prefix, name, kind))
    if vars(holder)["__dataclass_params__"].frozen:
      raise ConfigError(
        f"--{prefix}.{name}: {holder.__name__} is a value that cannot be "
        "changed in part; set it in the configuration file"
      )
    nested = dataclasses_of(hints[name])
    if depth + 1 == len(path):
      return
    if len(nested) != 1:
      raise ConfigError(
        f"--config.{'.'.join(path)}: {prefix}.{name} has no fields"
      )
    holder = nested[0]


def _misspelt(given: str, prefix: str, name: str, kind: type) -> str:
  fields = ["config." + ".".join(path) for path in _paths(kind)]
  siblings = [f for f in fields if f.rpartition(".")[0] == prefix]
  names = {f.rpartition(".")[2]: f for f in siblings}
  close = difflib.get_close_matches(name, names, 1)
  nearest = names[close[0]] if close else None
  if nearest is None:
    elsewhere = difflib.get_close_matches(given, fields, 1, cutoff=0.0)
    moved = [f for f in fields if f.rpartition(".")[2] == name]
    nearest = (moved or elsewhere)[0]
  return f"--{given} is not a field; did you mean --{nearest}?"


def _paths(kind: type) -> Iterator[tuple[str, ...]]:
  for name, hint in typing.get_type_hints(kind).items():
    yield (name,)
    for option in dataclasses_of(hint):
      for rest in _paths(option):
        yield (name, *rest)


def _literals(kind: type) -> Iterator[Any]:
  for hint in typing.get_type_hints(kind).values():
    yield from (o for o in options_of(hint) if typing.get_origin(o) is Literal)
    for option in dataclasses_of(hint):
      yield from _literals(option)


def profile_steps(text: str | None) -> tuple[int, int] | None:
  """Reads `--profile_steps=10:12`, first and last step.

  Raises:
    ConfigError: It is something else.
  """
  if text is None:
    return None
  match = re.fullmatch(r"(\d+):(\d+)", text)
  if match is None or not 1 <= int(match[1]) <= int(match[2]):
    raise ConfigError(
      f"--profile_steps={text} must be FIRST:LAST, steps from 1, as in 10:12"
    )
  return int(match[1]), int(match[2])
