package dev.gemmaedge.plain;

import java.util.Map;

/** What a model's manifest tells a person before it is loaded. */
public final class ModelCard {
    public final String name;
    public final String recipe;
    public final int context;
    public final boolean sees;
    public final boolean hears;
    public final long fileBytes;
    /** Memory that the plan predicts at its peak, and what the system must be able to give: bytes. */
    public final long peakBytes;
    public final long neededBytes;
    /** Weights that one token reads, and weights in all. */
    public final long bytesPerToken;
    public final long parameters;
    public final int chunk;
    public final String example;

    private ModelCard(Map<String, Object> manifest, Map<String, Object> plan, long size) {
        Object source = manifest.get("source");
        String told = source instanceof Map ? Json.string(Json.object(source).get("name"), "") : "";
        String last = told.substring(told.replaceAll("/+$", "").lastIndexOf('/') + 1);
        this.name = last.isEmpty() ? "model" : last;
        Object recipe = manifest.get("recipe");
        this.recipe = recipe instanceof Map ? Json.string(Json.object(recipe).get("name"), "") : Json.string(recipe, "");
        this.context = (int) Math.min(1 << 20, Json.integer(manifest.get("context"), 0));
        Object modalities = manifest.get("modalities");
        this.sees = modalities instanceof Map && Json.object(modalities).containsKey("vision");
        this.hears = modalities instanceof Map && Json.object(modalities).containsKey("audio");
        this.fileBytes = size;
        this.peakBytes = Json.integer(plan.get("peak_bytes"), 0);
        this.neededBytes = Math.max(peakBytes, Json.integer(plan.get("needed_bytes"), 0));
        this.bytesPerToken = Json.integer(plan.get("bytes_per_token"), 0);
        long parameters = 0;
        for (Object part : Json.list(plan.get("parts")))
            parameters += Json.integer(Json.object(part).get("elements"), 0);
        this.parameters = parameters;
        this.chunk = (int) Json.integer(manifest.get("chunk"), 0);
        this.example = Json.string(manifest.get("example"), "");
    }

    static ModelCard of(Map<String, Object> manifest, long size) throws Problem {
        Object plan = manifest.get("plan");
        if (!(plan instanceof Map)) throw new Problem(Problem.Kind.DAMAGED, "its manifest has no plan");
        ModelCard card = new ModelCard(manifest, Json.object(plan), size);
        if (card.context < 1) throw new Problem(Problem.Kind.DAMAGED, "its manifest has no context");
        if (card.peakBytes < 1) throw new Problem(Problem.Kind.DAMAGED, "its plan has no memory");
        return card;
    }

    /** With the weights that every token reads: file pages, which the system may drop and read again. */
    public long comfortableBytes() {
        return neededBytes + bytesPerToken;
    }

    /** "int4_g32 · 4,096 tokens · text, images, audio". */
    public String line() {
        String takes = "text" + (sees ? ", images" : "") + (hears ? ", audio" : "");
        return recipe + " · " + Words.count(context) + " tokens · " + takes;
    }
}
