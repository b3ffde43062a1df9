"""Small faults of a module: one comparison, sign, constant, name, argument or statement changed at a time.

Left alone are docstrings, annotations, decorators, type aliases, imports, and what an error says: no behaviour hangs on
them. So is a keyword argument that a function of the module itself requires, since without it nothing runs at all.
"""

from __future__ import annotations

import ast
import builtins
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import CodeType

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
PAIRS = (
    ("min", "max"),
    ("minimum", "maximum"),
    ("amin", "amax"),
    ("argmin", "argmax"),
    ("sum", "mean"),
    ("any", "all"),
    ("and_", "or_"),
    ("ones", "zeros"),
    ("ones_like", "zeros_like"),
)
SWAPS = {one: other for pair in PAIRS for one, other in (pair, pair[::-1])}
MESSAGES = ("reason",)  # keyword arguments that hold a sentence for people
EVERYWHERE = range(0)  # the lines of what runs when the module is loaded


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """One change: in `field` of `parent` (at `place`, where that is a list) stands `new`, or nothing."""

    operator: str
    parent: ast.AST
    field: str
    place: int | None
    new: ast.AST | None
    lines: range
    """Of which one at least has to run for the change to matter; EVERYWHERE if a test is not to be told by lines."""
    number: int
    line: str
    """The text of its line, by which an argument about it is found again."""
    change: str

    @property
    def key(self) -> tuple[str, str]:
        return self.line, self.change


class Module:
    """A module's syntax tree and its mutants, in the order of the source."""

    def __init__(self, source: str) -> None:
        self.tree = ast.parse(source)
        self.lines = source.splitlines()
        self._required = _required_keywords(self.tree)
        self._running = EVERYWHERE  # the lines of the statement that is looked at
        found = sorted(self._body(self.tree, in_function=False), key=lambda mutant: mutant.number)
        seen = Counter[tuple[str, str]]()
        self.mutants = list[Mutant]()
        for mutant in found:
            seen[mutant.key] += 1
            again = f" ({seen[mutant.key]})" if seen[mutant.key] > 1 else ""
            self.mutants.append(replace(mutant, change=mutant.change + again))

    def compiled(self, mutant: Mutant | None, path: str) -> CodeType:
        """The module's code, with the change made."""
        if mutant is None:
            return compile(self.tree, path, "exec")
        with_it, without = _fields(mutant)
        setattr(mutant.parent, mutant.field, with_it)
        try:
            return compile(ast.fix_missing_locations(self.tree), path, "exec")
        finally:
            setattr(mutant.parent, mutant.field, without)

    # Statements.

    def _body(self, parent: ast.AST, *, in_function: bool, field: str = "body") -> Iterator[Mutant]:
        for place, statement in enumerate(getattr(parent, field)):
            if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):  # a docstring
                yield from self._statement(statement, parent, field, place, in_function)

    def _statement(
        self, node: ast.stmt, parent: ast.AST, field: str, place: int, in_function: bool
    ) -> Iterator[Mutant]:
        if isinstance(node, ast.FunctionDef):
            self._running = range(node.body[0].lineno, (node.end_lineno or node.lineno) + 1)
            yield from self._inside(node.args, ("defaults", "kw_defaults"))
            yield from self._body(node, in_function=True)
            return
        if isinstance(node, ast.ClassDef):
            yield from self._body(node, in_function=in_function)
            return
        body = getattr(node, "body", None)
        end = body[0].lineno - 1 if body else node.end_lineno or node.lineno
        self._running = range(node.lineno, max(end, node.lineno) + 1) if in_function else EVERYWHERE
        if in_function and _removable(node):
            yield self._mutant("statement", node, parent, field, place, ast.Pass())
        if isinstance(node, ast.Raise | ast.Import | ast.ImportFrom) or (not in_function and _is_alias(node)):
            return
        if isinstance(node, ast.If | ast.While) and _negatable(node.test):
            yield self._mutant("condition", node.test, node, "test", None, _negated(node.test))
        if isinstance(node, ast.AugAssign) and type(node.op) in ARITHMETIC:
            new = ast.AugAssign(node.target, ARITHMETIC[type(node.op)](), node.value)
            yield self._mutant("arithmetic", node, parent, field, place, new)
        fields = ("value",) if isinstance(node, ast.AnnAssign) else node._fields
        yield from self._inside(node, [name for name in fields if name not in ("body", "orelse", "finalbody")])
        for name in ("body", "orelse", "finalbody"):
            if getattr(node, name, None):
                yield from self._body(node, in_function=in_function, field=name)

    # Expressions.

    def _inside(self, node: ast.AST, fields: list[str] | tuple[str, ...]) -> Iterator[Mutant]:
        for field in fields:
            value = getattr(node, field, None)
            if isinstance(value, list):
                for place, part in enumerate(value):
                    if isinstance(part, ast.AST):
                        yield from self._expression(part, node, field, place)
            elif isinstance(value, ast.AST):
                yield from self._expression(value, node, field, None)

    def _expression(self, node: ast.AST, parent: ast.AST, field: str, place: int | None) -> Iterator[Mutant]:
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.keyword) and node.arg in MESSAGES):
            return
        for operator, new in self._changes(node):
            yield self._mutant(operator, node, parent, field, place, new)
        if isinstance(node, ast.Call):
            required = self._required.get(node.func.id, set()) if isinstance(node.func, ast.Name) else set()
            for number, keyword in enumerate(node.keywords):
                if keyword.arg is not None and keyword.arg not in required and keyword.arg not in MESSAGES:
                    yield self._mutant("argument", keyword, node, "keywords", number, None)
        if isinstance(node, ast.comprehension):
            for number, test in enumerate(node.ifs):
                if _negatable(test):
                    yield self._mutant("condition", test, node, "ifs", number, _negated(test))
        yield from self._inside(node, node._fields)

    def _changes(self, node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
        if isinstance(node, ast.Compare):
            for place, old in enumerate(node.ops):
                for kind in COMPARISONS[type(old)]:
                    ops = [*node.ops[:place], kind(), *node.ops[place + 1 :]]
                    yield "comparison", ast.Compare(node.left, ops, node.comparators)
        elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
            yield "arithmetic", ast.BinOp(node.left, ARITHMETIC[type(node.op)](), node.right)
        elif isinstance(node, ast.UnaryOp):
            yield ("not" if isinstance(node.op, ast.Not) else "arithmetic"), node.operand
        elif isinstance(node, ast.BoolOp):
            yield "boolean", ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
        elif isinstance(node, ast.IfExp) and _negatable(node.test):
            yield "condition", ast.IfExp(_negated(node.test), node.body, node.orelse)
        elif isinstance(node, ast.Constant):
            yield from (("constant", ast.Constant(value)) for value in _other_values(node.value))
        elif isinstance(node, ast.Call):
            function = _other_function(node.func)
            if function is not None:
                yield "name", ast.Call(function, node.args, node.keywords)

    def _mutant(
        self, operator: str, old: ast.AST, parent: ast.AST, field: str, place: int | None, new: ast.AST | None
    ) -> Mutant:
        number = old.lineno  # type: ignore[attr-defined]
        if new is not None and not hasattr(new, "lineno"):
            ast.copy_location(new, old)
        mutant = Mutant(
            operator=operator,
            parent=parent,
            field=field,
            place=place,
            new=new,
            lines=self._running,
            number=number,
            line=self.lines[number - 1].strip(),
            change="",
        )
        return replace(mutant, change=_described(mutant, old))


def _fields(mutant: Mutant) -> tuple[object, object]:
    """What stands in the field with the change made, and without."""
    held = getattr(mutant.parent, mutant.field)
    if mutant.place is None:
        return mutant.new, held
    rest = [] if mutant.new is None else [mutant.new]
    return [*held[: mutant.place], *rest, *held[mutant.place + 1 :]], held


def _described(mutant: Mutant, old: ast.AST) -> str:
    """What becomes of what: a constant or a keyword by the expression around it, so that it is told from its like."""
    if mutant.new is None:
        return f"{ast.unparse(old)} -> (left out)"
    if isinstance(mutant.new, ast.Pass):
        return f"{ast.unparse(old).splitlines()[0]} -> (left out)"
    if not isinstance(mutant.parent, ast.expr | ast.keyword | ast.Slice):
        return f"{ast.unparse(old)} -> {ast.unparse(mutant.new)}"
    if isinstance(mutant.new, ast.Constant):
        before = ast.unparse(mutant.parent)
        with_it, without = _fields(mutant)
        setattr(mutant.parent, mutant.field, with_it)
        after = ast.unparse(mutant.parent)
        setattr(mutant.parent, mutant.field, without)
        return f"{before} -> {after}"
    return f"{ast.unparse(old)} -> {ast.unparse(mutant.new)}"


def _other_values(value: object) -> Iterator[bool | int | float | str]:
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int | float):
        yield value + 1
        yield value - 1
    elif isinstance(value, str):
        yield f"{value}~"


def _other_function(function: ast.expr) -> ast.expr | None:
    if isinstance(function, ast.Name) and hasattr(builtins, SWAPS.get(function.id, "")):
        return ast.Name(SWAPS[function.id], ast.Load())
    if isinstance(function, ast.Attribute) and function.attr in SWAPS:
        return ast.Attribute(function.value, SWAPS[function.attr], ast.Load())
    return None


def _negatable(test: ast.expr) -> bool:
    """Whether its negation is not among the changes of the test itself."""
    return not isinstance(test, ast.Compare) and not (isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not))


def _negated(test: ast.expr) -> ast.expr:
    return ast.copy_location(ast.UnaryOp(ast.Not(), test), test)


def _removable(node: ast.stmt) -> bool:
    """Whether the rest can run without it: it does something, and gives no name a value."""
    if isinstance(node, ast.Assign):
        return all(isinstance(target, ast.Subscript | ast.Attribute) for target in node.targets)
    is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    return is_call or isinstance(node, ast.AugAssign | ast.Raise | ast.Continue | ast.Break)


def _is_alias(node: ast.stmt) -> bool:
    """Whether it gives a type a name."""
    if not isinstance(node, ast.Assign):
        return False
    value = node.value
    return isinstance(value, ast.Subscript) or (isinstance(value, ast.BinOp) and isinstance(value.op, ast.BitOr))


def _required_keywords(tree: ast.Module) -> dict[str, set[str]]:
    """The keywords without which a function or a dataclass of the module cannot be called, by its name."""
    required = dict[str, set[str]]()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            pairs = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
            required[node.name] = {argument.arg for argument, default in pairs if default is None}
        elif isinstance(node, ast.ClassDef):
            fields = [part for part in node.body if isinstance(part, ast.AnnAssign) and part.value is None]
            required[node.name] = {field.target.id for field in fields if isinstance(field.target, ast.Name)}
    return required
