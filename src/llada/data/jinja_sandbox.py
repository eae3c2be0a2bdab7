"""Chat templates in Jinja's sandbox: what they write is that of transformers, and what they can cost is bounded.

A template comes with a model from anywhere. Jinja's sandbox keeps it from Python's insides, not from loops, calls and
strings without end. Here everything that can grow is paid for, from a budget that follows the size of the dialogue:
one unit is about one small expression, or 16 characters. The compiled program is the usual one, in which each loop,
macro, concatenation and comparison first states its size; operators, filters and calls pass through this environment
anyway. Some filters and methods that no chat template needs are left out, as are recursive loops and other files.
"""

import datetime
import json
import re
import threading
from collections.abc import Callable, Iterable, Sized
from typing import Any

import jinja2
from jinja2 import filters, nodes, runtime, sandbox, tests
from jinja2.ext import Extension
from jinja2.visitor import NodeTransformer

from llada.errors import UserError

_BASE_UNITS, _UNITS_A_CHARACTER, _UNITS_A_MESSAGE = 1_000_000, 20, 20_000
_CALL_UNITS = 8
_CHARACTERS_A_UNIT = 16
_MOST_SOURCE = 200_000
_MOST_NUMBER = 1_000  # of a width, an indentation or a precision
_MOST_BITS = 4_096  # of a number
# Of numbers and lists, which cost no more than their length; whatever else is filtered becomes text.
_SHALLOW = {"abs", "attr", "count", "d", "default", "first", "float", "int", "items", "last", "length", "list", "map"}
_SHALLOW |= {"reject", "rejectattr", "reverse", "round", "select", "selectattr"}
_FILTERS = _SHALLOW | {"capitalize", "dictsort", "e", "escape", "format", "groupby", "indent", "join", "lower", "max"}
_FILTERS |= {"min", "replace", "safe", "sort", "string", "title", "trim", "truncate", "unique", "upper", "wordcount"}
_METHODS = set(
    "capitalize casefold count endswith find format format_map index isalnum isalpha isascii isdecimal isdigit "
    "isidentifier islower isnumeric isprintable isspace istitle isupper join lower lstrip partition removeprefix "
    "removesuffix replace rfind rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title "
    "upper".split()
)
# Kinds of values; tuples, because unions are built anew each time.
_SCALARS = (bool, int, float, runtime.Undefined, type(None))
_SEQUENCES: Any = (list, tuple, range, set, type({}.items()), type({}.keys()), type({}.values()))
_CONTAINERS: Any = (str, dict, *_SEQUENCES)
_COMPARISONS = "eq equalto == ne != lt lessthan < le <= gt greaterthan > ge >=".split()
_NOT_CONSUMED = (Sized, *_SCALARS)
# A width of four digits, or one that is an argument, in either kind of placeholder.
_LARGE_WIDTH = re.compile(r"[%{][^a-zA-Z%{}]*([0-9]{4}|\*)|\{[^{}]*([0-9]{4}|\{)")
_OWNERS = (str, list, tuple, dict, runtime.LoopContext, jinja2.utils.Cycler, jinja2.utils.Joiner)
# Filters that a template cannot spell, put in by _Metering.
_LOOP, _SPEND, _MEASURE, _LENGTH, _JOINED = " loop", " spend", " measure", " length", " joined"


class NotForThisDialogue(UserError):
    """A template fails on a dialogue, by its own word or by a mistake in it; on another it may not."""


class Template:
    """A compiled template.

    literals  its own text: all strings in it, one a line
    words     strings and attributes, among them every field that it looks up
    mentions  its variables
    """

    def __init__(self, source: str, name: str):
        """Compile; `name` is what errors call it. UserError if it is no template, or one that is not allowed here."""
        self._name, self._environment = name, _Environment()
        if len(source) > _MOST_SOURCE:
            raise UserError(f"{name} has {len(source):,} characters, more than the {_MOST_SOURCE:,} that one may have")
        try:
            tree = self._environment.parse(source)
            strings = (*tree.find_all(nodes.TemplateData), *tree.find_all(nodes.Const))
            texts = (getattr(node, "data", None) or getattr(node, "value", None) for node in strings)
            words = [text for text in texts if isinstance(text, str)]
            self.literals = "\n".join(words)
            self.words = {*words, *(node.attr for node in tree.find_all(nodes.Getattr))}
            self.mentions = {node.name for node in tree.find_all(nodes.Name)}
            self._template = self._environment.from_string(source)
        except Exception as error:  # what Jinja and Python's compiler raise for text that is no program
            line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise UserError(f"{name} is no template that can be used{line}: {_reason(error)}") from error

    def render(self, variables: dict[str, Any], characters: int, messages: int, shield: str = "") -> str:
        """The text for `variables`, which hold so many characters and messages.

        `shield` is a character that stays itself in JSON. NotForThisDialogue where the template refuses the variables
        or fails on them; UserError where it does what is not allowed, or more than they can need.
        """
        local = self._environment.local
        local.left = _BASE_UNITS + _UNITS_A_CHARACTER * characters + _UNITS_A_MESSAGE * messages
        local.shield = shield
        try:
            return self._template.render(variables)
        except (jinja2.exceptions.SecurityError, RecursionError, MemoryError, OverflowError) as error:
            raise UserError(f"{self._name} cannot be rendered: {_reason(error)}") from error
        except Exception as error:  # a template is a program: it may raise anything
            verb = "refuses the dialogue" if type(error) is jinja2.TemplateError else "cannot be rendered"
            raise NotForThisDialogue(f"{self._name} {verb}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError | MemoryError):
        return "it is nested too deeply"
    return " ".join(str(error).split())[:300] or type(error).__name__


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`, with which transformers marks answers: only its body here."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

    def parse(self, parser):
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Metering(NodeTransformer):
    """Puts filters that spend units in front of whatever can grow."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        if node.recursive:
            raise jinja2.exceptions.SecurityError("recursive loops are not allowed")
        weight = _weight(node)
        self.generic_visit(node)
        node.iter = _filter(node.iter, _LOOP, nodes.Const(weight))
        return node

    def visit_Macro(self, node: Any) -> nodes.Node:
        weight = _weight(node)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_filter(nodes.Const(weight), _SPEND)))
        return node

    visit_CallBlock = visit_Macro

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes), _JOINED)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        is_short = any(isinstance(each, nodes.Const) for each in (node.expr, *(o.expr for o in node.ops)))
        if is_short and all(operand.op in ("eq", "ne") for operand in node.ops):
            return node  # as most are: a role and its name
        node.expr = _measured(node.expr)
        for operand in node.ops:
            operand.expr = _measured(operand.expr, _LENGTH if operand.op in ("in", "notin") else _MEASURE)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _measured(node.node)
        return node

    def _refuse(self, node: nodes.Node) -> nodes.Node:
        raise jinja2.exceptions.SecurityError(f"{type(node).__name__.lower()} is not allowed")

    visit_Block = visit_Extends = visit_Include = visit_Import = visit_FromImport = _refuse


def _filter(node: Any, name: str, *arguments: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(arguments), [], None, None)


def _measured(node: nodes.Expr, name: str = _MEASURE) -> nodes.Expr:
    return node if isinstance(node, nodes.Const) else _filter(node, name)


def _weight(node: nodes.Node) -> int:
    """Units of one run of a loop's or macro's body: its expressions, and the text in it."""
    text = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
    return 1 + sum(1 for _ in node.find_all(nodes.Expr)) + text // _CHARACTERS_A_UNIT


class _Environment(sandbox.ImmutableSandboxedEnvironment):
    """Jinja's, as transformers sets it up, with a budget for the render of each thread."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self):
        # No optimizer: it would compute constants before there is a budget.
        extensions = [_Generation, "jinja2.ext.loopcontrols"]
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=extensions)
        self.local = threading.local()
        self.finalize = jinja2.pass_context(lambda context, value: self._measured(value))
        self.globals.pop("lipsum")
        self.globals |= {"raise_exception": _raise, "strftime_now": _now, "dict": lambda *a, **k: dict(*a, **k)}
        self.filters = {name: self._filter(name, filters.FILTERS[name]) for name in _FILTERS}
        self.filters["tojson"] = self._filter("tojson", self._to_json)
        own: dict[str, Any] = {_LOOP: self._loop, _SPEND: self._spend, _JOINED: self._joined}
        own |= {_MEASURE: self._looked_through, _LENGTH: self._counted}
        # Passing the context keeps Jinja from calling them while it compiles.
        self.filters |= {name: jinja2.pass_context(_without_context(call)) for name, call in own.items()}
        self.tests = dict(self.tests)
        self.tests["in"] = lambda value, items: self._looked_through(value) in self._counted(items)
        self.tests |= {name: self._comparison(tests.TESTS[name]) for name in _COMPARISONS}

    def _generate(self, source, *arguments, **named):
        source = _Metering().visit(source)
        source.set_environment(self)
        return super()._generate(source, *arguments, **named)

    def _spend(self, units: int) -> None:
        self.local.left -= units
        if self.local.left < 0:
            raise jinja2.exceptions.SecurityError("it runs on without end, or writes without end")

    def _measure(self, value: Any) -> int:
        """Spend the units of a value as text, and return its characters, about."""
        cost = 1
        if isinstance(value, str):
            size = len(value)
        elif isinstance(value, _SCALARS):
            size = 8
        elif isinstance(value, dict):
            cost, size = 4, 2 + sum(self._measure(key) + self._measure(each) for key, each in value.items())
        elif isinstance(value, _SEQUENCES):
            cost, size = 4, 2 + sum(map(self._measure, value))
        else:
            raise jinja2.exceptions.SecurityError(f"a {type(value).__name__} is no text")
        self._spend(cost + size // _CHARACTERS_A_UNIT)
        return size

    def _measured(self, value: Any) -> Any:
        self._measure(value)
        return value

    def _looked_through(self, value: Any) -> Any:
        if isinstance(value, _CONTAINERS):
            self._measure(value)
        return value

    def _comparison(self, test: Any) -> Callable:
        return lambda value, other: test(self._looked_through(value), self._looked_through(other))

    def _counted(self, value: Any) -> Any:
        self._spend(_units(value))
        return value

    def _loop(self, items: Any, weight: int) -> Any:
        items = items if isinstance(items, Sized) else list(items)
        self._spend(weight * _length(items))
        return items

    def _joined(self, values: list[Any]) -> str:
        return jinja2.runtime.str_join(self._measured(value) for value in values)

    def _filter(self, name: str, function: Callable) -> Callable:
        """A filter that spends what its value and arguments cost."""
        passes = getattr(getattr(function, "jinja_pass_arg", None), "name", "nothing")

        @jinja2.pass_context
        def filtered(context, value, *arguments, **named):
            if name not in _SHALLOW:
                value = value if isinstance(value, _NOT_CONSUMED) else list(value)
                self._measure([value, *arguments, *named.values()] if arguments or named else value)
            elif name not in ("d", "default", "count", "length", "first"):
                self._spend(1 + _length(value))
            given = [*arguments, *named.values()]
            if name in ("indent", "round", "tojson", "truncate") and any(_is_large(number) for number in given):
                raise jinja2.exceptions.SecurityError(f"the filter {name} gets a number above {_MOST_NUMBER:,}")
            if name == "indent":
                self._spend(value.count("\n") * max([4, *(_length(n) or _number(n) for n in given)]))
            elif name in ("replace", "join", "format"):
                self._check_method(name, value, given)
            passed = {"context": context, "eval_context": context.eval_ctx, "environment": self}
            first = [passed[passes]] if passes in passed else []
            return function(*first, value, *arguments, **named)

        return filtered

    def _check_method(self, name: str, value: Any, given: Iterable[Any]) -> None:
        """Spend what joining, replacing or formatting can write."""
        given = list(given)
        if name == "join":
            texts, glue = (given[0], value) if isinstance(value, str) else (value, given[0] if given else "")
            self._spend(_length(texts) * (1 + _length(glue) // _CHARACTERS_A_UNIT))
        elif name == "replace" and len(given) >= 2:
            self._spend(str(value).count(str(given[0])) * (1 + len(str(given[1])) // _CHARACTERS_A_UNIT))
        elif name == "format":
            if _LARGE_WIDTH.search(value.replace("{{", "")):
                raise jinja2.exceptions.SecurityError("a format has a width without end")
            self._spend((value.count("{") + value.count("%")) * (1 + self._measure(given)))

    def call(self, context, function, /, *args, **kwargs):
        """Call from a template: a method of text, a list or a loop, a macro, or a global. Jinja's arguments."""
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if owner is not None and not isinstance(owner, _OWNERS):
            raise jinja2.exceptions.SecurityError(f"{type(owner).__name__}.{name} is not allowed")
        if isinstance(owner, str):
            if name not in _METHODS:
                raise jinja2.exceptions.SecurityError(f"str.{name} is not allowed")
            args = tuple(each if isinstance(each, _NOT_CONSUMED) else list(each) for each in args)
            self._measure([owner, *args])
            self._spend(_length(owner) if "split" in name else 0)
            self._check_method(name, owner, args)
        else:
            self._spend(_CALL_UNITS + _length(owner) + sum(map(_length, args)))
            if owner is not None:  # they compare
                self._looked_through(owner if isinstance(owner, list | tuple) else 0)
                self._looked_through(args)
        return super().call(context, function, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Jinja's safe form of str.format, with what it can write paid for."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def formatted(*arguments, **named):
            self._check_method("format", value.__self__, [*arguments, *named.values()])
            return wrapped(*arguments, **named)

        return formatted

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        """Jinja's undefined value would only fail where it is used."""
        raise jinja2.exceptions.SecurityError(f"the attribute {attribute!r} of {type(obj).__name__} is not allowed")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operator whose result may be larger than its operands. Jinja's arguments."""
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            self._spend(1 + (len(left) + len(right)) // _CHARACTERS_A_UNIT)
            return left + right
        lengths = _length(left), _length(right)
        if operator == "%" and isinstance(left, str):
            self._check_method("format", left, [right])
        elif operator == "+":
            self._spend(_units(left) + _units(right))
        elif any(lengths):  # a text or list, several times
            times = max(_number(left), _number(right), 1)
            self._spend(1 + _units(left) * times + _units(right) * times)
        elif operator in ("*", "**"):
            bits = [each.bit_length() for each in (left, right) if isinstance(each, int)]
            if len(bits) == 2 and (sum(bits) if operator == "*" else bits[0] * max(right, 1)) > _MOST_BITS:
                raise jinja2.exceptions.SecurityError("a number grows without end")
        return super().call_binop(context, operator, left, right)

    def _to_json(self, value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
        if not ensure_ascii or text.isascii():
            return text
        kept = self.local.shield
        return "".join(each if each.isascii() or each == kept else json.dumps(each)[1:-1] for each in text)


def _without_context(function: Any) -> Callable:
    return lambda context, *arguments: function(*arguments)


def _length(value: Any) -> int:
    if isinstance(value, _CONTAINERS):
        return len(value)
    return len(value) if isinstance(value, Sized) and not isinstance(value, runtime.LoopContext) else 0


def _units(value: Any) -> int:
    return 1 + _length(value) // (_CHARACTERS_A_UNIT if isinstance(value, str) else 1)


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _is_large(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) > _MOST_NUMBER


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    if len(form) > 100 or re.search("%[^a-zA-Z%]", form):
        raise jinja2.exceptions.SecurityError("a date's format has a width")
    return datetime.datetime.now().strftime(form)
