"""Where a prompt begins: the decoder's cache, a snapshot in memory, a file. It changes no answer."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_edge.runtime.engines.kv_snapshot import KvSnapshot
from gemma_edge.runtime.errors import GemmaEdgeError, UsageError
from gemma_edge.runtime.files import kept_files
from gemma_edge.runtime.files.cache_folder import cache_folder
from gemma_edge.runtime.files.sealed_arrays import MAGIC, SEAL, read_sealed, write_sealed
from gemma_edge.runtime.generate import TokenGenerator
from gemma_edge.runtime.prompt.prompt_builder import Prompt
from gemma_edge.runtime.request_queue import FIRST_SHARE, SHARE, RequestQueue
from gemma_edge.runtime.residency import Residency
from gemma_edge.runtime.reuse import snapshot_pool
from gemma_edge.runtime.reuse.prefix_files import PrefixFiles
from gemma_edge.runtime.reuse.prompt_cache import PromptCache
from gemma_edge.runtime.reuse.snapshot_pool import LEAST_TOKENS, SnapshotPool, common_prefix
from gemma_edge.runtime.sampling import Sampler, Sampling
from gemma_edge.runtime.usage import GenerationProgress
from support.processes import wait_for
from support.rule_decoder import IdTable, RuleDecoder, hash_rule

GREEDY = Sampler(Sampling(temperature=0.0))
WINDOW = 24
OF = "ab" * 32


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GEMMA_EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def text(seed: int, count: int) -> list[int]:
    rng = Random(seed)
    return [rng.randrange(264, 299) for _ in range(count)]


class Machine:
    """A generator over a decoder that follows a rule, and what it was fed."""

    def __init__(
        self,
        *,
        window: int | None = WINDOW,
        budget: int = 1 << 20,
        disk: int = 0,
        chunk: int = 16,
        of: str = OF,
    ) -> None:
        self.decoder = RuleDecoder(hash_rule, window=window, chunk=chunk, context=1024)
        files = PrefixFiles(of, disk) if disk else None
        self.cache = PromptCache(self.decoder, SnapshotPool(budget), files)
        self.engine = TokenGenerator(Residency(self.decoder), IdTable(), IdTable(), cache=self.cache)
        self.fed = 0
        self.progress = GenerationProgress()

    def answer(self, prompt: list[int] | Prompt, count: int = 6) -> list[int]:
        """The tokens; `fed` has how many were fed for them, of the prompt and of the answer."""
        self.decoder.calls.clear()
        self.progress = GenerationProgress()
        found = list(self.engine.stream_tokens(prompt, GREEDY, max_tokens=count, progress=self.progress))
        self.fed = sum(self.decoder.calls)
        return found


def alone(prompt: list[int] | Prompt, count: int = 6) -> list[int]:
    return Machine(budget=0).answer(prompt, count)


# Memory. ------------------------------------------------------------------------------------------


def test_two_chats_take_turns_and_compute_nothing_again() -> None:
    machine = Machine()
    chats = [[2, *text(seed, 40)] for seed in (1, 2)]
    for chat in chats:
        machine.answer(chat)
    for turn in range(3):
        for number, chat in enumerate(chats):
            answer = alone(chat)
            question = text(10 * turn + number, 9)
            chat += [*answer, *question]
            machine.answer(chat)
            assert (
                machine.fed == len(question) + 1 + 5
            )  # the answer's last token was not fed; five of the new
            assert machine.progress.usage().restored_from == "memory"
            assert machine.progress.cached_tokens == len(chat) - len(question) - 1


def test_without_a_budget_each_turn_throws_the_other_chat_out() -> None:
    machine = Machine(budget=0)
    chats = [[2, *text(seed, 40)] for seed in (1, 2)]
    for chat in (*chats, *chats):
        machine.answer(chat)
        assert machine.fed == 41 + 5 and machine.progress.restored_from is None


def test_the_least_recently_used_goes_when_the_budget_is_full() -> None:
    chats = [[2, *text(seed, 39)] for seed in range(4)]
    one = Machine().decoder.snapshot_bytes(45)
    machine = Machine(budget=2 * one + 100)
    for chat in chats:
        machine.answer(chat)
        assert machine.cache.pool.bytes <= machine.cache.pool.budget

    def spared(number: int) -> int:
        machine.answer([*chats[number], *alone(chats[number]), 270])
        return machine.progress.cached_tokens

    assert spared(2) == 45  # the latest that was kept aside
    assert spared(0) == 0


def test_a_chat_that_goes_on_takes_one_place() -> None:
    machine = Machine()
    chat = [2, *text(1, 70)]
    for turn in range(6):
        chat += [*machine.answer(chat), *text(turn, 70)]
    machine.answer(text(9, 20))
    held = [kept.keys for kept in machine.cache.pool._kept if kept.passing]
    assert sum(keys == chat[: len(keys)] for keys in held) == 1


def test_an_answer_that_was_cut_short_takes_no_place_beside_the_whole_one() -> None:
    machine = Machine(window=None)
    chats = [[2, *text(seed, 40)] for seed in (1, 2)]
    for count in (12, 10, 11, 12):
        for chat in chats:
            machine.answer(chat, count)
        assert len(machine.cache.pool) <= len(chats)


def test_a_window_that_moved_on_does_not_stand_for_what_left_it() -> None:
    machine = Machine()
    chats = [[2, *text(seed, 2 * WINDOW)] for seed in (1, 2)]
    for count in (2 * WINDOW, 12):
        for chat in chats:
            machine.answer(chat, count)
    cut = [*chats[0], *alone(chats[0], 12)]
    machine.answer([*cut, 270])
    assert machine.progress.cached_tokens == len(cut) - 1


def interrupted(
    machine: Machine, first: list[int], second: list[int], count: int
) -> tuple[list[int], list[int]]:
    """Two answers of `count` tokens; the second one asks while the first one is being given."""
    machine.engine.queue = queue = RequestQueue(1, shared=True)
    stream = machine.engine.stream_tokens(first, GREEDY, max_tokens=count)
    answer = [next(stream)]
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(list, machine.engine.stream_tokens(second, GREEDY, max_tokens=count))
        wait_for(lambda: queue.waiting == 1, "the second one does not wait")
        answer += stream
        return answer, other.result()


@pytest.mark.parametrize("window", [WINDOW, None])
@pytest.mark.parametrize("budget", [1 << 20, 0])
def test_answers_take_turns_and_say_what_they_say_alone(window: int | None, budget: int) -> None:
    machine = Machine(window=window, budget=budget)
    chats = [[2, *text(seed, 40)] for seed in (1, 2)]
    answers = interrupted(machine, chats[0], chats[1], 3 * SHARE)
    undisturbed = [Machine(window=window, budget=0).answer(chat, 3 * SHARE) for chat in chats]
    assert answers == tuple(undisturbed)
    began = machine.decoder.calls.index(16, 2)  # the second prompt, behind the first one's chunks
    assert began == (3 + FIRST_SHARE - 1 if budget else 3 + 3 * SHARE - 1)
    assert not any(kept.pinned for kept in machine.cache.pool._kept)
    assert not machine.engine.queue.busy


def test_memory_that_is_not_free_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    machine.answer([2, *text(1, 40)])
    monkeypatch.setattr(snapshot_pool, "available_memory", lambda: 1000)
    machine.answer([2, *text(2, 40)])
    assert len(machine.cache.pool) == 0


def test_reset_forgets_every_conversation() -> None:
    machine = Machine()
    chats = [[2, *text(seed, 90)] for seed in (1, 2)]
    for chat in chats:
        machine.answer(chat)
    machine.engine.reset()
    for chat in chats:
        machine.answer(chat)
        assert machine.progress.cached_tokens == 0


def test_a_new_question_behind_a_document() -> None:
    """The windows have moved on, but a snapshot lies where the document ends."""
    document = [2, *text(1, 200)]
    machine = Machine()
    machine.answer(Prompt([*document, *text(2, 12)], boundaries=(201,)), 40)
    for seed in (3, 4):
        prompt = Prompt([*document, *text(seed, 12)], boundaries=(201,))
        assert machine.answer(prompt, 40) == alone(prompt, 40)
        assert machine.progress.cached_tokens == 201 and machine.fed == 12 + 39


def test_where_prompts_part_is_learned() -> None:
    """Nobody said that this was a boundary: the second prompt shows it, the third profits."""
    document = [2, *text(1, 200)]
    machine = Machine()
    spared = []
    for seed in (3, 4, 5):
        machine.answer([*document, *text(seed, 12)], 40)
        spared.append(machine.progress.cached_tokens)
    assert spared == [0, 0, 201]


def test_full_caches_are_taken_back_to_what_is_shared() -> None:
    document = [2, *text(1, 200)]
    machine = Machine(window=None, budget=0)
    machine.answer([*document, *text(2, 12)], 40)
    machine.answer([*document, *text(3, 12)], 40)
    assert machine.progress.cached_tokens == 201 and machine.progress.restored_from is None


def test_a_short_common_beginning_is_computed_again() -> None:
    """It spares nothing, and would make an answer depend on the prompt before it, in the last bits."""
    machine = Machine(window=None)
    shared = [2, *text(1, LEAST_TOKENS - 2)]
    machine.answer([*shared, 270])
    machine.answer([*shared, 271])
    assert machine.progress.cached_tokens == 0


@pytest.mark.parametrize("window", [None, WINDOW])
def test_the_very_same_prompt_computes_nothing(window: int | None) -> None:
    """With the logits of the first time: the same seed gives the same answer, bit for bit."""
    machine = Machine(window=window)
    prompt = [2, *text(1, 100)]
    first = machine.answer(prompt)
    assert machine.answer(prompt) == first
    assert machine.fed == 5 and machine.progress.cached_tokens == 101


def test_what_broken_arithmetic_left_is_not_kept() -> None:
    machine = Machine(disk=1 << 20)
    prompt = [2, *text(1, 200)]
    machine.decoder.broken = True
    with pytest.raises(GemmaEdgeError, match="nan"):
        machine.answer(prompt)
    machine.decoder.broken = False
    assert len(machine.cache.pool) == 0 and not list(cache_folder().glob("*.prefix"))
    assert machine.answer(prompt) == alone(prompt)


@settings(max_examples=60)
@given(
    prompts=st.lists(
        st.lists(st.tuples(st.integers(0, 3), st.integers(1, 90)), min_size=1, max_size=3), max_size=7
    ),
    window=st.sampled_from([None, 1, 24, 100]),
    budget=st.sampled_from([0, 400, 1 << 20]),
    chunk=st.integers(1, 40),
)
def test_reuse_never_changes_an_answer(
    prompts: list[list[tuple[int, int]]], window: int | None, budget: int, chunk: int
) -> None:
    machine = Machine(window=window, budget=budget, chunk=chunk)
    for parts in prompts:
        ids = [2, *(i for seed, count in parts for i in text(seed, count))]
        prompt = Prompt(ids, boundaries=(1 + parts[0][1],))
        assert machine.answer(prompt, 3) == alone(prompt, 3)
        assert machine.cache.held == machine.decoder.ids
        assert machine.cache.pool.bytes <= budget


@given(st.lists(st.integers(0, 2), max_size=40), st.lists(st.integers(0, 2), max_size=40))
def test_common_prefixes(first: list[int], second: list[int]) -> None:
    n = common_prefix(first, second)
    assert first[:n] == second[:n]
    assert n in (len(first), len(second)) or first[n] != second[n]


# Disk. --------------------------------------------------------------------------------------------

DOCUMENT = [2, *text(1, 300)]


def ask(machine: Machine, seed: int) -> list[int]:
    return machine.answer(Prompt([*DOCUMENT, *text(seed, 12)], boundaries=(301,)), 40)


def stored() -> list[Path]:
    return sorted(cache_folder().glob("*.prefix"))


def test_the_next_process_begins_behind_the_document() -> None:
    ask(Machine(budget=0, disk=1 << 20), 2)
    (path,) = stored()
    assert path.stat().st_mode & 0o777 == 0o600
    machine = Machine(budget=0, disk=1 << 20)
    assert ask(machine, 3) == ask(Machine(budget=0), 3)
    assert machine.progress.cached_tokens == 301 and machine.fed == 12 + 39
    usage = machine.progress.usage()
    assert usage.restored_from == "disk" and usage.restore_s
    assert stored() == [path]  # what it had to compute is not worth a file


@pytest.mark.parametrize("of", [OF[:-1] + "c", "cd" * 32])
def test_another_bundle_misses(of: str) -> None:
    ask(Machine(disk=1 << 20), 2)
    machine = Machine(disk=1 << 20, of=of)
    ask(machine, 3)
    assert machine.progress.cached_tokens == 0


def test_another_picture_misses() -> None:
    """Keys of soft tokens are made of what the picture shows."""
    prompt = Prompt([2, *text(1, 300)])
    other = Prompt(prompt.ids)
    other.__dict__["keys"] = [*prompt.keys[:50], *[-(2**127)] * 16, *prompt.keys[66:]]
    Machine(disk=1 << 20).answer(prompt)
    machine = Machine(disk=1 << 20)
    machine.answer(other)
    assert machine.progress.cached_tokens == 0


def damage_byte(at: Callable[[int], int]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        raw = bytearray(path.read_bytes())
        raw[at(len(raw))] ^= 1
        path.write_bytes(raw)

    return damage


def resealed(change: Callable[[dict[str, object], dict[str, np.ndarray]], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        header, arrays = read_sealed(path)
        arrays = dict(arrays)
        change(header, arrays)
        path.unlink()
        write_sealed(path, header, arrays)

    return damage


DAMAGE: dict[str, Callable[[Path], object]] = {
    "magic": damage_byte(lambda size: 0),
    "length": damage_byte(lambda size: 14),
    "header": damage_byte(lambda size: 40),
    "arrays": damage_byte(lambda size: size - SEAL - 70),
    "seal": damage_byte(lambda size: size - 1),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "header only": lambda path: path.write_bytes(path.read_bytes()[:64]),
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "header beyond the file": lambda path: path.write_bytes(MAGIC + b"\xff" * 7 + b"\x00" + bytes(99)),
    "resealed: no keys": resealed(lambda header, arrays: header.update(kv={})),
    "resealed: deep": resealed(lambda header, arrays: header.update(kv=[])),
    "resealed: a layout": resealed(lambda header, arrays: header["kv"].update(layout="x")),
    "resealed: keys are texts": resealed(lambda header, arrays: header["kv"].update(keys=["a"])),
    "resealed: true is no key": resealed(lambda header, arrays: header["kv"].update(keys=[True] * 301)),
    "resealed: other buffers": resealed(lambda header, arrays: header["kv"].update(buffers=["nothing"])),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_a_miss_and_goes(damage: Callable[[Path], object]) -> None:
    ask(Machine(budget=0, disk=1 << 20), 2)
    (path,) = stored()
    damage(path)
    damaged = path.read_bytes()
    machine = Machine(budget=0, disk=1 << 20)
    assert ask(machine, 3) == ask(Machine(budget=0), 3)
    assert machine.progress.cached_tokens == 0 and machine.progress.restored_from is None
    assert path.read_bytes() != damaged  # written anew
    machine = Machine(budget=0, disk=1 << 20)
    ask(machine, 4)
    assert machine.progress.cached_tokens == 301


def test_the_limit_holds_and_the_least_recently_used_go() -> None:
    size = 2000
    machine = Machine(budget=0, disk=3 * size + (1 << 16))
    prompts = [[2, *text(seed, 250)] for seed in range(5)]
    for prompt in prompts:
        machine.answer(prompt)
    used = sum(path.stat().st_size for path in stored())
    assert 0 < used <= 3 * size + (1 << 16)
    assert 1 <= len(stored()) <= 4
    machine = Machine(budget=0, disk=1 << 20)
    machine.answer(prompts[-1])
    assert machine.progress.cached_tokens == 250


def test_other_kept_files_do_not_go_for_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    cache_folder().mkdir()
    weights = cache_folder() / ("0" * 32 + "-weights.xnnpack")
    weights.write_bytes(bytes(100_000))
    monkeypatch.setenv("GEMMA_EDGE_CACHE_LIMIT", "150000")
    ask(Machine(budget=0, disk=1 << 30), 2)
    assert weights.exists() and not stored()


@pytest.mark.parametrize("reason", ["locked", "full", "no folder"])
def test_a_cache_that_takes_nothing_costs_nothing_but_time(
    reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_folder().mkdir()
    if reason == "locked":
        with kept_files._locked(cache_folder()):
            ask(Machine(budget=0, disk=1 << 30), 2)
    elif reason == "full":
        disk = type("Disk", (), {"free": 1000})()
        monkeypatch.setattr(kept_files.shutil, "disk_usage", lambda _: disk)
        ask(Machine(budget=0, disk=1 << 30), 2)
    else:
        cache_folder().rmdir()
        cache_folder().write_text("a file, not a folder")
        assert ask(Machine(budget=0, disk=1 << 30), 2) == ask(Machine(budget=0), 2)
        return
    assert not stored()


def test_a_snapshot_that_no_decoder_takes_is_refused() -> None:
    machine = Machine()
    ask(machine, 2)
    held = machine.cache.held
    with pytest.raises(UsageError, match="another model or engine"):
        machine.cache.adopt([1, 2], KvSnapshot("other", 2, 0, {}))
    assert machine.cache.held == held
