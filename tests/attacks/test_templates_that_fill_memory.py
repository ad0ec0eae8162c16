"""Attack: a chat template that takes gigabytes or minutes, inside any construct that Jinja has.

The payloads are rendered in one process, which looks at its peak for each: at most 64 MB, whatever the
construct. Its CPU is limited to two seconds a payload. Filters and methods are also measured one by one: none
may take more than was charged for it.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import textwrap

import pytest

from gemma_edge.runtime.prompt import template_sandbox
from gemma_edge.runtime.prompt.template_sandbox import compile_template
from support.processes import limited

GROW = "{% set n = namespace(v='ab') %}{% for i in range(99) %}{% set n.v = n.v ~ n.v %}{% endfor %}"
LARGE = "{% set s = 'a' * 10**6 %}"
APPEND = "{% set n = namespace(v=[]) %}{% for i in range(9999) %}{% set n.v = n.v + [@] %}{% endfor %}"
NEST = "{% set n = namespace(v=[1], w=[1]) %}{% for i in range(60) %}{% set n.v = [n.v, n.v] %}{% endfor %}"
BOTH = NEST.replace("{% endfor", "{% set n.w = [n.w, n.w] %}{% endfor")
# What is done at length ...
WORK = {
    "output": LARGE + "{% for i in range(9999) %}{{ s }}{% endfor %}",
    "distinct output": LARGE + "{% for i in range(9999) %}{{ s ~ i }}{% endfor %}",
    "doubling": GROW,
    "slices": LARGE + APPEND.replace("@", "s[::-1]"),
    "filters": LARGE + APPEND.replace("@", "s | upper"),
    "replace": LARGE + "{{ s | replace('a', s) }}",
    "replace by method": LARGE + "{{ s.replace('a', s) }}",
    "join": LARGE + "{{ s | join(s) }}",
    "join by method": LARGE + "{{ s.join(s) }}",
    "indent": "{% set s = '\\n' * 10**6 %}{{ s | indent(10**6) }}",
    "batch": "{{ [1] | batch(10**9, 'x') | list }}",
    "batches of characters": LARGE + "{{ s | batch(1) | list }}",
    "slice": "{{ [1] | slice(10**9) | list }}",
    "nested lists": NEST + "{{ n.v }}",
    "nested lists to JSON": NEST + "{{ n.v | tojson }}",
    "nested lists compared": NEST + NEST.replace("n.v", "n.w") + "{{ n.v == n.w }}",
    "powers": "{% for i in range(9999) %}{% set x = 7 ** 9999999 %}{% endfor %}",
    "split": LARGE + APPEND.replace("@", "s.split('a')"),
    "namespaces": LARGE + "{% for i in range(9999) %}{{ namespace(a=s) }}{% endfor %}",
    "items": LARGE + "{% set d = dict(a=s) %}{% for i in range(9999) %}{{ d.items() }}{% endfor %}",
    "format": "{{ '{:99999999}'.format(1) }}",
    "dates": "{{ strftime_now('%999999999Y') }}",
    "costly steps": LARGE + "{% for i in range(99999) %}{% set x = 'b' in s %}{% endfor %}",
    "sorting": "{% for i in range(99999) %}{% set x = range(99999) | sort %}{% endfor %}",
}
# What each needs a rule of its own, whatever is around it.
RULES = {
    "lists of a range": APPEND.replace("@", "range(99999) | list"),
    "generators": APPEND.replace("@", "range(99999) | map('string') | list"),
    "written lists": APPEND.replace("@", f"[{'1,' * 9000}]"),
    "written dicts": APPEND.replace("@", f"{{{','.join(f'{i}:1' for i in range(2000))}}}"),
    "copied dicts": APPEND.replace("@", f"dict({{{','.join(f'{i}:1' for i in range(2000))}}})"),
    "sorted characters": APPEND.replace("@", "('a' * 1000000) | sort"),
    "titles": "{{ ('a ' * 3000000) | title }}",
    "sums of lists": "{{ ([[1] * 1000] * 1000) | sum(start=[]) }}",
    "long separators": "{{ ('a' * 100000).join(range(99999) | map('string')) }}",
    "JSON of long separators": "{{ ([1] * 100000) | tojson(separators=('a' * 100000, ':')) }}",
    "indented JSON": "{% set n = namespace(v=[1] * 100000) %}{% for i in range(500) %}{% set n.v = [n.v] %}"
    "{% endfor %}{{ n.v | tojson(indent=16) }}",
    "lines that end otherwise": "{{ ('a\\r' * 1000000) | indent(1000) }}",
    "tests": BOTH + "{{ n.v is eq(n.w) }}",
    "keys": NEST.replace("v=[1]", "v=(1,)").replace("[n.v, n.v]", "(n.v, n.v)") + "{{ {n.v: 1} }}",
    "looked up keys": NEST.replace("v=[1]", "v=(1,)").replace("[n.v, n.v]", "(n.v, n.v)") + "{{ {}[n.v] }}",
    "changes": BOTH + "{% for i in range(2) %}{{ loop.changed(n.v if i else n.w) }}{% endfor %}",
    "refusals": NEST + "{{ raise_exception(n.v) }}",
    "searches from the right": "{{ ('a' * 2000000).rfind('ab' ~ 'a' * 1000000) }}",
    "strips": "{{ ('a' * 1000000).strip('b' * 1000000 ~ 'a') }}",
    "numbers to bytes": "{{ (1).to_bytes(1000000000, 'big') }}",
    "bytes": "{{ 'a'.encode().ljust(1000000000) }}",
    "translations": "{{ ('a' * 1000000).translate({97: 'x' * 1000000}) }}",
    "dicts of keys": APPEND.replace("@", "{}.fromkeys(range(99999))"),
    "escapes": "{% autoescape true %}{{ '\"' * 40000000 }}{% endautoescape %}",
    "escaped parts": "{{ (',' | safe).join(['<' * 7000000] * 3) }}",
    "arguments": "{{ range(*('a' * 40000000)) }}",
    "filtered loops": "{% for c in 'a' * 40000000 if c %}{{ loop.length }}{% endfor %}",
    "loops that pass nothing": "{% for c in 'a' * 40000000 if not c %}{% endfor %}",
    "blocks": "".join(
        f"{{% block b{i} %}}{{{{ self.b{i + 1}() }}}}{{{{ self.b{i + 1}() }}}}{{% endblock %}}"
        for i in range(25)
    )
    + "{% block b25 %}x{% endblock %}",
}
# ... and where it is done.
PLACES = {
    "plain": "{0}",
    "set block": "{{% set x %}}{0}{{% endset %}}",
    "filter block": "{{% filter upper %}}{0}{{% endfilter %}}",
    "macro": "{{% macro m() %}}{0}{{% endmacro %}}{{{{ m() }}}}",
    "call block": "{{% macro m() %}}{{{{ caller() }}}}{{% endmacro %}}{{% call m() %}}{0}{{% endcall %}}",
}
CHILD = """
import sys
from gemma_edge.runtime.errors import BundleError
from gemma_edge.runtime.prompt.chat_template import ChatTemplate
ChatTemplate().render([{"role": "user", "content": "x"}])
for line in sys.stdin:
    source = eval(line)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    def peak(key):
        return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key))
    before = peak("VmRSS")
    try:
        ChatTemplate(source).render([{"role": "user", "content": "x"}])
        result = "rendered"
    except BundleError as error:
        result = "refused"
    print(result, (peak("VmHWM") - before) >> 10, flush=True)
"""


def payloads() -> dict[str, str]:
    return {
        f"{work} in {place}": PLACES[place].format(WORK[work])
        for work, place in itertools.product(WORK, PLACES)
    } | RULES


peaks = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc/self/clear_refs")


def run(child: str, lines: list[str], seconds: int) -> list[str]:
    """What `child` prints for each line that it reads, with so many seconds of CPU for all."""
    done = subprocess.run(
        limited(textwrap.dedent(child), AS=4 << 30, CPU=seconds),
        input="".join(f"{line!r}\n" for line in lines),
        capture_output=True,
        text=True,
        timeout=1200,
    )
    printed = done.stdout.splitlines()
    assert len(printed) == len(lines), (lines[len(printed)], done.stderr[-300:])
    return printed


@peaks
def test_no_construct_passes_the_bounds() -> None:
    names, sources = zip(*payloads().items(), strict=True)
    beyond = {}
    for name, line in zip(names, run(CHILD, list(sources), 2 * len(names)), strict=True):
        result, megabytes = line.split()
        if result != "refused" or int(megabytes) > 64:
            beyond[name] = line
    assert not beyond


# What each filter and method takes, beside what was charged for it. ----------------------------------

VALUES = {
    "text": "'a' * {n}",
    "words": "'Ab c&<e> ' * ({n} // 9)",
    "lines": "'\\n' * {n}",
    "characters": "''.join(map(chr, range(0x10000, 0x10000 + {n})))",
    "numbers": "list(range({n}))",
    "texts": "list(map(str, range({n})))",
    "dict": "{{str(i): i for i in range({n})}}",
}
SIZE = 30_000
ARGUMENTS = {
    "batch": "(3)",
    "slice": "(3)",
    "groupby": "(0)",
    "replace": "('a', 'bb')",
    "map": "('upper')",
    "select": "('string')",
    "reject": "('none')",
    "selectattr": "('x', 'none')",
    "rejectattr": "('x')",
    "join": "('ab')",
    "default": "('x')",
    "d": "('x')",
    "attr": "('x')",
    "split": "('a')",
    "rsplit": "('a')",
    "partition": "('a')",
    "rpartition": "('a')",
    "get": "('1')",
    "removeprefix": "('a')",
    "removesuffix": "('a')",
}
LAZY = ("map", "select", "reject", "selectattr", "rejectattr", "unique", "batch", "slice", "items", "reverse")
MEASURE = """
import os, sys
from gemma_edge.runtime.prompt import template_sandbox
from gemma_edge.runtime.prompt.template_sandbox import Budget, compile_template
template_sandbox.MAX_BYTES, template_sandbox.MAX_SECONDS = 1 << 40, 1e9
def peak(key):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key)) << 10
def measure(line):
    expression, value = eval(line).split(" of ")
    template = compile_template("{% set x = v" + expression + " %}")
    value = eval(value)
    template.environment.budget = budget = Budget()
    whole = budget.bytes
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = peak("VmRSS")
    try:
        template.render(v=value)
    except Exception:
        pass
    print(peak("VmHWM") - before, whole - budget.bytes, flush=True)
for line in sys.stdin:
    if not (child := os.fork()):  # with a heap in which nothing was freed
        measure(line)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


@peaks
def test_no_filter_or_method_takes_more_than_it_was_charged() -> None:
    environment = compile_template("").environment
    expressions = [
        f" | {name}{ARGUMENTS.get(name, '')}{end}"
        for name in environment.filters
        for end in ((" | list",) if name in LAZY else ("",))
    ]
    asked = [
        f"{expression} of {value.format(n=SIZE)}" for expression in expressions for value in VALUES.values()
    ]
    kinds = {"text": str, "words": str, "lines": str, "characters": str, "numbers": list, "dict": dict}
    asked += [
        f".{name}{ARGUMENTS.get(name, '()')} of {VALUES[value].format(n=SIZE)}"
        for value, kind in kinds.items()
        for name in dir(kind)
        if not name.startswith("_") and name not in template_sandbox.REFUSED_METHODS
    ]
    beyond = {}
    for case, line in zip(asked, run(MEASURE, asked, 300), strict=True):
        peak, charged = map(int, line.split())
        if peak > 1.35 * charged + (1 << 20):
            beyond[case] = peak, charged
    assert not beyond
