"""The one exception for what a user can mend.

Raised where the cause is known and worded as cause and mend. The command line prints it as one line and exits
with status 2; every other exception is a failure of ours and exits with 1.
"""


class PopcompileError(Exception):
    """Something that the user can mend: a bad argument, a missing file, a package that was changed."""
