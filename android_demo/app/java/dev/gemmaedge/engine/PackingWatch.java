package dev.gemmaedge.engine;

import java.io.File;

import dev.gemmaedge.plain.Words;

/** The first load packs weights into a file, which takes a minute or more: its growth is the progress. */
final class PackingWatch extends Thread {
    private static final int PERIOD_MS = 250;
    private final File folder;
    private final long expected;
    private final ChatSession session;
    private final long before;
    private volatile boolean ended;

    PackingWatch(File folder, long expected, ChatSession session) {
        super("packing-watch");
        this.folder = folder;
        this.expected = expected;
        this.session = session;
        this.before = bytes(folder);
        setDaemon(true);
    }

    static long bytes(File folder) {
        long sum = 0;
        File[] files = folder.listFiles();
        if (files != null) for (File file : files) sum += file.length();
        return sum;
    }

    void end() {
        ended = true;
        interrupt();
    }

    @Override
    public void run() {
        session.postWords("Loading the model", -1);
        while (!ended) {
            try {
                Thread.sleep(PERIOD_MS);
            } catch (InterruptedException error) {
                return;
            }
            long packed = bytes(folder) - before;
            if (packed > 0 && !ended)
                session.postWords("Packing weights, once · " + Words.size(packed) + " of about " + Words.size(expected),
                    Math.min(0.99, (double) packed / Math.max(1, expected)));
        }
    }
}
