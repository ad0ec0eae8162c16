"""Messages with attachments become the ids that transformers' processor makes of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gemma_edge.export.checkpoint.tokenizer_files import convert
from gemma_edge.export.synth.synth_gemma3n import CHAT_TEMPLATE
from gemma_edge.runtime.errors import BundleError, UsageError
from gemma_edge.runtime.media.attachments import Attachment, Reader
from gemma_edge.runtime.model import Model
from gemma_edge.runtime.prompt.chat_template import ChatTemplate
from gemma_edge.runtime.prompt.prompt_builder import Prompt, build
from gemma_edge.runtime.prompt.tokenizer import Tokenizer
from support.gemma_tokenizer_json import gemma_json
from support.stub_modalities import AUDIO_TOKENS, IMAGE_SIZE, IMAGE_TOKENS, modalities

NAMES = {
    "boi": "<start_of_image>",
    "eoi": "<end_of_image>",
    "image": "<image_soft_token>",
    "boa": "<start_of_audio>",
    "eoa": "<end_of_audio>",
    "audio": "<audio_soft_token>",
}
DATA = gemma_json()
FIRST = len(DATA["model"]["vocab"])
IDS = {"image": FIRST, **{key: FIRST + 1 + i for i, key in enumerate(("boi", "eoi", "boa", "eoa", "audio"))}}
PICTURES = [np.full((9, 7, 3), shade, np.uint8) for shade in (0, 90, 255)]
CLIPS = [np.full(count, 0.1, np.float32) for count in (1_000, 16_000)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(convert(DATA, {}, Path("tokenizer.json")))
    return Tokenizer(path, {NAMES[key]: index for key, index in IDS.items()})


class Silent:
    """A decoder that is never fed."""

    context, chunk, position = 4096, 64, 0


@pytest.fixture
def model(tokenizer: Tokenizer) -> Model:
    every = modalities(IDS)
    reader = Reader(every, context=Silent.context)
    template = ChatTemplate(CHAT_TEMPLATE)
    return Model(Silent(), None, None, tokenizer, template=template, reader=reader)  # type: ignore[arg-type]


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def image(index: int = 0) -> dict[str, Any]:
    return {"type": "image", "image": PICTURES[index]}


def audio(index: int = 0) -> dict[str, Any]:
    return {"type": "audio", "audio": CLIPS[index]}


def user(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "image_first": [user(image(), text("the man ran"))],
    "image_last": [user(text("the man ran"), image())],
    "image_alone": [user(image())],
    "newlines_meet": [user(text("a\n"), image(), text("\n\nb"), audio(), text("\n"))],
    "two_side_by_side": [user(image(), image(1), audio(), audio(1), text("the"))],
    "interleaved": [user(text("the"), audio(1), text("man"), image(2), text("and"), audio(), image())],
    "turns": [
        {"role": "system", "content": [text("Be brief.")]},
        user(image(), text("the canal"), audio()),
        {"role": "assistant", "content": [text("the plage")]},
        user(text("and"), image(1), text("was")),
    ],
}


@pytest.fixture(scope="module")
def processor() -> Any:
    """transformers' own, with the same tokenizer."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("PIL")
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    fast = tokenizers.Tokenizer.from_str(json.dumps(DATA))
    names = sorted(IDS, key=IDS.__getitem__)
    fast.add_special_tokens([tokenizers.AddedToken(NAMES[n], normalized=False, special=True) for n in names])
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return transformers.Gemma3nProcessor(
        transformers.Gemma3nAudioFeatureExtractor(),
        SiglipImageProcessorPil(do_normalize=False, resample=2, size=size),
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=fast,
            bos_token="<bos>",
            eos_token="<eos>",
            pad_token="<pad>",
            extra_special_tokens={f"{key}_token": name for key, name in NAMES.items()},
        ),
        chat_template=CHAT_TEMPLATE,
        audio_seq_length=AUDIO_TOKENS,
        image_seq_length=IMAGE_TOKENS,
    )


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_ids_pixels_and_features_are_those_of_the_processor(name: str, model: Model, processor: Any) -> None:
    from PIL import Image

    def theirs(part: dict[str, Any]) -> dict[str, Any]:
        return part | {"image": Image.fromarray(part["image"])} if part["type"] == "image" else part

    messages = [m | {"content": [theirs(p) for p in m["content"]]} for m in CONVERSATIONS[name]]
    expected = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="np"
    )
    got = model.prompt(CONVERSATIONS[name])
    assert got.ids == expected["input_ids"][0].tolist()
    items = [item.attachment for item in got.placed]
    pixels = [item.data / 255 for item in items if item.kind == "image"]
    assert np.abs(np.array(pixels) - expected.get("pixel_values", np.zeros(0))).max(initial=0) <= 1 / 255
    log_mel = model.reader.modalities["audio"].log_mel  # type: ignore[attr-defined]
    clips = [log_mel(item.data) for item in items if item.kind == "audio"]
    # The processor pads all clips of a prompt to the longest, which gives a shorter one some frames more.
    for (features, mask), padded in zip(clips, expected.get("input_features", ()), strict=True):
        assert np.abs(features[mask] - padded[: mask.sum()]).max() <= 1e-4
    if len(clips) == 1:
        assert expected["input_features_mask"].sum() == clips[0][1].sum()


def test_the_ids_around_an_image(model: Model, tokenizer: Tokenizer) -> None:
    prompt = model.prompt([user(image(), text("the"))])
    around = tokenizer.encode("<start_of_turn>user\n\n\n<start_of_image>", bos=True)
    soft = [IDS["image"]] * IMAGE_TOKENS
    after = tokenizer.encode("<end_of_image>\n\nthe<end_of_turn>\n<start_of_turn>model\n", bos=False)
    assert prompt.ids == [*around, *soft, *after]
    ((start, stop),) = [(item.start, item.stop) for item in prompt.placed]
    assert (start, stop) == (len(around), len(around) + IMAGE_TOKENS)


def test_the_built_in_template_has_places_for_attachments(model: Model) -> None:
    expected = model.prompt(CONVERSATIONS["interleaved"]).ids
    model.template = ChatTemplate()
    assert model.prompt(CONVERSATIONS["interleaved"]).ids == expected


def test_attached_files_come_before_the_text(model: Model) -> None:
    items = [item.attachment for item in model.prompt(CONVERSATIONS["two_side_by_side"]).placed]
    assert model.prompt("the", attach=items).ids == model.prompt(CONVERSATIONS["two_side_by_side"]).ids
    assert [item.kind for item in items] == ["image", "image", "audio", "audio"]


def test_a_raw_prompt_has_its_own_places_or_gets_them_at_its_start(model: Model) -> None:
    (item,) = (placed.attachment for placed in model.prompt([user(image())]).placed)
    placed = model.prompt("the <image_soft_token> man", raw=True, attach=[item])
    assert placed.placed[0].start == len(model.tokenizer.encode("the \n\n<start_of_image>", bos=True))
    first = model.prompt("the man", raw=True, attach=[item])
    assert first.ids == model.prompt("<image_soft_token>the man", raw=True, attach=[item]).ids


def test_keys_tell_pictures_apart_and_ids_do_not(model: Model) -> None:
    def prompt(index: int) -> Prompt:
        return model.prompt([user(image(index), text("the"))])

    assert prompt(0).ids == prompt(1).ids and prompt(0).keys != prompt(1).keys
    assert prompt(0).keys == prompt(0).keys
    assert [key for key in prompt(0).keys if key >= 0] == [i for i in prompt(0).ids if i != IDS["image"]]


def test_what_takes_how_much_is_told(model: Model) -> None:
    prompt = model.prompt(CONVERSATIONS["turns"])
    assert prompt.soft_tokens == 2 * IMAGE_TOKENS + AUDIO_TOKENS
    assert f"messages[1]['content'][2] takes {AUDIO_TOKENS} tokens" in prompt.takes()


def picture() -> Attachment:
    return Attachment("image", "photo.jpg", IMAGE_TOKENS, np.zeros((3, 2, 2), np.uint8))


def make(words: str, *items: Attachment, tokenizer: Tokenizer) -> Prompt:
    return build(words, items, modalities(IDS), tokenizer)


def test_a_placeholder_that_the_user_typed_is_refused(model: Model, tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="the text has <image_soft_token> in it"):
        model.prompt([user(text("<image_soft_token>"), image())])
    # Without attachments it is one more token, as it is for transformers.
    assert make("<image_soft_token>", tokenizer=tokenizer).ids[1:] == [IDS["image"]]


def test_a_template_without_places_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(BundleError, match=r"one for every attachment .* none for photo.jpg"):
        make("no place", picture(), tokenizer=tokenizer)


def test_a_tokenizer_without_the_tokens_is_refused(tokenizer: Tokenizer) -> None:
    bare = Tokenizer(tokenizer.path, vocab_size=FIRST + 9)
    with pytest.raises(BundleError, match=f"a text for token {IDS['image']}"):
        make("", picture(), tokenizer=bare)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "image"}, "needs one of 'path', 'url' and 'image'"),
        ({"type": "image", "path": "a", "url": "b"}, "needs one of"),
        ({"type": "audio", "image": "a.png"}, "needs one of"),
        ({"type": "image", "url": "https://example.org/a.png"}, "download it first"),
        ({"type": "image", "image": "http://example.org/a.png"}, "download it first"),
        ({"type": "image", "image": "data:image/png;base64,!"}, "not base64"),
        ({"type": "image", "image": "data:image/png;base64"}, "a data URL without data"),
        ({"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}, "download it first"),
        ({"type": "image_url", "image_url": 7}, '"image_url": {"url": ...}'),
        ({"type": "input_audio", "input_audio": {}}, '"input_audio": {"data": base64}'),
        ({"type": "input_audio", "input_audio": {"data": "!"}}, "not base64"),
        ({"type": "image", "image": np.zeros((2, 2, 3))}, "a Pillow image or u8"),
        ({"type": "image", "image": np.zeros((2, 2, 7), np.uint8)}, r"not \(2, 2, 7\)"),
        ({"type": "image", "image": 7}, "not int"),
        ({"type": "audio", "audio": np.zeros((2, 9_000), np.float32)}, r"f32 \(n,\) at 16 kHz"),
        ({"type": "audio", "audio": np.zeros(9_000, np.int16)}, r"f32 \(n,\) at 16 kHz"),
        ({"type": "audio", "audio": np.zeros(20, np.float32)}, "513 samples or more"),
        ({"type": "audio", "audio": np.full(9_000, np.nan, np.float32)}, "finite"),
        ({"type": "video", "video": PICTURES[0]}, "must be a path, not ndarray"),
    ],
)
def test_sources_that_are_none_are_named(part: dict[str, Any], message: str, model: Model) -> None:
    with pytest.raises(UsageError, match=rf"messages\[0\]\['content'\]\[1\].*{message}"):
        model.prompt([user(text("x"), part)])


@pytest.mark.parametrize("messages", [3, [], [3], [{"role": "user", "content": 3}], {"role": "user"}])
def test_malformed_messages_are_still_named(messages: Any, model: Model) -> None:
    with pytest.raises(UsageError, match="messages"):
        model.prompt(messages)


def test_long_arrays_become_several_clips(model: Model) -> None:
    samples: NDArray[np.float32] = np.full(16_000 * 50, 0.1, np.float32)
    prompt = model.prompt([user({"type": "audio", "audio": samples})])
    lengths: Sequence[int] = [len(item.attachment.data) for item in prompt.placed]
    assert sum(lengths) == len(samples) and max(lengths) <= 16_000 * 30 and len(lengths) == 2
