package dev.gemmaedge.plain;

/** What went wrong, in words for a person: one kind a message, each with its remedy. */
public final class Problem extends Exception {
    private static final long serialVersionUID = 1;

    public enum Kind {
        MISSING("The model is not there any more. Push it again, or choose another one."),
        FOREIGN("This is not a model made by gemma-edge. Make one: gemma-edge export --format litertlm."),
        NEWER("A newer gemma-edge made this model. Update the app."),
        TRUNCATED("The model is incomplete: its end is missing. Copy it again."),
        DAMAGED("The model is damaged. Copy it again."),
        UNREADABLE("The model cannot be read. Choose it again."),
        NO_SPACE("There is not enough space on this phone. Free some, then try again; nothing was left behind."),
        NO_MEMORY("This phone has too little memory for the model. Choose a smaller one, or a shorter context."),
        ENGINE("The engine refused. The conversation is kept."),
        CONTEXT_FULL("The conversation fills the model's context. Start a new one; this one stays readable."),
        MEDIA("The attachment cannot be read. Choose another one."),
        STOPPED("Stopped.");

        public final String words;

        Kind(String words) {
            this.words = words;
        }
    }

    public final Kind kind;
    public final String detail;

    public Problem(Kind kind, String detail) {
        super(detail.isEmpty() ? kind.words : kind.words + " (" + detail + ")");
        this.kind = kind;
        this.detail = detail;
    }
}
