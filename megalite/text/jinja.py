"""Jinja as Hugging Face's chat templates expect it, in a sandbox and within limits of work and size.

The sandbox keeps a template from reaching Python, not from running for ever or building a text that fills the memory.
Both are stopped here by counting, so that it is the same row on every machine, in every thread.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

# around what the assistant says, by the generation tag
OPEN, CLOSE = "\ufdd0", "\ufdd1"
# work of one rendering: a round of a loop is one step, a call CALL of them; real templates take some hundreds a message
STEPS, CALL = 2_000_000, 20
# characters of one text, and elements of one list
LARGEST = 1 << 24
# methods, filters and functions that take the size of what they give
WIDTHS: tuple[str, ...] = (
    "batch",
    "center",
    "expandtabs",
    "generate_lorem_ipsum",
    "indent",
    "ljust",
    "rjust",
    "slice",
    "tojson",
)
WIDTHS += ("width", "wordwrap", "zfill")


class LimitError(ValueError):
    """A template that does more than any real one; of whatever row, so no row is skipped for it."""


class Template:
    """A compiled template. ValueError with the line where it is no valid Jinja."""

    def __init__(self, name: str, source: str) -> None:
        self._name, self._limits = name, Limits(name)
        environment = _environment(self._limits)
        import jinja2

        try:
            tree = _counting(environment.parse(source))
            self._template = environment.from_string(tree)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"chat template {name}, line {error.lineno}: {error.message}") from None
        except (RecursionError, SyntaxError, MemoryError, OverflowError) as error:
            raise ValueError(f"chat template {name} is nested too deeply ({error})") from None
        # whether it has the generation tag
        self.marked = any(tree.find_all(jinja2.nodes.ExtensionAttribute))

    def render(self, now: datetime.datetime, marks: bool, scale: tuple[int, int], **names: Any) -> str:
        """The text; jinja2.TemplateError or whatever an expression of it raises, LimitError beyond the limits.

        `now`: of strftime_now. `marks`: OPEN and CLOSE around each generation block. `scale`: of how many messages and
        characters; a template may compare each message with each.
        """
        limits = self._limits
        limits.now, limits.marks = now, marks
        limits.left, limits.largest = STEPS + 10 * scale[0] ** 2, LARGEST + 16 * scale[1]
        parts, size = [], 0
        for part in self._template.generate(**names):
            parts.append(part)
            size += len(part)
            if size > limits.largest:
                limits.refuse_size()
        return "".join(parts)


class Limits:
    """What one rendering has left, and what its globals depend on."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.left, self.largest = 0, LARGEST
        self.marks = False
        self.now = datetime.datetime.now()

    def count(self, steps: int = 1) -> None:
        self.left -= steps
        if self.left < 0:
            raise LimitError(
                f"chat template {self.name}: stopped after {STEPS} steps of one rendering; it loops without an end, or "
                f"almost; mend its loops"
            )

    def counted(self, values: Iterable[Any]) -> Iterator[Any]:
        """The same values, for a loop."""
        for value in values:
            self.count()
            yield value

    def refuse_size(self) -> NoReturn:
        raise LimitError(
            f"chat template {self.name}: stopped at a text or list of more than {self.largest} elements; mend what "
            f"makes it so large"
        )

    def sized(self, value: Any) -> Any:
        """`value`, if it is not too large."""
        if isinstance(value, (str, bytes, list, tuple)) and len(value) > self.largest:
            self.refuse_size()
        if isinstance(value, int) and value.bit_length() > 4096:
            self.refuse_size()
        return value

    def method(self, name: str, value: Any, args: Sequence[Any], options: Mapping[str, Any]) -> None:
        """Methods and filters whose result may be far larger than what they are given."""
        if name in WIDTHS and any(isinstance(x, int) and x > self.largest for x in (*args, *options.values())):
            self.refuse_size()
        if name == "format":
            self.form(value, args)
        texts = [text for text in (value, *args, *options.values()) if isinstance(text, str)]
        if name == "replace" and len(texts) == 3 and texts[0].count(texts[1]) * len(texts[2]) > self.largest:
            self.refuse_size()
        joined = args[0] if name == "join" and texts and args and isinstance(args[0], (list, tuple)) else ()
        if len(joined) and len(texts[0]) * len(joined) > self.largest:
            self.refuse_size()

    def form(self, text: Any, values: Any) -> None:
        """A format string, with widths of its own or, by a star, among the values."""
        if isinstance(text, str):
            if re.search(r"[%{][^%{}]*\d{7}", text):
                self.refuse_size()
            if "*" in text or "{" in text:
                self.method("width", "", values if isinstance(values, (list, tuple)) else [values], {})

    def join(self, parts: Iterable[Any]) -> str:
        """Jinja's `~`."""
        return str(self.sized("".join(map(str, parts))))

    def operate(self, operator: str, left: Any, right: Any) -> None:
        """Operators whose result may be far larger than what they are given."""
        long = next((len(x) for x in (left, right) if isinstance(x, (str, bytes, list, tuple))), None)
        number = next((x for x in (left, right) if isinstance(x, int)), None)
        if operator == "*" and long and number and long * number > self.largest:
            self.refuse_size()
        both = isinstance(left, int) and isinstance(right, int)
        if operator == "**" and both and left.bit_length() * abs(right) > 4096:
            self.refuse_size()
        if operator == "%":
            self.form(left, right)


def _environment(limits: Limits) -> Any:
    """Jinja as Hugging Face configures it, and the generation tag."""
    try:
        from jinja2 import TemplateError, nodes
        from jinja2.ext import Extension
        from jinja2.ext import loopcontrols as loops
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ValueError("chat templates need jinja2; pip install 'megalite[sft]'") from error

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 - as in the base class

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

        def mark(self, caller: Any) -> str:
            return OPEN + caller() + CLOSE if limits.marks else str(caller())

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"+", "*", "**", "%"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            limits.operate(operator, left, right)
            return limits.sized(super().call_binop(context, operator, left, right))

        def call(__self, __context: Any, __obj: Any, *args: Any, **options: Any) -> Any:
            limits.count(CALL)
            limits.method(getattr(__obj, "__name__", ""), getattr(__obj, "__self__", None), args, options)
            return limits.sized(super().call(__context, __obj, *args, **options))

        def wrap_str_format(self, value: Any) -> Any:
            found = super().wrap_str_format(value)
            if found is None:
                return None

            def checked(*args: Any, **options: Any) -> Any:
                limits.form(value.__self__, [*args, *options.values()])
                return found(*args, **options)

            return checked

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loops])
    environment.filters["tojson"] = tojson
    environment.filters = {name: _within(limits, name, each) for name, each in environment.filters.items()}
    environment.filters |= {"_counted": limits.counted, "_join": limits.join, "_sized": limits.sized}
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: limits.now.strftime(form)
    return environment


def _within(limits: Limits, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def checked(*args: Any, **options: Any) -> Any:
        # some take Jinja's own context first
        value, *rest = args[1:] if hasattr(function, "jinja_pass_arg") else args
        limits.count(CALL)
        if name == "join":
            limits.method(name, rest[0] if rest else "", [value], options)
        else:
            limits.method(name, value, rest, options)
        return limits.sized(function(*args, **options))

    return checked


def _counting(tree: Any) -> Any:
    """The template with counting in each of its loops, joins and block assignments."""
    from jinja2 import nodes
    from jinja2.visitor import NodeTransformer

    def filtered(value: Any, name: str, line: int) -> Any:
        return nodes.Filter(value, name, [], [], None, None, lineno=line)

    class Counting(NodeTransformer):
        def visit_For(self, node: Any) -> Any:
            self.generic_visit(node)
            node.iter = filtered(node.iter, "_counted", node.lineno)
            return node

        def visit_Concat(self, node: Any) -> Any:
            self.generic_visit(node)
            return filtered(nodes.List(node.nodes, lineno=node.lineno), "_join", node.lineno)

        def visit_AssignBlock(self, node: Any) -> Any:
            self.generic_visit(node)
            node.filter = filtered(node.filter, "_sized", node.lineno)
            return node

    return Counting().visit(tree)
