"""Pocket: what it is trained on, the checkpoint in git, and the answers of a bundle made of it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from gemma_edge.benchmarks.measure.questions import answers, read_questions, scores, take
from gemma_edge.export.checkpoint.checkpoint import Checkpoint
from gemma_edge.export.exporter import export_bundle
from gemma_edge.runtime.model import Model
from support.margins import Array, int8_activations, leads, recorded
from support.random_gemma3n_text import random_ids

POCKET = Path(__file__).parents[1] / "pocket"
SLICED_SHARE = 0.7
CHECKPOINT, QUESTIONS = POCKET / "checkpoint", POCKET / "questions" / "questions.jsonl"
GIT_BYTES = 12_000_000
published = pytest.mark.skipif(
    not CHECKPOINT.exists(), reason="pocket/training/publish.py writes the checkpoint"
)


@pytest.fixture(autouse=True)
def pocket_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts of pocket import each other by name, as scripts do."""
    monkeypatch.syspath_prepend(str(POCKET / "training"))


def test_training_never_draws_what_is_held_out() -> None:
    from text_tasks import TEXT_TASKS, unseen_text

    for task, draw in TEXT_TASKS.items():
        random = Random(1)
        trained = {draw(random, False) for _ in range(3000)}
        assert not trained & set(unseen_text(task, 50, seed=2)), task


def test_the_other_code_is_never_a_held_out_one() -> None:
    from examples import held_out
    from text_tasks import retrieval

    random = Random(1)
    for example in (retrieval(random, False) for _ in range(2000)):
        thing = example.turns[0].text.rpartition(" ")[2].rstrip("?")
        assert not held_out(("code", thing, example.answer))


def test_pictures_that_are_held_out_show_what_training_never_shows() -> None:
    pytest.importorskip("PIL")
    from pictures import scene

    random = Random(1)
    trained = {(s.name, s.place) for _ in range(3000) for s in scene(random, False).shapes}
    held_out = [{(s.name, s.place) for s in scene(random, True).shapes} for _ in range(200)]
    assert len(trained) > 80
    assert all(shapes - trained for shapes in held_out)


def test_a_drawn_scene_has_its_shapes_in_their_places() -> None:
    pytest.importorskip("PIL")
    from pictures import COLOURS, Scene, Shape

    scene = Scene((Shape("red", "square", 1, 10, (0, 0)), Shape("blue", "circle", 2, 10, (3, -3))), 240)
    picture = scene.draw()
    assert picture.size == (64, 64)
    assert picture.getpixel((48, 16)) == COLOURS["red"]
    assert picture.getpixel((19, 45)) == COLOURS["blue"]
    assert picture.getpixel((16, 16)) == picture.getpixel((48, 48)) == (240, 240, 240)


def test_held_out_voices_are_no_voices_of_training() -> None:
    pytest.importorskip("soxr")
    from speech import SPEECH_TASKS, TEST_VOICES, VOICES, unseen_speech

    assert not set(VOICES) & set(TEST_VOICES)
    for task in SPEECH_TASKS:
        voices = {example.turns[0].media.voice.split("+")[1] for example in unseen_speech(task, 50, seed=2)}
        assert voices == set(TEST_VOICES)


def test_a_packed_row_sees_its_own_conversation_and_a_window() -> None:
    import numpy as np
    from batches import Sequence_, masks, pack
    from layout import WINDOW

    lengths = (200, 160, 120)
    sequences = [Sequence_([*range(10, 10 + n)], [-100] * (n - 2) + [7, 8]) for n in lengths]
    batch = pack(sequences, rows=4)
    assert batch.segments.shape[0] == 2  # 200 + 160 in the first, 120 in the second
    assert [int(np.sum(batch.segments == i)) for i in (1, 2)] == [200 + 120, 160]
    assert batch.labels[0, 197:200].tolist() == [7, 8, -100]
    seen = masks(batch.segments)
    for (row, query), key in itertools.product(((0, 199), (0, 200), (0, 359), (1, 119)), range(384)):
        same = batch.segments[row, query] == batch.segments[row, key] and key <= query
        assert seen["full_attention"][row, 0, query, key] == same
        assert seen["sliding_attention"][row, 0, query, key] == (same and query - key < WINDOW)


def test_short_answers_weigh_as_much_as_long_ones_of_the_square_of_their_length() -> None:
    pytest.importorskip("transformers")
    import numpy as np
    from model import answer_weights

    labels = np.array([[-100, 5, -100, 5, 5, 5, 5], [5, -100, -100, -100, -100, -100, 5]])
    assert answer_weights(labels).tolist() == [1, 0.5, 0.5, 0.5, 0.5, 1, 1]


def test_a_talk_about_a_picture_shows_it_once_and_answers_every_question() -> None:
    pytest.importorskip("PIL")
    from pictures import QUESTIONS, Scene, image_talk

    random = Random(1)
    for talk in (image_talk(random, dict.fromkeys(QUESTIONS, 1.0)) for _ in range(50)):
        assert [turn.role for turn in talk.turns] == ["user", "model"] * 3 + ["user"]
        assert [isinstance(turn.media, Scene) for turn in talk.turns] == [True, *[False] * 6]
        assert not any(shape.held_out for shape in talk.turns[0].media.shapes)


def test_muon_moves_matrices_by_orthogonal_steps_of_adamw_s_size() -> None:
    torch = pytest.importorskip("torch")
    from muon import Muon, orthogonalized

    torch.manual_seed(0)
    for shape in ((32, 64), (64, 32)):
        singular = torch.linalg.svdvals(orthogonalized(torch.randn(1, *shape)))
        assert float(singular.min()) > 0.6 and float(singular.max()) < 1.3
    weight = torch.nn.Parameter(torch.zeros(24, 4, 3, 3))
    weight.grad = torch.randn_like(weight)
    Muon([weight], lr=0.1, weight_decay=0.0).step()
    assert float(weight.detach().square().mean().sqrt()) == pytest.approx(0.1 * 0.2, rel=0.2)


def test_the_curve_leaves_out_steps_that_were_made_again(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from curve import entries

    made = [("decoder", 1), ("test", 1), ("decoder", 2), ("decoder", 3), ("decoder", 2), ("decoder", 2)]
    lines = [json.dumps({"part": part, "step": step, "n": n}) for n, (part, step) in enumerate(made)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    assert [entry["n"] for entry in entries(tmp_path / "log.jsonl")] == [0, 1, 2, 4, 5]


# The checkpoint. ----------------------------------------------------------------------------------


@published
def test_it_is_small_enough_for_git() -> None:
    assert sum(path.stat().st_size for path in CHECKPOINT.rglob("*") if path.is_file()) <= GIT_BYTES


@published
def test_it_has_every_mechanism() -> None:
    with Checkpoint.open(CHECKPOINT) as checkpoint:
        config = checkpoint.config
        assert sorted(checkpoint.towers) == ["audio", "vision"]
    assert config.vocab_size_per_layer_input < config.vocab_size
    assert {config.layer_types[i] for i in range(config.first_shared_layer, config.num_hidden_layers)} == {
        "sliding_attention",
        "full_attention",
    }
    assert config.activation_sparsity[0] > 0 and config.altup_num_inputs == 4
    assert config.final_logit_softcapping and config.sliding_window < 100


@published
def test_transformers_and_the_reference_agree_on_it() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from gemma_edge.export.emit.reference.reference_text import evaluate

    try:
        model = transformers.Gemma3nForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32)
    except ImportError as error:  # the vision tower is timm's
        pytest.skip(str(error))
    with Checkpoint.open(CHECKPOINT) as checkpoint:
        ids = [2, *random_ids(checkpoint.config, 90)]
        ids = [i if i < checkpoint.config.vocab_size_per_layer_input else 7 for i in ids]
        ours = evaluate(checkpoint, [ids])[0]
    with torch.no_grad():
        theirs = model.eval()(input_ids=torch.tensor([ids])).logits[0].numpy()
    assert abs(ours - theirs).max() < 1e-3


# A bundle of it. ----------------------------------------------------------------------------------


def bundle_model(folder: Path, recipe: str, format: str = "onnx") -> Model:
    pytest.importorskip("PIL")
    options: dict[str, Any] = {"context": 512, "calibrate": "none"}
    bundle = export_bundle(CHECKPOINT, folder / recipe, recipe=recipe, format=format, **options).path
    return Model.load(bundle, threads=2, keep_encoders=True, log=lambda text: None)


def is_near_tie(model: Model, answer: str, logits: list[Array]) -> bool:
    """Whether a wrong answer left the right one, `answer`, where rounding may choose otherwise."""
    right = model.tokenizer.encode(answer, bos=False)
    step = next(i for i, row in enumerate(logits) if i == len(right) or row.argmax() != right[i])
    return bool(leads(logits[step][None])[0] <= 2 * int8_activations(logits[step]))


@published
@pytest.mark.parametrize(("recipe", "format"), [("int8", "onnx"), ("int8", "tflite"), ("int4", "onnx")])
def test_a_bundle_answers_as_one_did_when_it_was_measured(recipe: str, format: str, tmp_path: Path) -> None:
    measured = json.loads((POCKET / "questions" / "measured.json").read_text())[recipe]
    model = bundle_model(tmp_path, recipe, format)
    given, near_ties = [], set()
    for question in read_questions(QUESTIONS):
        with recorded(model) as logits:
            given += answers(model, [question])
        if not given[-1].right and is_near_tie(model, question.answer, logits):
            near_ties.add(question.task)
    got = {task: score.right for task, score in scores(given).items()}
    # One answer a task may tip over with another CPU's rounding.
    assert {task: n for task, n in got.items() if n + (task in near_ties) < measured[task]} == {}
    assert set(got) == set(measured)


@published
def test_transformers_gives_the_answers_of_an_fp32_bundle(tmp_path: Path) -> None:
    """Of every task, pictures and recordings among them, from the checkpoint as it is."""
    for package in ("torch", "transformers", "PIL"):
        pytest.importorskip(package)
    from transformers_eval import Checkpoint as InTransformers

    try:
        model = InTransformers(CHECKPOINT)
    except (ImportError, RuntimeError) as error:  # a torchvision that does not fit torch
        pytest.skip(f"timm: {error}")
    questions = take(read_questions(QUESTIONS), 2)
    theirs = list(model.answers(questions))
    assert list(answers(bundle_model(tmp_path, "fp32"), questions)) == theirs


@published
def test_a_slice_of_its_ffns_answers_too(tmp_path: Path) -> None:
    """Half of the columns; a third of FFNs that were not trained so answers nothing."""
    pytest.importorskip("PIL")
    path = export_bundle(
        CHECKPOINT, tmp_path / "out", recipe="int8", context=512, verify=False, slice="ffn=192"
    ).path
    questions = take(read_questions(QUESTIONS), 3)
    given = list(answers(Model.load(path, keep_encoders=True, log=lambda text: None), questions))
    assert sum(one.right for one in given) >= SLICED_SHARE * len(given)
