"""Facts about the machine: memory, limits, speed, load, sensors."""
