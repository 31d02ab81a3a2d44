"""What commands share: the parser, recipes, data, the launcher, training and posteriors without a trainer."""
