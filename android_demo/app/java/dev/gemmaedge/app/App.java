package dev.gemmaedge.app;

import android.app.ActivityManager;
import android.app.Application;
import android.content.Context;
import android.content.SharedPreferences;
import android.content.pm.PackageManager;
import android.net.Uri;
import android.os.Build;
import android.os.Handler;
import android.os.Looper;
import android.os.ParcelFileDescriptor;
import android.util.Log;

import java.io.File;
import java.io.FileInputStream;
import java.io.FileNotFoundException;
import java.io.IOException;
import java.nio.channels.FileChannel;
import java.util.ArrayList;
import java.util.HashSet;
import java.util.List;
import java.util.Set;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;

import dev.gemmaedge.engine.ChatSession;
import dev.gemmaedge.engine.Host;
import dev.gemmaedge.plain.AnswerLog;
import dev.gemmaedge.plain.BenchRows;
import dev.gemmaedge.plain.Conversation;
import dev.gemmaedge.plain.ConversationShelf;
import dev.gemmaedge.plain.CpuCores;
import dev.gemmaedge.plain.Json;
import dev.gemmaedge.plain.KeptFile;
import dev.gemmaedge.plain.Problem;
import dev.gemmaedge.plain.ProcessMemory;
import dev.gemmaedge.plain.Sampling;

/** The process: its one session outlives every screen, and what must survive the process is stored here. */
public final class App extends Application implements Host {
    /** Where `gemma-edge android push` puts models; apps may read there. */
    static final File PUSHED = new File("/data/local/tmp/gemma-edge");

    /** Attachments of the message that is being written: a screen may be made anew meanwhile. */
    final ArrayList<String> images = new ArrayList<String>();
    final ArrayList<String> sounds = new ArrayList<String>();

    private final Handler screen = new Handler(Looper.getMainLooper());
    private final ExecutorService writer = Executors.newSingleThreadExecutor();
    private ChatSession session;
    private KeptFile kept;
    private SharedPreferences stored;

    static App of(Context context) {
        return (App) context.getApplicationContext();
    }

    @Override
    public void onCreate() {
        super.onCreate();
        stored = getSharedPreferences("app", MODE_PRIVATE);
        kept = new KeptFile(new File(getFilesDir(), "conversation.json"));
        session = new ChatSession(this);
        Sampling sampling = Sampling.standard();
        try {
            sampling = Sampling.fromJson(Json.object(Json.parse(stored.getString("sampling", "{}"))));
        } catch (IllegalArgumentException damaged) {
            Log.w(AnswerLog.TAG, "settings: " + damaged.getMessage());
        }
        session.restore(kept.conversation(), sampling);
    }

    ChatSession session() {
        return session;
    }

    /** The model of the last time, or "". */
    String lastModel() {
        return stored.getString("model", "");
    }

    /** The model that a computer means that names none: that of the last time, or else the newest on this phone; or "". */
    String likelyModel() {
        String likely = lastModel();
        long newest = -1;
        if (likely.isEmpty())
            for (String where : models())
                if (new File(where).lastModified() > newest) {
                    newest = new File(where).lastModified();
                    likely = where;
                }
        return likely;
    }

    void rememberModel(String where) {
        stored.edit().putString("model", where).apply();
    }

    void setSampling(Sampling sampling) {
        stored.edit().putString("sampling", Json.write(sampling.toJson())).apply();
        session.setSampling(sampling);
    }

    /** Stores the conversation, old or new, never torn. Called often: after turns, and when a screen goes. */
    void save() {
        final String text = session.conversation().toJson();
        writer.execute(new Runnable() {
            @Override
            public void run() {
                try {
                    kept.write(text);
                } catch (final IOException error) {
                    post(new Runnable() {
                        @Override
                        public void run() {
                            session.complain(new Problem(Problem.Kind.NO_SPACE, "the conversation: " + error.getMessage()));
                        }
                    });
                }
            }
        });
    }

    File attachments() {
        return folder("attachments");
    }

    File copies() {
        return folder("models");
    }

    private File folder(String name) {
        File folder = new File(getFilesDir(), name);
        folder.mkdirs();
        return folder;
    }

    private ConversationShelf shelf() {
        return new ConversationShelf(new File(getFilesDir(), "conversations"));
    }

    /** Puts the conversation on the shelf and begins a new one. */
    void putAway() {
        if (session.state().busy()) return;
        try {
            shelf().put(session.conversation(), System.currentTimeMillis());
        } catch (IOException error) {
            session.complain(new Problem(Problem.Kind.NO_SPACE, "the conversation stays: " + error.getMessage()));
            return;
        }
        session.newConversation();
        save();
    }

    /** Files of earlier conversations, the newest first. */
    List<File> earlier() {
        return shelf().list();
    }

    String title(File file) {
        return ConversationShelf.title(shelf().look(file));
    }

    /** Goes on with an earlier conversation; the present one goes onto the shelf. */
    void goOn(File file) {
        if (session.state().busy()) return;
        putAway();
        if (session.conversation().turns.isEmpty()) session.restore(shelf().take(file), session.sampling());
        save();
    }

    /** Deletes attachments that no conversation mentions. */
    void sweep() {
        List<Conversation> all = new ArrayList<Conversation>();
        all.add(session.conversation());
        for (File file : earlier()) all.add(shelf().look(file));
        Set<String> used = new HashSet<String>(ConversationShelf.attachments(all));
        used.addAll(images);
        used.addAll(sounds);
        File[] files = attachments().listFiles();
        if (files != null) for (File file : files) if (!used.contains(file.getPath())) file.delete();
    }

    /** Models on this phone: pushed ones, those in the app's own folders, and the last document. */
    List<String> models() {
        List<String> found = new ArrayList<String>();
        find(PUSHED, 4, found);
        File outside = getExternalFilesDir("models");
        if (outside != null) find(outside, 2, found);
        find(copies(), 1, found);
        String last = lastModel();
        if (last.startsWith("content:")) found.add(last);
        return found;
    }

    private static void find(File folder, int depth, List<String> found) {
        File[] files = folder.listFiles();
        if (files == null) return;
        for (File file : files) {
            if (file.isDirectory() && depth > 0) find(file, depth - 1, found);
            else if (file.getName().endsWith(".litertlm")) found.add(file.getPath());
        }
    }

    String version() {
        try {
            return getPackageManager().getPackageInfo(getPackageName(), 0).versionName;
        } catch (PackageManager.NameNotFoundException error) {
            throw new IllegalStateException(error); // it is this app
        }
    }

    BenchRows.Phone phone() {
        BenchRows.Phone phone = new BenchRows.Phone();
        phone.name = Build.MANUFACTURER + " " + Build.MODEL;
        phone.android = Build.VERSION.RELEASE;
        phone.cpu = Build.HARDWARE + " " + Build.BOARD;
        phone.arch = System.getProperty("os.arch", "");
        phone.kernel = "Linux " + System.getProperty("os.version", "");
        phone.cores = Runtime.getRuntime().availableProcessors();
        phone.memoryBytes = memory()[2];
        return phone;
    }

    @Override
    public void onTrimMemory(int level) {
        super.onTrimMemory(level);
        save();
        session.trim(level);
    }

    @Override
    public void onLowMemory() {
        super.onLowMemory();
        onTrimMemory(TRIM_MEMORY_COMPLETE);
    }

    // Host.

    @Override
    public void post(Runnable task) {
        screen.post(task);
    }

    void postLater(Runnable task, long milliseconds) {
        screen.postDelayed(task, milliseconds);
    }

    void cancel(Runnable task) {
        screen.removeCallbacks(task);
    }

    void inBackground(Runnable task) {
        writer.execute(task);
    }

    @Override
    public Access open(String where) throws Problem {
        try {
            return where.startsWith("content:") ? new DocumentAccess(this, Uri.parse(where)) : new FileAccess(where);
        } catch (FileNotFoundException error) {
            throw new Problem(Problem.Kind.MISSING, String.valueOf(error.getMessage()));
        } catch (SecurityException error) {
            throw new Problem(Problem.Kind.UNREADABLE, "Android took the permission back");
        }
    }

    @Override
    public long[] memory() {
        ActivityManager.MemoryInfo info = new ActivityManager.MemoryInfo();
        ((ActivityManager) getSystemService(ACTIVITY_SERVICE)).getMemoryInfo(info);
        return new long[] {info.availMem, info.threshold, info.totalMem};
    }

    @Override
    public File cacheFolder() {
        File folder = new File(getNoBackupFilesDir(), "packed");
        folder.mkdirs();
        return folder;
    }

    @Override
    public int threads() {
        int cores = Runtime.getRuntime().availableProcessors();
        List<Long> clocks = new ArrayList<Long>();
        for (int i = 0; i < cores; i++) {
            String text = ProcessMemory.text("/sys/devices/system/cpu/cpu" + i + "/cpufreq/cpuinfo_max_freq").trim();
            clocks.add(text.matches("[0-9]{1,9}") ? Long.parseLong(text) : 0L);
        }
        return CpuCores.threads(clocks, cores);
    }

    @Override
    public String verified(String where, String fingerprint) {
        String[] known = stored.getString("verified " + where, "").split(" ");
        return known.length == 2 && known[0].equals(fingerprint) ? known[1] : null;
    }

    @Override
    public void rememberVerified(String where, String fingerprint, String hash) {
        stored.edit().putString("verified " + where, fingerprint + " " + hash).apply();
    }

    @Override
    public void log(String line) {
        Log.i(AnswerLog.TAG, line);
    }

    /** A file by its path. */
    private static final class FileAccess implements Access {
        private final File file;
        private final FileInputStream in;

        FileAccess(String path) throws FileNotFoundException {
            file = new File(path);
            in = new FileInputStream(file);
        }

        @Override
        public FileChannel channel() {
            return in.getChannel();
        }

        @Override
        public String path() {
            return file.getPath();
        }

        @Override
        public int takeDescriptor() {
            throw new IllegalStateException("a file has a path");
        }

        @Override
        public String fingerprint() {
            return file.length() + "-" + file.lastModified();
        }

        @Override
        public void close() throws IOException {
            in.close();
        }
    }

    /** A document that the person chose, opened where it lies. */
    private static final class DocumentAccess implements Access {
        private final ParcelFileDescriptor descriptor;
        private final FileInputStream in;

        DocumentAccess(Context context, Uri uri) throws FileNotFoundException {
            descriptor = context.getContentResolver().openFileDescriptor(uri, "r");
            if (descriptor == null) throw new FileNotFoundException(uri.toString());
            in = new FileInputStream(descriptor.getFileDescriptor());
        }

        @Override
        public FileChannel channel() {
            return in.getChannel();
        }

        @Override
        public String path() {
            return "";
        }

        @Override
        public int takeDescriptor() throws IOException {
            return descriptor.dup().detachFd();
        }

        @Override
        public String fingerprint() throws IOException {
            try {
                android.system.StructStat stat = android.system.Os.fstat(descriptor.getFileDescriptor());
                return stat.st_size + "-" + stat.st_mtime;
            } catch (android.system.ErrnoException error) {
                throw new IOException(error.getMessage());
            }
        }

        @Override
        public void close() throws IOException {
            in.close();
            descriptor.close();
        }
    }
}
