package dev.gemmaedge.plain;

import java.io.File;
import java.io.FileOutputStream;
import java.io.IOException;
import java.io.InputStream;

/** Copies a chosen document into the app: complete or absent. */
public final class ModelCopy {
    private static final long SPARE = 64L << 20; // left for the rest of the phone

    private ModelCopy() {}

    /**
     * @param size bytes to come, or -1 where nobody tells
     * @param free bytes on the target's disk
     * @throws Problem NO_SPACE, UNREADABLE, TRUNCATED or STOPPED; nothing is left behind
     */
    public static void copy(InputStream in, long size, File target, long free, ModelFile.Progress progress)
        throws Problem {
        if (size > 0 && size + SPARE > free)
            throw new Problem(Problem.Kind.NO_SPACE, Words.size(size) + " to copy, " + Words.size(free) + " free");
        File part = new File(target.getPath() + ".part");
        boolean done = false;
        try {
            FileOutputStream out = new FileOutputStream(part);
            try {
                long copied = pump(in, out, size, progress);
                if (size >= 0 && copied != size)
                    throw new Problem(Problem.Kind.TRUNCATED, copied + " of " + size + " bytes arrived");
                out.getFD().sync();
            } finally {
                out.close();
            }
            if (!part.renameTo(target)) throw new Problem(Problem.Kind.UNREADABLE, target.getName() + " cannot be made");
            done = true;
        } catch (IOException error) {
            String said = String.valueOf(error.getMessage());
            throw new Problem(said.contains("ENOSPC") || said.contains("No space left") ? Problem.Kind.NO_SPACE
                : Problem.Kind.UNREADABLE, said);
        } finally {
            if (!done) part.delete();
        }
    }

    private static long pump(InputStream in, FileOutputStream out, long size, ModelFile.Progress progress)
        throws IOException, Problem {
        byte[] block = new byte[1 << 20];
        long copied = 0;
        for (int got; (got = in.read(block)) >= 0; ) {
            out.write(block, 0, got);
            copied += got;
            if (progress.at(copied, size)) throw new Problem(Problem.Kind.STOPPED, "");
        }
        return copied;
    }
}
