"""Several tokens a step without another model: guesses from what was said, verified in one call."""
