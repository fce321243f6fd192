"""`python -m atomas` is the command `atomas`; launchers such as torchrun use it."""

from atomas.cli import main

if __name__ == "__main__":
    main()
