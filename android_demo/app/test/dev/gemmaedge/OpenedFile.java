package dev.gemmaedge;

import java.io.IOException;
import java.io.RandomAccessFile;
import java.nio.channels.FileChannel;

import dev.gemmaedge.engine.Host;
import dev.gemmaedge.plain.Problem;

/** A model's file on the computer, as a host opens it. */
final class OpenedFile implements Host.Access {
    private final String where;
    private final RandomAccessFile file;

    OpenedFile(String where) throws Problem {
        this.where = where;
        try {
            file = new RandomAccessFile(where, "r");
        } catch (IOException error) {
            throw new Problem(Problem.Kind.MISSING, "");
        }
    }

    @Override
    public FileChannel channel() {
        return file.getChannel();
    }

    @Override
    public String path() {
        return where;
    }

    @Override
    public int takeDescriptor() {
        throw new IllegalStateException();
    }

    @Override
    public String fingerprint() {
        return "1";
    }

    @Override
    public void close() throws IOException {
        file.close();
    }
}
