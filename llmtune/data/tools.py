"""Tool calls and tool schemas as rows hold them: objects, or JSON text of objects."""

import json
import math
from collections.abc import Mapping
from typing import Any

from llmtune.data.problems import RowError, shorten
from llmtune.data.row_values import check_text, json_reason, parse_json, parse_json_text

MAX_DEPTH = 100
"""Levels of nesting in tool schemas and arguments; templates recurse into them."""


def read_tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Return the tool calls of a message, each with its arguments parsed."""
    value = parse_json_text(value, f"{where}: tool_calls")
    if not isinstance(value, list):
        raise RowError(f"{where}: tool_calls is {shorten(value)}; expected a list", "tool-call")
    return [_read_tool_call(call, where) for call in value]


def _read_tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowError(
            f"{where}: tool call {shorten(call)} has no function name; expected "
            '{"function": {"name": ..., "arguments": {...}}}',
            "tool-call",
        )
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise RowError(
                f"{where}: the arguments of {function['name']} are not JSON "
                f"({json_reason(error)}): {shorten(function['arguments'])}",
                "tool-call",
            ) from None
    if not isinstance(arguments, Mapping):
        raise RowError(
            f"{where}: the arguments of {function['name']} are {shorten(arguments)}; expected an "
            "object",
            "tool-call",
        )
    function = {"name": function["name"], "arguments": dict(arguments)}
    _check_json(arguments, f"{where}: the arguments of {function['name']}")
    check_text(json.dumps(function, ensure_ascii=False), f"{where}: tool call")
    call_id = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {"type": "function", **call_id, "function": function}


def read_tools(value: Any) -> list[dict[str, Any]] | None:
    """Return the tool schemas of a row, or None if it has none."""
    value = parse_json_text(value, "tools")
    if value is None or value == [] or value == "":
        return None
    if not isinstance(value, list):
        raise RowError(f"tools is {shorten(value)}; expected a list of JSON schemas", "tools")
    for tool in value:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowError(
                f"tools holds {shorten(tool)}; expected "
                '{"type": "function", "function": {"name": ..., "parameters": ...}}',
                "tools",
            )
        _check_json(tool, f"tools: the schemas of {function['name']}")
    return [dict(tool) for tool in value]


def _check_json(value: Any, where: str, depth: int = 0) -> None:
    """Refuse what a template cannot print as JSON: NaN, and nesting without end."""
    if isinstance(value, float) and not math.isfinite(value):
        raise RowError(f"{where} hold {value}, which is not a JSON value", "tools")
    if depth > MAX_DEPTH:
        raise RowError(f"{where} are nested more than {MAX_DEPTH} levels deep", "tools")
    children = value.values() if isinstance(value, Mapping) else value
    if isinstance(value, Mapping | list):
        for child in children:
            _check_json(child, where, depth + 1)
