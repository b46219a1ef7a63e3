"""What became of a different tool's config: our values, and what is said of its other keys."""

import json
from dataclasses import dataclass, field
from typing import Any

from llmtune.io.fingerprint import JsonObject
from llmtune.io.foreign import ForeignTool


@dataclass
class Imported:
    """Our keys with where they are from, and what is to be said of the others."""

    tool: ForeignTool
    values: dict[str, Any] = field(default_factory=dict)
    """Dotted key -> value, in the order of writing."""
    origins: dict[str, str] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)
    """What means something else here."""
    missing: list[str] = field(default_factory=list)
    """What has no counterpart."""
    skipped: list[str] = field(default_factory=list)
    """What needs none."""

    def put(self, key: str, value: Any, origin: str) -> None:
        """Set one of our keys."""
        self.values[key], self.origins[key] = value, origin

    def tree(self) -> JsonObject:
        """Return the values as nested mappings."""
        found: dict[str, Any] = {}
        for key, value in self.values.items():
            holder = found
            *parents, name = key.split(".")
            for parent in parents:
                holder = holder.setdefault(parent, {})
            holder[name] = value
        return found

    def render(self, source: str) -> str:
        """Return our YAML, a comment behind each key that says which of theirs it is from."""
        lines = [f"# Imported from {source}, {self.tool.title}."]
        sections: dict[str, list[str]] = {}
        for key, value in self.values.items():
            section, _, name = key.partition(".")
            text = json.dumps(value, ensure_ascii=False)
            line = f"{name or section}: {text}   # {self.origins[key]}"
            if name and "." in name:
                head, _, rest = name.partition(".")
                line = f"{head}: {{{rest}: {text}}}   # {self.origins[key]}"
            sections.setdefault(section, []).append(f"  {line}" if name else line)
        for section, body in sections.items():
            lines += ["", *body] if not body[0].startswith(" ") else ["", f"{section}:", *body]
        for title, found in self._said():
            lines += ["", f"# {title}:", *(f"#   {each}" for each in found)]
        return "\n".join(lines) + "\n"

    def describe(self) -> list[str]:
        """Return what a user should know, a line each."""
        return [
            line
            for title, found in self._said()
            for line in (f"{title}:", *(f"  {each}" for each in found))
        ]

    def _said(self) -> list[tuple[str, list[str]]]:
        titles = ("means something else here", "has no counterpart", "needs none")
        found = (self.changed, self.missing, self.skipped)
        return [(title, said) for title, said in zip(titles, found, strict=True) if said]
