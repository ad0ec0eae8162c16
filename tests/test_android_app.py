"""The Android app: its classes and JNI layer on the Java of this machine; the APK, built and looked at."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import wave
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest

from gemma_edge.benchmarks.records.measurement import KernelTest
from gemma_edge.benchmarks.records.results_file import read_records
from gemma_edge.benchmarks.records.rows import BenchRow, SessionRow
from gemma_edge.devices.adb import AdbDevice
from gemma_edge.devices.android_app import AndroidApp
from gemma_edge.devices.machine.cpu_features import check_engine
from gemma_edge.export.exporter import export_bundle
from gemma_edge.runtime.artifacts.litertlm_bundle import ENCODER_SECTIONS, SECTIONS
from gemma_edge.runtime.artifacts.litertlm_reader import read_litertlm
from gemma_edge.runtime.errors import DeviceError
from gemma_edge.runtime.model import Model
from support.margins import FP32, assert_decided, recorded
from support.repository import ROOT

DEMO = ROOT / "android_demo"
APP = DEMO / "app"
ANDROID = "{http://schemas.android.com/apk/res/android}"
TOOLS = Path(os.environ.get("ANDROID_TOOLS", "/var/cache/gemma-edge/android-tools"))
DX = TOOLS / "usr/share/java/com.android.dx.jar"
POCKET = ROOT / "pocket" / "checkpoint"
QUESTION = "Why is the sky blue?"
PAGE = 16_384


def build(*words: str | Path) -> None:
    """Runs build.sh; skips where pip has no wheel."""
    done = subprocess.run([DEMO / "build.sh", *words], capture_output=True, encoding="utf-8")
    if "No matching distribution" in done.stderr:
        pytest.skip("no wheel of litert-lm-api")
    assert done.returncode == 0, done.stderr


def missing(*programs: str) -> str | None:
    absent = [name for name in programs if shutil.which(name) is None]
    return f"no {', '.join(absent)} (tests/install.sh)" if absent else None


def needs(*programs: str) -> None:
    if reason := missing(*programs):
        pytest.skip(reason)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The app's classes and JNI layer for this machine."""
    needs("javac", "java")
    if not shutil.which("cc"):
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("desk")
    build("desk", folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pocket in fp32, with its encoders."""
    path = tmp_path_factory.mktemp("model") / "pocket.litertlm"
    return export_bundle(POCKET, path, format="litertlm", recipe="fp32", context=256, verify=False).path


@pytest.fixture(scope="module")
def engine(desk: Path) -> Path:
    """`desk`, where LiteRT-LM runs."""
    try:
        check_engine("litertlm")
    except DeviceError as error:
        pytest.skip(str(error))
    return desk


def java(desk: Path, main: str, *words: str | Path, heap: str = "32m") -> subprocess.CompletedProcess[str]:
    # A small heap, all of it in memory from the start: growth that is seen is the engine's.
    options = (f"-Xmx{heap}", f"-Xms{heap}", "-XX:+AlwaysPreTouch", "-XX:+UseSerialGC")
    where = (f"-Djava.library.path={desk}", "-cp", desk / "classes")
    argv = ("java", *options, *where, f"dev.gemmaedge.{main}", *words)
    return subprocess.run(argv, capture_output=True, encoding="utf-8", timeout=1200)


def lines(desk: Path, *words: str | Path) -> list[dict[str, Any]]:
    """What `Desk` prints."""
    done = java(desk, "Desk", *words)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def pieces(said: Iterable[dict[str, Any]]) -> str:
    return "".join(line["piece"] for line in said if "piece" in line)


# Java alone.


def test_unit_tests_in_java(desk: Path, model: Path) -> None:
    done = java(desk, "Unit", model, heap="512m")
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"^(\d+) passed, 0 failed$", done.stdout, re.MULTILINE)
    assert passed and int(passed[1]) > 20


def test_parts_are_named_as_in_python(desk: Path, model: Path) -> None:
    *_, told = lines(desk, "check", model)
    expected = [f"{name} {kind} {of}" for name, (kind, of) in (SECTIONS | ENCODER_SECTIONS).items()]
    assert sorted(told["parts"]) == sorted(expected)


def test_the_manifest_tells_what_inspect_tells(desk: Path, model: Path) -> None:
    card, _ = lines(desk, "check", model)
    manifest = json.loads(read_litertlm(model).system["gemma_edge.manifest"])
    assert card["name"] == "checkpoint"
    assert card["line"] == "fp32 · 256 tokens · text, images, audio"
    assert card["needed"] == manifest["plan"]["needed_bytes"]


def test_its_log_is_read_by_the_verb(desk: Path) -> None:
    """Lines as logcat gives them, cut anywhere, between those of others."""
    pieces = ("Air ", 'scatters\n"blue" ', "😀" * 900, "\x01 light")
    log = java(desk, "Desk", "log", "r1", *pieces).stdout.encode()
    assert max(map(len, log.split(b"\n"))) < 4000
    other = (
        b"--------- beginning of main\n" + json.dumps({"run": "r0", "n": 7, "text": "no"}).encode() + b"\n"
    )
    stream = (other + log)[:50], (other + log)[50:2000], (other + log)[2000:]
    app = AndroidApp(AdbDevice("adb", "nowhere"))
    assert "".join(app._texts("r1", iter(stream))) == "".join(pieces)
    assert set(app.figures) == {"text_sha256"}


# The JNI layer.


def test_the_same_tokens_as_gemma_edge_run(engine: Path, model: Path, tmp_path: Path) -> None:
    ours = Model.load(model)
    with recorded(ours) as logits:
        expected = ours.generate(QUESTION, temperature=0.0, max_tokens=40)
    assert_decided(np.stack(logits), FP32)
    said = lines(engine, "answer", model, tmp_path, "40", QUESTION)
    assert pieces(said) == expected.text
    assert said[-1]["error"] == "" and not said[-1]["stopped"]
    assert said[-1]["tokens"] > 3 and said[-1]["rate"] > 0 and said[-1]["first"] > 0


def test_it_sees_and_hears(engine: Path, model: Path, tmp_path: Path) -> None:
    """Soft tokens of a picture and of a recording are in the prompt."""
    with wave.open(str(tmp_path / "hum.wav"), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(struct.pack("<16000h", *(i % 200 for i in range(16_000))))
    text, picture, sound = (
        lines(engine, "answer", model, tmp_path, "4", "What is this?", *files)[-1]["prompt_tokens"]
        for files in ((), (POCKET / "samples" / "image-what-0.png",), (tmp_path / "hum.wav",))
    )
    assert picture > text and sound > text


def test_it_stops_and_goes_on(engine: Path, model: Path, tmp_path: Path) -> None:
    said = lines(engine, "cancel", model, tmp_path, "Count from one to one hundred.")
    first, second = (line for line in said if "stopped" in line)
    assert first["error"] == second["error"] == ""
    assert not second["stopped"] and second["tokens"] >= first["tokens"]


def test_a_hundred_loads(engine: Path, model: Path, tmp_path: Path) -> None:
    """The last fifty keep less than a tenth of what they took: nothing of an engine stays."""
    cycles = [line for line in lines(engine, "cycles", model, tmp_path, "100", "Hi") if "cycle" in line]
    assert [line["cycle"] for line in cycles] == list(range(100))
    assert all(line["tokens"] == 1 for line in cycles)
    anon = [line["anon"] for line in cycles]
    assert mean(anon[-10:]) - mean(anon[40:50]) < 5 << 20


def damaged(model: Path, folder: Path) -> list[Path]:
    """18 files: cut, altered, foreign."""
    whole = model.read_bytes()
    sections = {(s.type, s.model_type): s for s in read_litertlm(model).sections}
    decoder = sections["TFLiteModel", "tf_lite_prefill_decode"]
    metadata = sections["LlmMetadataProto", ""]

    def altered(at: int, data: bytes) -> bytes:
        return whole[:at] + data + whole[at + len(data) :]

    made = {
        "empty": b"",
        "five-bytes": whole[:5],
        "header-only": whole[:PAGE],
        "half": whole[: len(whole) // 2],
        "one-byte-short": whole[:-1],
        "one-byte-long": whole + b"\0",
        "zeros": bytes(100_000),
        "text": b"not a model at all, but long enough to have a header" * 100,
        "magic": altered(0, b"LITERTLX"),
        "version": altered(8, struct.pack("<I", 2)),
        "header-end": altered(24, struct.pack("<Q", 1 << 40)),
        "root": altered(32, struct.pack("<I", 0x7FFFFFF0)),
        "manifest": whole.replace(b'"schema_version":1', b'"schema_version":7'),
        "hash": whole.replace(b'"decoder.tflite":"', b'"decoder.tflite":"0', 1)[: len(whole)],
        "decoder-root": altered(decoder.begin, struct.pack("<I", 0x7FFFFFF0)),
        "decoder-zeros": altered(decoder.begin, bytes(decoder.end - decoder.begin)),
        "metadata-zeros": altered(metadata.begin, bytes(metadata.end - metadata.begin)),
        "metadata-noise": altered(metadata.begin, b"\xff" * (metadata.end - metadata.begin)),
    }
    assert len(made) == 18
    paths = []
    for name, data in made.items():
        paths.append(folder / f"{name}.litertlm")
        paths[-1].write_bytes(data)
    return paths


def test_eighteen_damaged_files(engine: Path, model: Path, tmp_path: Path) -> None:
    """One process meets all of them, and answers with the sound one afterwards."""
    files = [*damaged(model, tmp_path), model]
    said = [line for line in lines(engine, "survive", tmp_path, *files) if "file" in line]
    assert [line["file"] for line in said] == [path.name for path in files]
    *refused, sound = said
    assert sound["tokens"] == 1 and sound["error"] == ""
    kinds = {line["file"]: line.get("problem") for line in refused}
    assert None not in kinds.values(), kinds
    assert kinds["half.litertlm"] == kinds["empty.litertlm"] == "TRUNCATED"
    assert kinds["text.litertlm"] == kinds["magic.litertlm"] == "FOREIGN"
    assert kinds["manifest.litertlm"] == kinds["version.litertlm"] == "NEWER"
    assert kinds["decoder-zeros.litertlm"] == "DAMAGED"


def test_a_session_from_load_to_recovery(engine: Path, model: Path, tmp_path: Path) -> None:
    """The app's session, with the engine: chats, a stop, Android's wish for memory, runs by a computer."""
    files = {path.stem: path for path in damaged(model, tmp_path)}
    packed = tmp_path / "packed"
    packed.mkdir()
    stale = packed / f"{model.name}_1_2.xnnpack_cache"  # of a model of this name that is no more
    stale.touch()
    done = java(engine, "SessionDesk", model, files["decoder-zeros"], packed)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not stale.exists() and list(packed.glob(f"{model.name}_*.xnnpack_cache"))
    steps = {line["step"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert steps["answered"]["text"]
    assert re.search(r"first token .* tok/s .* tokens? · context \d+ of 256$", steps["answered"]["note"])
    assert steps["answered again"]["turns"] == 4
    assert steps["stopped"]["note"].startswith("stopped · ")
    # The turn that was stopped is part of the conversation, and the next one is answered.
    turns = steps["stopped"]["turns"] + 2
    assert steps["answered after a stop"]["turns"] == turns and steps["answered after a stop"]["text"]
    assert steps["unloaded for memory"]["turns"] == turns
    assert "Your conversation is here" in steps["unloaded for memory"]["words"]
    assert steps["answered a computer"]["logged"] > 2
    assert steps["measured"]["bench"].startswith("pp16 ") and steps["measured"]["rows"] == 3
    assert steps["refused a damaged one"]["problem"] == "DAMAGED"
    assert (steps["recovered"]["state"], steps["recovered"]["problem"]) == ("READY", "")
    assert steps["recovered"]["hashed"] == 1  # a file that has not changed is hashed once
    assert steps["recovered"]["text"] == steps["answered a computer"]["text"]


def test_its_benchmark_is_read_by_report(engine: Path, model: Path, tmp_path: Path) -> None:
    done = java(engine, "Desk", "bench", model, tmp_path, "32", "8", "3")
    assert done.returncode == 0, done.stderr[-2000:]
    (tmp_path / "rows.jsonl").write_text(done.stdout)
    prefill, decode, session = read_records(tmp_path / "rows.jsonl")
    assert isinstance(prefill, BenchRow) and isinstance(decode, BenchRow) and isinstance(session, SessionRow)
    assert (prefill.test, decode.test) == ("pp32", "tg8 @ d32")
    # Every figure that is derived is what our own measurement derives from the samples.
    for line in done.stdout.splitlines()[:2]:
        row = json.loads(line)
        test = KernelTest(row["n_prompt"], row["n_gen"], tuple(row["samples_ns"]), row["n_depth"])
        assert row["test"] == test.test and len(test.samples_ns) == 3
        for figure in ("avg_ts", "stddev_ts", "median_ts"):
            assert row[figure] == pytest.approx(getattr(test, figure), rel=1e-6)
    assert session.latency and session.latency.requests == 3 and session.memory


# The APK.


@functools.cache
def version() -> dict[str, str]:
    text = (APP / "version.properties").read_text()
    return dict(line.split("=") for line in text.splitlines())


@pytest.fixture(scope="module")
def apk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    needs("aapt", "apksigner", "zipalign", "javac", "readelf", "dexdump")
    if not (shutil.which("clang") or shutil.which("clang-16")):
        pytest.skip("no clang (tests/install.sh)")
    if not DX.exists():
        pytest.skip(f"no {DX} (tests/install.sh)")
    path = tmp_path_factory.mktemp("apk") / "app.apk"
    build("apk", path)
    return path


def said(*argv: str | Path) -> str:
    return subprocess.run(argv, check=True, capture_output=True, encoding="utf-8").stdout


def test_apk_is_signed_and_the_same_bytes_again(apk: Path, tmp_path: Path) -> None:
    told = said("apksigner", "verify", "--verbose", apk)
    assert "Verified using v2 scheme (APK Signature Scheme v2): true" in told
    build("apk", tmp_path / "again.apk")
    assert (tmp_path / "again.apk").read_bytes() == apk.read_bytes()


def test_apk_asks_for_nothing_but_the_microphone(apk: Path) -> None:
    told = said("aapt", "dump", "badging", apk)
    assert re.findall(r"uses-permission: name='([^']*)'", told) == ["android.permission.RECORD_AUDIO"]
    assert re.findall(r"uses-feature: ", told) == []  # all that there is, is not required
    assert "uses-feature-not-required: name='android.hardware.microphone'" in told
    assert "uses-feature-not-required: name='android.hardware.camera'" in told
    assert (
        f"sdkVersion:'{version()['minSdk']}'" in told
        and f"targetSdkVersion:'{version()['targetSdk']}'" in told
    )
    assert f"name='{version()['package']}' versionCode='{version()['versionCode']}'" in told


def test_apk_libraries_lie_on_pages_of_16_kib(apk: Path) -> None:
    subprocess.run(["zipalign", "-c", "-p", "4", apk], check=True, capture_output=True)
    data = apk.read_bytes()
    with zipfile.ZipFile(apk) as archive:
        for entry in archive.infolist():
            name, extra = struct.unpack_from("<HH", data, entry.header_offset + 26)
            begin = entry.header_offset + 30 + name + extra
            if entry.filename.endswith(".so"):
                assert entry.compress_type == zipfile.ZIP_STORED and begin % PAGE == 0, entry.filename
            if entry.filename == "resources.arsc":
                assert entry.compress_type == zipfile.ZIP_STORED and begin % 4 == 0


def test_apk_native_code(apk: Path, tmp_path: Path) -> None:
    """Segments of 16 KiB; a function for every native method and no other; nothing taken but the engine's."""
    with zipfile.ZipFile(apk) as archive:
        archive.extractall(tmp_path, [n for n in archive.namelist() if n.endswith(".so")])
    ours, engine = (tmp_path / f"lib/arm64-v8a/{name}" for name in ("libgemma_edge.so", "liblitert-lm.so"))
    for library in (ours, engine):
        aligned = re.findall(r"^ +LOAD .* (0x\w+)$", said("readelf", "-lW", library), re.MULTILINE)
        assert aligned and {int(size, 16) for size in aligned} == {PAGE}
    given, taken = symbols(ours)
    native = (APP / "java/dev/gemmaedge/engine/Native.java").read_text()
    natives = re.findall(r"static native \S+ (\w+)\(", native)
    assert {name for name in given if name.startswith("Java_")} == {
        f"Java_dev_gemmaedge_engine_Native_{name}" for name in natives
    }
    assert len(natives) > 8 and "JNI_OnLoad" in given
    assert taken <= symbols(engine)[0]


def symbols(library: Path) -> tuple[set[str], set[str]]:
    """Names that a library gives, and those that it takes."""
    rows = [line.split() for line in said("readelf", "--dyn-syms", "--wide", library).splitlines()]
    names = [(row[7].partition("@")[0], row[6] != "UND") for row in rows if len(row) > 7 and row[0] != "Num:"]
    return {name for name, here in names if here}, {name for name, here in names if not here and name}


def test_apk_classes_are_those_of_the_sources(apk: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(apk) as archive:
        dex = archive.extract("classes.dex", tmp_path)
    found = {name.split("$")[0] for name in re.findall(r"Class descriptor  : 'L(.*);'", said("dexdump", dex))}
    paths = (path.relative_to(APP / "java") for path in (APP / "java").rglob("*.java"))
    sources = {path.with_suffix("").as_posix() for path in paths}
    assert found == sources | {"dev/gemmaedge/app/R"}


# Sources, versions, permissions and pages: both ways to build read the same.


def test_gradle_reads_what_build_sh_reads() -> None:
    """Gradle itself is not run: there is no SDK here."""
    gradle, script = (APP / "build.gradle").read_text(), (DEMO / "build.sh").read_text()
    assert "file('version.properties')" in gradle and "$app/version.properties" in script
    for name in version():
        assert f"told['{name}']" in gradle, name
        assert f"property {name})" in script, name
    for folder in ("java", "res"):
        assert f"{folder}.srcDirs = ['{folder}']" in gradle and f'"$app/{folder}"' in script
    assert "manifest.srcFile 'AndroidManifest.xml'" in gradle and '"$app/AndroidManifest.xml"' in script
    cmake = (APP / "jni" / "CMakeLists.txt").read_text()
    natives = [path.name for path in (APP / "jni").glob("*.c")]
    assert natives == ["gemma_edge_jni.c"]
    assert f"add_library(gemma_edge SHARED {natives[0]})" in cmake and f"$app/jni/{natives[0]}" in script
    assert "max-page-size=16384" in cmake and "max-page-size=16384" in script
    assert "abiFilters 'arm64-v8a'" in gradle and "lib/arm64-v8a" in script
    assert "VERSION_1_8" in gradle and "-source 8 -target 8" in script
    # A dependency would be one that build.sh does not have; a permission elsewhere one that nobody sees.
    assert "dependencies {" not in gradle
    assert len(list(DEMO.rglob("AndroidManifest.xml"))) == 1


def test_manifest() -> None:
    manifest = ET.parse(APP / "AndroidManifest.xml").getroot()
    permissions = [each.get(f"{ANDROID}name") for each in manifest.iter("uses-permission")]
    assert permissions == ["android.permission.RECORD_AUDIO"]
    assert all(each.get(f"{ANDROID}required") == "false" for each in manifest.iter("uses-feature"))
    # Other apps may start the launcher's entry; a computer's runs need what only adb's shell has.
    exported = {
        each.get(f"{ANDROID}name"): each.get(f"{ANDROID}permission")
        for kind in ("activity", "activity-alias", "service", "receiver", "provider")
        for each in manifest.iter(kind)
        if each.get(f"{ANDROID}exported") != "false"
    }
    assert exported == {
        "dev.gemmaedge.app.ChatActivity": None,
        "dev.gemmaedge.app.FromComputer": "android.permission.DUMP",
    }


def layouts() -> list[ET.Element]:
    return [ET.parse(path).getroot() for path in sorted((APP / "res" / "layout").glob("*.xml"))]


def test_screens_can_be_heard_and_enlarged() -> None:
    """TalkBack has a word for every picture that does something; text follows the person's setting."""
    for layout in layouts():
        for view in layout.iter():
            if view.tag == "ImageButton":
                assert view.get(f"{ANDROID}contentDescription"), ET.tostring(view)
            if view.tag == "ImageView":
                assert view.get(f"{ANDROID}importantForAccessibility") == "no", ET.tostring(view)
            size = view.get(f"{ANDROID}textSize")
            assert size is None or size.endswith("sp")
            if view.tag in ("Button", "EditText", "TextView"):
                # A fixed height would cut large letters.
                assert view.get(f"{ANDROID}layout_height") == "wrap_content", ET.tostring(view)
            if view.tag == "EditText":
                name = view.get(f"{ANDROID}id", "").rpartition("/")[2]
                assert view.get(f"{ANDROID}hint") or f"@+id/{name}" in labels(layout)


def labels(layout: ET.Element) -> set[str | None]:
    return {view.get(f"{ANDROID}labelFor") for view in layout.iter()}


def test_colours_are_readable_by_day_and_by_night() -> None:
    """A contrast of 4.5 at least between text and what is behind it, as WCAG asks for."""
    pairs = [
        ("text", "surface"),
        ("text", "card"),
        ("text", "bubble"),
        ("muted", "surface"),
        ("muted", "card"),
        ("accent", "surface"),
        ("accent", "card"),
        ("on_accent", "accent"),
        ("warn_text", "warn_back"),
        ("warn_text", "card"),
        ("bad_text", "card"),
        ("accent", "warn_back"),
    ]
    day = colours("values")
    for theme in (day, day | colours("values-night")):
        for front, back in pairs:
            lights = sorted((luminance(theme[front]), luminance(theme[back])))
            assert (lights[1] + 0.05) / (lights[0] + 0.05) >= 4.5, (front, back)


def test_screens_are_drawn_from_the_layouts(tmp_path: Path) -> None:
    """The stand-in reads every layout, so a layout that names what is not there fails here, too."""
    draw = APP / "test" / "draw_screens.py"
    subprocess.run([sys.executable, draw, tmp_path, "--dark", "--font-scale", "1.5"], check=True)
    pages = {path.stem: path.read_text() for path in tmp_path.glob("*.html")}
    assert len(pages) == 6
    assert "And in the evening?" in pages["chat"] and "Choose a file" in pages["models"]
    night = colours("values-night")
    assert all(f"background:{night['surface']}" in page for page in pages.values())
    assert "font-size:24px" in pages["chat"]  # 16sp


def colours(folder: str) -> dict[str, str]:
    root = ET.parse(APP / "res" / folder / "colors.xml").getroot()
    return {each.get("name", ""): each.text or "" for each in root}


def luminance(colour: str) -> float:
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_every_text_is_in_one_place_and_used() -> None:
    names = {each.get("name") for each in ET.parse(APP / "res" / "values" / "strings.xml").getroot()}
    sources = [*(APP / "java").rglob("*.java"), *(APP / "res").rglob("*.xml"), APP / "AndroidManifest.xml"]
    text = "\n".join(path.read_text() for path in sources)
    used = set(re.findall(r"(?:R\.string\.|@string/)(\w+)", text))
    assert used == names
    for layout in layouts():
        for view in layout.iter():
            for attribute in ("text", "hint", "contentDescription"):
                value = view.get(f"{ANDROID}{attribute}")
                assert value is None or value.startswith("@string/"), value
