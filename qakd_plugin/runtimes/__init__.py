"""What runs a file or a module; imports no torch but for modules of torch."""
