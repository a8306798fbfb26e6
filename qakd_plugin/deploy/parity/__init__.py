"""The gate: what is proven before a file is written."""
