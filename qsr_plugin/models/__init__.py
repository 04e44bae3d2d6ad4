"""Models: training, validation and saving of quantized networks in the host's pipeline."""
