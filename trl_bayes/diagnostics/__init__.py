"""Measures of how close a policy is to its posterior, and the enumerable tasks where that is known exactly."""
