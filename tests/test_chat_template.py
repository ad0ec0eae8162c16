"""Chat templates: what they render, and what they may not do."""

from __future__ import annotations

from typing import Any

import pytest

from gemma_edge.runtime.errors import BundleError, UsageError
from gemma_edge.runtime.families.gemma3n_template import GEMMA3N_TEMPLATE
from gemma_edge.runtime.prompt import template_sandbox
from gemma_edge.runtime.prompt.chat_template import ChatTemplate

USER = {"role": "user", "content": " Hello "}
CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    USER,
    {"role": "assistant", "content": [{"type": "text", "text": " Hi. "}]},
    {"role": "user", "content": "Bye"},
]


def render(source: str, **names: Any) -> str:
    return ChatTemplate(source).render([USER], **names)


def test_gemma_turns() -> None:
    assert ChatTemplate().render([USER]) == (
        "<bos><start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\n"
    )


def test_the_system_message_is_folded_into_the_first_user_turn() -> None:
    assert ChatTemplate().render(CONVERSATION) == (
        "<bos><start_of_turn>user\nBe brief.\n\nHello<end_of_turn>\n"
        "<start_of_turn>model\nHi.<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n"
    )


@pytest.mark.parametrize(
    "source",
    [
        GEMMA3N_TEMPLATE,
        "{% for m in messages %}\n    {{ m['content'] | tojson }}\n{% endfor %}\n",
        "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
        "{% set a = namespace(n=0) %}{% for m in messages %}{% set a.n = 2 %}{% endfor %}{{ a.n ~ 1 }}",
        "{% generation %}{{ bos_token }}{% endgeneration %}{{ strftime_now('%Y') }}{{ dict(a=1) }}",
    ],
    ids=["gemma3", "whitespace", "loopcontrols", "namespace", "generation"],
)
def test_renders_as_transformers_does(source: str) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    expected = utils._compile_jinja_template(source).render(
        messages=CONVERSATION, bos_token="<bos>", eos_token="<eos>", add_generation_prompt=True
    )
    assert ChatTemplate(source).render(CONVERSATION) == expected


def test_no_generation_prompt() -> None:
    assert ChatTemplate().render([USER], add_generation_prompt=False).endswith("<end_of_turn>\n")


def test_roles_must_alternate() -> None:
    with pytest.raises(UsageError, match="refuses the messages: Conversation roles must alternate"):
        ChatTemplate().render([USER, USER])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "non-empty list"),
        ("hello", "non-empty list"),
        (["hello"], r"messages\[0\] must be"),
        ([USER, {"role": "", "content": "x"}], r"messages\[1\]\['role'\]"),
        ([{"role": "user"}], r"messages\[0\]\['content'\] must be a text"),
        ([{"role": "user", "content": [{"type": "video"}]}], r"\['content'\]\[0\] .* 'video'"),
    ],
)
def test_malformed_messages_are_named(messages: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ChatTemplate().render(messages)


@pytest.mark.parametrize("role", ["x" * 5000, ["user"], 10**5000], ids=["long", "list", "digits"])
def test_an_unknown_role_is_repeated_in_short(role: Any) -> None:
    with pytest.raises(UsageError, match=r"role.* not ") as refusal:
        ChatTemplate().render([{"role": role, "content": "x"}])
    assert len(str(refusal.value)) < 400


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__['x'] }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set f = messages[0].__init__ %}{{ f() }}",
        "{{ '%0999999999d' % 1 }}",
        "{{ 'x'.ljust(10**9) }}",
    ],
)
def test_the_sandbox_is_not_left(source: str) -> None:
    with pytest.raises(BundleError, match=r"chat_template.jinja: chat template: expected a template that"):
        render(source)


@pytest.mark.parametrize(
    ("source", "bound"),
    [
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "100000 steps|more than 1 s",
        ),
        (
            "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
            "100000 steps|more than 1 s",
        ),
        ("{{ range(10**9) }}", "MAX_RANGE"),
        ("{{ 'a' * 10**9 }}", "50331648 bytes"),
        ("{{ [0] * 10**9 }}", "50331648 bytes"),
        ("{{ 10**(10**9) }}", "4096 bits"),
        (
            "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
            "50331648 bytes",
        ),
        (
            "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
            "50331648 bytes",
        ),
        ("{% set s = 'a' * 10**6 %}{% for i in range(9999) %}{{ s }}{% endfor %}", "50331648 bytes"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ],
    ids=["loops", "macros", "range", "text", "list", "power", "concat", "plus", "output", "recursion"],
)
def test_work_and_memory_are_bounded(source: str, bound: str) -> None:
    """The error names the bound: no template above comes to an end by itself."""
    with pytest.raises(BundleError, match=bound):
        render(source)


def test_the_steps_are_counted_anew_for_each_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_STEPS", 3)
    template = ChatTemplate("{% for m in messages %}{{ m.role }}{% endfor %}")
    assert [template.render([USER]) for _ in range(5)] == ["user"] * 5
    with pytest.raises(BundleError, match="more than 3 steps"):
        template.render([USER] * 4)


@pytest.mark.parametrize(
    ("source", "message"),
    [("{% for", "line 1"), ("{{ a.b.c }}", "'a' is undefined"), ("{{ 1 / 0 }}", "ZeroDivisionError")],
)
def test_a_broken_template_says_what_is_wrong(source: str, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        render(source)
