"""Answers in Markdown on the chat page: nodes, never markup."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from support.page_driver import Person


RENDERED = [
    ("a **b** *c* ~~d~~ `e`", "<p>a <strong>b</strong> <em>c</em> <del>d</del> <code>e</code></p>"),
    ("***a***", "<p><strong><em>a</em></strong></p>"),
    ("**a *b* c**", "<p><strong>a <em>b</em> c</strong></p>"),
    ("*a **b** c*", "<p><em>a <strong>b</strong> c</em></p>"),
    ("snake_case_name and 2 * 3 * 4", "<p>snake_case_name and 2 * 3 * 4</p>"),
    ("`` a ` b ``", "<p><code>a ` b</code></p>"),
    (r"\*no\* `\*`", r"<p>*no* <code>\*</code></p>"),
    ("# a\n## b", "<h3>a</h3><h4>b</h4>"),
    ("### a\n## b\n##### c", "<h3>a</h3><h4>b</h4><h5>c</h5>"),
    ("> # a", "<blockquote><p><strong>a</strong></p></blockquote>"),
    ("a\nb\n\nc", "<p>a<br>b</p><p>c</p>"),
    ("- a\n- b\n  - c\n- d", "<ul><li>a</li><li>b<ul><li>c</li></ul></li><li>d</li></ul>"),
    ("1. a\n2. b", "<ol><li>a</li><li>b</li></ol>"),
    ("3) a", '<ol start="3"><li>a</li></ol>'),
    ("1. a\n   - b\n2. c", "<ol><li>a<ul><li>b</li></ul></li><li>c</li></ol>"),
    ("- a\n\n- b", "<ul><li><p>a</p></li><li><p>b</p></li></ul>"),
    ("> a\n> b", "<blockquote><p>a<br>b</p></blockquote>"),
    ("a\n\n---\n\nb", "<p>a</p><hr><p>b</p>"),
    ("2 < 3 && <b>x</b>", "<p>2 &lt; 3 &amp;&amp; &lt;b&gt;x&lt;/b&gt;</p>"),
    ("a | b", "<p>a | b</p>"),
    ("[a](javascript:alert(1))", "<p>[a](javascript:alert(1))</p>"),
    ("[a](data:text/html,x) [b](//x.example)", "<p>[a](data:text/html,x) [b](//x.example)</p>"),
    ("**open", "<p>**open</p>"),
    ("", ""),
]
LINK = '<a href="{0}" target="_blank" rel="noopener noreferrer">{1}</a>'


@pytest.fixture
def rendered(anna: Person) -> Callable[[str], str]:
    """Markdown as the page's HTML."""
    return lambda text: anna.page.evaluate(
        """async (text) => {
            const { renderMarkdown } = await import(new URL("markdown.js", document.baseURI));
            const place = document.createElement("div");
            renderMarkdown(place, text);
            return place.innerHTML;
        }""",
        text,
    )


def test_markdown_becomes_nodes(rendered: Callable[[str], str]) -> None:
    assert {text: rendered(text) for text, _ in RENDERED} == dict(RENDERED)
    for text, target, label in [
        ("[a](https://x.example/b)", "https://x.example/b", "a"),
        ('[a](https://x.example/b "title")', "https://x.example/b", "a"),
        ("[a](https://x.example/b_(c))", "https://x.example/b_(c)", "a"),
        ("https://x.example/b", "https://x.example/b", "https://x.example/b"),
        ("<https://x.example/>", "https://x.example/", "https://x.example/"),
        ("![a](https://x.example/p.png)", "https://x.example/p.png", "a"),
    ]:
        assert rendered(text) == f"<p>{LINK.format(target, label)}</p>"
    table = rendered("| a | b |\n|---|--:|\n| `1|2` | 3 |\n| 4 |")
    assert '<th>a</th><th class="end">b</th>' in table
    assert '<td><code>1|2</code></td><td class="end">3</td>' in table
    assert '<td>4</td><td class="end"></td>' in table


def test_code_is_coloured_copied_and_unchanged(anna: Person) -> None:
    code = 'def f(x):  # <b>\n    return "a\\"b" if x else 0x1F\n\n\tpass'
    block = {"choices": [{"delta": {"content": f"```python\n{code}\n```\n"}}]}
    anna.answered_with(200, f"data: {json.dumps(block)}\n\ndata: [DONE]\n\n")
    anna.say("Code")
    assert anna.page.locator("figure code").text_content() == code.replace("\t", "    ")
    kinds = anna.page.eval_on_selector_all("figure code span", "spans => spans.map((s) => s.className)")
    assert set(kinds) == {"code-keyword", "code-comment", "code-string", "code-number"}
    anna.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    with anna.showing("figure .done"):
        anna.page.click("[aria-label='Copy code']")
    assert anna.page.evaluate("navigator.clipboard.readText()") == code.replace("\t", "    ")


@pytest.mark.parametrize(
    "text",
    [
        "<img src=x onerror=alert(1)> <script>alert(1)</script>",
        '[x](https://a.example/" onclick="alert(1))',
        "```html\n<script>alert(1)</script>",
        "<https://a.example/<script>>",
        "| <b> |\n|---|\n| <script>alert(1)</script> |",
        "&lt;script&gt;",
    ],
)
def test_no_text_becomes_markup(anna: Person, rendered: Callable[[str], str], text: str) -> None:
    tags, attributes = anna.page.evaluate(
        """(markup) => {
            const all = [...new DOMParser().parseFromString(markup, "text/html").body.querySelectorAll("*")];
            return [all.map((e) => e.localName), all.flatMap((e) => e.getAttributeNames())];
        }""",
        rendered(text),
    )
    assert set(tags) <= set(
        "p a code pre figure figcaption span button svg use div table thead tbody tr th td".split()
    )
    assert "on" not in {name[:2] for name in attributes}


@pytest.mark.parametrize(
    "piece",
    ["*", "**a ", "_", "`", "[", "[a](", "> ", "- ", "  - ", "|", "~~", "<", "1. ", "\\", "# ", "***", "h"],
)
def test_no_text_takes_long(anna: Person, rendered: Callable[[str], str], piece: str) -> None:
    """Whatever a model repeats: a hang would end the test run."""
    for text in (piece * 20_000, (piece + "\n") * 5_000, "".join(" " * n + piece + "\n" for n in range(300))):
        assert rendered(text)


def test_a_stream_keeps_the_nodes_that_do_not_change(anna: Person) -> None:
    same = anna.page.evaluate("""async () => {
        const { renderMarkdown } = await import(new URL("markdown.js", document.baseURI));
        const place = document.createElement("div");
        renderMarkdown(place, "one\\n\\ntwo");
        const [one, two] = place.children;
        renderMarkdown(place, "one\\n\\ntwo and more");
        return [place.children[0] === one, place.children[1] === two, place.children.length];
    }""")
    assert same == [True, False, 2]
