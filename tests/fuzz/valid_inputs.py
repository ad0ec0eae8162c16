"""The valid files that a campaign damages: small, made once a run, of every kind we read."""

from __future__ import annotations

import io
import json
import struct
import wave
from pathlib import Path
from typing import Any

import numpy as np

from gemma_edge.export.checkpoint.sentencepiece_model import BYTE_PIECES
from gemma_edge.export.exporter import export_bundle
from gemma_edge.export.synth.synth_checkpoint import synthesize
from gemma_edge.export.weights.recipe import RECIPES
from gemma_edge.runtime.conversations.conversation import Conversation
from gemma_edge.runtime.files.sealed_arrays import write_sealed
from gemma_edge.runtime.model import Model
from gemma_edge.runtime.reuse.kv_file import kv_header

Json = dict[str, Any]
RATE = 16_000
PREFIX_OF = "ab" * 32

# Every mechanism of the text model, in as few weights as may be.
SMALL = {
    "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    "altup_num_inputs": 2,
    "head_dim": 16,
    "hidden_size": 32,
    "hidden_size_per_layer_input": 16,
    "intermediate_size": [64, 32, 32, 32],
    "laurel_rank": 16,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "num_attention_heads": 2,
    "num_hidden_layers": 4,
    "num_key_value_heads": 1,
    "num_kv_shared_layers": 2,
    "sliding_window": 16,
    "max_position_embeddings": 512,
}


def make_models(folder: Path) -> None:
    """`checkpoint` (text), `multimodal` (with encoders), and bundles of them in every format."""
    checkpoint = synthesize(folder / "checkpoint", config=SMALL, progress=False).path
    multimodal = synthesize(folder / "multimodal", config=SMALL, encoders=True, progress=False).path
    options: dict[str, Any] = {"context": 64, "chunk": 32, "verify": False, "calibrate": "none"}
    for name, source, form in (
        ("onnx", checkpoint, "onnx"),
        ("tflite", checkpoint, "tflite"),
        ("encoders", multimodal, "onnx"),
    ):
        export_bundle(source, folder / name, format=form, **options)
    export_bundle(checkpoint, folder / "model.litertlm", format="litertlm", **options)
    make_session(folder / "session", folder / "onnx")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json()), encoding="utf-8")
    (folder / "results.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in results()), encoding="utf-8"
    )
    (folder / "recipe.json").write_bytes((RECIPES / "int4.json").read_bytes())


def make_session(folder: Path, bundle: Path) -> None:
    """A conversation, and a prefix, with the KV caches of a bundle."""
    folder.mkdir()
    with Model.load(bundle, threads=1) as model:
        conversation = Conversation(model, options={"max_tokens": 4, "temperature": 0})
        conversation.answer("the thing")
        conversation.save(folder / "x.session")
        keys, snapshot = model.prompts.held, model.decoder.snapshot()
        header = {"kind": "prefix", "of": PREFIX_OF, "kv": kv_header(keys, snapshot)}
        write_sealed(folder / "x.prefix", header, snapshot.arrays)


def tokenizer_json() -> Json:
    """A tokenizer.json in the form that Gemma's has: a few merges, every split of which is listed."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    merged = ["th", "the", "▁the", "in", "ing", "he", "ng", "▁th", "▁t"]
    pieces = [*special, *BYTE_PIECES, *merged, *"▁theingaosr"]
    merges = [
        [piece[:cut], piece[cut:]]
        for piece in ["th", "he", "▁t", "the", "▁th", "▁the", "in", "ng", "ing"]
        for cut in range(1, len(piece))
        if all(len(part) == 1 or part in merged for part in (piece[:cut], piece[cut:]))
    ]
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": text, "special": True, "lstrip": False} for i, text in enumerate(special)
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {text: i for i, text in enumerate(dict.fromkeys(pieces))},
            "merges": merges,
        },
    }


def requests() -> dict[str, bytes]:
    """A body of each route of the server, with every field that it takes."""
    sampling = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "seed": 1,
    }
    shared = {**sampling, "model": "x", "stop": ["x"], "logit_bias": {"5": 1.5}}
    function = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"a": {}}}}
    calls = [{"id": "call_0", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]
    schema = {"name": "s", "strict": True, "schema": {"type": "object"}}
    chat = {
        "messages": [
            {"role": "system", "content": "the"},
            {"role": "user", "content": [{"type": "text", "text": "the thing"}]},
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "tool_call_id": "call_0", "content": "in"},
        ],
        "tools": [{"type": "function", "function": function}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "response_format": {"type": "json_schema", "json_schema": schema},
        "logprobs": True,
        "top_logprobs": 2,
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 3,
        "n": 1,
        **shared,
    }
    responses = {
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "the"}]},
            {"type": "function_call", "call_id": "call_0", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "call_0", "output": "in"},
        ],
        "instructions": "the",
        "tools": [{"type": "function", **function}],
        "tool_choice": "required",
        "text": {"format": {"type": "json_schema", **schema}},
        "max_output_tokens": 3,
        "store": False,
        **shared,
    }
    completion = {"prompt": "the thing", "echo": False, "logprobs": 2, "max_tokens": 3, **shared}
    named = {"chat.json": chat, "responses.json": responses, "completion.json": completion}
    return {name: json.dumps(body).encode() for name, body in named.items()}


def batch() -> dict[str, bytes]:
    """Prompts with every kind of option that a file can have, and answers to some of them."""
    turns = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "in"}]
    parts = [{"type": "text", "text": "the thing"}, {"type": "image", "path": "a.png"}]
    tool = {"name": "thing", "parameters": {"type": "object", "properties": {"in": {"type": "string"}}}}
    prompts: list[Json | str] = [
        "the thing",
        {"prompt": "the thing", "id": "one", "max_tokens": 3, "temperature": 0.5, "top_k": 3, "seed": 1},
        {"messages": [*turns, {"role": "user", "content": "in"}], "id": 2, "system": "the", "stop": ["x"]},
        {"messages": [{"role": "user", "content": parts}], "attach": ["b.wav"], "truncate": "end"},
        {"prompt": "the", "raw": True, "logprobs": 2, "logit_bias": {"id:5": 1.5}, "timeout": 3.5},
        {"prompt": "the", "choices": ["in", "the"], "seed": 0},
        {"prompt": "the", "regex": "(in|the)+", "repetition_penalty": 1.1},
        {"prompt": "the", "tools": [{"type": "function", "function": tool}], "tool_choice": "auto"},
        {"prompt": "the", "response_format": {"type": "json_object"}, "stop": "x", "top_p": 0.9},
    ]
    answers: list[Json] = [
        {"line": 1, "key": "ab", "text": "in", "finish_reason": "stop", "usage": {"prompt_tokens": 3}},
        {"line": 3, "key": "cd", "id": 2, "error": {"type": "UsageError", "message": "no"}},
    ]
    return {
        name: "".join(json.dumps(line) + "\n" for line in lines).encode()
        for name, lines in (("prompts.jsonl", prompts), ("answers.jsonl", answers))
    }


def results() -> list[Json]:
    """A session, its tests, an encoder and a row of the README: all that `report` shows."""
    sizes = {"rss_anon": 10**9, "rss_file": 10**8, "rss": 11 * 10**8, "pss": 10**9, "major_faults": 7}
    environment = {
        "cpu": "a CPU",
        "cores_usable": 2,
        "memory_bytes": 2**34,
        "kernel": "Linux",
        "cpu_flags": ["avx2"],
    }
    environment["versions"] = {"numpy": "2"}
    head = {"schema": 1, "run": "r", "name": "E2B", "device": "local", "time": "2026-11-21T10:00:00+00:00"}
    head |= {"environment": environment, "engine": "ONNX Runtime", "recipe": "int4", "model": "Gemma 3n"}
    speed = {"avg_ts": 10.0, "stddev_ts": 0.5, "median_ts": 10.0, "samples_ts": [9.5, 10.5], "n_threads": 2}
    speed["samples_ns"] = [10**10, 10**10]
    tests = [
        {**head, **speed, "kind": "bench", "test": test, "n_prompt": prompt, "n_gen": generated, "n_depth": 0}
        | {"bandwidth_share": 0.8, "bandwidth_gb_s": 15.0, "model_filename": "x", "peak_rss_anon": 10**9}
        for test, prompt, generated in (("pp512", 512, 0), ("tg128", 0, 128))
    ]
    encode = {
        **head,
        "kind": "encode",
        "encoder": "vision",
        "test": "image",
        "avg_ns": 10**9,
        "stddev_ns": 10**8,
        "median_ns": 10**9,
    }
    encode |= {
        "real_time": None,
        "load_s": 0.5,
        "soft_tokens": 256,
        "peak_rss_anon": 10**8,
        "peak_rss_file": 10**7,
    }
    encode |= {
        "n_threads": 2,
        "pixels": 768,
        "seconds": 0.0,
        "first_load_s": 1.0,
        "peak_rss": 10**9,
        "samples_ns": [10**9],
        "model_filename": "x",
    }
    timeline = {"seconds": [0.0, 0.5, 1.0], "rss_anon": [1, 10**8, 10**9], "rss_file": [1, 2, 3]}
    percentiles = {"p50": 900.0, "p90": 950.0, "p99": 950.0}
    session = {
        **head,
        "kind": "session",
        "workload": {"threads": 2},
        "load": {"cold_s": 4.0, "warm_s": 2.0, "import_s": 0.4},
        "notes": ["a note"],
        "phases": [
            {"name": "load", "start_s": 0, "end_s": 10},
            {"name": "pp512", "start_s": 10, "end_s": 29},
        ],
        "memory": {"steady": sizes, "peak": sizes, "timeline": timeline},
        "latency": {
            **{"prompt_tokens": 128, "answer_tokens": 5, "requests": 2, "samples_ttft_ms": [900.0, 950.0]},
            **{"ttft_ms": percentiles, "itl_ms": percentiles, "samples_itl_ms": [90.0, 91.0, 180.0]},
        },
        "ceiling": {"limit_bytes": 2**31, "met": True, "enforced": True, "text": "runs under 2 GiB"},
        "sustained": {
            **{"text": "decode kept", "decode_first_tps": 10.0, "decode_last_tps": 9.0, "decode_kept": 0.9},
            "points": [{"t_s": 30.0 * i, "tg_ts": 10.0 - i, "temperature_c": 50 + i} for i in range(3)],
        },
        "ratios": [
            {"engine": "llama.cpp", "test": "tg128", "ratio": 1.2, "rounds": 3, "samples": [1.1, 1.2, 1.3]}
        ],
        "bars": [{"what": "decode, tok/s", "value": 10.0, "bar": 8.0, "met": True}],
        "error": None,
    }
    load = {
        **head,
        "kind": "load",
        "metrics": {"seconds": 1.0},
        "raw": {},
        "readme": [{"row": "a", "bar": "b", "value": "c"}],
    }
    return [session, *tests, encode, load]


def pictures() -> dict[str, bytes]:
    """One small picture of each format, and of the ways to store it that have decoders of their own."""
    from PIL import Image

    y, x = np.mgrid[:40, :56]
    image = Image.fromarray(np.stack([x * 4, y * 6, (x * y) % 256], -1).astype(np.uint8))
    stored: dict[str, tuple[str, Json]] = {
        "baseline.jpg": ("JPEG", {}),
        "progressive.jpg": ("JPEG", {"progressive": True}),
        "rgb.png": ("PNG", {}),
        "lossy.webp": ("WEBP", {}),
        "lossless.webp": ("WEBP", {"lossless": True}),
        "image.gif": ("GIF", {}),
        "image.bmp": ("BMP", {}),
        "raw.tiff": ("TIFF", {}),
        "deflate.tiff": ("TIFF", {"compression": "tiff_deflate"}),
        "lzw.tiff": ("TIFF", {"compression": "tiff_lzw"}),
        "image.ppm": ("PPM", {}),
        "image.avif": ("AVIF", {}),
    }
    files = {}
    for name, (form, options) in stored.items():
        out = io.BytesIO()
        image.save(out, form, **options)
        files[name] = out.getvalue()
    for name, kind in (("palette.png", "P"), ("grey.png", "L"), ("alpha.png", "RGBA")):
        out = io.BytesIO()
        image.convert(kind).save(out, "PNG")
        files[name] = out.getvalue()
    return files


def recordings() -> dict[str, bytes]:
    """Half a second of a tone in each container."""
    import soundfile

    tone = (0.3 * np.sin(np.arange(RATE // 2) * 0.1)).astype(np.float32)
    files = {}
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes((tone * 32_767).astype("<i2").tobytes())
    files["integers.wav"] = out.getvalue()
    body = tone.astype("<f4").tobytes()
    header = struct.pack(
        "<4sI4s4sIHHIIHH4sI",
        b"RIFF",
        36 + len(body),
        b"WAVE",
        b"fmt ",
        16,
        3,
        1,
        RATE,
        4 * RATE,
        4,
        32,
        b"data",
        len(body),
    )
    files["floats.wav"] = header + body
    for name, form, subtype, rate in (
        ("tone.flac", "FLAC", "PCM_16", RATE),
        ("tone.ogg", "OGG", "VORBIS", 22_050),
        ("tone.mp3", "MP3", "MPEG_LAYER_III", 44_100),
        ("tone.aiff", "AIFF", "PCM_16", 48_000),
    ):
        out = io.BytesIO()
        soundfile.write(out, np.stack([tone, tone], -1), rate, format=form, subtype=subtype)
        files[name] = out.getvalue()
    return files


def videos(folder: Path) -> dict[str, bytes]:
    """A second of picture and sound in each container."""
    import av

    files = {}
    for name, video_codec, audio_codec in (
        ("clip.mp4", "mpeg4", "aac"),
        ("clip.mkv", "mpeg4", "aac"),
        ("clip.webm", "libvpx", "libopus"),
        ("clip.avi", "mpeg4", "mp2"),
        ("clip.ts", "mpeg2video", "mp2"),
    ):
        path = folder / name
        try:
            with av.open(str(path), "w") as container:
                container.metadata["title"] = "a tag"
                video = container.add_stream(video_codec, rate=10)
                video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
                audio = container.add_stream(audio_codec, rate=48_000, layout="mono")
                for i in range(6):
                    grey = np.full((32, 32, 3), 40 * i, np.uint8)
                    container.mux(video.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
                container.mux(video.encode())
                resampler = av.AudioResampler(format=audio.format, layout="mono", rate=48_000)
                for start in range(0, 24_000, 960):
                    samples = (3000 * np.sin(np.arange(start, start + 960) * 0.1)).astype(np.int16)
                    frame = av.AudioFrame.from_ndarray(samples[None], "s16", "mono")
                    frame.sample_rate, frame.pts = 48_000, start
                    for part in resampler.resample(frame):
                        container.mux(audio.encode(part))
                container.mux(audio.encode())
        except (av.FFmpegError, ValueError):  # a build without this codec
            continue
        files[name] = path.read_bytes()
    return files
