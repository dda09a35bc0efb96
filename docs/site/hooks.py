"""What the site has besides the pages in docs/: the reference of every flag, and the files that pages link to.

MkDocs calls the functions by their names; see "hooks" in its documentation.
"""

import contextlib
import dataclasses
import inspect
import io
import logging
import os
import re
import types
import typing
from collections.abc import Iterable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from lopt_pp import cli
from lopt_pp.config.launch import LaunchConfig
from lopt_pp.config.train_config import COMPONENTS

logger = logging.getLogger("mkdocs.hooks.lopt_pp")

HERE = Path(__file__).parent
ROOT = HERE.parent.parent

FLAGS = {flag.name: flag for component in (*COMPONENTS, LaunchConfig) for flag in dataclasses.fields(component)}
FLAGS_PAGE = "reference/flags.md"

_LINK_OUT = re.compile(r"\]\((?:\.\./)+([^)#\s]+)(?:#[^)\s]*)?\)")
"""A link to a file of the repository outside of docs/, from a page in docs/ itself."""

_FLAG_OR_SKIPPED = re.compile(r"<(a|h[1-6]|pre)\b.*?</\1>|<code>(--([a-z0-9_-]+)(?: [^ <]+)?)</code>", re.DOTALL)
"""A flag, with a value or without; or what is left as it is."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made here."""
    files.append(File.generated(config, FLAGS_PAGE, content=flags_page()))
    files.append(File.generated(config, "reference/python.md", content=(HERE / "python.md").read_text("utf-8")))
    pages = [page for page in files.documentation_pages() if _is_in_docs_itself(page)]
    linked = {ROOT / path for page in pages for path in _LINK_OUT.findall(page.content_string)}
    present = {path for path in linked if path.exists()}
    for path in sorted(present.union(*(_files_of(path) for path in present if path.is_dir()))):
        files.append(File.generated(config, _source_page(path), content=source_page(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lets links to files outside of docs/ lead to the pages that show them."""

    def replaced(match: re.Match[str]) -> str:
        path = ROOT / match[1]
        if not path.exists():
            logger.warning("%s links to %s, which is not in the repository", page.file.src_uri, match[1])
            return match[0]
        return f"]({_source_page(path)})"

    return _LINK_OUT.sub(replaced, markdown) if _is_in_docs_itself(page.file) else markdown


def _is_in_docs_itself(file: File) -> bool:
    return "/" not in file.src_uri


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Marks each flag that a page names, and links ours to their places in the reference."""
    target = files.get_file_from_path(FLAGS_PAGE)
    if target is None or page.file == target:
        return html
    url = target.url_relative_to(page.file)

    def linked(match: re.Match[str]) -> str:
        if match[2] is None:
            return match[0]
        code = f'<code class="flag">{match[2]}</code>'
        return f'<a href="{url}#{match[3]}">{code}</a>' if match[3] in FLAGS else code

    return _FLAG_OR_SKIPPED.sub(linked, html)


def flags_page() -> str:
    """The reference of every flag, from the config dataclasses and from the commands' own help."""
    return "\n".join(_flags_page())


def _flags_page() -> Iterator[str]:
    yield "# Flags\n"
    yield (
        "Of `lopt-pp train`. Any of them can be written in a YAML file (`lopt-pp train FILE`) under its name without "
        "the dashes; the command line wins.\n"
    )
    for kind in (*COMPONENTS, LaunchConfig):
        yield f"## {kind._argument_group_name}\n"  # type: ignore[attr-defined]
        yield f"{(inspect.getdoc(kind) or '').partition(chr(10) * 2)[0]}\n"
        types_of = typing.get_type_hints(kind)
        for flag in dataclasses.fields(kind):
            yield f"### `--{flag.name}` {{ #{flag.name} }}\n"
            yield f"{_type_text(types_of[flag.name])}{_default_text(flag)}\n"
            yield f"{_as_markdown(flag.metadata['help'])}\n"
    for command in re.findall(r"^  (\w+)  +\S", _help(), re.MULTILINE):
        if command != "train":
            yield f"## lopt-pp {command} {{ #lopt-pp-{command} }}\n\n```text\n{_help(command)}```\n"


def _type_text(kind: Any) -> str:
    if isinstance(kind, types.UnionType):
        return " or ".join(_type_text(part) for part in typing.get_args(kind) if part is not type(None))
    if typing.get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        return f"{_type_text(typing.get_args(kind)[0])}, one or more"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return ", ".join(f"`{member.value}`" for member in kind)
    return {str: "text", int: "whole number", float: "number", bool: "`true` or `false`"}.get(kind, str(kind))


def _default_text(flag: dataclasses.Field) -> str:
    default = flag.default_factory() if flag.default_factory is not dataclasses.MISSING else flag.default
    if default is dataclasses.MISSING:
        return "; required"
    if default in (None, [], ()):
        return ""
    shown = default.value if isinstance(default, Enum) else default
    return f"; default `{str(shown).lower() if isinstance(shown, bool) else shown}`"


def _as_markdown(text: str) -> str:
    """A help text with its flags set as code, and without what Markdown would take for something else."""
    parts = text.split("`")
    for number in range(0, len(parts), 2):
        escaped = parts[number].replace("<", "&lt;").replace("*", "\\*")
        escaped = re.sub(r"docs/([\w-]+)\.md", r"[docs/\1.md](../\1.md)", escaped)
        parts[number] = re.sub(r"(--[a-z_]+)", r"`\1`", escaped)
    return "`".join(parts)


def _help(*command: str) -> str:
    """What a command prints with --help."""
    shown = io.StringIO()
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100"
    try:
        with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
            cli.main([*command, "--help"])
    finally:
        if columns is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns
    return shown.getvalue()


def _source_page(path: Path) -> str:
    return f"source/{path.relative_to(ROOT).as_posix()}.md"


def source_page(path: Path) -> str:
    """A page that shows a file of the repository, or lists what a directory has."""
    name = path.relative_to(ROOT).as_posix()
    head = f"---\nsearch:\n  exclude: true\n---\n\n# {name}\n\n"
    if path.is_dir():
        names = (file.relative_to(path).as_posix() for file in _files_of(path))
        return head + "".join(f"- [{name}]({path.name}/{name}.md)\n" for name in names)
    language = {".py": "python", ".sh": "bash", ".sbatch": "bash", ".yaml": "yaml", ".yml": "yaml"}
    fence = "`" * 5
    return f"{head}{fence}{language.get(path.suffix, 'text')}\n{path.read_text('utf-8')}\n{fence}\n"


def _files_of(directory: Path) -> Iterable[Path]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return sorted(path for path in files if "__pycache__" not in path.parts)
