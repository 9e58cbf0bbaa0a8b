"""What the site shows that nobody types: API pages, fields, figures, formulas.

mkdocs calls the `on_*` functions. Everything is read from the repository; no
network is used, and a page's text stays readable where no site is built.
"""

import dataclasses
import html
import importlib
import json
import pathlib
import re
import shutil
import tempfile
import typing
from collections.abc import Iterator
from typing import Any

import latex2mathml.converter
from griffe import Docstring, DocstringSectionAttributes
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_ROOT = pathlib.Path(__file__).parents[1]
_RESULTS = _ROOT / "benchmarks" / "results"
# What the figures of a benchmark were measured with.
_SETTING = ("device", "cores", "jax", "jaxlib", "python", "torch", "date")

# Packages in the order of the pages; those without modules are left out.
_PACKAGES = {
  "chunking": "jaxchunk.chunking",
  "models": "jaxchunk.models",
  "data": "jaxchunk.data",
  "training": "jaxchunk.training",
  "planner": "jaxchunk.planner",
  "evaluation": "jaxchunk.evaluation",
  "inference": "jaxchunk.inference",
  "server": "jaxchunk.inference.server",
  "pages": "jaxchunk.kv",
  "interop": "jaxchunk.interop",
  "sharding": "jaxchunk.sharding",
  "attention": "jaxchunk.kernels.attention",
  "linear_attention": "jaxchunk.kernels.linear_attention",
  "paged_attention": "jaxchunk.kernels.paged_attention",
  "cross_entropy": "jaxchunk.kernels.cross_entropy",
}
# Removed when the interpreter ends.
_COPY = tempfile.TemporaryDirectory(prefix="jaxchunk-docs-")
_SINGLE = (
  "jaxchunk.types",
  "jaxchunk.targets",
  "jaxchunk.kernels.state",
  "jaxchunk.kernels.state_linear",
)


@event_priority(100)
def on_config(config: MkDocsConfig) -> MkDocsConfig:
  """Shows mkdocstrings the package, and puts its pages in the navigation.

  The package's folders `kernels` and `sharding` are links without an
  `__init__.py`, which are not followed when a package is read; so it reads a
  copy in which they are plain packages.
  """
  handler = config.plugins["mkdocstrings"].config.handlers["python"]
  copy = pathlib.Path(_COPY.name) / "jaxchunk"
  shutil.copytree(_ROOT / "jaxchunk", copy, dirs_exist_ok=True)
  for folder in ("kernels", "sharding"):
    (copy / folder / "__init__.py").touch()
  handler["paths"] = [_COPY.name]
  names = [*_packages(), "more"]
  pages = [{_title(name): f"api/{name}.md"} for name in names]
  for entry in config.nav or []:
    if "API" in entry:
      entry["API"] = [{"Public names": "api/index.md"}, *pages]
  return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
  """Adds the pages that are written here and not by hand."""
  pages = {f"api/{n}.md": _package_page(n) for n in _packages()}
  pages["api/more.md"] = _page("More modules", _SINGLE)
  text = (_ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
  pages["contributing.md"] = _on_site(text)
  for path, content in pages.items():
    files.append(File.generated(config, path, content=content))
  return files


def on_page_markdown(markdown: str, **_: Any) -> str:
  """Fills the marks `<!-- generated: NAME -->` of a page."""
  for name, make in _GENERATED.items():
    mark = f"<!-- generated: {name} -->"
    if mark in markdown:
      markdown = markdown.replace(mark, make())
  return markdown


def on_page_content(content: str, page: Page, **_: Any) -> str:
  """Turns formulas into MathML, which browsers set without a script."""

  def convert(match: re.Match[str]) -> str:
    block = match["open"] == "["
    latex = html.unescape(match["latex"]).strip()
    kind = "block" if block else "inline"
    return str(latex2mathml.converter.convert(latex, display=kind))

  return re.sub(
    r'<(?P<tag>span|div) class="arithmatex">\\(?P<open>[\[(])'
    r"(?P<latex>.*?)\\[\])]</(?P=tag)>",
    convert,
    content,
    flags=re.DOTALL,
  )


def _packages() -> list[str]:
  return [name for name, path in _PACKAGES.items() if any(_modules(path))]


def _modules(package: str) -> Iterator[str]:
  """Modules of a package, but for those without anything public."""
  folder = _ROOT.joinpath(*package.split("."))
  for path in sorted(folder.glob("*.py")):
    text = path.read_text(encoding="utf-8")
    public = re.search(r"^(def|class) [A-Za-z]", text, re.MULTILINE)
    if path.stem != "__init__" and public:
      yield f"{package}.{path.stem}"


def _title(name: str) -> str:
  return name.replace("_", " ").capitalize()


def _package_page(name: str) -> str:
  return _page(_title(name), _modules(_PACKAGES[name]))


def _page(title: str, modules: typing.Iterable[str]) -> str:
  parts = [f"# {title}"]
  exports = importlib.import_module("jaxchunk")._EXPORTS
  for module in modules:
    public = [name for name, home in exports.items() if home == module]
    filters = json.dumps(["!^_", *(f"!^{name}$" for name in public)])
    parts.append(f"## `{module}`")
    parts.append(f"::: {module}\n{_OPTIONS}\n      filters: {filters}")
    if public:
      names = ", ".join(f"[`{n}`](index.md#{module}.{n})" for n in public)
      parts.append(f"Among the public names: {names}.")
  return "\n\n".join(parts)


_OPTIONS = (
  "    options:\n      show_root_heading: false\n      heading_level: 3"
)


def _public_names() -> str:
  """The names of `jaxchunk` itself."""
  exports = importlib.import_module("jaxchunk")._EXPORTS
  return "\n\n".join(f"::: {exports[name]}.{name}" for name in sorted(exports))


def _on_site(text: str) -> str:
  """A page from the repository's root: links into docs/ stay, others go."""

  def relink(match: re.Match[str]) -> str:
    words, target = match[1], match[2]
    if "://" in target or target.startswith("#"):
      return match[0]
    if target.startswith("docs/"):
      return f"[{words}]({target.removeprefix('docs/')})"
    return words

  return re.sub(r"\[([^\]]+)\]\(([^)]+)\)", relink, text)


def _config_fields() -> str:
  """A table for each dataclass that a configuration is made of."""
  config = importlib.import_module("jaxchunk.training.config")
  hints = typing.get_type_hints(config.Config)
  parts = []
  for section, kind in hints.items():
    parts.append(f"## `{section}`: {kind.__name__}\n\n{_field_table(kind)}")
  rope = importlib.import_module("jaxchunk.models.rope")
  kinds = (rope.Rope, rope.LinearScaling, rope.NtkScaling, rope.Llama3Scaling)
  for kind in (*kinds, rope.YarnScaling):
    parts.append(f"## {kind.__name__}\n\n{_field_table(kind)}")
  return "\n\n".join(parts)


def _field_table(kind: type) -> str:
  text = Docstring(str(kind.__doc__), lineno=1)
  meanings = {
    item.name: " ".join(item.description.split())
    for part in text.parse("google", warnings=False, warn_missing_types=False)
    if isinstance(part, DocstringSectionAttributes)
    for item in part.value
  }
  rows = ["| Field | Type | Default | Meaning |", "|---|---|---|---|"]
  for field in dataclasses.fields(kind):
    rows.append(
      f"| `{field.name}` | {_code(_type_name(field))} | {_default(field)} | "
      f"{meanings.get(field.name, '').replace('|', chr(92) + '|')} |"
    )
  return "\n".join(rows)


def _type_name(field: dataclasses.Field[Any]) -> str:
  name = field.type if isinstance(field.type, str) else str(field.type)
  name = getattr(field.type, "__name__", name) if "[" not in name else name
  return re.sub(r"\b(typing|jaxchunk\.[a-z.]+)\.", "", name)


def _default(field: dataclasses.Field[Any]) -> str:
  if field.default is not dataclasses.MISSING:
    return _code(repr(field.default))
  if field.default_factory is not dataclasses.MISSING:
    return _code(f"{getattr(field.default_factory, '__name__', '...')}()")
  return "*required*"


def _code(text: str) -> str:
  """Inline code that a table takes: a bar would end the cell."""
  return f"<code>{html.escape(text).replace('|', '&#124;')}</code>"


def _benchmarks() -> str:
  """A section for every JSON line in `benchmarks/results/`."""
  parts = [_benchmark(path, line) for path, line in _result_lines()]
  if not parts:
    return "No results are stored in `benchmarks/results/` of this copy."
  return "\n\n".join(parts)


def _result_lines() -> Iterator[tuple[pathlib.Path, dict[str, Any]]]:
  for path in sorted(_RESULTS.rglob("*.json*")):
    text = path.read_text(encoding="utf-8")
    try:
      lines = [json.loads(text)]
    except json.JSONDecodeError:
      lines = [json.loads(line) for line in text.splitlines() if line.strip()]
    for line in lines:
      if not isinstance(line, dict):
        raise ValueError(f"{path}: a result is an object, not {line!r:.40}")
      yield path, line


def _benchmark(path: pathlib.Path, line: dict[str, Any]) -> str:
  name = line.get("benchmark", path.stem)
  setting = ", ".join(f"{k} {line[k]}" for k in _SETTING if k in line)
  rows = ["| Figure | Value |", "|---|---|"]
  for key, value in _flat(line):
    if key not in (*_SETTING, "benchmark"):
      rows.append(f"| {_code(key)} | {_code(str(value))} |")
  source = path.relative_to(_ROOT)
  return f"## {name}\n\n{setting} (`{source}`)\n\n" + "\n".join(rows)


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
  if isinstance(value, dict):
    for key, inner in value.items():
      yield from _flat(inner, f"{path}.{key}" if path else str(key))
  else:
    yield path, value


def _scripts() -> str:
  """What each benchmark prints, from its own head."""
  rows = ["| Command | What it measures |", "|---|---|"]
  for path in sorted((_ROOT / "benchmarks").glob("*.py")):
    text = path.read_text(encoding="utf-8")
    head = re.match(r'"""(.*?)\n', text)
    if head and "__main__" in text:
      command = f"python benchmarks/{path.name}"
      rows.append(f"| `{command}` | {head[1].rstrip('.')} |")
  return "\n".join(rows)


_GENERATED = {
  "public names": _public_names,
  "config fields": _config_fields,
  "benchmarks": _benchmarks,
  "benchmark scripts": _scripts,
}
