package dev.gemmaedge.plain;

import java.io.IOException;
import java.io.RandomAccessFile;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;

/** A WAV file of 16 kHz, mono, 16 bits: what the audio encoder takes. */
public final class Wav {
    public static final int RATE = 16_000;
    public static final int HEADER = 44;
    public static final int MOST_SECONDS = 30; // of one clip

    private Wav() {}

    /** The header of a file with so many bytes of samples. */
    public static byte[] header(int bytes) {
        ByteBuffer out = ByteBuffer.allocate(HEADER).order(ByteOrder.LITTLE_ENDIAN);
        out.put(new byte[] {'R', 'I', 'F', 'F'}).putInt(36 + bytes).put(new byte[] {'W', 'A', 'V', 'E'});
        out.put(new byte[] {'f', 'm', 't', ' '}).putInt(16).putShort((short) 1).putShort((short) 1);
        out.putInt(RATE).putInt(2 * RATE).putShort((short) 2).putShort((short) 16);
        out.put(new byte[] {'d', 'a', 't', 'a'}).putInt(bytes);
        return out.array();
    }

    /** Writes the header of a file whose samples were appended behind room for it. */
    public static void finish(RandomAccessFile file) throws IOException {
        long bytes = Math.max(0, file.length() - HEADER) / 2 * 2;
        file.setLength(HEADER + bytes);
        file.seek(0);
        file.write(header((int) bytes));
    }
}
