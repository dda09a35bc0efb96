"""The tools of a row, as chat templates expect them."""

import json
from typing import Any

from lopt_pp.data.messages import without_nulls
from lopt_pp.errors import LoptError, shown_with_type


def read_tools(given: Any, column: str, are_bare: bool) -> list[Any]:
    """The tools of a row; nulls stay in what is JSON text, for no table has filled them in there.

    Args:
        given: what the row has: a list, or JSON of one; tools in it may be JSON, too. None where it has none.
        column: that holds them, for errors.
        are_bare: whether they may be written without what chat templates expect around them.

    Raises:
        LoptError: they are something else.
    """
    tools = given
    try:
        tools = json.loads(tools.strip() or "[]") if isinstance(tools, str) else without_nulls(tools)
        if isinstance(tools, list):
            tools = [json.loads(tool) if isinstance(tool, str) else tool for tool in tools]
    except (ValueError, RecursionError) as error:
        raise LoptError(f"`{column}` must be a list or JSON of one, but is {shown_with_type(tools)}") from error
    if tools and not isinstance(tools, list):
        raise LoptError(f"`{column}` must be a list or JSON of one, but is {shown_with_type(tools)}")
    return [_wrapped(tool) if are_bare else tool for tool in tools or ()]


def _wrapped(tool: Any) -> Any:
    if not isinstance(tool, dict) or "function" in tool or "name" not in tool:
        return tool
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}
