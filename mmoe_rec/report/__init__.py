"""Show the results of a command on the terminal, as an HTML page, and as JSON.

Start reading in `parts`, which defines a `Report`. `to_terminal` and `report_files` show it.
"""
