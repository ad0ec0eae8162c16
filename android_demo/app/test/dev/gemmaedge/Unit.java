package dev.gemmaedge;

import java.io.ByteArrayInputStream;
import java.io.File;
import java.io.IOException;
import java.io.InputStream;
import java.io.RandomAccessFile;
import java.lang.reflect.InvocationTargetException;
import java.lang.reflect.Method;
import java.nio.channels.FileChannel;
import java.nio.file.Files;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Date;
import java.util.List;
import java.util.Map;

import dev.gemmaedge.engine.ChatSession;
import dev.gemmaedge.engine.Host;
import dev.gemmaedge.plain.AnswerLog;
import dev.gemmaedge.plain.BenchRows;
import dev.gemmaedge.plain.ChatState;
import dev.gemmaedge.plain.Chunk;
import dev.gemmaedge.plain.Conversation;
import dev.gemmaedge.plain.ConversationShelf;
import dev.gemmaedge.plain.CpuCores;
import dev.gemmaedge.plain.Hash;
import dev.gemmaedge.plain.Json;
import dev.gemmaedge.plain.KeptFile;
import dev.gemmaedge.plain.MemoryVerdict;
import dev.gemmaedge.plain.ModelCard;
import dev.gemmaedge.plain.ModelCopy;
import dev.gemmaedge.plain.ModelFile;
import dev.gemmaedge.plain.Problem;
import dev.gemmaedge.plain.ProcessMemory;
import dev.gemmaedge.plain.Sampling;
import dev.gemmaedge.plain.TrimPolicy;
import dev.gemmaedge.plain.Turn;
import dev.gemmaedge.plain.Wav;
import dev.gemmaedge.plain.Words;

/** Unit tests of everything that needs no Android: every method whose name begins with "test". Argument: a real .litertlm. */
public final class Unit {
    private static File model;
    private static File folder;

    private Unit() {}

    public static void main(String[] words) throws Exception {
        model = new File(words[0]);
        folder = Files.createTempDirectory("unit").toFile();
        int failed = 0;
        int passed = 0;
        for (Method method : Unit.class.getDeclaredMethods()) {
            if (!method.getName().startsWith("test")) continue;
            try {
                method.invoke(null);
                passed++;
            } catch (InvocationTargetException error) {
                failed++;
                System.out.println("FAILED " + method.getName());
                error.getCause().printStackTrace(System.out);
            }
        }
        System.out.println(passed + " passed, " + failed + " failed");
        System.exit(failed == 0 ? 0 : 1);
    }

    private static void same(Object expected, Object got) {
        if (expected == null ? got != null : !expected.equals(got))
            throw new AssertionError("expected " + expected + ", got " + got);
    }

    private static void holds(boolean condition, String what) {
        if (!condition) throw new AssertionError(what);
    }

    private interface Task {
        void run() throws Exception;
    }

    private static void refuses(Class<? extends Exception> kind, Task task) throws Exception {
        try {
            task.run();
        } catch (Exception error) {
            if (kind.isInstance(error)) return;
            throw error;
        }
        throw new AssertionError("no " + kind.getSimpleName());
    }

    private static void problem(Problem.Kind kind, Task task) throws Exception {
        try {
            task.run();
        } catch (Problem found) {
            same(kind, found.kind);
            holds(found.getMessage().startsWith(kind.words), found.getMessage());
            return;
        }
        throw new AssertionError("no problem " + kind);
    }

    // JSON.

    static void testJsonThereAndBack() {
        String text = "{\"a\": [1, -2, 0.5, true, false, null], \"b\": {\"ü\\n\\\"\\\\\": \"😀\"}, \"c\": []}";
        Object value = Json.parse(text);
        same(value, Json.parse(Json.write(value)));
        same(Long.valueOf(-2), Json.list(Json.object(value).get("a")).get(1));
        same("\"\\u0001\\ud800\"", Json.write("\u0001\ud800"));
        same("\ud83d\ude00", Json.parse("\"\\ud83d\\uDE00\""));
        same(Long.valueOf(9007199254740993L), Json.parse("9007199254740993"));
    }

    static void testJsonRefusesWhatIsNone() throws Exception {
        StringBuilder deep = new StringBuilder();
        for (int i = 0; i < 100_000; i++) deep.append('[');
        String[] wrong = {"", "{", "[1,]", "{\"a\" 1}", "{a: 1}", "\"\\q\"", "\"\\u00g0\"", "\"", "01", "1e999", "nul", "1 2",
            "NaN", "\"\n\"", deep.toString()};
        for (final String text : wrong)
            refuses(IllegalArgumentException.class, new Task() {
                @Override
                public void run() {
                    Json.parse(text);
                }
            });
        refuses(IllegalArgumentException.class, new Task() {
            @Override
            public void run() {
                Json.write(Double.NaN);
            }
        });
    }

    // Models.

    private static ModelFile open(File file) throws Exception {
        RandomAccessFile opened = new RandomAccessFile(file, "r");
        try {
            return ModelFile.open(opened.getChannel());
        } finally {
            opened.close();
        }
    }

    private static String verify(File file, final long stopAfter) throws Exception {
        RandomAccessFile opened = new RandomAccessFile(file, "r");
        try {
            FileChannel channel = opened.getChannel();
            return ModelFile.open(channel).verify(channel, new ModelFile.Progress() {
                @Override
                public boolean at(long done, long total) {
                    return done > stopAfter;
                }
            });
        } finally {
            opened.close();
        }
    }

    static void testModelIsRead() throws Exception {
        ModelFile file = open(model);
        same(model.length(), file.size);
        holds(file.card.context > 0 && file.card.neededBytes >= file.card.peakBytes, "plan");
        holds(file.section("TFLiteModel", "tf_lite_prefill_decode") != null, "decoder");
        same(64, verify(model, Long.MAX_VALUE).length());
        java.security.MessageDigest digest = Hash.sha256();
        digest.update(Files.readAllBytes(model.toPath()));
        same(Hash.hex(digest), verify(model, Long.MAX_VALUE));
    }

    static void testOneBitOfAnySectionCounts() throws Exception {
        byte[] bytes = Files.readAllBytes(model.toPath());
        for (ModelFile.Section section : open(model).sections) {
            if (section.type.equals("LlmMetadataProto")) continue; // the engine's own parser reads it
            final File damaged = new File(folder, "bit.litertlm");
            byte[] other = bytes.clone();
            other[(int) section.end - 1] ^= 1;
            Files.write(damaged.toPath(), other);
            problem(Problem.Kind.DAMAGED, new Task() {
                @Override
                public void run() throws Exception {
                    verify(damaged, Long.MAX_VALUE);
                }
            });
        }
    }

    static void testDamagedHeadersAreTyped() throws Exception {
        byte[] bytes = Files.readAllBytes(model.toPath());
        File damaged = new File(folder, "header.litertlm");
        java.util.Random random = new java.util.Random(17);
        int refused = 0;
        for (int i = 0; i < 3000; i++) {
            byte[] head = Arrays.copyOf(bytes, bytes.length > 20_000 ? 16_384 : bytes.length);
            for (int k = 0; k <= random.nextInt(3); k++) head[8 + random.nextInt(600)] = (byte) random.nextInt(256);
            RandomAccessFile file = new RandomAccessFile(damaged, "rw");
            try {
                file.setLength(bytes.length); // as long as the header says, and sparse
                file.seek(0);
                file.write(head);
                ModelFile.open(file.getChannel());
            } catch (Problem found) {
                refused++;
            } finally {
                file.close();
            }
        }
        holds(refused > 500, refused + " of 3000 refused");
    }

    static void testShortAndForeignFiles() throws Exception {
        byte[] bytes = Files.readAllBytes(model.toPath());
        Object[][] cases = {
            {new byte[0], Problem.Kind.TRUNCATED},
            {Arrays.copyOf(bytes, 5), Problem.Kind.TRUNCATED},
            {Arrays.copyOf(bytes, 31), Problem.Kind.TRUNCATED},
            {Arrays.copyOf(bytes, 1000), Problem.Kind.TRUNCATED},
            {Arrays.copyOf(bytes, bytes.length - 1), Problem.Kind.TRUNCATED},
            {Arrays.copyOf(bytes, bytes.length / 2), Problem.Kind.TRUNCATED},
            {Arrays.copyOf(bytes, bytes.length + 1), Problem.Kind.DAMAGED},
            {"GGUF and more than thirty-two bytes of it".getBytes("UTF-8"), Problem.Kind.FOREIGN},
            {"PK".getBytes("UTF-8"), Problem.Kind.FOREIGN},
        };
        for (Object[] each : cases) {
            final File file = new File(folder, "short.litertlm");
            Files.write(file.toPath(), (byte[]) each[0]);
            problem((Problem.Kind) each[1], new Task() {
                @Override
                public void run() throws Exception {
                    open(file);
                }
            });
        }
    }

    static void testCheckCanBeStopped() throws Exception {
        problem(Problem.Kind.STOPPED, new Task() {
            @Override
            public void run() throws Exception {
                verify(model, 0);
            }
        });
    }

    static void testMemoryVerdict() throws Exception {
        ModelCard card = open(model).card;
        long needed = card.neededBytes;
        long best = card.comfortableBytes();
        holds(best > needed, "weights are read");
        same(MemoryVerdict.Level.FITS, MemoryVerdict.of(card, false, best + 1000, 1000, 10 * best).level);
        MemoryVerdict slow = MemoryVerdict.of(card, false, best + 999, 1000, 10 * best);
        same(MemoryVerdict.Level.TIGHT, slow.level);
        holds(slow.words.contains("slowly"), slow.words);
        holds(MemoryVerdict.of(card, false, needed - 1, 0, 10 * best).words.contains("close other apps"), "words");
        same(MemoryVerdict.Level.TOO_LARGE, MemoryVerdict.of(card, false, best, 0, needed).level);
        // In place, the packed weights are in memory, too, and cannot be dropped.
        same(best, MemoryVerdict.of(card, true, best, 0, 10 * best).needed);
        same(MemoryVerdict.Level.TOO_LARGE, MemoryVerdict.of(card, true, best, 0, best).level);
    }

    static void testCopyIsCompleteOrAbsent() throws Exception {
        final byte[] data = new byte[3 << 20];
        final File target = new File(folder, "copy.litertlm");
        final ModelFile.Progress go = new ModelFile.Progress() {
            @Override
            public boolean at(long done, long total) {
                return false;
            }
        };
        ModelCopy.copy(new ByteArrayInputStream(data), data.length, target, Long.MAX_VALUE, go);
        same((long) data.length, target.length());
        target.delete();
        Object[][] cases = {
            {new ByteArrayInputStream(data), data.length, 1000L, Problem.Kind.NO_SPACE},
            {new ByteArrayInputStream(data), data.length + 1, Long.MAX_VALUE, Problem.Kind.TRUNCATED},
            {failing("write failed: ENOSPC (No space left on device)"), -1, Long.MAX_VALUE, Problem.Kind.NO_SPACE},
            {failing("gone"), -1, Long.MAX_VALUE, Problem.Kind.UNREADABLE},
        };
        for (final Object[] each : cases) {
            problem((Problem.Kind) each[3], new Task() {
                @Override
                public void run() throws Exception {
                    ModelCopy.copy((InputStream) each[0], ((Integer) each[1]).longValue(), target, (Long) each[2], go);
                }
            });
            holds(!target.exists() && !new File(target.getPath() + ".part").exists(), "something is left");
        }
    }

    private static InputStream failing(final String words) {
        return new InputStream() {
            @Override
            public int read() throws IOException {
                throw new IOException(words);
            }
        };
    }

    // State.

    static void testStatesThatLeadSomewhere() {
        ChatState state = ChatState.EMPTY;
        ChatState.Event[] life = {ChatState.Event.COPY, ChatState.Event.CHECK, ChatState.Event.LOAD, ChatState.Event.LOADED,
            ChatState.Event.SEND, ChatState.Event.STOP, ChatState.Event.ANSWERED, ChatState.Event.BENCHMARK, ChatState.Event.UNLOAD,
            ChatState.Event.CHECK, ChatState.Event.FAIL, ChatState.Event.CHECK};
        for (ChatState.Event event : life) state = state.on(event);
        same(ChatState.CHECKING, state);
    }

    static void testNoStateIsATrap() {
        for (ChatState state : ChatState.values()) {
            int ways = 0;
            for (ChatState.Event event : ChatState.Event.values()) if (state.can(event)) ways++;
            holds(ways > 0, state + " has no way out");
            holds(state.idle() || state == ChatState.STOPPING || state.can(ChatState.Event.STOP), state + " cannot be stopped");
            holds(state.idle() == state.can(ChatState.Event.COPY), state + " and a new model");
        }
    }

    static void testWhatCannotBeIsADefect() throws Exception {
        refuses(IllegalStateException.class, new Task() {
            @Override
            public void run() {
                ChatState.EMPTY.on(ChatState.Event.SEND);
            }
        });
        refuses(IllegalStateException.class, new Task() {
            @Override
            public void run() {
                ChatState.ANSWERING.on(ChatState.Event.CHECK);
            }
        });
    }

    static void testMemoryPressure() {
        same(TrimPolicy.Action.KEEP, TrimPolicy.decide(TrimPolicy.UI_HIDDEN, ChatState.READY));
        same(TrimPolicy.Action.UNLOAD, TrimPolicy.decide(TrimPolicy.RUNNING_CRITICAL, ChatState.READY));
        same(TrimPolicy.Action.UNLOAD, TrimPolicy.decide(TrimPolicy.BACKGROUND, ChatState.READY));
        same(TrimPolicy.Action.KEEP, TrimPolicy.decide(TrimPolicy.RUNNING_CRITICAL, ChatState.ANSWERING));
        same(TrimPolicy.Action.STOP_AND_UNLOAD, TrimPolicy.decide(80, ChatState.ANSWERING));
        same(TrimPolicy.Action.KEEP, TrimPolicy.decide(80, ChatState.EMPTY));
    }

    // Conversations.

    static void testConversationThereAndBack() {
        Conversation conversation = new Conversation();
        conversation.draft = "half a";
        Turn asked = Turn.asked("What is \"this\"?\n😀");
        asked.images.add("/files/a.jpg");
        asked.sounds.add("/files/b.wav");
        Turn answer = Turn.answered("A cross.");
        answer.note = "first token 0.4 s";
        conversation.turns.addAll(Arrays.asList(asked, answer));
        Conversation again = Conversation.fromJson(conversation.toJson());
        same(conversation.toJson(), again.toJson());
        same("You: What is \"this\"?\n😀\n\nGemma: A cross.", again.asText());
    }

    static void testHistoryLeavesTheLastTurnOut() {
        Conversation conversation = new Conversation();
        same("[]", conversation.history());
        conversation.turns.add(Turn.asked("nobody answers"));
        same("[]", conversation.history());
        conversation.turns.add(Turn.answered(""));
        conversation.turns.addAll(Arrays.asList(Turn.asked("one"), Turn.answered("1"), Turn.asked("two")));
        List<Object> messages = Json.list(Json.parse(conversation.history()));
        same(2, messages.size());
        Map<String, Object> message = Json.object(messages.get(0));
        same("user", message.get("role"));
        same("one", Json.object(Json.list(message.get("content")).get(0)).get("text"));
    }

    static void testDamagedConversationIsPutAside() throws Exception {
        File file = new File(folder, "conversation.json");
        KeptFile kept = new KeptFile(file);
        same(0, kept.conversation().turns.size());
        for (String text : new String[] {"{", "{\"schema\": 2}", "[]", "\u0000"}) {
            kept.write(text);
            same(0, kept.conversation().turns.size());
            holds(!file.exists() && new File(file.getPath() + ".damaged").exists(), "it was deleted, or is still there");
        }
        Conversation conversation = new Conversation();
        conversation.turns.add(Turn.asked("hello"));
        kept.write(conversation.toJson());
        same("hello", kept.conversation().turns.get(0).text);
    }

    static void testShelfKeepsEveryConversation() throws Exception {
        ConversationShelf shelf = new ConversationShelf(new File(folder, "shelf"));
        shelf.put(new Conversation(), 5);
        same(0, shelf.list().size());
        for (String text : new String[] {"first\n of  all", "second"}) {
            Conversation conversation = new Conversation();
            conversation.turns.add(Turn.asked(text));
            conversation.turns.get(0).images.add("/" + text.length() + ".jpg");
            shelf.put(conversation, 1_700_000_000_000L); // at the same moment
        }
        same(2, shelf.list().size());
        same("second", ConversationShelf.title(shelf.look(shelf.list().get(0))));
        Conversation first = shelf.take(shelf.list().get(1));
        same("first of all", ConversationShelf.title(first));
        same(Arrays.asList("/14.jpg"), ConversationShelf.attachments(Arrays.asList(first)));
        same(1, shelf.list().size());
    }

    static void testSamplingStaysInRange() {
        Sampling wild = new Sampling("", 99, -5, 7, -1, 1 << 30);
        same(2.0, wild.temperature);
        same(1, wild.topK);
        same(1.0, wild.topP);
        same(8192, wild.maxTokens);
        Sampling greedy = new Sampling("be brief", 0, 64, 0.95, 3, 10);
        same(1, greedy.engineTopK());
        same(1.0, greedy.engineTemperature());
        same(greedy.toJson(), Sampling.fromJson(Json.object(Json.parse(Json.write(greedy.toJson())))).toJson());
        same(Sampling.standard().toJson(), Sampling.fromJson(Json.object(Json.parse("{\"top_k\": \"x\"}"))).toJson());
    }

    static void testChunks() {
        same("Air", Chunk.text("{\"role\":\"assistant\",\"content\":[{\"type\":\"text\",\"text\":\"Air\"}]}"));
        same("ab", Chunk.text("{\"content\": [{\"text\": \"a\"}, {\"text\": \"b\"}]}"));
        same("plain", Chunk.text("{\"content\": \"plain\"}"));
        same("no json", Chunk.text("no json"));
        same("", Chunk.text(""));
        holds(Chunk.harmless("CANCELLED: Task cancelled.") && !Chunk.harmless("INTERNAL"), "cancelled");
        holds(Chunk.contextFull("INTERNAL: Max number of tokens reached."), "full");
    }

    static void testAnswerLogIsShortAndNumbered() {
        AnswerLog log = new AnswerLog("r1");
        StringBuilder text = new StringBuilder();
        for (int i = 0; i < 900; i++) text.append("😀\u0001");
        StringBuilder got = new StringBuilder();
        List<String> lines = new ArrayList<String>(log.piece(text.toString()));
        lines.add(log.end(Json.fields("tokens", 3L)));
        for (int i = 0; i < lines.size(); i++) {
            holds(lines.get(i).getBytes(java.nio.charset.Charset.forName("UTF-8")).length < 4000, "a line too long for logcat");
            Map<String, Object> line = Json.object(Json.parse(lines.get(i)));
            same("r1", line.get("run"));
            same((long) i, line.get("n"));
            got.append(Json.string(line.get("text"), ""));
        }
        same(text.toString(), got.toString());
    }

    // Sound, memory, words.

    static void testWav() throws Exception {
        File file = new File(folder, "a.wav");
        RandomAccessFile out = new RandomAccessFile(file, "rw");
        out.write(Wav.header(0));
        out.write(new byte[3201]); // an odd byte: half a sample
        Wav.finish(out);
        out.close();
        byte[] bytes = Files.readAllBytes(file.toPath());
        same(44 + 3200, bytes.length);
        holds(Arrays.equals(Wav.header(3200), Arrays.copyOf(bytes, 44)), "header");
        javax.sound.sampled.AudioFormat format = javax.sound.sampled.AudioSystem.getAudioInputStream(file).getFormat();
        same(16000f, format.getSampleRate());
        same(1, format.getChannels());
        same(16, format.getSampleSizeInBits());
    }

    static void testProcessMemory() {
        ProcessMemory memory = ProcessMemory.read();
        holds(memory.rssAnon > 0 && memory.highWater >= memory.rssAnon && memory.counted() > 0, "this process has memory");
        same("", ProcessMemory.text("/proc/nothing"));
    }

    static void testThreads() {
        same(4, CpuCores.threads(Arrays.asList(1800000L, 1800000L, 1800000L, 1800000L, 2400000L, 2400000L, 2400000L, 2800000L), 8));
        same(4, CpuCores.threads(Arrays.asList(0L, 0L, 0L, 0L, 0L, 0L, 0L, 0L), 8));
        same(1, CpuCores.threads(new ArrayList<Long>(), 1));
        same(8, CpuCores.threads(new ArrayList<Long>(), 64));
    }

    static void testWords() {
        same("1.90 GB", Words.size(1_900_000_000L));
        same("812 MB", Words.size(812_000_000L));
        same("first token 420 ms · 12.3 tok/s · 48 tokens", Words.speed(0.42, 12.34, 48));
        same("first token 1.4 s · 9.0 tok/s · 1 token", Words.speed(1.42, 9, 1));
        same("memory 812 MB, peak 1.20 GB of 2.10 GB", Words.memory(812_000_000L, 1_200_000_000L, 2_100_000_000L));
        same("01234567…89abcdef", Words.shortHash("0123456789abcdef0123456789abcdef".substring(0, 8) + "00" + "89abcdef"));
    }

    static void testBenchFigures() throws Exception {
        BenchRows rows = new BenchRows(open(model).card, new BenchRows.Phone(), "m.litertlm", "r", "1", 512, 128, 4);
        rows.add(new double[] {1e9, 2e9, 1.1e9});
        rows.add(new double[] {2e9, 4e9, 2.2e9});
        same("pp512 384.00 ± 181.02 tok/s", rows.line(0));
        same("tg128 @ d512", rows.name(1));
        String[] lines = rows.jsonl(1.5, ProcessMemory.read(), new Date(0)).split("\n");
        same(3, lines.length);
        same("1970-01-01T00:00:00+00:00", Json.object(Json.parse(lines[2])).get("time"));
    }

    // The session, without an engine: what it does before one is needed.

    private static final class StubHost implements Host {
        final List<String> logged = new ArrayList<String>();
        final Object done = new Object();
        long total = 64L << 30;

        @Override
        public synchronized void post(Runnable task) {
            task.run();
        }

        @Override
        public Access open(final String where) throws Problem {
            return new OpenedFile(where);
        }

        @Override
        public long[] memory() {
            return new long[] {total, 0, total};
        }

        @Override
        public File cacheFolder() {
            return folder;
        }

        @Override
        public int threads() {
            return 1;
        }

        @Override
        public String verified(String where, String fingerprint) {
            return null;
        }

        @Override
        public void rememberVerified(String where, String fingerprint, String hash) {}

        @Override
        public void log(String line) {
            logged.add(line);
        }
    }

    /** Waits for an idle state; the session's own threads work meanwhile. */
    private static void settle(final ChatSession session, StubHost host) throws Exception {
        for (int i = 0; i < 30_000; i++) {
            synchronized (host) {
                if (session.state().idle() && session.state() != ChatState.EMPTY) return;
            }
            Thread.sleep(1);
        }
        throw new AssertionError("still " + session.state());
    }

    static void testSessionSaysWhyAModelIsRefused() throws Exception {
        StubHost host = new StubHost();
        ChatSession session = new ChatSession(host);
        Conversation before = new Conversation();
        before.turns.add(Turn.asked("keep me"));
        session.restore(before, Sampling.standard());
        session.choose(new File(folder, "nowhere.litertlm").getPath());
        settle(session, host);
        same(Problem.Kind.MISSING, session.problem().kind);
        host.total = 1 << 20;
        session.choose(model.getPath());
        settle(session, host);
        same(Problem.Kind.NO_MEMORY, session.problem().kind);
        same(MemoryVerdict.Level.TOO_LARGE, session.verdict().level);
        holds(!session.send("hello", new ArrayList<String>(), new ArrayList<String>()), "nothing is loaded");
        same("keep me", session.conversation().turns.get(0).text);
        session.remote("r", "", new Runnable() {
            @Override
            public void run() {
                throw new AssertionError("it runs without a model");
            }
        });
        settle(session, host);
        holds(host.logged.toString().contains("too little memory"), host.logged.toString());
    }
}
