"""Proof that a chat template only prints messages' contents and never decides by them.

Then two chats with the same roles are rendered alike, contents aside, and one rendering with
placeholders tells where every other chat of these roles has its turns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

Kind = Literal["list", "message", "content", "other"]
"""What a value is: the messages, one message, text that holds a content, or neither."""

KEPT_BY = {"trim", "string"}
"""Filters that print a content without outer spaces as it is."""
TYPE_TESTS = {"defined", "undefined", "none", "string", "mapping", "iterable", "sequence"}
"""Tests that have the same answer for every text."""


class _UnprovableError(Exception):
    """The template does something with a content that this proof does not follow."""


def prints_contents_only(template: str) -> bool:
    """Say whether `template` can be shown to print contents without looking into them.

    The proof follows values through assignments, loops and filters and does not care for the
    order of statements, so it says False for some templates that are fine; never True for one
    that is not.
    """
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols", _Generation])
    try:
        tree = environment.parse(template)
        kinds: dict[str, Kind] = {"messages": "list"}
        while True:  # kinds only grow, so this ends
            before = dict(kinds)
            _Prover(kinds).visit(tree)
            if kinds == before:
                return True
    except (_UnprovableError, jinja2.TemplateSyntaxError, RecursionError):
        return False


class _Generation(Extension):
    """Reads `{% generation %}` blocks, as the Hugging Face templates have them."""

    tags = {"generation"}  # noqa: RUF012 (how jinja declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Prover:
    """Walks a template's tree with what is known of its names."""

    def __init__(self, kinds: dict[str, Kind]) -> None:
        self.kinds = kinds

    def visit(self, node: nodes.Node) -> None:
        if isinstance(node, nodes.For):
            self._visit_for(node)
        elif isinstance(node, nodes.If):
            self._refuse_deciding(node.test)
            self._visit_all(node.iter_child_nodes(exclude=("test",)))
        elif isinstance(node, nodes.Assign):
            self._assign(node.target, self.kind(node.node))
        elif isinstance(node, nodes.Output):
            for part in node.nodes:
                if self.kind(part) in ("list", "message"):
                    raise _UnprovableError
        elif isinstance(
            node, nodes.Macro | nodes.CallBlock | nodes.FilterBlock | nodes.AssignBlock
        ):
            if any(self._mentions(child) for child in node.iter_child_nodes()):
                raise _UnprovableError
        elif isinstance(node, nodes.Template | nodes.Scope | nodes.Break | nodes.Continue):
            self._visit_all(node.iter_child_nodes())
        elif isinstance(node, nodes.Expr | nodes.ExprStmt):
            if self.kind(node.node if isinstance(node, nodes.ExprStmt) else node) != "other":
                raise _UnprovableError
        else:
            raise _UnprovableError

    def _visit_all(self, children: Iterator[nodes.Node]) -> None:
        for child in children:
            self.visit(child)

    def _visit_for(self, node: nodes.For) -> None:
        kind = self.kind(node.iter)
        if kind in ("content", "message") or node.recursive:
            raise _UnprovableError
        self._assign(node.target, "message" if kind == "list" else "other")
        if node.test is not None:
            self._refuse_deciding(node.test)
        self._visit_all(iter([*node.body, *node.else_]))

    def _assign(self, target: nodes.Node, kind: Kind) -> None:
        if isinstance(target, nodes.Tuple):
            if kind != "other":
                raise _UnprovableError
            for item in target.items:
                self._assign(item, "other")
            return
        if isinstance(target, nodes.NSRef):
            name = f"{target.name}.{target.attr}"
        elif isinstance(target, nodes.Name):
            name = target.name
        else:
            raise _UnprovableError
        self.kinds[name] = _join(self.kinds.get(name, "other"), kind)

    def _refuse_deciding(self, test: nodes.Node) -> None:
        if self.kind(test) != "other":
            raise _UnprovableError

    def kind(self, node: nodes.Node) -> Kind:
        """Return what the expression is, or raise where a content decides something."""
        if isinstance(node, nodes.Const | nodes.TemplateData):
            return "other"
        if isinstance(node, nodes.Name):
            self._refuse_carrier(node.name)
            return self.kinds.get(node.name, "other")
        if isinstance(node, nodes.Getattr | nodes.Getitem):
            return self._kind_of_member(node)
        if isinstance(node, nodes.Filter):
            return self._kind_of_filter(node)
        if isinstance(node, nodes.Add | nodes.Concat):
            parts = node.nodes if isinstance(node, nodes.Concat) else [node.left, node.right]
            kinds = [self.kind(part) for part in parts]
            if "message" in kinds:
                raise _UnprovableError
            return "list" if "list" in kinds else "content" if "content" in kinds else "other"
        if isinstance(node, nodes.CondExpr):
            self._refuse_deciding(node.test)
            other = self.kind(node.expr2) if node.expr2 is not None else "other"
            return _join(self.kind(node.expr1), other)
        if isinstance(node, nodes.Test):
            if self.kind(node.node) != "other" and node.name not in TYPE_TESTS:
                raise _UnprovableError
            return "other"
        if isinstance(node, nodes.Compare):
            return self._kind_of_compare(node)
        if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr | nodes.Getitem):
            self._refuse_deciding(node.node.node)  # message.get(...), content.split(...)
        if any(self.kind(child) != "other" for child in node.iter_child_nodes(exclude=("ctx",))
               if isinstance(child, nodes.Expr | nodes.Helper)):  # fmt: skip
            raise _UnprovableError
        return "other"

    def _kind_of_member(self, node: nodes.Getattr | nodes.Getitem) -> Kind:
        name: object = None
        if isinstance(node, nodes.Getattr):
            name = node.attr
        elif isinstance(node.arg, nodes.Const):
            name = node.arg.value
        elif isinstance(node.arg, nodes.Slice):
            if self.kind(node.node) not in ("list", "other"):
                raise _UnprovableError
            return self.kind(node.node)
        else:
            self._refuse_deciding(node.arg)
        if isinstance(node.node, nodes.Name):
            if node.node.name == "loop":
                if name in ("changed", "cycle"):
                    raise _UnprovableError
                return "message" if name in ("previtem", "nextitem") else "other"
            if f"{node.node.name}.{name}" in self.kinds:
                return self.kinds[f"{node.node.name}.{name}"]
        owner = self.kind(node.node)
        if owner == "list":
            if isinstance(node, nodes.Getattr):
                raise _UnprovableError
            return "message"
        if owner == "message":
            if not isinstance(name, str):
                raise _UnprovableError
            return "content" if name == "content" else "other"
        if owner == "content":
            raise _UnprovableError
        return "other"

    def _refuse_carrier(self, name: str) -> None:
        """Refuse a namespace as a whole where one of its members comes from the messages."""
        if name == "loop" or any(
            kind != "other" and member.startswith(f"{name}.") for member, kind in self.kinds.items()
        ):
            raise _UnprovableError

    def _kind_of_filter(self, node: nodes.Filter) -> Kind:
        if node.node is None:
            raise _UnprovableError
        kind = self.kind(node.node)
        if any(self.kind(argument) != "other" for argument in node.args):
            raise _UnprovableError
        if kind == "other" or (kind == "content" and node.name in KEPT_BY and not node.args):
            return kind
        if kind == "list" and node.name in ("length", "count"):
            return "other"
        if kind == "list" and node.name in ("first", "last"):
            return "message"
        if kind == "list" and node.name == "list":
            return "list"
        raise _UnprovableError

    def _kind_of_compare(self, node: nodes.Compare) -> Kind:
        """Allow `'tool_calls' in message`: which keys a message has is not content."""
        kinds = [self.kind(operand.expr) for operand in node.ops]
        is_key_test = (
            len(node.ops) == 1
            and node.ops[0].op in ("in", "notin")
            and isinstance(node.expr, nodes.Const)
            and kinds == ["message"]
        )
        if not is_key_test and (self.kind(node.expr) != "other" or set(kinds) != {"other"}):
            raise _UnprovableError
        return "other"

    def _mentions(self, node: nodes.Node) -> bool:
        """Say whether anything below `node` touches the messages or what came from them."""
        names = [node] if isinstance(node, nodes.Name) else []
        names += list(node.find_all(nodes.Name))
        known = {name.split(".")[0] for name, kind in self.kinds.items() if kind != "other"}
        return any(name.name in known for name in names)


def _join(one: Kind, other: Kind) -> Kind:
    """Return a kind that covers both; a name that is sometimes a list and sometimes not fails."""
    if one == other or other == "other":
        return one
    if one == "other":
        return other
    raise _UnprovableError
