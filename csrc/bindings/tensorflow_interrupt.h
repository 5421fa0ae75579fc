// Ctrl-C while the main thread is inside a function of TensorFlow. Python's own handler of SIGINT only notes that it
// came; what it means is done when the main thread runs Python again, which it does not while it waits for one of our
// ops. So these ops ask here, and give up waiting when the program was meant to end.
//
// How: a handler in front of Python's counts the signals. A thread then asks Python to run a function of ours in the
// main thread as soon as that runs Python (Py_AddPendingCall); as long as it has not run, a signal waits to be heard.
#pragma once

namespace hvd_backup {

// Puts the handler in front of Python's; again, if the program has set another one since. Does nothing before
// hvdb_tf_answer_interrupts() was called, or when SIGINT is ignored or kills.
void watch_for_interrupt();

// Whether SIGINT has come and Python has not heard of it, and would raise KeyboardInterrupt. Takes the GIL then.
bool interrupt_waits();

}  // namespace hvd_backup
