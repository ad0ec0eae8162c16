package dev.gemmaedge.app;

import android.app.Activity;
import android.content.ActivityNotFoundException;
import android.content.ClipData;
import android.content.ClipboardManager;
import android.content.Intent;
import android.os.Build;
import android.os.Bundle;
import android.view.View;
import android.widget.Button;
import android.widget.ProgressBar;
import android.widget.TextView;
import android.widget.Toast;

import dev.gemmaedge.engine.ChatSession;
import dev.gemmaedge.plain.ChatState;

/** A screen that shows the session: its header, and the banner with what goes on or went wrong. */
abstract class Page extends Activity implements ChatSession.Screen {
    private static final int LIGHT_NAVIGATION_BAR = 0x10; // View.SYSTEM_UI_FLAG_LIGHT_NAVIGATION_BAR, of API 26
    protected App app;
    protected ChatSession session;

    protected abstract int layout();

    @Override
    protected void onCreate(Bundle state) {
        super.onCreate(state);
        app = App.of(this);
        session = app.session();
        setContentView(layout());
        if (Build.VERSION.SDK_INT >= 26 && getResources().getBoolean(R.bool.light)) {
            View top = getWindow().getDecorView();
            top.setSystemUiVisibility(top.getSystemUiVisibility() | LIGHT_NAVIGATION_BAR);
        }
        View back = findViewById(R.id.back);
        if (back != null) {
            ((TextView) findViewById(R.id.title)).setText(getTitle());
            back.setOnClickListener(new View.OnClickListener() {
                @Override
                public void onClick(View view) {
                    finish();
                }
            });
        }
    }

    @Override
    protected void onStart() {
        super.onStart();
        session.show(this);
    }

    @Override
    protected void onStop() {
        session.hide(this);
        app.save();
        super.onStop();
    }

    @Override
    public void changed() {
        View banner = findViewById(R.id.banner);
        if (banner == null) return;
        ChatState state = session.state();
        boolean told = session.problem() != null;
        String words = told ? session.problem().getMessage() : session.words();
        boolean visible = !words.isEmpty() && state != ChatState.ANSWERING;
        banner.setVisibility(visible ? View.VISIBLE : View.GONE);
        if (!visible) return;
        TextView text = (TextView) findViewById(R.id.banner_text);
        // TalkBack reads each change: not every percent of a progress.
        text.setAccessibilityLiveRegion(state.busy() ? View.ACCESSIBILITY_LIVE_REGION_NONE : View.ACCESSIBILITY_LIVE_REGION_POLITE);
        if (!words.contentEquals(text.getText())) text.setText(words);
        ProgressBar bar = (ProgressBar) findViewById(R.id.banner_bar);
        bar.setVisibility(state.busy() || state == ChatState.STOPPING ? View.VISIBLE : View.GONE);
        bar.setIndeterminate(session.share() < 0);
        if (session.share() >= 0) bar.setProgress((int) (1000 * session.share()));
        Button button = (Button) findViewById(R.id.banner_button);
        boolean again = state.idle() && state != ChatState.READY && !session.where().isEmpty();
        button.setVisibility(state.busy() || again ? View.VISIBLE : View.GONE);
        button.setText(state.busy() ? R.string.stop : R.string.load_model);
        button.setOnClickListener(new View.OnClickListener() {
            @Override
            public void onClick(View view) {
                if (session.state().busy()) session.stop();
                else session.loadAgain();
            }
        });
    }

    protected void copy(String text) {
        ClipboardManager board = (ClipboardManager) getSystemService(CLIPBOARD_SERVICE);
        board.setPrimaryClip(ClipData.newPlainText(getString(R.string.app_name), text));
        tell(getString(R.string.copied));
    }

    protected void share(String text) {
        Intent send = new Intent(Intent.ACTION_SEND).setType("text/plain").putExtra(Intent.EXTRA_TEXT, text);
        startActivity(Intent.createChooser(send, getString(R.string.share)));
    }

    /** Starts another app for a result; says so where there is none. */
    protected void ask(Intent intent, int request, int otherwise) {
        try {
            startActivityForResult(intent, request);
        } catch (ActivityNotFoundException none) {
            tell(getString(otherwise));
        }
    }

    protected void tell(String text) {
        Toast.makeText(this, text, Toast.LENGTH_LONG).show();
    }

    protected int pixels(int dp) {
        return Math.round(dp * getResources().getDisplayMetrics().density);
    }
}
