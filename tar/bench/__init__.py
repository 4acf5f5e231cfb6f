"""The benchmark: `python -m tar.bench` times a training step, counts its arithmetic and measures its memory."""
