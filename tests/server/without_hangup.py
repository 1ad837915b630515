"""python -m tests.server.without_hangup serve ...: a server that `nohup` has started."""

import runpy
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    runpy.run_module("mmoe_rec", run_name="__main__")
