"""`python -m trl_bayes`: the same as `trl-bayes`."""

from .cli import main


if __name__ == "__main__":
    main()
