"""The version, in one place: the package, its metadata, ledgers and the command read it here."""

__version__ = "0.2.0"
