"""The canonical ONNX file: written, and brought into its form."""
