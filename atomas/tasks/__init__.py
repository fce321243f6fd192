"""What a checkpoint is evaluated on."""
