"""``python -m flowkit.cli`` and ``accelerate launch --module flowkit.cli``: the command line as a module."""

from flowkit.cli import main

if __name__ == "__main__":
    main()
