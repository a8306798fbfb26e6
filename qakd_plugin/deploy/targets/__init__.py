"""What each target changes of the canonical file."""
