"""What reaches into private parts of libraries is in one file per library, each item with its reason.

That the items still work is seen in `test_compat_*.py`.
"""

import ast
import importlib
import pkgutil
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

import lopt_pp
from lopt_pp.util import compat_datasets, compat_torch, compat_transformers
from lopt_pp.util.patching import replaced

PACKAGE = Path(lopt_pp.__file__).parent
ONE_FILE = {
    "torch": "util/compat_torch.py",
    "transformers": "util/compat_transformers.py",
    "datasets": "util/compat_datasets.py",
    "argparse": "config/arguments.py",
}
"""Where each library is reached into. A parser and its help are what config/arguments.py is about."""

DOCUMENTED = {"os._exit"}
"""Of Python's own, with an underscore and in its documentation."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own_names(tree: ast.AST) -> set[str]:
    """What a file itself defines: functions, classes, variables, attributes of `self`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
            names.add(node.attr)
    return names


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def reaches(source: str) -> Iterator[str]:
    """What a file has of private names of others, and of patches, as `line: code`."""
    tree = ast.parse(source)
    own = own_names(tree)
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name) if is_private(name) and name not in own:
                found = ast.unparse(node) not in DOCUMENTED
            case ast.Attribute(value=owner, attr=name, ctx=ast.Store() | ast.Del()):
                found = not _is_self(owner) and (name == "forward" or name.startswith("__"))
            case ast.Attribute(attr="register_at_fork"):
                found = True
            case ast.Import(names=aliases):
                found = any(part.startswith("_") or part == "mock" for a in aliases for part in a.name.split("."))
            case ast.ImportFrom(module=module, names=aliases):
                parts = [*(module or "").split("."), *(alias.name for alias in aliases)]
                found = module != "__future__" and any(
                    part.startswith("_") or part in ("mock", "replaced", "register_at_fork") for part in parts
                )
            case ast.keyword(arg=str(name)):
                found = is_private(name)
            case ast.Call(func=ast.Name(id="getattr" | "setattr" | "hasattr" | "delattr"), args=[_, name, *_]):
                found = isinstance(name, ast.Constant) and is_private(str(name.value)) and name.value not in own
            case ast.Dict(keys=keys):
                found = any(isinstance(key, ast.Constant) and is_private(str(key.value)) for key in keys)
            case _:
                continue
        if found:
            yield f"{getattr(node, 'lineno', 0)}: {ast.unparse(node)}"


@pytest.mark.parametrize(
    "line",
    [
        "from unittest import mock",
        "import unittest.mock",
        "from torch._subclasses import FakeTensorMode",
        "from torch.utils import _pytree",
        "import torch._dynamo",
        "from lopt_pp.model.pretrained import _quiet",
        "storage._cdata",
        "parser._actions.clear()",
        "self._buffers",
        "super()._get_help_string(action)",
        "getattr(function, '_schema')",
        "setattr(config, '_attn_implementation', 'sdpa')",
        "cached_file(path, _raise=False)",
        "layer.forward = lambda x: x",
        "del layer.forward",
        "Block.__module__ = 'transformers'",
        "os.register_at_fork(after_in_child=print)",
        "schedule.load_state_dict({'_step_count': 1})",
        "from lopt_pp.util.patching import replaced",
    ],
)
def test_what_is_looked_for_is_found(line: str) -> None:
    assert list(reaches(line)) != []


@pytest.mark.parametrize(
    "code",
    [
        "from __future__ import annotations",
        "os._exit(1)",
        "type(error).__name__",
        "class A:\n    def b(self, other):\n        self._c = self.forward = 1\n        return other._c",
        "_x = 1\nmodule._x",
    ],
)
def test_what_is_a_files_own_is_not(code: str) -> None:
    assert list(reaches(code)) == []


def test_private_parts_of_libraries_are_reached_into_in_one_file_each() -> None:
    found = {
        f"lopt_pp/{name}:{line}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if (name := path.relative_to(PACKAGE).as_posix()) not in ONE_FILE.values()
        for line in reaches(path.read_text(encoding="utf-8"))
    }
    assert not found, f"these belong into {', '.join(ONE_FILE.values())}, each with its reason: {sorted(found)}"


def test_no_class_overrides_a_private_method_of_a_library() -> None:
    found = []
    for module in pkgutil.walk_packages(lopt_pp.__path__, "lopt_pp."):
        if module.name == "lopt_pp.config.arguments":
            continue
        for own in vars(importlib.import_module(module.name)).values():
            if not isinstance(own, type) or own.__module__ != module.name or issubclass(own, Enum):
                continue
            bases = [base for base in own.__mro__ if not base.__module__.startswith("lopt_pp.")]
            for name, value in vars(own).items():
                if isinstance(value, FunctionType | property) and is_private(name):
                    found += [f"{module.name}.{own.__name__}.{name}" for base in bases if name in vars(base)]
    assert not found


@pytest.mark.parametrize("module", [compat_torch, compat_transformers, compat_datasets], ids=lambda m: m.__name__)
def test_each_item_says_why_and_where_it_was_seen_to_work(module: Any) -> None:
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    items = {
        node.name: ast.get_docstring(node) or ""
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    }
    lacking = [name for name, text in items.items() if "Seen in" not in text and "the versions" not in text]
    assert items and not lacking


def test_a_patch_is_taken_back_and_refuses_what_is_not_there() -> None:
    class Base:
        value = 1

    class Own(Base):
        other = 2

    given = Own()
    for owner, name in ((given, "value"), (Own, "value"), (Own, "other"), (Base, "value")):
        before = dict(vars(owner))
        with pytest.raises(KeyError), replaced(owner, name, 3):
            assert getattr(owner, name) == 3
            raise KeyError
        assert dict(vars(owner)) == before
    with pytest.raises(AttributeError), replaced(given, "absent", 3):
        pass
