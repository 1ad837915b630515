"""Learn about data: a log goes in; draft settings (`init`) or a report of its health (`inspect`) come out.

Begin in `guess` for `init`, and in `data_health` for `inspect`.
"""
