"""Bridges to training loops of others, one file each; each imports its library when it is imported itself.

``modelopt_distill``: criteria for ``modelopt.torch.distill``. ``lightning``: a LightningModule. ``huggingface``: a Trainer.
See docs/hooks.md for which to use when.
"""
