"""Where quantizers belong in a float network, and how their ranges are calibrated."""
