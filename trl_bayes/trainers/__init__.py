"""Trainers: TRL's GRPOTrainer with another loss, each with its configuration."""
