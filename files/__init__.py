"""What is written to disk, and what is read back from it."""
