package dev.gemmaedge.app;

import android.os.Bundle;
import android.view.View;
import android.widget.EditText;

import dev.gemmaedge.plain.Sampling;

/** The system prompt and how tokens are chosen; stored when the screen is left. */
public final class SettingsActivity extends Page {
    @Override
    protected int layout() {
        return R.layout.settings;
    }

    @Override
    protected void onCreate(Bundle state) {
        super.onCreate(state);
        if (state == null) show(session.sampling());
        findViewById(R.id.reset).setOnClickListener(new View.OnClickListener() {
            @Override
            public void onClick(View view) {
                show(Sampling.standard());
            }
        });
    }

    private void show(Sampling sampling) {
        field(R.id.system_prompt).setText(sampling.system);
        field(R.id.temperature).setText(String.valueOf(sampling.temperature));
        field(R.id.top_k).setText(String.valueOf(sampling.topK));
        field(R.id.top_p).setText(String.valueOf(sampling.topP));
        field(R.id.seed).setText(String.valueOf(sampling.seed));
        field(R.id.max_tokens).setText(String.valueOf(sampling.maxTokens));
    }

    private EditText field(int id) {
        return (EditText) findViewById(id);
    }

    @Override
    protected void onPause() {
        Sampling before = session.sampling();
        Sampling now = new Sampling(field(R.id.system_prompt).getText().toString(), number(R.id.temperature, before.temperature),
            (int) number(R.id.top_k, before.topK), number(R.id.top_p, before.topP), (int) number(R.id.seed, before.seed),
            (int) number(R.id.max_tokens, before.maxTokens));
        if (!now.toJson().equals(before.toJson())) app.setSampling(now);
        super.onPause();
    }

    /** The number in a field, or the one before where it holds none. */
    private double number(int id, double before) {
        try {
            return Double.parseDouble(field(id).getText().toString().trim());
        } catch (NumberFormatException none) {
            return before;
        }
    }
}
