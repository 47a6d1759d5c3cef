"""Jinja with Hugging Face's extensions for chat templates, in a sandbox with limits on work and size.

Jinja's sandbox keeps a template away from Python, but does not stop endless loops or huge texts. The limits here count
steps instead of time, so that they stop the same row on every machine and in every thread.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

# written around the body of a generation block
OPEN, CLOSE = "\ufdd0", "\ufdd1"
# steps allowed for one rendering: a loop iteration costs 1, a call CALL; real templates need some hundreds per message
STEPS, CALL = 2_000_000, 20
# allowed characters of one text, and elements of one list
LARGEST = 1 << 24
# methods, filters and functions that have the size of their result as an argument
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
    """A template exceeded the limits. Ends the run even if bad rows are skipped, since the template is at fault."""


class Template:
    """A compiled template. Raises ValueError with the line number if it is not valid Jinja."""

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
        # whether the template has a generation tag
        self.marked = any(tree.find_all(jinja2.nodes.ExtensionAttribute))

    def render(self, now: datetime.datetime, marks: bool, scale: tuple[int, int], **names: Any) -> str:
        """Render the template with the variables `names`.

        now: the time for strftime_now. marks: whether to write OPEN and CLOSE around each generation block. scale: the
        numbers of messages and characters, which raise the limits, as a template may compare all pairs of messages.

        Raises LimitError beyond the limits, else jinja2.TemplateError or whatever an expression raises.
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
    """The remaining budget of one rendering, and the state of its globals."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.left, self.largest = 0, LARGEST
        self.marks = False
        self.now = datetime.datetime.now()

    def count(self, steps: int = 1) -> None:
        self.left -= steps
        if self.left < 0:
            raise LimitError(
                f"chat template {self.name}: stopped after {STEPS} steps of one rendering; its loops never end or take "
                f"far too long; fix them"
            )

    def counted(self, values: Iterable[Any]) -> Iterator[Any]:
        """Yield `values` and count them, for loops."""
        for value in values:
            self.count()
            yield value

    def refuse_size(self) -> NoReturn:
        raise LimitError(
            f"chat template {self.name}: stopped at a text or list of more than {self.largest} elements; fix the "
            f"expression that makes it"
        )

    def sized(self, value: Any) -> Any:
        """Return `value`. Raises LimitError if it is too large."""
        if isinstance(value, (str, bytes, list, tuple)) and len(value) > self.largest:
            self.refuse_size()
        if isinstance(value, int) and value.bit_length() > 4096:
            self.refuse_size()
        return value

    def check_method(self, name: str, value: Any, args: Sequence[Any], options: Mapping[str, Any]) -> None:
        """Check a method or filter whose result may be far larger than its arguments."""
        if name in WIDTHS and any(isinstance(x, int) and x > self.largest for x in (*args, *options.values())):
            self.refuse_size()
        if name == "format":
            self.check_format(value, args)
        texts = [text for text in (value, *args, *options.values()) if isinstance(text, str)]
        if name == "replace" and len(texts) == 3 and texts[0].count(texts[1]) * len(texts[2]) > self.largest:
            self.refuse_size()
        joined = args[0] if name == "join" and texts and args and isinstance(args[0], (list, tuple)) else ()
        if len(joined) and len(texts[0]) * len(joined) > self.largest:
            self.refuse_size()

    def check_format(self, text: Any, values: Any) -> None:
        """Check the widths of a format string, in the string or, for `*`, among the values."""
        if isinstance(text, str):
            if re.search(r"[%{][^%{}]*\d{7}", text):
                self.refuse_size()
            if "*" in text or "{" in text:
                self.check_method("width", "", values if isinstance(values, (list, tuple)) else [values], {})

    def join(self, parts: Iterable[Any]) -> str:
        """Implement Jinja's `~`."""
        return str(self.sized("".join(map(str, parts))))

    def check_operator(self, operator: str, left: Any, right: Any) -> None:
        """Check an operator whose result may be far larger than its operands."""
        long = next((len(x) for x in (left, right) if isinstance(x, (str, bytes, list, tuple))), None)
        number = next((x for x in (left, right) if isinstance(x, int)), None)
        if operator == "*" and long and number and long * number > self.largest:
            self.refuse_size()
        both = isinstance(left, int) and isinstance(right, int)
        if operator == "**" and both and left.bit_length() * abs(right) > 4096:
            self.refuse_size()
        if operator == "%":
            self.check_format(left, right)


def _environment(limits: Limits) -> Any:
    """A Jinja environment as Hugging Face configures it, with the generation tag."""
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
            limits.check_operator(operator, left, right)
            return limits.sized(super().call_binop(context, operator, left, right))

        def call(__self, __context: Any, __obj: Any, *args: Any, **options: Any) -> Any:
            limits.count(CALL)
            limits.check_method(getattr(__obj, "__name__", ""), getattr(__obj, "__self__", None), args, options)
            return limits.sized(super().call(__context, __obj, *args, **options))

        def wrap_str_format(self, value: Any) -> Any:
            found = super().wrap_str_format(value)
            if found is None:
                return None

            def checked(*args: Any, **options: Any) -> Any:
                limits.check_format(value.__self__, [*args, *options.values()])
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
    environment.filters = {name: _limited(limits, name, each) for name, each in environment.filters.items()}
    environment.filters |= {"_counted": limits.counted, "_join": limits.join, "_sized": limits.sized}
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: limits.now.strftime(form)
    return environment


def _limited(limits: Limits, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def checked(*args: Any, **options: Any) -> Any:
        # the first argument of some filters is Jinja's context
        value, *rest = args[1:] if hasattr(function, "jinja_pass_arg") else args
        limits.count(CALL)
        if name == "join":
            limits.check_method(name, rest[0] if rest else "", [value], options)
        else:
            limits.check_method(name, value, rest, options)
        return limits.sized(function(*args, **options))

    return checked


def _counting(tree: Any) -> Any:
    """Add counting to the loops, joins and block assignments of a syntax tree."""
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
