"""What every room may use and none of it knows of quantization."""
