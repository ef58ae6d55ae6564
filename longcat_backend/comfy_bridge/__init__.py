"""The only package that imports ComfyUI: models, encoders and services of the host."""
