"""Jinja templates of other people, bounded: what a template makes, how often it loops, how long.

Two nested ranges, `'a' * 10**10`, `'%1000000000d' % 1`, or a text that doubles itself would take
all memory or forever. `bound_template` rewrites a parsed template so that what can grow passes a
function of `io.template_guards`; the rest of the template, its environment and what it prints stay
as they are.
"""

from jinja2 import Environment, TemplateSyntaxError, nodes
from jinja2.visitor import NodeTransformer

from llmtune.io.template_guards import TemplateTooLarge

MOST_SOURCE = 1 << 20
"""The longest template published has about 30,000 characters."""

GUARDS = "llmtune.io.template_guards"
KEEPING = {"string", "upper", "lower", "title", "capitalize", "trim", "striptags", "wordcount"}
"""Filters that make a text of what they are given, and hardly a longer one."""
PRINTING = {
    *("tojson", "pprint", "urlencode", "xmlattr", "escape", "e", "forceescape", "urlize"),
    *("center", "indent", "wordwrap", "truncate", "safe"),
}
"""Filters that make a longer text of it."""
REPLACED = {"join": "joined", "replace": "replaced", "format": "formatted", "sum": "summed"}
"""Filters whose result can be far larger than what they are given, and what replaces them."""


def bound_template(environment: Environment, source: str) -> nodes.Template:
    """Return the parsed template, all that can grow bounded, to render in `bounded_work`.

    Raises:
        TemplateTooLarge: the template itself is too long.
        TemplateSyntaxError: it is not a template, it loads other ones, or it filters a block in a
            way that cannot be bounded.
    """
    if len(source) > MOST_SOURCE:
        raise TemplateTooLarge(f"it has {len(source):,} characters, more than {MOST_SOURCE:,}")
    bounded: nodes.Template = _Bounder().visit(environment.parse(source))
    bounded.set_environment(environment)
    return bounded


class _Bounder(NodeTransformer):
    """Puts the functions below around the expressions of a template."""

    def visit_Add(self, node: nodes.Add) -> nodes.Expr:
        parts: list[nodes.Expr] = []
        left: nodes.Expr = node
        while isinstance(left, nodes.Add):
            parts.append(left.right)
            left = left.left
        return _call("added", *map(self.visit, [left, *reversed(parts)]))

    def visit_Mul(self, node: nodes.Mul) -> nodes.Expr:
        return _call("multiplied", *self._both(node))

    def visit_Pow(self, node: nodes.Pow) -> nodes.Expr:
        return _call("raised", *self._both(node))

    def visit_Mod(self, node: nodes.Mod) -> nodes.Expr:
        return _call("remainder", *self._both(node))

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        node.nodes = [self._printed(one) for one in node.nodes]
        return _call("made", node)

    def visit_Output(self, node: nodes.Output) -> nodes.Output:
        node.nodes = [
            one if isinstance(one, nodes.TemplateData) else self._printed(one) for one in node.nodes
        ]
        return node

    def visit_List(self, node: nodes.List) -> nodes.Expr:
        self.generic_visit(node)
        return _call("held", node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        self.generic_visit(node)
        return node if node.ctx != "load" else _call("held", node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Expr:
        self.generic_visit(node)
        return _call("held", node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        return _call("made", node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Call(self, node: nodes.Call) -> nodes.Expr:
        return _call("held", self._visit_call(node))

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.CallBlock:
        call = self._visit_call(node.call)
        node.body = self._body(node.body)
        node.call = call
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:
        node.defaults = [self.visit(one) for one in node.defaults]
        node.body = self._body(node.body)
        return node

    def visit_For(self, node: nodes.For) -> nodes.For:
        node.iter = self.visit(node.iter)
        if node.test is not None:
            node.test = nodes.And(_call("stepped"), self.visit(node.test))
        node.body = self._body(node.body)
        node.else_ = [self.visit(one) for one in node.else_]
        return node

    def visit_Filter(self, node: nodes.Filter) -> nodes.Expr:
        assert node.node is not None
        is_printing = node.name in PRINTING or node.name in KEEPING
        inner = self._printed(node.node) if is_printing else self.visit(node.node)
        node.node = inner
        node.args = [self.visit(one) for one in node.args]
        for pair in node.kwargs:
            pair.value = self.visit(pair.value)
        if node.name in REPLACED:
            return self._replaced(node, inner)
        node.args = [_call("small", one) for one in node.args]
        for pair in node.kwargs:
            pair.value = _call("small", pair.value)
        return node if node.name in KEEPING else _call("made", node)

    def visit_FilterBlock(self, node: nodes.FilterBlock) -> nodes.FilterBlock:
        self._bound_block_filter(node.filter)
        node.body = [self.visit(one) for one in node.body]
        return node

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.AssignBlock:
        self._bound_block_filter(node.filter)
        node.body = [self.visit(one) for one in node.body]
        return node

    def visit_Include(self, node: nodes.Node) -> nodes.Node:
        raise TemplateSyntaxError("it loads another template", node.lineno)

    visit_Import = visit_FromImport = visit_Extends = visit_Include

    def _replaced(self, node: nodes.Filter, inner: nodes.Expr) -> nodes.Expr:
        """Stand a function in for a filter; an `attribute` is taken by a map before it."""
        kwargs = list(node.kwargs)
        place = {"join": 1, "sum": 0}.get(node.name)
        attribute = next((pair.value for pair in kwargs if pair.key == "attribute"), None)
        args = list(node.args)
        if attribute is None and place is not None and len(args) > place:
            attribute = args.pop(place)
        if attribute is not None and place is not None:
            named = [nodes.Keyword("attribute", attribute)]
            inner = nodes.Filter(inner, "map", [], named, None, None)
            kwargs = [pair for pair in kwargs if pair.key != "attribute"]
        function = nodes.ImportedName(f"{GUARDS}.{REPLACED[node.name]}")
        return nodes.Call(function, [inner, *args], kwargs, node.dyn_args, node.dyn_kwargs)

    def _bound_block_filter(self, outer: nodes.Filter | None) -> None:
        """Bound a block's filters in their places; their arguments are what can grow it."""
        node: nodes.Expr | None = outer
        while isinstance(node, nodes.Filter):
            if node.name in REPLACED:
                raise TemplateSyntaxError(f"a block is filtered by {node.name!r}", node.lineno)
            node.args = [_call("small", self.visit(one)) for one in node.args]
            for pair in node.kwargs:
                pair.value = _call("small", self.visit(pair.value))
            node = node.node

    def _visit_call(self, node: nodes.Call) -> nodes.Call:
        self.generic_visit(node)
        node.node = _call("called", node.node)
        return node

    def _both(self, node: nodes.BinExpr) -> tuple[nodes.Expr, nodes.Expr]:
        return self.visit(node.left), self.visit(node.right)

    def _printed(self, node: nodes.Expr) -> nodes.Expr:
        if isinstance(node, nodes.Const):
            return node
        is_text = isinstance(node, nodes.Add | nodes.Concat) and any(
            isinstance(part, nodes.Const) and isinstance(part.value, str)
            for part in node.iter_child_nodes()
        )
        return self.visit(node) if is_text else _call("printed", self.visit(node))

    def _body(self, body: list[nodes.Node]) -> list[nodes.Node]:
        """Count a turn, and the text that is in the body itself."""
        size = sum(len(data.data) for one in body for data in one.find_all(nodes.TemplateData))
        visited = [self.visit(one) for one in body]
        return [nodes.ExprStmt(_call("stepped", nodes.Const(size))), *visited]


def _call(name: str, *arguments: nodes.Expr) -> nodes.Expr:
    return nodes.Call(nodes.ImportedName(f"{GUARDS}.{name}"), list(arguments), [], None, None)
