package dev.gemmaedge.app;

import android.content.ContentProvider;
import android.content.ContentValues;
import android.database.Cursor;
import android.database.MatrixCursor;
import android.net.Uri;
import android.os.ParcelFileDescriptor;
import android.provider.OpenableColumns;

import java.io.File;
import java.io.FileNotFoundException;

/** Lends single files to apps that the person chose: the camera writes one, a share target reads one. */
public final class SharedFiles extends ContentProvider {
    static final String AUTHORITY = "dev.gemmaedge.files";

    static Uri uri(String name) {
        return new Uri.Builder().scheme("content").authority(AUTHORITY).appendPath(name).build();
    }

    /** Only names, no paths: nothing outside the folder can be meant. */
    static File file(File folder, Uri uri) throws FileNotFoundException {
        String name = uri.getLastPathSegment();
        if (uri.getPathSegments().size() != 1 || name == null || !name.matches("[A-Za-z0-9._-]{1,80}") || name.startsWith("."))
            throw new FileNotFoundException(uri.toString());
        return new File(folder, name);
    }

    static File folder(android.content.Context context) {
        File folder = new File(context.getCacheDir(), "shared");
        folder.mkdirs();
        return folder;
    }

    @Override
    public ParcelFileDescriptor openFile(Uri uri, String mode) throws FileNotFoundException {
        return ParcelFileDescriptor.open(file(folder(getContext()), uri), ParcelFileDescriptor.parseMode(mode));
    }

    @Override
    public Cursor query(Uri uri, String[] columns, String where, String[] values, String order) {
        MatrixCursor cursor = new MatrixCursor(new String[] {OpenableColumns.DISPLAY_NAME, OpenableColumns.SIZE});
        try {
            File file = file(folder(getContext()), uri);
            cursor.addRow(new Object[] {file.getName(), file.length()});
        } catch (FileNotFoundException none) {
            // No row: there is no such file.
        }
        return cursor;
    }

    @Override
    public boolean onCreate() {
        return true;
    }

    @Override
    public String getType(Uri uri) {
        return uri.getPath().endsWith(".jpg") ? "image/jpeg" : "application/jsonl";
    }

    @Override
    public Uri insert(Uri uri, ContentValues values) {
        throw new UnsupportedOperationException();
    }

    @Override
    public int delete(Uri uri, String where, String[] values) {
        throw new UnsupportedOperationException();
    }

    @Override
    public int update(Uri uri, ContentValues values, String where, String[] arguments) {
        throw new UnsupportedOperationException();
    }
}
