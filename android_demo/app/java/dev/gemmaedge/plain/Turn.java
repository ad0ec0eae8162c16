package dev.gemmaedge.plain;

import java.util.ArrayList;
import java.util.List;
import java.util.Map;

/** A turn of a conversation. `note` is shown below it, and is no part of what the model reads. */
public final class Turn {
    public final boolean user;
    public final List<String> images;
    public final List<String> sounds;
    public String text;
    public String note = "";

    public Turn(boolean user, String text, List<String> images, List<String> sounds) {
        this.user = user;
        this.text = text;
        this.images = images;
        this.sounds = sounds;
    }

    public static Turn asked(String text) {
        return new Turn(true, text, new ArrayList<String>(), new ArrayList<String>());
    }

    public static Turn answered(String text) {
        return new Turn(false, text, new ArrayList<String>(), new ArrayList<String>());
    }

    /** As the engine takes it; attachments by path. */
    public Map<String, Object> message() {
        List<Object> parts = new ArrayList<Object>();
        for (String path : images) parts.add(Json.fields("type", "image", "path", path));
        for (String path : sounds) parts.add(Json.fields("type", "audio", "path", path));
        parts.add(Json.fields("type", "text", "text", text));
        return Json.fields("role", user ? "user" : "assistant", "content", parts);
    }

    Map<String, Object> toJson() {
        return Json.fields("user", user, "text", text, "images", images, "sounds", sounds, "note", note);
    }

    static Turn fromJson(Map<String, Object> json) {
        Turn turn = new Turn(Boolean.TRUE.equals(json.get("user")), Json.string(json.get("text"), ""),
            texts(json.get("images")), texts(json.get("sounds")));
        turn.note = Json.string(json.get("note"), "");
        return turn;
    }

    private static List<String> texts(Object value) {
        List<String> texts = new ArrayList<String>();
        for (Object each : Json.list(value)) if (each instanceof String) texts.add((String) each);
        return texts;
    }
}
