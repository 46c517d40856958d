"""What people read: tables, beside the published figures."""

from cbml.reporting.tables import write_tables

__all__ = ["write_tables"]
