package dev.gemmaedge.engine;

import java.io.File;
import java.io.IOException;
import java.util.ArrayList;
import java.util.Date;
import java.util.List;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;

import dev.gemmaedge.plain.AnswerLog;
import dev.gemmaedge.plain.BenchRows;
import dev.gemmaedge.plain.ChatState;
import dev.gemmaedge.plain.Chunk;
import dev.gemmaedge.plain.Conversation;
import dev.gemmaedge.plain.Hash;
import dev.gemmaedge.plain.Json;
import dev.gemmaedge.plain.MemoryVerdict;
import dev.gemmaedge.plain.ModelCard;
import dev.gemmaedge.plain.ModelFile;
import dev.gemmaedge.plain.Problem;
import dev.gemmaedge.plain.ProcessMemory;
import dev.gemmaedge.plain.Sampling;
import dev.gemmaedge.plain.TrimPolicy;
import dev.gemmaedge.plain.Turn;
import dev.gemmaedge.plain.Words;

/**
 * A model, a conversation, and what happens to both. Everything public is called on the screen's thread, and changes there;
 * the engine works on a thread of its own. It outlives every screen.
 */
public final class ChatSession {
    /** A screen that shows the session. */
    public interface Screen {
        void changed();
    }

    private static final long SPARE = 64L << 20; // left for the rest of the phone
    private final Host host;
    private final ExecutorService worker = Executors.newSingleThreadExecutor();
    private final List<Screen> screens = new ArrayList<Screen>();

    private ChatState state = ChatState.EMPTY;
    private String where = "";
    private String hash = "";
    private String words = "";
    private double share = -1;
    private Problem problem;
    private ModelCard card;
    private MemoryVerdict verdict;
    private Conversation conversation = new Conversation();
    private Sampling sampling = Sampling.standard();
    private long memoryNow;
    private long memoryPeak;
    private String benchText = "";
    private String benchRows = "";
    private Runnable whenReady;
    private AnswerLog log;

    private volatile Engine engine; // made and closed by the worker
    private volatile boolean stopWanted;
    private boolean inStep; // the engine's conversation is the one on the screen
    private double loadSeconds;

    public ChatSession(Host host) {
        this.host = host;
    }

    public void show(Screen screen) {
        screens.add(screen);
        screen.changed();
    }

    public void hide(Screen screen) {
        screens.remove(screen);
    }

    public ChatState state() {
        return state;
    }

    /** The chosen model, "" before one is chosen. */
    public String where() {
        return where;
    }

    public String hash() {
        return hash;
    }

    public ModelCard card() {
        return card;
    }

    public MemoryVerdict verdict() {
        return verdict;
    }

    /** What is going on, in words, and how much of it is done: 0 to 1, or below 0 where nobody knows. */
    public String words() {
        return words;
    }

    public double share() {
        return share;
    }

    /** The last problem, until something succeeds; or null. */
    public Problem problem() {
        return problem;
    }

    public Conversation conversation() {
        return conversation;
    }

    public Sampling sampling() {
        return sampling;
    }

    public String memoryLine() {
        return Words.memory(memoryNow, memoryPeak, card == null ? 0 : card.comfortableBytes());
    }

    /** Memory in use, of what the plan allows: 0 to 1. */
    public double memoryShare() {
        return card == null ? 0 : Math.min(1, (double) memoryNow / card.comfortableBytes());
    }

    public String benchText() {
        return benchText;
    }

    /** The rows of the last benchmark as JSONL, or "". */
    public String benchRows() {
        return benchRows;
    }

    public void restore(Conversation stored, Sampling settings) {
        inStep = false;
        conversation = stored;
        sampling = settings;
        changed();
    }

    public void setSampling(Sampling settings) {
        sampling = settings;
        inStep = false;
        changed();
    }

    /** Compares a model with the phone; reads only its header. May be called from any thread. */
    public MemoryVerdict compare(ModelCard model, boolean inPlace) {
        long[] memory = host.memory();
        return MemoryVerdict.of(model, inPlace, memory[0], memory[1], memory[2]);
    }

    /** Checks a model and loads it, in place of the one before. Nothing happens while another task runs. */
    public void choose(final String model) {
        if (!state.can(ChatState.Event.CHECK)) return;
        move(ChatState.Event.CHECK);
        where = model;
        hash = "";
        begin("Checking the model");
        worker.execute(new Runnable() {
            @Override
            public void run() {
                close();
                checkAndLoad(model);
            }
        });
    }

    /** Runs a task of the caller, such as a copy, on the session's thread, and then loads what it returns the place of. */
    public interface Import {
        String run(ModelFile.Progress progress) throws Problem;
    }

    public void importModel(final Import task) {
        if (!state.can(ChatState.Event.COPY)) return;
        move(ChatState.Event.COPY);
        begin("Copying the model");
        worker.execute(new Runnable() {
            @Override
            public void run() {
                try {
                    final String model = task.run(progress("Copying the model"));
                    host.post(new Runnable() {
                        @Override
                        public void run() {
                            if (state == ChatState.STOPPING) fail(new Problem(Problem.Kind.STOPPED, ""));
                            else choose(model);
                        }
                    });
                } catch (Problem problem) {
                    postFail(problem);
                }
            }
        });
    }

    private ModelFile.Progress progress(final String what) {
        return new ModelFile.Progress() {
            private long told;

            @Override
            public boolean at(long done, long total) {
                if (done - told > (8 << 20) || done == total) {
                    told = done;
                    postWords(what + " · " + Words.size(done) + (total > 0 ? " of " + Words.size(total) : ""),
                        total > 0 ? (double) done / total : -1);
                }
                return stopWanted;
            }
        };
    }

    private void checkAndLoad(String model) {
        try {
            Host.Access access = host.open(model);
            try {
                final ModelFile file = ModelFile.open(access.channel());
                final MemoryVerdict compared = compare(file.card, access.path().isEmpty());
                String mark = access.fingerprint();
                String known = host.verified(model, mark);
                postCard(file.card, compared, known == null ? "" : known);
                if (compared.level == MemoryVerdict.Level.TOO_LARGE)
                    throw new Problem(Problem.Kind.NO_MEMORY, compared.words);
                if (known == null) {
                    known = file.verify(access.channel(), progress("Checking the model"));
                    host.rememberVerified(model, mark, known);
                    postCard(file.card, compared, known);
                }
                load(access, file, 0, 0);
                postLoaded();
            } finally {
                access.close();
            }
        } catch (Problem found) {
            postFail(found);
        } catch (EngineException refused) {
            postFail(new Problem(Problem.Kind.ENGINE, refused.getMessage()));
        } catch (UnsatisfiedLinkError error) {
            postFail(new Problem(Problem.Kind.ENGINE, "this phone's processor is not 64-bit ARM"));
        } catch (IOException error) {
            postFail(new Problem(Problem.Kind.UNREADABLE, String.valueOf(error.getMessage())));
        }
    }

    private void load(Host.Access access, final ModelFile file, int prompt, int decode) throws Problem, IOException {
        if (stopWanted) throw new Problem(Problem.Kind.STOPPED, "");
        host.post(new Runnable() {
            @Override
            public void run() {
                if (state.can(ChatState.Event.LOAD)) move(ChatState.Event.LOAD);
            }
        });
        makeRoom(access, packedBytes(file));
        Engine.Options options = new Engine.Options();
        options.path = access.path();
        options.fd = options.path.isEmpty() ? access.takeDescriptor() : -1;
        options.cache = host.cacheFolder().getPath();
        options.threads = host.threads();
        options.context = file.card.context;
        options.sees = file.card.sees && prompt == 0;
        options.hears = file.card.hears && prompt == 0;
        options.prompt = prompt;
        options.decode = decode;
        PackingWatch watch = new PackingWatch(host.cacheFolder(), packedBytes(file), this);
        watch.start();
        long begin = System.nanoTime();
        try {
            engine = new Engine(options);
        } finally {
            watch.end();
        }
        loadSeconds = (System.nanoTime() - begin) / 1e9;
        inStep = false;
    }

    /**
     * The first load writes packed weights, as NAME_TIME_SIZE.*: those of an older file of this name go, and those of other
     * models where there is no room beside them.
     */
    private void makeRoom(Host.Access access, long packed) throws Problem {
        File folder = host.cacheFolder();
        File model = new File(access.path());
        if (access.path().isEmpty()) return; // opened in place: nothing is written
        String present = model.getName() + "_" + model.lastModified() / 1000 + "_" + model.length() + ".";
        File[] files = folder.listFiles();
        boolean there = false;
        if (files != null)
            for (File file : files) {
                there |= file.getName().startsWith(present);
                if (file.getName().startsWith(model.getName() + "_") && !file.getName().startsWith(present)) file.delete();
            }
        if (there || folder.getUsableSpace() > packed + SPARE) return;
        if (files != null) for (File file : files) file.delete();
        if (folder.getUsableSpace() < packed + SPARE)
            throw new Problem(Problem.Kind.NO_SPACE, Words.size(packed) + " for packed weights, "
                + Words.size(folder.getUsableSpace()) + " free");
    }

    /** About as many bytes as the engine packs: the weights of all graphs, without the tables that it reads in place. */
    private static long packedBytes(ModelFile file) {
        long bytes = 0;
        for (ModelFile.Section section : file.sections)
            if (section.type.equals("TFLiteModel") && !section.modelType.endsWith("embedder"))
                bytes += section.end - section.begin;
        return bytes;
    }

    void postWords(final String now, final double done) {
        host.post(new Runnable() {
            @Override
            public void run() {
                if (state.idle()) return;
                words = now;
                share = done;
                changed();
            }
        });
    }

    private void postCard(final ModelCard model, final MemoryVerdict compared, final String known) {
        host.post(new Runnable() {
            @Override
            public void run() {
                card = model;
                verdict = compared;
                hash = known;
                changed();
            }
        });
    }

    private void postLoaded() {
        sampleMemory();
        host.post(new Runnable() {
            @Override
            public void run() {
                if (state == ChatState.STOPPING) {
                    leave(ChatState.Event.UNLOAD, new Problem(Problem.Kind.STOPPED, ""));
                    return;
                }
                move(ChatState.Event.LOADED);
                done();
                if (log != null) host.log(log.state("loaded"));
                Runnable next = whenReady;
                whenReady = null;
                if (next != null) next.run();
            }
        });
    }

    /** Asks the model. False where it cannot now: nothing is lost then. */
    public boolean send(String text, List<String> images, List<String> sounds) {
        if (!state.can(ChatState.Event.SEND) || text.trim().isEmpty() && images.isEmpty() && sounds.isEmpty())
            return false;
        final Turn asked = new Turn(true, text.trim(), images, sounds);
        final Turn answer = Turn.answered("");
        conversation.turns.add(asked);
        final String history = conversation.history();
        conversation.turns.add(answer);
        final boolean fresh = !inStep;
        inStep = true;
        move(ChatState.Event.SEND);
        begin(images.isEmpty() && sounds.isEmpty() ? "Reading" : "Looking and listening");
        final Sampling settings = sampling;
        worker.execute(new Runnable() {
            @Override
            public void run() {
                try {
                    if (fresh) engine.converse(history, settings);
                    if (stopWanted) { // before there was anything to cancel
                        postAnswered(answer, Engine.Answer.none(), settings);
                        return;
                    }
                    postAnswered(answer, engine.send(Json.write(asked.message()), new Engine.Listener() {
                        @Override
                        public void piece(String piece) {
                            if (stopWanted) engine.cancel(); // a cancel that came too early is lost
                            postPiece(answer, piece);
                        }
                    }), settings);
                } catch (EngineException refused) {
                    postRefused(refused.getMessage());
                }
            }
        });
        return true;
    }

    private void postPiece(final Turn answer, final String piece) {
        host.post(new Runnable() {
            @Override
            public void run() {
                answer.text += piece;
                words = "Answering";
                if (log != null) for (String line : log.piece(piece)) host.log(line);
                changed();
            }
        });
    }

    private void postAnswered(final Turn turn, final Engine.Answer answer, final Sampling settings) {
        if (!answer.error.isEmpty()) {
            postRefused(answer.error);
            return;
        }
        sampleMemory();
        final int used = engine.tokens();
        host.post(new Runnable() {
            @Override
            public void run() {
                turn.note = (answer.stopped ? "stopped · " : answer.tokens >= settings.maxTokens ? "cut at "
                    + Words.count(settings.maxTokens) + " tokens · " : "")
                    + Words.speed(answer.firstToken, answer.perSecond, answer.tokens)
                    + " · context " + Words.count(used) + " of " + Words.count(card.context);
                if (answer.stopped) inStep = false; // what was shown counts, not what the engine had in mind
                move(ChatState.Event.ANSWERED);
                done();
                if (log != null)
                    host.log(log.end(Json.fields("text_sha256", Hash.of(turn.text), "tokens", answer.tokens,
                        "prompt_tokens", answer.promptTokens, "first_token_s", answer.firstToken, "tokens_per_s",
                        answer.perSecond, "memory", memoryNow, "peak", memoryPeak, "load_s", loadSeconds)));
                log = null;
            }
        });
    }

    /** The engine said no to a message: the model stays loaded, the turn stays with a note. */
    private void postRefused(final String said) {
        host.post(new Runnable() {
            @Override
            public void run() {
                Problem found = new Problem(Chunk.contextFull(said) ? Problem.Kind.CONTEXT_FULL : Problem.Kind.ENGINE, said);
                inStep = false;
                if (state.can(ChatState.Event.ANSWERED)) move(ChatState.Event.ANSWERED);
                done();
                tell(found);
            }
        });
    }

    /** Ends what runs, soon. */
    public void stop() {
        if (!state.can(ChatState.Event.STOP)) return;
        stopWanted = true;
        Engine running = engine;
        if (running != null && state == ChatState.ANSWERING) running.cancel();
        move(ChatState.Event.STOP);
        words = "Stopping";
        changed();
    }

    /** Forgets the turns; the caller has put them away if they matter. */
    public void newConversation() {
        if (state.busy() || state == ChatState.STOPPING) return;
        conversation = new Conversation();
        inStep = false;
        problem = null;
        changed();
    }

    /** Releases the model. The conversation stays; `loadAgain` goes on with it. */
    public void unload(String why) {
        if (!state.can(ChatState.Event.UNLOAD)) return;
        leave(ChatState.Event.UNLOAD, null);
        words = why;
        changed();
    }

    public void loadAgain() {
        if (!where.isEmpty()) choose(where);
    }

    private void leave(ChatState.Event event, Problem found) {
        move(event);
        done();
        worker.execute(new Runnable() {
            @Override
            public void run() {
                close();
                sampleMemory();
            }
        });
        if (found != null) tell(found);
    }

    /** Android asks for memory. */
    public void trim(int level) {
        TrimPolicy.Action action = TrimPolicy.decide(level, state);
        if (action == TrimPolicy.Action.KEEP) return;
        final String why = "Android needed the memory: the model was unloaded. Your conversation is here.";
        if (action == TrimPolicy.Action.STOP_AND_UNLOAD) {
            stop();
            whenStopped = why;
        } else {
            unload(why);
        }
    }

    private String whenStopped;

    /** Measures the loaded model: `reps` times a prompt and an answer, after one that is not counted. */
    public void bench(final BenchRows.Phone phone, final String run, final String version, final int prompt,
        final int decode, final int reps) {
        if (!state.can(ChatState.Event.BENCHMARK)) return;
        move(ChatState.Event.BENCHMARK);
        benchText = benchRows = "";
        begin("Loading for the benchmark");
        final String model = where;
        worker.execute(new Runnable() {
            @Override
            public void run() {
                try {
                    measure(model, phone, run, version, prompt, decode, reps);
                } catch (Problem found) {
                    postBenched(found);
                } catch (EngineException refused) {
                    postBenched(new Problem(Problem.Kind.ENGINE, refused.getMessage()));
                } catch (IOException error) {
                    postBenched(new Problem(Problem.Kind.UNREADABLE, String.valueOf(error.getMessage())));
                }
            }
        });
    }

    private void measure(String model, BenchRows.Phone phone, String run, String version, int prompt, int decode,
        int reps) throws Problem, IOException {
        close();
        Host.Access access = host.open(model);
        try {
            ModelFile file = ModelFile.open(access.channel());
            if (prompt + decode > file.card.context)
                throw new Problem(Problem.Kind.ENGINE, (prompt + decode) + " tokens do not fit the context of "
                    + file.card.context);
            load(access, file, prompt, decode);
            String name = access.path().isEmpty() ? file.card.name : new File(access.path()).getName();
            BenchRows rows = new BenchRows(file.card, phone, name, run, version, prompt, decode, host.threads());
            for (int i = -1; i < reps; i++) {
                if (stopWanted) throw new Problem(Problem.Kind.STOPPED, "");
                postWords(i < 0 ? "Warming up" : "Measuring " + (i + 1) + " of " + reps, (i + 1.0) / (reps + 1));
                double[] times = engine.repeat(prompt, decode);
                if (i >= 0) rows.add(times);
            }
            ProcessMemory memory = ProcessMemory.read();
            final String text = rows.line(0) + "\n" + rows.line(1);
            final String jsonl = rows.jsonl(loadSeconds, memory, new Date());
            host.post(new Runnable() {
                @Override
                public void run() {
                    benchText = text;
                    benchRows = jsonl;
                    if (log != null) for (String line : jsonl.split("\n")) for (String part : log.piece(line + "\n")) host.log(part);
                }
            });
            postBenched(null);
        } finally {
            access.close();
        }
    }

    /** After a benchmark the model is loaded for chats again when it is next needed. */
    private void postBenched(final Problem found) {
        host.post(new Runnable() {
            @Override
            public void run() {
                if (log != null && found == null)
                    host.log(log.end(Json.fields("text_sha256", Hash.of(benchRows))));
                leave(ChatState.Event.UNLOAD, found);
                if (found == null) log = null;
                words = "Measured. Load the model to chat.";
                changed();
            }
        });
    }

    /** A run that a computer started: what is loaded is used, another model is loaded first. */
    public void remote(String run, final String model, final Runnable task) {
        AnswerLog asked = new AnswerLog(run);
        if (!state.idle()) {
            host.log(asked.problem("busy: the app is " + state.name().toLowerCase(java.util.Locale.ROOT)));
            return;
        }
        log = asked;
        if (state == ChatState.READY && (model.isEmpty() || model.equals(where))) {
            task.run();
        } else if (model.isEmpty() && where.isEmpty()) {
            host.log(log.problem("no model was chosen: push one"));
            log = null;
        } else {
            whenReady = task;
            choose(model.isEmpty() ? where : model);
        }
    }

    /** Reads this process's memory; takes some milliseconds, on any thread. */
    public void sampleMemory() {
        final ProcessMemory memory = ProcessMemory.read();
        host.post(new Runnable() {
            @Override
            public void run() {
                memoryNow = memory.counted();
                memoryPeak = Math.max(memoryPeak, memoryNow);
                changed();
            }
        });
    }

    private void close() {
        Engine open = engine;
        engine = null;
        if (open != null) open.close();
    }

    private void begin(String what) {
        stopWanted = false;
        problem = null;
        words = what;
        share = -1;
        changed();
    }

    private void done() {
        words = "";
        share = -1;
        problem = null;
        stopWanted = false;
        changed();
        if (whenStopped != null && state == ChatState.READY) {
            String why = whenStopped;
            whenStopped = null;
            unload(why);
        }
    }

    private void postFail(final Problem found) {
        host.post(new Runnable() {
            @Override
            public void run() {
                fail(found);
            }
        });
    }

    private void fail(Problem found) {
        move(ChatState.Event.FAIL);
        done();
        tell(found);
        worker.execute(new Runnable() {
            @Override
            public void run() {
                close();
            }
        });
    }

    private void tell(Problem found) {
        problem = found;
        whenReady = null;
        if (log != null) host.log(log.problem(found.getMessage()));
        log = null;
        changed();
    }

    /** Shows the screens anew, for what they show beside the session. */
    public void touch() {
        changed();
    }

    /** For a problem outside the session, such as an attachment that cannot be read. */
    public void complain(Problem found) {
        problem = found;
        changed();
    }

    private void move(ChatState.Event event) {
        state = state.on(event);
    }

    private void changed() {
        for (Screen screen : new ArrayList<Screen>(screens)) screen.changed();
    }
}
