package dev.gemmaedge.plain;

import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.channels.FileChannel;
import java.security.MessageDigest;
import java.util.ArrayList;
import java.util.Collections;
import java.util.Comparator;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;

/**
 * A .litertlm, checked before the engine sees it: the engine follows the header without looking, and a damaged file
 * takes the process down.
 */
public final class ModelFile {
    private static final int HEADER_START = 32;
    private static final int HEADER_LIMIT = 16_384;
    private static final int ALIGNMENT = 16_384;
    private static final int STRING_VALUE = 9;
    private static final String MANIFEST_KEY = "gemma_edge.manifest";
    private static final int SCHEMA = 1;
    private static final int BLOCK = 1 << 20;
    private static final String[] TYPES = {
        "", "GenericBinaryData", "", "TFLiteModel", "SP_Tokenizer", "LlmMetadataProto"
    };
    /** Parts by their names in the manifest: type and model type of their section. */
    public static final String[][] PARTS = {
        {"decoder.tflite", "TFLiteModel", "tf_lite_prefill_decode"},
        {"embedder.tflite", "TFLiteModel", "tf_lite_embedder"},
        {"per_layer_embedder.tflite", "TFLiteModel", "tf_lite_per_layer_embedder"},
        {"tokenizer.model", "SP_Tokenizer", ""},
        {"vision.tflite", "TFLiteModel", "tf_lite_vision_encoder"},
        {"vision_adapter.tflite", "TFLiteModel", "tf_lite_vision_adapter"},
        {"audio.tflite", "TFLiteModel", "tf_lite_audio_encoder_hw"},
        {"audio_adapter.tflite", "TFLiteModel", "tf_lite_audio_adapter"},
        {"end_of_audio.tflite", "TFLiteModel", "tf_lite_end_of_audio"},
        {"tokens.bin", "GenericBinaryData", ""},
    };
    private static final int REQUIRED_PARTS = 4;

    /** Told while a file is read; true ends the reading with Problem STOPPED. */
    public interface Progress {
        boolean at(long done, long total);
    }

    /** Bytes [begin, end) of the file. */
    public static final class Section {
        public final String type;
        public final String modelType;
        public final long begin;
        public final long end;

        Section(String type, String modelType, long begin, long end) {
            this.type = type;
            this.modelType = modelType;
            this.begin = begin;
            this.end = end;
        }
    }

    public final long size;
    public final List<Section> sections;
    public final ModelCard card;
    private final Map<String, Object> digests;

    private ModelFile(long size, List<Section> sections, Map<String, Object> manifest) throws Problem {
        this.size = size;
        this.sections = sections;
        this.card = ModelCard.of(manifest, size);
        Object digests = manifest.get("sha256");
        if (!(digests instanceof Map)) throw new Problem(Problem.Kind.DAMAGED, "its manifest lacks hashes");
        this.digests = Json.object(digests);
        for (int i = 0; i < PARTS.length; i++) {
            boolean there = section(PARTS[i][1], PARTS[i][2]) != null;
            boolean told = this.digests.get(PARTS[i][0]) instanceof String;
            if (there != told || i < REQUIRED_PARTS && !there)
                throw new Problem(Problem.Kind.DAMAGED, PARTS[i][0] + (there ? " without a hash" : " is missing"));
        }
    }

    /** The section of a kind, or null. */
    public Section section(String type, String modelType) {
        for (Section section : sections)
            if (section.type.equals(type) && section.modelType.equals(modelType)) return section;
        return null;
    }

    /**
     * Reads and checks the header: a few kilobytes.
     *
     * @throws Problem FOREIGN, NEWER, TRUNCATED, DAMAGED or UNREADABLE
     */
    public static ModelFile open(FileChannel file) throws Problem {
        try {
            return read(file);
        } catch (IOException error) {
            throw new Problem(Problem.Kind.UNREADABLE, String.valueOf(error.getMessage()));
        } catch (RuntimeException error) { // an offset that leads nowhere, or no JSON
            throw new Problem(Problem.Kind.DAMAGED, "its header: " + error.getMessage());
        }
    }

    private static ModelFile read(FileChannel file) throws IOException, Problem {
        long size = file.size();
        ByteBuffer head = load(file, 0, (int) Math.min(size, HEADER_START));
        byte[] magic = new byte[8];
        if (head.remaining() < HEADER_START) throw new Problem(shortFile(head), size + " bytes");
        head.get(magic);
        if (!new String(magic, "ISO-8859-1").equals("LITERTLM")) throw new Problem(Problem.Kind.FOREIGN, "no .litertlm");
        int major = head.getInt(8);
        if (major != 1) throw new Problem(major > 1 ? Problem.Kind.NEWER : Problem.Kind.DAMAGED, "version " + major);
        long headerEnd = head.getLong(24);
        if (headerEnd <= HEADER_START || headerEnd > HEADER_LIMIT)
            throw new Problem(Problem.Kind.DAMAGED, "its header ends at byte " + headerEnd);
        if (headerEnd > size) throw new Problem(Problem.Kind.TRUNCATED, size + " bytes");
        FlatTable root = FlatTable.root(load(file, HEADER_START, (int) headerEnd - HEADER_START).array());
        FlatTable system = root.table(0);
        FlatTable list = root.table(1);
        if (list == null) throw new Problem(Problem.Kind.DAMAGED, "its header lists no sections");
        String manifest = system == null ? null : items(system, 0).get(MANIFEST_KEY);
        if (manifest == null) throw new Problem(Problem.Kind.FOREIGN, "made by another tool: no manifest");
        List<Section> sections = sections(list, headerEnd, size);
        Map<String, Object> read = Json.object(Json.parse(manifest));
        long schema = Json.integer(read.get("schema_version"), 0);
        if (schema != SCHEMA)
            throw new Problem(schema > SCHEMA ? Problem.Kind.NEWER : Problem.Kind.DAMAGED, "manifest " + schema);
        return new ModelFile(size, sections, read);
    }

    /** A file shorter than any header: the beginning of one, or something else. */
    private static Problem.Kind shortFile(ByteBuffer head) {
        byte[] expected = {'L', 'I', 'T', 'E', 'R', 'T', 'L', 'M'};
        for (int i = 0; i < Math.min(expected.length, head.remaining()); i++)
            if (head.get(i) != expected[i]) return Problem.Kind.FOREIGN;
        return Problem.Kind.TRUNCATED;
    }

    private static List<Section> sections(FlatTable list, long headerEnd, long size) throws Problem {
        List<Section> sections = new ArrayList<Section>();
        for (FlatTable item : list.tables(0)) {
            int type = item.number8(3);
            String name = type < TYPES.length ? TYPES[type] : "";
            if (name.isEmpty()) throw new Problem(Problem.Kind.DAMAGED, "a section of type " + type);
            String model = items(item, 0).get("model_type");
            sections.add(new Section(name, model == null ? "" : model, item.number64(1), item.number64(2)));
        }
        List<Section> ordered = new ArrayList<Section>(sections);
        Collections.sort(ordered, new Comparator<Section>() {
            @Override
            public int compare(Section a, Section b) {
                return Long.compare(a.begin, b.begin);
            }
        });
        long end = headerEnd;
        for (Section section : ordered) {
            long expected = (end + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
            if (section.begin != expected || section.end <= section.begin)
                throw new Problem(Problem.Kind.DAMAGED, section.type + " begins at byte " + section.begin);
            end = section.end;
        }
        if (end > size) throw new Problem(Problem.Kind.TRUNCATED, size + " of " + end + " bytes");
        if (end < size) throw new Problem(Problem.Kind.DAMAGED, (size - end) + " bytes too many");
        return sections;
    }

    private static Map<String, String> items(FlatTable table, int slot) {
        Map<String, String> items = new LinkedHashMap<String, String>();
        for (FlatTable pair : table.tables(slot)) {
            FlatTable value = pair.table(2);
            if (value != null && pair.number8(1) == STRING_VALUE)
                items.put(pair.string(0).toLowerCase(java.util.Locale.ROOT), value.string(0));
        }
        return items;
    }

    private static ByteBuffer load(FileChannel file, long begin, int length) throws IOException {
        ByteBuffer data = ByteBuffer.allocate(length).order(ByteOrder.LITTLE_ENDIAN);
        while (data.hasRemaining() && file.read(data, begin + data.position()) >= 0) continue;
        data.flip();
        return data;
    }

    /**
     * Reads the whole file once and compares every part with its hash in the manifest.
     *
     * @return the SHA-256 of the file, in hexadecimal
     * @throws Problem DAMAGED, TRUNCATED, STOPPED or UNREADABLE
     */
    public String verify(FileChannel file, Progress progress) throws Problem {
        Map<Section, String> expected = new LinkedHashMap<Section, String>();
        for (String[] part : PARTS) {
            Section section = section(part[1], part[2]);
            if (section != null) expected.put(section, (String) digests.get(part[0]));
        }
        MessageDigest whole = Hash.sha256();
        Map<Section, MessageDigest> each = new LinkedHashMap<Section, MessageDigest>();
        for (Section section : expected.keySet()) each.put(section, Hash.sha256());
        byte[] block = new byte[BLOCK];
        try {
            for (long at = 0; at < size; ) {
                int got = file.read(ByteBuffer.wrap(block), at);
                if (got <= 0) throw new Problem(Problem.Kind.TRUNCATED, at + " of " + size + " bytes");
                whole.update(block, 0, got);
                for (Map.Entry<Section, MessageDigest> entry : each.entrySet()) {
                    int from = (int) Math.max(0, entry.getKey().begin - at);
                    int to = (int) Math.min(got, entry.getKey().end - at);
                    if (from < to) entry.getValue().update(block, from, to - from);
                }
                at += got;
                if (progress.at(at, size)) throw new Problem(Problem.Kind.STOPPED, "");
            }
        } catch (IOException error) {
            throw new Problem(Problem.Kind.UNREADABLE, String.valueOf(error.getMessage()));
        }
        for (Map.Entry<Section, MessageDigest> entry : each.entrySet())
            if (!Hash.hex(entry.getValue()).equals(expected.get(entry.getKey())))
                throw new Problem(Problem.Kind.DAMAGED, "other bytes than were exported in " + entry.getKey().type
                    + " " + entry.getKey().modelType);
        return Hash.hex(whole);
    }
}
