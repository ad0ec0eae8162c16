package dev.gemmaedge.engine;

/** LiteRT-LM refused; the message is its own. */
public final class EngineException extends RuntimeException {
    private static final long serialVersionUID = 1;

    public EngineException(String message) {
        super(message);
    }
}
