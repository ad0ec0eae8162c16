package dev.gemmaedge.plain;

/** A model's planned memory compared with what a phone has, before anything is loaded. */
public final class MemoryVerdict {
    public enum Level { FITS, TIGHT, TOO_LARGE }

    /** Memory that Android and its own processes keep, whatever is closed: a share of the whole. */
    private static final double SYSTEM_SHARE = 0.35;

    public final Level level;
    /** Bytes that must be there, or Android ends the app; and with the weights that every token reads. */
    public final long needed;
    public final long comfortable;
    public final String words;

    private MemoryVerdict(Level level, long needed, long comfortable, String words) {
        this.level = level;
        this.needed = needed;
        this.comfortable = comfortable;
        this.words = words;
    }

    /**
     * @param card the model
     * @param inPlace opened through a document's descriptor: the engine can keep no file of packed weights then, and
     *     holds them in memory
     * @param available memory that the system could give now; `threshold`, where it starts to end apps; `total`, all
     */
    public static MemoryVerdict of(ModelCard card, boolean inPlace, long available, long threshold, long total) {
        long comfortable = card.comfortableBytes();
        long needed = inPlace ? comfortable : card.neededBytes;
        long spare = Math.max(0, available - threshold);
        long most = (long) (total * (1 - SYSTEM_SHARE));
        String words = "needs " + Words.size(needed) + (inPlace ? "" : ", best " + Words.size(comfortable));
        Level level = Level.FITS;
        if (needed > most) {
            level = Level.TOO_LARGE;
            words += "; this phone gives an app at most about " + Words.size(most) + " of its " + Words.size(total);
        } else if (comfortable > spare) {
            level = Level.TIGHT;
            words += "; " + Words.size(spare) + " is free: "
                + (needed > spare ? "Android will close other apps" : "weights will be read again and again, slowly");
        } else {
            words += "; " + Words.size(spare) + " is free";
        }
        return new MemoryVerdict(level, needed, comfortable, words);
    }
}
