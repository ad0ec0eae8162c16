package dev.gemmaedge.plain;

import java.util.ArrayList;
import java.util.Iterator;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;

/** JSON as maps, lists, strings, Long, Double, Boolean and null. */
public final class Json {
    private static final int MOST_DEPTH = 64;
    private final String text;
    private int at;

    private Json(String text) {
        this.text = text;
    }

    /** Reads one value; IllegalArgumentException says where a text is not JSON. */
    public static Object parse(String text) {
        Json reader = new Json(text);
        Object value = reader.value(0);
        reader.space();
        if (reader.at != text.length()) throw reader.wrong("the end");
        return value;
    }

    /** An object's fields; IllegalArgumentException for any other value. */
    public static Map<String, Object> object(Object value) {
        if (!(value instanceof Map)) throw new IllegalArgumentException("expected a JSON object");
        @SuppressWarnings("unchecked")
        Map<String, Object> map = (Map<String, Object>) value;
        return map;
    }

    /** A list's values, or none. */
    public static List<Object> list(Object value) {
        if (!(value instanceof List)) return new ArrayList<Object>();
        @SuppressWarnings("unchecked")
        List<Object> list = (List<Object>) value;
        return list;
    }

    public static String string(Object value, String otherwise) {
        return value instanceof String ? (String) value : otherwise;
    }

    public static long integer(Object value, long otherwise) {
        return value instanceof Long ? (Long) value : otherwise;
    }

    public static double number(Object value, double otherwise) {
        return value instanceof Number ? ((Number) value).doubleValue() : otherwise;
    }

    /** Fields in order: "key", value, "key", value, ... */
    public static Map<String, Object> fields(Object... pairs) {
        Map<String, Object> map = new LinkedHashMap<String, Object>();
        for (int i = 0; i < pairs.length; i += 2) map.put((String) pairs[i], pairs[i + 1]);
        return map;
    }

    /** On one line. NaN and infinity have no form in JSON: IllegalArgumentException. */
    public static String write(Object value) {
        StringBuilder out = new StringBuilder();
        write(value, out);
        return out.toString();
    }

    private static void write(Object value, StringBuilder out) {
        if (value instanceof Map) {
            out.append('{');
            String between = "";
            for (Map.Entry<?, ?> entry : ((Map<?, ?>) value).entrySet()) {
                out.append(between);
                quote((String) entry.getKey(), out);
                out.append(": ");
                write(entry.getValue(), out);
                between = ", ";
            }
            out.append('}');
        } else if (value instanceof Iterable) {
            out.append('[');
            for (Iterator<?> each = ((Iterable<?>) value).iterator(); each.hasNext(); ) {
                write(each.next(), out);
                if (each.hasNext()) out.append(", ");
            }
            out.append(']');
        } else if (value instanceof String) {
            quote((String) value, out);
        } else if (value instanceof Double || value instanceof Float) {
            double number = ((Number) value).doubleValue();
            if (Double.isNaN(number) || Double.isInfinite(number)) throw new IllegalArgumentException("not a number");
            out.append(number);
        } else if (value == null || value instanceof Number || value instanceof Boolean) {
            out.append(value);
        } else {
            throw new IllegalArgumentException("no JSON: " + value.getClass());
        }
    }

    private static void quote(String text, StringBuilder out) {
        out.append('"');
        for (int i = 0; i < text.length(); i++) {
            char c = text.charAt(i);
            int escaped = "\"\\\n\r\t\b\f".indexOf(c);
            if (escaped >= 0) out.append('\\').append("\"\\nrtbf".charAt(escaped));
            else if (c < ' ' || alone(text, i)) out.append(String.format("\\u%04x", (int) c));
            else out.append(c);
        }
        out.append('"');
    }

    /** Half of a surrogate pair: it has no UTF-8 form. */
    private static boolean alone(String text, int i) {
        char c = text.charAt(i);
        if (Character.isHighSurrogate(c))
            return i + 1 == text.length() || !Character.isLowSurrogate(text.charAt(i + 1));
        return Character.isLowSurrogate(c) && (i == 0 || !Character.isHighSurrogate(text.charAt(i - 1)));
    }

    private Object value(int depth) {
        if (depth > MOST_DEPTH) throw wrong("at most " + MOST_DEPTH + " levels");
        space();
        if (at == text.length()) throw wrong("a value");
        char c = text.charAt(at);
        if (c == '{') return readObject(depth);
        if (c == '[') return readList(depth);
        if (c == '"') return readString();
        if (take("true")) return Boolean.TRUE;
        if (take("false")) return Boolean.FALSE;
        if (take("null")) return null;
        return readNumber();
    }

    private Map<String, Object> readObject(int depth) {
        Map<String, Object> map = new LinkedHashMap<String, Object>();
        at++;
        space();
        if (take("}")) return map;
        while (true) {
            space();
            if (at == text.length() || text.charAt(at) != '"') throw wrong("a key");
            String key = readString();
            space();
            if (!take(":")) throw wrong("a colon");
            map.put(key, value(depth + 1));
            space();
            if (take("}")) return map;
            if (!take(",")) throw wrong("a comma");
        }
    }

    private List<Object> readList(int depth) {
        List<Object> list = new ArrayList<Object>();
        at++;
        space();
        if (take("]")) return list;
        while (true) {
            list.add(value(depth + 1));
            space();
            if (take("]")) return list;
            if (!take(",")) throw wrong("a comma");
        }
    }

    private String readString() {
        StringBuilder out = new StringBuilder();
        for (at++; at < text.length(); at++) {
            char c = text.charAt(at);
            if (c == '"') {
                at++;
                return out.toString();
            }
            if (c < ' ') throw wrong("no control character");
            if (c != '\\') {
                out.append(c);
                continue;
            }
            if (++at == text.length()) break;
            char kind = text.charAt(at);
            int plain = "\"\\/nrtbf".indexOf(kind);
            if (plain >= 0) {
                out.append("\"\\/\n\r\t\b\f".charAt(plain));
            } else if (kind == 'u' && at + 4 < text.length()) {
                out.append((char) hex(text.substring(at + 1, at + 5)));
                at += 4;
            } else {
                throw wrong("an escape");
            }
        }
        throw wrong("a closing quote");
    }

    private int hex(String digits) {
        int value = 0;
        for (int i = 0; i < digits.length(); i++) {
            int digit = Character.digit(digits.charAt(i), 16);
            if (digit < 0) throw wrong("four hexadecimal digits");
            value = 16 * value + digit;
        }
        return value;
    }

    private Object readNumber() {
        int begin = at;
        while (at < text.length() && "+-.0123456789eE".indexOf(text.charAt(at)) >= 0) at++;
        String number = text.substring(begin, at);
        try {
            if (number.matches("-?(0|[1-9][0-9]{0,17})")) return Long.valueOf(number);
            if (number.matches("-?(0|[1-9][0-9]*)([.][0-9]+)?([eE][+-]?[0-9]+)?")) return finite(number);
            throw new NumberFormatException(number);
        } catch (NumberFormatException error) {
            at = begin;
            throw wrong("a value");
        }
    }

    private static Double finite(String number) {
        Double value = Double.valueOf(number);
        if (value.isInfinite()) throw new NumberFormatException(number);
        return value;
    }

    private boolean take(String word) {
        if (!text.startsWith(word, at)) return false;
        at += word.length();
        return true;
    }

    private void space() {
        while (at < text.length() && " \t\r\n".indexOf(text.charAt(at)) >= 0) at++;
    }

    private IllegalArgumentException wrong(String expected) {
        return new IllegalArgumentException("not JSON: expected " + expected + " at character " + at);
    }
}
