package dev.gemmaedge;

import java.io.File;
import java.io.RandomAccessFile;
import java.util.ArrayList;
import java.util.List;

import dev.gemmaedge.engine.Engine;
import dev.gemmaedge.engine.EngineException;
import dev.gemmaedge.plain.AnswerLog;
import dev.gemmaedge.plain.BenchRows;
import dev.gemmaedge.plain.Hash;
import dev.gemmaedge.plain.Json;
import dev.gemmaedge.plain.ModelFile;
import dev.gemmaedge.plain.Problem;
import dev.gemmaedge.plain.ProcessMemory;
import dev.gemmaedge.plain.Sampling;
import dev.gemmaedge.plain.Turn;

/**
 * The app's own classes on a computer, for tests: what they do with a model is printed as lines of JSON.
 *
 * <pre>
 *   answer MODEL CACHE TOKENS PROMPT [IMAGE-OR-WAV...]   the greedy answer, piece by piece
 *   cancel MODEL CACHE PROMPT                            stops after the third piece, then answers again
 *   cycles MODEL CACHE COUNT PROMPT                      loads, answers a token, unloads
 *   check FILE...                                        what the app says of each file, before any engine
 *   survive CACHE FILE...                                checks, loads and asks each file, in one process
 *   log RUN PIECE...                                     what the app writes to the log of an answer
 *   bench MODEL CACHE PROMPT-TOKENS TOKENS COUNT         the rows that the app exports
 * </pre>
 */
public final class Desk {
    private Desk() {}

    public static void main(String[] words) throws Exception {
        String verb = words[0];
        if (verb.equals("answer")) answer(words);
        else if (verb.equals("cancel")) cancel(words);
        else if (verb.equals("cycles")) cycles(words);
        else if (verb.equals("check")) check(words);
        else if (verb.equals("survive")) survive(words);
        else if (verb.equals("bench")) bench(words);
        else if (verb.equals("log")) log(words);
        else throw new IllegalArgumentException(verb);
    }

    private static ModelFile open(String path, boolean verify) throws Exception {
        RandomAccessFile file = new RandomAccessFile(path, "r");
        try {
            ModelFile model = ModelFile.open(file.getChannel());
            if (verify) model.verify(file.getChannel(), QUIET);
            return model;
        } finally {
            file.close();
        }
    }

    private static final ModelFile.Progress QUIET = new ModelFile.Progress() {
        @Override
        public boolean at(long done, long total) {
            return false;
        }
    };

    private static Engine load(String path, String cache, int prompt, int decode) throws Exception {
        return load(path, open(path, true), cache, prompt, decode);
    }

    private static Engine load(String path, ModelFile model, String cache, int prompt, int decode) {
        Engine.Options options = new Engine.Options();
        options.path = path;
        options.cache = cache;
        options.threads = 2;
        options.context = model.card.context;
        options.sees = model.card.sees && prompt == 0;
        options.hears = model.card.hears && prompt == 0;
        options.prompt = prompt;
        options.decode = decode;
        return new Engine(options);
    }

    private static void say(Object... pairs) {
        System.out.println(Json.write(Json.fields(pairs)));
        System.out.flush();
    }

    private static final Engine.Listener PRINT = new Engine.Listener() {
        @Override
        public void piece(String text) {
            say("piece", text);
        }
    };

    private static void report(Engine.Answer answer) {
        say("error", answer.error, "stopped", answer.stopped, "tokens", answer.tokens, "prompt_tokens",
            answer.promptTokens, "first", answer.firstToken, "rate", answer.perSecond);
    }

    private static void answer(String[] words) throws Exception {
        Engine engine = load(words[1], words[2], 0, 0);
        Turn turn = Turn.asked(words[4]);
        for (int i = 5; i < words.length; i++) (words[i].endsWith(".wav") ? turn.sounds : turn.images).add(words[i]);
        engine.converse("[]", Sampling.greedy(Integer.parseInt(words[3])));
        report(engine.send(Json.write(turn.message()), PRINT));
        engine.close();
    }

    private static void cancel(String[] words) throws Exception {
        final Engine engine = load(words[1], words[2], 0, 0);
        String message = Json.write(Turn.asked(words[3]).message());
        engine.converse("[]", Sampling.greedy(500));
        final int[] pieces = {0};
        report(engine.send(message, new Engine.Listener() {
            @Override
            public void piece(String text) {
                if (++pieces[0] == 3) engine.cancel();
            }
        }));
        engine.converse("[]", Sampling.greedy(500));
        engine.cancel(); // nothing is under way: harmless
        report(engine.send(message, PRINT));
        engine.close();
    }

    private static void cycles(String[] words) throws Exception {
        String message = Json.write(Turn.asked(words[4]).message());
        ModelFile model = open(words[1], true);
        for (int i = 0; i < Integer.parseInt(words[3]); i++) {
            Engine engine = load(words[1], model, words[2], 0, 0);
            engine.converse("[]", Sampling.greedy(1));
            Engine.Answer answer = engine.send(message, PRINT);
            engine.close();
            say("cycle", (long) i, "tokens", answer.tokens, "anon", ProcessMemory.read().rssAnon);
        }
    }

    private static void check(String[] words) throws Exception {
        for (int i = 1; i < words.length; i++) {
            String name = new File(words[i]).getName();
            try {
                ModelFile model = open(words[i], true);
                say("file", name, "line", model.card.line(), "name", model.card.name, "needed", model.card.neededBytes);
            } catch (Problem problem) {
                say("file", name, "problem", problem.kind.name(), "words", problem.getMessage());
            }
        }
        List<Object> parts = new ArrayList<Object>();
        for (String[] part : ModelFile.PARTS) parts.add(part[0] + " " + part[1] + " " + part[2]);
        say("parts", parts);
    }

    private static void survive(String[] words) throws Exception {
        for (int i = 2; i < words.length; i++) {
            String name = new File(words[i]).getName();
            try {
                Engine engine = load(words[i], words[1], 0, 0);
                engine.converse("[]", Sampling.greedy(1));
                Engine.Answer answer = engine.send(Json.write(Turn.asked("Hi").message()), PRINT);
                engine.close();
                say("file", name, "tokens", answer.tokens, "error", answer.error);
            } catch (Problem problem) {
                say("file", name, "problem", problem.kind.name());
            } catch (EngineException refused) {
                say("file", name, "problem", "ENGINE", "words", refused.getMessage());
            }
        }
    }

    private static void log(String[] words) {
        AnswerLog log = new AnswerLog(words[1]);
        StringBuilder whole = new StringBuilder();
        System.out.println(log.state("loaded"));
        for (int i = 2; i < words.length; i++) {
            whole.append(words[i]);
            for (String line : log.piece(words[i])) System.out.println(line);
        }
        System.out.println(log.end(Json.fields("text_sha256", Hash.of(whole.toString()))));
    }

    private static void bench(String[] words) throws Exception {
        int prompt = Integer.parseInt(words[3]);
        int decode = Integer.parseInt(words[4]);
        long begin = System.nanoTime();
        Engine engine = load(words[1], words[2], prompt, decode);
        double seconds = (System.nanoTime() - begin) / 1e9;
        BenchRows rows = new BenchRows(open(words[1], false).card, new BenchRows.Phone(), new File(words[1]).getName(),
            "run", "1", prompt, decode, 2);
        for (int i = 0; i < Integer.parseInt(words[5]); i++) rows.add(engine.repeat(prompt, decode));
        System.out.print(rows.jsonl(seconds, ProcessMemory.read(), new java.util.Date()));
        try {
            engine.repeat(prompt + 1, decode);
        } catch (EngineException refused) {
            System.err.println(refused.getMessage());
        }
        engine.close();
    }
}
