"""The version of the program; bundles name it in `created_by`."""

__version__ = "0.1.0"
