"""What a worker needs of the standard library between two cells, bound before there is any.

A cell can put anything in the place of a module's functions, mostly a mock that it forgets to take back. With
these names that costs nothing. Whatever else every cell needs is tried after each one (the rehearsal), and a
cell that has broken it is rolled back.
"""

import _signal  # type: ignore[import-not-found]  # of every Python, and in no stub
import array
import ctypes
import faulthandler
import gc
import json
import mmap
import os
import random
import select
import signal
import socket
import stat
import sys
import time

loads = json.loads
fork, waitpid, exit_now = os.fork, os.waitpid, os._exit
was_signalled, signal_of, code_of = os.WIFSIGNALED, os.WTERMSIG, os.WEXITSTATUS
getpid, getppid, kill, sleep = os.getpid, os.getppid, os.kill, time.sleep
fstat, set_blocking, seek, list_folder = os.fstat, os.set_blocking, os.lseek, os.listdir
is_regular = stat.S_ISREG
length, least, frames_of_threads = len, min, sys._current_frames
open_file, read_file, close_file = os.open, os.read, os.close
handler_of, handle, mask_signals = _signal.getsignal, _signal.signal, _signal.pthread_sigmask
"""What `signal` wraps: it turns numbers into names and back (measured: 5 µs for a handler, 0.2 ms for all
signals, in a process that has just been forked)."""
set_timer, ALL_SIGNALS = signal.setitimer, frozenset(map(int, signal.valid_signals()))
DEFAULT, IGNORE = _signal.SIG_DFL, _signal.SIG_IGN
TIMERS = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)
cancel_watchdog = faulthandler.cancel_dump_traceback_later
collect, freeze, unfreeze = gc.collect, gc.freeze, gc.unfreeze
get_random_state, set_random_state = random.getstate, random.setstate
shared_memory = mmap.mmap
new_array, new_poll, socketpair = array.array, select.poll, socket.socketpair
FDS_SPACE = socket.CMSG_SPACE(4 * array.array("i").itemsize)
flush_c = ctypes.CDLL(None).fflush
give_back = getattr(ctypes.CDLL(None), "malloc_trim", int)
"""Memory that is free to the kernel; not every C library has it."""
