package dev.gemmaedge.plain;

/** A piece of an answer as the engine streams it: {"role": "assistant", "content": [{"type": "text", "text": ...}]}. */
public final class Chunk {
    private Chunk() {}

    /** Its text; what is no JSON is text itself. */
    public static String text(String json) {
        if (json.isEmpty()) return "";
        try {
            Object content = Json.object(Json.parse(json)).get("content");
            if (content instanceof String) return (String) content;
            StringBuilder out = new StringBuilder();
            for (Object part : Json.list(content))
                out.append(Json.string(Json.object(part).get("text"), ""));
            return out.toString();
        } catch (IllegalArgumentException error) {
            return json;
        }
    }

    /** An error that is an end as people want it: they pressed Stop, or the answer is as long as it may be. */
    public static boolean harmless(String error) {
        return error.contains("CANCELLED") || error.contains("ancelled");
    }

    public static boolean contextFull(String error) {
        return error.contains("Max number of tokens reached") || error.contains("too long")
            || error.contains("exceed");
    }
}
