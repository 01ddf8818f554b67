"""The order in which a model's forward reaches its block stacks, read off its source: module lists may be declared in
another order than they run.

What is read is which stack the source names first, in the order of evaluation, through the model's own methods and
the modules in between. It is a fact of the class, not of a run: a branch that is not taken counts, and so do loops
that interleave two stacks, which are told apart here but not resolved. The order of the single blocks is recorded
when they first run.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from torch import nn

_ASKING = {"len", "isinstance", "hasattr"}
"""Builtins that look at a module without running it."""
_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


@dataclass(frozen=True)
class SourceOrder:
    """
    Attributes:
        stacks: all of them: as they are first named, then those that are not.
        interleaved: (outer, inner): `inner` runs inside the loop over `outer`.
        unnamed: stacks that no source was found to name.
        together: groups that are first reached by one expression (`self.stages[i]`); listed as declared.
    """

    stacks: tuple[str, ...]
    interleaved: tuple[tuple[str, str], ...] = ()
    unnamed: tuple[str, ...] = ()
    together: tuple[tuple[str, ...], ...] = ()


def source_order(model: nn.Module, stacks: Sequence[str]) -> SourceOrder:
    """The order of `stacks`, paths of module lists of `model`. Source that cannot be read names nothing."""
    found = _Found(tuple(stacks))
    _read_forward(model, "", found)
    unnamed = tuple(path for path in stacks if path not in found.first)
    return SourceOrder((*found.first, *unnamed), tuple(found.interleaved), unnamed, tuple(found.together))


@dataclass
class _Found:
    stacks: tuple[str, ...]
    first: list[str] = field(default_factory=list)
    named: list[str] = field(default_factory=list)  # each time
    interleaved: list[tuple[str, str]] = field(default_factory=list)
    together: list[tuple[str, ...]] = field(default_factory=list)
    loops: list[tuple[str, ...]] = field(default_factory=list)  # the stacks that the loops around are over
    done: set[tuple[int, Any]] = field(default_factory=set)

    def name(self, paths: Sequence[str]) -> None:
        """One expression names these."""
        fresh = tuple(path for path in paths if path not in self.first)
        if len(fresh) > 1:
            self.together.append(fresh)
        self.first += fresh
        self.named += paths
        for loop in self.loops:
            self.interleave(loop, paths)

    def interleave(self, outer: Sequence[str], inner: Sequence[str]) -> None:
        pairs = [(one, other) for one in outer for other in inner if one != other]
        self.interleaved += [pair for pair in pairs if pair not in self.interleaved]


def _read_forward(module: nn.Module, path: str, found: _Found) -> None:
    if type(module).forward is not nn.Module.forward:
        _read(module, path, type(module).forward, found)


def _read(module: nn.Module, path: str, function: Any, found: _Found) -> None:
    function = inspect.unwrap(function)
    if not inspect.isfunction(function) or (id(module), function) in found.done:
        return
    found.done.add((id(module), function))
    tree = _tree(function)
    if tree is not None and tree.args.args:
        _Reader(module, path, tree.args.args[0].arg, function, found).read(tree.body)


@lru_cache(maxsize=256)
def _tree(function: Callable[..., Any]) -> ast.FunctionDef | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    return next((node for node in tree.body if isinstance(node, ast.FunctionDef)), None)


class _Reader(ast.NodeVisitor):
    """Reads one method of one module."""

    def __init__(self, module: nn.Module, path: str, self_name: str, function: Any, found: _Found) -> None:
        self._module, self._path, self._self = module, path, self_name
        self._function = function
        self._found = found

    def read(self, body: Sequence[ast.AST]) -> None:
        for node in body:
            self.visit(node)

    # -- in the order of evaluation --------------------------------------------------------------------------------

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id in _ASKING:
            return
        arguments = [*node.args, *node.keywords]
        arguments.sort(key=lambda argument: not _calls(argument))  # a stack that is only handed over runs later
        self.read(arguments)
        if _is_super(node.func) and isinstance(node.func, ast.Attribute):
            _read(self._module, self._path, self._inherited(node.func.attr), self._found)
        else:
            self.visit(node.func)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.read([node.value, *node.targets])

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.read([node.test, node.body, node.orelse])

    def visit_Compare(self, node: ast.Compare) -> None:
        asks = all(isinstance(operator, ast.Is | ast.IsNot) for operator in node.ops)
        self.read([part for part in (node.left, *node.comparators) if _calls(part) or not asks])

    def visit_For(self, node: ast.For) -> None:
        before = len(self._found.named)
        self.visit(node.iter)
        over = tuple(dict.fromkeys(self._found.named[before:]))
        if _calls(node.iter, "zip"):
            self._found.interleave(over[:1], over[1:])
        self._found.loops.append(over)
        self.read(node.body)
        self._found.loops.pop()
        self.read(node.orelse)

    def visit_ListComp(self, node: ast.ListComp | ast.GeneratorExp) -> None:
        self.read([*node.generators, node.elt])

    visit_GeneratorExp = visit_ListComp  # noqa: N815

    # -- what is named ---------------------------------------------------------------------------------------------

    def visit_Attribute(self, node: ast.Attribute) -> None:
        place = self._place(node)
        owner = self._place(node.value)
        if place is not None:
            self._reach(*place)
        elif owner is not None:
            member = getattr(type(owner[0]), node.attr, None)
            _read(*owner, member.fget if isinstance(member, property) else member, self._found)
        else:
            self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        place = self._place(node)
        if place is not None:
            self._reach(*place)
        else:
            self.generic_visit(node)

    def _place(self, node: ast.AST) -> tuple[nn.Module, str] | None:
        """The module that `self.a.b` or `self.a["b"]` is, and its path."""
        if isinstance(node, ast.Name):
            return (self._module, self._path) if node.id == self._self else None
        if isinstance(node, ast.Attribute):
            name = node.attr
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            name = str(node.slice.value)
        else:
            return None
        owner = self._place(node.value)
        if owner is None or (isinstance(node, ast.Subscript) and not isinstance(owner[0], _LISTS)):
            return None
        child = owner[0]._modules.get(name)
        return None if child is None else (child, f"{owner[1]}.{name}".lstrip("."))

    def _reach(self, module: nn.Module, path: str) -> None:
        stacks = self._found.stacks
        own = [stack for stack in stacks if stack in (path, path.rpartition(".")[0])]
        inside = [stack for stack in stacks if stack.startswith(f"{path}.")]
        if own:
            self._found.name(own)
        elif isinstance(module, nn.ModuleList | nn.ModuleDict):
            self._found.name(inside)
        elif inside:
            _read_forward(module, path, self._found)

    def _inherited(self, name: str) -> Any:
        """What `super().name` is in the class whose method is read."""
        classes = type(self._module).__mro__
        at = next((i for i, c in enumerate(classes) if _defines(c, self._function)), 0)
        return next((vars(c)[name] for c in classes[at + 1 :] if name in vars(c)), None)


def _defines(owner: type, function: Any) -> bool:
    return any(inspect.unwrap(member) is function for member in vars(owner).values() if callable(member))


def _calls(node: ast.AST, name: str | None = None) -> bool:
    """Something, or the function called `name`, is called in it."""
    calls = [part.func for part in ast.walk(node) if isinstance(part, ast.Call)]
    return any(name is None or (isinstance(func, ast.Name) and func.id == name) for func in calls)


def _is_super(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Name)
        and node.value.func.id == "super"
    )
