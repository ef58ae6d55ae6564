"""One-off programs and the harness around a real ComfyUI; no part of the pack at run time."""
