package dev.gemmaedge.plain;

import java.util.ArrayList;
import java.util.List;
import java.util.Map;

/** The turns that are shown and that the model reads. */
public final class Conversation {
    public final List<Turn> turns = new ArrayList<Turn>();
    public String draft = "";

    /** Turns before the last one, as the engine takes them: what got no answer is left out, since turns must alternate. */
    public String history() {
        List<Object> messages = new ArrayList<Object>();
        for (int i = 0; i < turns.size() - 1; i++) {
            Turn next = turns.get(i + 1);
            if (!turns.get(i).user || next.user || next.text.isEmpty()) continue;
            messages.add(turns.get(i).message());
            messages.add(next.message());
        }
        return Json.write(messages);
    }

    /** The whole as a person reads it, to copy or to share. */
    public String asText() {
        StringBuilder out = new StringBuilder();
        for (Turn turn : turns) {
            if (out.length() > 0) out.append("\n\n");
            out.append(turn.user ? "You: " : "Gemma: ").append(turn.text);
        }
        return out.toString();
    }

    public String toJson() {
        List<Object> list = new ArrayList<Object>();
        for (Turn turn : turns) list.add(turn.toJson());
        return Json.write(Json.fields("schema", 1L, "draft", draft, "turns", list));
    }

    /** IllegalArgumentException for what is none. */
    public static Conversation fromJson(String text) {
        Map<String, Object> json = Json.object(Json.parse(text));
        if (Json.integer(json.get("schema"), 0) != 1) throw new IllegalArgumentException("another schema");
        Conversation conversation = new Conversation();
        conversation.draft = Json.string(json.get("draft"), "");
        for (Object turn : Json.list(json.get("turns"))) conversation.turns.add(Turn.fromJson(Json.object(turn)));
        return conversation;
    }
}
