"""The report of one method on one set: its values, tables, figures, and page."""
