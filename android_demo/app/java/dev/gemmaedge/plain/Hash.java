package dev.gemmaedge.plain;

import java.nio.charset.Charset;
import java.security.MessageDigest;
import java.security.NoSuchAlgorithmException;

/** SHA-256. */
public final class Hash {
    private Hash() {}

    public static MessageDigest sha256() {
        try {
            return MessageDigest.getInstance("SHA-256");
        } catch (NoSuchAlgorithmException error) {
            throw new IllegalStateException(error); // every Java has it
        }
    }

    /** Of a text as UTF-8, in hexadecimal. */
    public static String of(String text) {
        MessageDigest digest = sha256();
        digest.update(text.getBytes(Charset.forName("UTF-8")));
        return hex(digest);
    }

    public static String hex(MessageDigest digest) {
        StringBuilder out = new StringBuilder();
        for (byte b : digest.digest()) out.append(String.format("%02x", b & 0xff));
        return out.toString();
    }
}
