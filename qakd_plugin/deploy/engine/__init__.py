"""TensorRT engines: built, vouched for, run."""
