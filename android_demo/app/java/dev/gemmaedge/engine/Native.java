package dev.gemmaedge.engine;

/**
 * The C API of LiteRT-LM, as thin as it goes (jni/gemma_edge_jni.c). Texts are UTF-8 and end with a zero byte; handles are
 * pointers, which only `Engine` holds. What the engine refuses is an EngineException.
 */
final class Native {
    private Native() {}

    /** The engine, first mentioned: its libraries are loaded. Throws UnsatisfiedLinkError on other processors. */
    static void loadLibraries() {
        System.loadLibrary("litert-lm");
        System.loadLibrary("gemma_edge");
    }

    /** Called on the engine's own threads. */
    interface Listener {
        /** A piece as JSON, or null; whether it is the last; an error, or null. */
        void piece(byte[] json, boolean last, byte[] error);
    }

    /**
     * @param fd a descriptor that the engine closes, or -1 for `path`
     * @param prompt tokens of each prompt in benchmark mode, in which no token ends an answer; 0 otherwise
     */
    static native long load(byte[] path, int fd, byte[] cache, int threads, int context, boolean sees, boolean hears,
        int prompt, int decode);

    static native void unload(long engine);

    /** A listener that C may call from any thread, until it is let go. */
    static native long hold(Listener listener);

    static native void letGo(long listener);

    static native long converse(long engine, byte[] system, byte[] history, int topK, float topP, float temperature,
        int seed, int maxTokens);

    static native void end(long conversation);

    /** Returns at once; the answer comes to the listener. */
    static native void send(long conversation, byte[] message, long listener);

    static native void cancel(long conversation);

    /** Tokens in the cache. */
    static native int tokens(long conversation);

    /** Of the last answer: its tokens, tokens a second, tokens of the prompt. */
    static native double[] figures(long conversation);

    /** Of an engine in benchmark mode, nanoseconds: prefill, decode, first token. */
    static native double[] repeat(long engine, int prompt, int decode);
}
