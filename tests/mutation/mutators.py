"""Small faults, one at a time: every mutant of a module, found in its syntax tree.

Left alone: docstrings, annotations, ``__all__``, everything inside ``raise`` and inside f-strings, and the words that only
name something in an error.
"""

from __future__ import annotations

import ast
import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

MODULE = "<module>"

ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitAnd,
}
COMPARISON: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
}
#: A function or method -> the one to be called in its place.
OTHER_NAME = {
    "min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum", "amin": "amax", "amax": "amin",
    "any": "all", "all": "any", "sum": "mean", "mean": "sum", "exp": "expm1", "expm1": "exp", "log": "log1p",
    "log1p": "log", "sqrt": "square", "square": "abs", "zeros_like": "ones_like", "ones_like": "zeros_like",
    "new_zeros": "new_ones", "new_ones": "new_zeros",
}  # fmt: skip
#: Methods that may be left out: ``x.detach()`` -> ``x``.
DROPPED_METHODS = {
    "detach", "where", "clamp", "abs", "square", "sqrt", "exp", "log", "expm1", "log1p", "sigmoid", "double", "float", "to",
    "flip", "cumsum", "unsqueeze",
}  # fmt: skip
#: Functions of one argument that may be left out: ``upcast(x)`` -> ``x``.
DROPPED_FUNCTIONS = {"upcast", "detached", "logsigmoid", "softplus", "relu", "sigmoid", "tanh", "exp", "log1mexp"}
#: Calls whose integer arguments name a dimension.
WITH_DIM = {
    "sum", "mean", "any", "all", "cumsum", "cumprod", "flip", "unsqueeze", "squeeze", "amin", "amax", "sort", "argsort",
    "gather", "logsumexp", "softmax", "log_softmax", "stack", "cat", "index_add", "scatter_reduce", "size",
}  # fmt: skip
#: Keywords whose value is nothing but a word in an error.
ERROR_KEYWORDS = {"wanted_by", "like_name", "count_name", "remedy"}
#: Calls that fail for want of a keyword, whatever the tests: no fault that needs one.
REQUIRES_KEYWORDS = {"LossOutput", "Groups", "token_logps", "pair_logps", "implicit_rewards", "lengths"}


@dataclass(frozen=True)
class Mutant:
    """One fault: where it is, what it says, and the path and replacement that make it."""

    function: str  # "name", "Class.name", or MODULE
    operator: str
    before: str
    after: str
    line: int
    path: tuple[tuple[str, int | None], ...]
    node: ast.AST
    number: int = 1  # of those in this function that read the same

    @property
    def key(self) -> str:
        """What the mutant is called in reports and in the list of equivalents; no line numbers, so that it lasts."""
        tail = f" #{self.number}" if self.number > 1 else ""
        return f"{self.function}: {self.before}  ->  {self.after}{tail}"


def mutants(source: str) -> list[Mutant]:
    """All mutants of a module, in the order of its text."""
    tree = ast.parse(source)
    found: list[Mutant] = []
    seen: Counter[str] = Counter()
    said = _said(tree)
    for path, chain, operator, node in _sites(tree, (), (tree,)):
        if any(part in said for part in chain):
            continue
        function = _function(chain)
        before, after = _texts(tree, path, chain, node)
        mutant = Mutant(function, operator, before, after, getattr(chain[-1], "lineno", 0), path, node)
        seen[mutant.key] += 1
        found.append(Mutant(**{**vars(mutant), "number": seen[mutant.key]}))
    return found


def _said(tree: ast.AST) -> set[ast.AST]:
    """Assignments of what is used inside ``raise`` alone: the wording of an error."""
    found: set[ast.AST] = set()
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        inside = {n for r in ast.walk(function) if isinstance(r, ast.Raise) for n in ast.walk(r)}
        names = [node for node in ast.walk(function) if isinstance(node, ast.Name)]
        used = {node.id for node in names if isinstance(node.ctx, ast.Load) and node not in inside}
        raised = {node.id for node in names if node in inside} - used
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and {ast.unparse(target) for target in node.targets} <= raised:
                found.add(node)
    return found


def mutated(source: str, mutant: Mutant) -> ast.Module:
    """The module's tree with the fault in it."""
    tree = ast.parse(source)
    _put(tree, mutant.path, mutant.node)
    return ast.fix_missing_locations(tree)


def _put(tree: ast.AST, path: tuple[tuple[str, int | None], ...], node: ast.AST) -> None:
    for name, index in path[:-1]:
        value = getattr(tree, name)
        tree = value if index is None else value[index]
    name, index = path[-1]
    fresh = copy.deepcopy(node)
    if index is None:
        setattr(tree, name, fresh)
    else:
        getattr(tree, name)[index] = fresh


def _function(chain: tuple[ast.AST, ...]) -> str:
    """The outermost function, with its class."""
    names = []
    for node in chain:
        if isinstance(node, ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return ".".join([*names, node.name])
    return ".".join(names) or MODULE


def _texts(
    tree: ast.AST, path: tuple[tuple[str, int | None], ...], chain: tuple[ast.AST, ...], node: ast.AST
) -> tuple[str, str]:
    """The mutated expression before and after, with as much around it as it takes to recognise it."""
    top = len(chain) - 1
    while top > 0:
        text = ast.unparse(chain[top])
        above = next((i for i in range(top - 1, 0, -1) if isinstance(chain[i], ast.expr)), None)
        if above is None or isinstance(chain[top], ast.stmt):
            break
        if len(text) >= 20 and path[top - 1][0] != "func":
            break
        if any(isinstance(chain[i], ast.stmt) for i in range(above, top)) or len(ast.unparse(chain[above])) > 150:
            break
        top = above
    changed = copy.deepcopy(chain[top])
    rest = path[top:]
    if rest:
        _put(changed, rest, node)
        return _line(chain[top]), _line(changed)
    return _line(chain[top]), _line(node)


def _line(node: ast.AST) -> str:
    return " ".join(ast.unparse(ast.fix_missing_locations(copy.deepcopy(node))).split())


def _sites(
    node: ast.AST, path: tuple[tuple[str, int | None], ...], chain: tuple[ast.AST, ...]
) -> Iterator[tuple[tuple[tuple[str, int | None], ...], tuple[ast.AST, ...], str, ast.AST]]:
    """Each replacement of a node below this one: its path, the nodes on the way there, the operator, the new node."""
    for name, value in ast.iter_fields(node):
        children = enumerate(value) if isinstance(value, list) else [(None, value)]
        for index, child in children:
            if not isinstance(child, ast.AST) or _left_alone(node, name, index, child):
                continue
            here = (*path, (name, index))
            line = (*chain, child)
            for operator, new in _replacements(child, node, name):
                yield here, line, operator, new
            if not _is_negative(child):
                yield from _sites(child, here, line)


def _left_alone(parent: ast.AST, name: str, index: int | None, child: ast.AST) -> bool:
    if name in ("annotation", "returns", "type_comment") or isinstance(child, (ast.Raise, ast.JoinedStr, ast.Import)):
        return True
    if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
        return True  # a docstring
    if name == "decorator_list" and "dataclass" in ast.unparse(child):
        return True
    if isinstance(child, ast.keyword):
        # an averaging that does not exist fails by itself
        return child.arg in ERROR_KEYWORDS or (child.arg == "reduction" and isinstance(child.value, ast.Constant))
    if name == "kw_defaults" and isinstance(parent, ast.arguments) and index is not None:
        if parent.kwonlyargs[index].arg in ERROR_KEYWORDS:
            return True
    if isinstance(child, ast.Assign):
        text = ast.unparse(child)
        if text.startswith("__all__") or "Literal[" in text or "ParamSpec(" in text or "TypeVar(" in text:
            return True
        is_alias = isinstance(child.value, (ast.BinOp, ast.Name)) and isinstance(parent, ast.Module)
        return is_alias and ast.unparse(child.targets[0])[0].isupper()
    # the name of a parameter, said to a check
    is_word = isinstance(child, ast.Constant) and isinstance(child.value, str)
    return is_word and isinstance(parent, ast.Call) and ast.unparse(parent.func).startswith("_check.") and index == 0


def _is_negative(node: ast.AST) -> bool:
    return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and _is_number(node.operand)


def _is_number(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


def _called(node: ast.AST) -> str:
    if not isinstance(node, ast.Call):
        return ""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def _replacements(node: ast.AST, parent: ast.AST, field: str) -> Iterator[tuple[str, ast.AST]]:
    if field in ("test", "ifs") and not (isinstance(node, ast.Compare) and len(node.ops) == 1):
        yield "negate condition", ast.UnaryOp(ast.Not(), node)
    match node:
        case ast.Constant() | ast.UnaryOp(op=ast.USub(), operand=ast.Constant()):
            yield from _constants(node, parent, field)
        case ast.BinOp(op=op) if type(op) in ARITHMETIC:
            yield "arithmetic", ast.BinOp(node.left, ARITHMETIC[type(op)](), node.right)
        case ast.AugAssign(op=op) if type(op) in ARITHMETIC:
            yield "arithmetic", ast.AugAssign(node.target, ARITHMETIC[type(op)](), node.value)
        case ast.UnaryOp(op=ast.USub() | ast.Invert() | ast.Not()):
            yield "drop unary", node.operand
        case ast.Compare(ops=[op]):
            for other in COMPARISON[type(op)]:
                yield "comparison", ast.Compare(node.left, [other()], node.comparators)
        case ast.BoolOp(op=op):
            yield "boolean", ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), node.values)
        case ast.IfExp():
            pass  # its condition is a site of its own
        case ast.Call():
            yield from _calls(node)
        case ast.Expr(value=ast.Call()):
            yield "drop statement", ast.Pass()
        case ast.Continue():
            yield "jump", ast.Break()
        case ast.Break():
            yield "jump", ast.Continue()
        case _:
            pass
    if field == "body" and isinstance(parent, ast.FunctionDef) and isinstance(node, ast.stmt):
        yield from _early_return(node, parent)


def _early_return(node: ast.stmt, function: ast.FunctionDef) -> Iterator[tuple[str, ast.AST]]:
    """Instead of the first statement: the first tensor as it came, or nothing where nothing is returned."""
    statements = [s for s in function.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
    if node is not statements[0] or isinstance(node, ast.Return) or function.returns is None:
        return
    returns = ast.unparse(function.returns)
    first = next((a for a in function.args.args if a.arg not in ("self", "cls")), None)
    if returns == "None":
        yield "return early", ast.Return(None)
    elif first and first.annotation and "Tensor" in returns and "tuple" not in returns:
        if "Tensor" in ast.unparse(first.annotation):
            yield "return early", ast.Return(ast.Name(first.arg, ast.Load()))


def _constants(node: ast.Constant | ast.UnaryOp, parent: ast.AST, field: str) -> Iterator[tuple[str, ast.AST]]:
    if isinstance(node, ast.UnaryOp):
        if not _is_negative(node):
            yield "drop unary", node.operand
            return
        value = -node.operand.value  # type: ignore[attr-defined, union-attr]
    else:
        value = node.value
    if value is True or value is False:
        yield "constant", ast.Constant(not value)
    elif isinstance(value, str):
        yield "word", ast.Constant(value + "~")
    elif isinstance(value, int) and _called(parent) in WITH_DIM and field in ("args", "keywords"):
        yield "dimension", ast.Constant(0 if value in (1, -1) else 1)
    elif isinstance(value, int) and isinstance(parent, ast.keyword) and parent.arg == "dim":
        yield "dimension", ast.Constant(0 if value in (1, -1) else 1)
    elif isinstance(parent, ast.Subscript) and ast.unparse(parent.value).endswith(".shape"):
        yield "dimension", ast.Constant(0 if value in (1, -1) else 1)
    elif isinstance(value, (int, float)):
        yield "constant", ast.Constant(value + 1)
        if value:
            yield "constant", ast.UnaryOp(ast.USub(), ast.Constant(value)) if value > 0 else ast.Constant(-value)


def _calls(node: ast.Call) -> Iterator[tuple[str, ast.AST]]:
    name, func = _called(node), node.func
    if name in OTHER_NAME:
        other = OTHER_NAME[name]
        new = (
            ast.Attribute(func.value, other, ast.Load())
            if isinstance(func, ast.Attribute)
            else ast.Name(other, ast.Load())
        )
        yield "other function", ast.Call(new, node.args, node.keywords)
    is_method = isinstance(func, ast.Attribute) and not (
        isinstance(func.value, ast.Name) and func.value.id in ("torch", "math", "_check", "_base", "reduce", "kl")
    )
    if is_method and name in DROPPED_METHODS:
        yield f"drop {name}", func.value
    elif not is_method and name in DROPPED_FUNCTIONS and len(node.args) == 1:
        yield f"drop {name}", node.args[0]
    if name == "where" and is_method:
        flipped = ast.UnaryOp(ast.Invert(), node.args[0])
        yield "swap where", ast.Call(func, [flipped, *node.args[1:]], node.keywords)
    elif name == "where":
        condition, yes, no = node.args
        yield "swap where", ast.Call(func, [condition, no, yes], node.keywords)
        yield "drop where", yes
    for i, keyword in enumerate(node.keywords):
        if keyword.arg in ERROR_KEYWORDS or name in REQUIRES_KEYWORDS:
            continue
        rest = node.keywords[:i] + node.keywords[i + 1 :]
        yield "drop keyword", ast.Call(func, node.args, rest)
        if name == "clamp":
            swapped = ast.keyword({"min": "max", "max": "min"}[keyword.arg or ""], keyword.value)
            yield "swap min and max", ast.Call(func, node.args, [*rest, swapped])
