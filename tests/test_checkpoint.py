"""Checkpoint folders: what is read, in every layout, and what is refused and how it is named."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from gemma_edge.export.checkpoint import new_checkpoint
from gemma_edge.export.checkpoint.checkpoint import Checkpoint, resolve
from gemma_edge.export.synth import synth_checkpoint as synth
from gemma_edge.runtime.errors import CheckpointError, GemmaEdgeError, UsageError

PREFIX = "model.language_model."
NORM = f"{PREFIX}norm.weight"
Header = dict[str, Any]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synth.synthesize(tmp_path_factory.mktemp("synth") / "tiny").path


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(original, tmp_path / "checkpoint"))


@pytest.fixture(scope="module")
def original_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(new_checkpoint, "SHARD_BYTES", 1_500_000)
        return synth.synthesize(tmp_path_factory.mktemp("synth") / "sharded").path


@pytest.fixture
def sharded(original_shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original_shards, tmp_path / "sharded"))


def read_header(path: Path) -> tuple[Header, bytes]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_raw(path: Path, header: bytes, data: bytes, length: int | None = None) -> None:
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)


def edit(path: Path, change: Callable[[Header], Any]) -> None:
    """Rewrites a shard's header; `change` edits it in place or returns another."""
    header, data = read_header(path)
    write_raw(path, json.dumps(change(header) or header).encode(), data)


def weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def append(folder: Path, name: str, array: np.ndarray, dtype: str) -> None:
    """Adds a tensor at the end of the single shard."""
    header, data = read_header(weights(folder))
    header[name] = {
        "dtype": dtype,
        "shape": list(array.shape),
        "data_offsets": [len(data), len(data) + array.nbytes],
    }
    write_raw(weights(folder), json.dumps(header).encode(), data + array.tobytes())


def refusal(folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    assert caught.value.exit_code == 3
    return caught.value


# Reading. -----------------------------------------------------------------------------------------


def test_reads_the_same_values_as_the_safetensors_library(original: Path) -> None:
    with Checkpoint.open(original) as checkpoint, safe_open(weights(original), "pt") as reference:
        for name, spec in checkpoint.specs.items():
            expected = reference.get_tensor(PREFIX + name).float().numpy()
            got = checkpoint.read(name)
            assert got.dtype == np.float32 and got.shape == spec.shape
            np.testing.assert_array_equal(got, expected, err_msg=name)
            assert checkpoint.dtype(name) == "BF16"


def test_rows_are_slices_of_the_tensor(original: Path) -> None:
    name = "embed_tokens.weight"
    with Checkpoint.open(original) as checkpoint:
        whole = checkpoint.read(name)
        np.testing.assert_array_equal(checkpoint.rows(name, 5, 9), whole[5:9])
        assert checkpoint.rows(name, 5, 5).shape == (0, 128)
        chunks = list(checkpoint.iter_rows(name, 100))
        assert [len(chunk) for chunk in chunks] == [100] * 5 + [44]
        np.testing.assert_array_equal(np.concatenate(chunks), whole)
        raw = checkpoint.raw_rows(name, 1, 3)
        assert raw.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(raw.astype(np.float32), whole[1:3])
        for start, stop in ((-1, 2), (2, 1), (0, 545)):
            with pytest.raises(IndexError):
                checkpoint.rows(name, start, stop)


@pytest.mark.parametrize(("dtype", "numpy_dtype"), [("F16", np.float16), ("F32", np.float32)])
def test_other_float_dtypes_are_read(folder: Path, dtype: str, numpy_dtype: type) -> None:
    edit(weights(folder), lambda header: header.update({"multi_modal_projector.old_norm": header.pop(NORM)}))
    values: np.ndarray = np.linspace(-2, 2, 128).astype(numpy_dtype)
    append(folder, NORM, values, dtype)
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.dtype("norm.weight") == dtype
        assert checkpoint.raw_rows("norm.weight", 0, 128).dtype == numpy_dtype
        np.testing.assert_array_equal(checkpoint.read("norm.weight"), values.astype(np.float32))


@pytest.mark.parametrize("prefix", ["language_model.model.", "language_model.", "model.", ""])
def test_every_layout_gives_the_same_tensors(original: Path, folder: Path, prefix: str) -> None:
    edit(weights(folder), lambda h: {key.replace(PREFIX, prefix): value for key, value in h.items()})
    with Checkpoint.open(original) as first, Checkpoint.open(folder) as second:
        for name in ("norm.weight", "layers.7.mlp.down_proj.weight"):
            np.testing.assert_array_equal(first.read(name), second.read(name))


def test_an_untied_head_is_read_and_a_tied_one_may_be_stored_twice(tmp_path: Path, folder: Path) -> None:
    untied = synth.synthesize(tmp_path / "untied", config={"tie_word_embeddings": False}).path
    with Checkpoint.open(untied) as checkpoint:
        assert checkpoint.read("lm_head.weight").shape == (544, 128)
    append(folder, "lm_head.weight", np.zeros((544, 128), ml_dtypes.bfloat16), "BF16")
    with Checkpoint.open(folder) as checkpoint:
        assert "lm_head.weight" not in checkpoint.specs


@pytest.mark.parametrize("name", ["model.vision_tower.a", "audio_tower.b.weight", "model.embed_audio.c"])
def test_towers_that_the_config_does_not_describe_are_ignored(folder: Path, name: str) -> None:
    append(folder, name, np.zeros((3, 2), np.int64), "I64")
    config = json.loads((folder / "config.json").read_text())
    del config["vision_config"], config["audio_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.towers == {}


def test_a_checkpoint_without_any_tensor_of_a_tower_has_no_encoder(original: Path) -> None:
    assert "vision_config" in json.loads((original / "config.json").read_text())
    with Checkpoint.open(original) as checkpoint:
        assert checkpoint.towers == {}


def test_shards_give_the_same_tensors_as_one_file(original: Path, sharded: Path) -> None:
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    with Checkpoint.open(original) as first, Checkpoint.open(sharded) as second:
        for name in first.specs:
            np.testing.assert_array_equal(first.read(name), second.read(name), err_msg=name)


def test_threads_may_read_at_once(original: Path) -> None:
    with Checkpoint.open(original) as checkpoint, ThreadPoolExecutor(8) as pool:
        names = list(checkpoint.specs)
        expected = [checkpoint.read(name).sum() for name in names]
        assert [array.sum() for array in pool.map(checkpoint.read, names)] == expected


def test_close_may_be_repeated(original: Path) -> None:
    checkpoint = Checkpoint.open(original)
    checkpoint.close()
    checkpoint.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        checkpoint.read("norm.weight")


# Names, shapes, dtypes, values. -------------------------------------------------------------------


EXPAND = "model.vision_tower.timm_model.blocks.1.0.pw_exp.conv.weight"


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synth.synthesize(tmp_path_factory.mktemp("synth") / "towers", encoders=True).path


@pytest.fixture
def towers(multimodal: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(multimodal, tmp_path / "towers"))


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_encoders_are_read_in_both_layouts(multimodal: Path, towers: Path, prefix: str) -> None:
    edit(weights(towers), lambda h: {key.replace("model.vision", prefix + "vision"): h[key] for key in h})
    with Checkpoint.open(multimodal) as first, Checkpoint.open(towers) as second:
        assert list(second.towers) == ["vision", "audio"]
        for name in (EXPAND.removeprefix("model."), "embed_audio.embedding.weight"):
            np.testing.assert_array_equal(first.read(name), second.read(name))
            assert second.read(name).shape == second.specs[name].shape  # stored as (out, in, 1, 1)
    with Checkpoint.open(towers, encoders=["audio"]) as third:
        assert list(third.towers) == ["audio"] and not any("vision" in name for name in third.specs)


def test_a_missing_tensor_of_a_tower_is_named(towers: Path) -> None:
    edit(weights(towers), lambda h: h.update({"model.multi_modal_projector.x": h.pop(EXPAND)}))
    error = refusal(towers)
    assert error.field == EXPAND.removeprefix("model.") and "no such tensor" in str(error)
    Checkpoint.open(towers, encoders=["audio"]).close()


def test_an_extra_or_misshapen_tensor_of_a_tower_is_named(towers: Path) -> None:
    shape = json.loads(json.dumps(read_header(weights(towers))[0][EXPAND]["shape"]))
    edit(weights(towers), lambda header: header[EXPAND].update(shape=shape[:2]))
    error = refusal(towers)
    assert error.field == EXPAND and error.got == tuple(shape[:2])
    edit(weights(towers), lambda header: header[EXPAND].update(shape=shape))
    append(towers, "model.audio_tower.conformer.99.norm.weight", np.zeros(3, np.float32), "F32")
    assert refusal(towers).field == "model.audio_tower.conformer.99.norm.weight"


def test_a_missing_tensor_is_named(folder: Path) -> None:
    edit(weights(folder), lambda header: header.update({"model.multi_modal_projector.x": header.pop(NORM)}))
    error = refusal(folder)
    assert error.field == "norm.weight" and error.path == weights(folder) and "(128,)" in str(error)


def test_an_extra_tensor_is_named(folder: Path) -> None:
    append(folder, f"{PREFIX}layers.12.norm.weight", np.zeros(3, np.float32), "F32")
    assert refusal(folder).field == f"{PREFIX}layers.12.norm.weight"


def test_a_misshapen_tensor_is_named_with_both_shapes(folder: Path) -> None:
    edit(weights(folder), lambda header: header[NORM].update(shape=[64, 2]))
    error = refusal(folder)
    assert error.field == NORM and error.expected == "shape (128,)" and error.got == (64, 2)


def test_a_config_that_contradicts_the_tensors_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["laurel_rank"] = 8
    (folder / "config.json").write_text(json.dumps(config))
    assert "laurel.linear_left.weight" in refusal(folder).field


def test_integer_weights_are_refused_by_name(folder: Path) -> None:
    edit(weights(folder), lambda header: header[NORM].update(dtype="I16"))
    error = refusal(folder)
    assert error.field == NORM and error.got == "I16"


def test_one_tensor_under_two_names_is_refused(folder: Path) -> None:
    append(folder, "model.norm.weight", np.ones(128, np.float32), "F32")
    assert "norm.weight once" in str(refusal(folder))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_named_with_its_index(folder: Path, bad: float) -> None:
    name = "layers.3.mlp.up_proj.weight"
    header, data = read_header(weights(folder))
    entry, damaged = header[PREFIX + name], bytearray(data)
    at = entry["data_offsets"][0] + 2 * (40 * 128 + 7)
    damaged[at : at + 2] = np.array(bad, ml_dtypes.bfloat16).tobytes()
    write_raw(weights(folder), json.dumps(header).encode(), bytes(damaged))
    with Checkpoint.open(folder) as checkpoint:
        for start, stop in ((0, checkpoint.specs[name].shape[0]), (39, 42)):
            with pytest.raises(CheckpointError, match=r"up_proj\.weight\[40, 7\]"):
                checkpoint.rows(name, start, stop)
        checkpoint.rows(name, 41, 42)
        assert not np.isfinite(checkpoint.raw_rows(name, 40, 41).astype(np.float32)).all()


def test_large_finite_weights_are_not_taken_for_infinite_ones(original: Path) -> None:
    with Checkpoint.open(original) as checkpoint:
        checkpoint.check_finite("norm.weight", np.full(128, 3e38, np.float32))


# Headers that lie. --------------------------------------------------------------------------------


def _offsets(begin: int, end: int) -> Callable[[Header], None]:
    def change(header: Header) -> None:
        old = header[NORM]["data_offsets"]
        header[NORM]["data_offsets"] = [old[0] + begin, old[1] + end]

    return change


HEADERS: dict[str, tuple[Callable[[Header], Any], str]] = {
    "unknown dtype": (lambda h: h[NORM].update(dtype="F128"), "dtype"),
    "dtype of the wrong size": (lambda h: h[NORM].update(dtype="F32"), "data_offsets"),
    "dtype that is no string": (lambda h: h[NORM].update(dtype=["BF16"]), "dtype"),
    "negative shape": (lambda h: h[NORM].update(shape=[-128]), "shape"),
    "shape of booleans": (lambda h: h[NORM].update(shape=[True, 128]), "shape"),
    "huge shape": (lambda h: h[NORM].update(shape=[2**62, 2**62]), "data_offsets"),
    "offsets reversed": (lambda h: h[NORM].update(data_offsets=[256, 0]), "data_offsets"),
    "three offsets": (lambda h: h[NORM].update(data_offsets=[0, 1, 2]), "data_offsets"),
    "offsets beyond the file": (_offsets(10**9, 10**9), "data_offsets"),
    "overlap": (_offsets(-2, -2), "data_offsets"),
    "hole": (
        lambda h: {k: v for k, v in h.items() if not k.endswith("layers.1.mlp.up_proj.weight")},
        "data_offsets",
    ),
    "unknown key": (lambda h: h[NORM].update(strides=[1]), "norm"),
    "entry that is a list": (lambda h: h.update({NORM: []}), "norm"),
    "metadata of numbers": (lambda h: h.update({"__metadata__": {"n": 1}}), "__metadata__"),
    "header that is a list": (lambda h: [h], "header"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_lying_header_is_refused(folder: Path, name: str) -> None:
    change, field = HEADERS[name]
    edit(weights(folder), change)
    error = refusal(folder)
    assert error.path == weights(folder) and field in error.field


def test_a_bad_header_length_or_text_is_refused(folder: Path) -> None:
    path = weights(folder)
    for raw, field in (
        (b"", "file"),
        (b"\x10\0\0", "file"),
        ((2**63).to_bytes(8, "little") + b"{}", "header length"),
        ((99_999_999).to_bytes(8, "little") + b"{}", "header length"),
        ((2).to_bytes(8, "little") + b"{]", "header"),
        ((2).to_bytes(8, "little") + b"\xff\xfe", "header"),
        ((100_000).to_bytes(8, "little") + b"[" * 100_000, "header"),
    ):
        path.write_bytes(raw)
        assert refusal(folder).field == field


def test_a_name_that_appears_twice_is_refused(folder: Path) -> None:
    header, data = read_header(weights(folder))
    text = json.dumps(header)
    write_raw(weights(folder), (text[:-1] + f', "{NORM}": {json.dumps(header[NORM])}}}').encode(), data)
    assert "twice" in str(refusal(folder))


@pytest.mark.parametrize("change", [-1, -5000, 1])
def test_a_truncated_or_longer_file_is_refused(folder: Path, change: int) -> None:
    raw = weights(folder).read_bytes()
    weights(folder).write_bytes(raw[:change] if change < 0 else raw + b"\0")
    error = refusal(folder)
    assert error.field == "file" and f"{len(raw)} bytes" in str(error)


def test_a_file_that_shrinks_after_it_was_opened_is_an_error(folder: Path) -> None:
    with Checkpoint.open(folder) as checkpoint:
        with weights(folder).open("r+b") as file:
            file.truncate(200_000)
        with pytest.raises(CheckpointError, match=r"norm\.weight"):
            checkpoint.read("norm.weight")


# The index. ---------------------------------------------------------------------------------------


def edit_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "..", "", "a\0b", 3])
def test_an_index_that_leaves_the_folder_is_refused(sharded: Path, name: object) -> None:
    edit_index(sharded, lambda weight_map: weight_map.update({NORM: name}))
    assert refusal(sharded).field == f"weight_map.{NORM}"


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert refusal(sharded).path == shard


def test_an_index_that_disagrees_with_a_shard_is_refused(sharded: Path) -> None:
    first = min(sharded.glob("model-*.safetensors")).name
    edit_index(sharded, lambda weight_map: weight_map.update({NORM: first}))
    assert refusal(sharded).field == NORM
    edit_index(sharded, lambda weight_map: weight_map.pop(NORM))
    assert refusal(sharded).field == f"weight_map.{NORM}"


def test_a_folder_without_weights_and_a_path_that_is_no_folder_are_refused(folder: Path) -> None:
    weights(folder).unlink()
    assert "neither" in str(refusal(folder))
    weights(folder).mkdir()
    assert "regular file" in str(refusal(folder))
    assert refusal(folder / "config.json").field == "folder"
    (folder / "model.safetensors.index.json").write_text("{")
    weights(folder).rmdir()
    assert refusal(folder).expected == "JSON"


# Side files, fingerprint, source. -----------------------------------------------------------------


def test_the_revision_tells_weights_and_configs_apart(original: Path, folder: Path) -> None:
    def revision() -> str:
        with Checkpoint.open(folder) as checkpoint:
            return checkpoint.revision()

    with Checkpoint.open(original) as checkpoint:
        seen = [checkpoint.revision()]
    assert revision() == seen[0]
    raw = bytearray(weights(folder).read_bytes())
    raw[8 + int.from_bytes(raw[:8], "little")] ^= 1  # a weight
    weights(folder).write_bytes(raw)
    seen.append(revision())
    with (folder / "config.json").open("a") as file:
        file.write("\n")
    seen.append(revision())
    assert len(set(seen)) == 3


def test_the_chat_template_is_found_wherever_it_lives(folder: Path) -> None:
    with Checkpoint.open(folder) as checkpoint:
        assert "<start_of_turn>" in (checkpoint.chat_template() or "")
        (folder / "chat_template.jinja").unlink()
        assert checkpoint.chat_template() is None
        config = folder / "tokenizer_config.json"
        config.write_text(json.dumps({"chat_template": "one"}))
        assert checkpoint.chat_template() == "one"
        named = [{"name": "tool_use", "template": "two"}, {"name": "default", "template": "three"}]
        config.write_text(json.dumps({"chat_template": named}))
        assert checkpoint.chat_template() == "three"
        config.write_text(json.dumps({"chat_template": named[:1]}))
        with pytest.raises(CheckpointError, match="tool_use"):
            checkpoint.chat_template()
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": "four"}))
        assert checkpoint.chat_template() == "four"


def test_side_files_are_listed_and_read(folder: Path) -> None:
    with Checkpoint.open(folder) as checkpoint:
        assert set(checkpoint.files()) == {
            "tokenizer.model",
            "tokenizer_config.json",
            "chat_template.jinja",
            "generation_config.json",
            "preprocessor_config.json",
        }
        assert checkpoint.generation_config()["top_k"] == 64
        (folder / "generation_config.json").write_text("[1]")
        with pytest.raises(CheckpointError, match="JSON object"):
            checkpoint.generation_config()
        (folder / "generation_config.json").unlink()
        assert checkpoint.generation_config() == {}


def test_resolve_takes_a_folder_or_a_hub_id(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    assert resolve(str(original)) == original
    for source in ("no such folder", "a/b/c", "../up", str(weights(original))):
        with pytest.raises(UsageError, match="neither a checkpoint folder"):
            resolve(source)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda source, allow_patterns: f"/cache/{source}"
    )
    assert resolve("google/gemma-3n-E2B-it") == Path("/cache/google/gemma-3n-E2B-it")

    def offline(source: str, allow_patterns: list[str]) -> str:
        raise ConnectionError("no route to host\nlong story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(GemmaEdgeError, match=r"no route to host\. Check the connection"):
        resolve("google/gemma-3n-E2B-it")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match=r'pip install ".\[hub\]"'):
        resolve("google/gemma-3n-E2B-it")
