"""The benchmark: `python -m tar.bench` times a training step and counts its arithmetic."""
