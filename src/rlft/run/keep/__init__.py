"""What survives a stop."""
