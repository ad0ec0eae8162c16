package dev.gemmaedge.app;

import android.content.Context;
import android.graphics.Bitmap;
import android.graphics.BitmapFactory;
import android.graphics.Matrix;
import android.media.ExifInterface;
import android.net.Uri;

import java.io.File;
import java.io.FileOutputStream;
import java.io.IOException;
import java.io.InputStream;

/** A chosen photo, upright and no larger than encoders look at. */
final class Photo {
    private static final int MOST_PIXELS = 1536; // of the longer side
    private static final int QUALITY = 92;
    private static final long MOST_BYTES = 256L << 20;

    private Photo() {}

    static void store(Context context, Uri uri, File target) throws IOException {
        File raw = new File(target.getPath() + ".part");
        try {
            download(context, uri, raw);
            BitmapFactory.Options size = new BitmapFactory.Options();
            size.inJustDecodeBounds = true;
            BitmapFactory.decodeFile(raw.getPath(), size);
            if (size.outWidth < 1 || size.outHeight < 1) throw new IOException("no picture");
            BitmapFactory.Options smaller = new BitmapFactory.Options();
            smaller.inSampleSize = 1;
            while (Math.max(size.outWidth, size.outHeight) / (smaller.inSampleSize * 2) >= MOST_PIXELS) smaller.inSampleSize *= 2;
            Bitmap picture = BitmapFactory.decodeFile(raw.getPath(), smaller);
            if (picture == null) throw new IOException("no picture");
            write(upright(picture, raw), target);
        } finally {
            raw.delete();
        }
    }

    private static void download(Context context, Uri uri, File raw) throws IOException {
        InputStream in = context.getContentResolver().openInputStream(uri);
        if (in == null) throw new IOException("no file");
        try {
            FileOutputStream out = new FileOutputStream(raw);
            try {
                byte[] block = new byte[1 << 16];
                long size = 0;
                for (int got; (got = in.read(block)) >= 0; size += got) {
                    if (size > MOST_BYTES) throw new IOException("too large");
                    out.write(block, 0, got);
                }
            } finally {
                out.close();
            }
        } finally {
            in.close();
        }
    }

    private static Bitmap upright(Bitmap picture, File raw) throws IOException {
        int told = new ExifInterface(raw.getPath()).getAttributeInt(ExifInterface.TAG_ORIENTATION, 1);
        int degrees = told == ExifInterface.ORIENTATION_ROTATE_90 ? 90 : told == ExifInterface.ORIENTATION_ROTATE_180 ? 180
            : told == ExifInterface.ORIENTATION_ROTATE_270 ? 270 : 0;
        float scale = Math.min(1f, (float) MOST_PIXELS / Math.max(picture.getWidth(), picture.getHeight()));
        if (degrees == 0 && scale == 1f) return picture;
        Matrix turn = new Matrix();
        turn.postScale(scale, scale);
        turn.postRotate(degrees);
        return Bitmap.createBitmap(picture, 0, 0, picture.getWidth(), picture.getHeight(), turn, true);
    }

    private static void write(Bitmap picture, File target) throws IOException {
        FileOutputStream out = new FileOutputStream(target);
        try {
            if (!picture.compress(Bitmap.CompressFormat.JPEG, QUALITY, out)) throw new IOException("cannot be stored");
        } finally {
            out.close();
        }
    }
}
