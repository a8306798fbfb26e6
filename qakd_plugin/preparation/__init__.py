"""From a float model to a prepared model, and from a prepared model to learned quantizers."""
