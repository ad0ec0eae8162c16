"""What Pocket is taught further: tools, prose, more pieces, and FFNs of which a part works alone."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from random import Random

import pytest

from support.repository import ROOT

TRAINING = ROOT / "pocket" / "training"
CHECKPOINT = ROOT / "pocket" / "checkpoint"


@pytest.fixture(autouse=True)
def pocket_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts of pocket import each other by name, as scripts do."""
    monkeypatch.syspath_prepend(str(TRAINING))


def test_every_kind_of_tool_has_requests_that_are_held_out_and_others() -> None:
    from examples import held_out
    from tool_tasks import KINDS

    random = Random(1)
    for name, kind in KINDS.items():
        drawn = [(request, kind.values(random)) for request in kind.requests for _ in range(100)]
        assert {held_out(name, *one) for one in drawn} == {True, False}, name


def test_conversations_with_tools_never_train_what_is_held_out() -> None:
    from examples import held_out
    from tool_tasks import KINDS, TOOL_TASKS, tool_talk, unseen_tools

    kind_of = {name: kind for kind, tool in KINDS.items() for name in tool.names}

    def offered(tools: str) -> list[str]:
        return sorted(kind_of[tool["function"]["name"]] for tool in json.loads(tools))

    random = Random(1)
    for task in TOOL_TASKS:
        trained = [tool_talk(random, False, task) for _ in range(200)]
        for talk in trained:
            assert len(offered(talk.tools)) == 1 or not held_out("offered", *offered(talk.tools))
        tested = list(unseen_tools(task, 20, seed=2))
        assert len({talk.messages for talk in tested} & {talk.messages for talk in trained}) == 0
        assert all(len(offered(t.tools)) == 1 or held_out("offered", *offered(t.tools)) for t in tested)


def test_training_has_more_results_of_several_calls_and_calls_made_twice_than_the_questions() -> None:
    from tool_tasks import AGAIN, SEVERAL_RESULTS, tool_talk

    def calls(test: bool) -> list[list[str]]:
        talks = [tool_talk(Random(i), test, "tools result json") for i in range(400)]
        said = [next(m for m in json.loads(t.messages) if "tool_calls" in m) for t in talks]
        return [[json.dumps(call) for call in message["tool_calls"]] for message in said]

    trained, asked = calls(False), calls(True)
    assert AGAIN > 0 and any(len(set(one)) < len(one) for one in trained)
    for test, made in ((False, trained), (True, asked)):
        share = sum(len(one) > 1 for one in made) / len(made)
        assert abs(share - SEVERAL_RESULTS[test]) < 0.1


@pytest.mark.parametrize("plain", [False, True])
def test_the_library_reads_the_calls_that_are_taught(plain: bool) -> None:
    from tool_tasks import TOOL_TASKS, rendered, tool_talk

    from gemma_edge.runtime.prompt.tool_calls import find_calls
    from gemma_edge.runtime.prompt.tool_schemas import normal_tools

    random = Random(1)
    for task in TOOL_TASKS:
        for talk in (tool_talk(random, True, task, plain) for _ in range(20)):
            prompt, whole = rendered(talk, answered=False), rendered(talk)
            answer = whole.removeprefix(prompt).partition("<end_of_turn>")[0]
            assert whole.startswith(prompt)
            last = json.loads(talk.messages)[-1]
            found = find_calls(answer, normal_tools(json.loads(talk.tools)))
            assert [call.to_dict()["function"] for call in found.calls] == [
                call["function"] for call in last.get("tool_calls", ())
            ]
            assert all(call.error is None for call in found.calls)
            assert found.text.strip() == last["content"]


def test_only_the_model_s_turns_are_learned() -> None:
    import sentencepiece
    from batches import IGNORED, encode_rendered
    from tool_tasks import rendered, tool_talk

    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(CHECKPOINT / "tokenizer.model"))
    talk = tool_talk(Random(1), True, "tools result json")
    sequence = encode_rendered(rendered(talk), tokenizer)
    assert sequence.ids[0] == tokenizer.bos_id()
    learned = tokenizer.decode([label for label in sequence.labels if label != IGNORED])
    turns = [part.split("<end_of_turn>")[0] for part in rendered(talk).split("<start_of_turn>model\n")[1:]]
    assert learned == "".join(f"{turn}<end_of_turn>" for turn in turns)


def test_chapters_of_a_book_without_headings_volumes_and_italics(tmp_path: Path) -> None:
    from prose import TABLE, chapters

    lines = [
        "A NOVEL",
        "",
        "CHAPTER I",
        "",
        "One",
        "_two_.",
        "",
        "Three.",
        "VOLUME II",
        "CHAPTER 2",
        "Four.",
        "FINIS",
    ]
    table = tmp_path / "austen" / TABLE
    table.parent.mkdir(parents=True)
    strings = b"".join(struct.pack(">Ii", 9, len(line)) + line.encode() for line in lines)
    body = zlib.compress(b"X\n" + struct.pack(">II", 16, len(lines)) + strings)
    table.write_bytes((struct.pack(">I", len(body)) + body) * 2)
    found = chapters(tmp_path)
    assert [chapter.number for chapter in found] == [1, 2, 1, 2]
    assert [chapter.text for chapter in found[:2]] == ["One two.\n\nThree.", "Four."]
    assert found[0].book == "A Novel"


def test_more_merges_leave_a_tokenizer_s_own_ids_and_cuts() -> None:
    import sentencepiece
    from extended_tokenizer import extended

    model = (CHECKPOINT / "tokenizer.model").read_bytes()
    old = sentencepiece.SentencePieceProcessor(model_proto=model)
    new = sentencepiece.SentencePieceProcessor(
        model_proto=extended(model, [(["zyzzyva zyzzyva"], 3), (["xqzj"] * 9, 2)])
    )
    assert new.get_piece_size() == old.get_piece_size() + 5
    assert len(new.encode("a zyzzyva")) < len(old.encode("a zyzzyva"))
    assert new.decode(new.encode('a {"q": "xj"} zyzzyva é\n')) == 'a {"q": "xj"} zyzzyva é\n'
    for text in ("What is 37 + 5?", "Repeat: Oslo 417 lamp", "<start_of_turn>user\n"):
        assert new.encode(text, out_type=str) == old.encode(text, out_type=str)
    tail = [old.id_to_piece(old.get_piece_size() - i) for i in (1, 2)]
    assert tail == [new.id_to_piece(new.get_piece_size() - i) for i in (1, 2)]


@pytest.mark.parametrize("sparsity", [0.0, 0.9])
def test_a_masked_ffn_is_the_ffn_of_its_first_columns(sparsity: float) -> None:
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.gemma3n.modeling_gemma3n")
    from layout import FFN, FFN_WIDTHS, TEXT
    from nested import Widths
    from transformers import Gemma3nTextConfig

    def ffn(width: int) -> torch.nn.Module:
        sizes = {"intermediate_size": [width], "activation_sparsity_pattern": [sparsity]}
        config = {
            **TEXT,
            "num_hidden_layers": 1,
            "num_kv_shared_layers": 0,
            "layer_types": ["full_attention"],
        }
        return modeling.Gemma3nTextMLP(Gemma3nTextConfig(**{**config, **sizes}))

    torch.manual_seed(0)
    whole, hidden = ffn(FFN), torch.randn(2, 5, TEXT["hidden_size"])
    expected = {}
    for width in FFN_WIDTHS:
        part = ffn(width)
        part.gate_proj.weight.data = whole.gate_proj.weight.data[:width]
        part.up_proj.weight.data = whole.up_proj.weight.data[:width]
        part.down_proj.weight.data = whole.down_proj.weight.data[:, :width]
        expected[width] = part(hidden)

    class Layer:
        mlp = whole

    class Model:
        class model:
            class language_model:
                layers = (Layer,)

    widths = Widths(Model)
    for width in FFN_WIDTHS:
        widths.fix(width)
        assert torch.allclose(whole(hidden), expected[width], atol=1e-5)
    widths.draw(Random(1), 2, full=0.0)
    drawn = whole.column_mask.sum(-1).flatten().int().tolist()
    for row, width in enumerate(drawn):
        assert width < FFN
        assert torch.allclose(whole(hidden)[row], expected[width][row], atol=1e-5)


def test_a_grown_ffn_computes_what_it_did_and_new_pieces_begin_as_what_spells_them() -> None:
    torch = pytest.importorskip("torch")
    import sentencepiece
    from extended_tokenizer import extended
    from layout import AUDIO_IDS, IMAGE_IDS
    from nested import grown

    model = (CHECKPOINT / "tokenizer.model").read_bytes()
    old = sentencepiece.SentencePieceProcessor(model_proto=model)
    new = sentencepiece.SentencePieceProcessor(model_proto=extended(model, [(["zyz zyz"], 1)]))
    rows, prefix = old.get_piece_size(), "model.language_model.layers.0.mlp."
    torch.manual_seed(0)
    weights = {
        "model.language_model.embed_tokens.weight": torch.randn(rows + IMAGE_IDS + AUDIO_IDS, 2),
        "model.language_model.embed_tokens_per_layer.weight": torch.randn(rows, 2),
        **{f"{prefix}{name}_proj.weight": torch.randn(8, 4) for name in ("gate", "up")},
        f"{prefix}down_proj.weight": torch.randn(4, 8),
    }
    made = grown(weights, old, new, 12)
    before, after = (w["model.language_model.embed_tokens.weight"] for w in (weights, made))
    (added,) = {new.id_to_piece(i) for i in range(rows + 1)} - {old.id_to_piece(i) for i in range(rows)}
    spelled = before[old.encode(added.replace("▁", " "))].mean(0)
    assert torch.equal(after[new.piece_to_id(added)], spelled)
    assert torch.equal(after[-IMAGE_IDS - AUDIO_IDS :], before[-IMAGE_IDS - AUDIO_IDS :])
    for piece in ("<bos>", "<start_of_image>", "<0x0A>", "A"):
        assert torch.equal(after[new.piece_to_id(piece)], before[old.piece_to_id(piece)])

    def ffn(w: dict[str, torch.Tensor]) -> torch.Tensor:
        gate, up, down = (w[f"{prefix}{name}_proj.weight"] for name in ("gate", "up", "down"))
        return down @ (torch.relu(gate @ torch.ones(4)) * (up @ torch.ones(4)))

    assert made[f"{prefix}gate_proj.weight"].shape == (12, 4)
    assert torch.allclose(ffn(made), ffn(weights), atol=1e-5)


def test_noisy_weights_are_off_by_half_a_step_at_most_and_come_back() -> None:
    torch = pytest.importorskip("torch")
    from weight_noise import STEPS, noise, noisy, rounded

    torch.manual_seed(0)
    names = ("layers.0.mlp.up_proj.weight", "layers.0.laurel.linear_left.weight", "norm.weight")
    sizes = ((4, 96), (4, 96), (96,))
    named = [(name, torch.nn.Parameter(torch.randn(size))) for name, size in zip(names, sizes, strict=True)]
    weights = rounded(named)
    assert [weight.data_ptr() for weight in weights] == [named[0][1].data_ptr()]
    (weight,) = weights
    before = weight.detach().clone()
    off = noise(before, 64).abs().view(4, 3, 32)  # 64 does not divide 96: groups of 32
    half = before.abs().view(4, 3, 32).amax(-1, keepdim=True) / STEPS / 2
    assert bool((off <= half).all()) and float((off / half).max()) > 0.9
    with noisy(weights):
        moved = weight.detach().clone()
        (weight.square().sum() / 2).backward()
    assert torch.equal(weight.grad, moved) and not torch.equal(moved, before)
    assert torch.equal(weight, before)
