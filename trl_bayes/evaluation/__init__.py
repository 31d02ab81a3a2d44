"""How far a policy is from its posterior, estimated from samples, and the report that shows it."""
