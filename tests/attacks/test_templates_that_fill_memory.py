"""Attack: a chat template that takes gigabytes or minutes, inside any construct that Jinja has.

The payloads are rendered in one process, which looks at its peak for each: at most 64 MB, whatever the
construct. Its CPU is limited to two seconds a payload.
"""

from __future__ import annotations

import itertools
import resource
import subprocess
import sys
import textwrap

import pytest

GROW = "{% set n = namespace(v='ab') %}{% for i in range(99) %}{% set n.v = n.v ~ n.v %}{% endfor %}"
LARGE = "{% set s = 'a' * 10**6 %}"
APPEND = "{% set n = namespace(v=[]) %}{% for i in range(9999) %}{% set n.v = n.v + [@] %}{% endfor %}"
NEST = "{% set n = namespace(v=[1], w=[1]) %}{% for i in range(60) %}{% set n.v = [n.v, n.v] %}{% endfor %}"
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
    }


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    resource.setrlimit(resource.RLIMIT_CPU, (2 * len(payloads()), 2 * len(payloads())))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc/self/clear_refs")
def test_no_construct_passes_the_bounds() -> None:
    names, sources = zip(*payloads().items(), strict=True)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CHILD)],
        input="".join(f"{source!r}\n" for source in sources),
        capture_output=True,
        text=True,
        timeout=1200,
        preexec_fn=limited,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(names), (names[len(lines)], done.stderr[-300:])
    beyond = {}
    for name, line in zip(names, lines, strict=True):
        result, megabytes = line.split()
        if result != "refused" or int(megabytes) > 64:
            beyond[name] = line
    assert not beyond
