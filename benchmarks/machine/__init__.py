"""What the machine says: memory, limits, speed, load, sensors."""
