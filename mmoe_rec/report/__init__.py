"""Reports: results of a command go in; terminal output, a page and JSON come out.

Begin in `parts`: a `Report` has a headline, figures, tables and sentences. `terminal` and `report_files` show it.
"""
