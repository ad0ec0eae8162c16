package dev.gemmaedge.engine;

import java.io.Closeable;
import java.io.File;
import java.io.IOException;
import java.nio.channels.FileChannel;

import dev.gemmaedge.plain.Problem;

/** What a session needs of the system around it: Android, or a test. */
public interface Host {
    /** An opened model. */
    interface Access extends Closeable {
        FileChannel channel() throws IOException;

        /** A path that the engine can open, or "" for a document that is opened in place. */
        String path();

        /** For a document: a descriptor of its own, which the engine closes. */
        int takeDescriptor() throws IOException;

        /** Changes when the file does. */
        String fingerprint() throws IOException;
    }

    /** Runs on the thread of the screen, in order. */
    void post(Runnable task);

    /** Problem MISSING or UNREADABLE. */
    Access open(String where) throws Problem;

    /** Bytes: what the system could give now, where it starts to end apps, all that it has. */
    long[] memory();

    /** Where the engine keeps packed weights. */
    File cacheFolder();

    int threads();

    /** The hash of a file that was verified before and has not changed since, or null. */
    String verified(String where, String fingerprint);

    void rememberVerified(String where, String fingerprint, String hash);

    /** A line for the computer that started this run by adb. */
    void log(String line);
}
