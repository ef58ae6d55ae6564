"""LoRA training of the transformer in plain Python: settings, data, objective, loop and saved states."""
