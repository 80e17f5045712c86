"""The exception for a graph that does not keep a pass's contract."""


class ContractError(RuntimeError):
    """A graph that a pass cannot take (requires), or that it should not have produced (ensures)."""
