package dev.gemmaedge.app;

import android.Manifest;
import android.content.Intent;
import android.content.pm.ActivityInfo;
import android.content.pm.PackageManager;
import android.net.Uri;
import android.os.Bundle;
import android.provider.MediaStore;
import android.text.Editable;
import android.text.TextWatcher;
import android.view.View;
import android.view.ViewGroup;
import android.widget.Button;
import android.widget.EditText;
import android.widget.ImageButton;
import android.widget.LinearLayout;
import android.widget.ListView;
import android.widget.ProgressBar;
import android.widget.TextView;

import java.io.File;
import java.io.IOException;
import java.util.ArrayList;
import java.util.UUID;

import dev.gemmaedge.plain.ChatState;
import dev.gemmaedge.plain.ModelCard;
import dev.gemmaedge.plain.Problem;
import dev.gemmaedge.plain.Sampling;
import dev.gemmaedge.plain.Turn;

/** The conversation. */
public final class ChatActivity extends Page {
    private static final int FROM_GALLERY = 1;
    private static final int FROM_CAMERA = 2;
    private static final int MICROPHONE = 3;
    private static final long MEMORY_PERIOD_MS = 2000;

    private String shownAttachments = "";
    private String photo = ""; // that the camera is writing
    private TurnList turns;
    private EditText message;
    private Recorder recorder;
    private ChatState shown;

    private final Runnable watchMemory = new Runnable() {
        @Override
        public void run() {
            app.inBackground(new Runnable() {
                @Override
                public void run() {
                    session.sampleMemory();
                }
            });
            app.postLater(this, MEMORY_PERIOD_MS);
        }
    };

    @Override
    protected int layout() {
        return R.layout.chat;
    }

    @Override
    protected void onCreate(Bundle state) {
        super.onCreate(state);
        if (state != null) {
            if (app.images.isEmpty()) app.images.addAll(state.getStringArrayList("images"));
            if (app.sounds.isEmpty()) app.sounds.addAll(state.getStringArrayList("sounds"));
            photo = state.getString("photo", "");
        }
        turns = new TurnList(this);
        ListView list = (ListView) findViewById(R.id.turns);
        list.setAdapter(turns);
        list.setEmptyView(findViewById(R.id.empty));
        message = (EditText) findViewById(R.id.message);
        message.setText(session.conversation().draft);
        message.addTextChangedListener(new TextWatcher() {
            @Override
            public void beforeTextChanged(CharSequence text, int start, int count, int after) {}

            @Override
            public void onTextChanged(CharSequence text, int start, int before, int count) {}

            @Override
            public void afterTextChanged(Editable text) {
                session.conversation().draft = text.toString();
                showSend();
            }
        });
        onClick(R.id.send, new Runnable() {
            @Override
            public void run() {
                sendOrStop();
            }
        });
        onClick(R.id.attach, new Runnable() {
            @Override
            public void run() {
                if (recorder == null) showAttachMenu();
                else recorder.end();
            }
        });
        onClick(R.id.fresh, new Runnable() {
            @Override
            public void run() {
                app.putAway();
                message.setText(session.conversation().draft);
            }
        });
        onClick(R.id.more, new Runnable() {
            @Override
            public void run() {
                showMenu();
            }
        });
        Runnable models = new Runnable() {
            @Override
            public void run() {
                open(ModelsActivity.class);
            }
        };
        onClick(R.id.model, models);
        onClick(R.id.choose, new Runnable() {
            @Override
            public void run() {
                if (session.state() == ChatState.READY) message.setText(session.card().example);
                else open(ModelsActivity.class);
            }
        });
        showAttachments();
        if (state == null) {
            app.sweep();
            handle(getIntent());
        }
        // After the process was ended: the conversation is back, and so is the model, once.
        if (session.state() == ChatState.EMPTY && !app.lastModel().isEmpty()) session.choose(app.lastModel());
    }

    private void onClick(int id, final Runnable task) {
        findViewById(id).setOnClickListener(new View.OnClickListener() {
            @Override
            public void onClick(View view) {
                task.run();
            }
        });
    }

    private void open(Class<?> page) {
        startActivity(new Intent(this, page));
    }

    @Override
    protected void onNewIntent(Intent intent) {
        super.onNewIntent(intent);
        handle(intent);
    }

    /** What `gemma-edge android run` and `bench` ask for; other starts ask for nothing, whatever they carry. */
    private void handle(final Intent intent) {
        if (intent.getComponent() == null || !intent.getComponent().getClassName().endsWith(".FromComputer")) return;
        if (intent.getBooleanExtra("stop", false)) {
            session.stop();
            return;
        }
        final String run = text(intent, "run");
        String named = text(intent, "model");
        final String model = named.isEmpty() && session.where().isEmpty() ? app.likelyModel() : named;
        session.remote(run, model, new Runnable() {
            @Override
            public void run() {
                app.rememberModel(session.where());
                if (intent.getBooleanExtra("bench", false)) {
                    session.bench(app.phone(), run, app.version(), intent.getIntExtra("n_prompt", BenchActivity.PROMPT),
                        intent.getIntExtra("n_gen", BenchActivity.DECODE), intent.getIntExtra("reps", BenchActivity.REPETITIONS));
                    return;
                }
                Sampling before = session.sampling();
                int most = intent.getIntExtra("max_tokens", before.maxTokens);
                session.setSampling(new Sampling(before.system, intent.getBooleanExtra("greedy", false) ? 0 : before.temperature,
                    before.topK, before.topP, intent.getIntExtra("seed", before.seed), most));
                if (!intent.getBooleanExtra("continue", false)) app.putAway();
                session.send(text(intent, "prompt"), new ArrayList<String>(), new ArrayList<String>());
            }
        });
    }

    private static String text(Intent intent, String name) {
        String value = intent.getStringExtra(name);
        return value == null ? "" : value;
    }

    @Override
    protected void onStart() {
        super.onStart();
        watchMemory.run();
    }

    @Override
    protected void onStop() {
        app.cancel(watchMemory);
        if (recorder != null) recorder.end();
        super.onStop();
    }

    @Override
    protected void onSaveInstanceState(Bundle state) {
        super.onSaveInstanceState(state);
        state.putStringArrayList("images", app.images);
        state.putStringArrayList("sounds", app.sounds);
        state.putString("photo", photo);
    }

    @Override
    public void changed() {
        super.changed();
        if (turns == null) return;
        ModelCard card = session.card();
        ((TextView) findViewById(R.id.model_name)).setText(card == null ? getString(R.string.app_name) : card.name);
        ((TextView) findViewById(R.id.model_line)).setText(card == null ? getString(R.string.choose_model) : card.line());
        boolean meter = session.state().loaded();
        findViewById(R.id.meter).setVisibility(meter ? View.VISIBLE : View.GONE);
        if (meter) {
            ((TextView) findViewById(R.id.memory)).setText(session.memoryLine());
            ((ProgressBar) findViewById(R.id.memory_bar)).setProgress((int) (1000 * session.memoryShare()));
        }
        Button choose = (Button) findViewById(R.id.choose);
        boolean example = session.state() == ChatState.READY && card != null && !card.example.isEmpty();
        choose.setText(example ? getString(R.string.try_this, card.example) : getString(R.string.choose_model));
        choose.setVisibility(session.state().idle() ? View.VISIBLE : View.GONE);
        findViewById(R.id.attach).setVisibility(
            recorder != null || session.state().loaded() && card != null && (card.sees || card.hears) ? View.VISIBLE : View.GONE);
        if (!shownAttachments.equals(app.images + "" + app.sounds)) showAttachments();
        turns.show(session.conversation().turns, session.state() == ChatState.ANSWERING ? session.words() : "");
        showSend();
        if (shown == ChatState.ANSWERING && session.state() != ChatState.ANSWERING) app.save();
        shown = session.state();
    }

    private void showSend() {
        boolean answering = session.state() == ChatState.ANSWERING;
        boolean something = message.getText().toString().trim().length() > 0 || !app.images.isEmpty() || !app.sounds.isEmpty();
        ImageButton send = (ImageButton) findViewById(R.id.send);
        send.setImageResource(answering ? R.drawable.ic_stop : R.drawable.ic_send);
        send.setContentDescription(getString(answering ? R.string.stop : R.string.send));
        send.setEnabled(answering || something && session.state() == ChatState.READY);
        send.setAlpha(send.isEnabled() ? 1f : 0.4f);
    }

    private void sendOrStop() {
        if (session.state() == ChatState.ANSWERING) {
            session.stop();
            return;
        }
        if (!session.send(message.getText().toString(), new ArrayList<String>(app.images), new ArrayList<String>(app.sounds))) return;
        app.images.clear();
        app.sounds.clear();
        showAttachments();
        message.setText("");
        app.save();
    }

    private void showMenu() {
        Choices choices = new Choices(this);
        choices.add(R.string.models, new Runnable() {
            @Override
            public void run() {
                open(ModelsActivity.class);
            }
        });
        choices.add(R.string.settings, new Runnable() {
            @Override
            public void run() {
                open(SettingsActivity.class);
            }
        });
        choices.add(R.string.benchmark, new Runnable() {
            @Override
            public void run() {
                open(BenchActivity.class);
            }
        });
        if (!app.earlier().isEmpty())
            choices.add(R.string.earlier, new Runnable() {
                @Override
                public void run() {
                    showEarlier();
                }
            });
        addCopyAndShare(choices, R.string.copy_all, R.string.share_all, session.conversation().asText());
        if (session.state() == ChatState.READY)
            choices.add(R.string.unload, new Runnable() {
                @Override
                public void run() {
                    session.unload(getString(R.string.unloaded_by_you));
                }
            });
        choices.show();
    }

    private void showEarlier() {
        Choices choices = new Choices(this);
        for (final File file : app.earlier())
            choices.add(app.title(file), new Runnable() {
                @Override
                public void run() {
                    app.goOn(file);
                    message.setText(session.conversation().draft);
                }
            });
        choices.show();
    }

    private void addCopyAndShare(Choices choices, int copy, int share, final String text) {
        choices.add(copy, new Runnable() {
            @Override
            public void run() {
                copy(text);
            }
        });
        choices.add(share, new Runnable() {
            @Override
            public void run() {
                share(text);
            }
        });
    }

    /** Copy or share one turn. */
    void showTurnMenu(Turn turn) {
        Choices choices = new Choices(this);
        addCopyAndShare(choices, R.string.copy, R.string.share, turn.text);
        choices.show();
    }

    private void showAttachMenu() {
        Choices choices = new Choices(this);
        ModelCard card = session.card();
        if (card != null && card.sees) {
            choices.add(R.string.gallery, new Runnable() {
                @Override
                public void run() {
                    pickPhoto();
                }
            });
            choices.add(R.string.camera, new Runnable() {
                @Override
                public void run() {
                    takePhoto();
                }
            });
        }
        if (card != null && card.hears)
            choices.add(R.string.microphone, new Runnable() {
                @Override
                public void run() {
                    record();
                }
            });
        choices.show();
    }

    private void pickPhoto() {
        Intent pick = new Intent(Intent.ACTION_OPEN_DOCUMENT).addCategory(Intent.CATEGORY_OPENABLE).setType("image/*");
        ask(pick, FROM_GALLERY, R.string.no_picker);
    }

    private void takePhoto() {
        photo = UUID.randomUUID() + ".jpg";
        Uri uri = SharedFiles.uri(photo);
        Intent take = new Intent(MediaStore.ACTION_IMAGE_CAPTURE).putExtra(MediaStore.EXTRA_OUTPUT, uri);
        take.setClipData(android.content.ClipData.newRawUri("", uri));
        take.addFlags(Intent.FLAG_GRANT_WRITE_URI_PERMISSION | Intent.FLAG_GRANT_READ_URI_PERMISSION);
        ask(take, FROM_CAMERA, R.string.no_camera);
    }

    @Override
    protected void onActivityResult(int request, int result, Intent data) {
        if (result != RESULT_OK) return;
        if (request == FROM_GALLERY && data != null && data.getData() != null) addPhoto(data.getData());
        if (request == FROM_CAMERA && !photo.isEmpty()) addPhoto(SharedFiles.uri(photo));
    }

    private void addPhoto(final Uri uri) {
        final File target = new File(app.attachments(), UUID.randomUUID() + ".jpg");
        app.inBackground(new Runnable() {
            @Override
            public void run() {
                Problem found = null;
                try {
                    Photo.store(app, uri, target);
                } catch (IOException error) {
                    found = new Problem(Problem.Kind.MEDIA, String.valueOf(error.getMessage()));
                } catch (SecurityException error) {
                    found = new Problem(Problem.Kind.MEDIA, String.valueOf(error.getMessage()));
                }
                final Problem problem = found;
                app.post(new Runnable() {
                    @Override
                    public void run() {
                        if (problem == null) app.images.add(target.getPath());
                        else session.complain(problem);
                        session.touch(); // this screen may be gone, and another one there
                    }
                });
            }
        });
    }

    private void record() {
        if (checkSelfPermission(Manifest.permission.RECORD_AUDIO) != PackageManager.PERMISSION_GRANTED) {
            requestPermissions(new String[] {Manifest.permission.RECORD_AUDIO}, MICROPHONE);
            return;
        }
        final File target = new File(app.attachments(), UUID.randomUUID() + ".wav");
        recorder = new Recorder(target, new Recorder.Listener() {
            @Override
            public void second(int seconds) {
                message.setHint(getString(R.string.recording, seconds));
            }

            @Override
            public void ended(Problem problem) {
                recorder = null;
                message.setHint(R.string.message);
                ((ImageButton) findViewById(R.id.attach)).setImageResource(R.drawable.ic_attach);
                findViewById(R.id.attach).setContentDescription(getString(R.string.attach));
                if (problem == null) app.sounds.add(target.getPath());
                else session.complain(problem);
                session.touch();
                setRequestedOrientation(ActivityInfo.SCREEN_ORIENTATION_UNSPECIFIED);
            }
        }, app);
        ((ImageButton) findViewById(R.id.attach)).setImageResource(R.drawable.ic_stop);
        findViewById(R.id.attach).setContentDescription(getString(R.string.stop));
        setRequestedOrientation(ActivityInfo.SCREEN_ORIENTATION_LOCKED); // a screen made anew would not know of it
        recorder.start();
    }

    @Override
    public void onRequestPermissionsResult(int request, String[] permissions, int[] results) {
        if (request != MICROPHONE) return;
        if (results.length > 0 && results[0] == PackageManager.PERMISSION_GRANTED) record();
        else tell(getString(R.string.no_microphone));
    }

    private void showAttachments() {
        LinearLayout strip = (LinearLayout) findViewById(R.id.attachments);
        shownAttachments = app.images + "" + app.sounds;
        strip.removeAllViews();
        for (String path : app.images) strip.addView(chip(getString(R.string.photo), path, app.images));
        for (String path : app.sounds) strip.addView(chip(getString(R.string.sound), path, app.sounds));
        if (message != null) showSend();
    }

    private View chip(String name, final String path, final ArrayList<String> list) {
        Button chip = new Button(this, null, 0, R.style.Quiet);
        chip.setText(name);
        chip.setCompoundDrawablePadding(pixels(8));
        chip.setCompoundDrawablesRelativeWithIntrinsicBounds(0, 0, R.drawable.ic_close, 0);
        chip.setBackgroundResource(R.drawable.card);
        chip.setContentDescription(getString(R.string.remove_attachment, name));
        LinearLayout.LayoutParams place = new LinearLayout.LayoutParams(ViewGroup.LayoutParams.WRAP_CONTENT, pixels(48));
        place.setMarginEnd(pixels(8));
        chip.setLayoutParams(place);
        chip.setOnClickListener(new View.OnClickListener() {
            @Override
            public void onClick(View view) {
                list.remove(path);
                new File(path).delete();
                showAttachments();
            }
        });
        return chip;
    }
}
