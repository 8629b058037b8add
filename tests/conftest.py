"""What every test process begins with."""

from __future__ import annotations

import signal

# Jobs that a script starts in the background ignore Ctrl-C and hand that on to their children; tests of it need it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
