"""What is counted, timed and said."""
