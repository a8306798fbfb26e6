"""Models prepared by torchao's PT2E flow."""
