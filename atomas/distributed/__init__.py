"""Process group set-up and the collectives that carry gradients."""
