"""Language models: what they generate, with which probability, and in which vocabulary."""
