package dev.gemmaedge.plain;

import java.io.File;
import java.io.IOException;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Collections;
import java.util.List;

/** Conversations that were put away: a file each, the newest first. */
public final class ConversationShelf {
    private static final int MOST_TITLE = 60;
    private final File folder;

    public ConversationShelf(File folder) {
        this.folder = folder;
    }

    /** Keeps a conversation; one without turns is nothing to keep. */
    public void put(Conversation conversation, long time) throws IOException {
        if (conversation.turns.isEmpty()) return;
        folder.mkdirs();
        File file = new File(folder, String.format(java.util.Locale.ROOT, "%013d.json", time));
        while (file.exists()) file = new File(folder, String.format(java.util.Locale.ROOT, "%013d.json", ++time));
        new KeptFile(file).write(conversation.toJson());
    }

    public List<File> list() {
        File[] files = folder.listFiles();
        List<File> found = new ArrayList<File>();
        if (files != null) for (File file : files) if (file.getName().endsWith(".json")) found.add(file);
        Collections.sort(found, Collections.reverseOrder());
        return found;
    }

    public Conversation look(File file) {
        return new KeptFile(file).conversation();
    }

    /** Takes one off the shelf. */
    public Conversation take(File file) {
        Conversation conversation = look(file);
        file.delete();
        return conversation;
    }

    /** The first words of a conversation. */
    public static String title(Conversation conversation) {
        for (Turn turn : conversation.turns) {
            String text = turn.text.replaceAll("\\s+", " ").trim();
            if (!turn.user || text.isEmpty()) continue;
            return text.length() <= MOST_TITLE ? text : text.substring(0, MOST_TITLE - 1) + "…";
        }
        return "…";
    }

    /** Attachments that any of these conversations mentions. */
    public static List<String> attachments(List<Conversation> conversations) {
        List<String> paths = new ArrayList<String>();
        for (Conversation conversation : conversations)
            for (Turn turn : conversation.turns)
                for (List<String> each : Arrays.asList(turn.images, turn.sounds)) paths.addAll(each);
        return paths;
    }
}
