"""What a run proves about itself, once."""
