package dev.gemmaedge.plain;

/** What to do when Android asks for memory. Levels are those of ComponentCallbacks2. */
public final class TrimPolicy {
    public static final int RUNNING_CRITICAL = 15;
    public static final int UI_HIDDEN = 20;
    public static final int BACKGROUND = 40;

    public enum Action { KEEP, UNLOAD, STOP_AND_UNLOAD }

    private TrimPolicy() {}

    /** Where nobody sees the app, or the system is about to end apps, the model goes; the conversation stays. */
    public static Action decide(int level, ChatState state) {
        boolean pressing = level >= BACKGROUND || level == RUNNING_CRITICAL;
        if (!pressing || !state.loaded()) return Action.KEEP;
        if (state == ChatState.READY) return Action.UNLOAD;
        // An answer in sight is worth waiting for; in the background it is not worth the whole app.
        return level >= BACKGROUND ? Action.STOP_AND_UNLOAD : Action.KEEP;
    }
}
