"""``python -m reparam``: the command line."""

from reparam.cli.entry import main

if __name__ == "__main__":
    main()
