package dev.gemmaedge.app;

import android.content.Intent;
import android.net.Uri;
import android.os.Bundle;
import android.view.View;
import android.view.WindowManager;
import android.widget.TextView;

import java.io.File;
import java.io.FileOutputStream;
import java.io.IOException;
import java.io.OutputStream;
import java.util.UUID;

import dev.gemmaedge.plain.ChatState;
import dev.gemmaedge.plain.Problem;

/** The standard benchmark, and its rows as `gemma-edge bench` writes them. */
public final class BenchActivity extends Page {
    private static final int SAVE = 1;
    static final int PROMPT = 512;
    static final int DECODE = 128;
    static final int REPETITIONS = 5;

    @Override
    protected int layout() {
        return R.layout.bench;
    }

    @Override
    protected void onCreate(Bundle state) {
        super.onCreate(state);
        getWindow().addFlags(WindowManager.LayoutParams.FLAG_KEEP_SCREEN_ON);
        findViewById(R.id.start).setOnClickListener(new View.OnClickListener() {
            @Override
            public void onClick(View view) {
                if (session.state() != ChatState.READY) tell(getString(R.string.bench_needs_model));
                else session.bench(app.phone(), UUID.randomUUID().toString(), app.version(), PROMPT, DECODE, REPETITIONS);
            }
        });
        findViewById(R.id.save).setOnClickListener(new View.OnClickListener() {
            @Override
            public void onClick(View view) {
                Intent create = new Intent(Intent.ACTION_CREATE_DOCUMENT).addCategory(Intent.CATEGORY_OPENABLE)
                    .setType("application/octet-stream").putExtra(Intent.EXTRA_TITLE, "gemma-edge-bench.jsonl");
                ask(create, SAVE, R.string.no_picker);
            }
        });
        findViewById(R.id.share).setOnClickListener(new View.OnClickListener() {
            @Override
            public void onClick(View view) {
                shareRows();
            }
        });
    }

    @Override
    public void changed() {
        super.changed();
        TextView figures = (TextView) findViewById(R.id.figures);
        figures.setText(session.benchText());
        figures.setVisibility(session.benchText().isEmpty() ? View.GONE : View.VISIBLE);
        ((TextView) findViewById(R.id.memory)).setText(session.benchText().isEmpty() ? "" : session.memoryLine());
        int kept = session.benchRows().isEmpty() ? View.GONE : View.VISIBLE;
        findViewById(R.id.save).setVisibility(kept);
        findViewById(R.id.share).setVisibility(kept);
        findViewById(R.id.start).setEnabled(session.state() == ChatState.READY);
    }

    private void shareRows() {
        String name = "gemma-edge-bench.jsonl";
        try {
            write(new FileOutputStream(new File(SharedFiles.folder(this), name)));
        } catch (IOException error) {
            session.complain(new Problem(Problem.Kind.NO_SPACE, String.valueOf(error.getMessage())));
            return;
        }
        Intent send = new Intent(Intent.ACTION_SEND).setType("application/jsonl").putExtra(Intent.EXTRA_STREAM, SharedFiles.uri(name));
        send.addFlags(Intent.FLAG_GRANT_READ_URI_PERMISSION);
        startActivity(Intent.createChooser(send, getString(R.string.share)));
    }

    private void write(OutputStream out) throws IOException {
        try {
            out.write(session.benchRows().getBytes("UTF-8"));
        } finally {
            out.close();
        }
    }

    @Override
    protected void onActivityResult(int request, int result, Intent data) {
        if (request != SAVE || result != RESULT_OK || data == null || data.getData() == null) return;
        Uri uri = data.getData();
        try {
            OutputStream out = getContentResolver().openOutputStream(uri);
            if (out == null) throw new IOException("no file");
            write(out);
            tell(getString(R.string.saved));
        } catch (IOException error) {
            session.complain(new Problem(Problem.Kind.NO_SPACE, String.valueOf(error.getMessage())));
        }
    }
}
