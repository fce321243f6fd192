"""The one exception that a user's mistake raises."""


class LaunchError(ValueError):
    """A mistake in the request or the profile: one line that names the thing and the way out."""
