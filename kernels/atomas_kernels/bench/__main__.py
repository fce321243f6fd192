"""Command line: `python -m atomas_kernels.bench --op token_interaction --json result.json`."""

import argparse
import sys
from collections.abc import Sequence

from atomas_kernels.bench import command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks that the arguments ask for; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m atomas_kernels.bench",
        description=command.DESCRIPTION,
        epilog=f"Example: python -m atomas_kernels.bench {command.EXAMPLE}",
    )
    command.add_arguments(parser)
    try:
        return command.run(parser.parse_args(arguments))
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
