package dev.gemmaedge.plain;

/** What the app is doing, and what may happen next. A transition that is not in the table is a defect. */
public enum ChatState {
    EMPTY, COPYING, CHECKING, LOADING, READY, ANSWERING, STOPPING, BENCHMARKING, UNLOADED, FAILED;

    public enum Event {
        COPY, CHECK, LOAD, LOADED, SEND, STOP, ANSWERED, BENCHMARK, UNLOAD, FAIL
    }

    /** Nothing runs: a model may be chosen. */
    public boolean idle() {
        return this == EMPTY || this == READY || this == UNLOADED || this == FAILED;
    }

    /** Something runs that a person may stop. */
    public boolean busy() {
        return !idle() && this != STOPPING;
    }

    /** The engine is in memory. */
    public boolean loaded() {
        return this == READY || this == ANSWERING || this == STOPPING || this == BENCHMARKING;
    }

    public boolean can(Event event) {
        return next(event) != null;
    }

    /** IllegalStateException for an event that cannot happen now. */
    public ChatState on(Event event) {
        ChatState next = next(event);
        if (next == null) throw new IllegalStateException(event + " while " + this);
        return next;
    }

    private ChatState next(Event event) {
        switch (event) {
            case COPY:
                return idle() ? COPYING : null;
            case CHECK:
                return idle() || this == COPYING ? CHECKING : null;
            case LOAD:
                return this == CHECKING ? LOADING : null;
            case LOADED:
                return this == LOADING ? READY : null;
            case SEND:
                return this == READY ? ANSWERING : null;
            case STOP:
                return busy() ? STOPPING : null;
            case ANSWERED:
                return this == ANSWERING || this == STOPPING || this == BENCHMARKING ? READY : null;
            case BENCHMARK:
                return this == READY ? BENCHMARKING : null;
            case UNLOAD:
                return this == READY || this == STOPPING || this == LOADING || this == BENCHMARKING ? UNLOADED : null;
            case FAIL:
                return this == UNLOADED || this == EMPTY ? null : FAILED;
            default:
                return null;
        }
    }
}
