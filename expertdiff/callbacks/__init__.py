"""What rides along with training: averages, checkpoints, losses, pictures, configuration."""
