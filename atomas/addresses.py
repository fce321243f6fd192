"""Addresses of data on other machines."""

from atomas.errors import AtomasError

_KEYLESS = ("http", "https", "s3")
"""Where what stands before the @ can only be a secret; elsewhere it may be a container or a user."""
_INSTEAD = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, in the environment",
    "http": "a line `machine HOST login NAME password SECRET` in ~/.netrc (or the file that NETRC names)",
}


def without_credentials(address: str) -> str:
    """The address without the user and password that may stand in it, for messages."""
    scheme, mark, rest = address.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{mark}{host.rpartition('@')[2]}{slash}{path}"


def check_address(address: str, key: str = "") -> None:
    """Refuse a password in an address: configurations, logs, job scripts and process lists would all show it.

    Args:
        address: to be checked; a path is none, and passes.
        key: what the message begins with.

    Raises:
        AtomasError: there is one; says where it belongs.
    """
    scheme, mark, rest = address.partition("://")
    user, at, _ = rest.partition("/")[0].rpartition("@")
    if not (mark and at) or (":" not in user and scheme not in _KEYLESS):
        return
    instead = _INSTEAD.get(scheme.removesuffix("s") if scheme == "https" else scheme)
    raise AtomasError(
        f"{key}{without_credentials(address)} has a user or password in it, which files and logs would show: "
        f"give it by {instead or 'what the library of the scheme reads, such as FSSPEC_* in the environment'}"
    )
