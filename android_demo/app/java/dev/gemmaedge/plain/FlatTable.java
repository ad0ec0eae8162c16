package dev.gemmaedge.plain;

import java.nio.BufferUnderflowException;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.CharBuffer;
import java.nio.charset.CharacterCodingException;
import java.nio.charset.Charset;
import java.util.ArrayList;
import java.util.List;

/**
 * A table of a FlatBuffer. Every offset is checked: one that leads outside is an IndexOutOfBoundsException or an
 * IllegalArgumentException, never a read beyond the buffer. Fields are named by their slot.
 */
final class FlatTable {
    private static final int MOST = 10_000; // tables of one vector
    private final ByteBuffer data;
    private final int position;
    private final int vtable;

    private FlatTable(ByteBuffer data, int position) {
        this.data = data;
        this.position = position;
        this.vtable = position - data.getInt(position);
        if (length() < 4) throw new IllegalArgumentException("a table without fields");
    }

    static FlatTable root(byte[] bytes) {
        ByteBuffer data = ByteBuffer.wrap(bytes).order(ByteOrder.LITTLE_ENDIAN);
        return new FlatTable(data, data.getInt(0));
    }

    private int length() {
        return data.getShort(vtable) & 0xffff;
    }

    /** Where a field is, 0 if it is absent. */
    private int at(int slot) {
        int entry = 4 + 2 * slot;
        if (entry + 2 > length()) return 0;
        int offset = data.getShort(vtable + entry) & 0xffff;
        return offset == 0 ? 0 : position + offset;
    }

    int number8(int slot) {
        int at = at(slot);
        return at == 0 ? 0 : data.get(at) & 0xff;
    }

    long number64(int slot) {
        int at = at(slot);
        return at == 0 ? 0 : data.getLong(at);
    }

    /** A table, or null. */
    FlatTable table(int slot) {
        int at = at(slot);
        return at == 0 ? null : new FlatTable(data, at + data.getInt(at));
    }

    List<FlatTable> tables(int slot) {
        List<FlatTable> tables = new ArrayList<FlatTable>();
        int at = at(slot);
        if (at == 0) return tables;
        int vector = at + data.getInt(at);
        int count = data.getInt(vector);
        if (count < 0 || count > MOST) throw new IllegalArgumentException(count + " tables");
        for (int i = 0; i < count; i++) {
            int item = vector + 4 + 4 * i;
            tables.add(new FlatTable(data, item + data.getInt(item)));
        }
        return tables;
    }

    /** UTF-8 text, "" if it is absent. */
    String string(int slot) {
        int at = at(slot);
        if (at == 0) return "";
        int start = at + data.getInt(at);
        int count = data.getInt(start);
        if (count < 0 || start < 0 || count > data.limit() - start - 4) throw new BufferUnderflowException();
        ByteBuffer bytes = data.duplicate();
        bytes.position(start + 4);
        bytes.limit(start + 4 + count);
        try {
            CharBuffer text = Charset.forName("UTF-8").newDecoder().decode(bytes);
            return text.toString();
        } catch (CharacterCodingException error) {
            throw new IllegalArgumentException("text that is not UTF-8");
        }
    }
}
