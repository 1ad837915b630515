"""python -m tests.server.without_hangup FOLDER ARGUMENTS OF serve: a slow server that `nohup` has started."""

import runpy
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    runpy.run_module("tests.server.slow_server", run_name="__main__")
