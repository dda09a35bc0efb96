"""Strategies for fuzz tests: values of every kind, and documents and bytes that are almost right."""

import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

HUGE = [2**31, 2**63 - 1, 2**63, -(2**63) - 1, 2**64, 10**30, 10**400]

JUNK: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 1, *HUGE])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["", "\0", "\n", "é", "../x", "/", "a" * 300, "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
"""Whatever JSON can say."""

DEEP = "[" * 100_000
"""JSON and YAML that lies deeper in itself than any stack is."""


def share(of: int) -> settings:
    """A share of the examples that the profile asks for, for tests whose examples take long."""
    return settings(max_examples=max(1, settings.get_profile(settings.get_current_profile_name()).max_examples // of))


@st.composite
def documents(draw: st.DrawFn, document: Any, values: st.SearchStrategy[Any] = JUNK) -> Any:
    """A JSON document with none to three changes: a value that is another or gone, or one more.

    Args:
        document: to start from.
        values: what new ones are taken from.
    """
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(0, 3))):
        places = list(_places(document))
        container, key = draw(st.sampled_from(places))
        change = draw(st.sampled_from(["replace", "remove", "add"]))
        if change == "replace":
            container[key] = copy.deepcopy(draw(values))
        elif change == "remove":
            del container[key]
        elif isinstance(container, list):
            container.insert(key, copy.deepcopy(draw(values)))
        else:
            name = draw(st.text(max_size=8) | st.sampled_from([key, key + "x"]))
            container[name] = copy.deepcopy(draw(values))
        if not list(_places(document)):
            break
    return document


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every list and object in a document, with each of its indices or keys."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in list(items):
        yield value, key
        yield from _places(child)


@st.composite
def contents(draw: st.DrawFn, whole: bytes) -> bytes:
    """The bytes of a file, cut, overwritten or lengthened somewhere, or others altogether."""
    place = draw(st.integers(0, len(whole)))
    some = draw(st.binary(max_size=16))
    kind = draw(st.sampled_from(["whole", "cut", "overwritten", "longer", "other"]))
    return {
        "whole": whole,
        "cut": whole[:place],
        "overwritten": whole[:place] + some + whole[place + len(some) :],
        "longer": whole[:place] + some + whole[place:],
        "other": some,
    }[kind]


def json_files(document: Any, values: st.SearchStrategy[Any] = JUNK) -> st.SearchStrategy[bytes]:
    """Files that are almost the document: JSON that says something else, or no JSON at all."""
    changed = documents(document, values).map(lambda other: json.dumps(other).encode())
    repeated = documents(document, values).map(lambda other: _repeat_keys(document, other).encode())
    return changed | repeated | contents(json.dumps(document).encode())


def _repeat_keys(document: dict[str, Any], other: Any) -> str:
    """An object in which keys occur twice."""
    return json.dumps(document)[:-1] + ', "more": 0, ' + json.dumps(other if isinstance(other, dict) else {"x": 0})[1:]
