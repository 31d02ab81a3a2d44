"""Numbers estimated from samples, with their standard errors: pure functions that know no model, target or trainer."""
