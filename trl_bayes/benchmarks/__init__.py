"""Trainers and samplers measured where the truth is known, and what a step costs."""
