"""What keeps the adapted model near its base: replayed text and penalties."""
