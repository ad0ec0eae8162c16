"""What a prompt holds besides text: files read, taken apart, and encoded to soft tokens."""
