package dev.gemmaedge.plain;

import java.io.File;
import java.io.FileInputStream;
import java.io.IOException;

/** Memory of this process, from /proc: bytes, -1 for what the system does not tell. */
public final class ProcessMemory {
    public final long rssAnon;
    public final long rssFile;
    public final long rssShmem;
    public final long pss;
    public final long highWater;

    private ProcessMemory(String status, String rollup) {
        rssAnon = bytes(status, "RssAnon");
        rssFile = bytes(status, "RssFile");
        rssShmem = bytes(status, "RssShmem");
        highWater = bytes(status, "VmHWM");
        pss = bytes(rollup, "Pss");
    }

    public static ProcessMemory read() {
        return parse(text("/proc/self/status"), text("/proc/self/smaps_rollup"));
    }

    static ProcessMemory parse(String status, String rollup) {
        return new ProcessMemory(status, rollup);
    }

    /** Pss, or the resident pages where the kernel does not tell it. */
    public long counted() {
        return pss >= 0 ? pss : Math.max(0, rssAnon) + Math.max(0, rssFile) + Math.max(0, rssShmem);
    }

    /** Bytes of a line "KEY:  n kB". */
    static long bytes(String text, String key) {
        for (String line : text.split("\n")) {
            if (!line.startsWith(key + ":")) continue;
            String digits = line.substring(key.length() + 1).replaceAll("[^0-9]", "");
            return digits.isEmpty() || digits.length() > 15 ? -1 : Long.parseLong(digits) * 1024;
        }
        return -1;
    }

    /** A small file's text, "" where it cannot be read. */
    public static String text(String path) {
        try {
            FileInputStream in = new FileInputStream(new File(path));
            try {
                byte[] data = new byte[1 << 16];
                int size = 0;
                for (int got; size < data.length && (got = in.read(data, size, data.length - size)) > 0; ) size += got;
                return new String(data, 0, size, "UTF-8");
            } finally {
                in.close();
            }
        } catch (IOException error) {
            return "";
        }
    }
}
