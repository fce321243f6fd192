"""The one exception that a user's mistake raises."""


class AtomasError(Exception):
    """A mistake in the input: one line that names the thing and the way out.

    The command line prints it without a traceback and exits with code 2.
    """
