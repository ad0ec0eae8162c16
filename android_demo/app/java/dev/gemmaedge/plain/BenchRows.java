package dev.gemmaedge.plain;

import java.text.SimpleDateFormat;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Date;
import java.util.List;
import java.util.Locale;
import java.util.Map;
import java.util.TimeZone;

/** Rows of the benchmark as `gemma-edge bench -o FILE.jsonl` writes them; `gemma-edge report` reads them. */
public final class BenchRows {
    private static final String ENGINE = "LiteRT-LM, app";

    /** The phone. */
    public static final class Phone {
        public String name = "";
        public String android = "";
        public String cpu = "";
        public String arch = "";
        public String kernel = "";
        public int cores;
        public long memoryBytes;
    }

    private final ModelCard card;
    private final Phone phone;
    private final String file;
    private final String run;
    private final String version;
    private final int prompt;
    private final int decode;
    private final int threads;
    /** Nanoseconds of each repetition: prefill, decode, first token. */
    private final List<double[]> samples = new ArrayList<double[]>();

    public BenchRows(ModelCard card, Phone phone, String file, String run, String version, int prompt, int decode,
        int threads) {
        this.card = card;
        this.phone = phone;
        this.file = file;
        this.run = run;
        this.version = version;
        this.prompt = prompt;
        this.decode = decode;
        this.threads = threads;
    }

    public void add(double[] nanoseconds) {
        samples.add(nanoseconds);
    }

    /** Mean tokens per second of prefill (0) or decode (1). */
    public double mean(int which) {
        double sum = 0;
        for (double[] sample : samples) sum += tokens(which) * 1e9 / sample[which];
        return sum / samples.size();
    }

    /** Standard deviation of the same, 0 for one sample. */
    public double deviation(int which) {
        double mean = mean(which);
        double sum = 0;
        for (double[] sample : samples) sum += Math.pow(tokens(which) * 1e9 / sample[which] - mean, 2);
        return samples.size() < 2 ? 0 : Math.sqrt(sum / (samples.size() - 1));
    }

    public String name(int which) {
        return which == 0 ? "pp" + prompt : "tg" + decode + " @ d" + prompt;
    }

    /** "pp512 61.40 ± 0.31 tok/s". */
    public String line(int which) {
        return String.format(Locale.ROOT, "%s %.2f ± %.2f tok/s", name(which), mean(which), deviation(which));
    }

    private int tokens(int which) {
        return which == 0 ? prompt : decode;
    }

    /** Three lines: prefill, decode, and the session with load time and memory. */
    public String jsonl(double loadSeconds, ProcessMemory memory, Date now) {
        SimpleDateFormat format = new SimpleDateFormat("yyyy-MM-dd'T'HH:mm:ss'+00:00'", Locale.ROOT);
        format.setTimeZone(TimeZone.getTimeZone("UTC"));
        String time = format.format(now);
        return Json.write(test(0, time, memory)) + "\n" + Json.write(test(1, time, memory)) + "\n"
            + Json.write(session(time, loadSeconds, memory)) + "\n";
    }

    private Map<String, Object> head(String kind, String time) {
        return Json.fields("kind", kind, "name", file, "time", time, "schema", 1L, "environment", environment(), "run",
            run, "device", "app: " + phone.name, "engine", ENGINE, "model", card.name, "recipe", card.recipe, "format",
            "litertlm");
    }

    private Map<String, Object> environment() {
        return Json.fields("cpu", phone.cpu, "cores", (long) phone.cores, "memory_bytes", phone.memoryBytes, "machine",
            phone.arch, "kernel", phone.kernel, "versions", Json.fields("gemma-edge app", version));
    }

    private Map<String, Object> test(int which, String time, ProcessMemory memory) {
        Map<String, Object> row = head("bench", time);
        List<Object> times = new ArrayList<Object>();
        List<Object> speeds = new ArrayList<Object>();
        double[] sorted = new double[samples.size()];
        for (int i = 0; i < sorted.length; i++) {
            times.add(Math.round(samples.get(i)[which]));
            sorted[i] = tokens(which) * 1e9 / samples.get(i)[which];
            speeds.add(sorted[i]);
        }
        Arrays.sort(sorted);
        int half = sorted.length / 2;
        row.putAll(Json.fields("n_prompt", which == 0 ? (long) prompt : 0L, "n_gen", which == 1 ? (long) decode : 0L,
            "n_depth", which == 1 ? (long) prompt : 0L, "samples_ns", times, "test", name(which), "samples_ts", speeds,
            "avg_ts", mean(which), "stddev_ts", deviation(which), "median_ts",
            sorted.length % 2 == 1 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2));
        row.putAll(Json.fields("build_commit", version, "cpu_info", phone.cpu, "model_filename", file, "model_type",
            card.name + " " + card.recipe, "model_size", card.fileBytes, "model_n_params", card.parameters, "n_batch",
            (long) card.chunk, "n_ubatch", (long) card.chunk, "n_threads", (long) threads, "type_k", "f32", "type_v",
            "f32", "test_time", time, "bytes_per_token", card.bytesPerToken, "peak_rss_anon", memory.rssAnon,
            "peak_rss", memory.highWater));
        return row;
    }

    private Map<String, Object> session(String time, double loadSeconds, ProcessMemory memory) {
        Map<String, Object> row = head("session", time);
        List<Object> waits = new ArrayList<Object>();
        double[] sorted = new double[samples.size()];
        for (int i = 0; i < sorted.length; i++) sorted[i] = samples.get(i)[2] / 1e6;
        for (double wait : sorted) waits.add(wait);
        Arrays.sort(sorted);
        long rss = memory.rssAnon + memory.rssFile + Math.max(0, memory.rssShmem);
        Map<String, Object> steady = Json.fields("rss_anon", memory.rssAnon, "rss_file", memory.rssFile, "rss_shmem",
            Math.max(0, memory.rssShmem), "rss", rss, "pss", memory.pss < 0 ? null : memory.pss);
        Map<String, Object> peak = Json.fields("rss_anon", memory.rssAnon, "rss_file", memory.rssFile, "rss", rss,
            "high_water", memory.highWater, "samples", 1L);
        row.putAll(Json.fields("bundle_bytes", card.fileBytes, "workload",
            Json.fields("n_prompt", (long) prompt, "n_gen", (long) decode, "reps", (long) samples.size(), "threads",
                (long) threads),
            "load", Json.fields("warm_s", loadSeconds), "context", (long) card.context, "latency",
            Json.fields("prompt_tokens", (long) prompt, "answer_tokens", (long) decode, "requests",
                (long) samples.size(), "ttft_ms",
                Json.fields("p50", nearest(sorted, 0.5), "p90", nearest(sorted, 0.9), "p99", nearest(sorted, 0.99)),
                "samples_ttft_ms", waits),
            "memory", Json.fields("steady", steady, "peak", peak), "notes",
            Arrays.asList("measured by the app on Android " + phone.android
                + "; memory is that of the whole app")));
        return row;
    }

    private static double nearest(double[] sorted, double share) {
        return sorted[Math.min(sorted.length - 1, (int) Math.ceil(share * sorted.length) - 1)];
    }
}
