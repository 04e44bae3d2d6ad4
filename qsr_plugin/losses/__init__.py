"""Losses of quantized training, registered in the host's LOSS_REGISTRY."""
