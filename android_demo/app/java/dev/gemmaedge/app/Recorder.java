package dev.gemmaedge.app;

import android.media.AudioFormat;
import android.media.AudioRecord;
import android.media.MediaRecorder;

import java.io.File;
import java.io.IOException;
import java.io.RandomAccessFile;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;

import dev.gemmaedge.plain.Problem;
import dev.gemmaedge.plain.Wav;

/** Writes what the microphone hears to a WAV file, on a thread of its own. */
final class Recorder extends Thread {
    interface Listener {
        void second(int seconds);

        /** With null when the file is complete. */
        void ended(Problem problem);
    }

    private final File target;
    private final Listener listener;
    private final App app;
    private volatile boolean stopping;

    Recorder(File target, Listener listener, App app) {
        super("recorder");
        this.target = target;
        this.listener = listener;
        this.app = app;
    }

    /** Asks for the end; the listener hears of it. Not Thread.stop(). */
    void end() {
        stopping = true;
    }

    @Override
    public void run() {
        Problem found = null;
        try {
            record();
        } catch (IOException error) {
            found = new Problem(Problem.Kind.MEDIA, String.valueOf(error.getMessage()));
        } catch (RuntimeException error) { // the microphone is in use, or there is none
            found = new Problem(Problem.Kind.MEDIA, "no microphone: " + error.getMessage());
        }
        if (found != null) target.delete();
        final Problem problem = found;
        app.post(new Runnable() {
            @Override
            public void run() {
                listener.ended(problem);
            }
        });
    }

    private void record() throws IOException {
        int least = AudioRecord.getMinBufferSize(Wav.RATE, AudioFormat.CHANNEL_IN_MONO, AudioFormat.ENCODING_PCM_16BIT);
        AudioRecord microphone = new AudioRecord(MediaRecorder.AudioSource.VOICE_RECOGNITION, Wav.RATE,
            AudioFormat.CHANNEL_IN_MONO, AudioFormat.ENCODING_PCM_16BIT, Math.max(least, 2 * Wav.RATE));
        RandomAccessFile file = new RandomAccessFile(target, "rw");
        try {
            file.setLength(0);
            file.write(Wav.header(0));
            short[] samples = new short[Wav.RATE / 10];
            ByteBuffer bytes = ByteBuffer.allocate(2 * samples.length).order(ByteOrder.LITTLE_ENDIAN);
            microphone.startRecording();
            for (int heard = 0; !stopping && heard < Wav.MOST_SECONDS * Wav.RATE; ) {
                int got = microphone.read(samples, 0, samples.length);
                if (got <= 0) throw new IOException("the microphone is silent: " + got);
                bytes.clear();
                bytes.asShortBuffer().put(samples, 0, got);
                file.write(bytes.array(), 0, 2 * got);
                if (heard / Wav.RATE != (heard + got) / Wav.RATE || heard == 0) second((heard + got) / Wav.RATE);
                heard += got;
            }
            Wav.finish(file);
        } finally {
            file.close();
            microphone.release();
        }
    }

    private void second(final int seconds) {
        app.post(new Runnable() {
            @Override
            public void run() {
                listener.second(seconds);
            }
        });
    }
}
