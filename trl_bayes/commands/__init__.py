"""Commands of trl_bayes, one file each; each is thin and runs with `python -m trl_bayes.commands.<name>`."""
