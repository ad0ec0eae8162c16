package dev.gemmaedge;

import java.io.File;
import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.Map;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.LinkedBlockingQueue;
import java.util.concurrent.TimeUnit;

import dev.gemmaedge.engine.ChatSession;
import dev.gemmaedge.engine.Host;
import dev.gemmaedge.plain.BenchRows;
import dev.gemmaedge.plain.ChatState;
import dev.gemmaedge.plain.Conversation;
import dev.gemmaedge.plain.Json;
import dev.gemmaedge.plain.Problem;
import dev.gemmaedge.plain.Sampling;
import dev.gemmaedge.plain.Turn;

/**
 * A session with the real engine, on a computer, as a phone would drive it: one step a line of JSON. Arguments: a model, a
 * damaged one, a folder for packed weights.
 */
public final class SessionDesk implements Host, ChatSession.Screen {
    private static final long PATIENCE_S = 120;
    private final File cache;
    private final ExecutorService screen = Executors.newSingleThreadExecutor();
    private final LinkedBlockingQueue<ChatState> seen = new LinkedBlockingQueue<ChatState>();
    private final Map<String, String> verified = new LinkedHashMap<String, String>();
    private final ChatSession session = new ChatSession(this);
    private int hashed;
    private int logged;

    private SessionDesk(File cache) {
        this.cache = cache;
    }

    public static void main(String[] words) throws Exception {
        new SessionDesk(new File(words[2])).tell(words[0], words[1]);
        System.exit(0);
    }

    private void tell(final String model, final String damaged) throws Exception {
        on(new Runnable() {
            @Override
            public void run() {
                session.show(SessionDesk.this);
                session.restore(new Conversation(), Sampling.greedy(40));
                session.choose(model);
            }
        });
        await(ChatState.READY, "loaded");
        ask("Why is the sky blue?", false);
        await(ChatState.READY, "answered");
        ask("Who are you?", false);
        await(ChatState.READY, "answered again");
        // Where this thread is kept waiting, a short answer may come to its end first.
        for (int i = 0; i < 20 && !lastNote().startsWith("stopped"); i++) {
            ask("Count from one to one hundred.", true);
            await(ChatState.READY, null);
        }
        print("stopped");
        ask("Who are you?", false);
        await(ChatState.READY, "answered after a stop");
        on(new Runnable() {
            @Override
            public void run() {
                session.trim(80);
            }
        });
        await(ChatState.UNLOADED, "unloaded for memory");
        on(new Runnable() {
            @Override
            public void run() {
                session.remote("r1", "", new Runnable() {
                    @Override
                    public void run() {
                        session.newConversation();
                        session.send("Who are you?", new ArrayList<String>(), new ArrayList<String>());
                    }
                });
            }
        });
        await(ChatState.ANSWERING, null);
        await(ChatState.READY, "answered a computer");
        on(new Runnable() {
            @Override
            public void run() {
                session.bench(new BenchRows.Phone(), "r2", "1", 16, 4, 2);
            }
        });
        await(ChatState.UNLOADED, "measured");
        on(new Runnable() {
            @Override
            public void run() {
                session.loadAgain();
            }
        });
        await(ChatState.READY, "loaded again");
        on(new Runnable() {
            @Override
            public void run() {
                session.choose(damaged);
            }
        });
        await(ChatState.FAILED, "refused a damaged one");
        on(new Runnable() {
            @Override
            public void run() {
                session.choose(model);
            }
        });
        await(ChatState.READY, "recovered");
    }

    private void ask(final String text, final boolean stop) throws Exception {
        on(new Runnable() {
            @Override
            public void run() {
                if (!session.send(text, new ArrayList<String>(), new ArrayList<String>())) throw new IllegalStateException(text);
                if (stop) session.stop();
            }
        });
    }

    private void on(Runnable task) throws Exception {
        screen.submit(task).get(PATIENCE_S, TimeUnit.SECONDS);
    }

    /** Waits until the session has been in a state since the last wait, then prints where it is. */
    private void await(ChatState wanted, final String step) throws Exception {
        for (ChatState state; (state = seen.poll(PATIENCE_S, TimeUnit.SECONDS)) != wanted; )
            if (state == null) throw new IllegalStateException(wanted + " did not come: " + session.state() + " " + session.words());
        if (step != null) print(step);
    }

    private String lastNote() {
        return session.conversation().turns.get(session.conversation().turns.size() - 1).note;
    }

    private void print(final String step) throws Exception {
        on(new Runnable() {
            @Override
            public void run() {
                Conversation turns = session.conversation();
                Turn last = turns.turns.isEmpty() ? Turn.answered("") : turns.turns.get(turns.turns.size() - 1);
                System.out.println(Json.write(Json.fields("step", step, "state", session.state().name(), "text", last.text, "note",
                    last.note, "turns", (long) turns.turns.size(), "problem", session.problem() == null ? "" : session.problem().kind.name(),
                    "words", session.words(), "hashed", (long) hashed, "logged", (long) logged, "bench", session.benchText(), "rows",
                    (long) session.benchRows().split("\n").length)));
            }
        });
    }

    // ChatSession.Screen.

    private ChatState before = ChatState.EMPTY;

    @Override
    public void changed() {
        if (session.state() != before) seen.add(session.state());
        before = session.state();
    }

    // Host.

    @Override
    public void post(Runnable task) {
        screen.execute(task);
    }

    @Override
    public Access open(final String where) throws Problem {
        return new OpenedFile(where);
    }

    @Override
    public long[] memory() {
        return new long[] {64L << 30, 0, 64L << 30};
    }

    @Override
    public File cacheFolder() {
        return cache;
    }

    @Override
    public int threads() {
        return 2;
    }

    @Override
    public String verified(String where, String fingerprint) {
        return verified.get(where);
    }

    @Override
    public void rememberVerified(String where, String fingerprint, String hash) {
        hashed++;
        verified.put(where, hash);
    }

    @Override
    public void log(String line) {
        logged++;
    }
}
