"""Models prepared by torch.ao, FX and eager."""
