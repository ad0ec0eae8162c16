package dev.gemmaedge.plain;

/** A model's planned memory compared with what a phone has, before anything is loaded. */
public final class MemoryVerdict {
    public enum Level { FITS, TIGHT, TOO_LARGE }

    /** Memory that Android and its own processes keep, whatever is closed: a share of the whole. */
    private static final double SYSTEM_SHARE = 0.35;

    public final Level level;
    public final long needed;
    public final long available;
    public final String words;

    private MemoryVerdict(Level level, long needed, long available, String words) {
        this.level = level;
        this.needed = needed;
        this.available = available;
        this.words = words;
    }

    /**
     * @param card the model
     * @param inPlace opened through a document's descriptor: the engine can keep no file of packed weights then, and
     *     holds them in memory
     * @param available memory that the system could give now; `threshold`, where it starts to end apps; `total`, all
     */
    public static MemoryVerdict of(ModelCard card, boolean inPlace, long available, long threshold, long total) {
        long needed = card.neededBytes + (inPlace ? card.fileBytes : 0);
        long spare = Math.max(0, available - threshold);
        long most = (long) (total * (1 - SYSTEM_SHARE));
        String plan = "needs " + Words.size(needed);
        if (needed > most)
            return new MemoryVerdict(Level.TOO_LARGE, needed, spare, plan + "; this phone gives an app at most about "
                + Words.size(most) + " of its " + Words.size(total));
        if (needed > spare)
            return new MemoryVerdict(Level.TIGHT, needed, spare, plan + ", " + Words.size(spare)
                + " is free: Android will close other apps");
        return new MemoryVerdict(Level.FITS, needed, spare, plan + ", " + Words.size(spare) + " is free");
    }
}
