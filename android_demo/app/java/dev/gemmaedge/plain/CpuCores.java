package dev.gemmaedge.plain;

import java.util.List;

/** How many threads to give the engine: the fast cores; slow ones hold the others up. */
public final class CpuCores {
    private static final double FAST = 0.7; // of the fastest clock

    private CpuCores() {}

    /**
     * @param kilohertz highest clock of each core; 0 where the system does not tell
     * @param cores of the processor
     */
    public static int threads(List<Long> kilohertz, int cores) {
        long fastest = 0;
        for (long each : kilohertz) fastest = Math.max(fastest, each);
        int fast = 0;
        for (long each : kilohertz) if (each > 0 && each >= FAST * fastest) fast++;
        return Math.max(1, Math.min(8, fast > 0 ? fast : (cores + 1) / 2));
    }
}
