"""What goes into a network, what comes out of it, and how it is measured."""
