"""The YAML file of a run, read so that every value means what it looks like.

YAML 1.1, which PyYAML reads, makes 8 of `010`, 5400 of `1:30:00`, false of `no` and a date of `2024-01-01`. Here such
words stay the words that they are, as in YAML 1.2, and the flag reads them as it would on the command line.
"""

import os
import re
from pathlib import Path
from typing import Any

import yaml

from lopt_pp.errors import LoptError, shown


class _Loader(yaml.SafeLoader):
    """Plain words are null, booleans and decimal numbers only where nothing else could be meant."""

    yaml_implicit_resolvers: dict[str, Any] = {}


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|None|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:(?:0|[1-9][0-9]*)\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Reads a file of flags.

    Returns:
        The flags with their values, None where one has `null`, `~`, `None` or nothing; and the environment variables
        below `env`, each as it is written.

    Raises:
        LoptError: the file cannot be read, is not a mapping, or has a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise LoptError(f"--config {path} does not exist") from None
    except IsADirectoryError:
        raise LoptError(f"--config {path} is a directory; give a YAML file") from None
    except OSError as error:
        raise LoptError(f"--config {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise LoptError(f"--config {path}: {error}") from error
    try:
        content, nodes = _load(path, text)
    except LoptError:
        raise
    except Exception as error:  # Besides YAMLError, whatever a malformed tag makes of a value: there is no list of it.
        # The library calls every text "<unicode string>".
        said = " ".join(str(error).split()).replace(' in "<unicode string>",', ",")
        raise LoptError(f"--config {path} is not YAML: {said}") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise LoptError(f"--config {path}: expected lines of the form 'flag: value'")
    if content.pop("env", None) is None:
        return content, {}
    return content, _environment(path, nodes["env"])


def _load(path: Path, text: str) -> tuple[Any, dict[str, yaml.Node]]:
    """The content, and the node that each of its values was made of."""
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None, {}
        # Before anything is made of it: keys that are merged in (`<<`) may be given anew.
        _check_keys(path, root)
        content = loader.construct_document(root)
        pairs = root.value if isinstance(root, yaml.MappingNode) else []
        return content, {key.value: value for key, value in pairs if isinstance(key, yaml.ScalarNode)}
    finally:
        loader.dispose()


def _check_keys(path: Path, node: yaml.Node, within: str = "") -> None:
    """Raises LoptError where a mapping, or its `env`, has a key twice: YAML would take the last without a word."""
    lines: dict[str, int] = {}
    for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
        if not isinstance(key, yaml.ScalarNode):
            continue
        line = key.start_mark.line + 1
        if key.value in lines:
            raise LoptError(
                f"--config {path}, line {line}: {within}{shown(key.value)} is given in line {lines[key.value]} already"
            )
        lines[key.value] = line
        if key.value == "env" and not within:
            _check_keys(path, value, "env: ")


def _environment(path: Path, node: yaml.Node) -> dict[str, str]:
    if not isinstance(node, yaml.MappingNode) or not all(
        isinstance(part, yaml.ScalarNode) for pair in node.value for part in pair
    ):
        raise LoptError(f"--config {path}: env: expected lines of the form 'NAME: value' below it")
    environment = {}
    for key, value in node.value:
        if value.tag == "tag:yaml.org,2002:null":
            raise LoptError(f"--config {path}: env: {shown(key.value)} has no value; '' is an empty one")
        environment[key.value] = os.path.expanduser(value.value) if value.value.startswith("~/") else value.value
    return environment
