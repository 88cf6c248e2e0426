"""Model directories, checkpoints and the formats they are made of."""
