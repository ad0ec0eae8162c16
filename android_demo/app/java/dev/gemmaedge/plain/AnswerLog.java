package dev.gemmaedge.plain;

import java.util.ArrayList;
import java.util.List;
import java.util.Map;

/**
 * An answer as numbered lines of JSON, short enough for logcat: the computer that asked reads them and notices a line
 * that the log has dropped.
 */
public final class AnswerLog {
    public static final String TAG = "GemmaEdge";
    public static final int MOST_CHARACTERS = 800; // at most 3 bytes each as UTF-8, 6 as an escape; logcat's limit is 4,068

    private final String run;
    private int next;

    public AnswerLog(String run) {
        this.run = run;
    }

    public List<String> piece(String text) {
        List<String> lines = new ArrayList<String>();
        for (int at = 0; at < text.length(); ) {
            int end = Math.min(text.length(), at + MOST_CHARACTERS);
            if (end < text.length() && Character.isHighSurrogate(text.charAt(end - 1))) end--;
            lines.add(line(Json.fields("text", text.substring(at, end))));
            at = end;
        }
        return lines;
    }

    public String state(String words) {
        return line(Json.fields("state", words));
    }

    public String problem(String words) {
        return line(Json.fields("error", words));
    }

    /** The last line; its figures are those of the answer. */
    public String end(Map<String, Object> figures) {
        return line(Json.fields("end", figures));
    }

    private String line(Map<String, Object> what) {
        Map<String, Object> line = Json.fields("run", run, "n", (long) next++);
        line.putAll(what);
        return Json.write(line);
    }
}
