"""`python -m atomas_launcher`: launch from where atomas itself is not installed."""

from atomas_launcher.cli import main

main()
