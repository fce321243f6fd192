"""The whole training step: ours, ours with one thing switched off, and the published form."""
