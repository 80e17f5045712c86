"""The one exception for what a user can fix.

Raised where the cause is known and worded as cause and fix. The command line prints it as one line and exits
with status 2; every other exception is a failure of ours and exits with 1.
"""


class PopcompileError(Exception):
    """Something that the user can fix: a bad argument, a missing file, a package that was changed."""
