package dev.gemmaedge.plain;

import java.util.Map;

/** How tokens are chosen, and the system prompt. Values out of range are brought into it. */
public final class Sampling {
    public final String system;
    public final double temperature;
    public final int topK;
    public final double topP;
    public final int seed;
    public final int maxTokens;

    public Sampling(String system, double temperature, int topK, double topP, int seed, int maxTokens) {
        this.system = system;
        this.temperature = Math.max(0, Math.min(2, temperature));
        this.topK = Math.max(1, Math.min(1000, topK));
        this.topP = Math.max(0.01, Math.min(1, topP));
        this.seed = Math.max(0, seed);
        this.maxTokens = Math.max(1, Math.min(8192, maxTokens));
    }

    /** Gemma's own settings. */
    public static Sampling standard() {
        return new Sampling("", 1.0, 64, 0.95, 0, 512);
    }

    public static Sampling greedy(int maxTokens) {
        return new Sampling("", 0, 1, 1.0, 0, maxTokens);
    }

    /** The engine has no greedy sampler: the likeliest of one is chosen instead. */
    public int engineTopK() {
        return temperature == 0 ? 1 : topK;
    }

    public double engineTemperature() {
        return temperature == 0 ? 1 : temperature;
    }

    public Map<String, Object> toJson() {
        return Json.fields("system", system, "temperature", temperature, "top_k", (long) topK, "top_p", topP, "seed",
            (long) seed, "max_tokens", (long) maxTokens);
    }

    public static Sampling fromJson(Map<String, Object> json) {
        Sampling standard = standard();
        return new Sampling(Json.string(json.get("system"), standard.system),
            Json.number(json.get("temperature"), standard.temperature),
            (int) Json.integer(json.get("top_k"), standard.topK), Json.number(json.get("top_p"), standard.topP),
            (int) Json.integer(json.get("seed"), standard.seed),
            (int) Json.integer(json.get("max_tokens"), standard.maxTokens));
    }
}
