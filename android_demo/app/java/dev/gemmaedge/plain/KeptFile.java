package dev.gemmaedge.plain;

import java.io.ByteArrayOutputStream;
import java.io.File;
import java.io.FileInputStream;
import java.io.FileOutputStream;
import java.io.IOException;
import java.io.InputStream;

/** A small text file that is old or new, never torn; a damaged one is put aside, not deleted. */
public final class KeptFile {
    private final File file;

    public KeptFile(File file) {
        this.file = file;
    }

    public synchronized void write(String text) throws IOException {
        File part = new File(file.getPath() + ".part");
        FileOutputStream out = new FileOutputStream(part);
        try {
            out.write(text.getBytes("UTF-8"));
            out.getFD().sync();
        } finally {
            out.close();
        }
        if (!part.renameTo(file)) throw new IOException(file + " cannot be replaced");
    }

    /** The text, or null where there is none. */
    public synchronized String read() throws IOException {
        if (!file.exists()) return null;
        InputStream in = new FileInputStream(file);
        try {
            ByteArrayOutputStream out = new ByteArrayOutputStream();
            byte[] block = new byte[8192];
            for (int got; (got = in.read(block)) >= 0; ) out.write(block, 0, got);
            return out.toString("UTF-8");
        } finally {
            in.close();
        }
    }

    /** Renames a file that makes no sense; returns its new name. */
    public synchronized File putAside() {
        File aside = new File(file.getPath() + ".damaged");
        return file.renameTo(aside) ? aside : file;
    }

    /** The stored conversation; an empty one where there is none, or where it was damaged and put aside. */
    public Conversation conversation() {
        try {
            String text = read();
            return text == null ? new Conversation() : Conversation.fromJson(text);
        } catch (IOException error) {
            return new Conversation();
        } catch (IllegalArgumentException error) {
            putAside();
            return new Conversation();
        }
    }
}
