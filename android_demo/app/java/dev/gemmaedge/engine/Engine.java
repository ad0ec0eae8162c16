package dev.gemmaedge.engine;

import java.io.UnsupportedEncodingException;
import java.util.Arrays;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.atomic.AtomicLong;

import dev.gemmaedge.plain.Chunk;
import dev.gemmaedge.plain.Sampling;

/** A loaded model with at most one conversation. One thread uses it; `cancel` may come from any other. */
public final class Engine {
    /** What to load and how. */
    public static final class Options {
        public String path = "";
        /** A descriptor that the engine takes over, instead of `path`. */
        public int fd = -1;
        public String cache = "";
        public int threads = 4;
        public int context;
        public boolean sees;
        public boolean hears;
        /** Tokens of benchmark mode, or 0. */
        public int prompt;
        public int decode;
    }

    /** Hears an answer, on a thread of the engine. */
    public interface Listener {
        void piece(String text);
    }

    /** How an answer went; `error` is empty where it came to its end, or was stopped. */
    public static final class Answer {
        public final String error;
        public final boolean stopped;
        public final double firstToken;
        public final long tokens;
        public final double perSecond;
        public final long promptTokens;

        /** One that was stopped before it began. */
        static Answer none() {
            return new Answer("", true, 0, new double[3]);
        }

        Answer(String error, boolean stopped, double firstToken, double[] figures) {
            this.error = error;
            this.stopped = stopped;
            this.firstToken = firstToken;
            tokens = (long) figures[0];
            perSecond = figures[1];
            promptTokens = (long) figures[2];
        }
    }

    private final Object lock = new Object();
    private long engine;
    private long conversation;
    private long[] held = {}; // listeners of the conversation

    static {
        Native.loadLibraries();
    }

    /** Loads a model, which must have been checked: the engine ends the process on a damaged one. */
    public Engine(Options options) {
        engine = Native.load(zeroEnded(options.path), options.fd, zeroEnded(options.cache), options.threads,
            options.context, options.sees, options.hears, options.prompt, options.decode);
    }

    /** Starts a conversation behind `history`, a JSON list of messages, and ends the one before. */
    public void converse(String history, Sampling sampling) {
        endConversation();
        long made = Native.converse(engine, zeroEnded(sampling.system), zeroEnded(history), sampling.engineTopK(),
            (float) sampling.topP, (float) sampling.engineTemperature(), sampling.seed, sampling.maxTokens);
        synchronized (lock) {
            conversation = made;
        }
    }

    /** Sends a message, as JSON, and waits for the end of its answer. */
    public Answer send(String message, final Listener listener) {
        final CountDownLatch done = new CountDownLatch(1);
        final String[] said = {""};
        final long begin = System.nanoTime();
        final AtomicLong first = new AtomicLong();
        long listening = Native.hold(new Native.Listener() {
            @Override
            public void piece(byte[] json, boolean last, byte[] error) {
                try {
                    String text = json == null ? "" : Chunk.text(text(json));
                    if (!text.isEmpty()) {
                        first.compareAndSet(0, System.nanoTime() - begin);
                        listener.piece(text);
                    }
                    if (error != null) said[0] = text(error);
                } finally {
                    if (last || error != null) done.countDown();
                }
            }
        });
        Native.send(conversation, zeroEnded(message), listening);
        boolean interrupted = false;
        while (true) {
            try {
                done.await();
                break;
            } catch (InterruptedException error) {
                interrupted = true;
                cancel();
            }
        }
        if (interrupted) Thread.currentThread().interrupt();
        // The engine's thread may still be on its way out of the listener: that is let go with the conversation.
        held = Arrays.copyOf(held, held.length + 1);
        held[held.length - 1] = listening;
        boolean stopped = Chunk.harmless(said[0]);
        return new Answer(stopped ? "" : said[0], stopped, first.get() / 1e9, Native.figures(conversation));
    }

    /** Ends an answer under way; harmless where there is none. */
    public void cancel() {
        synchronized (lock) {
            if (conversation != 0) Native.cancel(conversation);
        }
    }

    /** Tokens of the conversation in the cache; 0 without one. */
    public int tokens() {
        return conversation == 0 ? 0 : Native.tokens(conversation);
    }

    /** In benchmark mode, nanoseconds: prefill, decode, first token. */
    public double[] repeat(int prompt, int decode) {
        return Native.repeat(engine, prompt, decode);
    }

    private void endConversation() {
        synchronized (lock) {
            if (conversation != 0) Native.end(conversation);
            conversation = 0;
        }
        for (long listening : held) Native.letGo(listening);
        held = new long[0];
    }

    public void close() {
        endConversation();
        if (engine != 0) Native.unload(engine);
        engine = 0;
    }

    private static byte[] zeroEnded(String text) {
        try {
            return (text + "\0").getBytes("UTF-8");
        } catch (UnsupportedEncodingException error) {
            throw new IllegalStateException(error);
        }
    }

    private static String text(byte[] utf8) {
        try {
            return new String(utf8, "UTF-8");
        } catch (UnsupportedEncodingException error) {
            throw new IllegalStateException(error);
        }
    }
}
