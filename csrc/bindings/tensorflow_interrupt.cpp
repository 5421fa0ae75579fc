#include "bindings/tensorflow_interrupt.h"

#include <semaphore.h>
#include <signal.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <thread>

namespace hvd_backup {

namespace {

using AddPendingCall = int (*)(int (*)(void*), void*);  // Python's Py_AddPendingCall: 0, or -1 when its queue is full
using Ends = int (*)();

std::atomic<AddPendingCall> add_pending_call{nullptr};
std::atomic<Ends> ends{nullptr};
std::atomic<std::uintptr_t> came{0};
std::atomic<std::uintptr_t> heard{0};  // by Python's main thread
sem_t to_tell;
struct sigaction pythons;

// Nothing but what may be called within a signal handler.
void on_interrupt(int number, siginfo_t* info, void* context) {
  const int kept = errno;
  came.fetch_add(1);
  sem_post(&to_tell);
  if (pythons.sa_flags & SA_SIGINFO) {
    pythons.sa_sigaction(number, info, context);
  } else {
    pythons.sa_handler(number);
  }
  errno = kept;
}

int note_heard(void* so_many) {
  heard.store(reinterpret_cast<std::uintptr_t>(so_many));
  return 0;
}

void tell() {
  while (true) {
    if (sem_wait(&to_tell) != 0) continue;
    while (add_pending_call.load()(note_heard, reinterpret_cast<void*>(came.load())) != 0) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
  }
}

}  // namespace

void watch_for_interrupt() {
  static std::mutex mutex;
  const std::scoped_lock lock(mutex);
  struct sigaction now;
  if (!add_pending_call.load() || sigaction(SIGINT, nullptr, &now) != 0) return;
  if (now.sa_flags & SA_SIGINFO) {
    if (now.sa_sigaction == on_interrupt) return;
  } else if (now.sa_handler == SIG_DFL || now.sa_handler == SIG_IGN) {
    return;
  }
  static const bool started = [] {
    sem_init(&to_tell, 0, 0);
    std::thread(tell).detach();  // until the process ends
    return true;
  }();
  (void)started;
  pythons = now;
  struct sigaction own = now;
  own.sa_flags |= SA_SIGINFO;
  own.sa_sigaction = on_interrupt;
  sigaction(SIGINT, &own, nullptr);
}

bool interrupt_waits() { return came.load() != heard.load() && ends.load() && ends.load()() != 0; }

}  // namespace hvd_backup

// Called by hvd_backup/tensorflow/library.py. pending: Py_AddPendingCall. raises: whether SIGINT raises
// KeyboardInterrupt, a function that may be called from any thread.
extern "C" __attribute__((visibility("default"))) void hvdb_tf_answer_interrupts(int (*pending)(int (*)(void*), void*),
                                                                                 int (*raises)()) {
  hvd_backup::add_pending_call = pending;
  hvd_backup::ends = raises;
  hvd_backup::watch_for_interrupt();
}
