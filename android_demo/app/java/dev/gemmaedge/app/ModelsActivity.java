package dev.gemmaedge.app;

import android.app.AlertDialog;
import android.content.DialogInterface;
import android.content.Intent;
import android.database.Cursor;
import android.net.Uri;
import android.os.Bundle;
import android.provider.OpenableColumns;
import android.view.View;
import android.view.ViewGroup;
import android.widget.BaseAdapter;
import android.widget.ListView;
import android.widget.TextView;

import java.io.File;
import java.io.IOException;
import java.io.InputStream;
import java.util.ArrayList;
import java.util.List;

import dev.gemmaedge.engine.ChatSession;
import dev.gemmaedge.engine.Host;
import dev.gemmaedge.plain.ChatState;
import dev.gemmaedge.plain.MemoryVerdict;
import dev.gemmaedge.plain.ModelCard;
import dev.gemmaedge.plain.ModelCopy;
import dev.gemmaedge.plain.ModelFile;
import dev.gemmaedge.plain.Problem;
import dev.gemmaedge.plain.Words;

/** The models on this phone, each compared with its memory before anything is loaded. */
public final class ModelsActivity extends Page {
    private static final int FILE = 1;

    /** A model, or why it is none. */
    private static final class Found {
        String where = "";
        ModelCard card;
        MemoryVerdict verdict;
        String hash = "";
        Problem problem;
    }

    private List<Found> models = new ArrayList<Found>();
    private ChatState shown;

    private final BaseAdapter rows = new BaseAdapter() {
        @Override
        public int getCount() {
            return models.size();
        }

        @Override
        public Found getItem(int position) {
            return models.get(position);
        }

        @Override
        public long getItemId(int position) {
            return position;
        }

        @Override
        public View getView(int position, View old, ViewGroup parent) {
            View row = old == null ? getLayoutInflater().inflate(R.layout.model_card, parent, false) : old;
            fill(row, models.get(position));
            return row;
        }
    };

    @Override
    protected int layout() {
        return R.layout.models;
    }

    @Override
    protected void onCreate(Bundle state) {
        super.onCreate(state);
        ListView list = (ListView) findViewById(R.id.list);
        list.setAdapter(rows);
        list.setEmptyView(findViewById(R.id.none));
        findViewById(R.id.choose).setOnClickListener(new View.OnClickListener() {
            @Override
            public void onClick(View view) {
                Intent pick = new Intent(Intent.ACTION_OPEN_DOCUMENT).addCategory(Intent.CATEGORY_OPENABLE).setType("*/*");
                ask(pick, FILE, R.string.no_picker);
            }
        });
    }

    @Override
    public void changed() {
        super.changed();
        // Something has ended: there may be one model more, or its hash is known now.
        if (shown != session.state()) look();
        if (shown == ChatState.LOADING && session.state() == ChatState.READY) finish();
        shown = session.state();
    }

    private void look() {
        app.inBackground(new Runnable() {
            @Override
            public void run() {
                final List<Found> found = new ArrayList<Found>();
                for (String where : app.models()) found.add(read(where));
                app.post(new Runnable() {
                    @Override
                    public void run() {
                        models = found;
                        rows.notifyDataSetChanged();
                    }
                });
            }
        });
    }

    private Found read(String where) {
        Found found = new Found();
        found.where = where;
        try {
            Host.Access access = app.open(where);
            try {
                ModelFile file = ModelFile.open(access.channel());
                found.card = file.card;
                found.verdict = session.compare(file.card, access.path().isEmpty());
                String known = app.verified(where, access.fingerprint());
                found.hash = known == null ? "" : known;
            } finally {
                access.close();
            }
        } catch (Problem problem) {
            found.problem = problem;
        } catch (IOException error) {
            found.problem = new Problem(Problem.Kind.UNREADABLE, String.valueOf(error.getMessage()));
        }
        return found;
    }

    private void fill(View row, final Found found) {
        boolean document = found.where.startsWith("content:");
        String file = document ? documentName(Uri.parse(found.where)) : new File(found.where).getName();
        text(row, R.id.name, file, R.color.text);
        if (found.problem == null) {
            text(row, R.id.line, found.card.name + " · " + found.card.line() + " · " + Words.size(found.card.fileBytes), R.color.muted);
            boolean fits = found.verdict.level == MemoryVerdict.Level.FITS;
            text(row, R.id.fit, found.verdict.words, fits ? R.color.accent
                : found.verdict.level == MemoryVerdict.Level.TIGHT ? R.color.warn_text : R.color.bad_text);
        } else {
            text(row, R.id.line, found.problem.getMessage(), R.color.bad_text);
            text(row, R.id.fit, "", R.color.muted);
        }
        text(row, R.id.hash, found.hash.isEmpty() ? "" : getString(R.string.hash_line, Words.shortHash(found.hash)), R.color.muted);
        View body = row.findViewById(R.id.body);
        body.setContentDescription(file);
        body.setOnClickListener(new View.OnClickListener() {
            @Override
            public void onClick(View view) {
                if (found.problem == null) load(found.where);
            }
        });
        body.setOnLongClickListener(new View.OnLongClickListener() {
            @Override
            public boolean onLongClick(View view) {
                if (!found.hash.isEmpty()) copy(found.hash);
                return !found.hash.isEmpty();
            }
        });
        View delete = row.findViewById(R.id.delete);
        delete.setVisibility(found.where.startsWith(app.copies().getPath()) ? View.VISIBLE : View.GONE);
        delete.setContentDescription(getString(R.string.delete_copy, file));
        delete.setOnClickListener(new View.OnClickListener() {
            @Override
            public void onClick(View view) {
                askToDelete(new File(found.where));
            }
        });
    }

    private void text(View row, int id, String text, int color) {
        TextView view = (TextView) row.findViewById(id);
        view.setText(text);
        view.setTextColor(getColor(color));
        view.setVisibility(text.isEmpty() ? View.GONE : View.VISIBLE);
    }

    private void load(String where) {
        app.rememberModel(where);
        session.choose(where);
    }

    private void askToDelete(final File file) {
        new AlertDialog.Builder(this).setMessage(getString(R.string.delete_question, file.getName()))
            .setNegativeButton(R.string.cancel, null)
            .setPositiveButton(R.string.delete, new DialogInterface.OnClickListener() {
                @Override
                public void onClick(DialogInterface dialog, int which) {
                    file.delete();
                    look();
                }
            }).show();
    }

    @Override
    protected void onActivityResult(int request, int result, Intent data) {
        if (request != FILE || result != RESULT_OK || data == null || data.getData() == null) return;
        final Uri uri = data.getData();
        new AlertDialog.Builder(this).setTitle(documentName(uri)).setMessage(R.string.copy_or_open)
            .setNeutralButton(R.string.cancel, null)
            .setNegativeButton(R.string.open_in_place, new DialogInterface.OnClickListener() {
                @Override
                public void onClick(DialogInterface dialog, int which) {
                    try {
                        getContentResolver().takePersistableUriPermission(uri, Intent.FLAG_GRANT_READ_URI_PERMISSION);
                    } catch (SecurityException once) {
                        tell(getString(R.string.open_in_place)); // this provider lends it for this time only
                    }
                    load(uri.toString());
                }
            })
            .setPositiveButton(R.string.copy_into_app, new DialogInterface.OnClickListener() {
                @Override
                public void onClick(DialogInterface dialog, int which) {
                    copyIn(uri);
                }
            }).show();
    }

    private void copyIn(final Uri uri) {
        String name = documentName(uri).replaceAll("[^A-Za-z0-9._-]", "_");
        final File target = new File(app.copies(), name.endsWith(".litertlm") ? name : name + ".litertlm");
        app.rememberModel(target.getPath());
        session.importModel(new ChatSession.Import() {
            @Override
            public String run(ModelFile.Progress progress) throws Problem {
                Host.Access access = app.open(uri.toString());
                try {
                    ModelFile.open(access.channel()); // what is no model is not copied
                    InputStream in = app.getContentResolver().openInputStream(uri);
                    if (in == null) throw new Problem(Problem.Kind.MISSING, "");
                    try {
                        ModelCopy.copy(in, access.channel().size(), target, target.getParentFile().getUsableSpace(), progress);
                    } finally {
                        in.close();
                    }
                } catch (IOException error) {
                    throw new Problem(Problem.Kind.UNREADABLE, String.valueOf(error.getMessage()));
                } finally {
                    close(access);
                }
                return target.getPath();
            }
        });
    }

    private static void close(Host.Access access) {
        try {
            access.close();
        } catch (IOException ignored) {
            // It was only read.
        }
    }

    private String documentName(Uri uri) {
        try {
            Cursor cursor = getContentResolver().query(uri, null, null, null, null);
            if (cursor != null) {
                try {
                    int column = cursor.getColumnIndex(OpenableColumns.DISPLAY_NAME);
                    if (column >= 0 && cursor.moveToFirst() && cursor.getString(column) != null) return cursor.getString(column);
                } finally {
                    cursor.close();
                }
            }
        } catch (RuntimeException gone) { // the provider was removed, or takes the permission back
            return uri.getLastPathSegment();
        }
        return uri.getLastPathSegment();
    }
}
