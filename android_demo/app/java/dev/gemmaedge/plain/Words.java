package dev.gemmaedge.plain;

import java.util.Locale;

/** Figures as people read them. */
public final class Words {
    private Words() {}

    public static String count(long count) {
        return String.format(Locale.ROOT, "%,d", count);
    }

    /** "1.90 GB", "312 MB": decimal units, as phones have them. */
    public static String size(long bytes) {
        if (bytes >= 1_000_000_000L) return String.format(Locale.ROOT, "%.2f GB", bytes / 1e9);
        if (bytes >= 1_000_000L) return String.format(Locale.ROOT, "%.0f MB", bytes / 1e6);
        return String.format(Locale.ROOT, "%.0f kB", bytes / 1e3);
    }

    public static String seconds(double seconds) {
        if (seconds < 1) return String.format(Locale.ROOT, "%.0f ms", seconds * 1000);
        return String.format(Locale.ROOT, seconds < 10 ? "%.1f s" : "%.0f s", seconds);
    }

    /** The line below an answer: "first token 0.4 s · 12.3 tok/s · 48 tokens". */
    public static String speed(double firstToken, double perSecond, long tokens) {
        return "first token " + seconds(firstToken) + " · " + String.format(Locale.ROOT, "%.1f", perSecond) + " tok/s · "
            + count(tokens) + (tokens == 1 ? " token" : " tokens");
    }

    /** The memory line: "memory 812 MB, peak 1.20 GB of 2.10 GB". */
    public static String memory(long now, long peak, long ceiling) {
        return "memory " + size(now) + ", peak " + size(peak) + (ceiling > 0 ? " of " + size(ceiling) : "");
    }

    /** The start of a hash, enough to compare by eye. */
    public static String shortHash(String hash) {
        return hash.length() > 16 ? hash.substring(0, 8) + "…" + hash.substring(hash.length() - 8) : hash;
    }
}
